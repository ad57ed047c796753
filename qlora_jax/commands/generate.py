"""`python -m qlora_jax generate`: continue a prompt with a model, and an adapter if there is one."""

import argparse
import functools

from convert.adapter import as_adapters, load_adapter
from convert.hub import cache_dir
from convert.load import load_weights, total_bytes
from convert.model import open_model
from convert.prequantized import settle
from convert.stops import Conversation, open_conversation
from qlora_jax import machine
from qlora_jax.arguments import number_argument, path_argument, text_argument, whole_argument
from qlora_jax.config import QuantizationSettings
from qlora_jax.data.codec import decode
from qlora_jax.display import byte_bar, make_console
from qlora_jax.engine import Adapters, Engine, Weights
from qlora_jax.generate import Sampling, generate
from qlora_jax.llama import default_attention, default_compute_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--model", required=True, type=text_argument, metavar="ID_OR_DIR", help="the base model: a hub id or a folder"
    )
    parser.add_argument("--adapter", type=path_argument, metavar="DIR", help="an adapter in PEFT's format")
    parser.add_argument(
        "--prompt",
        required=True,
        type=text_argument,
        metavar="TEXT",
        help="the user's message; plain text for a model without a chat template",
    )
    parser.add_argument("--max-new-tokens", type=whole_argument(1), default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--temperature",
        type=number_argument(0),
        default=0.0,
        metavar="T",
        help="0 (the default) takes the likeliest token each time",
    )
    parser.add_argument(
        "--seed", type=whole_argument(0), default=0, metavar="N", help="for temperatures above 0; default: 0"
    )


def run(options: argparse.Namespace) -> None:
    """Print the answer to standard output."""
    console = make_console(stderr=True)
    machine.keep_compiled(cache_dir() / "compiled")
    model = open_model(options.model, log=console.print)
    adapter = load_adapter(options.adapter, model.config) if options.adapter else None
    conversation = open_conversation(model.folder, model.tokenizer, model.config.vocab_size, adapter=options.adapter)
    prompt_ids = conversation.prompt_ids(options.prompt, model.config.vocab_size)
    for name, limit in model.limits.lengths:
        if len(prompt_ids) + options.max_new_tokens > limit:
            console.print(
                f"prompt and answer may take {len(prompt_ids) + options.max_new_tokens:,} tokens, the model {limit:,} ({name})"
            )
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
    print(answer(engine, weights, adapters, conversation, options.prompt, sampling))


def answer(
    engine: Engine,
    weights: Weights,
    adapters: Adapters,
    conversation: Conversation,
    prompt: str,
    sampling: Sampling,
) -> str:
    """The model's answer to a user's message, through its chat template if it has one."""
    input_ids = conversation.prompt_ids(prompt, engine.config.vocab_size)
    tokens = generate(engine, weights, adapters, input_ids, conversation.stop_ids, sampling)
    (text,) = decode(conversation.tokenizer, [tokens], skip_special_tokens=True)
    return text.strip()
