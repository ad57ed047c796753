"""`qlora-jax train`, or `python train.py`: fine-tune a model with QLoRA, or continue a run that was stopped."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qlora_jax.base.console import Phases, make_console
from qlora_jax.base.errors import exit_status
from qlora_jax.commands.execute import execute
from qlora_jax.commands.prepare import prepare
from qlora_jax.config import Config, load_config
from qlora_jax.config.arguments import path_argument
from qlora_jax.training.output_dir import OutputDir
from qlora_jax.training.trackers import check_trackers

EPILOG = """\
Any setting of the file can be given on the command line, e.g. training.max_steps=20 lora.r=16.
A run leaves in training.output_dir: adapter/ (PEFT's format), metrics.jsonl, loss.png, config.yaml (all settings, resolved), run.json
(what happened), checkpoints/, samples.jsonl when training.sample_prompt is set, best/ when there is something to evaluate on, and merged/
(a Hugging Face folder) when training.export_merged is true.
A run that was stopped, by Ctrl-C, SIGTERM or anything else, is continued by the same command."""


@exit_status
def main(arguments: Sequence[str] | None = None, prog: str = "train.py", started: float | None = None) -> None:
    """Parse the command line and run.

    Args:
        arguments: the command line without the program; by default this process's.
        prog: the program's name, in help and in run.json.
        started: when the process began (`time.perf_counter`), if it is the run's own; Ctrl-C then raises KeyboardInterrupt.
    """
    if started is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune a model with QLoRA, or continue a run that was stopped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, type=path_argument, metavar="FILE", help="a YAML file of settings; see configs/"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    options = parser.parse_args(arguments)
    command = [*prog.split(), *(sys.argv[1:] if arguments is None else arguments)]
    phases = Phases()
    if started is not None:
        phases.seconds["starting"] = time.perf_counter() - started
    run(load_config(options.config, options.overrides), make_console(), command, phases)


def train(config: Config, console: Console | None = None) -> Path:
    """Run, or continue, what the settings say, as `qlora-jax train` does, and return the run's folder.

    Raises:
        InputError: something the settings name cannot be used, or does not fit.
        InterruptedRunError: a signal asked the run to stop; what was done is saved.
    """
    run(config, console or make_console(), ["qlora_jax.train"], Phases())
    return config.training.output_dir


def run(config: Config, console: Console, command: Sequence[str], phases: Phases) -> None:
    """Do one whole run, or what is left of it: prepare, load, train, export, show."""
    if config.training.full_determinism:  # XLA reads this once, when the device is first used
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_exclude_nondeterministic_ops=true"
    check_trackers(config.training)
    with phases.told(console, once="loading"), OutputDir(config.training, phases.seconds) as folder:
        execute(prepare(config, folder, console, phases), command)
