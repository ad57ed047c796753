"""Checkpoints hold every bit, are whole or not there, and say when they are damaged."""

import errno
import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qlora_jax.base.errors import InputError
from qlora_jax.config import TrainingSettings
from qlora_jax.engine import programs
from qlora_jax.engine.engine import Gradients
from qlora_jax.engine.optimizer import AdamW
from qlora_jax.ops import blockwise
from qlora_jax.runtime.placement import fetch, one_device
from qlora_jax.training import checkpoint, snapshot
from qlora_jax.training.checkpoint import (
    ABOUT,
    CHECKSUMS,
    FORMAT,
    Checkpoints,
    DamagedError,
    checkpoint_bytes,
    open_checkpoint,
)
from tests.helpers.children import environment

LAYERS = 3


def adapters(seed: int = 0, where: str = "device") -> list[Any]:
    """Layers of two linears, one of them big enough for 8-bit moments; all bit patterns occur, negative zero and subnormals too."""
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        bits = rng.integers(0, 2**32, shape, dtype=np.uint32)
        bits &= np.uint32(~(1 << 30) & 0xFFFFFFFF)  # no infinity, no NaN, whose payload nobody promises to keep
        return bits.view(np.float32)

    pairs = [
        {"q": {"lora_a": array(8, 640), "lora_b": array(16, 8)}, "k": {"lora_a": array(4, 6)}} for _ in range(LAYERS)
    ]
    return [one_device().put(pair, where) for pair in pairs]


def moments(params: list[Any], optim: str = "paged_adamw_8bit", where: str = "host") -> list[Any]:
    optimizer = AdamW(TrainingSettings(output_dir="x", optim=optim), params, where)
    grads = jax.tree.map(lambda g: g * 1e-20, adapters(9))
    params = jax.tree.map(lambda p: p + 0, adapters(8))
    optimizer.update(params, Gradients(grads, [programs.square_sum(layer) for layer in grads]), 0.0)
    return optimizer.moments


@functools.cache
def some_moments() -> list[Any]:
    return moments(adapters())


def bits(tree: Any) -> list[tuple[bytes, str, tuple[int, ...]]]:
    return [(np.asarray(x).tobytes(), str(x.dtype), x.shape) for x in jax.tree.leaves(tree)]


