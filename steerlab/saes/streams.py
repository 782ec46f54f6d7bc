"""A stream of activations: rows in the order in which they are trained on, in memory or as shards on disk.

A folder holds `manifest.json` (where the activations come from, and of every shard its rows and SHA-256) and shards
`activations-00000.safetensors` of equal length but the last, memory-mapped when read: tensors `activations`
(row, width), and of which `text` and `position` each row is. Every file is written whole or not at all, and the
manifest after the shard that it names, so a killed writer leaves a stream that ends at a shard. Left out: locking.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab.errors import UsageError
from steerlab.models import Site
from steerlab.models.weights import hash_bytes
from steerlab.runs import atomic_write, decode, encode
from steerlab.runs.files import to_json

FORMAT, FORMAT_VERSION, MANIFEST = "steerlab activations", 1, "manifest.json"
Kind = Literal["residual", "difference"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARE_BYTES = 64 * 2**20  # that a disk must have left


@dataclass(frozen=True)
class Activations:
    """What a stream holds.

    site: where. kind: the values themselves, or steered − base on the same tokens. skip: so many positions at the
    start of every text are left out (the first token, whatever it is, becomes an attention sink, a hundred times as
    long as others). sink: so are positions whose activation (of a difference: the base model's) is longer than this
    many times the median of their text, which are sinks too, rare but most of all variance; None keeps them.
    generated_only: prompts are left out. dtype: as stored. buffer: tokens that are shuffled together. batch_tokens: of
    one forward pass. seed: of the shuffling.
    """

    site: Site
    kind: Kind = "residual"
    skip: int = 1
    sink: float | None = 10.0
    generated_only: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    buffer: int = 65_536
    batch_tokens: int = 2_048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise UsageError(f"skip is {self.skip}; it counts positions at the start of a text, 0 or more")
        if self.sink is not None and not self.sink > 1:
            raise UsageError(f"sink is {self.sink}; it is a multiple of the median length, above 1, or None")
        for name in ("buffer", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it counts tokens, at least 1")


@dataclass(frozen=True)
class Origin:
    """Where a stream comes from. hook_name, hf_hook_name: the site as TransformerLens and transformers have it, if they
    do. n_tokens: positions that are recorded; the stream has less of them by its sinks. longest: text, in tokens.
    texts_sha256: of all tokens. adapter_sha256: of the adapter that the model had on; "" for none."""

    wanted: Activations
    model: str
    weights_sha256: str
    width: int
    hook_name: str | None
    hf_hook_name: str | None
    n_texts: int
    n_tokens: int
    longest: int
    texts_sha256: str
    adapter_sha256: str

    @property
    def n_bytes(self) -> int:
        """On disk, at most."""
        return self.n_tokens * (self.width * DTYPES[self.wanted.dtype].itemsize + 8)


@dataclass(frozen=True)
class Rows:
    """Some rows of a stream, and of which text and position each is."""

    activations: Float[Tensor, "row width"]
    text: Int[Tensor, " row"]
    position: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.activations)

    def select(self, start: int, stop: int) -> Rows:
        return Rows(self.activations[start:stop], self.text[start:stop], self.position[start:stop])


def joined(parts: Sequence[Rows]) -> Rows:
    """One behind the other; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        torch.cat([part.activations for part in parts]),
        torch.cat([part.text for part in parts]),
        torch.cat([part.position for part in parts]),
    )


