"""What a command is about: a run, a file of vectors, or a model alone; brought to a loaded model and its vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from steerlab.adapters import SteeringVectors, formats
from steerlab.adapters.formats import own
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, load
from steerlab.runs import Run
from steerlab.training import Experiment


@dataclass(frozen=True)
class Subject:
    """vectors: None for a model alone. run: None where there is no run folder."""

    model: LanguageModel
    vectors: SteeringVectors | None
    run: Run | None

    @property
    def experiment(self) -> Experiment | None:
        """Of a training run, else None."""
        found = None if self.run is None else self.run.experiment
        return found if isinstance(found, Experiment) else None


def subject(target: str, model: str = "", dtype: str = "auto", allow_other_weights: bool = False) -> Subject:
    """`target`: a run folder, a file of vectors, or "" for the model alone. `model`: a name of `models.load`; by default
    the one the vectors were trained on. Raises UsageError for whatever cannot be had, before loading the model where
    possible.
    """
    if not target:
        if not model:
            raise UsageError("nothing to work on; give a run folder, a file of vectors, or --model NAME")
        return Subject(_load(model, dtype), None, None)
    path = Path(target)
    run = None if path.suffix in formats.FORMATS else Run.open(path)
    vectors_path = path if run is None else run.vectors_path
    if run is not None and not vectors_path.exists():
        raise UsageError(f"{path} has no vectors yet; finish it with: steerlab resume {path}")
    if path.suffix == ".npy":
        if not model:
            raise UsageError(f"{path} does not say which model it belongs to; add --model NAME")
        name = model
    else:
        name = model or own.provenance(vectors_path).model
    if run is not None and dtype == "auto":
        dtype = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}.get(str(run.manifest.get("dtype")), "auto")
    handle = _load(name, dtype)
    return Subject(handle, formats.load(vectors_path, handle, allow_other_weights), run)


def _load(name: str, dtype: str) -> LanguageModel:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    return load(name, dtype=names[dtype]) if dtype in names else load(name, dtype=dtype)  # type: ignore[arg-type]
