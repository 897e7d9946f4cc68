"""Whatever is wrong with a saved cache is noticed before it is used, and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import array_folder
from kvjax.cache.save import load, save
from kvjax.errors import CorruptDataError, UsageError
from tests.save.driver import assert_same_bits, prefilled

SPEC = "h2o:tokens=24+int8"
FLIPS = 50


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "c"
    save(prefilled(SPEC)[1], path, extras={"logits": jnp.arange(12.0).reshape(4, 3)})
    return path


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "c"))


def arrays_of(path: Path) -> Path:
    (folder,) = path.glob("arrays-*")
    return folder


def data_files(path: Path) -> list[Path]:
    return sorted(f for f in arrays_of(path).rglob("*") if f.is_file())


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes cache.json as someone would who knows the format, digest and all."""
    document = json.loads((path / "cache.json").read_text())
    del document["digest"]
    change(document)
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    document["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "cache.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def refused(path: Path, *words: object, error: type[Exception] = CorruptDataError) -> None:
    with pytest.raises(error) as raised:
        load(path)
    for word in words:
        assert str(word) in str(raised.value)


def test_forging_nothing_changes_nothing(saved: Path) -> None:
    """The oracle of these tests knows the format: an unchanged document is accepted."""
    forge(saved, lambda document: None)
    cache, extras = load(saved)
    assert_same_bits(cache, prefilled(SPEC)[1])
    np.testing.assert_array_equal(extras["logits"], np.arange(12.0).reshape(4, 3))


def test_every_flipped_bit_of_the_arrays_is_noticed(saved: Path) -> None:
    """Half of the places uniform over all bits, half uniform over files, so that small files are hit too."""
    rng = np.random.default_rng(0)
    files = data_files(saved)
    sizes = np.array([f.stat().st_size for f in files])
    for i in range(FLIPS):
        chosen = rng.choice(len(files), p=sizes / sizes.sum()) if i % 2 else rng.integers(len(files))
        file, bit = files[chosen], int(rng.integers(8 * sizes[chosen]))
        flip(file, bit)
        refused(saved, file, file.relative_to(arrays_of(saved)).parts[0])
        flip(file, bit)
    load(saved)


def test_every_flipped_bit_of_the_description_is_noticed(saved: Path) -> None:
    rng = np.random.default_rng(1)
    file = saved / "cache.json"
    for bit in rng.integers(8 * file.stat().st_size, size=FLIPS):
        flip(file, int(bit))
        refused(saved, file)
        flip(file, int(bit))
    load(saved)


@pytest.mark.parametrize("what", ["truncated", "longer", "missing", "empty"])
def test_files_of_a_wrong_size(saved: Path, what: str) -> None:
    for file in (data_files(saved)[0], data_files(saved)[1], saved / "cache.json"):
        content = file.read_bytes()
        match what:
            case "missing":
                file.unlink()
            case "truncated":
                file.write_bytes(content[:-1])
            case "longer":
                file.write_bytes(content + b"\0")
            case "empty":
                file.write_bytes(b"")
        if file.name == "cache.json" and what == "missing":
            refused(saved, "not a saved cache", error=UsageError)
        else:
            refused(saved, file.relative_to(arrays_of(saved)) if what == "missing" else file)
        file.write_bytes(content)
    load(saved)


def test_extra_files_links_and_folders(saved: Path, tmp_path: Path) -> None:
    inside = arrays_of(saved)
    for place in (saved / "notes.txt", inside / "notes.txt", inside / "layers.0.length" / "c" / "7"):
        place.write_text("?")
        refused(saved, place.name)
        place.unlink()
    target = inside / "layers.0.length" / "c" / "0"
    content = target.read_bytes()
    target.unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    target.symlink_to(tmp_path / "elsewhere")
    refused(saved, target, "link")
    target.unlink()
    target.write_bytes(content)
    shutil.move(inside, tmp_path / "away")
    refused(saved, inside, "missing")
    inside.symlink_to(tmp_path / "away", target_is_directory=True)
    refused(saved, inside)


def test_what_an_interrupted_overwrite_leaves_is_ignored(saved: Path) -> None:
    shutil.copytree(arrays_of(saved), saved / f"arrays-{'0' * 16}")
    assert_same_bits(load(saved)[0], prefilled(SPEC)[1])


def test_swapped_leaves_are_noticed(saved: Path) -> None:
    """Both files are intact, of the right size and shape, and in the wrong place."""
    keys, values = (arrays_of(saved) / f"layers.0.recent.{x}" for x in ("keys", "values"))
    keys.rename(keys.with_name("x"))
    values.rename(keys)
    keys.with_name("x").rename(values)
    refused(saved, "layers.0.recent", "SHA-256")


LEAF = "layers.0.recent.keys"


def entry(document: dict[str, Any]) -> dict[str, Any]:
    return document["leaves"][LEAF]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: entry(d).update(shape=[4, 4, 12, 31]), (LEAF, "[4, 4, 12, 31]", "allocates float32 [4, 4, 12, 32]")),
        (lambda d: entry(d).update(dtype="int32"), (LEAF, "int32", "float32")),
        (lambda d: entry(d).update(shape="x" * 9999), (LEAF,)),
        (lambda d: entry(d).update(more=1), (LEAF, "malformed")),
        (lambda d: entry(d).update(files=[]), (LEAF,)),
        (lambda d: entry(d)["files"].update({"../../../../etc/passwd": "0" * 64}), (LEAF,)),
        (lambda d: entry(d).update(files={"zarr.json": "0" * 64, "../../secret": "0" * 64}), ("c/0/0/0/0",)),
        (lambda d: d["leaves"].update({"../../secret": entry(d)}), ("../../secret",)),
        (lambda d: d["leaves"].update({"extras.../../secret": entry(d)}), ("extras.../../secret", "malformed")),
        (lambda d: d["leaves"].pop(LEAF), (LEAF,)),
        (lambda d: d["leaves"].update({LEAF: None}), (LEAF, "malformed")),
        (lambda d: d.update(leaves=[]), ("malformed",)),
        (lambda d: d.update(arrays="../c"), ("malformed",)),
        (lambda d: d.update(arrays="arrays-" + "0" * 16), ("missing",)),
        (lambda d: d.update(phase="late"), ("phase",)),
        (lambda d: d.update(layers=[]), ("dimensions",)),
        (lambda d: d.update(layers=d["layers"] * 2), ("layers.1",)),
        (lambda d: d["layers"][0].update(kv_heads=2), ("layers.0",)),
        (lambda d: d["layers"][0].update(batch=-4), ("dimensions",)),
        (lambda d: d["layers"][0].update(dtype="object"), ("dimensions",)),
        (lambda d: d["layers"][0].update(max_length=10**40), ("dimensions",)),
        (lambda d: d["method"]["budget"].update(tokens_kept=20), ("layers.0.body",)),
        (lambda d: d["method"]["budget"].update(tokens_kept=2**62), ("does not belong to this cache",)),
        (lambda d: d["method"].update(sinks=60), ("budget",)),
    ],
)
def test_claims_that_the_method_does_not_back(
    saved: Path, change: Callable[[dict[str, Any]], object], words: tuple[str, ...]
) -> None:
    """With a digest that fits: only the comparison with what the method allocates can notice."""
    forge(saved, change)
    refused(saved, saved, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=1), ("version 1", "reads 'kvjax.cache' version 2")),
        (lambda d: d.update(format="other"), ("'other'",)),
        (lambda d: d["method"]["policy"].update(part="Oracle"), ("unknown part 'Oracle'", "written by kvjax")),
        (lambda d: d["method"].update(colour="red"), ("no field 'colour'",)),
        (lambda d: d["layers"][0].update(part="CacheMethod"), ("expected a CacheDims",)),
    ],
)
def test_versions_and_parts_from_elsewhere_are_refused_by_name(
    saved: Path, change: Callable[[dict[str, Any]], object], words: tuple[str, ...]
) -> None:
    forge(saved, change)
    refused(saved, saved / "cache.json", *words, error=UsageError)


