"""Generation over a key-value cache: the same tokens as without one, as transformers, and wherever the weights live."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.adapters.adapter import save_adapter
from convert.files.folder import ModelFolder
from convert.load import frozen_bytes, load_weights, read_config, total_bytes
from convert.model import open_model
from convert.quantize import quantize
from qlora_jax.__main__ import main
from qlora_jax.base import bounded
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.commands import generate as command
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.engine import generation
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.engine.generation import Sampling, generate
from qlora_jax.runtime import machine
from tests.convert.test_merge import make_adapter
from tests.helpers import tiny
from tests.model.test_llama import transformers_model

PROMPT = [5, 17, 200, 33, 8]
NEW_TOKENS = 12
NO_STOP: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied: a random tied model mostly repeats its input."""
    return tiny.write_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[Engine, Weights, Adapters]:
    """An engine with adapters that matter: B is not zero."""
    opened, quantization = ModelFolder(folder), QuantizationSettings()
    config = read_config(opened)
    engine = Engine(config, LoraSettings(r=4), quantization, compute_dtype=jnp.float32)
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), engine.init_adapters(0)
    )
    return engine, load_weights(opened, config, quantization, "device"), adapters


def greedy(model: tuple[Engine, Weights, Adapters], prompt: list[int] = PROMPT, number: int = NEW_TOKENS) -> list[int]:
    return generate(*model, prompt, NO_STOP, sampling=Sampling(max_new_tokens=number))


def test_the_cache_gives_what_full_recomputation_gives(model: tuple[Engine, Weights, Adapters]) -> None:
    engine, weights, adapters = model
    for prompt in (PROMPT, [9]):
        padded = np.zeros((1, 32), np.int32)  # what comes later changes no earlier logit, and one length compiles once
        padded[0, : len(prompt)] = prompt
        expected = []
        for position in range(len(prompt), len(prompt) + NEW_TOKENS):
            logits = np.asarray(engine.logits(weights, adapters, padded))[0, position - 1]
            expected.append(int(logits.argmax()))
            padded[0, position] = expected[-1]
        assert greedy(model, prompt) == expected
        assert len(set(expected)) > 4  # no rut that any model would fall into


def test_each_step_s_logits_equal_recomputation(model: tuple[Engine, Weights, Adapters]) -> None:
    """Also where no greedy token shows it: prefill in two parts, then one token at a time."""
    engine, weights, adapters = model
    tokens = np.random.default_rng(0).integers(0, 264, (1, 32)).astype(np.int32)
    whole = np.asarray(engine.logits(weights, adapters, tokens))
    cache, start = engine.new_cache(1, generation.CACHE_MULTIPLE), 0
    for end in (5, 10, 11, 12):
        logits, cache = engine.decode(weights, adapters, tokens[:, start:end], start, cache)
        float32_sums = 1e-5  # of the largest logit: the same products, summed in another order
        assert np.abs(np.asarray(logits) - whole[:, end - 1]).max() <= float32_sums * np.abs(whole).max()
        start = end


def test_adapters_take_part(model: tuple[Engine, Weights, Adapters]) -> None:
    engine, weights, _ = model
    assert greedy((engine, weights, engine.init_adapters(0))) != greedy(model)


def test_greedy_equals_transformers(folder: Path, model: tuple[Engine, Weights, Adapters]) -> None:
    torch = pytest.importorskip("torch")
    engine, weights, _ = model
    reference = transformers_model(folder, weights)
    reference.generation_config.eos_token_id = None
    output = reference.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=24, do_sample=False
    )
    fresh = engine.init_adapters(0)
    assert greedy((engine, weights, fresh), number=24) == output[0, len(PROMPT) :].tolist()


def test_a_stop_id_ends_and_is_not_returned(model: tuple[Engine, Weights, Adapters]) -> None:
    unstopped = greedy(model)
    stop = next(token for token in unstopped[3:] if token not in unstopped[:3])
    end = unstopped.index(stop)
    seen: list[int] = []
    tokens = generate(*model, PROMPT, {stop, 263}, sampling=Sampling(max_new_tokens=NEW_TOKENS), on_token=seen.append)
    assert tokens == seen == unstopped[:end]
    assert generate(*model, PROMPT, {unstopped[0]}, sampling=Sampling(max_new_tokens=NEW_TOKENS)) == []