def save(folder: Path, *steps: int, keep: int = 2, **about: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (metrics := folder.parent / "metrics.jsonl").write_bytes(b"{}\n")
    for step in steps:
        checkpoints.save(step, {"adapters": adapters(step), "moments": some_moments()}, about, [metrics])
    checkpoints.wait()
    return checkpoints


def no_log(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 7 and 14; not to be written to."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, 7, 14, progress={"step": 14, "loss": 0.1 + 0.2})
    return folder


# Bounded memory


@pytest.mark.parametrize("where", ["device", "host"])
def test_arrays_leave_the_device_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A pool that holds a few of the largest is enough, whatever a checkpoint has in all, and the arrays keep no copies of themselves."""
    params, state = adapters(3, where), moments(adapters(3), where=where)
    layers = {"adapters": params, "moments": state}
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(layers))
    passing: list[int] = []
    slots = threading.Semaphore(snapshot.FETCHERS)

    def one_at_a_time(array: jax.Array) -> np.ndarray:
        assert threading.current_thread().name.startswith("checkpoint"), "by the writer's threads, beside the next step"
        assert slots.acquire(blocking=False)
        passing.append(array.nbytes)
        found = fetch(array)
        slots.release()
        return found

    monkeypatch.setattr(snapshot, "fetch", one_at_a_time)
    monkeypatch.setattr(jax, "device_put", lambda *args, **options: pytest.fail("nothing is moved as a whole"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(3, layers, {})
    checkpoints.wait()
    assert sum(passing) == checkpoint_bytes(layers) > 4 * largest
    assert max(passing) == largest
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(layers))


def test_an_update_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns before anything is copied; `wait_taken` returns when all of it is, also if that failed."""
    go_on, copied = threading.Event(), []

    def slowly(array: jax.Array) -> np.ndarray:
        assert go_on.wait(60)
        copied.append(array)
        return fetch(array)

    monkeypatch.setattr(snapshot, "fetch", slowly)
    checkpoints, params = Checkpoints(tmp_path / "checkpoints", 1), adapters(3)
    checkpoints.save(3, {"adapters": params}, {})
    assert not copied
    threading.Timer(0.2, go_on.set).start()
    checkpoints.wait_taken()
    assert len(copied) == len(jax.tree.leaves(params))
    expected = bits(params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # as an update does
    checkpoints.wait()
    restored = checkpoints.newest(no_log).restore({"adapters": adapters(4)})
    assert bits(restored["adapters"]) == expected

    monkeypatch.setattr(snapshot, "fetch", lambda array: (_ for _ in ()).throw(RuntimeError("no memory")))
    checkpoints.save(4, {"adapters": adapters(4)}, {})
    checkpoints.wait_taken()
    with pytest.raises(RuntimeError, match="no memory"):
        checkpoints.wait()


# Every bit


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize(("written", "read"), [("device", "host"), ("host", "device")])
def test_every_bit_comes_back_wherever_things_live(tmp_path: Path, optim: str, written: str, read: str) -> None:
    params = adapters(3, written)
    state = moments(adapters(3), optim, written)
    assert any(isinstance(x, blockwise.BlockwiseTensor) for x in jax.tree.leaves(
        state, is_leaf=lambda x: isinstance(x, blockwise.BlockwiseTensor))) == optim.endswith("8bit")  # fmt: skip
    expected = bits([params, state])
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(3, {"adapters": params, "moments": state}, {})
    checkpoints.wait()
    found = checkpoints.newest(no_log)
    fresh = adapters(4, read)
    template = {"adapters": fresh, "moments": moments(adapters(4), optim, read)}
    kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(template)]
    assert set(kinds) == {"device" if read == "device" else "pinned_host"}
    structure = jax.tree.structure(dict(template))
    restored = found.restore(template)
    assert bits([restored["adapters"], restored["moments"]]) == expected
    assert [leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored)] == kinds
    assert jax.tree.structure(restored) == structure


def test_layers_of_different_shapes(tmp_path: Path) -> None:
    layers = [one_device().put({"a": np.full((2, size), size, np.float32)}, "device") for size in (3, 5, 3)]
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, {"adapters": list(layers)}, {})
    checkpoints.wait()
    restored = checkpoints.newest(no_log).restore({"adapters": jax.tree.map(lambda x: x * 0, layers)})
    assert bits(restored["adapters"]) == bits(layers)


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays are spent as soon as they may be, as the next optimizer step does, while the writer is held up."""
    spent, real = threading.Event(), checkpoint.write_json
    monkeypatch.setattr(checkpoint, "write_json", lambda *args: (spent.wait(30), real(*args))[1])
    params = adapters(1)
    expected = bits(params)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, {"adapters": params}, {})
    checkpoints.wait_taken()
    spend = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    params = [spend(layer) for layer in params]
    jax.block_until_ready(params)
    assert not list(tmp_path.glob("step-*")), "save did not wait for the writer"
    spent.set()
    checkpoints.wait()
    assert bits(checkpoints.newest(no_log).restore({"adapters": params})["adapters"]) == expected


def test_a_folder_that_is_named_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the quickstart's is; orbax takes whole paths only."""
    monkeypatch.chdir(tmp_path)
    template = {"adapters": adapters(3), "moments": some_moments()}
    restored = save(Path("runs/checkpoints"), 3).newest(no_log).restore(template)
    assert bits(restored["adapters"]) == bits(adapters(3))


def test_small_values_and_files(saved: Path) -> None:
    found = Checkpoints(saved, 2).newest(no_log)
    assert (found.step, found.path.name) == (14, "step-14")
    assert found.about["progress"] == {"step": 14, "loss": 0.1 + 0.2}
    assert found.about["format"] == FORMAT
    assert (found.path / "metrics.jsonl").read_bytes() == b"{}\n"


def test_its_size_is_the_arrays(saved: Path) -> None:
    arrays = {"adapters": adapters(), "moments": some_moments()}
    expected = sum(np.asarray(x).nbytes for x in jax.tree.leaves(arrays))
    assert checkpoint_bytes(arrays) == expected
    written = sum(path.stat().st_size for path in (saved / "step-14").rglob("*") if path.is_file())
    assert expected <= written < expected + 60_000, "orbax's own files are a few kB for each of the arrays' names"


