"""Adapters on disk: the format is chosen by what is saved and by the file's suffix; one module per format.

Steering vectors: `.safetensors` is our own (provenance and checksum), `.npy` the papers' authors'. A LoRA is a folder
as PEFT has it, a tuned lens one as tuned-lens has it. Nothing here loads a pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab.adapters.adapter import Adapter
from steerlab.adapters.formats import npy, own, peft, tuned_lens
from steerlab.adapters.formats.own import Provenance
from steerlab.adapters.lora import LoRAWeights
from steerlab.adapters.steering import SteeringVectors
from steerlab.adapters.translators import TunedLens
from steerlab.errors import UsageError

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

__all__ = [
    "FORMATS",
    "Format",
    "Provenance",
    "file_name",
    "is_peft",
    "load",
    "load_adapter",
    "load_tuned_lens",
    "provenance",
    "save",
]


@dataclass(frozen=True)
class Format:
    """How to write and to read one kind of file. (nnsight gives every object a `save`, which a field's default would
    be.)"""

    write: Callable[[Path, SteeringVectors, Provenance], None]
    read: Callable[[Path, LanguageModel | None, bool], SteeringVectors]


FORMATS = {".safetensors": Format(own.save, own.load), ".npy": Format(npy.save, npy.load)}
FILE_NAMES: dict[type, str] = {SteeringVectors: "vectors.safetensors", LoRAWeights: "adapter", TunedLens: "tuned_lens"}


def file_name(adapter: Adapter) -> str:
    """What a run calls the file or folder of this adapter. Raises UsageError for a kind that has no format."""
    if type(adapter) not in FILE_NAMES:
        raise no_format(adapter)
    return FILE_NAMES[type(adapter)]


def no_format(adapter: Adapter) -> UsageError:
    return UsageError(f"{type(adapter).__name__} has no file format; the run's checkpoint holds its tensors")


def save(path: str | Path, adapter: Adapter, provenance: Provenance, unembed_hash: str | None = None) -> None:
    """Writes a file of vectors, or a folder for a LoRA or a tuned lens; whole or not at all.

    unembed_hash: of the model's head, which tuned-lens looks for. Raises UsageError if the format cannot hold this
    adapter.
    """
    path = Path(path)
    if isinstance(adapter, LoRAWeights):
        peft.save(path, adapter, provenance)
    elif isinstance(adapter, TunedLens):
        tuned_lens.save(path, adapter, provenance, unembed_hash)
    elif isinstance(adapter, SteeringVectors):
        _format(path).write(path, adapter, provenance)
    else:
        raise no_format(adapter)


def load_adapter(
    path: str | Path, model: LanguageModel | None = None, allow_other_weights: bool = False
) -> SteeringVectors | LoRAWeights:
    """What `load` gives for a file, and for a folder of PEFT a LoRA, checked in the same way. Raises UsageError for a
    tuned lens, which changes nothing that a model says."""
    path = Path(path)
    _refuse_tuned_lens(path)
    return peft.load(path, model, allow_other_weights) if path.is_dir() else load(path, model, allow_other_weights)


def load_tuned_lens(
    path: str | Path, model: LanguageModel | None = None, allow_other_weights: bool = False
) -> TunedLens:
    """A tuned lens from a folder of tuned-lens or of ours, checked in the same way."""
    return tuned_lens.load(Path(path), model, allow_other_weights)


def is_peft(path: str | Path) -> bool:
    """Whether this is a folder with an adapter of PEFT."""
    return (Path(path) / peft.CONFIG).is_file()


def provenance(path: str | Path) -> Provenance:
    """Which model an adapter that we wrote belongs to. Raises UsageError where the file does not say, and for a tuned
    lens."""
    _refuse_tuned_lens(Path(path))
    return peft.provenance(path) if Path(path).is_dir() else own.provenance(path)


def load(path: str | Path, model: LanguageModel | None = None, allow_other_weights: bool = False) -> SteeringVectors:
    """Vectors from a file, checked against `model` when given.

    Raises UsageError for a missing or damaged file, and for vectors trained on a model of other sizes, or on other
    weights unless `allow_other_weights`. A `.npy` file names no weights: only its shape is checked.
    """
    path = Path(path)
    vectors = _format(path).read(path, model, allow_other_weights)
    if model is not None:
        vectors.check(model)
    return vectors


def _format(path: Path) -> Format:
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} is no format for steering vectors that is known; use {' or '.join(FORMATS)}")
    return FORMATS[path.suffix]


def _refuse_tuned_lens(path: Path) -> None:
    if (path / tuned_lens.TENSORS).exists():
        raise UsageError(
            f"{path} is a tuned lens, nothing that steers; read vectors through it: steerlab lens RUN --stream --tuned "
            f"{path}"
        )
