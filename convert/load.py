"""Reads a Hugging Face model folder into the engine's trees: each linear quantized on the way, or as it is if it is in 4 bits already."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from convert.files import bitsandbytes, head, int8, prequantized
from convert.files.ahead import in_order
from convert.files.folder import ModelFolder, some
from convert.files.names import Names
from convert.files.pieces import on_device, quantized, read_bfloat16
from convert.files.shapes import mismatch, tensor_shapes, vector_shapes
from convert.files.shards import FLOATS
from convert.files.stated import names_of, stated_architecture
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.engine.engine import Weights
from qlora_jax.engine.layer_program import layer_bytes
from qlora_jax.model.architecture import Architecture, Norms
from qlora_jax.model.linear import Weight
from qlora_jax.runtime import pinned
from qlora_jax.runtime.placement import LayerPlace, LayerStore, Source, Tree, Where, nbytes, one_device

Advance = Callable[[int], object]
BFLOAT16_BYTES = 2


def read_config(folder: ModelFolder) -> Architecture:
    """The folder's model shape; every tensor it calls for is there with that shape and in floats, and no other is.

    A head that is stored although `config.json` says that it is the embedding makes the two different: see `convert.files.head`.

    Raises:
        InputError: the config is not supported, or tensors are missing, unknown, of another shape or no floats (all
            named at once).
    """
    config = stated_architecture(folder)
    names = names_of(folder)
    if head.has_own_head(folder):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    wanted = tensor_shapes(config)
    linears = {name: shape for name, shape in wanted.items() if names.parse_linear(name) is not None}
    companions = {name: weight for name in folder.names if (weight := bitsandbytes.companion_of(name)) is not None}
    apart = {name for name in folder.names if names.is_ignored(name) or names.is_beside(name)}
    found = {name for name in folder.names if not int8.is_companion(folder, name)} - apart - companions.keys()
    if config.tie_word_embeddings:
        found.discard(names.lm_head)  # a copy of the embedding, which some tied checkpoints store all the same
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - found)]
    problems += [f"unknown: {name}" for name in sorted(found - wanted.keys())]
    packed = set(companions.values()) | {name for name in linears if name in folder and int8.is_int8(folder, name)}
    if folder.is_4bit:
        problems += prequantized.check(folder, linears)
        packed = packed if companions else set(linears)
    elif packed:
        problems.append(
            f"{len(packed)} weights in 4 or 8 bits ({some(sorted(packed))}), but config.json has no quantization_config"
        )
    for name in sorted((wanted.keys() & found) - packed):
        spec = folder.spec(name)
        if spec.shape != wanted[name]:
            problems.append(mismatch(spec, wanted[name]))
        if spec.dtype not in FLOATS:
            problems.append(f"{name}: dtype {spec.dtype}; weights are {', '.join(sorted(FLOATS))}")
    if problems:
        is_plain = folder.is_4bit and not companions
        if is_plain and all(folder.spec(name).shape == wanted[name] for name in wanted.keys() & found):
            fix = (
                "remove quantization_config from its config.json: the weights are not quantized, a merge left it there"
            )
        else:
            unquantized = ", or give the unquantized one, which is quantized on the way in" if packed else ""
            fix = f"fetch the model again{unquantized}"
        lines = "\n    ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise InputError(folder.path, found=f"tensors that do not match config.json\n    {lines}", fix=fix)
    return config


def load_weights(
    folder: ModelFolder,
    config: Architecture,
    quantization: QuantizationSettings | None,
    where: LayerPlace | Sequence[LayerPlace],
    advance: Advance = lambda nbytes: None,
) -> Weights:
    """Read, quantize and place the whole model, several linears at a time, each by a thread of its own.

    A linear goes to its place as soon as it is read, so that one for each thread is all that exists besides. On a GPU's host, linears that
    were in 4 bits on the disk are in memory of our own, which each thread reads into and registers (see `pinned.filled`). Embedding and
    head come first, each read by all threads.

    Args:
        quantization: what to quantize to; a folder that is in 4 bits already keeps its own (see `prequantized.settle`). None leaves
            the linears of one that is not as they are, in bfloat16.
        where: one place for all layers, or each layer's own.
        advance: called with the bytes of each layer that is in its place, in order, and of embedding and head; all in all `total_bytes`.

    Raises:
        InputError: a weight or a scale holds a value that is not finite; or layers are to be quantized, and to stay on disk.
    """
    places = [where] * config.num_hidden_layers if isinstance(where, str) else list(where)
    if "disk" in places and not folder.is_4bit and quantization is not None:
        found = "a model that is not in 4 bits, whose layers are to be read from disk as they are needed"
        fix = (
            "quantize it with `python -m convert.quantize`, or make room for the cache, or set memory.base_weights=host"
        )
        raise InputError(folder.path, found=found, expected="a model in 4 bits", fix=fix)

    parts = [layer_parts(folder, layer, quantization, place) for layer, place in enumerate(places) if place != "disk"]
    tasks = [functools.partial(_vocabulary, folder, config), *itertools.chain.from_iterable(parts)]
    parts_of_layer = len(parts[0]) if parts else 0
    is_read = folder.is_4bit or quantization is None
    done = in_order(tasks) if is_read else (task() for task in tasks)  # quantizing keeps all cores busy
    embedding, lm_head, final_norm = next(done)
    advance(nbytes((embedding, final_norm)) + (0 if config.tie_word_embeddings else nbytes(lm_head)))

    def layers() -> Iterator[Source]:
        for index, place in enumerate(places):
            if place == "disk":
                advance(0)
                yield functools.partial(read_layer, folder, index, quantization)
            else:
                layer = _joined(itertools.islice(done, parts_of_layer))
                advance(nbytes(layer))
                yield layer
                del layer

    return Weights({"weight": embedding}, LayerStore(layers(), where), {"norm": final_norm, "weight": lm_head})


def total_bytes(config: Architecture, quantization: QuantizationSettings | None, where: LayerPlace) -> int:
    """What `load_weights` brings to its place."""
    vocabulary = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    norm = config.hidden_size * sum(_itemsize(config.norms, part) for part in Names.of(config).norm_parts)
    layers = 0 if where == "disk" else config.num_hidden_layers * frozen_bytes(config, quantization)
    return BFLOAT16_BYTES * vocabulary + norm + layers


def frozen_bytes(config: Architecture, quantization: QuantizationSettings | None) -> int:
    """Bytes of one decoder layer's frozen weights; with None its linears are in bfloat16."""
    if quantization is not None:
        return layer_bytes(config, quantization)
    names = Names.of(config)
    linears = sum(rows * columns for rows, columns in config.linear_shapes().values())
    norms = {names.norm(0, name) for name in names.norms} | {names.qk_norm(0, name) for name in names.qk_norms}
    return BFLOAT16_BYTES * linears + sum(
        math.prod(shape) * (_itemsize(config.norms, "weight") if name in norms else BFLOAT16_BYTES)
        for name, shape in vector_shapes(config, names, 0).items()
    )