# Which are kept


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 9, 10, 11, 100, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100", "step-11"]
    assert Checkpoints(tmp_path, 2).newest(no_log).step == 100


def test_the_same_step_is_not_written_twice(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 5)
    before = (tmp_path / "step-5" / ABOUT).stat().st_mtime_ns
    checkpoints.save(5, {"adapters": adapters()}, {})
    checkpoints.wait()
    assert (tmp_path / "step-5" / ABOUT).stat().st_mtime_ns == before


# Damage


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-2], "emptied": lambda data: b"", "longer": lambda data: data + b"\0", "flipped": flipped,
}  # fmt: skip


def test_any_damage_to_any_file_is_found(saved: Path, tmp_path: Path) -> None:
    """And named; but for an empty file that is made longer by nothing."""
    copy = shutil.copytree(saved / "step-14", tmp_path / "step-14")
    open_checkpoint(copy)
    names = files_of(copy)
    assert {ABOUT, CHECKSUMS, "metrics.jsonl", "arrays/state/manifest.ocdbt"} <= set(names)
    for name in names:
        path = copy / name
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(DamagedError, match=name):
            open_checkpoint(copy)
        for kind, damage in DAMAGES.items():
            damaged = damage(data) if data or kind == "longer" else data
            if damaged == data:
                continue
            path.write_bytes(damaged)
            with pytest.raises(DamagedError, match="." if name == CHECKSUMS else name):
                open_checkpoint(copy)
        path.write_bytes(data)
    open_checkpoint(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "7", '{"about.json": 3}', '{"about.json": [1, "x"]}'])
def test_checksums_that_are_none(saved: Path, tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(saved / "step-14", tmp_path / "step-14")
    (copy / CHECKSUMS).write_text(text)
    with pytest.raises(DamagedError):
        open_checkpoint(copy)


def test_the_one_before_is_used(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    largest = max((folder / "step-14" / "arrays").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(flipped(largest.read_bytes()))
    lines: list[str] = []
    found = Checkpoints(folder, 2).newest(lines.append)
    assert found.step == 7
    name = largest.relative_to(folder / "step-14").as_posix()
    assert lines == [
        f"{folder / 'step-14'} is damaged ({name} has other bytes than were written): going back to step-7"
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["step-14.damaged", "step-7"]
    save(folder, 14)
    assert sorted(path.name for path in folder.iterdir()) == ["step-14", "step-7"], "the same step again, and sound"


def test_no_sound_one(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    for path in folder.iterdir():
        (path / ABOUT).write_text("{}")
    with pytest.raises(
        InputError, match=r"no checkpoint that is not damaged\n    step-14: about.json .*\n    step-7: about.json"
    ):
        Checkpoints(folder, 2).newest(no_log)
    assert sorted(path.name for path in folder.iterdir()) == ["step-14", "step-7"], "nothing is thrown away"


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 2).newest(no_log) is None


def test_a_later_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", FORMAT + 1)
        save(tmp_path, 1)
    with pytest.raises(InputError, match=f"format {FORMAT + 1}\n.*at most {FORMAT}"):
        Checkpoints(tmp_path, 2).newest(no_log)


def test_other_arrays_are_refused(saved: Path) -> None:
    found = Checkpoints(saved, 2).newest(no_log)
    params = adapters()
    with pytest.raises(InputError, match=r"arrays that this run has no place for.*moments"):
        found.restore({"adapters": params, "moments": moments(params, "paged_adamw_32bit")})
    with pytest.raises(InputError, match=r"3 x adapters.*lora_a"):
        found.restore({"adapters": params[:2], "moments": some_moments()})


# Stopped while it saves

DIES = """
import itertools, os, signal, sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
place, limits = Path(sys.argv[1]), list(map(int, sys.argv[2:]))
(metrics := place.parent / "metrics.jsonl").write_bytes(b"x")
import numpy as np
from qlora_jax.training.checkpoint import Checkpoints
from qlora_jax.runtime.placement import one_device
from tests.helpers.children import held_open
from orbax.checkpoint import v1

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

def watch(event, args):
    if event in EVENTS and str(place) in held_open(args[0]) and next(count) >= limit:
        os.kill(os.getpid(), signal.SIGKILL)

def run(step):
    checkpoints = Checkpoints(place, 1)
    found = checkpoints.newest(print)
    if found:
        template = {"adapters": [one_device().put({"a": np.zeros(5000, np.float32)}, "device")]}
        assert np.asarray(found.restore(template)["adapters"][0]["a"])[7] == found.step
    layers = [one_device().put({"a": np.full(5000, step, np.float32)}, "device")]
    checkpoints.save(step, {"adapters": layers}, {"x": step}, [metrics])
    checkpoints.wait()

sys.addaudithook(watch)
for step, limit in enumerate(limits, 1):
    count = itertools.count()
    if (pid := os.fork()) == 0:
        run(step)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sorted(p.name for p in place.glob("step-*")), flush=True)
"""
"""Saves in children that are killed at the given number of file operations; each reads what the one before left."""


def test_killed_at_any_file_operation(tmp_path: Path) -> None:
    limits = [10**6, *range(44), 10**6]
    command = [sys.executable, "-c", DIES, str(tmp_path / "c"), *map(str, limits)]
    done = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True, timeout=120)
    results = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(results) == len(limits), done.stderr
    assert results[-1][0] == "0", done.stderr
    killed = sum(status == "-9" for status, _ in results)
    assert killed >= 30, "or the limits are too high"
    assert {status for status, _ in results} == {"0", "-9"}, done.stderr
    assert all(left != "[]" for _, left in results), "a checkpoint that was there is never lost"
    assert results[-1][1] == f"['step-{len(limits)}']"
    assert [path.name for path in (tmp_path / "c").iterdir()] == [f"step-{len(limits)}"], "nothing half-made is left"


# A full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 17: No space left on device [os_error_code='28']"
        ),
    ],
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As Python says it, and as tensorstore does (its words, from a real full disk)."""
    checkpoints = save(tmp_path, 7)

    def full(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        checkpoints.save(8, {"adapters": adapters()}, {})
        with pytest.raises(
            InputError, match=r"the disk became full while step 8 was saved.*\n.*it continues after step 7"
        ):
            checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]
    assert checkpoints.newest(no_log).step == 7


@pytest.mark.parametrize(
    "error", [OSError(errno.EROFS, "Read-only file system"), ValueError("DATA_LOSS: write [os_error_code='30']")]
)
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As Python says it, and as tensorstore does: one message."""
    checkpoints = save(tmp_path / "c", 7)

    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "write_json", fails)
    checkpoints.save(8, {"adapters": adapters()}, {})
    with pytest.raises(InputError, match=r"step 8 could not be saved: Read-only file system\n.*continues after step 7"):
        checkpoints.wait()


