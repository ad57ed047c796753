"""Whether a model's head is its embedding, which `config.json` alone does not say.

A checkpoint may set `tie_word_embeddings`, or leave it to its family's default, and hold an `lm_head.weight`
all the same. transformers 5 ties only equal matrices: a copy of the
embedding is the embedding, any other matrix is the head, whatever the flag says. So here.
"""

import functools

import ml_dtypes
import numpy as np

from convert.files.folder import ModelFolder
from convert.files.shards import FLOATS
from convert.files.stated import names_of, stated_architecture

COMPARED = 2**21
"""Elements compared at a time."""


@functools.lru_cache(maxsize=16)
def is_tied(folder: ModelFolder) -> bool:
    """Whether the head is the embedding. Reads both matrices if `config.json` says so and both are in the folder.

    Raises:
        InputError: the config is not supported, or the file was cut off meanwhile.
    """
    if not stated_architecture(folder).tie_word_embeddings:
        return False
    names = names_of(folder)
    if names.lm_head not in folder or names.embedding not in folder:
        return True
    embedding, head = folder.spec(names.embedding), folder.spec(names.lm_head)
    if embedding.shape != head.shape or not {embedding.dtype, head.dtype} <= FLOATS:
        return False
    pieces = zip(folder.pieces(names.embedding, COMPARED), folder.pieces(names.lm_head, COMPARED), strict=True)
    return all(_equal(*pair) for pair in pieces)


def has_own_head(folder: ModelFolder) -> bool:
    """Whether a head is stored that `config.json` denies."""
    return stated_architecture(folder).tie_word_embeddings and not is_tied(folder)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether both are the same numbers in bfloat16, in which they are used; of two zeros the sign does not count."""
    one, other = (values.astype(ml_dtypes.bfloat16, copy=False) for values in (one, other))
    return np.array_equal(one.view(np.int16), other.view(np.int16)) or np.array_equal(one, other)
