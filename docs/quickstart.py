"""The quickstart from Python: `python docs/quickstart.py [section.key=value ...]`, in the repository's folder."""

import json
import sys

from qlora_jax import load_config, train

config = load_config("configs/quickstart.yaml", sys.argv[1:])
folder = train(config)
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
print(f"held-out loss: {held_out[0]:.3f} before, {held_out[-1]:.3f} after; adapter: {folder / 'adapter'}")
