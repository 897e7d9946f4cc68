"""Loaders: how a kernel reads keys or values out of their stored format."""

from pallas_kernels.loader.base import Loader
from pallas_kernels.loader.block import BlockLoader
from pallas_kernels.loader.dense import DenseLoader
from pallas_kernels.loader.integer import IntegerLoader
from pallas_kernels.loader.rotated import RotatedLoader

__all__ = ["BlockLoader", "DenseLoader", "IntegerLoader", "Loader", "RotatedLoader"]
