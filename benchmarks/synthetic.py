"""A model folder of a Llama's shape with random 4-bit weights, for runs whose speed and memory matter and whose answers do not.

    python -m benchmarks.synthetic --shape 70b --out DIR        # 37 GB, a layer a file
    python train.py --config FILE model.name_or_path=DIR

In bitsandbytes' layout, as `convert.quantize` writes it, with a byte-level tokenizer. Written layer by layer, so that any size needs the
memory of one; the index comes last, and a folder without it is not a model's.
"""

import argparse
import concurrent.futures
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.step import SHAPES, shape_name
from benchmarks.tokenizer import byte_tokenizer
from convert.files import bitsandbytes
from convert.files.names import Names
from convert.files.shards import TensorSpec, write_index, write_json, write_shard
from qlora_jax.base.console import byte_bar, make_console
from qlora_jax.base.errors import InputError, exit_status
from qlora_jax.config import QuantizationSettings
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.families import read_architecture
from qlora_jax.ops import nf4

QUANTIZATION = QuantizationSettings()
WRITERS = 4
"""Files written at a time, each from memory of its own."""
DEVIATION = 0.02
"""Of the weights; embedding and head exactly, the linears about."""


def hf_config(shape: str, layers: int | None, vocab_size: int = 32000) -> dict[str, Any]:
    """`config.json` of a shape, without its quantization."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPES[shape],
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": 257,
        "dtype": "bfloat16",
    }
    return config if layers is None else {**config, "num_hidden_layers": layers}


def random_linear(shape: tuple[int, int], rng: np.random.Generator) -> nf4.QuantizedTensor:
    """Any codes, with scales that make weights of ordinary size; numpy arrays."""
    size = shape[0] * shape[1]
    blocks = -(-size // nf4.BLOCK_SIZE)
    return nf4.QuantizedTensor(
        codes=np.frombuffer(rng.bytes(-(-size // 2)), np.uint8),
        absmax=np.frombuffer(rng.bytes(blocks), np.uint8),
        nested_absmax=np.full(-(-blocks // nf4.ABSMAX_BLOCK_SIZE), DEVIATION / 2, np.float32),
        nested_offset=np.float32(2 * DEVIATION),
        shape=shape,
    )


def layer_tensors(config: Architecture, layer: int) -> Iterator[tuple[list[TensorSpec], list[np.ndarray]]]:
    """One decoder layer, a weight at a time: its tensors' specs and data."""
    rng, names = np.random.default_rng(layer), Names.of(config)
    for name in names.norms:
        ones = np.ones(config.hidden_size, ml_dtypes.bfloat16)
        yield [TensorSpec(names.norm(layer, name), "BF16", ones.shape)], [ones]
    shapes = config.linear_shapes()
    for name in shapes:
        tensor = names.linear(layer, name)
        specs = bitsandbytes.specs(tensor, shapes[name], QUANTIZATION)
        yield specs, bitsandbytes.tensors(tensor, random_linear(shapes[name], rng))


def vocabulary_tensors(config: Architecture) -> Iterator[tuple[list[TensorSpec], list[np.ndarray]]]:
    """Embedding, final norm and head."""
    rng, names = np.random.default_rng(config.num_hidden_layers), Names.of(config)
    shape = (config.vocab_size, config.hidden_size)
    for name in (names.embedding, names.lm_head):
        values = (DEVIATION * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
        yield [TensorSpec(name, "BF16", shape)], [values]
    ones = np.ones(config.hidden_size, ml_dtypes.bfloat16)
    yield [TensorSpec(names.final_norm, "BF16", ones.shape)], [ones]


def write(
    out: Path, settings: dict[str, Any], advance: Any = lambda nbytes: None, *, distinct: int | None = None
) -> None:
    """Write the folder, several files at a time; `advance` is called with the bytes of each file.

    Args:
        distinct: layers from this number on are the first ones again, which saves making them: 70B then takes as long as the disk does.

    Raises:
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(out, found="something there already", fix="name a new folder, or remove this one")
    out.mkdir(parents=True)
    config = read_architecture(settings)
    depth = config.num_hidden_layers
    first = [list(layer_tensors(config, layer)) for layer in range(min(distinct or 0, depth))]

    def write_part(number: int) -> tuple[str, list[TensorSpec]]:
        shard = f"model-{number + 1:05d}-of-{depth + 1:05d}.safetensors"
        if number == depth:
            made = list(vocabulary_tensors(config))
        else:
            made = _renamed(first[number % len(first)], number) if first else list(layer_tensors(config, number))
        specs = [spec for some, _ in made for spec in some]
        write_shard(out / shard, specs, (array for _, arrays in made for array in arrays))
        return shard, specs

    total, weight_map = 0, {}
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as writers:
        for shard, specs in writers.map(write_part, range(depth + 1)):
            weight_map |= {spec.name: shard for spec in specs}
            size = sum(spec.nbytes for spec in specs)
            total += size
            advance(size)
    byte_tokenizer().save_pretrained(out)
    write_json(out / "generation_config.json", {"eos_token_id": settings["eos_token_id"]})
    write_json(
        out / "config.json",
        {**settings, "quantization_config": bitsandbytes.quantization_config(QUANTIZATION)},
    )
    write_index(out, weight_map, total)


def _renamed(
    made: list[tuple[list[TensorSpec], list[np.ndarray]]], layer: int
) -> list[tuple[list[TensorSpec], list[np.ndarray]]]:
    """Return another layer's tensors as this layer's."""

    def rename(spec: TensorSpec) -> TensorSpec:
        return dataclasses.replace(spec, name=re.sub(r"layers\.\d+\.", f"layers.{layer}.", spec.name))

    return [([rename(spec) for spec in specs], arrays) for specs, arrays in made]


def expected_bytes(config: Architecture) -> int:
    """What `write` will come to, but for the norms."""
    linears = [
        spec for name, shape in config.linear_shapes().items() for spec in bitsandbytes.specs(name, shape, QUANTIZATION)
    ]
    vocabulary = 2 * 2 * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * sum(spec.nbytes for spec in linears) + vocabulary


@exit_status
def main() -> None:
    """Parse, write, say how large it came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", type=shape_name, required=True, choices=sorted(SHAPES), help="a Llama's shape")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder; must not exist")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the shape has")
    options = parser.parse_args()
    console = make_console(stderr=True)
    settings, written = hf_config(options.shape, options.layers), 0
    with byte_bar(console) as progress:
        task = progress.add_task("writing", total=expected_bytes(read_architecture(settings)))

        def advance(nbytes: int) -> None:
            nonlocal written
            written += nbytes
            progress.advance(task, nbytes)

        write(options.out, settings, advance)
    console.print(f"{written / 1e9:.2f} GB of random 4-bit weights: {options.out}")


if __name__ == "__main__":
    sys.exit(main())
