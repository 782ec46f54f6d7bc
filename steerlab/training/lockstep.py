"""Several runs at the same pace: each has its own trainer, their rollouts are decoded as one batch.

Runs that differ in nothing but their vectors (a sweep over layers) ask for the same completions of the same problems
at every step. Here each row of one decode batch carries its own run's vectors (a row bank), so prompts are read once
up to the first changed block and the batch is wide; judging, update, optimiser, log and checkpoint stay each run's own.

Joined are consecutive experiments of equal model, source and seed that train vectors of one token scope, as long as
their rows together are no more than the source's `max_rows`. It depends on the experiments alone, so the same runs are
joined whatever the number of processes, and after a resume. Joining changes no vector beyond rounding. A sweep that
was killed between two runs' checkpoints of one step lets the runs behind catch up by themselves first, which may again
round otherwise; everywhere else a resume gives the same bytes. A run that fails (its numbers overflow, memory does not
suffice) leaves the group, and the others go on; while it cannot be said which one it is, each goes on by itself.

Left out: joining runs of different seeds or tasks, several processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from steerlab.adapters import RowBank, Steering, SteeringVectors
from steerlab.errors import RunFailed
from steerlab.models import LanguageModel
from steerlab.rollouts import Completions, Policy, Rows
from steerlab.training.experiment import Experiment
from steerlab.training.sources import Drawn, Request, Rollouts, RolloutSource, keepable
from steerlab.training.trainer import StepDone, Trainer


def joined(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """The names of experiments, in order, in groups that `fit_together` may train; by the rule above."""
    groups: list[list[str]] = []
    for name, experiment in experiments.items():
        last = experiments[groups[-1][0]] if groups else None
        if last is not None and _alike(last, experiment) and (len(groups[-1]) + 1) * _rows(experiment) <= _room(last):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _alike(one: Experiment, other: Experiment) -> bool:
    """Whether two runs ask for the same completions, and their vectors fit into one row bank."""
    if not (isinstance(one.adapter, Steering) and isinstance(other.adapter, Steering)):
        return False
    if (one.model, one.dtype, one.seed, one.source) != (other.model, other.dtype, other.seed, other.source):
        return False
    return isinstance(one.source, Rollouts) and one.adapter.scope == other.adapter.scope


def _rows(experiment: Experiment) -> int:
    source = experiment.source
    return source.prompts * source.samples if isinstance(source, Rollouts) else 1


def _room(experiment: Experiment) -> int:
    return experiment.source.max_rows if isinstance(experiment.source, Rollouts) else 1


def fit_together(
    trainers: Sequence[Trainer], on_step: Callable[[StepDone], None] | None = None
) -> list[RunFailed | None]:
    """Train all of one group to the end, each from its own checkpoint; those behind go first. Returns why each could
    not go on (None: it is trained); the others go on without it.

    on_step: hears once of every step of all of them, with the means of their metrics.
    """
    said: list[StepDone] = []
    for trainer in trainers:
        trainer.on_step = said.append
    at = [trainer.begin() for trainer in trainers]
    failed: list[RunFailed | None] = [None] * len(trainers)
    while open_ := [i for i, t in enumerate(trainers) if failed[i] is None and at[i] < t.experiment.steps]:
        step = min(at[i] for i in open_)
        for group in _same_engine(trainers, [i for i in open_ if at[i] == step]):
            for i, failure in zip(group, learn_together([trainers[i] for i in group], step), strict=True):
                at[i], failed[i] = step + 1, failure
        if on_step is not None and said:
            on_step(_mean(said))
        said.clear()
    return failed


def learn_together(trainers: Sequence[Trainer], step: int) -> list[RunFailed | None]:
    """One step of several trainers that have all done the steps before; returns why each could not do it, else None.
    Time spent in common is divided evenly.
    """
    trainers[0].put_in_force()  # how it computes is the model's, which these runs share
    start = time.perf_counter()
    if len(trainers) == 1:
        trainers[0].clock = start
        return [_failure(trainers[0], step, partial(trainers[0].source.next, step))]
    sources = [
        trainer.source for trainer in trainers if isinstance(trainer.source, RolloutSource)
    ]  # as `joined` has it
    requests = _affordable([source.request(step) for source in sources], trainers[0].policy.model)
    try:
        completions = sample_together([trainer.policy for trainer in trainers], requests)
    except RunFailed:  # of which run, each of them alone will tell
        return [failure for trainer in trainers for failure in learn_together([trainer], step)]
    each = (time.perf_counter() - start) / len(trainers)
    failures = []
    for trainer, source, request, answered in zip(trainers, sources, requests, completions, strict=True):
        trainer.clock = time.perf_counter() - each
        trainer.ledger.add(rollout_s=each)
        failures.append(_failure(trainer, step, partial(source.receive, step, request, answered)))
    return failures


def _failure(trainer: Trainer, step: int, draw: Callable[[], Drawn]) -> RunFailed | None:
    """Have a trainer learn from what `draw` gives; returns why it could not."""
    try:
        trainer.learn(step, draw())
    except RunFailed as error:
        return error
    return None


def _affordable(requests: list[Request], model: LanguageModel) -> list[Request]:
    """Requests that keep no hidden states if those of all of them, in one batch, are too many to keep."""
    if keepable(model, sum(len(request.rows) for request in requests), requests[0].sampling):
        return requests
    return [replace(request, keep=False) for request in requests]


def sample_together(policies: Sequence[Policy], requests: Sequence[Request]) -> list[Completions]:
    """What each policy answers to its request, all in one batch. The requests ask for the same rows of the same
    prompts; they may differ in what is to be kept.
    """
    first, n_runs = requests[0], len(requests)
    rows, n = first.rows, len(first.rows)
    wide = Rows(
        rows.prompt.repeat(n_runs),
        rows.problem.repeat(n_runs),
        rows.sample.repeat(n_runs),
        torch.arange(n_runs).repeat_interleave(n),
        None if rows.limit is None else rows.limit.repeat(n_runs),
    )
    vectors = [policy.adapter for policy in policies if isinstance(policy.adapter, SteeringVectors)]
    found = Policy(policies[0].model, RowBank(vectors)).sample(
        first.prompts,
        wide,
        first.sampling,
        seed=first.seed,
        step=first.step,
        max_rows=first.max_rows,
        keep=any(request.keep for request in requests),
    )
    return [_part(found, member, slice(member * n, (member + 1) * n)) for member in range(n_runs)]


def _part(found: Completions, member: int, mine: slice) -> Completions:
    """One member's rows, as if it had been sampled alone."""
    lengths = found.lengths[mine]
    width = int(lengths.max())
    written = None if found.written is None else found.written[mine, : max(width - 1, 1)]
    prompts = {(prompt, 0): states for (prompt, of), states in found.prompt_written.items() if of == member}
    slopes = None if found.slopes is None else found.slopes[mine, :width]
    return Completions(
        found.tokens[mine, :width],
        lengths,
        found.logprobs[mine, :width],
        found.finished[mine],
        written,
        prompts,
        slopes,
    )


def _same_engine(trainers: Sequence[Trainer], now: Sequence[int]) -> list[list[int]]:
    """Of the trainers at places `now`, those together whose runs do their sums in the same way (the size of
    micro-batches is not sampling's business)."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for i in now:
        engine = {name: value for name, value in trainers[i].engine.items() if name != "token_budget"}
        for other, group in groups:
            if other == engine:
                group.append(i)
                break
        else:
            groups.append((engine, [i]))
    return [group for _, group in groups]


def _mean(said: Sequence[StepDone]) -> StepDone:
    """One step of several runs: means, but seconds add up and tokens are counted over all of them."""
    metrics = [done.metrics for done in said]
    names = {name for m in metrics for name in m}
    found = {name: sum(m.get(name, 0.0) for m in metrics) / sum(name in m for m in metrics) for name in sorted(names)}
    wall = sum(m["wall_s"] for m in metrics)
    found["tokens_per_s"] = sum(m["tokens_per_s"] * m["wall_s"] for m in metrics) / wall
    found["wall_s"] = wall
    return StepDone(said[0].step, max(done.steps for done in said), found)
