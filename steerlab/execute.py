"""One experiment from start to report: train, evaluate beside the baselines, read the vectors, write the page.

A run that stopped at any point goes on from there with `resume`; a finished one is left as it is. Every stage writes
into the run's folder and nowhere else.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd
import torch

from steerlab import tables
from steerlab.adapters import SteeringVectors, formats
from steerlab.batches import RolloutBatch
from steerlab.errors import UsageError
from steerlab.interp.geometry import cosine_matrix, norms, singular_values, stable_rank
from steerlab.interp.logit_lens import logit_lens
from steerlab.models import LanguageModel, load
from steerlab.plots import geometry as plot_geometry
from steerlab.plots import logit_lens as plot_lens
from steerlab.plots import scores as plot_scores
from steerlab.plots import training as plot_training
from steerlab.report import from_run
from steerlab.rollouts import Condition, Evaluation, Policy, Rows, Sampling, evaluate, summarise
from steerlab.rollouts.sampler import stop_tokens
from steerlab.runs import CostLedger, Run, atomic_write, encode
from steerlab.tasks import Problem, Task
from steerlab.tasks import encode as encode_prompt
from steerlab.training import Experiment, Rollouts, StepDone, Trainer

TIMINGS = ("tokens_per_s", "wall_s", "time")


@runtime_checkable
class Reporter(Protocol):
    """Hears what a run is doing; decides nothing."""

    def stage(self, text: str) -> None: ...

    def step(self, done: StepDone) -> None: ...

    def answered(self, condition: str, completions: int) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str) -> None: ...

    def step(self, done: StepDone) -> None: ...

    def answered(self, condition: str, completions: int) -> None: ...


def execute(
    experiment: Experiment, folder: str | Path, *, model: LanguageModel | None = None, reporter: Reporter | None = None
) -> Run:
    """Run `experiment` in `folder`, or go on with it if it is already there. `model` saves loading it again.

    Raises UsageError for bad input before anything is written, RunFailed if training cannot go on.
    """
    reporter = reporter or Silent()
    reporter.stage(f"loading {experiment.model}")
    model = model or load(experiment.model, dtype=experiment.dtype)
    adapter = experiment.adapter.init(model)
    check(experiment, model)
    run = begin(experiment, folder, model)
    if run.manifest["status"] == "done":
        return run
    same_machine(run, model)
    run.update(status="training")
    trainer = Trainer(experiment, Policy(model, adapter), run, reporter.step)
    reporter.stage(f"training {adapter.n_parameters:,} parameters for {experiment.steps} steps")
    trainer.fit()
    save_vectors(run, model, experiment, adapter)
    run.update(status="evaluating")
    with trainer.ledger.time("evaluate_s"):
        evaluate_run(run, model, experiment, adapter, reporter)
    trainer.ledger.peak_memory_bytes = peak_memory_bytes()
    run.update(cost=trainer.ledger.to_dict())
    reporter.stage("reading the vectors")
    read_vectors(run, model, adapter)
    write_report(run)
    run.update(status="done")
    return run


def resume(folder: str | Path, *, model: LanguageModel | None = None, reporter: Reporter | None = None) -> Run:
    """Go on with the run in `folder` in its own dtype and threads. A finished run is returned as it is."""
    run = Run.open(folder)
    experiment = training_of(run)
    if run.manifest["status"] == "done":
        return run
    torch.set_num_threads(run.manifest["threads"])
    model = model or load(experiment.model, dtype=dtype_of(run))
    return execute(experiment, folder, model=model, reporter=reporter)


def dtype_of(run: Run) -> torch.dtype:
    """The dtype that the run's model was in, as its manifest names it."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    return known[run.manifest["dtype"]]


def training_of(run: Run) -> Experiment:
    """The experiment of a training run. Raises UsageError for a folder that holds only an evaluation."""
    found = run.experiment
    if not isinstance(found, Experiment):
        raise UsageError(f"{run.folder} holds an evaluation, not a training run; give the folder of a training run")
    return found


def check(experiment: Experiment, model: LanguageModel) -> None:
    """Refuse what would only fail later, while nothing is written yet: no problems, prompts that do not fit, too few
    examples for the few-shot baseline, groups too small for the advantage. Raises UsageError.
    """
    source, evaluation = experiment.source, experiment.evaluation
    source.open(Policy(model), experiment.seed, CostLedger())
    problems = evaluation.problems(source.task)
    for condition in evaluation.baselines(source.task).values():
        refuse_long(model, condition.task, problems, condition.sampling)
    if isinstance(source, Rollouts):
        for name, value in (("prompts", source.prompts), ("samples", source.samples), ("max_rows", source.max_rows)):
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        refuse_long(model, source.task, source.task.problems("train"), source.sampling)
        experiment.objective.prepare(one_group(source.samples))


def refuse_long(model: LanguageModel, task: Task, problems: Sequence[Problem], sampling: Sampling) -> None:
    """UsageError if a prompt with its completion exceeds the context, or a stop text is no single token."""
    stop_tokens(model, sampling)
    for problem in problems:
        n_tokens = len(encode_prompt(task.prompt(problem), model.tokenizer))
        if n_tokens + sampling.max_new_tokens > model.context:
            raise UsageError(
                f"problem {problem.id} of {task.name} has {n_tokens} prompt tokens, with {sampling.max_new_tokens} new "
                f"ones more than the context of {model.name} ({model.context}); lower max_new_tokens or leave it out"
            )


