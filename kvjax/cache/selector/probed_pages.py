"""The pages that resemble one probe query of a whole window, in some layers more of them than in others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.base import check_word
from kvjax.cache.policy.seen import Tokens, ranks
from kvjax.cache.prompt import group_filled
from kvjax.cache.selector.base import Chosen, Selector
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels.pages import Pages

Probe = Literal["norm", "channels", "mean"]
Cutoff = Literal["density", "uniform"]
LEAST = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probed:
    """What a layer knows of its pages and of its last window.

    Attributes:
      sums: f32 [B, K, M, H], the sum of the keys of each page, before rotary embedding.
      spread: f32 [B, K], over how many pages the last window's probe was spread: an entropy in nats.
      places: int32 [B, K], pages that the next window reads.
    """

    sums: Array
    spread: Array
    places: Array


@dataclasses.dataclass(frozen=True)
class ProbedPages(Selector):
    """ActQKV (Xiao et al., 2025, arXiv:2502.13542), a reconstruction from its abstract; it has no release.

    The tokens of one step (a chunk of a streaming prefill, a question, a decoded token) are a window. Its queries,
    before rotary embedding (so that positions are not mixed), become one probe per query head, sum_i w_i q_i with
    w = softmax of the activation bias. A page's score is scale · probe · mean key, the largest in the group of query
    heads; the pages with the largest scores are read.

    How many: with cutoff "density" a layer's number follows the entropy of softmax(scores), averaged over its heads
    (the denser the information, the fewer pages), such that all layers together read what they would at `tokens`
    each. The entropies are those of the window before: a layer cannot wait for those that follow it. What is read at
    most is allocated in every layer, and masked.

    Attributes:
      tokens: slots that a layer reads, on average over layers, in whole pages.
      size: slots per page.
      probe: the activation bias. "norm": |q_i| over its mean in the window, minus 1; "channels": the mean over channels
        of |z|, each channel normalised over the window; "mean": none, so that the probe is the mean query.
      cutoff: "density", or "uniform": `tokens` in every layer.
      most: no layer reads more than this times `tokens`.
    """

    rotated: ClassVar[bool] = False

    tokens: int = 2048
    size: int = 128
    probe: Probe = "norm"
    cutoff: Cutoff = "density"
    most: float = 2.0

    def __post_init__(self) -> None:
        check_word(self, "probe", Probe)
        check_word(self, "cutoff", Cutoff)
        if self.size < 1 or self.tokens < self.size or self.most < 1:
            raise UsageError(
                f"ProbedPages reads at least one page and most is at least 1; got tokens={self.tokens}, "
                f"size={self.size} and most={self.most}"
            )

    @property
    def page(self) -> int:
        return self.size

    def index(self, dims: CacheDims, pages: int) -> Probed:
        heads = dims.batch, dims.kv_heads
        return Probed(
            jnp.zeros((*heads, pages, dims.key_width), jnp.float32),
            jnp.zeros(heads, jnp.float32),
            jnp.full(heads, self.tokens // self.size, jnp.int32),
        )

    def indexed(self, index: Probed, keys: Array, valid: Array, page: Array) -> Probed:
        added = jnp.where(valid[..., None], keys, 0.0).sum(3)
        b, k = jnp.arange(added.shape[0])[:, None, None], jnp.arange(added.shape[1])[None, :, None]
        at = b, k, jnp.broadcast_to(page, added.shape[:3])
        return dataclasses.replace(index, sums=index.sums.at[at].add(added, mode="drop"))

    def choose(self, index: Probed, tokens: Tokens, valid: Array) -> tuple[Chosen | None, Probed]:
        pages = valid.shape[2]
        if self.tokens // self.size >= pages:
            return None, index
        scores = self._scores(index, tokens, valid)
        looked = tokens.valid.any(-1)[:, None]
        most = self._most(pages)
        best = jax.lax.top_k(scores, most)[1]
        read = jnp.arange(most) < index.places[..., None]
        # In rising order, those that are read first.
        table = jnp.sort(jnp.where(read, best, best + pages), axis=-1) % pages
        index = dataclasses.replace(index, spread=jnp.where(looked, _entropy(scores), index.spread))
        return Chosen(Pages(table.astype(jnp.int32), self.size), read), index

    def settled(self, indices: Sequence[Probed]) -> Sequence[Probed]:
        if self.cutoff == "uniform":
            return indices
        spread = jnp.stack([index.spread.mean(1) for index in indices])
        most = jnp.array([self._most(index.sums.shape[2]) for index in indices], jnp.float32)[:, None]
        total = self.tokens // self.size * len(indices)
        places = _whole(_proportional(spread + LEAST, total, most))
        return [
            dataclasses.replace(index, places=jnp.broadcast_to(number[:, None], index.places.shape))
            for index, number in zip(indices, places, strict=True)
        ]

    def _most(self, pages: int) -> int:
        """Pages that a layer with `pages` of them may read."""
        number = self.tokens // self.size
        return min(number if self.cutoff == "uniform" else int(self.most * number), pages)

    def _scores(self, index: Probed, tokens: Tokens, valid: Array) -> Array:
        """f32 [B, K, M], -inf for pages without tokens."""
        seen = tokens.valid[:, None, None]
        queries = jnp.where(seen[..., None], tokens.unrotated_queries.astype(jnp.float32), 0.0)
        weights = self._weights(queries, seen)
        probe = jnp.einsum("bkgt,bkgth->bkgh", weights, queries)
        count = valid.sum(-1)
        mean = index.sums / jnp.maximum(count, 1)[..., None]
        scores = jnp.einsum("bkgh,bkmh->bkgm", probe, mean) * tokens.step.scale
        scores = jnp.where(group_filled(tokens.step)[..., None], scores, -jnp.inf).max(2)
        return jnp.where(count > 0, scores, -jnp.inf)

    def _weights(self, queries: Array, seen: Array) -> Array:
        """f32 [B, K, G, T], 1 in total over each window: queries [B, K, G, T, H], 0 where not seen [B, 1, 1, T]."""
        number = jnp.maximum(seen.sum(-1, keepdims=True), 1)
        bias = jnp.zeros(queries.shape[:-1])
        if self.probe == "norm":
            norm = jnp.linalg.norm(queries, axis=-1)
            bias = norm * number / jnp.maximum(norm.sum(-1, keepdims=True), LEAST) - 1
        elif self.probe == "channels":
            mean = queries.sum(3, keepdims=True) / number[..., None]
            centred = jnp.where(seen[..., None], queries - mean, 0.0)
            deviation = jnp.sqrt((centred**2).sum(3, keepdims=True) / number[..., None])
            bias = (jnp.abs(centred) / jnp.maximum(deviation, LEAST)).mean(-1)
        top = jnp.where(seen, bias, -jnp.inf).max(-1, keepdims=True)
        weight = jnp.where(seen, jnp.exp(bias - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
        return weight / jnp.maximum(weight.sum(-1, keepdims=True), LEAST)


def _entropy(scores: Array) -> Array:
    """f32 [B, K]: entropy in nats of softmax(scores [B, K, M]); 0 where all are -inf."""
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    logs = jnp.where(jnp.isfinite(scores), scores - total, 0.0)
    return -jnp.where(jnp.isfinite(scores), jnp.exp(logs) * logs, 0.0).sum(-1)


def _whole(parts: Array) -> Array:
    """int32 [L, B]: parts rounded down, and up where the remainders are largest, so that their sum over L is kept."""
    least = jnp.floor(parts)
    left = jnp.round(parts.sum(0) - least.sum(0)).astype(jnp.int32)
    return least.astype(jnp.int32) + (left > ranks((least - parts).T).T)


def _proportional(weight: Array, total: int, most: Array) -> Array:
    """f32 [L, B]: `total` divided in proportion to weights > 0, no part above most [L, 1]."""

    def again(_: int, part: Array) -> Array:
        full = part >= most
        rest = total - jnp.where(full, most, 0.0).sum(0)
        return jnp.where(full, most, weight * rest / jnp.maximum(jnp.where(full, 0.0, weight).sum(0), LEAST))

    return jax.lax.fori_loop(0, len(weight), again, weight * total / weight.sum(0))
