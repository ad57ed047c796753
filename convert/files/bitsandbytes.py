"""bitsandbytes' 4-bit layout in safetensors: what a linear's tensors are called and what they hold, to read and to write.

A linear `X.weight` of shape [out, in], n = out · in weights in N = ceil(n / 64) blocks, is

    X.weight                                  U8 [ceil(n / 2), 1]     packed codes; or the same bytes seen as another dtype
    X.weight.absmax                           U8 [N]                  indices into the nested map; F32 without double quantization
    X.weight.quant_map                        F32 [16]                the type's codebook
    X.weight.nested_absmax                    F32 [ceil(N / 256)]     } with double quantization
    X.weight.nested_quant_map                 F32 [256]               }
    X.weight.quant_state.bitsandbytes__nf4    U8 [length]             JSON, see `QuantState`; `__fp4` for the other type

Matched to bitsandbytes 0.50 (`QuantState.as_dict`, `Params4bit.from_prequantized`) and transformers' `save_pretrained`. What is read is
used as it is, nothing is quantized again. Where we depart: the JSON is padded with spaces, which JSON allows, because a file's header
needs its length before the offset in it is known; and all linears that are in 4 bits must be of one type. Some of a folder's linears may
be in 16 or 8 bits (`llm_int8_skip_modules`; "dynamic" quantizations): see `convert.files.prequantized`.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
import pydantic

from convert.files.folder import ModelFolder, aligned, some
from convert.files.shards import ALIGNMENT, TensorSpec
from qlora_jax.config import QuantizationSettings
from qlora_jax.ops import nf4

MAX_STATE_BYTES = 4096
"""bitsandbytes writes under 200. A longer state is refused before it is parsed."""
LONGEST_NUMBER = -2.2250738585072014e-308
"""No float takes more characters than these 24."""
FLOAT32_MAX = float(np.finfo(np.float32).max)

_COMPANION = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")
STATE = "quant_state.bitsandbytes__"
"""The name of a companion with a `QuantState`, but for the type that ends it."""


class QuantState(pydantic.BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """What bitsandbytes keeps of a weight besides its tensors, under its names and in its order."""

    quant_type: nf4.QuantType
    blocksize: Literal[64]
    dtype: Literal["bfloat16", "float16", "float32"]
    """What was quantized, and what dequantizing rounds to."""
    shape: tuple[int, ...]
    nested_blocksize: Literal[256] | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = pydantic.Field(default=None, ge=-FLOAT32_MAX, le=FLOAT32_MAX)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized again."""
        return self.nested_offset is not None

    @pydantic.model_validator(mode="after")
    def _nested_or_not(self) -> Self:
        if len({value is None for value in (self.nested_blocksize, self.nested_dtype, self.nested_offset)}) > 1:
            raise ValueError("expected all of nested_blocksize, nested_dtype and nested_offset, or none")
        return self

    def to_json(self) -> bytes:
        """As bitsandbytes writes it; float32 offsets come back with the same bits."""
        return json.dumps(self.model_dump(exclude_none=True)).encode()


def companion_of(tensor: str) -> str | None:
    """The weight that a tensor is a companion of (`X.weight` for `X.weight.absmax`), or None if it is not one."""
    match = _COMPANION.fullmatch(tensor)
    return match[1] if match else None


def is_packed(folder: ModelFolder, name: str) -> bool:
    """Whether a weight of a folder that was checked is in 4 bits."""
    return f"{name}.absmax" in folder


