"""Every rotary rule against a slow transcription of its paper, one channel at a time."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.rope import Dynamic, Linear, Llama3, Plain, RopeConfig, Scaling, Yarn
from kvjax.errors import UsageError
from tests.oracles.rotary import rotate

H = 16


def frequencies(config: RopeConfig, length: int = 1, head_dim: int = H) -> tuple[list[float], float]:
    rope = jax.jit(lambda length: config.table(head_dim, length))(jnp.int32(length))
    assert rope.inv_freq.dtype == jnp.float32 and rope.inv_freq.shape == (head_dim // 2,)
    return rope.inv_freq.tolist(), float(rope.amplitude)


def plain(theta: float, head_dim: int = H) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def test_plain_rotates_like_the_oracle() -> None:
    rope = RopeConfig(700.0).table(H, jnp.int32(1))
    x = np.random.default_rng(0).standard_normal((5, H)).astype(np.float32)
    turned = rope.rotate(jnp.asarray(x), jnp.int32([0, 1, 7, 300, 20_000]))
    expected = [rotate(row, position, 700.0) for row, position in zip(x, [0, 1, 7, 300, 20_000], strict=True)]
    np.testing.assert_allclose(turned[:4], expected[:4], atol=1e-4)
    np.testing.assert_allclose(turned[4], expected[4], atol=1e-2)  # f32 angles: 20,000 rad has an ulp of 0.002


def test_linear_divides_positions() -> None:
    found, amplitude = frequencies(RopeConfig(500.0, Linear(4.0)))
    np.testing.assert_allclose(found, np.array(plain(500.0)) / 4, rtol=1e-6)
    assert amplitude == 1.0


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 1000])
def test_dynamic_grows_the_base_beyond_the_original_context(length: int) -> None:
    found, _ = frequencies(RopeConfig(500.0, Dynamic(3.0, 64)), length)
    theta = 500.0 if length <= 64 else 500.0 * (3.0 * length / 64 - 2.0) ** (H / (H - 2))
    np.testing.assert_allclose(found, plain(theta), rtol=3e-6)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    scaling = Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=256)
    found, _ = frequencies(RopeConfig(10_000.0, scaling), head_dim=32)
    regions = set()
    for frequency, base in zip(found, plain(10_000.0, 32), strict=True):
        wavelength = 2 * math.pi / base
        if wavelength < 256 / 4:
            regions.add("kept")
            expected = base
        elif wavelength > 256 / 1:
            regions.add("stretched")
            expected = base / 8
        else:
            regions.add("between")
            smooth = (256 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * base / 8 + smooth * base
        assert frequency == pytest.approx(expected, rel=1e-6)
    assert regions == {"kept", "stretched", "between"}


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (4.0, 2.0)])
def test_yarn_ramps_by_channel(truncate: bool, fast: float, slow: float) -> None:
    factor, original, theta, dim = 8.0, 512, 10_000.0, 64
    scaling = Yarn(factor, original, beta_fast=fast, beta_slow=slow, truncate=truncate)
    found, amplitude = frequencies(RopeConfig(theta, scaling), head_dim=dim)
    # The channel whose wavelength fits `turns` times into the original context: 2 pi theta^(2d/D) = L / turns.
    low, high = (dim / 2 * math.log(original / (2 * math.pi * turns), theta) for turns in (fast, slow))
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    for channel, (frequency, base) in enumerate(zip(found, plain(theta, dim), strict=True)):
        ramp = min(max((channel - low) / (high - low), 0.0), 1.0)
        assert frequency == pytest.approx(ramp * base / factor + (1 - ramp) * base, rel=1e-5)
    assert amplitude == pytest.approx(0.1 * math.log(8.0) + 1)
    assert frequencies(RopeConfig(theta, Yarn(factor, original, amplitude=0.5)))[1] == 0.5
    assert frequencies(RopeConfig(theta, Yarn(1.0, original)))[1] == 1.0


def test_yarn_with_a_ramp_of_no_width_is_a_step() -> None:
    scaling = Yarn(4.0, 512, beta_fast=2.0, beta_slow=2.0, truncate=False)
    found, _ = frequencies(RopeConfig(10_000.0, scaling), head_dim=64)
    ratios = np.array(found) / plain(10_000.0, 64)
    assert set(np.round(ratios, 5)) == {0.25, 1.0} and (np.diff(ratios) <= 1e-6).all()


@pytest.mark.parametrize("scaling", [Plain(), Linear(2.0), Llama3(8.0, 1.0, 4.0, 64), Yarn(2.0, 64)])
def test_static_rules_ignore_the_length(scaling: Scaling) -> None:
    assert frequencies(RopeConfig(1e4, scaling), 1) == frequencies(RopeConfig(1e4, scaling), 10_000)
    assert hash(RopeConfig(1e4, scaling)) == hash(RopeConfig(1e4, scaling))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RopeConfig(1.0),
        lambda: Linear(0.0),
        lambda: Dynamic(0.5, 64),
        lambda: Dynamic(2.0, 0),
        lambda: Llama3(8.0, 4.0, 1.0, 64),
        lambda: Llama3(0.5, 1.0, 4.0, 64),
        lambda: Yarn(0.5, 64),
        lambda: Yarn(2.0, 64, beta_fast=1.0, beta_slow=2.0),
    ],
)
def test_impossible_values_are_refused(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # pyright: ignore[reportCallIssue]
