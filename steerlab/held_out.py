"""What a run's own evaluation is, by the kind that its experiment names: answers to a task, or held-out texts.

Each kind says beforehand what would only fail at the end (`check`), and ends in tables and figures (`evaluate`). The
processes of a world share the work, and all of them return the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from steerlab.adapters import Translators, TunedLens
from steerlab.batches import RolloutBatch
from steerlab.errors import UsageError
from steerlab.interp.lens_fit import distances, lens_fit
from steerlab.models import LanguageModel
from steerlab.plots import lens_fit as plot_lens_fit
from steerlab.plots import scores as plot_scores
from steerlab.progress import Reporter
from steerlab.rollouts import Condition, Evaluation, Policy, Sampling, summarise
from steerlab.rollouts import evaluate as evaluate_conditions
from steerlab.rollouts.sampler import stop_tokens
from steerlab.runs import CostLedger, Run
from steerlab.tasks import Problem, Task
from steerlab.tasks import encode as encode_prompt
from steerlab.training import Experiment, HeldOut, Rollouts, Texts
from steerlab.training.sharding import Shards
from steerlab.training.world import ALONE, World


@dataclass(frozen=True)
class Found:
    """tables, figures: by the names under which a run keeps them."""

    tables: dict[str, pd.DataFrame]
    figures: dict[str, go.Figure]

    def save(self, run: Run) -> None:
        """Put everything into a run's folder."""
        for name, table in self.tables.items():
            run.save_table(name, table)
        for name, figure in self.figures.items():
            run.save_figure(name, figure)


@dataclass(frozen=True)
class Kind:
    """check: raises UsageError. evaluate: with the context that must be open while processes work unevenly."""

    check: Callable[[Experiment, LanguageModel], None]
    evaluate: Callable[[Policy, Experiment, Reporter, World, AbstractContextManager[None]], Found]


def check(experiment: Experiment, model: LanguageModel, world: World = ALONE) -> None:
    """Refuse what would only fail later, while nothing is written yet. Raises UsageError."""
    experiment.source.open(Policy(model), experiment.seed, CostLedger(), world)
    KINDS[type(experiment.evaluation)].check(experiment, model)


def evaluate(
    policy: Policy, experiment: Experiment, reporter: Reporter, world: World = ALONE, shards: Shards | None = None
) -> Found:
    """What the experiment's evaluation says of the policy. shards: the model's weights, where they are in pieces."""
    during = contextlib.nullcontext() if shards is None else shards.uneven()
    return KINDS[type(experiment.evaluation)].evaluate(policy, experiment, reporter, world, during)


def check_answers(experiment: Experiment, model: LanguageModel) -> None:
    """No problems, prompts that do not fit, too few examples for the few-shot baseline, groups too small for the
    advantage."""
    source, evaluation, task = experiment.source, experiment.answers, experiment.task
    problems = evaluation.problems(task)
    for condition in evaluation.baselines(task).values():
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


def evaluate_answers(
    policy: Policy, experiment: Experiment, reporter: Reporter, world: World, during: AbstractContextManager[None]
) -> Found:
    """Baselines and steered on the evaluation's problems; tables `completions` and `scores`."""
    task, evaluation, adapter = experiment.task, experiment.answers, policy.adapter
    assert adapter is not None  # it has just been trained
    conditions = {**evaluation.baselines(task), "steered": evaluation.steered(task, adapter)}
    reporter.stage(f"evaluating {', '.join(conditions)}")
    completions, scores = answer(policy.model, task, evaluation, conditions, reporter, world=world, during=during)
    return Found({"completions": completions, "scores": scores}, {"scores": plot_scores.scores(scores)})


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
                    evaluate_conditions(
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


def texts_of(experiment: Experiment) -> tuple[Texts, HeldOut]:
    """Source and evaluation of a run on texts. Raises UsageError for other parts."""
    source, evaluation = experiment.source, experiment.evaluation
    if isinstance(source, Texts) and isinstance(evaluation, HeldOut):
        return source, evaluation
    raise UsageError(f"held-out texts are those of a source of texts, not of {type(source).__name__}; give Texts()")


def check_texts(experiment: Experiment, model: LanguageModel) -> None:
    """No text to hold out, another source than texts, or no lens to read it through."""
    source, evaluation = texts_of(experiment)
    if not isinstance(experiment.adapter, Translators):
        raise UsageError(
            f"held-out texts say nothing of {type(experiment.adapter).__name__}; train Translators(), or use a task"
        )
    evaluation.batch(source, model)


def evaluate_lens(
    policy: Policy, experiment: Experiment, reporter: Reporter, world: World, during: AbstractContextManager[None]
) -> Found:
    """The tuned lens beside the plain one on held-out texts; table `lens_fit`."""
    source, evaluation = texts_of(experiment)
    lens, texts = policy.adapter, evaluation.batch(source, policy.model)
    assert isinstance(lens, TunedLens)  # as `check_texts` has seen
    reporter.stage(f"reading {len(texts)} held-out texts of {source.prose.name} through the plain and the tuned lens")
    mine = texts.select(torch.tensor(world.share(range(len(texts))), dtype=torch.long))
    with during:
        parts = world.gather(distances(policy.model, lens, mine))
    table = lens_fit(np.concatenate(parts, axis=1), lens.layers)
    return Found({"lens_fit": table}, {"lens_fit": plot_lens_fit.lens_fit(table)})


KINDS: dict[type, Kind] = {
    Evaluation: Kind(check_answers, evaluate_answers),
    HeldOut: Kind(check_texts, evaluate_lens),
}
