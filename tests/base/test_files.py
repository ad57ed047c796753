"""Folders are replaced as a whole, whatever moment the process is killed; scratch folders of dead processes are removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.base import files
from qlora_jax.base.files import (
    Anchor,
    FileSoFar,
    Scratch,
    link_folder,
    recover_folder,
    remove_folder,
    remove_unfinished_files,
    replace_folder,
    replacing_folder,
)
from tests.helpers.children import environment


def folder_of(path: Path, text: str) -> Path:
    (path / "below").mkdir(parents=True)
    (path / "file").write_text(text)
    (path / "below" / "file").write_text(text)
    return path


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(params=["exchange", "no exchange"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel's help, and on a file system that has none."""
    if request.param == "no exchange":
        monkeypatch.setattr(files, "_rename_with", lambda *args: False)
    return request.param


def test_replaced(tmp_path: Path, kind: str) -> None:
    for text in "abc":
        replace_folder(folder_of(tmp_path / "new", text), tmp_path / "out")
        assert contents(tmp_path / "out") == {"file": text, "below/file": text}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_not_replaced(tmp_path: Path, kind: str) -> None:
    """Where nothing may be overwritten; and a file, which a folder never replaces."""
    new, out = folder_of(tmp_path / "new", "new"), folder_of(tmp_path / "out", "old")
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        replace_folder(new, out, overwrite=False)
    with pytest.raises(FileExistsError):
        replace_folder(new, tmp_path / "file")
    assert contents(tmp_path) == {"file": "old"} | {
        f"{name}/{file}": text for name, text in (("new", "new"), ("out", "old")) for file in ("file", "below/file")
    }


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path, kind: str) -> None:
    elsewhere = folder_of(tmp_path / "elsewhere", "theirs")
    (tmp_path / "out").symlink_to(elsewhere)
    replace_folder(folder_of(tmp_path / "new", "ours"), tmp_path / "out")
    assert contents(tmp_path / "out")["file"] == "ours" and not (tmp_path / "out").is_symlink()
    assert contents(elsewhere)["file"] == "theirs"


def test_a_block_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    folder_of(tmp_path / "out", "old")
    with pytest.raises(KeyError), replacing_folder(tmp_path / "out") as aside:
        (aside / "file").write_text("half")
        raise KeyError
    assert contents(tmp_path / "out")["file"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


DIES = """
import itertools, os, signal, sys
from pathlib import Path
from qlora_jax.base import files

place, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    files._rename_with = lambda *args: False

def watch(event, args):
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree") and next(count) >= limit:
        os.kill(os.getpid(), signal.SIGKILL)

def text():
    (found,) = {path.read_text() for path in (place / "out").rglob("*") if path.is_file()}
    return found, len(list((place / "out").rglob("*")))

def replace(new):
    with files.replacing_folder(place / "out") as aside:
        for name in "abc":
            (aside / name).write_text(new)

limit = 10**6
count = itertools.count()
replace("0")
sys.addaudithook(watch)
for number in range(1, 100):
    count, limit = itertools.count(), number - 1
    if (pid := os.fork()) == 0:
        replace(str(number))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    limit, before = 10**6, (place / "out").exists()
    files.recover_folder(place / "out")
    print(status, before, *text(), sorted(path.name for path in place.iterdir()), flush=True)
    if status == 0:
        break
"""


@pytest.mark.parametrize("how", ["exchange", "none"])
def test_killed_at_any_file_operation(tmp_path: Path, how: str) -> None:
    """The old folder or the new one, whole; with the kernel's help under its name at every moment, and otherwise once it is recovered."""
    command = [sys.executable, "-c", DIES, str(tmp_path), how]
    done = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True, timeout=60)
    lines = [line.split(" ", 4) for line in done.stdout.splitlines()]
    assert [status for status, *_ in lines[:-1]] == ["-9"] * (len(lines) - 1) and lines[-1][0] == "0", done.stderr
    assert len(lines) > 12, "at moments of all kinds"
    last = "0"
    for number, (_, before, text, files_there, names) in enumerate(lines, 1):
        assert text in (last, str(number)) and files_there == "3"
        assert names == "['out']", "nothing half-made is left"
        assert before == "True" or how == "none"
        last = text
    assert last == str(len(lines))
    assert any(text == str(number) for number, (_, _, text, *_) in enumerate(lines[:-1], 1)), "killed after the rename"
    assert how == "exchange" or any(before == "False" for _, before, *_ in lines), "killed between two renames"


def test_removed(tmp_path: Path) -> None:
    remove_folder(folder_of(tmp_path / "out", "x"))
    folder_of(tmp_path / ".out.removed", "of a process that was killed here")
    remove_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files(tmp_path: Path) -> None:
    names = [".run.json.123.tmp", ".mine.tmp", "x.1.tmp"]
    for name in names:
        (tmp_path / name).write_text("")
    remove_unfinished_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]


def test_links_share_what_is_large(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", "small")
    (folder / "large").write_bytes(bytes(files.LINKED_BYTES))
    link_folder(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "large").samefile(folder / "large")
    assert not (tmp_path / "copy" / "file").samefile(folder / "file")
    assert contents(tmp_path / "copy") == contents(folder)


def test_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "folder", "small")
    (folder / "large").write_bytes(bytes(files.LINKED_BYTES))
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(PermissionError))
    link_folder(folder, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(folder)


def test_a_file_so_far(tmp_path: Path) -> None:
    """It grows afterwards, or another takes its name."""
    (tmp_path / "copies").mkdir()
    path = tmp_path / "lines"

    def grow() -> None:
        with path.open("a") as file:
            file.write("c\n")

    for act in (grow, lambda: (path.unlink(), path.write_text("other"))):
        path.write_text("a\nb\n")
        so_far = FileSoFar(path)
        act()
        so_far.copy_to(tmp_path / "copies")
        assert (tmp_path / "copies" / "lines").read_text() == "a\nb\n"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_folder_held_open_is_not_what_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    anchor = Anchor(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "out").mkdir()
    (anchor.path / "file").write_text("x")
    assert [path.name for path in tmp_path.rglob("file")] == ["file"] and (tmp_path / "moved" / "file").exists()
    anchor.close()


def test_scratch_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Not those of living ones, nor what only has a similar name."""
    text = "import os, sys; from pathlib import Path; from qlora_jax.base.files import Scratch\n"
    text += "(Scratch(Path(sys.argv[1]), '.writing-').path / 'file').write_text('x'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", text, str(tmp_path)], env=environment()).returncode == -9
    (dead,) = tmp_path.iterdir()
    (tmp_path / ".writing-a-book").mkdir()
    living = Scratch(tmp_path, ".writing-")
    assert not dead.exists()
    with Scratch(tmp_path, ".writing-") as another:
        assert living.path.exists() and another.exists()
    living.close()
    assert {path.name for path in tmp_path.iterdir()} == {living.path.name, ".writing-a-book"}
    recover_folder(tmp_path / "never-there")


def test_a_file_so_far_is_let_go_uncopied(tmp_path: Path) -> None:
    """As when the disk is full before its turn comes: no descriptor is left for the collector to find."""
    (tmp_path / "lines").write_text("a\n")
    part = files.FileSoFar(tmp_path / "lines")
    part.close()
    with pytest.raises(ValueError, match="closed"):
        part.copy_to(tmp_path)
