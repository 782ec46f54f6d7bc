"""Claim (2509.06608 §10): where a vector's strength may depend on the token, it concentrates on meaningful parts of the
prompt.

Rank 1 on one block's down-projection, at three depths, three seeds each; the share of Σ|λ| on each segment against its
share of the tokens, with circular shifts as the null, beside adapters trained on random rewards: strength that any
training would put there. Refuted if the question has no more than its share (interval of the mean over seeds and layers
at or below the tokens' share), or no more than with random rewards.

    uv run python analyses/small_vectors/adaptive.py --out runs/small_vectors
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from steerlab import compare, readings
from steerlab.adapters import LoRA, LoRAWeights, formats
from steerlab.execute import adapter_path
from steerlab.models import load
from steerlab.progress import Progress
from steerlab.recipes import rloo
from steerlab.runs import Run
from steerlab.tasks import make
from steerlab.training import Experiment

SEEDS = (0, 1, 2)
CONTROLS = {"trained": "", "random_reward": "random_reward"}


@dataclass(frozen=True)
class Options:
    """out: where runs and tables go. scale: `tiny` is for tests. layers: of which each has an adapter of its own runs.
    lr: of all of them."""

    out: Path
    scale: Literal["tiny", "small"] = "small"
    model: str = "smollm2-135m"
    layers: tuple[int, ...] = (4, 15, 24)
    lr: float = 3e-2


def main(options: Options) -> pd.DataFrame:
    """Prints scores and shares by condition, layer and segment. Returns the shares of every run."""
    tiny = options.scale == "tiny"
    size = {"steps": 1, "prompts": 2, "samples": 4} if tiny else {"steps": 20, "prompts": 8, "samples": 8}
    experiments = {}
    for condition, control in CONTROLS.items():
        for layer in (1,) if tiny else options.layers:
            for seed in (0,) if tiny else SEEDS if condition == "trained" else SEEDS[:1]:
                adapter = LoRA(rank=1, alpha=1.0, targets=("down_proj",), layers=(layer,))
                # a toy model is never right, so nothing but random rewards would move it
                task = make("chain_sum", control="random_reward" if tiny else control)
                experiments[f"{condition}-{layer}-{seed}"] = shortened(
                    rloo(task, options.model, adapter=adapter, lr=options.lr, seed=seed, **size), tiny
                )
    model = load(options.model)
    with Progress() as progress:
        runs = compare.execute_all(experiments, options.out / "adaptive", model=model, reporter=progress)
    parts = []
    for name, run in runs.items():
        condition, _, seed = name.split("-")
        saved = adapter_path(run)
        assert saved is not None
        weights = formats.load_adapter(saved, model)
        assert isinstance(weights, LoRAWeights)
        experiment = experiments[name]
        found = readings.adaptive(model, weights, experiment.source.task, experiment.evaluation, 2 if tiny else 32)
        found.save(Run.open(run.folder))
        steered = run.table("scores").query("condition == 'steered' and metric.str.startswith('avg@')")
        score = float(steered["value"].iloc[0])
        parts.append(found.tables["adaptive_shares"].assign(condition=condition, seed=int(seed), score=score))
    table = pd.concat(parts, ignore_index=True)
    table["preference"] = table["magnitude_share"] / table["token_share"]
    shown = table.groupby(["condition", "layer", "segment"], sort=False)[["score", "token_share", "preference", "p"]]
    print(shown.agg(["mean", "min", "max"]).to_string(float_format="%.3f"))
    return table


def shortened(experiment: Experiment, tiny: bool) -> Experiment:
    """Evaluated without the baselines, which the bank has."""
    evaluation = replace(experiment.evaluation, base=False, greedy=False, shots=0, samples=4, limit=3 if tiny else None)
    return replace(experiment, evaluation=evaluation)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
