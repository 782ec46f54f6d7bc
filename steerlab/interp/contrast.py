"""Texts of two classes, and the one state per text and layer that a direction is made of.

A contrast comes from pairs of strings, from the right and wrong answers of a `completions` table, or from texts of the
caller's. Every text has a group (its pair, its problem): held-out scores never share one with what was fitted.
Completions are encoded again from their text, so their stop tokens are not among the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters.steering import check_layers
from steerlab.errors import UsageError, unknown
from steerlab.interp.states import check_texts
from steerlab.interp.texts import Text, of_strings
from steerlab.models import LanguageModel, Site
from steerlab.models.hooks import Keep
from steerlab.rollouts import Condition, Evaluation, evaluate
from steerlab.tasks import Task, encode

Position = Literal["last", "mean"]
POSITIONS: tuple[Position, ...] = ("last", "mean")
CHUNK_TEXTS = 32


@dataclass(frozen=True)
class Contrast:
    """groups: of every positive, then of every negative text. paired: text i of one class answers to text i of the
    other."""

    positive: tuple[Text, ...]
    negative: tuple[Text, ...]
    groups: tuple[int, ...]
    paired: bool = False

    def __post_init__(self) -> None:
        for name, part in (("positive", self.positive), ("negative", self.negative)):
            if not part:
                raise UsageError(f"there is no {name} text, so there is no contrast; give at least one of either class")
        if self.paired and len(self.positive) != len(self.negative):
            raise UsageError(f"{len(self.positive)} and {len(self.negative)} texts are no pairs; give equally many")
        if len(self.groups) != len(self.positive) + len(self.negative):
            raise UsageError(f"{len(self.groups)} groups for {len(self.texts)} texts; give one for each")
        ours, theirs = self.groups[: len(self.positive)], self.groups[len(self.positive) :]
        if self.paired and (ours != theirs or len(set(ours)) < len(ours)):
            raise UsageError("the groups of a paired contrast must be its pairs; use of_texts(…, paired=True)")

    @property
    def texts(self) -> tuple[Text, ...]:
        return (*self.positive, *self.negative)


def of_texts(positive: Sequence[Text], negative: Sequence[Text], paired: bool = False) -> Contrast:
    """Texts of the caller's, every one (or every pair) a group of its own."""
    n = len(positive)
    start = 0 if paired else n
    theirs = range(start, start + len(negative))
    return Contrast(tuple(positive), tuple(negative), (*range(n), *theirs), paired)


def of_pairs(model: LanguageModel, pairs: Sequence[tuple[str, str]]) -> Contrast:
    """Pairs of strings, the positive one first. Raises UsageError for none, or a string without tokens."""
    if not pairs:
        raise UsageError("there are no pairs of strings, so there is no contrast; give at least one")
    positive, negative = (of_strings(model, side) for side in zip(*pairs, strict=True))
    return of_texts(positive, negative, paired=True)


def of_completions(model: LanguageModel, task: Task, completions: pd.DataFrame, condition: str = "base") -> Contrast:
    """Right (positive) and wrong answers of one condition of a `completions` table to problems of `task`, asked as
    `task` asks them; empty answers are left out. Raises UsageError unless there are right and wrong ones."""
    tables.check(completions, "completions")
    part = completions.loc[completions["condition"] == condition]
    if part.empty:
        raise unknown("condition of the completions", condition, list(dict.fromkeys(completions["condition"])))
    prompts = {}
    for split in dict.fromkeys(part["split"]):
        for problem in task.problems(split):
            prompts[split, problem.id] = encode(task.prompt(problem), model.tokenizer)
    sides: dict[bool, list[tuple[int, Text]]] = {True: [], False: []}
    for row in part.to_dict("records"):
        problem = int(row["problem"])
        if (row["split"], problem) not in prompts:
            raise UsageError(f"task {task.name} has no problem {problem}; name the task that was answered")
        prompt = prompts[row["split"], problem]
        if answer := model.tokenizer.encode(str(row["text"]), add_special_tokens=False):
            sides[bool(row["correct"])].append((problem, Text((*prompt, *answer), len(prompt))))
    for correct, side in sides.items():
        if not side:
            name = "right" if correct else "wrong"
            raise UsageError(f"none of the {len(part)} answers ({condition}) is {name}; ask more or other problems")
    groups = [problem for side in sides.values() for problem, _ in side]
    right, wrong = (tuple(text for _, text in side) for side in sides.values())
    return Contrast(right, wrong, tuple(groups))


def of_answers(model: LanguageModel, task: Task, evaluation: Evaluation) -> Contrast:
    """Right and wrong answers that the base model gives now, as `evaluation` asks; its split should not be the one on
    which the directions are then tried."""
    asked = {"base": Condition(None, task, evaluation.sampling, evaluation.samples)}
    problems = evaluation.problems(task)
    found = evaluate(model, problems, asked, split=evaluation.split, seed=evaluation.seed, max_rows=evaluation.max_rows)
    return of_completions(model, task, found)


@torch.no_grad()
def class_states(
    model: LanguageModel, texts: Sequence[Text], layers: Sequence[int], position: Position = "last"
) -> dict[int, Float[Tensor, "text d_model"]]:
    """What each of `layers` writes (`resid_post`), one state per text in fp64: at its last token, or the mean over its
    generated tokens. Texts of one length go through the model together; nothing but these states is kept.

    Raises UsageError for an unknown position, a layer the model lacks, or the mean of a text without generated tokens.
    """
    check_texts(model, texts)
    check_layers(layers, model.n_layers)
    if position not in POSITIONS:
        raise unknown("position", position, POSITIONS)
    if position == "mean" and any(len(text.tokens) == text.n_prompt for text in texts):
        raise UsageError("a text has no generated tokens to average over; use position last, or texts with completions")
    states = {layer: torch.zeros(len(texts), model.d_model, dtype=torch.float64) for layer in layers}
    by_length: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        by_length.setdefault(len(text.tokens), []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), CHUNK_TEXTS):
            rows = numbers[start : start + CHUNK_TEXTS]
            first = [texts[i].n_prompt if position == "mean" else len(texts[i].tokens) - 1 for i in rows]

            def keeping(layer: int, rows: list[int] = rows, first: list[int] = first) -> tuple[Site, Keep]:
                def keep(x: Tensor) -> None:
                    means = [row[begin:].double().mean(0) for row, begin in zip(x, first, strict=True)]
                    states[layer][rows] = torch.stack(means).cpu()

                return Site("resid_post", layer), keep

            tokens = torch.tensor([texts[i].tokens for i in rows], device=model.device)
            with model.doors.open((), [keeping(layer) for layer in states]):
                model.hidden(tokens)
    return states
