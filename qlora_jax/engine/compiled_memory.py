"""What the compiled functions of a training step take while they run, asked of the compiler before there is anything to run them on."""

import jax
import numpy as np

from qlora_jax.engine import programs
from qlora_jax.engine.engine import Engine
from qlora_jax.runtime.placement import Tree, sharding


def temporary_bytes(
    engine: Engine, rows: int, length: int, *, packed: bool, keep: bool, micro_batches: int = 1
) -> dict[str, int]:
    """Bytes that the compiled functions of a training step take while they run, besides arguments and results.

    Nothing is run, but they are compiled, and found again in the compilation cache by the run: all but what the first layer needs.
    """
    device = sharding("device")

    def describe(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)

    def array(*shape: int, dtype: jax.typing.DTypeLike = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    adapter, frozen, head = map(describe, (engine.abstract_adapter, engine.abstract_layer, engine.abstract_head))
    grads = None
    if micro_batches > 1:
        grads = jax.tree.map(lambda x: array(*x.shape, dtype=np.float32), engine.abstract_adapter)
    h = array(rows, length, engine.config.hidden_size, dtype=engine.compute_dtype)
    dropout = engine.lora is not None and engine.lora.lora_dropout > 0
    key = describe(jax.eval_shape(lambda: jax.random.key(0))) if dropout else None
    drawn = (key, array(), array(), (array(rows, length), array(rows, length)) if packed else None)
    if keep:
        forward = programs.forward_keeping.lower(engine.keeping_def, adapter, frozen, h, *drawn)
        arguments = (adapter, frozen, grads, h, h, describe(forward.out_info[2]), *drawn)
        backward = programs.backward_kept.lower(engine.keeping_def, *arguments)
    else:
        forward = programs.forward.lower(engine.layer_def, adapter, frozen, h, *drawn)
        backward = programs.backward.lower(engine.layer_def, adapter, frozen, grads, h, h, *drawn)
    last = programs.loss_and_grad.lower(engine.head_def, head, h, array(rows, length), array(dtype=np.float32))
    lowered = {"forward": forward, "backward": backward, "head": last}
    return {name: each.compile().memory_analysis().temp_size_in_bytes for name, each in lowered.items()}
