"""Other people's attention: XLA left to itself, jax.nn, jax's paged kernels, tokamax and torch.

What need not be installed, and what JAX has deprecated, is imported by name when it is asked for: an entrant that is
not there is left out and says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.entrant import Arrays, Data, Entrant, Program, compiled

GPU_PAGE, TPU_PAGE, TPU_PAGES_PER_BLOCK = 16, 128, 4
"""Slots per page, and pages per block, of jax's paged kernels: the GPU kernel's defaults, and blocks of 512 slots."""

INT8_TOP = 127.5
"""What jax's int8 keys and values are multiplied with before they are rounded, on a TPU."""


def definition(scale: float) -> Callable[..., jax.Array]:
    """(q [B, K, G, H], k, v [B, K, S, H]) -> f32 [G, H], attention of the first row and kv head."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x[0, 0].astype(jnp.float32) for x in (q, k, v))
        with jax.default_matmul_precision("highest"):
            return jax.nn.softmax(q @ k.T * scale, axis=-1) @ v

    return attend


def einsum(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """What one writes first; probabilities in the dtype of v."""
    logits = jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, v, preferred_element_type=jnp.float32)


Plain = Mapping[str, Data]
"""(q, k, v) in float32 and bfloat16, by the names "f32" and "bf16"."""


def _xla(plain: Plain, scale: float) -> list[Entrant]:
    return [
        Entrant(f"xla {name}", data, compiled(partial(einsum, scale=scale)), data.nbytes, _first_head)
        for name, data in plain.items()
    ]


def _jax_nn(plain: Plain, scale: float) -> list[Entrant]:
    data = _tokens_first(plain[_native()])
    attend = partial(jax.nn.dot_product_attention, scale=scale)
    return [Entrant(f"jax.nn {_native()}", data, compiled(attend), data.nbytes, _first_query_heads(data))]


def _tokamax(plain: Plain, scale: float) -> list[Entrant]:
    data = _tokens_first(plain[_native()])

    def prepare(data: Data) -> Program:
        tokamax = importlib.import_module("tokamax")
        return compiled(partial(tokamax.dot_product_attention, scale=scale))(data)

    return [Entrant(f"tokamax {_native()}", data, prepare, data.nbytes, _first_query_heads(data))]


def _torch(plain: Plain, scale: float) -> list[Entrant]:
    def entrant(name: str, data: Data) -> Entrant:
        return Entrant(f"torch {name}", data, partial(_torch_program, scale=scale), data.nbytes, lambda out: out[0, 0])

    return [entrant(name, data) for name, data in plain.items()]


def _torch_program(data: Data, scale: float) -> Program:
    """Queries that share a kv head are rows of one head: faster than `enable_gqa`, which repeats keys and values."""
    torch = importlib.import_module("torch")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise NotImplementedError("this torch cannot use the GPU")
    attend = torch.nn.functional.scaled_dot_product_attention
    held: list[Any] = []

    def start(arrays: Arrays) -> Any:
        if not held:
            held.extend(torch.from_dlpack(x) for x in arrays)
        return attend(*held, scale=scale)

    def wait(out: Any) -> _Torch:
        if on_gpu:
            torch.cuda.synchronize()
        return _Torch(out)

    return Program(start, wait, None)


class _Torch:
    """A torch result that is read like a NumPy array."""

    def __init__(self, out: Any) -> None:
        self.out = out

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.out[index].float().cpu().numpy()


def _paged(plain: Plain, scale: float) -> list[Entrant]:
    """jax's paged attention, for this platform, with pages in their order; bfloat16, and int8 with a scale per slot."""
    attend = {"gpu": _paged_gpu, "tpu": _paged_tpu}.get(jax.default_backend())

    def prepare(data: Data) -> Program:
        if attend is None:
            raise NotImplementedError("jax has paged attention for GPUs and TPUs only")
        return compiled(partial(attend, scale=scale))(data)

    page = TPU_PAGE if jax.default_backend() == "tpu" else GPU_PAGE
    found = []
    for name, bits in (("bf16", 16), ("int8", 8)):
        data = _in_pages(plain["bf16"], page, bits, scale)
        found.append(Entrant(f"jax paged {name}", data, prepare, data.nbytes, _first_query_heads_flat(plain["bf16"])))
    return found


