"""The decoder layer of every family against transformers' and PEFT's: logits, gradients, packed rows, and generation from a cache."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest

from convert.files.folder import ModelFolder
from convert.load import load_weights, read_config
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Engine, Weights
from qlora_jax.model.architecture import Architecture
from qlora_jax.runtime.placement import one_device
from tests.helpers import families
from tests.helpers.families import CASES, LENGTH

torch = pytest.importorskip("torch")

TOLERANCE = 3e-5
"""Of the largest logit. The largest difference seen is a ninth of it; gelu by erf instead of tanh is four times as far away."""
SEEN = 1e-4
"""What a fact that is wrong moves logits by, at least."""


class Opened(NamedTuple):
    """A tiny model, here and in transformers, both in float32 with weights that bfloat16 holds."""

    theirs: Any
    config: Architecture
    weights: Weights
    ids: np.ndarray
    logits: np.ndarray


def opened(name: str, place: Path) -> Opened:
    model = families.tiny_model(CASES[name])
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            step = 2.0**-6 if name == "nemotron" and "norm" in key else None  # 1 + w is made in bfloat16: see `Norms`
            exact = tensor.bfloat16().float() if step is None else torch.round(tensor / step).clamp(-60, 60) * step
            tensor.copy_(exact)
    model.save_pretrained(place)
    (place / "config.json").write_text(json.dumps({**CASES[name], "architectures": model.config.architectures}))
    folder = ModelFolder(place)
    config = read_config(folder)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(ids), use_cache=False).logits.numpy()
    return Opened(model, config, load_weights(folder, config, None, "device"), ids, logits)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """Open a case once."""
    known: dict[str, Opened] = {}

    def of(name: str) -> Opened:
        if name not in known:
            known[name] = opened(name, tmp_path_factory.mktemp(name))
        return known[name]

    return of


def make_engine(config: Architecture, **options: Any) -> Engine:
    return Engine(config, options.pop("lora", None), QuantizationSettings(), compute_dtype="float32", **options)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def bare(config: Architecture) -> list[dict[str, Any]]:
    return [{}] * config.num_hidden_layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, model: Callable[[str], Opened]) -> None:
    _, config, weights, ids, logits = model(name)
    assert difference(np.asarray(make_engine(config).logits(weights, bare(config), ids)), logits) < TOLERANCE


def of_kinds(config: Architecture, change: Callable[[Any], Any]) -> Architecture:
    return dataclasses.replace(config, kinds=tuple(change(kind) for kind in config.kinds))


def windows(by: int) -> Callable[[Architecture], Architecture]:
    return lambda config: of_kinds(
        config, lambda kind: dataclasses.replace(kind, window=kind.window and kind.window + by)
    )


def ropes(**changes: Any) -> Callable[[Architecture], Architecture]:
    def change(kind: Any) -> Any:
        return kind if kind.rope is None else dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, **changes))

    return lambda config: of_kinds(config, change)


def facts(**changes: Any) -> Callable[[Architecture], Architecture]:
    return lambda config: dataclasses.replace(config, **changes)


MUTATIONS = {
    ("mistral", "a window one larger"): windows(1),
    ("qwen2-window", "a window one smaller"): windows(-1),
    ("smollm3", "rotated everywhere"): lambda config: dataclasses.replace(config, kinds=(config.kinds[0],) * 4),
    ("qwen3-yarn", "cos and sin not scaled"): ropes(scale=1.0),
    ("glm", "halves and not pairs"): ropes(interleaved=False),
    ("phi3-long", "short frequencies"): ropes(long=None),
    ("gemma", "gelu by erf"): facts(activation="gelu"),
    ("gemma", "an embedding that is not scaled"): facts(embed_scale=1.0),
    ("gemma2", "scores without a cap"): facts(attention_softcap=None),
    ("gemma2", "logits without a cap"): facts(logit_softcap=None),
    ("gemma3", "a scale of the head's size"): facts(attention_scale=32**-0.5),
    ("granite", "logits that are not scaled"): facts(logit_scale=1.0),
    ("olmo2", "another eps"): lambda config: dataclasses.replace(
        config, norms=dataclasses.replace(config.norms, eps=1e-2)
    ),
    ("hunyuan", "heads normed before they are rotated"): lambda config: dataclasses.replace(
        config, qk_norm=dataclasses.replace(config.qk_norm, after_rope=False)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MUTATIONS, ids=" ".join)
def test_every_fact_is_seen(case: tuple[str, str], model: Callable[[str], Opened]) -> None:
    """A case that a wrong fact leaves as it is would be too tame to find it."""
    _, config, weights, ids, logits = model(case[0])
    changed = MUTATIONS[case](config)
    assert changed != config
    assert difference(np.asarray(make_engine(changed).logits(weights, bare(config), ids)), logits) > SEEN


GRADIENTS = ("qwen2-window", "gemma2", "phi3", "olmo2", "cohere", "starcoder2")
MORE_GRADIENTS = (
    "llama-bias",
    "qwen3",
    "gemma3",
    "apertus",
    "glm4",
    "granite",
    "smollm3",
    "exaone4",
    "hunyuan",
    "nemotron",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*GRADIENTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_GRADIENTS)])
def test_gradients(name: str, tmp_path: Path) -> None:
    """Those of A and B, recomputed in one layer and saved in the other, the MLP in chunks, are those of torch through PEFT."""
    peft = pytest.importorskip("peft")
    theirs, config, weights, ids, _ = opened(name, tmp_path)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(target_modules="all-linear", **settings))
    lora = LoraSettings(target_modules=list(config.linears), **settings)
    engine = make_engine(config, lora=lora, keep=2, mlp_tokens=30)
    rng = np.random.default_rng(1)
    adapters = engine.init_adapters(0)
    pairs = {}
    for layer in range(config.num_hidden_layers):
        for linear in config.linears.values():
            module = wrapped.get_submodule(f"base_model.model.{config.modules_prefix}.{layer}.{linear.path}")
            for part, theirs_of in (("lora_a", module.lora_A), ("lora_b", module.lora_B)):
                shape = adapters[layer][linear.name]["adapter"][part].shape
                value = 0.1 * rng.standard_normal(shape).astype(np.float32)
                adapters[layer][linear.name]["adapter"][part] = one_device().put(value, "device")
                pairs[layer, linear.name, part] = theirs_of["default"].weight
                with torch.no_grad():
                    pairs[layer, linear.name, part].copy_(torch.tensor(value))
    labels = np.where(np.arange(LENGTH) >= 5, ids, -100)
    loss = wrapped(torch.tensor(ids), labels=torch.tensor(labels).long(), use_cache=False).loss
    loss.backward()
    counted = int((labels[:, 1:] != -100).sum())
    batch = Batch(ids[None], labels[None].astype(np.int32), num_tokens=counted, num_input_tokens=ids.size)
    found, grads = engine.value_and_grad(weights, adapters, batch, None)
    np.testing.assert_allclose(float(found), float(loss), rtol=1e-5)
    for (layer, name, part), theirs_of in pairs.items():
        expected = theirs_of.grad.numpy()
        ours = np.asarray(grads.layers[layer][name]["adapter"][part])
        assert difference(ours, expected) < 1e-4, (layer, name, part)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen3", "cohere2"])
def test_packed_rows_are_each_alone(name: str, model: Callable[[str], Opened]) -> None:
    """Rows laid end to end, longer than a window, see nothing of each other."""
    _, config, weights, ids, _ = model(name)
    engine, cut = make_engine(config), 17
    positions = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)])[None].astype(np.int32)
    segments = np.repeat([0, 1], [cut, LENGTH - cut])[None].astype(np.int32)
    packing = one_device().put((positions, segments), "device")
    *_, packed = engine.hidden_states(weights, bare(config), one_device().put(ids[:1], "device"), packing)
    for part in (slice(0, cut), slice(cut, LENGTH)):
        *_, alone = engine.hidden_states(weights, bare(config), one_device().put(ids[:1, part], "device"))
        assert difference(np.asarray(packed)[:, part], np.asarray(alone)) < TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["qwen2-window", "gemma2", "cohere2", "phi3", "olmo3", "apertus"])
def test_generation_from_a_cache(name: str, model: Callable[[str], Opened]) -> None:
    """A prompt at once, then token after token, gives the logits of the whole row."""
    _, config, weights, ids, logits = model(name)
    engine, prompt = make_engine(config), 25
    cache = engine.new_cache(2, LENGTH)
    for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + 4))]:
        last, cache = engine.decode(weights, bare(config), ids[:, start:end], start, cache)
        assert difference(np.asarray(last), logits[:, end - 1]) < TOLERANCE


NORMS = {"llama": "LlamaRMSNorm", "olmo2": "Olmo2RMSNorm", "gemma3": "Gemma3RMSNorm", "cohere": "CohereLayerNorm"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NORMS)
def test_norms_in_bfloat16(name: str, model: Callable[[str], Opened]) -> None:
    """Bit for bit: multiplied before or after the rounding, and 1 + w."""
    theirs, config, weights, *_ = model(name)
    module = theirs.model.norm
    assert type(module).__name__ == NORMS[name]
    x = 3 * np.random.default_rng(0).standard_normal((50, config.hidden_size)).astype(ml_dtypes.bfloat16)
    with torch.no_grad():
        expected = module.bfloat16()(torch.tensor(x.astype(np.float32)).bfloat16()).float().numpy()
        module.float()
    norm = make_engine(config)._head_def.merge(weights.head).norm
    found = np.asarray(jax.jit(lambda x: norm(x))(x)).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