class Stream:
    """parts: rows in order. origin: None for activations that no model computed (synthetic ones)."""

    def __init__(self, parts: Sequence[Rows], origin: Origin | None = None) -> None:
        self.parts, self.origin = tuple(part for part in parts if len(part)), origin
        if not self.parts:
            raise UsageError("a stream without activations; give longer texts, or skip fewer positions")

    @classmethod
    def of(cls, activations: Float[Tensor, "row width"]) -> Stream:
        """Activations from elsewhere, as they are: every row is a text of its own."""
        text = torch.arange(len(activations), dtype=torch.int32)
        return cls([Rows(activations, text, torch.zeros_like(text))])

    @classmethod
    def open(cls, folder: str | Path) -> Stream:
        """A whole stream on disk, after its checksums. Raises UsageError for one that is missing, damaged or not yet
        complete."""
        folder = Path(folder)
        manifest = _manifest(folder)
        if not manifest["complete"]:
            raise UsageError(f"{folder} is not complete yet; run the command that writes it again")
        return cls([_shard(folder, shard) for shard in manifest["shards"]], decode(manifest["origin"]))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def width(self) -> int:
        return self.parts[0].activations.shape[1]

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start … stop − 1. Raises UsageError for rows that are not there."""
        if not 0 <= start < stop <= len(self):
            raise UsageError(f"rows {start} to {stop} of a stream of {len(self)}; there are none")
        found, before = [], 0
        for part in self.parts:
            first, last = max(start - before, 0), min(stop - before, len(part))
            if first < last:
                found.append(part.select(first, last))
            before += len(part)
        return joined(found)

    def batch(self, step: int, size: int) -> Float[Tensor, "row width"]:
        """The activations of a training step, in fp32; behind the end the stream begins again."""
        parts, start, left = [], step * size % len(self), size
        while left:
            stop = min(start + left, len(self))
            parts.append(self.rows(start, stop).activations)
            start, left = 0, left - (stop - start)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()


class Writer:
    """Writes a stream to a folder, buffer by buffer, or goes on with what is there.

    Raises UsageError, before anything is written, for a folder with another stream or other things in it, a damaged
    shard, or too little disk.
    """

    def __init__(self, folder: str | Path, origin: Origin, shard_tokens: int) -> None:
        if shard_tokens < 1:
            raise UsageError(f"shard_tokens is {shard_tokens}; a shard has at least 1 row")
        self.folder, self.origin, self.shard_tokens = Path(folder), origin, shard_tokens
        found = self._present()
        self.shards: list[dict[str, Any]] = found.get("shards", [])
        self.complete: bool = found.get("complete", False)
        self.buffers: list[int] = found.get("buffers", [])  # rows of each that was appended
        self.skipped = self._go_back()
        self.pending: list[Rows] = []
        self._check_disk()

    def append(self, rows: Rows, last: bool) -> None:
        """The rows of the next buffer; whole shards are on disk when this returns, and all rows after the last."""
        self.buffers.append(len(rows))
        self.pending.append(rows.select(self.skipped, len(rows)))
        self.skipped = 0
        ready, written = joined(self.pending), 0
        while len(ready) - written >= self.shard_tokens or (last and written < len(ready)):
            stop = min(written + self.shard_tokens, len(ready))
            self.complete = last and stop == len(ready)
            self._write(ready.select(written, stop))
            written = stop
        if last and not self.complete:  # the rows end with a shard, or there are none
            self.complete = True
            self._write_manifest()
        self.pending = [ready.select(written, len(ready))]

    def _go_back(self) -> int:
        """To the buffer that a killed writer was at. Returns how many of its rows are there."""
        done, before = sum(shard["rows"] for shard in self.shards), 0
        for index, rows in enumerate([] if self.complete else self.buffers):
            if before + rows > done:
                del self.buffers[index:]
                return done - before
            before += rows
        return 0

    def _write(self, rows: Rows) -> None:
        from safetensors.torch import save

        tensors = {"activations": rows.activations, "text": rows.text, "position": rows.position}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        name = f"activations-{len(self.shards):05d}.safetensors"
        atomic_write(self.folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        self.shards.append({"file": name, "rows": len(rows), "sha256": digest})
        self._write_manifest()

    def _write_manifest(self) -> None:
        written = {"buffers": self.buffers, "shards": self.shards, "complete": self.complete}
        atomic_write(self.folder / MANIFEST, to_json(self._described() | written))

    def _described(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "origin": encode(self.origin),
            "shard_tokens": self.shard_tokens,
        }

    def _present(self) -> dict[str, Any]:
        """The manifest of what is there, after the checksums; empty if nothing is."""
        if not (self.folder / MANIFEST).exists():
            others = [path for path in self.folder.glob("[!.]*") if not path.name.startswith("activations-")]
            if others or self.folder.is_file():
                raise UsageError(f"{self.folder} exists and holds no activations; choose a new or empty folder")
            return {}
        manifest = _manifest(self.folder)
        if {key: manifest.get(key) for key in self._described()} != self._described():
            raise UsageError(
                f"{self.folder} holds activations of another model, adapter, text or configuration; choose another "
                "folder or remove this one"
            )
        for shard in manifest["shards"]:
            _verify(self.folder, shard)
        return manifest

    def _check_disk(self) -> None:
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        left = self.origin.n_tokens - sum(shard["rows"] for shard in self.shards)
        needed = left * self.origin.n_bytes // self.origin.n_tokens + SPARE_BYTES
        free = shutil.disk_usage(place).free
        if not self.complete and free < needed:
            raise UsageError(
                f"{left} activations take {needed / 2**30:.2f} GiB and {place} has {free / 2**30:.2f} GiB free; name "
                "fewer texts or another disk, or store bf16"
            )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder} holds no activations (no {MANIFEST}); give a folder that steerlab wrote") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); remove the folder and write it again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{folder} holds no activations of steerlab; give a folder with a stream")
    if found.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"{folder} has format version {found.get('format_version')}; this one reads {FORMAT_VERSION}")
    return found


def _verify(folder: Path, shard: dict[str, Any]) -> Path:
    path = folder / shard["file"]
    if not path.is_file():
        raise UsageError(f"{path} is missing; remove {folder} and write it again")
    if hash_bytes([path]) != shard["sha256"]:
        raise UsageError(f"{path} fails its checksum; copy it again, or remove {folder} and write it again")
    return path


def _shard(folder: Path, shard: dict[str, Any]) -> Rows:
    """Memory-mapped, after its checksum."""
    from safetensors import safe_open

    with safe_open(_verify(folder, shard), framework="pt") as file:
        return Rows(file.get_tensor("activations"), file.get_tensor("text"), file.get_tensor("position"))
