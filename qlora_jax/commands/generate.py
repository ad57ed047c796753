"""`python -m qlora_jax generate`: continue a prompt with a model, and an adapter if there is one."""

import argparse
import functools
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from convert.adapters.adapter import as_adapters, load_adapter
from convert.files.prequantized import settle
from convert.hub import cache_dir
from convert.load import load_weights, total_bytes
from convert.model import open_model
from qlora_jax.base.console import byte_bar, make_console
from qlora_jax.config import QuantizationSettings
from qlora_jax.data.chat.templates import TEMPLATE_FILE
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.engine.generation import Sampling, generate
from qlora_jax.model.decoder import default_attention, default_compute_dtype
from qlora_jax.runtime import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", required=True, metavar="ID_OR_DIR", help="the base model: a hub id or a folder")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter in PEFT's format")
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the user's message; plain text for a model without a chat template",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (the default) takes the likeliest token each time",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for temperatures above 0; default: 0")


def run(options: argparse.Namespace) -> None:
    """Print the answer to standard output."""
    console = make_console(stderr=True)
    machine.keep_compiled(cache_dir() / "compiled")
    model = open_model(options.model, log=console.print)
    adapter = load_adapter(options.adapter, model.config) if options.adapter else None
    if (
        options.adapter and (options.adapter / TEMPLATE_FILE).is_file()
    ):  # the one it was trained with, where the model has none
        model.tokenizer.chat_template = (options.adapter / TEMPLATE_FILE).read_text(encoding="utf-8")
    asked = adapter.quantization if adapter else QuantizationSettings()
    fix = "give the model that the adapter was trained on"
    quantization = settle(model.folder, asked, where=options.adapter, fix=fix)
    lora, adapters = as_adapters(adapter, model.config) if adapter else (None, [{}] * model.config.num_hidden_layers)
    dtype = default_compute_dtype()
    engine = Engine(
        model.config, lora, quantization, compute_dtype=dtype, attention=default_attention(dtype, model.config.head_dim)
    )
    with byte_bar(console) as progress:
        task = progress.add_task("loading", total=total_bytes(model.config, quantization, "device"))
        advance = functools.partial(progress.advance, task)
        weights = load_weights(model.folder, model.config, quantization, "device", advance)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    print(answer(engine, weights, adapters, model.tokenizer, options.prompt, sampling))


def answer(
    engine: Engine,
    weights: Weights,
    adapters: Adapters,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
) -> str:
    """The model's answer to a user's message, through its chat template if it has one."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        input_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        input_ids = tokenizer(prompt)["input_ids"]
    tokens = generate(engine, weights, adapters, input_ids, {tokenizer.eos_token_id}, sampling)
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()
