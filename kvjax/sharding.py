"""Running on a (data, model) mesh: which axis of which array lies on which axis of the mesh.

Rows of a batch go to `data`; kv heads, the query heads that read them, MLP channels and the vocabulary go to `model`.
A cache is local in both: `Sharded` runs a layer cache's step on every device with the rows and heads that the device
holds, and no method communicates but those whose policy joins the heads of a layer (`kvjax.cache.exchange`). An axis
that the mesh does not divide is replicated; `describe` says so.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax.cache.exchange import heads_over
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree

if TYPE_CHECKING:
    from kvjax.cache.model_cache import ModelCache

Axes = tuple[str | None, ...]

# Logical axes of the model's parameters by the last two names of their path.
_PARAMETERS: dict[tuple[str, ...], Axes] = {
    ("embed", "embedding"): ("vocab", None),
    ("head", "kernel"): (None, "vocab"),
    ("head", "bias"): ("vocab",),
    ("q", "kernel"): (None, "heads", None),
    ("k", "kernel"): (None, "kv_heads", None),
    ("v", "kernel"): (None, "kv_heads", None),
    ("q", "bias"): ("heads", None),
    ("k", "bias"): ("kv_heads", None),
    ("v", "bias"): ("kv_heads", None),
    ("o", "kernel"): ("heads", None, None),
    ("gate", "kernel"): (None, "mlp"),
    ("up", "kernel"): (None, "mlp"),
    ("gate", "bias"): ("mlp",),
    ("up", "bias"): ("mlp",),
    ("down", "kernel"): ("mlp", None),
}


class LayerCacheProtocol(Protocol):
    """What sharding needs of a layer's cache: leaves [B, ...] or [B, K or 1, ...], but `head_index` [K]."""

    head_index: Any
    length: Any
    parts: Any

    def step(self, step: Any) -> tuple[Array, Any]: ...


