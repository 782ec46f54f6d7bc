"""Token substitution: is a last-layer vector only a first token? (arXiv 2509.06608 §6)

Beside base and steered, on the same problems and random streams: the base model given the token the vector raises most
as the first of its answer (`appended`), the vector at the one position that predicts that token (`first_position`) and
at all later ones (`later_positions`). Controls: another token given instead, and a random direction of equal length.
Each says which share of the vector's gain it has, sampled and greedy: greedy answers may begin with the token anyway.

The residual test, a vector trained with the token already given, is any recipe on `task.opened(token)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from steerlab import tables
from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.token_effects import TokenEffects
from steerlab.models import LanguageModel
from steerlab.rollouts import Condition, Evaluation, evaluate
from steerlab.rollouts.statistics import bootstrap_interval, paired_difference, problem_scores, share_of_gain
from steerlab.tasks import Task

TEMPERATURES = (1.0, 0.0)


def substitution(
    model: LanguageModel,
    task: Task,
    vectors: SteeringVectors | Sequence[SteeringVectors],
    evaluation: Evaluation,
    token: str,
    other: str,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> pd.DataFrame:
    """Table `substitution`. token: what the base model is given; other: what it is given as a control. vectors: one
    set, or those of several training seeds, which are pooled.

    Raises UsageError for an empty token, or vectors of another scope than all tokens.
    """
    sets = [vectors] if isinstance(vectors, SteeringVectors) else list(vectors)
    if not token or not other:
        raise UsageError("nothing to begin the answers with; name a token and another one as its control")
    if any(made.scope != Scope.all() for made in sets):
        raise UsageError("the vectors act on part of the tokens only; give vectors of token scope all")
    rows = []
    for temperature in temperatures:
        sampling = replace(evaluation.sampling, temperature=temperature)
        samples = evaluation.samples if temperature > 0 else 1
        fixed = {
            "base": (None, task),
            "appended": (None, task.opened(token)),
            "appended_other": (None, task.opened(other)),
        }
        scores = _scores(model, evaluation, {
            name: Condition(adapter, asked, sampling, samples) for name, (adapter, asked) in fixed.items()
        })  # fmt: skip
        of_sets = [
            _scores(model, evaluation, {
                name: Condition(made, task, sampling, samples) for name, made in _variants(one, seed + place).items()
            })
            for place, one in enumerate(sets)
        ]  # fmt: skip
        for name in of_sets[0]:
            scores[name] = np.concatenate([found[name] for found in of_sets])
        rows += _rows(scores, temperature, samples, seed)
    return tables.check(pd.DataFrame(rows).assign(token=token, other=other), "substitution")


def raised_first(effects: TokenEffects) -> tuple[str, str]:
    """The tokens raised and lowered most at the first generated position, which the test is about."""
    first = effects.tokens.loc[(effects.tokens["where"] == "first") & (effects.tokens["rank"] == 0)]
    by_end = first.set_index("end")["token"]
    return str(by_end["raised"]), str(by_end["lowered"])


def _variants(vectors: SteeringVectors, seed: int) -> dict[str, SteeringVectors]:
    return {
        "steered": vectors,
        "random": vectors.randomise(torch.Generator().manual_seed(seed)),
        "first_position": SteeringVectors(vectors.vectors, Scope.predicting(0, 1)),
        "later_positions": SteeringVectors(vectors.vectors, Scope.predicting(1)),
    }


def _scores(
    model: LanguageModel, evaluation: Evaluation, conditions: Mapping[str, Condition]
) -> dict[str, Float[np.ndarray, "1 problem"]]:
    """Share of correct completions of each problem."""
    task = next(iter(conditions.values())).task
    problems = evaluation.problems(task)
    done = evaluate(model, problems, conditions, seed=evaluation.seed, max_rows=evaluation.max_rows)
    return {name: problem_scores(done, name)[1] for name in conditions}


def _rows(
    scores: Mapping[str, Float[np.ndarray, "seed problem"]], temperature: float, samples: int, seed: int
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    base = np.broadcast_to(scores["base"], scores["steered"].shape)
    for name, found in scores.items():
        whole = np.broadcast_to(found, base.shape)
        interval = bootstrap_interval(found, seed=seed)
        gain = paired_difference(whole, base, seed=seed)
        share = share_of_gain(whole, scores["steered"], base, seed=seed)
        missing = float("nan")
        rows.append(
            {"condition": name, "temperature": temperature, "metric": f"avg@{samples}"}
            | {"value": interval.value, "low": interval.low, "high": interval.high}
            | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            | {"share": share.value if share else missing}
            | {"share_low": share.low if share else missing, "share_high": share.high if share else missing}
            | {"n_problems": found.shape[1], "n_seeds": len(scores["steered"])}
        )
    return rows
