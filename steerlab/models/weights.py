"""Digests of weights: of tensors, of safetensors files, remembered for files that did not change.

The digest covers names, dtypes, shapes and bytes of the tensors in the order of their names, not the files' layout:
sharding or metadata do not change it, and a model in memory has the digest of its own file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from steerlab.errors import UsageError
from steerlab.runs import atomic_write


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def hash_safetensors(files: list[Path]) -> str:
    """`hash_tensors` of all tensors in the files, one tensor in memory at a time."""
    from safetensors import safe_open

    where = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    digest = hashlib.sha256()
    opened = {path: safe_open(path, framework="pt") for path in files}
    for name in sorted(where):
        _add(digest, name, opened[where[name]].get_tensor(name))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype!s} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def hash_bytes(files: list[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def cache_root() -> Path:
    """Folder for what can be made again: `STEERLAB_CACHE`, default `~/.cache/steerlab`."""
    return Path(os.environ.get("STEERLAB_CACHE") or "~/.cache/steerlab").expanduser()


def remembered(digest: Callable[[list[Path]], str], files: list[Path]) -> str:
    """`digest(files)`, computed anew only when a path, a size or a time of change is not the one seen before."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([digest.__name__, stats]).encode()).hexdigest()
    note = cache_root() / "digests" / key
    if note.is_file() and len(known := note.read_text()) == 64:
        return known
    value = digest(files)
    with suppress(OSError, UsageError):  # a folder that cannot be written costs time at every load, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(note, value)
    return value