def one_group(samples: int) -> RolloutBatch:
    """A batch of one prompt and `samples` completions of one token: what an objective says of it holds for all."""
    column = torch.zeros(samples, 1)
    return RolloutBatch(
        prompts=((0,),),
        group=torch.zeros(samples, dtype=torch.long),
        completions=column.long(),
        lengths=torch.ones(samples, dtype=torch.long),
        logprobs=column,
        rewards=torch.arange(samples) % 2.0,
        correct=torch.zeros(samples, dtype=torch.bool),
    )


def begin(experiment: Experiment, folder: str | Path, model: LanguageModel) -> Run:
    """The run's folder, new or found again. A folder that could not be begun is not left behind empty."""
    there = Path(folder).exists()
    try:
        return Run.create(
            folder,
            experiment,
            model=model.name,
            weights_sha256=model.weights_sha256,
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            seed=experiment.seed,
            recipe=experiment.recipe,
            task=experiment.source.task.name,
            status="created",
        )
    except UsageError:
        if not there:
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        raise


def same_machine(run: Run, model: LanguageModel) -> None:
    """Refuse to go on with a run under another dtype, thread count or other weights: the bytes would differ."""
    now = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "weights_sha256": model.weights_sha256,
    }
    for name, value in now.items():
        if run.manifest[name] != value:
            raise UsageError(
                f"{run.folder} was begun with {name} {run.manifest[name]}, now it is {value}; "
                "use `steerlab resume`, which restores it, or choose a new folder"
            )


def save_vectors(run: Run, model: LanguageModel, experiment: Experiment, vectors: SteeringVectors) -> None:
    """vectors.safetensors with its provenance."""
    reward = str(encode(experiment.source.task).get("rewards", experiment.source.task.name))
    origin = formats.Provenance.of(model, recipe=experiment.recipe, reward=reward, seed=experiment.seed)
    formats.save(run.vectors_path, vectors, origin)


def load_vectors(run: Run, model: LanguageModel | None = None, allow_other_weights: bool = False) -> SteeringVectors:
    """The vectors of a run, checked against `model` when given."""
    return formats.load(run.vectors_path, model, allow_other_weights)


def evaluate_run(
    run: Run, model: LanguageModel, experiment: Experiment, vectors: SteeringVectors, reporter: Reporter
) -> pd.DataFrame:
    """Baselines and steered on the evaluation's problems; tables `completions` and `scores`. Returns the scores."""
    task, evaluation = experiment.source.task, experiment.evaluation
    conditions = {**evaluation.baselines(task), "steered": evaluation.steered(task, vectors)}
    reporter.stage(f"evaluating {', '.join(conditions)}")
    completions, scores = answer(model, task, evaluation, conditions, reporter)
    run.save_table("completions", completions)
    run.save_table("scores", scores)
    run.save_figure("scores", plot_scores.scores(scores))
    return scores


def answer(
    model: LanguageModel,
    task: Task,
    evaluation: Evaluation,
    conditions: dict[str, Condition],
    reporter: Reporter | None = None,
    seeds: Sequence[int] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables `completions` and `scores` of the given conditions, under one or several seeds (none: the evaluation's).

    Greedy conditions say the same under every seed and are asked once.
    """
    parts = []
    for place, seed in enumerate(seeds or (evaluation.seed,)):
        asked = {name: c for name, c in conditions.items() if place == 0 or c.sampling.temperature > 0}
        if asked:
            parts.append(
                evaluate(
                    model,
                    evaluation.problems(task),
                    asked,
                    split=evaluation.split,
                    seed=seed,
                    max_rows=evaluation.max_rows,
                    done=None if reporter is None else reporter.answered,
                )
            )
    completions = pd.concat(parts, ignore_index=True)
    heat = {name: condition.sampling.temperature for name, condition in conditions.items()}
    return completions, summarise(completions, model=model.name, temperature=heat)


def read_vectors(run: Run, model: LanguageModel, vectors: SteeringVectors) -> None:
    """Learning curve, norms, cosines, singular values and the logit lens, as tables and figures."""
    curve = run.metrics().drop(columns=list(TIMINGS), errors="ignore")
    lens = logit_lens(vectors, model.unembedding.weight, model.tokenizer)
    found = {
        "curve": curve,
        "norms": norms(vectors),
        "cosines": cosine_matrix(vectors),
        "singular_values": singular_values(vectors),
        "stable_rank": stable_rank(vectors),
        "logit_lens": lens,
    }
    for name, table in found.items():
        run.save_table(name, tables.check(table, name))
    run.save_figure("learning_curve", plot_training.learning_curve(curve))
    run.save_figure("norms", plot_geometry.norms(found["norms"]))
    run.save_figure("cosines", plot_geometry.cosines(found["cosines"]))
    if len(lens):
        run.save_figure("logit_lens", plot_lens.logit_lens(lens))


def write_report(run: Run) -> Path:
    """report.html of a run from what its folder holds. Returns the path."""
    path = run.path("report.html")
    atomic_write(path, from_run(run))
    return path


def generate(
    model: LanguageModel,
    vectors: SteeringVectors | None,
    prompt: list[int],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
) -> list[str]:
    """Completions of one tokenised prompt, with or without vectors."""
    out = Policy(model, vectors).sample([prompt], Rows.grid([0], samples), sampling, seed=seed)
    tokens = [out.tokens[i, : out.lengths[i]].tolist() for i in range(samples)]
    return model.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
