"""What a base model is made of, in one short value: the same wherever its folder is and whenever it was fetched."""

import hashlib
from pathlib import Path

from convert.files.folder import ModelFolder
from qlora_jax.base.reading import open_file, read_bytes, reading

SAMPLES = 16
SAMPLE_BYTES = 2**16


def model_identity(folder: ModelFolder) -> str:
    """SHA-256, in hexadecimal, of `config.json`, the shards' names and sizes and 16 evenly spread 64 KiB of each, its header among them.

    Not of every byte: that would take a 70B model's 140 GB a minute of reading. Another fine-tune of a model differs everywhere.
    """
    digest = hashlib.sha256(read_bytes(folder.path / "config.json"))
    for shard in sorted(folder.shards):
        _add(folder.path / shard, digest)
    return digest.hexdigest()


def _add(path: Path, digest: "hashlib._Hash") -> None:
    size = path.stat().st_size
    digest.update(f"\0{path.name}\0{size}\0".encode())
    with open_file(path) as file, reading(path, "cannot be read"):
        for index in range(SAMPLES):
            file.seek(index * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
