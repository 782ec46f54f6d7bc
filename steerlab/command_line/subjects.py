"""What a command is about: a run, a file of vectors, or a model alone; brought to a loaded model and its adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from steerlab import readings
from steerlab.adapters import LoRAWeights, SteeringVectors, TunedLens, formats
from steerlab.errors import UsageError
from steerlab.execute import adapter_path, dtype_of
from steerlab.held_out import answer
from steerlab.interp.texts import Text, of_strings
from steerlab.models import LanguageModel, load
from steerlab.progress import Reporter
from steerlab.rollouts import Evaluation
from steerlab.runs import Run
from steerlab.tasks import Task, make
from steerlab.training import Experiment


@dataclass(frozen=True)
class Subject:
    """adapter: None for a model alone. run: None where there is no run folder."""

    model: LanguageModel
    adapter: SteeringVectors | LoRAWeights | None
    run: Run | None

    @property
    def vectors(self) -> SteeringVectors:
        """What can be read as vectors. Raises UsageError for any other adapter, and for none."""
        if isinstance(self.adapter, SteeringVectors):
            return self.adapter
        raise UsageError(f"{self.adapter or self.model} has no steering vectors to read; give a run that trained some")

    def of_layers(self, layers: Sequence[int] | None) -> SteeringVectors:
        """The vectors, or those of some layers. Raises UsageError as `vectors` does, and for a layer without one."""
        return self.vectors if layers is None else self.vectors.select(layers)

    @property
    def experiment(self) -> Experiment | None:
        """Of a training run, else None."""
        found = None if self.run is None else self.run.experiment
        return found if isinstance(found, Experiment) else None


def subject(target: str, model: str = "", dtype: str = "auto", allow_other_weights: bool = False) -> Subject:
    """`target`: a run folder, a file of vectors, a folder of PEFT, or "" for the model alone. `model`: a name of
    `models.load`; by default the one the adapter was trained on. Raises UsageError for whatever cannot be had.
    """
    if not target:
        if not model:
            raise UsageError("nothing to work on; give a run folder, a file of vectors, or --model NAME")
        return Subject(_load(model, dtype), None, None)
    path = Path(target)
    run = None if path.suffix in formats.FORMATS or formats.is_peft(path) else Run.open(path)
    saved = path if run is None else adapter_path(run)
    if saved is None:
        raise UsageError(f"{path} has no vectors yet; finish it with: steerlab resume {path}")
    if path.suffix == ".npy":
        if not model:
            raise UsageError(f"{path} does not say which model it belongs to; add --model NAME")
        name = model
    else:
        name = model or formats.provenance(saved).model
    handle = load(name, dtype=dtype_of(run)) if run is not None and dtype == "auto" else _load(name, dtype)
    return Subject(handle, formats.load_adapter(saved, handle, allow_other_weights), run)


def vectors_of(target: str, model: LanguageModel, allow_other_weights: bool = False) -> SteeringVectors:
    """The vectors of a run folder or a file, to be read beside others of `model`. Raises UsageError if it has none."""
    path = Path(target)
    saved = path if path.suffix in formats.FORMATS or formats.is_peft(path) else adapter_path(Run.open(path))
    if saved is None:
        raise UsageError(f"{path} has no vectors yet; finish it with: steerlab resume {path}")
    return Subject(model, formats.load_adapter(saved, model, allow_other_weights), None).vectors


def lens_of(target: str, model: LanguageModel, allow_other_weights: bool = False) -> TunedLens:
    """A tuned lens for `model`: of a run that trained one, or a folder as tuned-lens has it. Raises UsageError for
    neither."""
    path = Path(target)
    own = path / formats.FILE_NAMES[TunedLens]
    return formats.load_tuned_lens(own if own.is_dir() else path, model, allow_other_weights)


def _load(name: str, dtype: str) -> LanguageModel:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    return load(name, dtype=names[dtype]) if dtype in names else load(name, dtype=dtype)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Answered:
    """Tables of an evaluation, and the files they were written to."""

    scores: pd.DataFrame
    completions: pd.DataFrame
    written: tuple[Path, ...]


def answer_about(
    about: Subject, task: Task | None, evaluation: Evaluation, seeds: Sequence[int], out: str, reporter: Reporter
) -> Answered:
    """Evaluate a subject on `task` (None: the task of its run), beside its baselines.

    Tables go to `out`, a new folder, as `scores` and `completions`; without `out` to the run's folder, named after the
    task so that the run's own tables stay; with neither they are not written.
    """
    own_task = about.experiment.task if about.experiment else None
    asked = task or own_task
    if asked is None:
        raise UsageError("no task to evaluate on; add --task NAME")
    conditions = evaluation.baselines(asked)
    if about.adapter is not None:
        conditions["steered"] = evaluation.steered(asked, about.adapter)
    described = {"model": about.model.name, "task": asked, "evaluation": evaluation, "seeds": tuple(seeds)}
    run, label = about.run, "@" + re.sub(r"[^A-Za-z0-9_.+-]", "-", Path(asked.name).name)
    if out:
        facts = {"model": about.model.name, "weights_sha256": about.model.weights_sha256, "task": asked.name}
        run, label = Run.create(out, described, kind="evaluation", status="created", **facts), ""
    elif evaluation.split != "test":
        label += f"-{evaluation.split}"
    reporter.stage(f"evaluating {', '.join(conditions)} on {len(evaluation.problems(asked))} problems")
    about.model.tune()
    completions, scores = answer(about.model, asked, evaluation, conditions, reporter, seeds)
    written: list[Path] = []
    if run is not None:
        written = [run.save_table(f"completions{label}", completions), run.save_table(f"scores{label}", scores)]
        if out:
            run.update(status="done")
    return Answered(scores, completions, tuple(written))


def texts_about(about: Subject, prompts: Sequence[str], task: str, problems: int, seed: int) -> list[Text]:
    """The user's own `prompts`, or what the steered model answers to problems of `task` ("": the run's)."""
    if prompts:
        return of_strings(about.model, prompts)
    asked, evaluation = asked_about(about, task)
    return readings.own_texts(about.model, about.vectors, asked, evaluation, problems, seed)


def asked_about(about: Subject, task: str) -> tuple[Task, Evaluation]:
    """The task called `task` ("": the run's), and how the run is evaluated. Raises UsageError for neither."""
    experiment = about.experiment
    evaluation = Evaluation() if experiment is None else experiment.answers
    if task:
        return make(task), evaluation
    if experiment is None:
        raise UsageError("no texts to read; add --task NAME, or --prompt TEXT where the command has it")
    return experiment.task, evaluation


def ids_of(about: Subject, words: Sequence[str]) -> tuple[int, ...]:
    """Token ids of words that are one token each. Raises UsageError for one that is not."""
    found = []
    for word in words:
        ids = about.model.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise UsageError(f"{word!r} is {len(ids)} tokens of {about.model.name}; watch one token at a time")
        found.append(ids[0])
    return tuple(found)
