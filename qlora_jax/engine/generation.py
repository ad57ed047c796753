"""Text from a model: prefill once, then one token at a time over a key-value cache, through the same engine and placements as training."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from qlora_jax.engine.engine import Adapters, Engine, Weights

CACHE_MULTIPLE = 64
"""Cache lengths are rounded up to this, so that prompts of similar length share a compilation."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from softmax(logits / temperature)."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


def generate(
    engine: Engine,
    weights: Weights,
    adapters: Adapters,
    input_ids: Sequence[int],
    stop_ids: Collection[int],
    sampling: Sampling,
    on_token: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """Continue `input_ids` until a stop id, which is not returned, or `max_new_tokens`. `on_token` sees each new one as it comes."""
    length = -(-(len(input_ids) + sampling.max_new_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    cache = engine.new_cache(1, length)
    rng = np.random.default_rng(sampling.seed)
    new, tokens = np.asarray([input_ids], np.int32), []
    position = 0
    while len(tokens) < sampling.max_new_tokens:
        logits, cache = engine.decode(weights, adapters, new, position, cache)
        position += new.shape[1]
        token = _draw(jax.device_get(logits)[0], sampling.temperature, rng)
        if token in stop_ids:
            break
        tokens.append(token)
        on_token(token)
        new = np.asarray([[token]], np.int32)
    return tokens


def _draw(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """logits [V] → a token id; sampling by the Gumbel trick."""
    if temperature == 0:
        return int(np.argmax(logits))
    return int(np.argmax(logits / temperature + rng.gumbel(size=logits.shape)))
