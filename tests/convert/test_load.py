"""Loading: every layer in its place, several read at a time, few bytes held besides, and every byte counted."""

import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import load as load_module
from convert.files.ahead import num_threads
from convert.files.folder import ModelFolder
from convert.load import load_weights, read_config, read_layer, total_bytes
from convert.quantize import quantize
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.runtime.placement import LayerPlace, Placement, nbytes, one_device
from tests.helpers import tiny
from tests.helpers.tiny import LINEAR_NAMES, NAMES

NF4 = QuantizationSettings()
LAYERS = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """A model, and the same in 4 bits; not to be written to."""
    place = tmp_path_factory.mktemp("load")
    model = tiny.write_model(place / "model", shards=3, tie_word_embeddings=False, num_hidden_layers=LAYERS)
    quantize(ModelFolder(model), place / "4bit", NF4)
    return {"bf16": ModelFolder(model), "4bit": ModelFolder(place / "4bit")}


@pytest.mark.parametrize("kind", ["bf16", "4bit"])
@pytest.mark.parametrize("where", ["device", "host", ["host", "device"] * 3 + ["host"]], ids=str)
def test_layers_are_in_their_places_and_in_order(
    folders: dict[str, ModelFolder], kind: str, where: LayerPlace | list[LayerPlace]
) -> None:
    folder, advanced = folders[kind], []
    config = read_config(folder)
    weights = load_weights(folder, config, NF4, where, advanced.append)
    places = [where] * LAYERS if isinstance(where, str) else where
    assert len(weights.layers) == LAYERS
    for index, place in enumerate(places):
        loaded, expected = weights.layers._layers[index], read_layer(folders["4bit"], index, NF4)
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        for leaf, value in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
            assert one_device().lives(leaf, place)
            assert np.asarray(leaf).tobytes() == np.asarray(value).tobytes()
    assert sum(advanced) == total_bytes(config, NF4, "device")
    assert len(advanced) == LAYERS + 1


@pytest.mark.parametrize("tied", [True, False])
def test_every_byte_is_counted(tmp_path: Path, tied: bool) -> None:
    folder = ModelFolder(tiny.write_model(tmp_path / "model", tie_word_embeddings=tied))
    advanced, config = [], read_config(folder)
    weights = load_weights(folder, config, NF4, "device", advanced.append)
    layers = [layer for _, layer in weights.layers.walk(range(2))]
    held = {id(leaf): leaf for leaf in jax.tree.leaves((weights.embedding, layers, weights.head))}
    assert sum(advanced) == total_bytes(config, NF4, "device") == nbytes(list(held.values()))


def test_disk_layers_are_not_read(folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = folders["4bit"], []
    config = read_config(folder)
    for reader in ("read_layer", "read_linear"):
        monkeypatch.setattr(load_module, reader, lambda folder, which, *args: read.append(which))
    advanced: list[int] = []
    weights = load_weights(folder, config, NF4, "disk", advanced.append)
    assert read == [] and len(weights.layers) == LAYERS
    assert sum(advanced) == total_bytes(config, NF4, "disk")


def test_several_linears_at_a_time(folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads, of one layer too: each waits here until the others have come."""
    folder, threads = folders["4bit"], min(max(num_threads(), 2), len(LINEAR_NAMES))
    monkeypatch.setattr("convert.files.ahead.num_threads", lambda: threads)
    real, meeting, seen = load_module.read_linear, threading.Barrier(threads, timeout=30), set()
    first = {NAMES.linear(0, name) for name in LINEAR_NAMES[:threads]}

    def read(folder: ModelFolder, name: str, *args: Any) -> Any:
        seen.add(threading.current_thread())
        if name in first:
            meeting.wait()
        return real(folder, name, *args)

    monkeypatch.setattr(load_module, "read_linear", read)
    load_weights(folder, read_config(folder), NF4, "host")
    assert len(seen) == threads


def test_one_linear_a_thread_is_held(folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear is in its place before the thread reads another."""
    folder, waiting = folders["4bit"], threading.local()
    real_keep, real_read = Placement.keep, load_module.read_linear

    def keep(placement: Placement, tree: Any, where: Any) -> Any:
        waiting.linears = 0
        return real_keep(placement, tree, where)

    def read(*args: Any) -> Any:
        waiting.linears = getattr(waiting, "linears", 0) + 1
        assert waiting.linears == 1
        return real_read(*args)

    monkeypatch.setattr(Placement, "keep", keep)
    monkeypatch.setattr(load_module, "read_linear", read)
    load_weights(folder, read_config(folder), NF4, "host")


def test_a_scale_that_is_not_finite(tmp_path: Path, folders: dict[str, ModelFolder]) -> None:
    """Found by a thread, raised to the caller."""
    folder = shutil.copytree(folders["4bit"].path, tmp_path / "model")
    name = f"{NAMES.linear(5, 'up_proj')}.nested_absmax"
    opened = ModelFolder(folder)
    shard, header = opened._where[name], opened._headers[opened._where[name]]
    with (folder / shard).open("r+b") as file:
        file.seek(header.data_start + header.entries[name].begin)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(InputError, match=r"layers\.5.*nested_absmax"):
        load_weights(opened, read_config(opened), NF4, "host")
