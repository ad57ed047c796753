"""Fine-tune a model with QLoRA: `python train.py --config FILE [section.key=value ...]`; the same as `qlora-jax train`."""

import sys

from qlora_jax.__main__ import train
from qlora_jax.base.errors import end_process

if __name__ == "__main__":
    end_process(lambda: train(sys.argv[1:], "train.py"))