def no_reading(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("opened an array")


@pytest.mark.parametrize("leaf", [LEAF, "extras.logits"])
def test_gigantic_shapes_are_refused_before_anything_is_read(
    saved: Path, leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document agrees with itself (every leaf has the declared batch); the bytes on disk do not."""
    rows = 2**30

    def grow(document: dict[str, Any]) -> None:
        if leaf == LEAF:
            document["layers"][0]["batch"] = rows
        for name, declared in document["leaves"].items():
            if leaf in (LEAF, name) and name != "layers.0.head_index":
                declared["shape"][0] = rows

    forge(saved, grow)
    monkeypatch.setattr(array_folder.ts, "open", no_reading)
    monkeypatch.setattr(array_folder, "_digest", no_reading)
    refused(saved, "lists other files than its shape")


def test_a_shape_that_fits_one_file_but_not_its_size(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(saved, lambda document: document["leaves"]["extras.logits"].update(shape=[2000, 2000]))
    monkeypatch.setattr(array_folder.ts, "open", no_reading)
    refused(saved, "extras.logits", "52 bytes instead of 16000004")


@pytest.mark.parametrize("change", [{"data_type": "int32"}, {"shape": [4, 4, 12, 16]}, {"codecs": [{"name": "bytes"}]}])
def test_a_header_that_says_something_else_is_refused(saved: Path, change: dict[str, Any]) -> None:
    file = arrays_of(saved) / LEAF / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    forge(saved, lambda document: entry(document)["files"].update({"zarr.json": digest}))
    refused(saved, LEAF)


def test_tensorstore_checks_each_chunk_as_well(saved: Path) -> None:
    """A digest that fits damaged bytes is not enough: the chunk's own crc32c has to fit too."""
    file = arrays_of(saved) / LEAF / "c" / "0" / "0" / "0" / "0"
    flip(file, 8 * 100)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    forge(saved, lambda document: entry(document)["files"].update({"c/0/0/0/0": digest}))
    refused(saved, LEAF, "Digest mismatch")


def test_a_description_that_is_too_large_or_too_deep(saved: Path) -> None:
    (saved / "cache.json").write_text("[" * 200_000)
    refused(saved, saved / "cache.json", "damaged")
    with (saved / "cache.json").open("wb") as stream:
        stream.truncate(65 << 20)
    refused(saved, saved / "cache.json", "too many")
