"""`kill -9` at random moments, 50 times in a row: while files are read, checkpoints written and renamed, results exported. Every run that
comes to its end has the result of the run that nobody killed."""

import collections
import contextlib
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.children import REPOSITORY, environment
from tests.helpers.runs import assert_same, outcome, write_place

SETTINGS = ["training.max_steps=6", "training.save_steps=1", "lora.lora_dropout=0.1", "lora.target_modules=[q_proj]",
    "training.logging_steps=2", "training.export_merged=true"]  # fmt: skip

DIES = """
import gc, itertools, os, pathlib, random, signal, sys, threading, time

out, wanted, gradients, *arguments = sys.argv[1:]
from qlora_jax.commands import train
import matplotlib.figure, matplotlib.backends.backend_agg
import transformers.models.auto.tokenization_auto, transformers.models.llama.configuration_llama
from transformers import LlamaConfig, PreTrainedTokenizerFast
from orbax.checkpoint import v1
from convert import load, merge
from convert.files.folder import ModelFolder
from qlora_jax import config
from qlora_jax.engine import layer_program, programs
from qlora_jax.model import decoder, vocabulary
from qlora_jax.engine.engine import Engine, Gradients
from tests.helpers.children import held_open

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
random.seed(0)

def watch(event, args):
    if limit is not None and event in EVENTS and (path := held_open(args[0])).startswith(out) and next(count) >= limit:
        if delay:
            threading.Thread(target=lambda: (time.sleep(delay), die(event, path)), daemon=True).start()
            time.sleep(0.0001)
        else:
            die(event, path)

def die(event, path):
    os.write(1, f"killed: {event} {path}\\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)

def made_up(self, weights, adapters, started):
    import jax, jax.numpy as jnp
    from qlora_jax.runtime.placement import one_device
    number = one_device().put(started.micro_batches[0].input_ids.astype("float32").mean(), "device")
    layers = [jax.jit(lambda tree, number: jax.tree.map(lambda x: jnp.sin(x + number), tree))(layer, number) for layer in adapters]
    sums = [programs.square_sum(layer) for layer in layers]
    return sums[0], Gradients(layers, sums)

def describe_once():
    settings = config.load_config(pathlib.Path(arguments[1]), [*arguments[2:], f"training.output_dir={out}/0"])
    shape = load.read_config(ModelFolder(pathlib.Path(settings.model.name_or_path)))
    layer = (shape, settings.lora, settings.quantization, "xla")
    for saves in (False, True):
        layer_program.LayerProgram.of(*layer, kind=shape.kinds[0], saves=saves, share_dense=True, mlp_tokens=decoder.MLP_TOKENS)
    programs.describe(decoder.DecoderLayer, shape, None, *layer[2:])
    for module in (vocabulary.Embedding, vocabulary.Head):
        programs.describe(module, shape)
    gc.freeze()

def start(number):
    if (pid := os.fork()) == 0:
        os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stdout = open(os.devnull, "w")
        os._exit(train.main([*arguments, f"training.output_dir={out}/{number}"]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if gradients == "made up":
    Engine.go_on, merge.check_merge = made_up, lambda *args: ()
    matplotlib.figure.Figure.savefig = lambda figure, path: pathlib.Path(path).write_bytes(b"a picture")
describe_once()
sys.addaudithook(watch)
kills, number, limit = 0, 0, None
while True:
    count, delay = itertools.count(), random.choice((0, 0, random.uniform(0, 0.1)))
    status = start(number)
    if status == -signal.SIGKILL:
        kills += 1
    else:
        print("ended:", number, status, flush=True)
        if kills >= int(wanted) or status != 0:
            break
        number += 1
    limit = random.randrange(220) if kills < int(wanted) else None
"""
"""Run after run in children, each killed after so many file operations in its folder, at once or up to 0.1 s later; the first one is not.
JAX's backend is only started once they are forked; layers are described before. Their compilations are cached, or they would do nothing
else; and as it takes seconds to trace them all, the gradients may be made up, and the picture of the loss: what a checkpoint has to hold is
the same."""


def environment_of(tmp_path: Path) -> dict[str, str]:
    """Of the children: on a CPU, with every compilation cached."""
    return environment(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )


