"""How well many sets of vectors answer the same problems: one score per set, training seed and problem.

All sets use the same random streams, so any two of them are paired. Sets go through row banks, at most `MEMBERS` of
them at a time: completions are judged and forgotten chunk by chunk, so what is held at once are the texts of MEMBERS ×
problems × samples completions (about a kB each), the bank (MEMBERS × its sites × d_model numbers), and, while they are
decoded, keys and values of `Evaluation.max_rows` rows, however many sets there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from steerlab.adapters import Adapter
from steerlab.models import LanguageModel
from steerlab.rollouts import Condition, Evaluation, evaluate
from steerlab.rollouts.evaluate import Done
from steerlab.rollouts.statistics import bootstrap_interval
from steerlab.tasks import Task

MEMBERS = 32
RESAMPLES = 2_000
Seeds = Sequence[Adapter | None]  # one per training seed; None is the base model
Scores = Float[np.ndarray, "_ problems"]  # by training seed (the base model has one) and problem


def scored(
    model: LanguageModel,
    task: Task,
    sets: Mapping[str, Seeds],
    evaluation: Evaluation,
    done: Done | None = None,
    members: int = MEMBERS,
) -> dict[str, Scores]:
    """avg@k of each of `sets`, by seed and problem, on `evaluation`'s problems. done: hears of progress."""
    problems = evaluation.problems(task)
    single = {(name, seed): adapter for name, by_seed in sets.items() for seed, adapter in enumerate(by_seed)}
    keys, found = list(single), {}
    for start in range(0, len(keys), members):
        chunk = {str(n): key for n, key in enumerate(keys[start : start + members])}
        conditions = {
            n: Condition(single[key], task, evaluation.sampling, evaluation.samples) for n, key in chunk.items()
        }
        table = evaluate(
            model,
            problems,
            conditions,
            split=evaluation.split,
            seed=evaluation.seed,
            max_rows=evaluation.max_rows,
        )
        for n, key in chunk.items():
            mine = table.loc[table["condition"] == n].groupby("problem")["correct"].mean()  # problems in order of id
            found[key] = mine.to_numpy(dtype=np.float64)
            if done is not None:
                done(key[0], len(problems) * evaluation.samples)
    return {name: np.stack([found[name, seed] for seed in range(len(of))]) for name, of in sets.items()}


def described(scores: Scores, evaluation: Evaluation) -> dict[str, object]:
    """The columns that say what a score is, with its interval over problems, and over seeds where there are several."""
    interval = bootstrap_interval(scores, resamples=RESAMPLES)
    return {
        "metric": f"avg@{evaluation.samples}",
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n_problems": scores.shape[1],
        "n_samples": evaluation.samples,
        "n_seeds": scores.shape[0],
    }
