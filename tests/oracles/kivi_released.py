"""KIVI (Liu et al. 2024, arXiv 2402.02750) with the two residuals of the released code; `quantised.kivi` has one."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.oracles.coded_attention import decode_over, flushed, slid
from tests.oracles.quantised import Coded, encode
from tests.oracles.row import Row


@dataclasses.dataclass
class KiviTrace:
    """prompt_output [P, N, H], one output [N, H] per decoded token.

    coded_keys[i], coded_values[i]: how many of the oldest tokens are coded after the prompt (0), after token i.
    keys[h] [coded_keys[-1], H], values[h] [coded_values[-1], H]: the coded part of kv head h in the end.
    """

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    coded_keys: list[int]
    coded_values: list[int]
    keys: list[Coded]
    values: list[Coded]


def kivi_released(row: Row, *, key_bits: int, value_bits: int, group: int, residual: int) -> KiviTrace:
    """Rotated keys per channel over `group` tokens, values per token over `group` channels. The prompt is exact.

    Keys: the exact tail goes as one block when its length reaches `residual`, after the token that filled it has read
    it, so 0 .. residual - 1 keys are exact after a token. Values: exactly the `residual` newest are exact; a new token
    reads those, exact, and itself, and only then is the oldest of them coded.
    """
    assert residual % group == 0
    counts = range(row.prompt, row.tokens + 1)
    coded_keys = [flushed(tokens, residual) for tokens in counts]
    coded_values = [slid(tokens, residual) for tokens in counts]
    heads, k = range(row.kv_heads), row.rotated[1]
    keys = [encode(k[: coded_keys[-1], h], key_bits, group, 0) for h in heads]
    values = [encode(row.v[: coded_values[-1], h], value_bits, group, 1) for h in heads]
    decoded_keys = np.stack([coded.decoded for coded in keys], axis=1)
    decoded_values = np.stack([coded.decoded for coded in values], axis=1)
    outputs = decode_over(row, decoded_keys, decoded_values, coded_keys, coded_values)
    return KiviTrace(row.attention(row.prompt)[0], outputs, coded_keys, coded_values, keys, values)
