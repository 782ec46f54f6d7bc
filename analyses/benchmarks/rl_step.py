"""One RL step on workload W: steerlab against tuned TRL GRPO, in turns, in one sitting; and against arithmetic.

Claim: the same step (model, prompts, lengths, dtype, trained numbers, optimiser) is at least 4 times faster here with
all layers trained, 5.5 times with one in the middle, 8 times with the last. Refuted where the median ratio is below
that. Each side runs in a process of its own, so that its memory peak is its own, and only one works at a time.
steerlab's side is its own sampler, policy, objective and updater, used as the trainer uses them (products and kernels
measured at the start, hidden states below the trained layers and the head's slopes kept from sampling, the trainer's
token budget, freed memory returned after the step); the only addition is the workload's: the end token is kept away
(its logit is −inf, as on the other side), every row stops at its length.
`--adapter lora` trains TRL's default LoRA on both sides, TRL's as it is shipped (gradient checkpointing, dropout), and
`lora-tuned` without those two: then both sides differ in the engine alone.

limit_s: the arithmetic limit of the same step, needed FLOPs ÷ measured rate of matrix products (the rule is in
limit.py), measured in the same turns; share_of_limit = limit_s ÷ steerlab's seconds. fastest_limit_s multiplies with
packed weights while decoding, as steerlab does; share_of_fastest_limit is the stricter of the two.
Rows `update_memory_*`: highest resident memory of the update above what was resident just before it (weights, packed
copy and all), after freed memory was given back; of each side's first step, in a process that has done nothing else.

    uv run python analyses/benchmarks/rl_step.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import limit
import torch
import tyro
import workload
from workload import MIB, Peaks, Row, Side, StepInfo, Workload, median

from steerlab.runs import give_back_memory

if TYPE_CHECKING:
    from steerlab.batches import RolloutBatch
    from steerlab.models import LanguageModel
    from steerlab.rollouts import Completions, Policy, Rows

HERE = Path(__file__).parent
CASES = {"all": None, "middle": (15,), "last": (29,)}
RIVALS = {"steering": "bias", "lora": "lora", "lora-tuned": "lora-tuned"}  # what trl_baseline.py calls them
COLUMNS = (
    *("dtype", "case", "ratio", "spread", "ours", "rival", "rollout_s", "update_s"),
    *("peak_mib", "limit_s", "share_of_limit"),
)


@dataclass(frozen=True)
class Options(workload.Options):
    """scale: TRL's side has the real model only."""

    scale: Literal["small"] = "small"
    cases: tuple[limit.Case, ...] = ("all", "middle", "last")
    adapter: Literal["steering", "lora", "lora-tuned"] = "steering"
    rival_micro_batch: int = 8  # rows per backward pass of TRL; 8 is fastest here
    token_budget: int | None = None  # tokens per micro-batch; the trainer's own rule if not given
    serve: bool = False  # run steerlab's steps, one per line on standard input


def make_step(
    model: LanguageModel,
    work: Workload,
    layers: tuple[int, ...] | None,
    token_budget: int | None = None,
    adapter: str = "steering",
    keep_slopes: bool = True,
) -> Callable[[], StepInfo]:
    """A function that runs one full step of steerlab on a workload and reports it. Call it once to warm up.
    token_budget: tokens per micro-batch, None for the trainer's own rule. keep_slopes: as the trainer does; else the
    update applies the head."""
    from steerlab.adapters import LoRA, Steering
    from steerlab.objectives import PolicyGradient
    from steerlab.rollouts import Policy, Rows, Sampling
    from steerlab.training import AdamW
    from steerlab.training.memory import budget_for

    lora = LoRA(rank=16, alpha=32.0, targets=("q_proj", "v_proj"), layers=layers)  # TRL's default
    policy = Policy(model, (Steering(layers) if adapter == "steering" else lora).init(model))
    objective, updater = PolicyGradient(), AdamW(lr=1e-3).open(policy.adapter.parameters(), 1_000)
    prompts = work.prompts
    rows = replace(Rows.grid(range(len(prompts)), work.group_size), limit=torch.tensor(work.lengths))
    sampling = Sampling(max_new_tokens=max(work.lengths))
    budget = budget_for(model, max(work.lengths)) if token_budget is None else token_budget
    steps, peaks = iter(range(1_000_000)), Peaks()

    def step() -> StepInfo:
        peaks.start()
        number, start = next(steps), time.perf_counter()
        with workload.without_end(model, work.eos):
            keep = keep_slopes or policy.adapter.first_block > 0
            done = policy.sample(prompts, rows, sampling, seed=0, step=number, keep=keep)
        rollout_s = time.perf_counter() - start
        peaks.between()
        start = time.perf_counter()
        batch = batch_of(work, rows, done if keep_slopes else replace(done, slopes=None), policy)
        for micro in objective.prepare(batch).micro_batches(budget):
            objective(policy, micro).value.backward()
        updater.update(number)
        give_back_memory()
        update_s = time.perf_counter() - start
        return StepInfo(
            wall_s=rollout_s + update_s,
            rollout_s=rollout_s,
            update_s=update_s,
            prompt_tokens=work.prompt_tokens,
            completion_tokens=batch.n_tokens,
            **peaks.stop(),
        )

    return step