@pytest.mark.parametrize("number", [0, 1, NEW_TOKENS])
def test_max_new_tokens(model: tuple[Engine, Weights, Adapters], number: int) -> None:
    assert greedy(model, number=number) == greedy(model)[:number]


@pytest.mark.parametrize("multiple", [17, 256])
def test_the_cache_s_length_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, model: tuple[Engine, Weights, Adapters], multiple: int
) -> None:
    """17 is just what the prompt and its continuation need."""
    expected = greedy(model)
    lengths = []
    new_cache = model[0].new_cache
    monkeypatch.setattr(model[0], "new_cache", lambda b, length: lengths.append(length) or new_cache(b, length))
    monkeypatch.setattr(generation, "CACHE_MULTIPLE", multiple)
    assert greedy(model) == expected
    assert lengths == [256 if multiple == 256 else len(PROMPT) + NEW_TOKENS]


def test_streamed_weights_give_the_same_tokens(folder: Path, model: tuple[Engine, Weights, Adapters]) -> None:
    engine, _, adapters = model
    streamed = load_weights(ModelFolder(folder), engine.config, QuantizationSettings(), "host")
    assert greedy((engine, streamed, adapters)) == greedy(model)
    assert list(streamed.layers.fetched)[:4] == [0, 1, 0, 1]  # every token's walk fetched every layer


