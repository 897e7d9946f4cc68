"""Loaders: how a kernel reads keys or values out of their stored format."""

from pallas_kernels.loader.base import Loader
from pallas_kernels.loader.block import BlockLoader
from pallas_kernels.loader.codebook import CodebookLoader
from pallas_kernels.loader.concat import ConcatLoader
from pallas_kernels.loader.dense import DenseLoader
from pallas_kernels.loader.fixed import FixedLoader
from pallas_kernels.loader.float8 import Float8Loader
from pallas_kernels.loader.integer import IntegerLoader
from pallas_kernels.loader.low_rank import LowRankLoader
from pallas_kernels.loader.outlier import OutlierLoader
from pallas_kernels.loader.rotated import RotatedLoader
from pallas_kernels.loader.scaled import ScaledLoader
from pallas_kernels.loader.subset import SubsetLoader

__all__ = [
    "BlockLoader",
    "CodebookLoader",
    "ConcatLoader",
    "DenseLoader",
    "FixedLoader",
    "Float8Loader",
    "IntegerLoader",
    "Loader",
    "LowRankLoader",
    "OutlierLoader",
    "RotatedLoader",
    "ScaledLoader",
    "SubsetLoader",
]
