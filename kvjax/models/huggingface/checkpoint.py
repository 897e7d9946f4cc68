"""The weight files of a folder: one safetensors file, or several with an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from kvjax.errors import CorruptDataError, UsageError
from kvjax.models.huggingface.tensor_file import Entry, TensorFile
from kvjax.models.tokenizer import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """Every tensor of a folder by name.

    Attributes:
      folder: the folder.
      files: tensor name -> the file that holds it.

    Raises:
      UsageError: no weights, or only pickle files.
      CorruptDataError: an index that names a missing file, a file outside the folder, or a tensor that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        self.files = _indexed(folder, index) if index.is_file() else _single(folder)

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor."""
        return self.files[name].entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files


def _single(folder: Path) -> Mapping[str, TensorFile]:
    found = sorted(folder.glob("*.safetensors"))
    path = folder / SINGLE
    if not path.is_file():
        if len(found) != 1:
            raise _no_weights(folder, found)
        (path,) = found
    file = TensorFile(path)
    return dict.fromkeys(file.entries, file)


def _no_weights(folder: Path, found: list[Path]) -> UsageError:
    if found:
        names = ", ".join(path.name for path in found)
        return UsageError(f"{folder} holds {names}, but no {INDEX} that says what they are; copy it there as well.")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return UsageError(
            f"{folder} holds only pickle files ({pickles[0]}), which can run code when they are opened and are never "
            "read. Convert them where you trust them, with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)."
        )
    return UsageError(f"{folder} holds no *.safetensors file; is it the folder of a model?")


def _indexed(folder: Path, index: Path) -> Mapping[str, TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptDataError(f"{index} has no weight_map of tensor names to file names.")
    files = {name: _shard(folder, index, name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].entries:
            raise CorruptDataError(f"{index} says that {tensor!r} is in {name}, but it is not there.")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _shard(folder: Path, index: Path, name: str) -> TensorFile:
    # A name from a file must never lead elsewhere: only a plain name in this very folder is followed.
    if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise CorruptDataError(f"{index} points outside its folder, to {name!r}; it may only name files beside it.")
    if not (folder / name).is_file():
        raise CorruptDataError(f"{index} names {name}, which is missing from {folder}; download it as well.")
    return TensorFile(folder / name)
