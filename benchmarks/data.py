"""The input pipeline on this machine's cores: tokenization, the cache, packing, and what a batch costs. `python -m benchmarks.data`.

No GPU is used. Rows are made here: short chats, and conversations with lengths like ShareGPT's; `--path` measures others as well.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from benchmarks.machine import write_result
from convert.model import open_tokenizer
from qlora_jax.base.console import make_console
from qlora_jax.config import Config
from qlora_jax.data.batching.packing import pack
from qlora_jax.data.corpus import Corpus, load_corpus

WORDS = "the light turns over the bay and every ship that passes reads it as a sentence about rocks".split()  # noqa: SIM905
STEP_SECONDS = 0.05
SHORT_TIMES = 3
"""The short rows are tokenized so often, because other work on the machine tells on so few seconds."""
LONG_MEDIAN, LONG_SIGMA = 900, 1.2
"""Log-normal tokens a conversation, as in the test of packing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write `results/data-cpu.json`, or with `--path` `results/data-path-cpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="whose tokenizer and template")
    parser.add_argument("--rows", type=int, default=100_000, help="short chats; default: 100,000")
    parser.add_argument("--path", help="rows to measure beside those made here; what cannot be used is skipped")
    options = parser.parse_args(arguments)
    console = make_console()
    tokenizer = open_tokenizer(options.model, log=console.print)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        result: dict[str, Any] = {"what": "data", "model": options.model}
        write_rows(place, options.rows)
        for name in ("chats", "texts"):
            result[f"short {name}"] = measure(place / f"{name}.jsonl", tokenizer, place, console, times=SHORT_TIMES)
        if options.path:
            result[Path(options.path).name] = measure(Path(options.path), tokenizer, place, console, times=1)
    result["packing"] = [measure_packing(capacity) for capacity in (2048, 4096)]
    result["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps(result, indent=2))
    print(write_result("data-path-cpu" if options.path else "data-cpu", result))


def write_rows(place: Path, rows: int) -> None:
    """One-turn chats of about 14 words, and the same words as texts."""
    rng = np.random.default_rng(0)
    with (place / "chats.jsonl").open("w") as chats, (place / "texts.jsonl").open("w") as texts:
        for words in rng.choice(WORDS, (rows, 14)).tolist():
            asked, answered = " ".join(words[:6]), " ".join(words[6:])
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            chats.write(json.dumps({"messages": messages}) + "\n")
            texts.write(json.dumps({"text": f"{asked} {answered}"}) + "\n")


def measure(
    path: Path, tokenizer: PreTrainedTokenizerBase, place: Path, console: Console, *, times: int
) -> dict[str, Any]:
    """Tokenize, find it again in the cache, and make batches, packed and not. Of so many times the fastest."""
    runs = []
    for number in range(times):
        before = cpu_seconds()
        first, seconds = timed_load(path, tokenizer, place / f"cache{number}", console)
        runs.append((seconds, cpu_seconds() - before, os.getloadavg()[0]))
    seconds, cpu, load = min(runs)
    again, cached_seconds = timed_load(path, tokenizer, place / "cache0", console)
    read = sum(store.report.num_read for store in first.rows.stores)
    return {
        "rows": read,
        "skipped": sum(store.report.skipped.total() for store in first.rows.stores),
        "tokens": int(first.rows.lengths.sum()),
        "seconds": round(seconds, 2),
        "rows_per_s": round(read / seconds),
        "rows_per_s_each_time": [round(read / taken) for taken, *_ in runs],
        "cpu_us_per_row": round(1e6 * cpu / read, 1),  # of all processes, starting them included
        "load_average": round(load, 2),  # what else the cores were doing
        "tokens_per_s": round(int(first.rows.lengths.sum()) / seconds),
        "seconds_from_cache": round(cached_seconds, 3),
        "unpacked": batch_costs(again, packing=False),
        "packed": batch_costs(again, packing=True),
    }


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed_load(path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, console: Console) -> tuple[Corpus, float]:
    """A corpus, steps of 8 lines of 2048 tokens, and how long it took."""
    config = Config.model_validate(
        {
            "model": {"name_or_path": "unused"},
            "data": {"path": str(path), "max_seq_length": 2048, "bad_rows": "skip"},
            "training": {"output_dir": "unused", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        }
    )
    start = time.perf_counter()
    corpus = load_corpus(config, tokenizer, cache, console)
    return corpus, time.perf_counter() - start


def batch_costs(corpus: Corpus, *, packing: bool) -> dict[str, Any]:
    """How long steps of 50 ms wait for their batches, the first and the worst of all, and the share that is padding."""
    start = time.perf_counter()
    batches = corpus.batches(packing=packing)
    prepared = time.perf_counter() - start
    milliseconds = []
    for step in range(min(len(batches), 100)):
        start = time.perf_counter()
        batches.batch(step)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        time.sleep(STEP_SECONDS)
    return {
        "prepared_s": round(prepared, 3),
        "waited_ms_first": round(milliseconds[0], 3),  # nothing was made ahead of it
        "waited_ms_median": round(float(np.median(milliseconds[1:])), 3),
        "waited_ms_worst": round(max(milliseconds[1:]), 3),
        "padding": round(batches.padding_share(), 4),
    }


def measure_packing(capacity: int, rows: int = 100_000) -> dict[str, Any]:
    """Efficiency and time of packing lengths like ShareGPT's."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(LONG_MEDIAN), LONG_SIGMA, rows).astype(int), 8, capacity)
    start = time.perf_counter()
    lines = pack(lengths, capacity, rng)
    seconds = time.perf_counter() - start
    efficiency = lengths.sum() / (len(lines) * capacity)
    return {"capacity": capacity, "rows": rows, "efficiency": round(float(efficiency), 5), "seconds": round(seconds, 3)}


if __name__ == "__main__":
    main()