Layer = TypeVar("Layer", bound=LayerCacheProtocol)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis of each logical axis; None replicates it."""

    batch: str | None = "data"
    heads: str | None = "model"
    kv_heads: str | None = "model"
    mlp: str | None = "model"
    vocab: str | None = "model"

    def __post_init__(self) -> None:
        if self.heads != self.kv_heads:
            raise UsageError(f"query heads go where their kv heads are; got {self.heads!r} and {self.kv_heads!r}")

    def axis(self, logical: str | None, size: int, mesh: Mesh) -> str | None:
        """The mesh axis of a logical axis with `size` entries; None where there is none or it does not divide."""
        name = getattr(self, logical) if logical else None
        return name if name is not None and size % mesh.shape[name] == 0 else None


def make_mesh(data: int, model: int) -> Mesh:
    """A mesh ("data", "model") over the first data * model devices, for programs that XLA partitions.

    Raises:
      UsageError: there are fewer devices.
    """
    devices = jax.devices()
    if min(data, model) < 1 or data * model > len(devices):
        raise UsageError(
            f"a mesh of data={data} times model={model} does not fit {len(devices)} {devices[0].platform} device(s). "
            "Choose smaller axes, or on a CPU simulate devices with XLA_FLAGS=--xla_force_host_platform_device_count=8."
        )
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices[: data * model])


def _is_layer(x: Any) -> bool:
    return hasattr(x, "head_index")


def cache_specs(cache: PyTree, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> PyTree:
    """PartitionSpecs of a layer cache, or of anything that holds layer caches and arrays [B, ...] (a ModelCache)."""
    if _is_layer(cache):
        return _layer_specs(cache, mesh, rules)

    def spec(x: Any) -> PyTree:
        return _layer_specs(x, mesh, rules) if _is_layer(x) else P(rules.axis("batch", x.shape[0], mesh))

    return jax.tree.map(spec, cache, is_leaf=_is_layer)


def _layer_specs(cache: LayerCacheProtocol, mesh: Mesh, rules: ShardingRules) -> PyTree:
    heads = cache.head_index.shape[0]
    model = rules.axis("kv_heads", heads, mesh)

    def spec(leaf: Array) -> P:
        if leaf is cache.head_index:
            return P(model)
        if any(leaf is getattr(part, name) for part in cache.parts for name in ("hiding", "head_map")):
            return P(rules.axis("batch", leaf.shape[0], mesh))
        # The pages of a pool are cut like heads: as many for each shard.
        by_head = leaf.ndim > 1 and leaf.shape[1] % heads == 0 and leaf.shape[1] > 0
        return P(rules.axis("batch", leaf.shape[0], mesh), *((model,) if by_head else ()))

    return jax.tree.map(spec, cache)


def step_specs(step: Any, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> Any:
    """PartitionSpecs of a `Step`: rows over data, query and kv heads over model."""
    batch = rules.axis("batch", step.queries.shape[0], mesh)
    model = rules.axis("kv_heads", step.keys.shape[2], mesh)
    return dataclasses.replace(
        step,
        queries=P(batch, None, model),
        keys=P(batch, None, model),
        values=P(batch, None, model),
        positions=P(batch),
        valid=P(batch),
        rope=jax.tree.map(lambda _: P(), step.rope),
        hidden=None if step.hidden is None else P(batch),
        output_projection=None if step.output_projection is None else P(model),
        # A latent is one kv head, which is not cut: its maps stay whole.
        latent=None
        if step.latent is None
        else dataclasses.replace(step.latent, queries=P(batch), up_keys=P(), up_values=P()),
        head_map=None if step.head_map is None else P(batch),
    )


def param_specs(params: PyTree, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> PyTree:
    """PartitionSpecs of the Transformer's parameters; query heads are cut where their layer's kv heads are."""
    leaves = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kv_heads = {names[:-2]: leaf.shape[1] for names, leaf in leaves.items() if names[-2:] == ("k", "kernel")}

    def spec(path: Any, leaf: Array) -> P:
        names = _names(path)
        axes = _PARAMETERS.get(names[-2:], ())
        heads = kv_heads.get(names[:-2], 1)  # a layer without kv heads has one latent for all, which is not cut
        sizes = [math.gcd(n, heads) if a == "heads" else n for a, n in zip(axes, leaf.shape, strict=False)]
        return P(*(rules.axis(a, n, mesh) for a, n in zip(axes, sizes, strict=True)))

    return jax.tree_util.tree_map_with_path(spec, params)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", key)) for key in path)


def place(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Puts arrays where their PartitionSpecs say; inside jit a constraint. A shard that is there is not copied."""
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def sharded_step(cache: Layer, step: Any, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> tuple[Array, Layer]:
    """`cache.step(step)` on every device with the rows and heads that it holds.

    Raises:
      UsageError: query heads do not read the kv heads in order (n // G), so that they cannot be cut with them.
    """
    specs, inputs = cache_specs(cache, mesh, rules), step_specs(step, mesh, rules)
    if inputs.queries[2] is not None:
        _check_map(step)
        own = step.value_part and step.value_part[: step.queries.shape[2] // mesh.shape[inputs.queries[2]]]
        step, inputs = (dataclasses.replace(x, kv_head_of_query=None, value_part=own) for x in (step, inputs))
    structure = []

    def local(cache: Layer, step: Any) -> tuple[Array, list[Array]]:
        with heads_over(inputs.keys[2]):
            out, new = cache.step(step)
        structure.append(jax.tree.structure(new))
        return out, jax.tree.leaves(new)

    # check_vma: that replicated leaves are equal on all shards (positions that all heads share) cannot be inferred.
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, inputs), out_specs=(inputs.queries, jax.tree.leaves(specs)), check_vma=False
    )
    out, leaves = run(cache, step)
    return out, jax.tree.unflatten(structure[0], leaves)


