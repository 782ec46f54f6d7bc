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
from steerlab.interp.answers import Seeds, scored
from steerlab.interp.token_effects import TokenEffects
from steerlab.models import LanguageModel
from steerlab.rollouts import Evaluation
from steerlab.rollouts.statistics import Interval, bootstrap_interval, paired_difference, share_of_gain
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
        asked = replace(
            evaluation,
            sampling=replace(evaluation.sampling, temperature=temperature),
            samples=evaluation.samples if temperature > 0 else 1,
        )
        scores = scored(model, task, {"base": [None], **_variants(sets, seed)}, asked)
        for name, words in (("appended", token), ("appended_other", other)):
            scores |= scored(model, task.opened(words), {name: [None]}, asked)
        rows += _rows(scores, temperature, asked.samples, seed)
    return tables.check(pd.DataFrame(rows).assign(token=token, other=other), "substitution")


def raised_first(effects: TokenEffects) -> tuple[str, str]:
    """The tokens raised and lowered most at the first generated position, which the test is about."""
    first = effects.tokens.loc[(effects.tokens["where"] == "first") & (effects.tokens["rank"] == 0)]
    by_end = first.set_index("end")["token"]
    return str(by_end["raised"]), str(by_end["lowered"])


def _variants(sets: Sequence[SteeringVectors], seed: int) -> dict[str, Seeds]:
    return {
        "steered": sets,
        "random": [made.randomise(torch.Generator().manual_seed(seed + place)) for place, made in enumerate(sets)],
        "first_position": [SteeringVectors(made.vectors, Scope.predicting(0, 1)) for made in sets],
        "later_positions": [SteeringVectors(made.vectors, Scope.predicting(1)) for made in sets],
    }


def _rows(
    scores: Mapping[str, Float[np.ndarray, "seed problem"]], temperature: float, samples: int, seed: int
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    base = np.broadcast_to(scores["base"], scores["steered"].shape)
    for name, found in scores.items():
        whole = np.broadcast_to(found, base.shape)
        interval = bootstrap_interval(found, seed=seed)
        gain = Interval(0.0, 0.0, 0.0) if name == "base" else paired_difference(whole, base, seed=seed)
        share = share_of_gain(whole, [base], scores["steered"], seed=seed)
        rows.append(
            {"condition": name, "temperature": temperature, "metric": f"avg@{samples}"}
            | {"value": interval.value, "low": interval.low, "high": interval.high}
            | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            | {"share": share.value, "share_low": share.low, "share_high": share.high}
            | {"n_problems": found.shape[1], "n_seeds": len(scores["steered"])}
        )
    return rows