def batch_of(work: Workload, rows: Rows, done: Completions, policy: Policy) -> RolloutBatch:
    """Completions that keep to the workload, with its rewards."""
    from steerlab.batches import RolloutBatch, Slopes

    assert done.lengths.tolist() == list(work.lengths), "the forced lengths were not kept"
    rewards = torch.tensor(work.rewards)
    return RolloutBatch(
        work.prompts,
        rows.prompt,
        done.tokens,
        done.lengths,
        done.logprobs,
        rewards,
        rewards > 0,
        kept=done.kept(policy.adapter.first_block, len(work.groups)),
        slopes=None if done.slopes is None else Slopes(done.slopes, policy.numbers),
    )


def sides(model: LanguageModel, options: Options, case: limit.Case, token_budget: int) -> tuple[Side, Side]:
    """steerlab and TRL, each in a process of its own."""
    from steerlab.models import origins

    dtype, layers = workload.dtype_name(model), CASES[case]
    common = ["--serve", "--threads", str(options.threads)]
    chosen = ["--dtypes", dtype, "--cases", case, "--adapter", options.adapter, "--token-budget", str(token_budget)]
    ours = Side([str(Path(__file__).resolve()), *common, *chosen])
    theirs = Side(
        [
            str(HERE / "trl_baseline.py"),
            str(origins.alias_folder("smollm2-135m")),
            *common,
            *("--dtype", str(model.dtype).removeprefix("torch.")),
            *("--micro-batch", str(options.rival_micro_batch)),
            *("--adapter", RIVALS[options.adapter]),
            *(() if layers is None else ("--layers", *map(str, layers))),
        ]
    )
    return ours, theirs


def compare(model: LanguageModel, work: Workload, case: limit.Case, options: Options) -> list[Row]:
    """Both sides and the limit in turns; medians over `repeats` steps after one warm-up each."""
    from steerlab.training.memory import budget_for

    budget = budget_for(model, max(work.lengths)) if options.token_budget is None else options.token_budget
    products = limit.Products(model, work, limit.first_block(case, model.n_layers), budget)
    ours, theirs = sides(model, options, case, budget)
    (*first, _), *turns = workload.in_turns([ours.step, theirs.step, products.measure], options.repeats)
    ours.close(), theirs.close()
    own, rival, limits = zip(*turns, strict=True)
    shares = [measured.total_s / step.wall_s for step, _, measured in turns]

    def middle(name: str) -> list[float]:
        return [median(own, name), median(rival, name)]

    facts = {"adapter": options.adapter, "rival_micro_batch": options.rival_micro_batch, "token_budget": budget}
    measured = limit.facts(products, limits)
    row = {
        "case": case,
        **workload.compared([step.wall_s for step in own], [step.wall_s for step in rival]),
        "rollout_s": middle("rollout_s"),
        "update_s": middle("update_s"),
        "peak_mib": [amount / MIB for amount in middle("peak_bytes")],
        **facts,
    }
    if options.adapter == "steering":
        row |= {name: measured[name] for name in ("limit_s", "limit_spread_s", "fastest_limit_s", "gflop")}
        row |= {"share_of_limit": statistics.median(shares), "share_of_limit_spread": [min(shares), max(shares)]}
        row["share_of_fastest_limit"] = statistics.median(m.fastest_s / step.wall_s for step, _, m in turns)
        row["limit_parts_s"] = {
            name: measured[name] for name in ("prefill_s", "decode_s", "packed_decode_s", "update_s")
        }
    above = [(info.update_peak_bytes - info.update_base_bytes) / MIB for info in first]
    resident = [info.update_base_bytes / MIB for info in first]
    memory = workload.compared(above[:1], above[1:]) | {"unit": "MiB", "resident_mib": resident, **facts}
    return [row, {"case": f"update_memory_{case}", **memory}]


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON; or serves."""
    if options.serve:
        torch.set_num_threads(options.threads)
        model, work = workload.subject(options.scale, options.dtypes[0])
        workload.serve(make_step(model, work, CASES[options.cases[0]], options.token_budget, options.adapter))
        return []
    name = "rl_step" if options.adapter == "steering" else f"rl_step_{options.adapter}"

    def rows(model: LanguageModel, work: Workload) -> list[Row]:
        return [row for case in options.cases for row in compare(model, work, case, options)]

    return workload.table(options, COLUMNS, name, rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
