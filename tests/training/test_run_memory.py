"""A run takes no more memory the longer it is: what is live after some hundred steps is what was live before."""

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import pytest

from qlora_jax.training.trainer import Trainer
from tests.helpers.runs import train_main, write_place

TINY = ["lora.target_modules=[q_proj]", "data.preview_rows=0", "training.optim=adamw"]


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def watched(monkeypatch: pytest.MonkeyPatch, every: int, look: Any) -> list[Any]:
    """What `look` returns after every so many steps."""
    seen: list[Any] = []
    real = Trainer._step

    def step(self: Trainer, *args: Any) -> Any:
        adapters = real(self, *args)
        if self.progress.step % every == 0:
            gc.collect()
            seen.append(look())
        return adapters

    monkeypatch.setattr(Trainer, "_step", step)
    return seen


def test_nothing_is_kept_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step logged, with evaluations and samples: bytes that Python holds, its objects, and arrays on the device."""
    place = write_place(tmp_path / "place", max_steps=400, num_hidden_layers=1)
    evaluations = ["training.eval_steps=50", f"data.eval_path={place / 'eval.jsonl'}", "training.sample_prompt=a"]
    seen = watched(
        monkeypatch, 100, lambda: (tracemalloc.get_traced_memory()[0], len(gc.get_objects()), len(jax.live_arrays()))
    )
    tracemalloc.start()
    try:
        off = ["training.save_steps=0", "training.save_interval_minutes=0", "training.max_steps=400"]
        assert train_main(place, tmp_path / "out", *TINY, *off, *evaluations, "training.sample_max_new_tokens=2") == 0
    finally:
        tracemalloc.stop()
    _, after, _, last = seen
    steps = 200
    assert last[0] - after[0] < 64 * steps, "bytes; of each step's record alone there were 420"
    assert last[1] - after[1] < steps
    assert last[2] <= after[2]


@pytest.mark.slow
def test_a_long_run_s_resident_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,500 steps with 50 saves and evaluations: it was 9.9 MiB for every 1,000 steps."""
    place = write_place(tmp_path / "place", max_steps=2500, num_hidden_layers=1)
    more = ["training.max_steps=2500", "training.save_steps=50", "training.eval_steps=50"]
    seen = watched(monkeypatch, 500, resident_bytes)
    assert train_main(place, tmp_path / "out", *TINY, *more, f"data.eval_path={place / 'eval.jsonl'}") == 0
    assert (seen[-1] - seen[0]) / 2**20 < 2 * 2, seen
