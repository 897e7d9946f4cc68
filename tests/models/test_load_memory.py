"""Host memory while loading: at most the weights and twice the largest tensor, on a sharded folder of over 1 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kvjax.models.huggingface import tensor_file
from kvjax.models.huggingface.config import read_config
from kvjax.models.huggingface.weights import weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 9,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# What a fresh process holds before `load` and the most it held until the end of it, in bytes; and that the weights are
# the right ones. `VmHWM` and not getrusage: a child inherits the latter's peak from the process that started it. And
# before `load` what is held, not its peak: importing needs more for a moment, which would hide as much of the growth.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp
from kvjax.models.huggingface import load

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

jax.block_until_ready(jnp.ones(8) + 1)
before = status("VmRSS")
model = load(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(model.params)
after = status("VmHWM")
q = model.params["layers_8"]["attention"]["q"]["kernel"]
print(json.dumps({"growth": after - before, "nbytes": sum(x.nbytes for x in jax.tree.leaves(model.params)),
    "largest": max(x.nbytes for x in jax.tree.leaves(model.params)), "q": float(q[5, 31, 63])}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of about 256 MB, written one tensor at a time; every element of a matrix tells its row."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    dtype = np.dtype(ml_dtypes.bfloat16)
    found, weight_map = weights(read_config(CONFIG)), {}
    for index in range(0, len(found), 20):
        shard = found[index : index + 20]
        name = f"model-{index:05d}.safetensors"
        headers = {weight.name: (dtype, weight.stored_shape) for weight in shard}
        rows = (
            np.arange(weight.stored_shape[0]).reshape(-1, *[1] * (len(weight.stored_shape) - 1)) for weight in shard
        )
        tensors = (
            np.broadcast_to(row % 251, weight.stored_shape).astype(dtype)
            for weight, row in zip(shard, rows, strict=True)
        )
        tensor_file.write(folder / name, headers, tensors)
        weight_map |= {weight.name: name for weight in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory(folder: Path, dtype: str) -> None:
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) >= 1e9
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), dtype], capture_output=True, text=True, check=True, timeout=500
    )
    found = json.loads(done.stdout)
    assert found["q"] == (31 * 64 + 63) % 251
    allowed = found["nbytes"] + 2 * found["largest"]
    print(
        f"{dtype}: grew {found['growth'] / 1e6:.0f} MB for {found['nbytes'] / 1e6:.0f} MB, allowed {allowed / 1e6:.0f}"
    )
    assert found["growth"] <= allowed
