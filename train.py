"""Fine-tune a model with QLoRA: `python train.py --config FILE [section.key=value ...]`; the same as `qlora-jax train`."""

import sys

from qlora_jax.__main__ import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:], "train.py"))