@pytest.mark.parametrize(("kills", "gradients"), [(50, "made up"), pytest.param(200, "real", marks=pytest.mark.slow)])
def test_killed_many_times(tmp_path: Path, kills: int, gradients: str) -> None:
    place = write_place(tmp_path / "place", max_steps=6, num_hidden_layers=1)
    out = tmp_path / "out"
    arguments = ["--config", str(place / "run.yaml"), *SETTINGS]
    command = [sys.executable, "-c", DIES, str(out), str(kills), gradients, *arguments]
    done = subprocess.run(command, env=environment_of(tmp_path), stdout=subprocess.PIPE, text=True, check=True)
    log = (tmp_path / "out.log").read_text()
    ended = re.findall(r"ended: (\d+) (-?\d+)", done.stdout)
    assert {status for _, status in ended} == {"0"}, log[-3000:]
    killed = re.findall(r"killed: (\S+) (.*)", done.stdout)
    assert len({path for _, path in killed}) > kills / 3, "moments of all kinds"
    assert len(killed) >= kills  # a thread may say so beside another that is quicker
    for number, _ in ended:
        assert_same(outcome(out / number), outcome(out / "0"))
        assert not list((out / number).rglob("*.partial")), "nothing half-made is left"
    where = collections.Counter(
        re.sub(r"\d+", "N", path.removeprefix(f"{out}/").split("/", 1)[-1]) for _, path in killed
    )
    print(where)  # shown when what follows fails: too few kinds of moments
    assert any(".step-N.partial" in path for path in where), "while a checkpoint was written"
    assert any("adapter" in path or "merged" in path for path in where), "while results were exported"


KILLS = 12
AS_USERS_RUN_IT = ["training.max_steps=60", "training.save_steps=1", "training.logging_steps=3", "training.eval_steps=20",
    "training.optim=paged_adamw_8bit", "training.export_merged=true", "training.sample_prompt=abc", "training.sample_max_new_tokens=4",
    "data.packing=true", "data.preview_rows=0", "lora.lora_dropout=0.1"]  # fmt: skip


class Command:
    """`python train.py`, as a user starts it: a process of its own, killed from outside."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.arguments = [sys.executable, "train.py", "--config", str(place / "run.yaml"), *AS_USERS_RUN_IT]
        self.arguments += [f"data.eval_path={place / 'eval.jsonl'}", "training.num_train_epochs=100"]
        self.environment, self.log = environment, place / "log"

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self.arguments, f"training.output_dir={out}"],
                cwd=REPOSITORY,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def until_it_trains(self, process: subprocess.Popen[bytes], out: Path) -> None:
        """Until a line was added to the file of metrics that it began with, or it is over."""
        path, begun = out / "metrics.jsonl", (0, 0)
        while process.poll() is None:
            now = (path.stat().st_ino, path.read_bytes().count(b"\n")) if path.exists() else (0, 0)
            if now[0] == begun[0] and now[1] > begun[1]:
                return
            begun = now
            time.sleep(0.01)


@pytest.mark.slow
def test_the_command_killed_at_random_moments(tmp_path: Path) -> None:
    """Nothing made up: the command itself, its own engine, evaluations, samples and export. Every other kill comes while it starts."""
    place = write_place(tmp_path / "place", max_steps=60)
    command = Command(place, environment_of(tmp_path))
    chance, whole = random.Random(0), tmp_path / "whole"
    assert command.start(whole).wait() == 0, command.log.read_text()[-3000:]
    started = time.monotonic()  # this time with everything compiled
    process = command.start(tmp_path / "again")
    command.until_it_trains(process, tmp_path / "again")
    starting = time.monotonic() - started
    assert process.wait() == 0
    training = time.monotonic() - started - starting
    assert_same(outcome(tmp_path / "again"), expected := outcome(whole))
    kills, number, moments = 0, 0, []
    while kills < KILLS or process.returncode != 0:
        process = command.start(out := tmp_path / str(number))
        if kills < KILLS:
            early = kills % 2 == 0
            if not early:
                command.until_it_trains(process, out)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, starting if early else training / 3))
            if process.poll() is None:
                process.kill()
        status = process.wait()
        if status == -signal.SIGKILL:
            kills += 1
            moments.append(max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0))
        else:
            assert status == 0, command.log.read_text()[-3000:]
            assert_same(outcome(out), expected)
            number += 1
    print(f"killed after steps {moments}; {number} runs came to their end")
    assert len({step for step in moments if 0 < step < 60}) >= KILLS // 4, "while it trained, at several moments"
