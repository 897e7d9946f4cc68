"""Contests of `decode_attention`: our formats, the same decoded naively, and what else computes attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import rival, sharded
from experiments.bench.contest import Contest
from experiments.bench.entrant import Arrays, Data, Entrant, compiled, reader
from pallas_kernels import rows
from pallas_kernels.decode_attention import api, reference
from pallas_kernels.decode_attention.specs import DecodeSpec, Format
from pallas_kernels.dispatch import Op

FORMATS: dict[str, tuple[Format, Format]] = {
    "f32": (Format(32), Format(32)),
    "bf16": (Format(16), Format(16)),
    "int8": (Format(8), Format(8)),
    "int4": (Format(4), Format(4)),
    "kivi4": (Format(4, block=32), Format(4, group=32)),
    "int2": (Format(2), Format(2)),
    "kivi2": (Format(2, block=32), Format(2, group=32)),
}
"""Keys and values. Scales are per slot and head, but KIVI's: keys per channel of 32 slots, values per 32 channels."""

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class Size:
    """B rows of S slots, N query heads on K kv heads of H channels."""

    batch: int
    context: int
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def case(self) -> dict[str, Any]:
        heads = f"{self.query_heads}:{self.kv_heads}"
        return {"batch": self.batch, "context": self.context, "heads": heads, "head_dim": self.head_dim}

    def spec(self, format: str, window: bool = False) -> DecodeSpec:
        keys, values = FORMATS[format]
        return DecodeSpec(
            format,
            self.batch,
            self.kv_heads,
            self.query_heads // self.kv_heads,
            self.context,
            self.head_dim,
            keys,
            values,
            window=2 * self.context if window else None,
            lengths=(self.context,) * self.batch,
        )


def contest(size: Size, formats: Sequence[str], rivals: Sequence[str]) -> Contest:
    """Everybody at one size. Each of our formats is also decoded naively; the first one also masks by positions."""
    entrants: list[Entrant] = []
    for format in formats:
        entrants += _own(size, format)
    coded = [format for format in formats if FORMATS[format][0].bits <= 8]
    for format in coded[:1]:
        entrants += _read(size, format, positions=True)
    plain = {name: _plain(size, name) for name in ("f32", "bf16")}
    entrants += [entrant for name in rivals for entrant in rival.DECODE[name](plain, size.head_dim**-0.5)]
    entrants.append(reader(plain["bf16"].nbytes))
    return Contest(api.OP.name, size.case, tuple(entrants), ("kvjax bf16", "xla f32"))


def _own(size: Size, format: str) -> list[Entrant]:
    """A format as `_read`; if it is a code, also decoded naively."""
    found = _read(size, format)
    spec = size.spec(format)
    return [*found, _entrant(f"naive {format}", spec, _data(spec), REFERENCE)] if spec.keys.bits <= 8 else found


def _read(size: Size, format: str, *, positions: bool = False) -> list[Entrant]:
    """What the dispatcher picks, also over several CPU devices; on an accelerator also every other implementation.

    Positions are read and compared with a window that hides nothing.
    """
    spec = size.spec(format, window=positions)
    data = _data(spec)
    name = f"kvjax {format}" + ", positions" * positions
    found = [_entrant(name, spec, data, None)]
    if jax.default_backend() != "cpu" and not positions:
        found += [_entrant(f"{name}, {other}", spec, data, other) for other in _named(api.OP)]
    number = sharded.devices(size.kv_heads)
    if number > 1:
        over = sharded.spread(data, number)
        prepare = sharded.program(_attend(spec, None), number)
        found.append(dataclasses.replace(found[0], name=f"{name}, {number} devices", data=over, prepare=prepare))
    naive = f"naive {format}" if spec.keys.bits <= 8 else None
    return [dataclasses.replace(entrant, naive=naive) for entrant in found]


def _named(op: Op) -> list[str]:
    return [implementation.name for implementation in op.implementations if implementation.name != REFERENCE]


def _entrant(name: str, spec: DecodeSpec, data: Data, implementation: str | None) -> Entrant:
    output = 4 * spec.batch * spec.kv_heads * spec.rows * (spec.head_dim + 1)
    return Entrant(
        name,
        data,
        compiled(_attend(spec, implementation)),
        data.nbytes + output,
        answer=lambda result: result[0][0, 0],
        own=implementation is None,
    )


def _attend(spec: DecodeSpec, implementation: str | None) -> Callable[..., tuple[jax.Array, ...]]:
    static = {**_split(spec.abstract()[1])[1], "implementation": implementation}

    def attend(q: jax.Array, keys: Any, values: Any, arrays: dict[str, Any]) -> tuple[jax.Array, ...]:
        return api.decode_attention(q, keys, values, **arrays, **static)

    return attend


def _data(spec: DecodeSpec) -> Data:
    """(q, keys, values, arrays among the keywords), laid out as this platform wants it."""

    def make() -> Arrays:
        (q, keys, values), kwargs = spec.arguments()
        return q, rows.fold(keys), rows.fold(values), _split(kwargs)[0]

    return Data(make, lambda q, keys, values, arrays: _first(q, keys, values, spec.head_dim**-0.5))


def _plain(size: Size, format: str) -> Data:
    """(q, k, v) for those who know no formats: q [B, K, G, H] in the dtype of k and v [B, K, S, H]."""

    def make() -> Arrays:
        (q, keys, values), _ = size.spec(format).arguments()
        return q.astype(keys.x.dtype), keys.x, values.x  # pyright: ignore[reportAttributeAccessIssue]

    return Data(make, rival.definition(size.head_dim**-0.5))


def _first(q: jax.Array, keys: Any, values: Any, scale: float) -> jax.Array:
    """By the definition, the answer to the first row and kv head, whose slots are all valid: f32 [R, H]."""

    def cut(loader: Any) -> Any:
        return loader.with_slots(jax.tree.map(lambda x: x[:1, :1], loader.slots))

    static = {"window": None, "scale": scale, "softcap": None, "return_logits": False}
    absent = dict.fromkeys(("positions", "query_positions", "bias"))
    return reference.run(q[:1, :1].astype(jnp.float32), cut(keys), cut(values), **absent, **static)[0][0, 0]


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, the rest) of an op's keywords."""
    arrays = {name: x for name, x in kwargs.items() if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x))}
    return arrays, {name: x for name, x in kwargs.items() if name not in arrays}
