"""Held-out evaluation: base and steered side by side, in one decode batch where their prompts and sampling agree.

Every condition answers the same problems with the same random streams, so differences between conditions are paired.
Greedy and few-shot runs of the base model stand beside the sampled ones, because much of what training gains at first
is elicitation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from steerlab import tables
from steerlab.adapters import Adapter, RowBank, SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.rollouts.policy import Policy
from steerlab.rollouts.sampler import Rows
from steerlab.rollouts.sampling import Sampling
from steerlab.runs import give_back_memory
from steerlab.tasks import Problem, Task, encode

Done = Callable[[str, int], None]


@dataclass(frozen=True)
class Evaluation:
    """How a run is evaluated. samples: completions per problem at `sampling`. base, greedy: also the base model,
    sampled and its most likely answers. shots: solved examples for the few-shot baseline (0 leaves it out). limit:
    first so many problems, None for all. max_rows: completions decoded at once."""

    split: Literal["train", "test"] = "test"
    samples: int = 8
    sampling: Sampling = Sampling()
    seed: int = 1_000
    base: bool = True
    greedy: bool = True
    shots: int = 4
    limit: int | None = None
    max_rows: int = 256

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("max_rows", self.max_rows), ("limit", self.limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; evaluation needs at least 1")
        if self.shots < 0:
            raise UsageError(f"shots is {self.shots}; it must be 0 (no few-shot baseline) or more")

    def problems(self, task: Task) -> list[Problem]:
        """The problems to answer. Raises UsageError if the split is empty."""
        found = task.problems(self.split)[: self.limit]
        if not found:
            raise UsageError(f"task {task.name} has no {self.split} problems; give it a larger {self.split} size")
        return found

    def baselines(self, task: Task) -> dict[str, Condition]:
        """The base model sampled, greedy and with examples, as conditions."""
        once = replace(self.sampling, temperature=0.0)
        found = {}
        if self.base:
            found["base"] = Condition(None, task, self.sampling, self.samples)
        if self.greedy:
            found["greedy"] = Condition(None, task, once, 1)
        if self.shots:
            found["few_shot"] = Condition(None, task.few_shot(self.shots, self.seed), once, 1)
        return found

    def steered(self, task: Task, adapter: Adapter) -> Condition:
        """The model with `adapter`, sampled."""
        return Condition(adapter, task, self.sampling, self.samples)


@dataclass(frozen=True)
class Condition:
    """One way to answer the problems: with which adapter (None: the base model), from which prompts, how sampled, how
    often."""

    adapter: Adapter | None
    task: Task
    sampling: Sampling
    samples: int


def evaluate(
    model: LanguageModel,
    problems: Sequence[Problem],
    conditions: Mapping[str, Condition],
    *,
    split: str = "test",
    seed: int = 0,
    max_rows: int = 256,
    done: Done | None = None,
) -> pd.DataFrame:
    """Every condition's completions of `problems`, judged: a `completions` table. `done(name, n)` hears of progress."""
    frames = []
    for names in _together(conditions):
        members = [conditions[name] for name in names]
        first = members[0]
        prompts = [encode(first.task.prompt(p), model.tokenizer) for p in problems]
        rows = Rows.grid([p.id for p in problems], first.samples, len(members))
        policy = Policy(model, _joined([m.adapter for m in members]))
        out = policy.sample(prompts, rows, first.sampling, seed=seed, max_rows=max_rows)
        texts = model.tokenizer.batch_decode(
            [out.tokens[i, : out.lengths[i]].tolist() for i in range(len(rows))], skip_special_tokens=True
        )
        asked = [problems[i] for i in rows.prompt.tolist()]
        judged = first.task.judge(asked, texts)
        give_back_memory()
        frames.append(
            pd.DataFrame(
                {
                    "task": first.task.name,
                    "split": split,
                    "condition": [names[m] for m in rows.member.tolist()],
                    "temperature": first.sampling.temperature,
                    "seed": seed,
                    "problem": [p.id for p in asked],
                    "sample": rows.sample.numpy(),
                    "question": [p.question for p in asked],
                    "answer": [p.answer for p in asked],
                    "text": texts,
                    "extracted": [j.extracted for j in judged],
                    "reward": [float(j.reward) for j in judged],
                    "correct": [bool(j.correct) for j in judged],
                    "n_tokens": out.lengths.numpy(),
                    "finished": out.finished.numpy(),
                }
            )
        )
        for name in names:
            if done is not None:
                done(name, len(rows) // len(names))
    table = pd.concat(frames, ignore_index=True)
    tables.check(table, "completions")
    return table


def _together(conditions: Mapping[str, Condition]) -> list[list[str]]:
    """Names of conditions that can share a decode batch: equal task, sampling, count; adapters that can be banked."""
    batches: list[tuple[tuple[object, ...], list[str]]] = []
    for name, condition in conditions.items():
        key = (condition.task, condition.sampling, condition.samples)
        for other, names in batches:
            if other == key and _bankable([conditions[n].adapter for n in (*names, name)]):
                names.append(name)
                break
        else:
            batches.append((key, [name]))
    return [names for _, names in batches]


def _bankable(adapters: Sequence[Adapter | None]) -> bool:
    """Whether every row of one batch can have its own: steering vectors of one token scope, or nothing."""
    if any(not (adapter is None or isinstance(adapter, SteeringVectors)) for adapter in adapters):
        return False
    return len({adapter.scope for adapter in adapters if isinstance(adapter, SteeringVectors)}) <= 1


def _joined(adapters: Sequence[Adapter | None]) -> Adapter | None:
    """One adapter for a whole batch: a row bank of vectors, or the only adapter of another kind."""
    if all(adapter is None for adapter in adapters):
        return None
    vectors = [adapter for adapter in adapters if adapter is None or isinstance(adapter, SteeringVectors)]
    return RowBank(vectors) if len(vectors) == len(adapters) else adapters[0]
