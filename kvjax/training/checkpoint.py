"""Checkpoints that survive kill -9 and notice a damaged leaf.

A checkpoint is a folder `step-00001234` that appears by one rename, with the state (orbax where it is
installed, one .npz file elsewhere) and a digest of every leaf: orbax does not notice flipped bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from kvjax.errors import CorruptDataError
from kvjax.typing import PyTree


def save(folder: Path, step: int, state: PyTree, keep: int = 3) -> Path:
    """Writes the state (a pytree of arrays), drops all but the newest `keep`, returns the new folder."""
    final = folder.absolute() / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    leaves = _leaves(state)
    _write(partial, leaves)
    (partial / "digests.json").write_text(json.dumps({name: _digest(leaf) for name, leaf in leaves.items()}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}")
    return final


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints below `folder`, ascending."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.suffix != ".partial")


def load(folder: Path, like: PyTree) -> tuple[int, PyTree] | None:
    """The newest checkpoint's step and state in the structure of `like`, or None where there is none.

    Raises CorruptDataError naming the leaf whose digest, shape or dtype is not what was written.
    """
    found = steps(folder)
    if not found:
        return None
    path = folder.absolute() / f"step-{found[-1]:08d}"
    hint = f"delete {path} to go on from the checkpoint before it"
    try:
        digests = json.loads((path / "digests.json").read_text())
    except (OSError, ValueError) as error:
        raise CorruptDataError(f"{path / 'digests.json'} cannot be read ({error}): {hint}") from error
    wanted = _leaves(like)
    if set(digests) != set(wanted):
        odd = sorted(set(digests) ^ set(wanted))
        raise CorruptDataError(f"{path} holds another state than this run's; {odd[0]} is in only one of them: {hint}")
    leaves = _read(path, wanted, hint)
    for name, leaf in leaves.items():
        if _digest(leaf) != digests[name]:
            raise CorruptDataError(f"{path}: leaf {name} is not what was written (its digest differs): {hint}")
    return found[-1], jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def _leaves(state: PyTree) -> dict[str, np.ndarray]:
    """Leaves by path, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in flat}


def _digest(leaf: np.ndarray) -> str:
    header = f"{leaf.dtype.name} {leaf.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def _write(path: Path, leaves: dict[str, np.ndarray]) -> None:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        np.savez(path / "state.npz", allow_pickle=False, **leaves)
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", leaves)


def _read(path: Path, like: dict[str, np.ndarray], hint: str) -> dict[str, np.ndarray]:
    try:
        if (path / "state.npz").exists():
            with np.load(path / "state.npz", allow_pickle=False) as archive:
                return {name: archive[name] for name in like}
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            return {name: np.asarray(leaf) for name, leaf in checkpointer.restore(path / "state", like).items()}
    except ImportError:
        raise
    except Exception as error:  # orbax, tensorstore and zipfile each raise their own kinds for damaged files
        raise CorruptDataError(f"{path} cannot be read ({type(error).__name__}: {error}): {hint}") from error
