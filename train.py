"""Fine-tune a Llama-family model with QLoRA: `python train.py --config FILE [section.key=value ...]`.

The front door; `qlora_jax/commands/train.py` has the command.
"""

import os
import signal
import sys
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torch is absent, which is as we want it
if __name__ == "__main__":
    STARTED = time.perf_counter()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: Ctrl-C in the middle of an import is no news
    # Absent: where torch is installed, transformers would load it, for seconds and for nothing.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]

from qlora_jax.commands.train import main
from qlora_jax.errors import end_process


def _main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(seconds=time.perf_counter() - STARTED)


if __name__ == "__main__":
    end_process(_main)
