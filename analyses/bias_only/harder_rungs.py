"""Beyond the quickstart: does the same recipe help where the embedded model can do almost nothing?

Rungs: sums of two two-digit numbers; SVAMP, real one- and two-step word problems. Each with the base model beside it
and with a control trained on random rewards. Verdict per rung: learnable at this scale if the steered interval lies
above both the best base row and the control; elicitation only, if it does not exceed greedy.

    uv run python analyses/bias_only/harder_rungs.py --svamp DATA/svamp --out runs/harder_rungs
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro

from steerlab import compare
from steerlab.models import load
from steerlab.progress import Progress
from steerlab.recipes import rloo
from steerlab.tasks import Task, make


@dataclass(frozen=True)
class Options:
    """scale: `tiny` is for tests. svamp: folder of the data set; without it that rung is left out. seeds: per
    cell. share: (k, n) runs every n-th cell from the k-th in this process and prints nothing; run once more
    without it for the table.
    """

    out: Path
    scale: Literal["tiny", "small"] = "small"
    svamp: Path | None = None
    seeds: int = 1
    steps: int = 24
    prompts: int = 8
    model: str = "smollm2-135m"
    share: tuple[int, int] = (0, 1)


def rungs(options: Options, **control: Any) -> dict[str, tuple[Task, int]]:
    """Task and longest completion (tokens) of each rung."""
    found = {"two_digits": (make("chain_sum", min_digits=2, max_digits=2, train=400, test=100, **control), 24)}
    if options.svamp is not None:
        found["svamp"] = (make("svamp", path=str(options.svamp), train=400, test=100, split=True, **control), 64)
    return found


def main(options: Options) -> pd.DataFrame:
    """Runs all cells (finished ones are kept) and prints the table."""
    tiny = options.scale == "tiny"
    size = {"steps": 2, "prompts": 2, "samples": 2} if tiny else {"steps": options.steps, "prompts": options.prompts}
    seeds = range(1 if tiny else options.seeds)
    model, experiments = load(options.model), {}
    for control in ("", "random_reward"):
        for rung, (task, longest) in rungs(options, control=control).items():
            for seed in seeds:
                made = rloo(task, options.model, seed=seed, max_new_tokens=longest, **size)
                evaluation = replace(made.evaluation, samples=4, limit=4 if tiny else None)
                if control or seed:
                    evaluation = replace(evaluation, base=False, greedy=False, shots=0)
                experiments[f"{rung}{'-' + control if control else ''}-{seed}"] = replace(made, evaluation=evaluation)
    with Progress() as progress:
        runs = compare.execute_all(experiments, options.out, model=model, reporter=progress, share=options.share)
    if options.share[1] > 1:
        return pd.DataFrame()
    names = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in runs))
    cells = {name: [runs[f"{name}-{seed}"] for seed in seeds] for name in names}
    base = [
        runs[f"{rung}-0"].table("scores").query("condition != 'steered'").assign(cell=rung) for rung in rungs(options)
    ]
    table = pd.concat([*base, compare.scores(cells)]).query("metric.str.startswith('avg@')")
    print(
        table[["cell", "condition", "metric", "value", "low", "high", "n_seeds"]].to_string(
            index=False, float_format="%.3f"
        )
    )
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
