"""Steering vectors on disk: `save` and `load` choose the format by the file's suffix; one module per format.

`.safetensors` is our own (provenance and checksum); `.npy` is the papers' authors'. Nothing here loads a pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab.adapters.formats import npy, own
from steerlab.adapters.formats.own import Provenance
from steerlab.errors import UsageError

if TYPE_CHECKING:
    from steerlab.adapters.steering import SteeringVectors
    from steerlab.models import LanguageModel

__all__ = ["FORMATS", "Format", "Provenance", "load", "save"]


@dataclass(frozen=True)
class Format:
    """How to write and to read one kind of file."""

    save: Callable[[Path, SteeringVectors, Provenance], None]
    load: Callable[[Path, LanguageModel | None, bool], SteeringVectors]


FORMATS = {".safetensors": Format(own.save, own.load), ".npy": Format(npy.save, npy.load)}


def save(path: str | Path, vectors: SteeringVectors, provenance: Provenance) -> None:
    """Writes the whole file or nothing. Raises UsageError if the format cannot hold these vectors."""
    path = Path(path)
    _format(path).save(path, vectors, provenance)


def load(path: str | Path, model: LanguageModel | None = None, allow_other_weights: bool = False) -> SteeringVectors:
    """Vectors from a file, checked against `model` when given.

    Raises UsageError for a missing or damaged file, and for vectors trained on a model of other sizes, or on other
    weights unless `allow_other_weights`. A `.npy` file names no weights: only its shape is checked.
    """
    path = Path(path)
    vectors = _format(path).load(path, model, allow_other_weights)
    if model is not None:
        vectors.check(model)
    return vectors


def _format(path: Path) -> Format:
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} is no format for steering vectors that is known; use {' or '.join(FORMATS)}")
    return FORMATS[path.suffix]
