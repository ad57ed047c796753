"""Host memory of our own that a GPU reads by itself: anonymous pages, registered with the driver.

A copy to the device runs beside the computation only from pages that the kernel will not move, and the driver must know that. XLA has a
pool of such memory, but makes it in pages of 4 KiB, one thread at a time: slower than a disk reads. Weights that come from the disk
as numpy's arrays need none of it. Here they are read or copied into huge pages, by as many threads as there are, and those are registered
(`dma_map`) when they are full. `jax.device_put` then takes the arrays as they are, without staging them.

The memory belongs to the views that are handed out. When the last one dies, and with it the last copy that reads from it (JAX holds what
it copies from), it is taken from the driver first and given back to the kernel then. A process that ends leaves both to the kernel.
"""

import contextlib
import functools
import itertools
import mmap
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Tree = Any  # a pytree of arrays
Client = Any  # a backend's, as `jax.Device.client`
Room = Callable[[Sequence[int]], list[np.ndarray]]
"""Makes memory to fill: an array [size] uint8 for each of the sizes, each beginning with a line of the processor's caches."""

ALIGNMENT = 64
"""Bytes, of each array: a line of the processor's caches."""
HUGE_PAGE = 2**21
"""Bytes."""

_ours: dict[int, int] = {}
"""Of the mappings that are registered: the address, and the bytes of it that are."""
_stuck: list[mmap.mmap] = []
"""Mappings that the driver did not give back."""
_refused = threading.Event()
_lock = threading.Lock()


def client() -> Client | None:
    """The GPU's, if it registers memory; None on a CPU, for clients that cannot, and after one has refused."""
    if jax.default_backend() != "gpu" or _refused.is_set():
        return None
    found = jax.devices()[0].client
    return found if hasattr(found, "dma_map") else None


def pin(tree: Tree) -> Tree | None:
    """A tree of numpy's arrays, copied into registered memory: numpy's arrays again, not to be written to. From any thread.

    None where memory cannot be registered; if a GPU refuses it, a warning says so once.
    """
    where = client()
    if where is None:
        return None
    ours, registered = _filled(functools.partial(_copied, tree), where)
    return ours if registered else None


def filled(fill: Callable[..., Tree]) -> Tree:
    """What `fill` returns, a tree of numpy's arrays, not to be written to any more: in registered memory, where there can be such.

    `fill` is called with a `Room` that all of the tree's arrays are to be in; without one, where no memory can be registered. If a GPU
    refuses it, a warning says so once, and the tree is in ordinary memory.
    """
    where = client()
    return fill() if where is None else _filled(fill, where)[0]


def holds(array: object) -> bool:
    """Whether an array is one that `pin` has made, or a view of one."""
    owner = array.base if isinstance(array, np.ndarray) else None
    return isinstance(owner, np.ndarray) and owner.ctypes.data in _ours


def registered_bytes() -> int:
    """Of host memory that is registered now: whole pages."""
    return sum(list(_ours.values()))


def _copied(tree: Tree, room: Room) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    views = []
    for leaf, place in zip(leaves, room([leaf.nbytes for leaf in leaves]), strict=True):
        views.append(place.view(leaf.dtype).reshape(leaf.shape))
        np.copyto(views[-1], leaf)
    return jax.tree.unflatten(structure, views)


def _filled(fill: Callable[[Room], Tree], where: Client) -> tuple[Tree, bool]:
    """`filled`, with a client that has `dma_map`; and whether it took the memory."""
    made: list[tuple[np.ndarray, int, int, mmap.mmap]] = []

    def room(sizes: Sequence[int]) -> list[np.ndarray]:
        *offsets, size = itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
        size = max(-(-size // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        mapping, owner, begin = _room(size)
        made.append((owner, begin, size, mapping))
        return [owner[begin + offset :][:nbytes] for offset, nbytes in zip(offsets, sizes, strict=True)]

    tree = fill(room)
    for leaf in jax.tree.leaves(tree):
        leaf.flags.writeable = False
    try:
        for memory in made:
            _register(where, *memory)
    except jax.errors.JaxRuntimeError as error:
        _refuse(error)
        return tree, False
    return tree, True


def _register(where: Client, owner: np.ndarray, begin: int, size: int, mapping: mmap.mmap) -> None:
    """Have `size` bytes of `owner` registered for as long as it lives. Raises jax.errors.JaxRuntimeError if the client refuses."""
    address = owner.ctypes.data + begin
    release = weakref.finalize(owner, _release, where, address, owner.ctypes.data, mapping)
    release.atexit = False  # copies may still be on their way then
    try:
        where.dma_map(address, size)
    except jax.errors.JaxRuntimeError:
        release.detach()
        raise
    _ours[owner.ctypes.data] = size


def _room(size: int) -> tuple[mmap.mmap, np.ndarray, int]:
    """Fresh memory: the mapping, all its bytes [more than `size`] uint8, and where in it those that are meant begin.

    They begin with a huge page, and huge pages are asked for as far as they are filled: a page that is not touched takes no memory.
    """
    mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones come in 4 KiB
    mapping.madvise(mmap.MADV_DONTFORK)  # the kernel copies registered pages for a child at once, not when they change
    owner = np.frombuffer(mapping, np.uint8)
    begin = -owner.ctypes.data % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages: slower, and nothing else
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        if size >= HUGE_PAGE:
            mapping.madvise(mmap.MADV_HUGEPAGE, begin, size // HUGE_PAGE * HUGE_PAGE)
    return mapping, owner, begin


def _release(where: Client, address: int, owner: int, mapping: mmap.mmap) -> None:
    """Take memory from the driver; the mapping, which nobody else holds any more, goes with this call.

    If the driver keeps it, so do we: what the kernel put at that address next would be copied from the old pages.
    """
    _ours.pop(owner, None)
    try:
        where.dma_unmap(address)
    except jax.errors.JaxRuntimeError:
        _stuck.append(mapping)
        raise  # Python prints it


def _refuse(error: Exception) -> None:
    """Remember it, and say so the first time."""
    with _lock:
        first = not _refused.is_set()
        _refused.set()
    if first:
        warnings.warn(
            f"host memory cannot be registered with {jax.devices()[0].device_kind} ({str(error).splitlines()[0][:200]}): "
            "weights go to XLA's pinned pool instead, which takes longer to load; steps are as fast. Where that pool is too small, set "
            "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",
            stacklevel=2,
        )