def _itemsize(norms: Norms, part: str) -> int:
    """Bytes of a number of a norm's weight or bias, as it is kept."""
    return 4 if part == "weight" and norms.is_float32 else BFLOAT16_BYTES


def read_layer(folder: ModelFolder, layer: int, quantization: QuantizationSettings | None) -> Tree:
    """One decoder layer as the engine's frozen tree: linears are on the device if they were quantized here, all else is still numpy's."""
    return _joined(part() for part in layer_parts(folder, layer, quantization))


def layer_parts(
    folder: ModelFolder, layer: int, quantization: QuantizationSettings | None, place: Where | None = None
) -> list[Callable[[], Tree]]:
    """What makes the parts of one decoder layer's tree, to be called by any thread: norms and what else is small, and each linear.

    A part is at `place` when it is returned; by default it is where `read_layer` says.
    """

    def placed(part: Tree) -> Tree:
        return part if place is None else one_device().keep(part, place)

    names, norms = names_of(folder), stated_architecture(folder).norms

    def read_vectors() -> Tree:
        tree = {
            name: _norm(folder, [names.norm(layer, name, part) for part in names.norm_parts], norms)
            for name in names.norms
        }
        tree |= {name: _norm(folder, [names.qk_norm(layer, name)], norms) for name in names.qk_norms}
        numbers = {name: read_bfloat16(folder, names.act_fn(layer, name)) for name in names.activation}
        return placed(tree | ({"act_fn": numbers} if numbers else {}))

    def read_one(name: str) -> Tree:
        tree = {"weight": read_linear(folder, names.linear(layer, name), quantization, place)}
        if name in names.biased:
            tree["bias"] = read_bfloat16(folder, names.bias(layer, name))
        return placed({name: tree})

    return [read_vectors, *(functools.partial(read_one, name) for name in names.paths)]


def _joined(parts: Iterable[Tree]) -> Tree:
    return {name: module for part in parts for name, module in part.items()}


def read_linear(
    folder: ModelFolder, name: str, quantization: QuantizationSettings | None, place: Where | None = None
) -> Weight:
    """A linear in 4 bits: as it is (numpy's arrays), or cast to bfloat16 and quantized (on the device). With None: only cast (numpy's).

    A linear that is not in 4 bits in a folder whose others are is only cast.

    Where it is to be on the host, numpy's arrays are in registered memory already, if there can be such.
    """
    if folder.is_4bit and bitsandbytes.is_packed(folder, name):
        read = functools.partial(bitsandbytes.read, folder, name)
        return pinned.filled(read) if place == "host" else read()
    if quantization is None or folder.is_4bit:
        return read_bfloat16(folder, name)
    return one_device().put(quantized(folder, name, quantization), "device")


def read_norm(folder: ModelFolder, name: str, norms: Norms) -> np.ndarray:
    """A norm's weight as it multiplies: bfloat16, or float32 with the offset of `norms` added.

    A layer norm's sum is rounded to bfloat16, as transformers' Nemotron makes it, those of others are not.

    Raises:
        InputError: a value is not finite.
    """
    weight = read_bfloat16(folder, name)
    if not norms.is_float32:
        return weight
    total = weight.astype(np.float32) + np.float32(norms.offset)
    return total.astype(weight.dtype).astype(np.float32) if norms.centred else total


def _norm(folder: ModelFolder, tensors: Sequence[str], norms: Norms) -> Tree:
    """A norm's tree of its tensors, the weight first."""
    weight, *others = tensors
    tree = {"weight": read_norm(folder, weight, norms)}
    return tree | {name.rpartition(".")[2]: read_bfloat16(folder, name) for name in others}


def _vocabulary(folder: ModelFolder, config: Architecture) -> tuple[jax.Array, jax.Array, Tree]:
    """Embedding, head (the same array if they are tied) and final norm, on the device."""
    names = names_of(folder)
    embedding = on_device(folder, names.embedding)
    lm_head = embedding if config.tie_word_embeddings else on_device(folder, names.lm_head)
    final = _norm(folder, [names.final_norm_part(part) for part in names.norm_parts], config.norms)
    return jax.block_until_ready((embedding, lm_head, one_device().put(final, "device")))
