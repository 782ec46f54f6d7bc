"""The study behind the defaults: which layers to train, and how fast.

Question: on the quickstart's task, what do one layer and all layers reach at each learning rate, and when do groups
stop giving a signal? The papers tune the rate per layer, rising with depth (2509.06608: 3e-3 at the first layer, 1e-1
at the last of Qwen2.5-Math-7B). Refuted here if one rate is best at every layer.

    uv run python analyses/bias_only/layer_and_rate.py --out runs/layer_and_rate
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from steerlab import compare
from steerlab.models import load
from steerlab.progress import Progress
from steerlab.recipes import rloo
from steerlab.runs import Run
from steerlab.tasks import make

ALL_LAYERS = {"all": (3e-3, 6e-3, 1e-2, 2e-2)}
ONE_LAYER = {"5": (1e-2, 3e-2), "15": (3e-2, 1e-1), "29": (1e-1, 3e-1)}


@dataclass(frozen=True)
class Options:
    """scale: `tiny` is for tests. steps, seeds: per cell. share: (k, n) runs every n-th cell from the k-th in
    this process and prints nothing; run once more without it for the table.
    """

    out: Path
    scale: Literal["tiny", "small"] = "small"
    steps: int = 20
    seeds: int = 1
    model: str = "smollm2-135m"
    share: tuple[int, int] = (0, 1)


def main(options: Options) -> pd.DataFrame:
    """Runs all cells (finished ones are kept) and prints the table."""
    tiny = options.scale == "tiny"
    grid = {"all": (1e-2,), "1": (1e-2,)} if tiny else ALL_LAYERS | ONE_LAYER
    size = {"steps": 2, "prompts": 2, "samples": 2} if tiny else {"steps": options.steps, "prompts": 8, "samples": 8}
    seeds = range(1 if tiny else options.seeds)
    model, experiments = load(options.model), {}
    for layer, rates in grid.items():
        for lr in rates:
            for seed in seeds:
                made = rloo(
                    make("chain_sum"),
                    options.model,
                    layers=None if layer == "all" else (int(layer),),
                    lr=lr,
                    seed=seed,
                    **size,
                )
                shorter = replace(
                    made.evaluation, base=False, greedy=False, shots=0, samples=4, limit=4 if tiny else None
                )
                experiments[f"layer_{layer}-lr_{lr:g}-{seed}"] = replace(made, evaluation=shorter)
    with Progress() as progress:
        runs = compare.execute_all(experiments, options.out, model=model, reporter=progress, share=options.share)
    if options.share[1] > 1:
        return pd.DataFrame()
    names = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in runs))
    cells = {name: [runs[f"{name}-{seed}"] for seed in seeds] for name in names}
    table = compare.scores(cells).query("metric.str.startswith('avg@')")
    signal = {cell: pd.Series([last_signal(run) for run in found]).mean() for cell, found in cells.items()}
    table = table.assign(signal_share=table["cell"].map(signal))
    columns = ["cell", "metric", "value", "low", "high", "n_seeds", "signal_share"]
    print(table[columns].to_string(index=False, float_format="%.3f"))
    return table


def last_signal(run: Run) -> float:
    """Share of groups with a signal, mean of the last five steps."""
    return float(run.table("curve")["signal_share"].tail(5).mean())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