# -------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_is_reproducible_by_seed(model: tuple[Engine, Weights, Adapters]) -> None:
    def sample(seed: int) -> list[int]:
        return generate(
            *model, PROMPT, NO_STOP, sampling=Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=seed)
        )

    assert sample(0) == sample(0)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4
    assert greedy(model) not in [sample(seed) for seed in range(4)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits, number, sigmas = np.array([0.0, 1.0, -1.0, 2.0], np.float32), 20_000, 5
    rng = np.random.default_rng(0)
    frequencies = np.bincount([generation._draw(logits, temperature, rng) for _ in range(number)], minlength=4) / number
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert (np.abs(frequencies - expected) < sigmas * np.sqrt(expected * (1 - expected) / number)).all()


def test_temperature_0_is_greedy() -> None:
    rng: Any = None  # nothing is drawn
    assert generation._draw(np.array([0.0, 3.0, 1.0]), 0.0, rng) == 1


# ------------------------------------------------------------------------------------------------------------- the command


def test_a_model_in_4_bits_gives_the_same_answer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(ModelFolder(folder), tmp_path / "4bit", QuantizationSettings())
    answers = []
    for path, more in ((folder, ["--quantize", "nf4"]), (tmp_path / "4bit", [])):
        assert main(["generate", "--model", str(path), "--prompt", "abc", "--max-new-tokens", "8", *more]) == 0
        captured = capsys.readouterr()
        assert f"{path}: in nf4, computed in float32" in captured.err.replace("\n", "")
        answers.append(captured.out)
    assert answers[0] == answers[1]
    assert answers[0].strip()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_an_unquantized_model_answers_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], with_adapter: bool
) -> None:
    """As transformers and PEFT do, from a model whose answer in 4 bits is another."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = tiny.write_model(tmp_path / "model", tie_word_embeddings=False)
    model, arguments = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    if with_adapter:
        adapter = make_adapter(tmp_path / "adapter", folder)
        model, arguments = peft.PeftModel.from_pretrained(model, adapter), ["--adapter", str(adapter)]
    tokenizer = open_model(str(folder)).tokenizer
    chat = [{"role": "user", "content": "abc"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    input_ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = model.generate(
        input_ids=input_ids, max_new_tokens=8, do_sample=False, eos_token_id=257, pad_token_id=257
    )
    said = tokenizer.decode(expected[0, input_ids.shape[1] :], skip_special_tokens=True).strip()
    arguments += ["--model", str(folder), "--prompt", "abc", "--max-new-tokens", "8"]
    answers = {}
    for more in ([], ["--quantize", "nf4"]):
        assert main(["generate", *arguments, *more]) == 0
        captured = capsys.readouterr()
        answers[tuple(more)] = captured.out.strip()
        form = "nf4" if more else "bfloat16, as it is"
        assert f"{folder}: in {form}, computed in float32" in captured.err.replace("\n", "")
        assert ("--quantize nf4 runs it so" in captured.err) == (with_adapter and not more)
    assert answers[()] == said
    assert answers["--quantize", "nf4"] != said


def test_a_model_larger_than_memory_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 2**16)
    assert main(["generate", "--model", str(folder), "--prompt", "abc"]) == EXIT_BAD_INPUT
    assert "--quantize nf4" in capsys.readouterr().err


def test_an_adapter_of_another_quantization_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(ModelFolder(folder), tmp_path / "4bit", QuantizationSettings(quant_type="fp4"))
    config, lora = read_config(ModelFolder(folder)), LoraSettings(r=4)
    engine = Engine(config, lora, QuantizationSettings(), compute_dtype=jnp.float32)
    save_adapter(
        tmp_path / "adapter", engine.init_adapters(0), lora, QuantizationSettings(), str(folder), architecture=config
    )
    arguments = ["--model", str(tmp_path / "4bit"), "--adapter", str(tmp_path / "adapter"), "--prompt", "abc"]
    assert main(["generate", *arguments]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'adapter'}\n")
    assert 'quant_type "nf4"' in error and 'quant_type "fp4"' in error


def test_tokens_without_end_are_refused_before_there_is_memory_for_them(
    model: tuple[Engine, Weights, Adapters],
) -> None:
    with pytest.raises(InputError, match="of memory"):
        generate(*model, PROMPT, NO_STOP, sampling=Sampling(max_new_tokens=10**12))
    with pytest.raises(InputError, match="of memory"):
        generate(*model, [1] * 2**20, NO_STOP, sampling=Sampling(max_new_tokens=1))


@pytest.mark.parametrize(("option", "value"), [("--seed", "-1"), ("--max-new-tokens", "1e12"), ("--max-new-tokens", str(10**12)),
    ("--temperature", "nan"), ("--temperature", "-1"), ("--prompt", "\udcff"), ("--model", ""),
    ("--adapter", "~nobody-at-all/x")])  # fmt: skip
def test_arguments_that_are_none(folder: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"--model": str(folder), "--prompt": "hi", option: value}
    try:
        status = main(["generate", *[part for pair in arguments.items() for part in pair]])
    except SystemExit as leaving:  # argparse's
        status = leaving.code
    assert status == EXIT_BAD_INPUT
    assert "error:" in capsys.readouterr().err


NEVER_ENDS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "found"), [
    (NEVER_ENDS, "did not end within"),
    ("{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "memory"),
    ("{{ raise_exception('no') }}", "no"),
    ("{{ messages.pop() }}", "it cannot write a prompt: SecurityError"),
    ("{% if %}", "TemplateSyntaxError"),
    ("", "no token to begin with"),
])  # fmt: skip
def test_a_template_that_is_none(
    folder: Path,
    tmp_path: Path,
    template: str,
    found: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded, "LIMITS", bounded.Limits(seconds=3, memory=2**29))
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template or "{{ '' }}")
    assert main(["generate", "--model", str(tmp_path / "model"), "--prompt", "hi"]) == EXIT_BAD_INPUT
    assert found in capsys.readouterr().err


@pytest.mark.parametrize("value", [7, ["x"], [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]], ids=str)
def test_a_template_that_is_no_text(
    folder: Path, tmp_path: Path, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))
    assert main(["generate", "--model", str(tmp_path / "model"), "--prompt", "hi"]) == EXIT_BAD_INPUT
    assert "error:" in capsys.readouterr().err


def test_layers_without_room_on_the_device_are_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And XLA gets the memory that this takes; what fits nowhere is refused."""
    config, asked = read_config(ModelFolder(folder)), []
    layer, vocabulary = frozen_bytes(config, None), total_bytes(config, None, "disk")
    monkeypatch.setattr(machine, "prepare", lambda gpu, device, pinned, cache: asked.append((device, pinned)))
    monkeypatch.setattr(command, "SLOTS", 0)

    def places(room: float) -> list[str]:
        """`room`, in layers, beside all that is not a layer."""
        free = int(room * layer) + vocabulary + command.SPARE_BYTES + machine.CONTEXT_BYTES
        monkeypatch.setattr(machine, "find_gpu", lambda: machine.Gpu("made up", free, free))
        return command.choose_places(config, None)

    assert places(2.5) == ["device", "device"]
    assert sorted(places(1.5)) == ["device", "host"]
    assert places(0.5) == ["host", "host"]
    assert [pinned for _, pinned in asked] == [0, layer, 2 * layer]
    with pytest.raises(InputError, match="--quantize nf4"):
        places(-0.5)
