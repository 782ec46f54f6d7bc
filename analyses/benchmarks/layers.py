"""What an RL step costs, by which layers are trained, against what arithmetic says.

Workload W, steering vectors at one layer ℓ or at all, steps in turns (rl_step.py). With F one forward through the L
blocks and h the head's weights ÷ the blocks', an update whose lowest trained layer is ℓ takes (L−ℓ−1)/L·2F + 2hF:
nothing runs below block ℓ+1 (the table of DESIGN §7; its 2.53 F for all layers counts block 0 too, here it is 2.47).
Updates here apply the head themselves, as the table has it; the trainer's use the slopes that sampling has kept, which
makes every update cheaper by the same amount.
`predicted` is that, relative to the case `all`, as is the measured update, `share_of_all`; ratio = measured ÷
predicted. The whole step is predicted as a rollout as measured for `all` plus the predicted update; step_ratio =
measured ÷ predicted. Claim: the step is within 15 % of the table for every layer, and we aim for 10 %; `verdict` says
which is met (not of `all`, which is the unit). The ratio of updates alone has no claim: it is below 1 where the head,
which here is two products and little else, costs less beside the blocks than its share of the weights. `ratio_counted`
counts h on the tokens that the head is applied to (completion tokens), where the table charges it for every token that
the blocks read.

    uv run python analyses/benchmarks/layers.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import limit
import tyro
import workload
from rl_step import make_step
from workload import MIB, Dtype, Row, StepInfo, Workload, median

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

MUST, AIM = 0.15, 0.10
COLUMNS = (
    *("dtype", "case", "update_f", "update_s", "share_of_all", "predicted", "ratio", "spread", "verdict"),
    *("ratio_counted", "ours", "step_share_of_all", "step_predicted", "step_ratio"),
)


@dataclass(frozen=True)
class Options(workload.Options):
    """layers: each trained alone; `all` is always measured beside them."""

    dtypes: tuple[Dtype, ...] = ("bf16",)
    layers: tuple[int, ...] = (0, 7, 15, 22, 29)


def update_in_f(n_layers: int, lowest: int, head_share: float) -> float:
    """Cost of an update in forward passes through the blocks."""
    return 2 * (n_layers - lowest - 1) / n_layers + 2 * head_share


def verdict(ratio: float) -> str:
    """Whether measured ÷ predicted is as near to 1 as it must be, and as we aim for."""
    off = abs(ratio - 1)
    return "aim met" if off <= AIM else "must met" if off <= MUST else "missed"


def compared(own: Sequence[StepInfo], alls: Sequence[StepInfo], predicted: float) -> Row:
    """Measured costs of a case relative to `all`, and how far from the prediction."""
    update = [step.update_s / unit.update_s for step, unit in zip(own, alls, strict=True)]
    whole = statistics.median(step.wall_s / unit.wall_s for step, unit in zip(own, alls, strict=True))
    expected = statistics.median((unit.rollout_s + predicted * unit.update_s) / unit.wall_s for unit in alls)
    return {
        "ratio": statistics.median(update) / predicted,
        "spread": [min(update) / predicted, max(update) / predicted],
        "verdict": None if own is alls else verdict(whole / expected),
        "share_of_all": statistics.median(update),
        "predicted": predicted,
        "step_share_of_all": whole,
        "step_predicted": expected,
        "step_ratio": whole / expected,
        "ours": median(own, "wall_s"),
        "rollout_s": median(own, "rollout_s"),
        "update_s": median(own, "update_s"),
        "peak_mib": median(own, "peak_bytes") / MIB,
    }


def measure(model: LanguageModel, work: Workload, options: Options) -> list[Row]:
    """Rows of the table for one dtype."""
    from steerlab.training.memory import budget_for

    budget, n_layers = budget_for(model, max(work.lengths)), model.n_layers
    chosen = {"all": None, **{f"layer {layer}": (layer,) for layer in options.layers if layer < n_layers}}
    steps = [make_step(model, work, layers, budget, keep_slopes=False) for layers in chosen.values()]
    _, *turns = workload.in_turns(steps, options.repeats)
    measured = dict(zip(chosen, zip(*turns, strict=True), strict=True))
    products = limit.Products(model, work, 0, budget)
    head = model.unembedding.weight.numel() / products.block_weights
    counted = head * sum(products.predicted) / products.needed

    def share(case: str, head_share: float) -> float:
        lowest = (chosen[case] or (0,))[0]
        return update_in_f(n_layers, lowest, head_share) / update_in_f(n_layers, 0, head_share)

    rows = []
    for case, own in measured.items():
        row = compared(own, measured["all"], share(case, head))
        row |= {"update_f": share(case, head) * update_in_f(n_layers, 0, head), "head_share": head}
        row["ratio_counted"] = row["share_of_all"] / share(case, counted)
        rows.append({"case": case, "token_budget": budget, **row})
    return rows


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    return workload.table(options, COLUMNS, "layers", lambda model, work: measure(model, work, options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
