"""bitsandbytes' 8-bit linears, in folders whose other linears are in 4 bits: read as the bfloat16 that they decode to.

A linear `X.weight` of shape [out, in] is

    X.weight           I8 [out, in]
    X.SCB              F32 [out]          the largest absolute value of each row: a weight is code · SCB / 127
    X.weight_format    U8 []              the layout; 0 for rows, the only one that files have

An 8-bit weight multiplies faster only where activations are quantized too, which no training does, so none is kept in 8 bits.
"""

import numpy as np

from convert.files.folder import ModelFolder

SCALE = np.float32(0.007874015718698502)
"""1 / 127, as bitsandbytes rounds it."""


def scales_of(weight: str) -> str:
    """The name of the scales of `X.weight`."""
    return f"{weight.removesuffix('weight')}SCB"


def is_companion(folder: ModelFolder, tensor: str) -> bool:
    """Whether a tensor goes along with an 8-bit weight."""
    module, _, name = tensor.rpartition(".")
    weight = f"{module}.weight"
    return name in ("SCB", "weight_format") and weight in folder and is_int8(folder, weight)


def is_int8(folder: ModelFolder, name: str) -> bool:
    """Whether a weight is in 8 bits."""
    return folder.spec(name).dtype == "I8" and scales_of(name) in folder


def problems(folder: ModelFolder, name: str, shape: tuple[int, ...]) -> list[str]:
    """Return, a line each, what is wrong with the tensors of an 8-bit linear of this shape."""
    spec, scales = folder.spec(name), scales_of(name)
    found = [] if spec.shape == shape else [f"{name}: shape {spec.shape}, the config says {shape}"]
    if (there := (folder.spec(scales).dtype, folder.spec(scales).shape)) != ("F32", shape[:1]):
        found.append(f"{scales}: {there[0]}{list(there[1])}, expected F32{[shape[0]]}")
    layout = f"{name}_format"
    if layout in folder and any(folder.read_bytes(layout)):
        found.append(f"{layout}: not a layout of rows")
    return found


def decoded(folder: ModelFolder, name: str, codes: np.ndarray, begin: int) -> np.ndarray:
    """Some of an 8-bit linear's weights, float32.

    Args:
        codes: [n] int8.
        begin: the number of the first of them in the linear.
    """
    columns = folder.spec(name).shape[1]
    rows = np.arange(begin, begin + codes.size) // columns
    return codes.astype(np.float32) * folder.read(scales_of(name))[rows] * SCALE
