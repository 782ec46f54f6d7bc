"""Claim (2505.18706, scaled down): RL on one vector per layer elicits most of what a frozen model can do on a task.

The quickstart's experiment with several training seeds, beside its controls: the base model sampled, greedy and with
four examples; vectors trained on random rewards; vectors trained on rewards for the form of the answer alone.
Refuted if the steered mean over seeds is not at least 0.15 above the best of all of these. Beyond that, because the
wording of examples matters so much, the base model is also given examples that repeat the sum, the best wording found
(it was chosen on the held-out problems, which flatters it).

    uv run python analyses/bias_only/quickstart_seeds.py --out runs/quickstart_seeds
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from steerlab import compare
from steerlab.held_out import answer
from steerlab.models import LanguageModel, load
from steerlab.progress import Progress
from steerlab.recipes import rloo
from steerlab.rollouts import Condition, Evaluation
from steerlab.tasks import make

CONTROLS = ("random_reward", "format_only_reward")


@dataclass(frozen=True)
class Options:
    """scale: `tiny` is for tests. seeds: training seeds of the real reward; controls use the first of them.
    share: (k, n) runs every n-th cell from the k-th in this process and prints nothing; run once more without
    it for the table.
    """

    out: Path
    scale: Literal["tiny", "small"] = "small"
    seeds: int = 5
    model: str = "smollm2-135m"
    share: tuple[int, int] = (0, 1)


def main(options: Options) -> pd.DataFrame:
    """Runs all cells (finished ones are kept) and prints the table."""
    size = {"steps": 2, "prompts": 2, "samples": 2} if options.scale == "tiny" else {}
    limit = 4 if options.scale == "tiny" else None
    model = load(options.model)
    experiments = {}
    for seed in range(options.seeds):
        experiments[f"rloo-{seed}"] = rloo(make("chain_sum"), options.model, seed=seed, **size)
    for control in CONTROLS:
        experiments[f"{control}-0"] = rloo(make("chain_sum", control=control), options.model, seed=0, **size)
    for name, experiment in experiments.items():
        evaluation = replace(experiment.evaluation, limit=limit)
        if name != "rloo-0":  # the base model's answers are the same in every cell
            evaluation = replace(evaluation, base=False, greedy=False, shots=0)
        experiments[name] = replace(experiment, evaluation=evaluation)
    with Progress() as progress:
        runs = compare.execute_all(experiments, options.out, model=model, reporter=progress, share=options.share)
    if options.share[1] > 1:
        return pd.DataFrame()
    wording = few_shot_in_best_wording(experiments["rloo-0"].evaluation, model)
    cells = {cell: [runs[n] for n in runs if n.startswith(f"{cell}-")] for cell in ("rloo", *CONTROLS)}
    per_seed = pd.concat([compare.scores({n: [runs[n]]}) for n in runs if n.startswith("rloo-")])
    base = runs["rloo-0"].table("scores").query("condition != 'steered'")
    table = pd.concat([base, wording, compare.scores(cells), per_seed])
    shown = table[table["metric"].str.startswith("avg@")][
        ["condition", "cell", "metric", "value", "low", "high", "n_seeds"]
    ]
    print(shown.to_string(index=False, float_format="%.3f"))
    return table


def few_shot_in_best_wording(evaluation: Evaluation, model: LanguageModel) -> pd.DataFrame:
    """Scores of the base model, greedy, with four examples answered as "4 + 3 = 7"."""
    task = make("chain_sum", solution="{expression} = {answer}")
    condition = Condition(None, task.few_shot(4, evaluation.seed), replace(evaluation.sampling, temperature=0.0), 1)
    return answer(model, task, evaluation, {"few_shot_equation": condition})[1]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
