"""`python -m qlora_jax generate`: continue a prompt with a model, and an adapter if there is one."""

import argparse
import functools

from rich.console import Console

from convert.adapters.adapter import Adapter, as_adapters, load_adapter
from convert.adapters.quantization import base_remark, needed_base
from convert.files.prequantized import settle
from convert.hub import cache_dir
from convert.jobs.requantize import check_requantize
from convert.load import frozen_bytes, load_weights, total_bytes
from convert.model import BaseModel, open_model
from convert.stops import Conversation, open_conversation
from qlora_jax.base.console import byte_bar, make_console
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import describe_size
from qlora_jax.config import QuantizationSettings
from qlora_jax.config.arguments import number_argument, path_argument, text_argument, whole_argument
from qlora_jax.data.chat.codec import decode
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.engine.generation import Sampling, generate
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.attention import default_attention
from qlora_jax.model.decoder import default_compute_dtype
from qlora_jax.ops import nf4
from qlora_jax.runtime import machine
from qlora_jax.runtime.machine import device_kind
from qlora_jax.runtime.placement import SLOTS, LayerPlace, spread

SPARE_BYTES = 2**31
"""Of a GPU, left for the key-value cache, a layer's own arrays and the adapters."""


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
    parser.add_argument(
        "--quantize",
        choices=tuple(nf4.CODEBOOKS),
        help="run an unquantized model in 4 bits, with double quantization unless the adapter was trained without it; default: as it is, "
        "in bfloat16",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="with --quantize: take a model that an adapter was merged into after quantization, though this undoes most of its update",
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
    model = open_model(options.model, log=console.print)
    adapter = load_adapter(options.adapter, model.config, model.folder) if options.adapter else None
    conversation = open_conversation(model.folder, model.tokenizer, model.config.vocab_size, adapter=options.adapter)
    prompt_ids = conversation.prompt_ids(options.prompt, model.config.vocab_size)
    for name, limit in model.limits.lengths:
        if len(prompt_ids) + options.max_new_tokens > limit:
            console.print(
                f"prompt and answer may take {len(prompt_ids) + options.max_new_tokens:,} tokens, the model {limit:,} ({name})"
            )
    quantization = choose_quantization(options, model, adapter, console)
    places = choose_places(model.config, quantization)
    lora, adapters = as_adapters(adapter, model.config) if adapter else (None, [{}] * model.config.num_hidden_layers)
    dtype = default_compute_dtype()
    attention = default_attention(dtype, model.config.head_dim)
    engine = Engine(
        model.config, lora, quantization or QuantizationSettings(), compute_dtype=dtype, attention=attention
    )
    form = "bfloat16, as it is" if quantization is None else quantization.quant_type
    console.print(f"{model.folder.path}: in {form}, computed in {dtype} on {device_kind()}")
    with byte_bar(console) as progress:
        task = progress.add_task("loading", total=total_bytes(model.config, quantization, "device"))
        advance = functools.partial(progress.advance, task)
        weights = load_weights(model.folder, model.config, quantization, places, advance)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    print(answer(engine, weights, adapters, conversation, options.prompt, sampling))


def choose_quantization(
    options: argparse.Namespace, model: BaseModel, adapter: Adapter | None, console: Console
) -> QuantizationSettings | None:
    """Return what the linears are to be in: a 4-bit folder's own type, what --quantize asks for, or None for bfloat16.

    Raises:
        InputError: a 4-bit folder is in something else than --quantize or the adapter says; or quantizing would undo a merge.
    """
    own = adapter.quantization if adapter else QuantizationSettings()
    if options.quantize is None and not model.folder.is_4bit:
        if "quant_type" in own.model_fields_set:
            console.print(
                f"the adapter was trained on this model in {own.quant_type}: --quantize {own.quant_type} runs it so"
            )
        return None
    if adapter and (remark := base_remark(adapter.stated, model.folder, options.model)):
        console.print(remark)
    where, fix = options.adapter, needed_base(own)
    if options.quantize is not None:
        own = own.model_copy(update={"quant_type": options.quantize})
        where, fix = f"--quantize {options.quantize}", "leave it out, or give the unquantized model"
    quantization = settle(model.folder, own, where=where, fix=fix)
    check_requantize(model.folder, quantization, accepted=options.requantize, accept="--requantize", log=console.print)
    return quantization


def choose_places(config: Architecture, quantization: QuantizationSettings | None) -> list[LayerPlace]:
    """Return where each layer lives, on the device as far as there is room; XLA's backend gets the memory that this takes.

    Raises:
        InputError: the model does not fit the machine's memory.
    """
    depth, layer, gpu = config.num_hidden_layers, frozen_bytes(config, quantization), machine.find_gpu()
    vocabulary, host = total_bytes(config, quantization, "disk"), machine.available_host_bytes()
    resident, cache = depth, cache_dir() / "compiled"
    if gpu is None:
        machine.prepare(None, None, 0, cache)
    else:
        usable = machine.usable_bytes(gpu, None)
        room = usable - vocabulary - SPARE_BYTES
        if depth * layer > room:
            resident = max(0, room // layer - SLOTS)
        machine.prepare(gpu, usable, (depth - resident) * layer, cache)
    needed = (depth - resident) * layer if gpu else depth * layer + vocabulary
    if needed > host or (gpu and room < SLOTS * layer):
        form = "bfloat16" if quantization is None else quantization.quant_type
        raise InputError(
            "python -m qlora_jax generate",
            found=f"a model of {describe_size(depth * layer + vocabulary)} in {form}, and memory of {describe_size(host)}",
            fix="run it in 4 bits with --quantize nf4, or on a larger machine"
            if quantization is None
            else "use a larger machine",
        )
    return spread(resident, depth)


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
    tokens = generate(engine, weights, adapters, input_ids, conversation.stop_ids, sampling=sampling)
    (text,) = decode(conversation.tokenizer, [tokens], skip_special_tokens=True)
    return text.strip()
