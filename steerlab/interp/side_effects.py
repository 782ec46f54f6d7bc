"""Side effects: what vectors do to text they were not trained for, and what they gain at equal distance from the base.

On neutral text: perplexity, and both Kullback-Leibler divergences per token between the steered and the base model, on
the same tokens; on a task they were not trained for, avg@k. A text counts by its mean over tokens, and intervals are
over texts; perplexity is the exponential of the mean, and so are the ends of its interval.

Vectors of unequal strength are compared in `at_equal_kl`. Left out: other measures of capability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import Adapter
from steerlab.errors import UsageError
from steerlab.interp.neutral import Neutral
from steerlab.interp.states import check_texts, hidden_under, logits_of
from steerlab.interp.texts import Conditions, Text
from steerlab.models import LanguageModel
from steerlab.rollouts import Condition, Evaluation, evaluate, summarise
from steerlab.rollouts.statistics import Interval, bootstrap_interval
from steerlab.tasks import Task

CHUNK_POSITIONS = 128
QUANTITIES = ("perplexity", "kl_steered_base", "kl_base_steered")
Done = Callable[[str, int], None]
PerText = Float[np.ndarray, "quantity text"]


def side_effects(
    model: LanguageModel,
    conditions: Conditions,
    neutral: Neutral,
    *,
    task: Task | None = None,
    evaluation: Evaluation | None = None,
    seed: int = 0,
    done: Done | None = None,
) -> pd.DataFrame:
    """Table `side_effects` of named conditions (None is the base model). task: one the vectors were not trained on, of
    which `evaluation` says how it is asked; None leaves accuracy out. done: hears of answers.

    Raises UsageError for no condition, or a text of one token, which predicts nothing.
    """
    if not conditions:
        raise UsageError("no conditions to compare; give at least one set of vectors")
    rows = []
    for condition, found in _on_texts(model, conditions, neutral.texts).items():
        for quantity, values in zip(QUANTITIES, found, strict=True):
            told = over_texts(values, seed)
            if quantity == "perplexity":
                told = Interval(*np.exp([told.value, told.low, told.high]).tolist())
            rows.append(_row(condition, quantity, neutral.name, told, len(values)))
    if task is not None:
        asked = evaluation or Evaluation()
        answers = {
            name: Condition(adapter, task, asked.sampling, asked.samples) for name, adapter in conditions.items()
        }
        completions = answered(model, task, asked, answers, done)
        scores = summarise(completions, model=model.name, temperature=asked.sampling.temperature, metrics=("avg@k",))
        for row in scores.to_dict("records"):
            told = Interval(row["value"], row["low"], row["high"])
            rows.append(_row(str(row["condition"]), str(row["metric"]), task.name, told, int(row["n_problems"])))
    return tables.check(pd.DataFrame(rows), "side_effects")


def answered(
    model: LanguageModel, task: Task, evaluation: Evaluation, asked: Mapping[str, Condition], done: Done | None
) -> pd.DataFrame:
    """Completions of the problems of `evaluation` under every condition."""
    return evaluate(
        model,
        evaluation.problems(task),
        asked,
        split=evaluation.split,
        seed=evaluation.seed,
        max_rows=evaluation.max_rows,
        done=done,
    )


def _row(condition: str, quantity: str, on: str, told: Interval, n: int) -> dict[str, object]:
    numbers = {"value": told.value, "low": told.low, "high": told.high, "n": n}
    return {"condition": condition, "quantity": quantity, "measured_on": on, **numbers}


def over_texts(values: Float[np.ndarray, " text"], seed: int = 0) -> Interval:
    """Mean over texts with its interval; one text has none."""
    value = float(values.mean())
    if len(values) == 1:
        return Interval(value, float("nan"), float("nan"))
    # equal on all texts is zero by construction (the base beside itself), so nothing is widened
    return bootstrap_interval(values, seed=seed, bounds=(value, value))


def base_states(model: LanguageModel, texts: Sequence[Text]) -> list[Float[Tensor, "pos d_model"]]:
    """The base model's final states at the tokens that predict another of their text."""
    check_texts(model, texts)
    if any(len(text.tokens) < 2 for text in texts):
        raise UsageError("a text of one token predicts nothing; give longer neutral texts")
    with torch.no_grad():
        return [hidden_under(model, None, text)[:-1] for text in texts]


def _on_texts(model: LanguageModel, conditions: Conditions, texts: Sequence[Text]) -> dict[str, PerText]:
    """Of every condition: negative log-likelihood and both divergences, nats per token, one row each, by text."""
    base = base_states(model, texts)
    parts = [of_text(model, list(conditions.values()), text, own) for text, own in zip(texts, base, strict=True)]
    return {name: np.stack([part[i] for part in parts], axis=1) for i, name in enumerate(conditions)}


@torch.no_grad()
def of_text(
    model: LanguageModel, adapters: Sequence[Adapter | None], text: Text, base: Float[Tensor, "pos d_model"]
) -> Float[np.ndarray, "condition 3"]:
    """The three means over the tokens of one text, for every adapter; the vocabulary is there for a chunk at a time."""
    steered = [base if adapter is None else hidden_under(model, adapter, text)[:-1] for adapter in adapters]
    sums = torch.zeros(len(steered), 3, dtype=torch.float64)
    target = torch.tensor(text.tokens[1:], device=model.device)[:, None]
    for start in range(0, len(base), CHUNK_POSITIONS):
        rows = slice(start, start + CHUNK_POSITIONS)
        p = logits_of(model, base[rows]).log_softmax(-1)
        for i, states in enumerate(steered):
            q = logits_of(model, states[rows]).log_softmax(-1)
            sums[i, 0] -= float(q.gather(1, target[rows]).double().sum())
            sums[i, 1] += float(torch.linalg.vecdot(q.exp(), q - p).clamp(min=0).double().sum())
            sums[i, 2] += float(torch.linalg.vecdot(p.exp(), p - q).clamp(min=0).double().sum())
    return (sums / len(base)).numpy()
