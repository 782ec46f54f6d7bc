"""One experiment from start to report: train, evaluate beside the baselines, read the vectors, write the page.

A run that stopped at any point goes on from there with `resume`; a finished one is left as it is. Every stage writes
into the run's folder and nowhere else. Started by `torchrun` or `accelerate launch`, several processes share the
rollouts, the gradients and the evaluation; the first of them writes the run and speaks.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd
import torch

from steerlab import tables
from steerlab.adapters import Adapter, SteeringVectors, formats
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
from steerlab.training.sharding import ShardedPolicy, Shards
from steerlab.training.world import ALONE, World

OF_THE_MACHINE = ("tokens_per_s", "wall_s", "time", "token_budget")


@runtime_checkable
class Reporter(Protocol):
    """Hears what a run is doing; decides nothing."""

    def stage(self, text: str) -> None: ...

    def step(self, done: StepDone) -> None: ...

    def notice(self, text: str) -> None: ...

    def answered(self, condition: str, completions: int) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str) -> None: ...

    def step(self, done: StepDone) -> None: ...

    def notice(self, text: str) -> None: ...

    def answered(self, condition: str, completions: int) -> None: ...


def execute(
    experiment: Experiment,
    folder: str | Path,
    *,
    model: LanguageModel | None = None,
    reporter: Reporter | None = None,
    shard: bool = False,
) -> Run:
    """Run `experiment` in `folder`, or go on with it if it is already there. `model` saves loading it again.

    shard: each of several processes keeps a share of the frozen weights (see `training/sharding.py`); the model's
    blocks stay in pieces afterwards. Raises UsageError for bad input before anything is written, RunFailed if
    training cannot go on.
    """
    world = World.from_environment()
    with world.together():
        heard = reporter if reporter and world.leads else Silent()
        return execute_in(world, experiment, folder, model, heard, shard)


def execute_in(
    world: World,
    experiment: Experiment,
    folder: str | Path,
    model: LanguageModel | None,
    reporter: Reporter,
    shard: bool,
) -> Run:
    """`execute` as one process of a world; they all return when the leader has written the report."""
    reporter.stage(f"loading {experiment.model}")
    model = model or world.leader_first(lambda: load(experiment.model, dtype=experiment.dtype))
    adapter = experiment.adapter.init(model, torch.Generator().manual_seed(experiment.seed))
    formats.file_name(adapter)  # one that could not be saved is refused before it is trained
    check(experiment, model, world)
    shards = Shards(model, world) if shard else None
    run = world.from_leader(lambda: begin(experiment, folder, model))
    if run.manifest["status"] == "done":
        return run
    same_machine(run, model)
    if world.leads:
        run.update(status="training")
    policy = Policy(model, adapter) if shards is None else ShardedPolicy(shards, adapter)
    trainer = Trainer(experiment, policy, run, reporter.step, CostLedger(), world, reporter.notice, shards)
    reporter.stage(f"training {adapter.n_parameters:,} parameters for {experiment.steps} steps")
    trainer.fit()
    if world.leads:
        save_adapter(run, model, experiment, adapter)
        run.update(status="evaluating")
    with trainer.ledger.time("evaluate_s"):
        evaluate_run(run, policy, experiment, reporter, world, shards)
    return world.from_leader(lambda: finish(run, model, adapter, trainer.ledger, reporter))


def finish(run: Run, model: LanguageModel, adapter: Adapter, ledger: CostLedger, reporter: Reporter) -> Run:
    """What is left once a run is trained and evaluated: its cost, its readings, its page. Returns the run, done."""
    ledger.peak_memory_bytes = peak_memory_bytes()
    run.update(cost=ledger.to_dict())
    reporter.stage("reading the vectors")
    read_run(run, model, adapter)
    write_report(run)
    run.update(status="done")
    return run


def resume(
    folder: str | Path,
    *,
    model: LanguageModel | None = None,
    reporter: Reporter | None = None,
    shard: bool = False,
) -> Run:
    """Go on with the run in `folder` in its own dtype and threads. A finished run is returned as it is.

    The number of processes, and whether they keep shares of the weights, may be other than before.
    """
    world = World.from_environment()
    with world.together():
        run = world.from_leader(lambda: Run.open(folder))
        experiment = training_of(run)
        if run.manifest["status"] == "done":
            return run
        torch.set_num_threads(run.manifest["threads"])
        model = model or world.leader_first(lambda: load(experiment.model, dtype=dtype_of(run)))
        heard = reporter if reporter and world.leads else Silent()
        return execute_in(world, experiment, folder, model, heard, shard)


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


def check(experiment: Experiment, model: LanguageModel, world: World = ALONE) -> None:
    """Refuse what would only fail later, while nothing is written yet: no problems, prompts that do not fit, too few
    examples for the few-shot baseline, groups too small for the advantage. Raises UsageError.
    """
    source, evaluation = experiment.source, experiment.evaluation
    source.open(Policy(model), experiment.seed, CostLedger(), world)
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


def begin(experiment: Experiment, folder: str | Path, model: LanguageModel, stored: object = None) -> Run:
    """The run's folder, new or found again. A folder that could not be begun is not left behind empty.

    stored: what the manifest keeps in place of the experiment, where that is part of something larger.
    """
    there = Path(folder).exists()
    try:
        return Run.create(
            folder,
            experiment if stored is None else stored,
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


def lay_out(experiments: Mapping[str, Experiment], folder: str | Path, model: LanguageModel) -> dict[str, Run]:
    """The run folders of several experiments below `folder`, new or found again, and how their work is done: decided
    here, so that nothing depends on which process or machine then does which of them. How matrix products are done is
    measured once for all; micro-batches are each experiment's own.
    """
    runs: dict[str, Run] = {}
    for name, experiment in experiments.items():
        run = begin(experiment, Path(folder) / name, model)
        if run.manifest["status"] != "done":
            same_machine(run, model)
        if "engine" not in run.manifest:
            adapter = experiment.adapter.init(model, torch.Generator().manual_seed(experiment.seed))
            first = next(iter(runs.values()), run)
            Trainer(experiment, Policy(model, adapter), run).settle(like=first.manifest.get("engine"))
        runs[name] = run
    return runs


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


def save_adapter(run: Run, model: LanguageModel, experiment: Experiment, adapter: Adapter) -> None:
    """What was trained, with its provenance: vectors.safetensors, or the folder adapter/ of a LoRA."""
    reward = str(encode(experiment.source.task).get("rewards", experiment.source.task.name))
    origin = formats.Provenance.of(model, recipe=experiment.recipe, reward=reward, seed=experiment.seed)
    formats.save(run.path(formats.file_name(adapter)), adapter, origin)


def adapter_path(run: Run) -> Path | None:
    """Where the run saved what it trained; None before it has."""
    places = (run.path(name) for name in formats.FILE_NAMES.values())
    return next((place for place in places if place.exists()), None)


def evaluate_run(
    run: Run, policy: Policy, experiment: Experiment, reporter: Reporter, world: World, shards: Shards | None
) -> None:
    """Baselines and steered on the evaluation's problems; tables `completions` and `scores`, written by the leader."""
    task, evaluation, adapter = experiment.source.task, experiment.evaluation, policy.adapter
    assert adapter is not None  # it has just been trained
    uneven = contextlib.nullcontext() if shards is None else shards.uneven()
    conditions = {**evaluation.baselines(task), "steered": evaluation.steered(task, adapter)}
    reporter.stage(f"evaluating {', '.join(conditions)}")
    completions, scores = answer(policy.model, task, evaluation, conditions, reporter, world=world, during=uneven)
    if world.leads:
        run.save_table("completions", completions)
        run.save_table("scores", scores)
        run.save_figure("scores", plot_scores.scores(scores))