def _check_map(step: Any) -> None:
    n, k = step.queries.shape[2], step.keys.shape[2]
    if step.allocation is not None or step.selective:
        raise UsageError(
            "query heads choose their kv heads by what all of them hold, or one head hides tokens from all, so heads "
            "cannot be cut; use ShardingRules(heads=None, kv_heads=None), which replicates attention over it"
        )
    parts = step.value_part
    if parts is not None and parts != parts[: n // k] * k:
        raise UsageError(f"value_part {parts} is not the same for all kv heads, so heads cannot be cut")
    if step.kv_head_of_query not in (None, tuple(head * k // n for head in range(n))):
        raise UsageError(
            f"kv_head_of_query {step.kv_head_of_query} does not read the kv heads in order, so query heads cannot be "
            "cut with them; use ShardingRules(heads=None, kv_heads=None), which replicates attention over it"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharded:
    """A layer cache whose steps run on a mesh; stands wherever a layer cache does."""

    cache: Any
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    rules: ShardingRules = dataclasses.field(default=ShardingRules(), metadata={"static": True})

    def step(self, step: Any) -> tuple[Array, Sharded]:
        """See `LayerCache.step`."""
        out, cache = sharded_step(self.cache, step, self.mesh, self.rules)
        return out, dataclasses.replace(self, cache=cache)

    def end_prompt(self) -> Sharded:
        """See `LayerCache.end_prompt`."""
        return dataclasses.replace(self, cache=self.cache.end_prompt())

    @property
    def length(self) -> Array:
        return self.cache.length

    @property
    def method(self) -> Any:
        return self.cache.method

    @property
    def dims(self) -> Any:
        return self.cache.dims

    @property
    def phase(self) -> Any:
        return self.cache.phase

    @property
    def segments(self) -> tuple[Any, ...]:
        return self.cache.segments


def shard_cache(cache: ModelCache, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> ModelCache:
    """A model's cache spread over the mesh, every layer `Sharded`; inside jit too.

    The result takes over buffers of `cache`: go on with one of them only, or give `cache.fork()`.

    Raises:
      UsageError: kv heads would be cut, and the method stores them together or treats each by a table.
    """
    for layer in filter(_is_layer, cache):
        cut = rules.axis("kv_heads", layer.dims.kv_heads, mesh) is not None
        if cut and (layer.method.joint or layer.method.by_head(layer.dims)):
            raise UsageError(
                f"method {layer.method.name!r} stores a layer's kv heads together or by a table of them, so "
                "they cannot be cut; spread rows only: ShardingRules(heads=None, kv_heads=None)"
            )
    placed = place(cache, cache_specs(cache, mesh, rules), mesh)
    return dataclasses.replace(
        placed, layers=tuple(Sharded(layer, mesh, rules) if _is_layer(layer) else layer for layer in placed.layers)
    )


def unshard_cache(cache: ModelCache) -> ModelCache:
    """The inverse of `shard_cache`; the arrays stay where they are."""
    return dataclasses.replace(
        cache, layers=tuple(layer.cache if isinstance(layer, Sharded) else layer for layer in cache.layers)
    )


def describe(params: PyTree, cache: PyTree, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> str:
    """What each device holds, and what could not be divided; a few lines for people."""
    shapes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    lines = [f"mesh {shapes} on {mesh.size} {mesh.devices.flat[0].platform} devices"]
    for name, tree, specs in (
        ("parameters", params, param_specs(params, mesh, rules)),
        ("cache", cache, cache_specs(cache, mesh, rules)),
    ):
        total = sum(x.nbytes for x in jax.tree.leaves(tree))
        lines.append(f"{name}: {total:,} bytes, {_bytes_per_device(tree, specs, mesh):,} on each device")
    first = jax.tree.leaves(cache, is_leaf=_is_layer)[0]
    kept = {"kv_heads": first.head_index.shape[0]} if _is_layer(first) else {}
    sizes = kept | {"batch": first.length.shape[0] if kept else first.shape[0]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = _PARAMETERS.get(_names(path)[-2:], ())
        sizes |= {a: n for a, n in zip(axes, leaf.shape, strict=False) if a in ("mlp", "vocab")}
    for logical, size in sizes.items():
        axis = getattr(rules, logical)
        if axis is not None and rules.axis(logical, size, mesh) is None:
            also = ", with attention and its parameters" if logical == "kv_heads" else ""
            lines.append(
                f"replicated: {logical} {size} is not a multiple of {axis}={mesh.shape[axis]}, so every device of that "
                f"axis holds all of it{also}"
            )
    return "\n".join(lines)


def _bytes_per_device(tree: PyTree, specs: PyTree, mesh: Mesh) -> int:
    def share(leaf: Array, spec: P) -> int:
        return leaf.nbytes // math.prod(mesh.shape[axis] for axis in spec if axis is not None)

    return sum(jax.tree.leaves(jax.tree.map(share, tree, specs)))
