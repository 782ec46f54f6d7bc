"""How the cost of an RL step grows with samples and with tokens: slopes on log-log axes.

Workload W, all layers trained, whole steps (rl_step.py). `samples`: 32 to 256 rows, more prompts of eight samples each.
`group`: the same rows as more samples of the same four prompts, which are then computed once for more of them.
`tokens`: 32 rows, every completion of 64 to 512 tokens. slope: of ln seconds against ln rows, or ln completion tokens,
by least squares over one pass through the sizes; median and range over passes. 1 is proportional; below 1, fixed costs
(prompts, one weight read per decode step) are shared; above 1, something grows faster than the work, attention for
one. `flop_slope` is the slope of the needed FLOPs (limit.py, which leaves attention out). Claim: the slope must lie in
0.90–1.05 for `samples` and `tokens`; `holds` says whether it does. Of `group`, which shares prompts, nothing is asked.

    uv run python analyses/benchmarks/scaling.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import limit
import numpy as np
import tyro
import workload
from rl_step import make_step
from workload import MIB, Dtype, Row, StepInfo, Workload, median

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

ROWS = (32, 64, 128, 256)
TOKENS = (64, 128, 256, 512)
MUST = (0.90, 1.05)
COLUMNS = (
    *("dtype", "case", "slope", "spread", "must", "holds", "flop_slope", "sizes", "ours"),
    *("rollout_s", "update_s", "peak_mib"),
)
Case = Literal["samples", "group", "tokens"]


@dataclass(frozen=True)
class Options(workload.Options):
    """repeats: passes through all sizes; a pass at bf16 takes minutes, and its sizes are the repeats of a slope."""

    dtypes: tuple[Dtype, ...] = ("bf16",)
    cases: tuple[Case, ...] = ("samples", "tokens")
    rows: tuple[int, ...] = ROWS
    tokens: tuple[int, ...] = TOKENS
    repeats: int = 1


def sized(work: Workload, case: Case, size: int) -> Workload:
    """The workload at one size."""
    if case == "samples":
        return work.with_prompts(size // work.group_size)
    if case == "group":
        return work.with_samples(size // len(work.groups))
    return work.with_lengths(size)


def slope(sizes: Sequence[float], amounts: Sequence[float]) -> float:
    """Of ln amount against ln size."""
    return float(np.polyfit(np.log(sizes), np.log(amounts), 1)[0])


def measure(model: LanguageModel, work: Workload, case: Case, options: Options) -> Row:
    """One row of the table: passes through all sizes, the smallest once before as a warm-up."""
    from steerlab.training.memory import budget_for

    sizes = options.tokens if case == "tokens" else options.rows
    works = [sized(work, case, size) for size in sizes]
    budgets = [budget_for(model, max(each.lengths)) for each in works]
    steps = [make_step(model, each, None, budget) for each, budget in zip(works, budgets, strict=True)]
    steps[0]()
    passes: list[list[StepInfo]] = [[step() for step in steps] for _ in range(options.repeats)]
    slopes = [slope(sizes, [info.wall_s for info in done]) for done in passes]
    lowest = limit.first_block("all", model.n_layers)
    products = [limit.Products(model, each, lowest, budget) for each, budget in zip(works, budgets, strict=True)]

    def by_size(name: str) -> list[float]:
        return [median(step, name) for step in zip(*passes, strict=True)]

    middle = statistics.median(slopes)
    return {
        "case": case,
        "slope": middle,
        "spread": [min(slopes), max(slopes)],
        "must": None if case == "group" else MUST,
        "holds": None if case == "group" else MUST[0] <= middle <= MUST[1],
        "flop_slope": slope(sizes, [sum(each.flops().values()) for each in products]),
        "rollout_slope": slope(sizes, by_size("rollout_s")),
        "update_slope": slope(sizes, by_size("update_s")),
        "sizes": list(sizes),
        "ours": by_size("wall_s"),
        "rollout_s": by_size("rollout_s"),
        "update_s": by_size("update_s"),
        "peak_mib": [amount / MIB for amount in by_size("peak_bytes")],
        "completion_tokens": [sum(each.lengths) for each in works],
        "prompt_tokens": [each.prompt_tokens for each in works],
        "rows": [len(each.lengths) for each in works],
        "token_budget": budgets,
    }


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    return workload.table(
        options, COLUMNS, "scaling", lambda model, work: [measure(model, work, case, options) for case in options.cases]
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