def _in_pages(data: Data, page: int, bits: int, scale: float) -> Data:
    """(q [B, N, H], pages of keys and of values [K, B·n, page, H], their scales [K, B·n, page, 1] or None)."""

    def make() -> Arrays:
        q, k, v = data.make()
        coded = [_int8(x) if bits == 8 else (x, None) for x in (k, v)]
        return q.reshape(q.shape[0], -1, q.shape[-1]), *[
            None if x is None else _paged_layout(x, page) for pair in coded for x in pair
        ]

    def expected(q: jax.Array, *_: Any) -> jax.Array:
        return definition(scale)(*data.make())

    return Data(make, expected)


def _int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jnp.round(x.astype(jnp.float32) / scale * 127).astype(jnp.int8), scale


def _paged_layout(x: jax.Array, page: int) -> jax.Array:
    batch, heads, slots, width = x.shape
    return jnp.moveaxis(x, 1, 0).reshape(heads, batch * slots // page, page, width)


def _table(q: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lengths [B] and page numbers [B, n] of rows whose pages follow each other."""
    batch, each = q.shape[0], pages.shape[1] // q.shape[0]
    lengths = jnp.full((batch,), each * pages.shape[2], jnp.int32)
    return lengths, jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)


def _paged_gpu(q: jax.Array, k: jax.Array, k_scale: Any, v: jax.Array, v_scale: Any, *, scale: float) -> jax.Array:
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    lengths, table = _table(q, k)
    # Codes are at most 127 in magnitude; the scale is what a code of 1 stands for.
    scales = (
        {} if k_scale is None else {"k_scales_pages": k_scale[..., 0] / 127, "v_scales_pages": v_scale[..., 0] / 127}
    )
    return module.paged_attention((q * scale).astype(q.dtype), k, v, table, lengths, **scales)


def _paged_tpu(q: jax.Array, k: jax.Array, k_scale: Any, v: jax.Array, v_scale: Any, *, scale: float) -> jax.Array:
    package = "jax.experimental.pallas.ops.tpu.paged_attention"
    quantized = importlib.import_module(f"{package}.quantization_utils").QuantizedTensor
    lengths, table = _table(q, k)
    if k_scale is not None:
        k, v = (quantized(x, s * INT8_TOP / 127) for x, s in ((k, k_scale), (v, v_scale)))
    attend = importlib.import_module(package).paged_attention
    pages = next(n for n in range(min(TPU_PAGES_PER_BLOCK, table.shape[1]), 0, -1) if table.shape[1] % n == 0)
    return attend((q * scale).astype(q.dtype), k, v, lengths, table, pages_per_compute_block=pages)


DECODE: dict[str, Callable[[Plain, float], list[Entrant]]] = {
    "xla": _xla,
    "jax.nn": _jax_nn,
    "torch": _torch,
    "tokamax": _tokamax,
    "paged": _paged,
}
"""Everybody by the name that the command line has for them."""


def _native() -> str:
    """The dtype in which attention is fastest here."""
    return "f32" if jax.default_backend() == "cpu" else "bf16"


def _tokens_first(data: Data) -> Data:
    """(q [B, 1, N, H], k and v [B, S, K, H]), the layout of `jax.nn`."""

    def make() -> Arrays:
        q, k, v = data.make()
        return q.reshape(q.shape[0], 1, -1, q.shape[-1]), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    assert data.expected is not None
    expected = data.expected
    return Data(
        make,
        lambda q, k, v: expected(
            q[:1, 0].reshape(1, k.shape[2], -1, q.shape[-1]), jnp.swapaxes(k[:1], 1, 2), jnp.swapaxes(v[:1], 1, 2)
        ),
    )


def _first_head(out: jax.Array) -> jax.Array:
    return out[0, 0]


def _first_query_heads(data: Data) -> Callable[[jax.Array], jax.Array]:
    """Of [B, 1, N, H] the N / K heads of the first row that read the first kv head."""
    q, k, _ = data.abstract
    return lambda out: out[0, 0, : q.shape[2] // k.shape[2]]


def _first_query_heads_flat(plain: Data) -> Callable[[jax.Array], jax.Array]:
    """The same of [B, N, H]."""
    groups = plain.abstract[0].shape[2]
    return lambda out: out[0, :groups]
