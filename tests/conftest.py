"""Fixtures shared by the tests, and strictness: implicit rank promotion is an error."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest

from qlora_jax.base.units import GIB
from qlora_jax.runtime.machine import available_host_bytes
from tests.helpers import tiny

jax.config.update("jax_numpy_rank_promotion", "raise")

CORE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("test_architecture", "test_batches", "test_commands", "test_config", "test_errors", "test_formats"), ("",)
    ),
    **dict.fromkeys(
        ("test_feed_forward", "test_linear", "test_llama", "test_loss", "test_nf4", "test_optimizer"), ("",)
    ),
    **dict.fromkeys(("test_order", "test_packing", "test_tokenization", "test_trl"), ("",)),
    "test_adapter": ("peft", "logits", "round"),
    "test_checkpoint": ("every_bit", "newest", "one_before"),
    "test_docs": ("links", "files_are", "modules", "settings", "prose", "readme"),
    "test_engine": ("gradient", "streamed", "micro"),
    "test_merge": ("one_rounding", "pefts_bits", "logits", "two_bases"),
    "test_plan": ("70b", "as_measured", "remedy"),
    "test_prequantized": ("bits", "same"),
    "test_resume": ("killed_and_continued", "other_settings"),
    "test_train": ("what_a_run_leaves", "test_metrics", "the_model_learns", "merged_is_what"),
}
"""The most telling tests, `-m core`: their modules, and what of their names picks them; `""` picks all."""

WORKER_BYTES = 4 * GIB
"""Host memory for a process of tests; they take up to 3.3 GiB."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in several processes, one a core, if pytest-xdist is there; a chosen file in this one, and `-n` has the last
    word. Not on a GPU, whose memory the first process takes."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return
    options = config.option
    workers = min(len(os.sched_getaffinity(0)), available_host_bytes() // WORKER_BYTES)
    alone = options.usepdb or options.capture == "no" or options.collectonly or os.environ["JAX_PLATFORMS"] != "cpu"
    if options.numprocesses is None and options.dist == "no" and workers > 1 and not alone:
        options.numprocesses, options.dist = workers, "worksteal"


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the core; what is slow is no part of it."""
    for item in items:
        names = CORE.get(item.path.stem, ())
        if any(part in item.name for part in names) and item.get_closest_marker("slow") is None:
            item.add_marker("core")


USERS_CACHE = os.environ.get("QLORA_JAX_CACHE")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, for their subprocesses too: the user's is not for tiny models."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QLORA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["QLORA_JAX_CACHE"])


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """A real model, 135M parameters: from the hub, or by way of its GGUF file where there is none. Cached."""
    from convert.hub import resolve_model  # needs the network's libraries, which tests of the GPU do without

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("QLORA_JAX_CACHE")
        if USERS_CACHE is not None:
            environment.setenv("QLORA_JAX_CACHE", USERS_CACHE)
        return resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with two layers, grouped-query attention and tied embeddings; not to be written to."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")
