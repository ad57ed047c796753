"""`python -m qlora_jax COMMAND`."""

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torch is absent, which is as we want it

from qlora_jax.base.errors import exit_status
from qlora_jax.commands import compare, data, generate, plan

COMMANDS = {"plan": plan, "data": data, "compare": compare, "generate": generate}


@exit_status
def main(arguments: Sequence[str] | None = None) -> int | None:
    """Parse the command line and run the command; its exit status, if it has one."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_jax", description="QLoRA fine-tuning of Llama-family models in JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        description = module.__doc__.partition(": ")[2]
        command = commands.add_parser(name, help=description, description=description)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
