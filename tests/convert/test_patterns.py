"""Regular expressions of adapters: PEFT's matches, and an end to those that have none."""

import json
import random
import re
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy

from convert.adapters import patterns
from convert.adapters.adapter import WEIGHTS_FILE, load_adapter
from convert.adapters.config import CONFIG_FILE, AdapterConfig, Target
from convert.adapters.patterns import evaluate
from convert.files.names import Target as Key
from qlora_jax.base.errors import InputError
from qlora_jax.model.families import read_architecture
from tests.helpers import tiny
from tests.helpers.tiny import LINEAR_NAMES, NAMES

CONFIG = read_architecture(tiny.hf_config(num_hidden_layers=12, tie_word_embeddings=False))
PLACE = Path("an adapter/adapter_config.json")
UNSLOTH = (
    r"(?:.*?(?:vision|visual|language|text).*?(?:self_attn|attn|mlp|ffn).*?(?:q_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn|mlp|ffn)\.(?:(?:q_proj|v_proj)))"
)
"""What unsloth writes as target_modules."""
ENDLESS = [".?" * 40 + "Z", "(.|.)*Z", r"(\w+\.?)+Z", r"(?:(?:\w|\.)+)+\d\d\dZ", ".*" * 12 + "Z"]


def targets(**settings: Any) -> dict[Key, Target]:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings}
    return AdapterConfig(PLACE, settings).targets(CONFIG)


def pefts_targets(**settings: Any) -> dict[Key, Target]:
    """By PEFT's own functions."""
    tuners, other = pytest.importorskip("peft.tuners.tuners_utils"), pytest.importorskip("peft.utils.other")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings})
    keys = [(layer, name) for layer in range(CONFIG.num_hidden_layers) for name in LINEAR_NAMES]
    found = {}
    for key in [*keys, *((None, name) for name in NAMES.vocabulary)]:
        path = NAMES.target(*key).removesuffix(".weight")
        if tuners.check_target_module_exists(config, path) not in (True, False, None) and not isinstance(
            tuners.check_target_module_exists(config, path), re.Match
        ):
            continue  # excluded
        if tuners.check_target_module_exists(config, path):
            rank = config.rank_pattern.get(other.get_pattern_key(config.rank_pattern.keys(), path), config.r)
            alpha = config.alpha_pattern.get(
                other.get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha
            )
            found[key] = Target(rank, alpha / rank)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": UNSLOTH},
        {"target_modules": r"model\.layers\.(?!1\.).*\.(?:[qkvo]_proj|up_proj)"},
        {"target_modules": r"(?i).*Q_PROJ|lm_head"},
        {"target_modules": ["q_proj", "mlp.up_proj", "embed_tokens"], "exclude_modules": r".*\.1\d?\..*"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "k_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1, "layers_pattern": ["h", "lay.*"]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [], "layers_pattern": "h"},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": [r"layers\.[0-3]", "mlp"]},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {r"layers\.(1|2)\..*(q|k)_proj": 2, "1.self_attn.q_proj": 7, r"^model.*k_proj": 3},
            "alpha_pattern": {r"(?:.*\.)?1\d\.self_attn\.[qv]_proj": 5.5, "self_attn.q_proj": 64},
        },
    ],
    ids=str,
)
def test_pefts_targets(settings: dict[str, Any]) -> None:
    found = targets(**settings)
    assert found == pefts_targets(**settings) and found


def test_unsloths_expression_is_what_it_says() -> None:
    assert {name for _, name in targets(target_modules=UNSLOTH)} == {"q_proj", "v_proj"}
    assert len(targets(target_modules=UNSLOTH)) == 2 * CONFIG.num_hidden_layers


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "CPU_SECONDS", 1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("expression", ENDLESS)
def test_an_expression_without_end(expression: str) -> None:
    with pytest.raises(InputError) as caught:
        targets(target_modules=expression)
    assert caught.value.where == str(PLACE)
    assert f"target_modules holds {expression!r}" in str(caught.value) and "takes more than 1 s" in str(caught.value)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "setting", ["exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"]
)
def test_wherever_it_stands(setting: str) -> None:
    """And the one expression of many is named."""
    value: Any = ENDLESS[0] if setting == "exclude_modules" else ["mlp", ENDLESS[0]]
    value = dict.fromkeys(value, 2) if setting in ("rank_pattern", "alpha_pattern") else value
    with pytest.raises(InputError) as caught:
        targets(**{setting: value, "layers_to_transform": [99]})
    assert caught.value.found.startswith(f"{setting} holds {ENDLESS[0]!r}")


@pytest.mark.usefixtures("impatient")
def test_a_million_expressions() -> None:
    with pytest.raises(InputError, match=r"rank_pattern holds '.*': matching it, number \d+ of 1,000,000,"):
        targets(rank_pattern={f"a{number}.*b": 1 for number in range(10**6)})