def quantization_config(quantization: QuantizationSettings, skipped: Sequence[str] = ()) -> dict[str, Any]:
    """The block of `config.json`, as transformers writes it.

    Args:
        skipped: modules beside the text model, which are not in 4 bits.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head", *skipped]
        if skipped
        else None,  # without, transformers skips the head by itself
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def specs(name: str, shape: tuple[int, ...], quantization: QuantizationSettings) -> list[TensorSpec]:
    """The tensors of the linear `name`, in the order they are written: float32 first, and a multiple of 8 bytes in all, for alignment."""
    size = math.prod(shape)
    blocks = -(-size // nf4.BLOCK_SIZE)
    nested = -(-blocks // nf4.ABSMAX_BLOCK_SIZE)
    found = [TensorSpec(f"{name}.quant_map", "F32", (16,))]
    if quantization.double_quant:
        found.append(TensorSpec(f"{name}.nested_quant_map", "F32", (256,)))
        found.append(TensorSpec(f"{name}.nested_absmax", "F32", (nested,)))
    found.append(TensorSpec(f"{name}.absmax", "U8" if quantization.double_quant else "F32", (blocks,)))
    found.append(TensorSpec(name, "U8", (-(-size // 2), 1)))
    offset = LONGEST_NUMBER if quantization.double_quant else None
    length = len(_state(shape, quantization.quant_type, "bfloat16", offset).to_json())
    length += -(sum(spec.nbytes for spec in found) + length) % ALIGNMENT
    return [*found, TensorSpec(f"{name}.{STATE}{quantization.quant_type}", "U8", (length,))]


def tensors(name: str, weight: nf4.QuantizedTensor) -> list[np.ndarray]:
    """The data of a linear, in the order, dtypes and shapes of `specs`."""
    nested = weight.nested_absmax is not None
    quantization = QuantizationSettings(quant_type=weight.quant_type, double_quant=nested)
    offset = float(weight.nested_offset) if nested else None
    state = _state(weight.shape, weight.quant_type, weight.dtype, offset).to_json()
    order = specs(name, weight.shape, quantization)
    data = {
        f"{name}.quant_map": nf4.CODEBOOKS[weight.quant_type],
        f"{name}.nested_quant_map": nf4.DYNAMIC_MAP,
        f"{name}.nested_absmax": weight.nested_absmax,
        f"{name}.absmax": weight.absmax,
        name: weight.codes.reshape(-1, 1),
        order[-1].name: np.frombuffer(state.ljust(order[-1].nbytes), np.uint8),
    }
    return [np.asarray(data[spec.name]) for spec in order]


def _state(shape: tuple[int, ...], quant_type: nf4.QuantType, dtype: str, offset: float | None) -> QuantState:
    nested = {} if offset is None else {"nested_blocksize": nf4.ABSMAX_BLOCK_SIZE, "nested_dtype": "float32"}
    return QuantState(
        quant_type=quant_type, blocksize=nf4.BLOCK_SIZE, dtype=dtype, shape=shape, **nested, nested_offset=offset
    )


def read(
    folder: ModelFolder,
    name: str,
    room: Callable[[Sequence[int]], list[np.ndarray]] = lambda sizes: list(map(aligned, sizes)),
) -> nf4.QuantizedTensor:
    """One linear of a folder that was checked, byte for byte; arrays are numpy's.

    Args:
        room: makes the memory that is read into, called once: an array [size] uint8 for each of the sizes.

    Raises:
        InputError: a scale is not finite.
    """
    state = read_state(folder, name)
    tensors = [name, f"{name}.absmax", *([f"{name}.nested_absmax"] if state.nested else [])]
    *places, of_offset = room([*(folder.spec(tensor).nbytes for tensor in tensors), np.dtype(np.float32).itemsize])
    arrays = [folder.read(tensor, into) for tensor, into in zip(tensors, places, strict=True)]
    nf4.check_finite(arrays[-1], f"{folder.path}: {tensors[-1]}")
    codes, absmax, nested_absmax, offset = *arrays, *([] if state.nested else [None]), None
    if state.nested:
        offset = of_offset.view(np.float32).reshape(())
        offset[...] = state.nested_offset
    codes = codes.reshape(-1).view(np.uint8)
    return nf4.QuantizedTensor(codes, absmax, nested_absmax, offset, state.shape, state.quant_type, state.dtype)


def read_state(folder: ModelFolder, name: str) -> QuantState:
    """The state of one linear of a folder that was checked."""
    possible = (f"{name}.{STATE}{quant_type}" for quant_type in nf4.CODEBOOKS)
    state = parse_state(folder, name, [tensor for tensor in possible if tensor in folder])
    assert isinstance(state, QuantState), state
    return state


def parse_state(folder: ModelFolder, name: str, states: list[str]) -> QuantState | str:
    """A linear's state, or what is wrong with it; `states` are the tensors that may hold it."""
    if len(states) != 1:
        return f"{name}: two states ({some(states)})" if states else f"missing: {name}.{STATE}nf4 (or fp4)"
    (tensor,) = states
    quant_type = tensor.rpartition("__")[2]
    if quant_type not in nf4.CODEBOOKS:
        return f"{tensor}: 4-bit type {quant_type!r}, known: {', '.join(nf4.CODEBOOKS)}"
    spec = folder.spec(tensor)
    if spec.dtype != "U8" or spec.nbytes > MAX_STATE_BYTES:
        return f"{tensor}: {spec.dtype}{list(spec.shape)}, expected U8 of at most {MAX_STATE_BYTES} bytes"
    try:
        state = QuantState.model_validate_json(folder.read_bytes(tensor))
    except pydantic.ValidationError as error:
        return f"{tensor}: {'; '.join(map(_explain, error.errors()))}"
    return state if state.quant_type == quant_type else f"{tensor}: quant_type is {state.quant_type!r}"


def _explain(error: Any) -> str:
    """One of pydantic's errors in a few words: field, what is there, what is wrong with it."""
    field = ".".join(map(str, error["loc"]))
    what = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{field} is missing"
    return f"{field} is {error['input']!r:.60}: {what}" if field else what
