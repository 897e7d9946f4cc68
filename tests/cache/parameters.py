"""Parameters for codecs that need some, drawn at random but of the kind that calibration or a prompt gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.codec import Codec
from kvjax.cache.layout import CacheDims
from kvjax.typing import PyTree


def learnt(codec: Codec, dims: CacheDims, seed: int = 0) -> PyTree:
    """What calibration could have given for one layer; None where nothing is calibrated."""
    if not codec.calibrated:
        return None
    shapes, rng = codec.for_layer(dims).parameter_shapes(dims), np.random.default_rng(seed)
    if "encoder" in shapes:
        return factors(shapes["encoder"].shape, shapes["decoder"].shape, rng)
    codebook = np.sort(rng.uniform(-1, 1, shapes["codebook"].shape))
    drawn = {"codebook": codebook, "levels": 1.1 * codebook + 0.05}
    if "scale" in shapes:
        drawn |= {"scale": rng.uniform(1.5, 2.5, shapes["scale"].shape)}
        drawn |= {"offset": rng.normal(size=shapes["offset"].shape)}
    return {name: np.asarray(x, np.float32) for name, x in drawn.items()}


def factors(encoder: tuple[int, ...], decoder: tuple[int, ...], rng: np.random.Generator) -> PyTree:
    """An orthonormal encoder and its transpose."""
    channels, rank = encoder[2:]
    basis = np.linalg.qr(rng.normal(size=(channels, rank)))[0].astype(np.float32)
    heads, dim = decoder[1], decoder[3]
    return {"encoder": basis[None, None], "decoder": basis.T.reshape(rank, heads, dim).swapaxes(0, 1)[None]}


def parameters_of(codec: Codec, dims: CacheDims, seed: int = 0) -> PyTree:
    """Parameters as they are after a prompt."""
    if not codec.fits_prompt:
        return codec.parameters(dims, learnt(codec, dims, seed))
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            order = rng.random(leaf.shape).argsort(-1).argsort(-1)
            return jnp.asarray(order < codec.channels(leaf.shape[-1]))  # type: ignore[attr-defined]
        return jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, codec.parameter_shapes(dims))
