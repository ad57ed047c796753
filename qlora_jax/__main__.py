"""The commands: `qlora-jax COMMAND`, or `python -m qlora_jax COMMAND`.

A command's modules are imported when it is the one that is run: `--help` answers at once.
"""

import argparse
import dataclasses
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torch is absent, which is as we want it

from qlora_jax import __version__
from qlora_jax.base.errors import end_process, exit_status

AS_MODULE = "python -m qlora_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command: the module that has it, and what it does in a line of `--help`.

    The module has `add_arguments(parser)` and `run(options)`, or a `main(arguments, prog)` of its own where it is a program by itself too.
    """

    module: str
    help: str


COMMANDS = {
    "train": Command(module="qlora_jax.commands.train", help="fine-tune a model, or continue a run that was stopped"),
    "init": Command(module="qlora_jax.commands.init", help="write a commented file of all settings, from an example"),
    "plan": Command(
        module="qlora_jax.commands.plan",
        help="say what a run would take of the GPU, the host and the disk, and how long, before anything is read",
    ),
    "data": Command(
        module="qlora_jax.commands.data",
        help="show what a run would learn from: rows as tokens, what counts in the loss, lengths, what is left out",
    ),
    "generate": Command(
        module="qlora_jax.commands.generate", help="continue a prompt with a model, and an adapter if there is one"
    ),
    "compare": Command(
        module="qlora_jax.commands.compare",
        help="compare our numbers with transformers + bitsandbytes + peft, on the same model, adapter and tokens",
    ),
    "quantize": Command(module="convert.quantize", help="write a model in bitsandbytes' 4 bits"),
    "merge": Command(module="convert.merge", help="fold an adapter into its base model"),
    "cache": Command(module="convert.cache", help="list the quantized models that are kept, and remove some"),
}


@exit_status
def main(arguments: Sequence[str] | None = None, prog: str = AS_MODULE) -> int | None:
    """Run the command that the first argument names, and return its exit status, if it has one.

    Args:
        arguments: the command line without the program; by default this process's.
        prog: the program's name in help and errors.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    command = COMMANDS.get(name)
    if command is None:
        _explain(prog, [name] if name else [])
        return None
    module = importlib.import_module(command.module)
    if not hasattr(module, "add_arguments"):
        return module.main(rest, f"{prog} {name}")
    parser = argparse.ArgumentParser(prog=f"{prog} {name}", description=f"{command.help[0].upper()}{command.help[1:]}.")
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest))


def _explain(prog: str, arguments: Sequence[str]) -> None:
    """Answer what is not a command: `--help`, `--version`, or a wrong name, which ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog=prog, description="QLoRA fine-tuning in JAX.", epilog=f"`{prog} COMMAND --help` says more of one."
    )
    parser.add_argument("--version", action="version", version=f"qlora_jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    parser.parse_args(arguments)


def train(arguments: Sequence[str], prog: str) -> int:
    """Run `train` in this process, which does nothing else, and return its exit status."""
    started = time.perf_counter()
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until the command itself begins: Ctrl-C in the middle of an import is no news
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # absent: transformers would load it, for seconds and for nothing
    return importlib.import_module(COMMANDS["train"].module).main(arguments, prog, started)


def console(prog: str = "qlora-jax") -> int | None:
    """Run the console script, and return its exit status."""
    return train(sys.argv[2:], f"{prog} train") if sys.argv[1:2] == ["train"] else main(prog=prog)


if __name__ == "__main__":
    end_process(lambda: console(AS_MODULE) or 0)