def test_another_error_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "replace_folder", lambda *args, **kwargs: 1 / 0)
    checkpoints.save(8, {"adapters": adapters()}, {})
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(9, {"adapters": adapters()}, {})


REALLY_FULL = """
mount -t tmpfs -o size=1m none "$1" && exec "$2" - "$1" <<'END'
import sys
from pathlib import Path
import numpy as np
from qlora_jax.training.checkpoint import Checkpoints
from qlora_jax.engine.engine import Gradients
from qlora_jax.base.errors import InputError
from qlora_jax.runtime.placement import one_device
from tests.helpers.children import environment
checkpoints = Checkpoints(Path(sys.argv[1]) / "c", 2)
for step, sizes in ((1, [1000]), (2, range(20000, 20040))):
    layers = [one_device().put({str(size): np.random.default_rng(0).random(size, np.float32) for size in sizes}, "device")]
    checkpoints.save(step, {"adapters": layers}, {})
    try:
        checkpoints.wait()
    except InputError as error:
        print(error)
print(checkpoints.newest(print).step, [path.name for path in checkpoints.folder.iterdir()])
END
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A megabyte of memory as a disk, where the machine lets a user mount one in a name space of his own."""
    (tmp_path / "disk").mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "mount -t tmpfs none /mnt"], capture_output=True).returncode
    ):
        pytest.skip("no mounting here")
    command = [*unshare, REALLY_FULL, "sh", str(tmp_path / "disk"), sys.executable]
    done = subprocess.run(command, env=environment(JAX_PLATFORMS="cpu"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "found:    the disk became full while step 2 was saved" in done.stdout
    assert "it continues after step 1" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 ['step-1']"
    assert done.stderr == "", "orbax's threads log a traceback each, and tensorstore's print one"
