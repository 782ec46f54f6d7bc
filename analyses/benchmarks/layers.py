"""What an RL step costs, by which layers are trained, against what arithmetic says.

Workload W, steering vectors at one layer ℓ or at all, steps in turns (rl_step.py). With F one forward through the L
blocks and h the head's share of it, an update whose lowest trained layer is ℓ takes (L−ℓ−1)/L·2F + 2hF (DESIGN §7):
nothing runs below block ℓ+1. `predicted` is that, with h counted on the tokens that the head is applied to (completion
tokens; blocks also read prompts); `predicted_f` the same as DESIGN's table has it, h being the head's weights ÷ the
blocks'. Both are given relative to the case `all`, as is the measured update; ratio = measured ÷ predicted, turn by
turn. The whole step's prediction is a rollout as measured for `all` plus the predicted update. Claim: the update is
within 25 % of the prediction.

    uv run python analyses/benchmarks/layers.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import limit
import torch
import tyro
import workload
from rl_step import make_step
from workload import MIB, Scale, StepInfo

COLUMNS = (
    *("dtype", "case", "update_f", "update_s", "share_of_all", "predicted", "deviation", "spread"),
    *("ours", "step_share_of_all", "step_predicted", "step_deviation"),
)


@dataclass(frozen=True)
class Options:
    """layers: each trained alone; `all` is always measured beside them."""

    out: Path | None = None
    scale: Scale = "small"
    dtypes: tuple[Literal["bf16", "fp32"], ...] = ("bf16",)
    layers: tuple[int, ...] = (0, 7, 15, 22, 29)
    repeats: int = 5
    threads: int = 2


def update_in_f(n_layers: int, lowest: int, head_share: float) -> float:
    """Cost of an update in forward passes through the blocks."""
    return 2 * (n_layers - lowest - 1) / n_layers + 2 * head_share


def row(case: str, turns: list[dict[str, StepInfo]], counted: float, table: float, alls: tuple[float, float]) -> dict:
    """One row. counted, table: predicted cost in F, and alls the same of the case `all`."""
    update = [turn[case].update_s / turn["all"].update_s for turn in turns]
    whole = [turn[case].wall_s / turn["all"].wall_s for turn in turns]
    predicted = counted / alls[0]
    expected = statistics.median(
        (turn["all"].rollout_s + predicted * turn["all"].update_s) / turn["all"].wall_s for turn in turns
    )

    def middle(name: str) -> float:
        return statistics.median(getattr(turn[case], name) for turn in turns)

    return {
        "case": case,
        "ratio": statistics.median(update) / predicted,
        "spread": [min(update) / predicted, max(update) / predicted],
        "update_f": table,
        "share_of_all": statistics.median(update),
        "predicted": predicted,
        "predicted_f": table / alls[1],
        "deviation": _percent(statistics.median(update) / predicted),
        "deviation_f": _percent(statistics.median(update) / (table / alls[1])),
        "step_share_of_all": statistics.median(whole),
        "step_predicted": expected,
        "step_deviation": _percent(statistics.median(whole) / expected),
        "ours": middle("wall_s"),
        "rollout_s": middle("rollout_s"),
        "update_s": middle("update_s"),
        "peak_mib": middle("peak_bytes") / MIB,
        "repeats": len(turns),
        "threads": torch.get_num_threads(),
    }


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %"


def measure(model: Any, work: workload.Workload, layers: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Rows of the table for one dtype."""
    from steerlab.training.memory import budget_for

    budget, n_layers = budget_for(model), model.n_layers
    cases = {"all": None, **{f"layer {layer}": (layer,) for layer in layers}}
    steps = {case: make_step(model, work, chosen, budget) for case, chosen in cases.items()}
    for step in steps.values():
        step()
    turns = [{case: step() for case, step in steps.items()} for _ in range(repeats)]
    products = limit.Products(model, work, 0, budget)
    head_share = model.unembedding.weight.numel() / products.block_weights
    counted_share = head_share * sum(products.predicted) / products.needed
    lowest = {case: 0 if chosen is None else chosen[0] for case, chosen in cases.items()}
    alls = update_in_f(n_layers, 0, counted_share), update_in_f(n_layers, 0, head_share)
    return [
        {
            **row(
                case,
                turns,
                update_in_f(n_layers, lowest[case], counted_share),
                update_in_f(n_layers, lowest[case], head_share),
                alls,
            ),
            "dtype": workload.dtype_name(model),
            "products": model.products,
            "token_budget": budget,
            "head_share": head_share,
        }
        for case in cases
    ]


def main(options: Options) -> list[dict[str, Any]]:
    """Prints a table and, with --out, writes JSON."""
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        model, work = workload.subject(options.scale, dtype)
        rows += measure(model, work, [layer for layer in options.layers if layer < model.n_layers], options.repeats)
    workload.report(rows, COLUMNS, options.out, "layers")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
