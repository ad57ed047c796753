"""Text from a model: prefill once, then one token at a time over a key-value cache, through the same engine and placements as training."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from qlora_jax.base.errors import InputError
from qlora_jax.base.files import describe_size
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.runtime.machine import available_host_bytes

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
    *,
    sampling: Sampling,
    on_token: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """Continue `input_ids` until a stop id, which is not returned, or `max_new_tokens`. `on_token` sees each new one as it comes.

    Raises:
        InputError: there is no memory for so many tokens.
    """
    _require_positions(engine, len(input_ids) + sampling.max_new_tokens)
    length = -(-(len(input_ids) + sampling.max_new_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    _require_room(engine, len(input_ids), length)
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


def _require_positions(engine: Engine, number: int) -> None:
    """Raises InputError: the model's positions are embedded otherwise in texts of so many tokens, which is not supported."""
    longest = engine.config.max_length
    if longest is not None and number > longest:
        found = f"prompt and answer may take {number:,} tokens, and this model's positions are scaled by length beyond {longest:,}"
        fix = "give a shorter prompt, or ask for fewer new tokens (--max-new-tokens, training.sample_max_new_tokens)"
        raise InputError("the prompt", found=found, expected=f"at most {longest:,}", fix=fix)


def _require_room(engine: Engine, prompt: int, length: int) -> None:
    """Raises InputError: the key-value cache of `length` tokens needs more memory than there is, or on a CPU the prompt's scores do."""
    config, device = engine.config, jax.devices()[0]
    values = 2 * config.num_hidden_layers * length * config.num_key_value_heads * config.head_dim
    needed = values * engine.compute_dtype.itemsize
    if device.platform == "cpu":  # whose attention writes [heads, T, length] in float32
        needed += 4 * config.num_attention_heads * prompt * length
    room = (device.memory_stats() or {}).get("bytes_limit") or available_host_bytes()
    if needed > room:
        found = f"{prompt:,} tokens, to be continued to {length:,}: {describe_size(needed)} of memory"
        fix = "give a shorter prompt, or ask for fewer new tokens (--max-new-tokens, training.sample_max_new_tokens)"
        raise InputError("the prompt", found=found, expected=f"at most {describe_size(room)}", fix=fix)


def _draw(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """logits [V] → a token id; sampling by the Gumbel trick."""
    if temperature == 0:
        return int(np.argmax(logits))
    return int(np.argmax(logits / temperature + rng.gumbel(size=logits.shape)))