def answer(
    model: LanguageModel,
    task: Task,
    evaluation: Evaluation,
    conditions: dict[str, Condition],
    reporter: Reporter | None = None,
    seeds: Sequence[int] = (),
    world: World = ALONE,
    during: AbstractContextManager[None] = contextlib.nullcontext(),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables `completions` and `scores` of the given conditions, under one or several seeds (none: the evaluation's).

    Greedy conditions say the same under every seed and are asked once. The processes of a world share the problems,
    and all of them return the whole tables; `during` is open while they answer.
    """
    parts: list[pd.DataFrame] = []
    problems = world.share(evaluation.problems(task))
    with during:
        for place, seed in enumerate(seeds or (evaluation.seed,)):
            asked = {name: c for name, c in conditions.items() if place == 0 or c.sampling.temperature > 0}
            if asked and problems:
                parts.append(
                    evaluate(
                        model,
                        problems,
                        asked,
                        split=evaluation.split,
                        seed=seed,
                        max_rows=evaluation.max_rows,
                        done=None if reporter is None else reporter.answered,
                    )
                )
    completions = pd.concat([table for part in world.gather(parts) for table in part], ignore_index=True)
    heat = {name: condition.sampling.temperature for name, condition in conditions.items()}
    return completions, summarise(completions, model=model.name, temperature=heat)


def read_run(run: Run, model: LanguageModel, adapter: Adapter) -> None:
    """The learning curve and, of an adapter that is made of vectors, what they say; as tables and figures."""
    curve = tables.check(run.metrics().drop(columns=list(OF_THE_MACHINE), errors="ignore"), "curve")
    run.save_table("curve", curve)
    run.save_figure("learning_curve", plot_training.learning_curve(curve))
    if isinstance(adapter, SteeringVectors):
        read_vectors(run, model, adapter)


def read_vectors(run: Run, model: LanguageModel, vectors: SteeringVectors) -> None:
    """Norms, cosines, singular values and the logit lens."""
    lens = logit_lens(vectors, model.unembedding.weight, model.tokenizer)
    found = {
        "norms": norms(vectors),
        "cosines": cosine_matrix(vectors),
        "singular_values": singular_values(vectors),
        "stable_rank": stable_rank(vectors),
        "logit_lens": lens,
    }
    for name, table in found.items():
        run.save_table(name, tables.check(table, name))
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
    adapter: Adapter | None,
    prompt: list[int],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
) -> list[str]:
    """Completions of one tokenised prompt, with or without an adapter."""
    out = Policy(model, adapter).sample([prompt], Rows.grid([0], samples), sampling, seed=seed)
    tokens = [out.tokens[i, : out.lengths[i]].tolist() for i in range(samples)]
    return model.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
