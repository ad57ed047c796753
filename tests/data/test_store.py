"""Kept tokens are used only if they are what was written, and were made of these rows in this way; anything else is made anew, and said."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert.model import load_tokenizer
from qlora_jax.base.checksum import file_checksum
from qlora_jax.config.data import DataSettings
from qlora_jax.data import Kept, Layout, Recipe, Source, TokenStore, make_recipe, open_source, tokenize_all

FILES = [
    "input_ids.bin",
    "loss_mask.bin",
    "wheres.bin",
    "lengths.npy",
    "supervised.npy",
    "hashes.npy",
    "where_ends.npy",
]


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path) -> Path:
    for name in ("rows", "others"):
        rows = [{"text": f"{name} {number}" * (number % 3 + 1)} for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path


def opened(place: Path, name: str = "rows") -> tuple[Source, Recipe, DataSettings]:
    settings = DataSettings(path=str(place / f"{name}.jsonl"), max_seq_length=64)
    recipe = make_recipe(load_tokenizer(place / "model"), Layout("text"), settings, None)
    return open_source(settings.all_sources[0], settings), recipe, settings


def kept(place: Path, name: str = "rows", log: Callable[[str], object] = print) -> tuple[TokenStore, bool]:
    """The tokens, and whether they were there already."""
    source, recipe, settings = opened(place, name)
    cache = Kept(place / "cache", log)
    found = cache.find(source, recipe, settings)
    if found is not None:
        return found, True
    return cache.write(source, recipe, settings, tokenize_all(source.rows(), recipe, 1), lambda done: None), False


def rows_of(store: TokenStore) -> list[tuple[bytes, bytes, str]]:
    return [(row.input_ids.tobytes(), row.loss_mask.tobytes(), row.where) for row in store]


def vouch(entry: Path) -> None:
    """Make the checksums agree with what is there, as a forger would."""
    record = json.loads((entry / "checksums.json").read_text())
    record["files"] = {
        path.name: [path.stat().st_size, file_checksum(path)]
        for path in entry.iterdir()
        if path.name != "checksums.json"
    }
    (entry / "checksums.json").write_text(json.dumps(record))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    """A sound file without an entry."""
    if path.suffix == ".npy":
        np.save(path, np.load(path)[:0])
    else:
        path.write_bytes(b"")


def shorter(path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, np.load(path)[:-1])
    else:
        path.write_bytes(path.read_bytes()[:-4])


def other_shape(path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 2), np.int64))
    path.write_bytes(buffer.getvalue() if path.suffix == ".npy" else b"\0" * 3)


def replaced(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "change", [flipped, emptied, shorter, other_shape, replaced, Path.unlink], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("forged", [False, True])
def test_what_changed_is_made_anew(place: Path, change: Callable[[Path], None], forged: bool) -> None:
    """Bytes that changed; and files that do not fit one another even where the checksums say that they are right."""
    first, _ = kept(place)
    expected, entry = rows_of(first), first.folder
    for name in [*FILES, "report.json", "checksums.json"]:
        if forged and (change is flipped or change is replaced or name == "checksums.json" or name == "supervised.npy"):
            continue
        change(entry / name)
        if forged and change is not replaced:
            vouch(entry)
        lines: list[str] = []
        again, was_there = kept(place, log=lines.append)
        if forged and was_there:  # of one length as of another: nothing tells
            assert name in ("hashes.npy", "report.json") and rows_of(again) == expected, name
            continue
        assert rows_of(again) == expected and not was_there, name
        assert len(lines) == 1 and f"{entry}: damaged or of other rows, made again" in lines[0], (name, lines)
        assert kept(place, log=lines.append)[1] and len(lines) == 1


def test_another_s_entry_in_place_is_made_anew(place: Path) -> None:
    first, _ = kept(place)
    expected, entry = rows_of(first), first.folder
    other, _ = kept(place, "others")
    shutil.rmtree(entry)
    shutil.copytree(other.folder, entry)
    lines: list[str] = []
    again, was_there = kept(place, log=lines.append)
    assert rows_of(again) == expected and not was_there
    assert "made of other rows or in another way" in lines[0]
    shutil.copyfile(other.folder / "input_ids.bin", entry / "input_ids.bin")
    assert rows_of(kept(place, log=lines.append)[0]) == expected and len(lines) == 2


def test_an_entry_of_an_earlier_format_is_made_anew(place: Path) -> None:
    first, _ = kept(place)
    (first.folder / "checksums.json").unlink()
    lines: list[str] = []
    assert not kept(place, log=lines.append)[1] and len(lines) == 1
