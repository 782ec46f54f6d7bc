"""One RL step on workload W: steerlab against tuned TRL GRPO, in turns, in one sitting; and against arithmetic.

Claim: the same step (model, prompts, lengths, dtype, trained numbers, optimiser) is at least 4 times faster here with
all layers trained, 5.5 times with one in the middle, 8 times with the last. Refuted where the median ratio is below
that (on 2026-11-24: the last layer, 7.6 and 7.0). Each side runs in a process of its own, so that its memory peak is
its own, and only one works at a time.
steerlab's side is its own sampler, policy, objective and updater, used as the trainer uses them (matrix
products measured at the start, hidden states below the trained layers kept from sampling, the trainer's token
budget, freed memory returned after the step); the only addition is the workload's: the end token is kept away (its
logit is −inf, as on the other side), every row stops at its length.
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

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import limit
import torch
import workload
from workload import MIB, Peaks, Side, StepInfo, Workload

from steerlab.runs import give_back_memory

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

HERE = Path(__file__).parent
CASES = {"all": None, "middle": (15,), "last": (29,)}
RIVALS = {"steering": "bias", "lora": "lora", "lora-tuned": "lora-tuned"}  # what trl_baseline.py calls them
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
COLUMNS = (
    *("dtype", "case", "ratio", "spread", "ours", "rival", "rollout_s", "update_s"),
    *("peak_mib", "limit_s", "share_of_limit"),
)


def make_step(
    model: LanguageModel,
    work: Workload,
    layers: tuple[int, ...] | None,
    token_budget: int | None = None,
    adapter: str = "steering",
) -> Callable[[], StepInfo]:
    """A function that runs one full step of steerlab on a workload and reports it. Call it once to warm up.
    token_budget: tokens per micro-batch, None for the trainer's own rule."""
    from steerlab.adapters import LoRA, Steering
    from steerlab.batches import RolloutBatch
    from steerlab.objectives import PolicyGradient
    from steerlab.rollouts import Policy, Rows, Sampling
    from steerlab.training import AdamW
    from steerlab.training.memory import budget_for

    lora = LoRA(rank=16, alpha=32.0, targets=("q_proj", "v_proj"), layers=layers)  # TRL's default
    policy = Policy(model, (Steering(layers) if adapter == "steering" else lora).init(model))
    objective, updater = PolicyGradient(), AdamW(lr=1e-3).open(policy.adapter.parameters(), 1_000)
    prompts, first_block = work.prompts, policy.adapter.first_block
    rows = replace(Rows.grid(range(len(prompts)), work.group_size), limit=torch.tensor(work.lengths))
    sampling = Sampling(max_new_tokens=max(work.lengths))
    budget = budget_for(model) if token_budget is None else token_budget
    steps, peaks = iter(range(1_000_000)), Peaks()

    def step() -> StepInfo:
        peaks.start()
        number, start = next(steps), time.perf_counter()
        with workload.without_end(model, work.eos):
            done = policy.sample(prompts, rows, sampling, seed=0, step=number, keep=first_block > 0)
        rollout_s = time.perf_counter() - start
        peaks.between()
        start = time.perf_counter()
        assert done.lengths.tolist() == list(work.lengths), "the forced lengths were not kept"
        batch = RolloutBatch(
            prompts=prompts,
            group=rows.prompt,
            completions=done.tokens,
            lengths=done.lengths,
            logprobs=done.logprobs,
            rewards=torch.tensor(work.rewards),
            correct=torch.tensor(work.rewards) > 0,
            kept=done.kept(first_block, len(prompts)) if first_block > 0 else None,
        )
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


def serve(dtype: str, case: str, token_budget: int | None, adapter: str) -> None:
    """steerlab's side."""
    model, work = workload.subject("small", dtype)
    workload.serve(make_step(model, work, CASES[case], token_budget, adapter))


