"""ALiBi's bound: what is outside of a head's window gets less than epsilon of attention, and is not far off."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.cache.budget import Full, HeadTable, Uniform
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.calibration.alibi import head_table, largest_logit, slopes, windows
from kvjax.errors import UsageError
from tests.oracles import razorattention


def attention(logits: np.ndarray, slope: float) -> np.ndarray:
    """[T, T] of one head: causal softmax of logits [T, T] minus slope · distance."""
    tokens = len(logits)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    biased = np.where(distance >= 0, logits - slope * distance, -np.inf)
    weights = np.exp(biased - biased.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def outside(weights: np.ndarray, window: int) -> float:
    """The most attention that a query gives to tokens at a distance of `window` or more."""
    tokens = len(weights)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    return float(np.where(distance >= window, weights, 0.0).sum(axis=1).max())


@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("bound", [0.0, 0.7, 3.0])
def test_less_than_epsilon_is_outside_for_queries_and_keys_of_bounded_norm(epsilon, bound):
    rng = np.random.default_rng(0)
    for slope in slopes(8)[:5]:
        window = int(windows(bound, slope, epsilon))
        tokens = window + 60
        q, k = (rng.standard_normal((tokens, 16)) for _ in range(2))
        q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(bound) for x in (q, k))
        assert np.abs(q @ k.T).max() <= bound + 1e-12
        assert outside(attention(q @ k.T, slope), window) < epsilon


@pytest.mark.parametrize("epsilon", [1e-1, 1e-3])
def test_the_worst_keys_that_the_norms_allow_come_close(epsilon):
    """Far tokens as large as can be, near ones as small: half of epsilon is still exceeded a few tokens nearer."""
    bound, slope = 2.0, 0.25
    window = int(windows(bound, slope, epsilon))
    tokens = 4 * window
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    weights = attention(np.where(distance >= window, bound, -bound), slope)
    assert outside(weights, window) < epsilon
    nearer = window - int(np.ceil(3 / slope))
    weights = attention(np.where(distance >= nearer, bound, -bound), slope)
    assert outside(weights, nearer) > epsilon


def test_the_bound_of_the_logits_holds_for_all_normalised_inputs():
    rng = np.random.default_rng(1)
    wq, wk = rng.standard_normal((2, 24, 8))
    gain, offset = rng.standard_normal((2, 24))
    bound = largest_logit(wq, wk, gain, offset, scale=8**-0.5)
    x = rng.standard_normal((500, 24))
    x[0] = np.eye(24)[np.argmax(np.abs(gain))] * 1e6  # all of the norm in the channel with the largest gain
    normed = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    logits = (normed * gain + offset) @ wq @ wk.T @ (normed * gain + offset).T * 8**-0.5
    assert np.abs(logits).max() <= bound
    # Without an offset, a gain of 1 and one channel per head the bound is reached by the singular vectors.
    left, sizes, right = np.linalg.svd(wq @ wk.T)
    assert largest_logit(wq, wk, np.ones(24), scale=0.5) == pytest.approx(0.5 * 24 * sizes[0])
    assert abs(24 * left[:, 0] @ wq @ wk.T @ right[0]) == pytest.approx(24 * sizes[0])


def test_the_window_is_that_of_the_paper_where_its_bound_is_taken():
    rng = np.random.default_rng(2)
    wq, wk = 0.1 * rng.standard_normal((2, 12, 4))
    gamma, beta = rng.random((2, 12))
    bound = np.linalg.norm(wq @ wk.T, ord=2) * (gamma @ gamma + beta @ beta)
    for slope in slopes(4):
        expected = razorattention.alibi_reach(wq, wk, gamma, beta, slope, 1e-3)
        assert windows(bound, slope, 1e-3) == int(expected) + 1


def test_slopes_are_those_of_the_authors():
    np.testing.assert_allclose(slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(slopes(16)[:3], [2**-0.5, 2**-1, 2**-1.5])
    np.testing.assert_allclose(slopes(12), [*slopes(8), *slopes(16)[0:8:2]])
    np.testing.assert_allclose(slopes(1), [2.0**-8])


def test_heads_keep_their_windows_in_a_cache():
    """The longest window of the query heads of a kv head, rounded up; all tokens where it is as long as the text."""
    reach = np.array([[10, 70, 300, 20], [5000, 1, 64, 65]])
    table = head_table(reach, longest=512, kv_head_of_query=(0, 0, 1, 1))
    assert table == HeadTable((Full(), Uniform(tokens_kept=128), Uniform(tokens_kept=320)), ((1, 2), (0, 1)))
    method = CacheMethod(budget=table, recent=1, every=1)
    for layer, slots in ((0, (128, 320)), (1, (None, 128))):
        dims = CacheDims(1, 2, 4, 16, max_length=600, prompt_length=500, layer=layer, layers=2)
        groups = {heads: part.budget for heads, part in method.by_head(dims)}
        expected = [Full() if tokens is None else Uniform(tokens_kept=tokens) for tokens in slots]
        assert [groups[(head,)] for head in (0, 1)] == expected
    assert head_table(reach[:1], longest=65).table == ((1, 0, 0, 1),), "a head of its own for every query head"


def test_what_has_no_window():
    for largest, slope, epsilon in ((1.0, 0.0, 0.1), (1.0, 0.5, 1.0), (1.0, 0.5, 0.0), (-1.0, 0.5, 0.1)):
        with pytest.raises(UsageError, match="epsilon"):
            windows(largest, slope, epsilon)
    with pytest.raises(UsageError, match="at least one head"):
        slopes(0)
