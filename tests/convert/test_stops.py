"""Where a turn ends: one set of stop ids for sampling, `generate`, and every folder that is exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import yaml
from transformers import PreTrainedTokenizerFast

from benchmarks.tokenizer import byte_tokenizer
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.merge import main as merge_main
from convert.model import load_tokenizer, open_model
from convert.quantize import quantize
from convert.stops import generation_config, open_conversation, stop_ids, template_of
from qlora_jax.__main__ import main
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.commands import train
from qlora_jax.config import QuantizationSettings
from qlora_jax.data import ChatTemplate
from qlora_jax.data.chat.templates import NAMED
from tests.convert.test_head import changed
from tests.convert.test_merge import make_adapter
from tests.helpers import tiny
from tests.helpers.tiny import NAMES

END, TURN_END = 258, 257
VOCABULARY = 264
OTHER = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
"""Ends turns with a third token."""


def write_base(folder: Path, **settings: Any) -> Path:
    """A base model as SmolLM2's or Qwen2.5's: EOS is <|endoftext|>, <|im_end|> is a token, there is no chat template."""
    tiny.write_model(folder, eos_token_id=END, pad_token_id=END, tie_word_embeddings=False)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.add_tokens([tokenizers.AddedToken("<|eot|>", special=True)])
    tokenizer.chat_template = settings.pop("chat_template", None)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    generation = settings.pop(
        "generation", {"bos_token_id": 7, "eos_token_id": END, "temperature": 0.6, "do_sample": True}
    )
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def always(folder: Path, token: int) -> Path:
    """The model made to answer one token, whatever it is asked."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NAMES.lm_head][:] = 0
        for layer in range(2):
            tensors[NAMES.linear(layer, "o_proj")][:] = 0
            tensors[NAMES.linear(layer, "down_proj")][:] = 0
        tensors[NAMES.embedding][:] = 1
        tensors[NAMES.final_norm][:] = 1
        tensors[NAMES.lm_head][token] = 1

    return changed(folder, change)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def run_training(base: Path, out: Path, *overrides: str) -> None:
    settings = {
        "model": {"name_or_path": str(base)},
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "data": {
            "path": str(tiny.write_chats(base.parent / "rows.jsonl", 8)),
            "max_seq_length": 64,
            "chat_template": "chatml",
        },
        "training": {
            "output_dir": str(out),
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "sample_prompt": "abc",
            "sample_max_new_tokens": 8,
        },
    }
    (base.parent / "run.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(base.parent / "run.yaml"), *overrides]) == 0


def eos_of(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def transformers_answer(folder: Path, number: int = 12) -> list[int]:
    """What transformers generates from a folder, greedily, as a user would call it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "abc"}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=number, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_base_model_trained_on_chatml_stops_where_its_turns_end(base: Path, tmp_path: Path) -> None:
    """Everywhere: its samples, transformers on merged/, `generate` with adapter/, and `convert.merge`."""
    always(base, TURN_END)
    run_training(base, tmp_path / "out", "training.export_merged=true")
    out = tmp_path / "out"
    assert [json.loads(line)["answer"] for line in (out / "samples.jsonl").read_text().splitlines()] == ["", ""]
    for folder in (out / "adapter", out / "merged"):
        assert eos_of(folder) == [END, TURN_END]
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings | {"eos_token_id": END} == json.loads((base / "generation_config.json").read_text())
        assert (folder / "chat_template.jinja").read_text() == NAMED["chatml"]
    assert transformers_answer(out / "merged") == [TURN_END]
    assert merge_main(["--adapter", str(out / "adapter"), "--out", str(tmp_path / "again")]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
        p.name: p.read_bytes() for p in (out / "merged").iterdir()
    }


@pytest.mark.parametrize("token", [TURN_END, END])
def test_generate_stops_where_the_adapter_s_turns_end(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], token: int
) -> None:
    run_training(base, tmp_path / "out", "training.sample_prompt=[]")
    always(base, token)
    capsys.readouterr()
    arguments = ["--model", str(base), "--adapter", str(tmp_path / "out" / "adapter"), "--prompt", "abc"]
    assert main(["generate", *arguments, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == "\n"


def test_an_adapter_s_own_tokenizer_and_template(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TRL, axolotl and unsloth leave them beside an adapter: used by generate, carried into what is merged."""
    pytest.importorskip("transformers")
    always(base, 259)
    adapter = make_adapter(tmp_path / "adapter", base)
    tokenizer = load_tokenizer(base)
    tokenizer.eos_token, tokenizer.chat_template = "<|eot|>", OTHER
    tokenizer.save_pretrained(adapter)
    assert (
        main(["generate", "--model", str(base), "--adapter", str(adapter), "--prompt", "abc", "--max-new-tokens", "8"])
        == 0
    )
    assert capsys.readouterr().out == "\n"
    assert merge_main(["--adapter", str(adapter), "--out", str(tmp_path / "merged"), "--no-check"]) == 0
    merged = tmp_path / "merged"
    assert eos_of(merged) == [END, 259]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (adapter / name).read_bytes()
    assert transformers_answer(merged) == [259]


def test_a_tokenizer_that_cannot_be_loaded_is_no_hindrance_to_a_merge(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "tokenizer.json").write_text("{}")
    adapter = make_adapter(tmp_path / "adapter", base)
    assert merge_main(["--adapter", str(adapter), "--out", str(tmp_path / "merged"), "--no-check"]) == 0
    assert "where a turn ends is what generation_config.json says" in capsys.readouterr().err
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == (
        base / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("generation", "template", "expected"),
    [
        ({"eos_token_id": END}, None, (END,)),
        ({"eos_token_id": [259, END]}, None, (259, END)),
        ({"eos_token_id": None}, NAMED["chatml"], (END, TURN_END)),
        ({}, OTHER, (END, 259)),
        ({"eos_token_id": [7, 300, -1]}, None, (7, END)),  # without those that have no row
        ({}, "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}", (END,)),  # no token ends a turn
        ({}, NAMED["alpaca"], (END,)),
        (
            {},
            "{% for m in messages %}{% generation %}{{ m.content }}"
            "{{ (m.tool_calls | tojson) ~ '<|eot|>' if m.tool_calls else '<|im_end|>' }}\n{% endgeneration %}"
            "{% endfor %}",
            (END, TURN_END, 259),  # marked, with white space after the end
        ),
        (
            {},
            "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}<|eot|>{% else %}<|im_end|>"
            "{% endif %}\n{% endfor %}",
            (END, TURN_END, 259),  # calls of tools end with another token
        ),
    ],
)
def test_the_set(base: Path, generation: dict[str, Any], template: str | None, expected: tuple[int, ...]) -> None:
    chosen = None if template is None else ChatTemplate(template, "a test's", is_own=False)
    assert stop_ids(generation, load_tokenizer(base), chosen, VOCABULARY) == expected


def test_without_a_generation_config_it_is_config_json_s(base: Path) -> None:
    """As transformers reads them."""
    transformers = pytest.importorskip("transformers")
    (base / "generation_config.json").unlink()
    config = ModelFolder(base).config
    theirs = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(base))
    assert generation_config(base, config)["eos_token_id"] == theirs.eos_token_id == END


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}', '{"eos_token_id": true}']
)
def test_a_damaged_generation_config_is_refused(base: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (base / "generation_config.json").write_text(text)
    assert main(["generate", "--model", str(base), "--prompt", "abc"]) == EXIT_BAD_INPUT
    assert str(base / "generation_config.json") in capsys.readouterr().err


def test_a_damaged_template_beside_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja"):
        template_of(load_tokenizer(base), tmp_path)


# ----------------------------------------------------------------------------------------------------- all chat templates

TOOL_USE = "{% for t in tools %}<tool>{{ t.function.name }}</tool>{% endfor %}" + NAMED["chatml"]


@pytest.mark.parametrize("where", ["files", "tokenizer_config"])
def test_several_templates_are_honoured_and_carried(tmp_path: Path, where: str) -> None:
    """The one called tool_use writes conversations that offer tools, as `apply_chat_template` chooses it."""
    from qlora_jax.config.data import DataSettings
    from qlora_jax.data import Layout, RawRow, choose_template, make_recipe, tokenize

    base = write_base(tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = {"default": NAMED["chatml"], "tool_use": TOOL_USE}
    tokenizer.save_pretrained(base, save_jinja_files=where == "files")
    assert (base / "additional_chat_templates").is_dir() is (where == "files")
    tokenizer = open_model(str(base)).tokenizer
    tools = [
        {
            "type": "function",
            "function": {"name": "look", "description": "x", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template = choose_template("auto", tokenizer, ["chat"], print)
    recipe = make_recipe(tokenizer, Layout("chat"), DataSettings(path="f"), template)
    for given in (None, tools):
        row = {"messages": messages} | ({} if given is None else {"tools": given})
        (example,) = tokenize([RawRow("f:1", row)], recipe)
        text = tokenizer.apply_chat_template(messages, tools=given, tokenize=False)
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert example.input_ids.tolist() == expected
        assert ("<tool>" in tokenizer.decode(expected)) is (given is not None)
    quantize(ModelFolder(base), tmp_path / "4bit", QuantizationSettings())
    assert load_tokenizer(tmp_path / "4bit").chat_template == tokenizer.chat_template


def test_a_conversation_of_the_model_alone(base: Path) -> None:
    folder = ModelFolder(base)
    found = open_conversation(folder, load_tokenizer(base), read_config(folder).vocab_size)
    assert (found.template, found.stop_ids) == (None, (END,))
    assert isinstance(found.tokenizer, PreTrainedTokenizerFast)
    assert found.prompt_ids("ab", VOCABULARY) == found.tokenizer("ab")["input_ids"]
