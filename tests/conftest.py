"""Fixtures shared by the tests, and strictness: implicit rank promotion is an error."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest

from tests import tiny

jax.config.update("jax_numpy_rank_promotion", "raise")


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
