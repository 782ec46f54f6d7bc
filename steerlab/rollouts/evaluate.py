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
from steerlab.adapters import RowBank, SteeringVectors
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

    def steered(self, task: Task, vectors: SteeringVectors) -> Condition:
        """The model with `vectors`, sampled."""
        return Condition(vectors, task, self.sampling, self.samples)


@dataclass(frozen=True)
class Condition:
    """One way to answer the problems: with which vectors, from which prompts, how sampled, how often."""

    vectors: SteeringVectors | None
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
        banked = any(m.vectors is not None for m in members)
        policy = Policy(model, RowBank([m.vectors for m in members]) if banked else None)
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
    """Names of conditions that can share a decode batch: equal task, sampling and count, and equal token scope."""
    batches: list[tuple[tuple[object, ...], list[str]]] = []
    for name, condition in conditions.items():
        key = (condition.task, condition.sampling, condition.samples)
        scope = None if condition.vectors is None else condition.vectors.scope
        for other, names in batches:
            scopes = {v.scope for n in names if (v := conditions[n].vectors) is not None}
            if other == key and (scope is None or scopes <= {scope}):
                names.append(name)
                break
        else:
            batches.append((key, [name]))
    return [names for _, names in batches]
