"""The compiled functions of a training step before anything runs: the memory they take, and all of them compiled ahead."""

import concurrent.futures
import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from qlora_jax.engine import programs
from qlora_jax.engine.engine import Engine
from qlora_jax.engine.layer_program import Context, LayerProgram
from qlora_jax.runtime.placement import Tree

COMPILERS = 4
"""Functions compiled at a time, each by a thread: XLA's compiler for a GPU uses little more than one core for most of its time."""

Lowered = Iterator[tuple[str, jax.stages.Lowered]]
"""Names of functions, each with the function lowered for a step's shapes; lowered when it is asked for."""


class StepShapes:
    """What a step's functions are called with, as shapes on the device.

    A function that is lowered and compiled for these is not traced, lowered or compiled again by the run, if it is of the same process.
    """

    def __init__(self, engine: Engine, rows: int, length: int, *, packed: bool = False, micro_batches: int = 1) -> None:
        """`rows` and `length` are a micro-batch's; `packed`: whether it has positions and segments."""
        self.engine, self.rows, self.length = engine, rows, length
        self._device, self.micro_batches = engine.placement.sharding("device"), micro_batches
        self.hidden = self.array(rows, length, engine.config.hidden_size, dtype=engine.compute_dtype)
        dropout = engine.lora is not None and engine.lora.lora_dropout > 0
        key = self.described(jax.eval_shape(lambda: jax.random.key(0))) if dropout else None
        packing = (self.array(rows, length), self.array(rows, length)) if packed else None
        self._context = Context(key, self.array(), self.array(), packing)
        self._summed = jax.tree.map(lambda x: self.array(*x.shape, dtype=np.float32), engine.abstract_adapter)
        self._weights = tuple(map(self.described, (engine.abstract_adapter, engine.abstract_layer)))
        self.adapter = self._weights[0]

    def array(self, *shape: int, dtype: jax.typing.DTypeLike = np.int32) -> jax.ShapeDtypeStruct:
        """Describe one array on the device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._device)

    def described(self, tree: Tree) -> Tree:
        """Describe a tree's arrays on the device."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._device), tree)

    @property
    def gradients(self) -> Tree:
        """Describe a layer's finished gradient."""
        dtype = self.engine.adapter_dtype
        return jax.tree.map(lambda x: self.array(*x.shape, dtype=dtype), self.adapter)

    def layer(self, program: LayerProgram, *, first: bool = False) -> Lowered:
        """Yield `forward` and `backward` of a layer.

        Args:
            first: `backward_first` too, the backward function of the model's first layer.
        """
        grads = self._summed if self.micro_batches > 1 else None
        return program.lowered(*self._weights, grads=grads, h=self.hidden, context=self._context, first=first)

    def head(self) -> Lowered:
        """Yield the head with its loss and gradient."""
        labels, weight = self.array(self.rows, self.length), self.array(dtype=np.float32)
        head = self.described(self.engine.abstract_head)
        yield "head", self.engine.objective.lowered(head, self.hidden, labels, weight)

    def rest(self) -> Lowered:
        """Yield what else of a step has one function for all layers."""
        if self.micro_batches > 1:
            yield "zeros", programs.zeros_like(self._device).lower(self.adapter)
        yield "finish", programs.finish.lower(self._summed, self.engine.adapter_dtype)


def temporary_bytes(
    engine: Engine, rows: int, length: int, *, packed: bool, saves: tuple[bool, ...], micro_batches: int = 1
) -> dict[str, int]:
    """Return bytes that the compiled functions of a training step take while they run, besides arguments and results.

    Nothing runs, but the functions are compiled, beside each other, and found again by the run.

    Args:
        saves: which programs are asked: of layers that recompute (False), that save activations (True), or both.

    Returns:
        bytes of `forward` and `backward`, of `kept_forward` and `kept_backward` of layers that save, and of `head`
    """
    shapes = StepShapes(engine, rows, length, packed=packed, micro_batches=micro_batches)
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as compilers:
        # Lowering is Python's work and compiling XLA's: one function is compiled while the next is lowered.
        compiling = {name: [compilers.submit(lowered.compile)] for name, lowered in shapes.head()}
        for each in saves:
            for program in programs_of(engine, each):
                for name, lowered in shapes.layer(program):
                    key = f"kept_{name}" if each else name
                    compiling.setdefault(key, []).append(compilers.submit(lowered.compile))
        sizes = {name: [each.result().memory_analysis() for each in some] for name, some in compiling.items()}
        return {name: max(each.temp_size_in_bytes for each in some) for name, some in sizes.items()}


def programs_of(engine: Engine, saves: bool) -> list[LayerProgram]:
    """Return the programs of each kind of layer that save activations, or that do not."""
    return [program for (_, its), program in engine.programs.items() if its == saves]


class Ahead:
    """The functions of a training step, compiled by threads while the weights are being loaded.

    What fails here is left to the step that needs it, which then fails in the same way, where it can be explained.
    """

    def __init__(self, shapes: StepShapes, saves: tuple[bool, ...], more: Lowered) -> None:
        """Begin. `saves` as in `temporary_bytes`; `more`: other functions that the run will call."""
        self._compilers = concurrent.futures.ThreadPoolExecutor(1 + COMPILERS, thread_name_prefix="compiler")
        self._lowering = self._compilers.submit(self._lower, shapes, saves, more)

    def wait(self) -> None:
        """Return when all functions are compiled: a step that begins before would compile them a second time."""
        self._lowering.result()
        self._compilers.shutdown()

    def _lower(self, shapes: StepShapes, saves: tuple[bool, ...], more: Lowered) -> None:
        with contextlib.suppress(Exception):
            engine = shapes.engine
            parts = [
                shapes.layer(program, first=program.kind == engine.config.kinds[0])
                for each in saves
                for program in programs_of(engine, each)
            ]
            for part in (*parts, shapes.head(), shapes.rest(), more):
                for _, lowered in part:
                    self._compilers.submit(lowered.compile)