def sides(options: argparse.Namespace, dtype: str, case: str, token_budget: int) -> tuple[Side, Side]:
    """steerlab and TRL, each in a process of its own."""
    from steerlab.models import origins

    layers, common = CASES[case], ["--serve", "--threads", str(options.threads)]
    chosen = ["--dtypes", dtype, "--cases", case, "--adapter", options.adapter, "--token-budget", str(token_budget)]
    ours = Side([str(Path(__file__).resolve()), *common, *chosen])
    theirs = Side(
        [
            str(HERE / "trl_baseline.py"),
            str(origins.alias_folder("smollm2-135m")),
            *common,
            *("--dtype", DTYPES[dtype]),
            *("--micro-batch", str(options.rival_micro_batch)),
            *("--adapter", RIVALS[options.adapter]),
            *(() if layers is None else ("--layers", *map(str, layers))),
        ]
    )
    return ours, theirs


def compare(options: argparse.Namespace, dtype: str, case: str) -> list[dict[str, object]]:
    """Both sides and the limit in turns; medians over `repeats` steps after one warm-up each."""
    from steerlab.training.memory import budget_for

    model, work = workload.subject("small", dtype)
    budget = budget_for(model) if options.token_budget is None else options.token_budget
    products = limit.Products(model, work, limit.first_block(case, model.n_layers), budget)
    ours, theirs = sides(options, dtype, case, budget)
    first = ours.step(), theirs.step()
    products.measure()
    turns = [(ours.step(), theirs.step(), products.measure()) for _ in range(options.repeats)]
    ours.close(), theirs.close()
    steps, limits = [(own, rival) for own, rival, _ in turns], [measured for _, _, measured in turns]
    shares = [measured.total_s / own.wall_s for own, _, measured in turns]

    def middle(name: str) -> list[float]:
        return [statistics.median(getattr(pair[side], name) for pair in steps) for side in (0, 1)]

    facts = {"adapter": options.adapter, "dtype": dtype, "rival_micro_batch": options.rival_micro_batch}
    facts |= {"token_budget": budget, "products": model.products}
    measured = limit.facts(products, limits)
    row = {
        "case": case,
        **workload.compared([own.wall_s for own, _ in steps], [rival.wall_s for _, rival in steps]),
        "rollout_s": middle("rollout_s"),
        "update_s": middle("update_s"),
        "peak_mib": [amount / MIB for amount in middle("peak_bytes")],
        **facts,
    }
    if options.adapter == "steering":
        row |= {name: measured[name] for name in ("limit_s", "limit_spread_s", "fastest_limit_s", "gflop")}
        row |= {"share_of_limit": statistics.median(shares), "share_of_limit_spread": [min(shares), max(shares)]}
        row["share_of_fastest_limit"] = statistics.median(m.fastest_s / own.wall_s for own, _, m in turns)
        row["limit_parts_s"] = {
            name: measured[name] for name in ("prefill_s", "decode_s", "packed_decode_s", "update_s")
        }
    above = [(info.update_peak_bytes - info.update_base_bytes) / MIB for info in first]
    resident = [info.update_base_bytes / MIB for info in first]
    memory = workload.compared(above[:1], above[1:]) | {"unit": "MiB", "resident_mib": resident, **facts}
    return [row, {"case": f"update_memory_{case}", **memory}]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--adapter", choices=tuple(RIVALS), default="steering")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rival-micro-batch", type=int, default=8, help="rows per backward pass of TRL; 8 is fastest here"
    )
    parser.add_argument("--token-budget", type=int, help="tokens per micro-batch; the trainer's own rule if not given")
    parser.add_argument("--serve", action="store_true", help="run steerlab's steps, one per line on standard input")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Prints a table and, with --out, writes JSON."""
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.dtypes[0], options.cases[0], options.token_budget, options.adapter)
        return
    rows = [row for dtype in options.dtypes for case in options.cases for row in compare(options, dtype, case)]
    name = "rl_step" if options.adapter == "steering" else f"rl_step_{options.adapter}"
    workload.report(rows, COLUMNS, options.out, name)


if __name__ == "__main__":
    main()