def test_an_expression_that_takes_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MEMORY_BYTES", 64 * 2**20)
    with pytest.raises(InputError, match="takes more than 64 MiB"):
        targets(
            target_modules="|".join(
                f"[{chr(0x4E00 + number)}-{chr(0x4E10 + number)}]{number}*" for number in range(60_000)
            )
        )


def test_what_is_no_expression() -> None:
    """All at once, in PEFT's wrapping: there it has to be one."""
    with pytest.raises(InputError) as caught:
        targets(target_modules="(", rank_pattern={"[": 1, "q_proj.*": 2}, alpha_pattern={"(?i)q": 1, "*": 1})
    for text in (
        "target_modules: '(' is not",
        "rank_pattern: '[' is not",
        "alpha_pattern: '(?i)q' is not",
        "'*' is not",
    ):
        assert text in caught.value.found


def test_a_child_that_dies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_ask_child", lambda rules, paths: ([], -9))
    with pytest.raises(InputError, match=r"rank_pattern holds 'a\.\*'"):
        evaluate(PLACE, {"target_modules": ("whole", []), "rank_pattern": ("ending", ["a.*"])}, ["a"])


PIECES = [
    "q_proj",
    "self_attn",
    "layers",
    "model",
    r"\.",
    ".",
    "*",
    "?",
    "+",
    "{1,3}",
    "|",
    "(",
    ")",
    "(?:",
    "[qk]",
    r"\d",
    "^",
    "$",
]


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_any_expression_is_pefts_or_is_refused(expression: str) -> None:
    try:
        found = targets(target_modules=expression)
    except InputError as error:
        assert "is not a regular expression" in str(error) or "takes more than" in str(error)
        with pytest.raises(re.error):
            re.compile(expression)
        return
    assert found == pefts_targets(target_modules=expression)


# Settings of other types and sizes than PEFT writes


NASTY: list[Any] = [
    None, True, False, 0, -1, 3, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "\0", "\ud800", "a" * 100_000, ["q_proj"],
    [["q_proj"]], [{"q_proj": 1}], {"q_proj": {"q_proj": 1}}, {"": 1}, {"q_proj": float("nan")}, {"embed_tokens": [1, "2"]},
    {"embed_tokens": {"a": 1}}, [None], [True], [1, 2, 10**30], [-1], "(a+)+$", "[", {"[": 1}, [""], {"embed_tokens": [2**40]},
]  # fmt: skip
KEYS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "init_lora_weights", "bias", "velora_config", "layer_replication", "a_setting_of_tomorrow",
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    pairs = {}
    for layer in range(CONFIG.num_hidden_layers):
        pairs[NAMES.adapter(layer, "q_proj", "lora_a")] = np.zeros((4, CONFIG.hidden_size), np.float32)
        pairs[NAMES.adapter(layer, "q_proj", "lora_b")] = np.zeros((64, 4), np.float32)
    safetensors.numpy.save_file(pairs, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("seed", range(8))
def test_settings_of_any_kind(adapter: Path, seed: int) -> None:
    """An adapter, or one message of no length beyond reason."""
    choose = random.Random(seed)
    for _ in range(60):
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        settings |= {choose.choice(KEYS): choose.choice(NASTY) for _ in range(choose.randint(1, 2))}
        (adapter / CONFIG_FILE).write_text(json.dumps(settings))
        try:
            load_adapter(adapter, CONFIG)
        except InputError as error:
            assert len(str(error)) < 20_000
            str(error).encode()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "value",
    [
        {"rank_pattern": {f"q_proj{number}": 1 for number in range(10**6)}},
        {"target_modules": [f"q_proj{number}" for number in range(10**6)] + ["q_proj"]},
        {"modules_to_save": [f"x{number}x" for number in range(10**5)]},
        {"layers_to_transform": list(range(10**6))},
        {"trainable_token_indices": list(range(10**6))},
        {f"key {number}": 1 for number in range(10**6)},
    ],
    ids=["patterns", "targets", "saved", "layers", "tokens", "keys"],
)
def test_settings_of_any_size(adapter: Path, value: dict[str, Any]) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **value}
    (adapter / CONFIG_FILE).write_text(json.dumps(settings))
    try:
        load_adapter(adapter, CONFIG)
    except InputError as error:
        assert len(str(error)) < 20_000


@pytest.mark.parametrize("depth", [50, 480, 900, 2000, 100_000])
@pytest.mark.parametrize("key", ["rank_pattern", "target_modules", "a_setting_of_tomorrow", "base_model_name_or_path"])
def test_settings_of_any_depth(adapter: Path, depth: int, key: str) -> None:
    text = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    (adapter / CONFIG_FILE).write_text(f'{text[:-1]}, "{key}": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(InputError) as caught:
        load_adapter(adapter, CONFIG)
    assert len(str(caught.value)) < 20_000
