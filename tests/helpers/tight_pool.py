"""`train.py` with a pool of pinned memory that is as tight as on a GPU: `python -m tests.helpers.tight_pool BYTES --config FILE ...`.

On a CPU XLA has no such pool. Here arrays in pinned memory, and what is on its way from the device, are counted, and beyond BYTES they
fail as they do there.
"""

import sys
from typing import Any

import jax

from qlora_jax.runtime import placement
from qlora_jax.runtime.placement import one_device
from qlora_jax.training import snapshot

LIMIT = int(sys.argv.pop(1)) if __name__ == "__main__" else 0
MOST = [0]


def count(more: int = 0) -> None:
    """Raise as XLA does if what is in pinned memory, and `more`, is beyond the limit."""
    host = one_device().sharding("host")
    found = more + sum(x.nbytes for x in jax.live_arrays() if x.sharding == host and not x.is_deleted())
    MOST[0] = max(MOST[0], found)
    if found > LIMIT:
        raise jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: Out of host memory while trying to allocate {found} with allocator xla_gpu_host_bfc"
        )


def main() -> int:
    """Run `train.main`, and print the most that was in the pool."""
    from convert.adapters import adapter
    from qlora_jax.commands import train

    put, fetch = jax.device_put, placement.fetch

    def counted_put(x: Any, device: Any = None, **options: Any) -> Any:
        moved = put(x, device, **options)
        if device == one_device().sharding("host"):
            count()
        return moved

    def counted_fetch(array: Any) -> Any:
        count(array.nbytes)
        return fetch(array)

    jax.device_put = counted_put
    snapshot.fetch = adapter.fetch = counted_fetch
    status = train.main()
    print(f"pinned at most: {MOST[0]}")
    return status


if __name__ == "__main__":
    sys.exit(main())
