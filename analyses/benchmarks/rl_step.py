"""One RL step on workload W: steerlab against tuned TRL GRPO, in turns, in one sitting.

Claim: the same step (model, prompts, lengths, dtype, trained numbers, optimiser) is at least 2.5 times faster here.
Refuted if the median ratio is below that. Each side runs in a process of its own, so that its memory peak is its own,
and only one works at a time. steerlab's side is its own sampler, policy, objective and updater; the only addition
is the workload's: the end token is kept away (its logit is −inf, as on the other side), every row stops at its length.

    uv run python analyses/benchmarks/rl_step.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import workload
from workload import StepInfo

HERE = Path(__file__).parent
CASES = {"all": None, "middle": (15,), "last": (29,)}


def make_step(dtype: str, layers: tuple[int, ...] | None, token_budget: int) -> Callable[[], StepInfo]:
    """A function that runs one full step of steerlab on workload W and reports it. Call it once to warm up."""
    from steerlab.adapters import Steering
    from steerlab.batches import RolloutBatch
    from steerlab.models import load
    from steerlab.objectives import PolicyGradient
    from steerlab.rollouts import Policy, Rows, Sampling
    from steerlab.training import AdamW

    work = workload.load()
    model = load("smollm2-135m", dtype=dtype)
    policy = Policy(model, Steering(layers).init(model))
    objective, updater = PolicyGradient(), AdamW(lr=1e-3).open(policy.adapter.parameters(), 1_000)
    prompts = tuple(group.tokens for group in work.groups)
    rows = replace(Rows.grid(range(len(prompts)), work.group_size), limit=torch.tensor(work.lengths))
    sampling = Sampling(max_new_tokens=max(work.lengths))
    unembed = model.unembed

    def without_end(hidden: torch.Tensor) -> torch.Tensor:
        logits = unembed(hidden)
        logits[:, work.eos] = -torch.inf
        return logits

    steps = iter(range(1_000_000))

    def step() -> StepInfo:
        base, start, number = workload.reset_peak_memory(), time.perf_counter(), next(steps)
        model.unembed = without_end  # type: ignore[method-assign]
        done = policy.sample(prompts, rows, sampling, seed=0, step=number)
        model.unembed = unembed  # type: ignore[method-assign]
        rollout_s = time.perf_counter() - start
        assert done.lengths.tolist() == list(work.lengths), "the forced lengths were not kept"
        batch = RolloutBatch(
            prompts=prompts,
            group=rows.prompt,
            completions=done.tokens,
            lengths=done.lengths,
            logprobs=done.logprobs,
            rewards=torch.tensor(work.rewards),
            correct=torch.tensor(work.rewards) > 0,
        )
        for micro in objective.prepare(batch).micro_batches(token_budget):
            objective(policy, micro).value.backward()
        updater.update(number)
        wall_s = time.perf_counter() - start
        return StepInfo(
            wall_s=wall_s,
            rollout_s=rollout_s,
            update_s=wall_s - rollout_s,
            prompt_tokens=sum(map(len, prompts)),
            completion_tokens=batch.n_tokens,
            base_bytes=base,
            peak_bytes=workload.peak_memory(),
        )

    return step


class Side:
    """A process that runs one step at a time."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE
        )
        self._answer()

    def step(self) -> StepInfo:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return StepInfo(**self._answer())

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process {self.process.args} ended")


def compare(dtype: str, case: str, repeats: int, threads: int, folder: Path, micro_batch: int) -> dict[str, object]:
    """Both sides in turns; medians over `repeats` steps after one warm-up each."""
    common = ["--serve", "--threads", str(threads)]
    ours = Side([str(Path(__file__).resolve()), *common, "--dtypes", dtype, "--cases", case])
    layers = CASES[case]
    theirs = Side(
        [
            str(HERE / "trl_baseline.py"),
            str(folder),
            *common,
            *("--dtype", {"fp32": "float32", "bf16": "bfloat16"}[dtype]),
            *("--micro-batch", str(micro_batch)),
            *(() if layers is None else ("--layers", *map(str, layers))),
        ]
    )
    ours.step(), theirs.step()
    pairs = [(ours.step(), theirs.step()) for _ in range(repeats)]
    ours.close(), theirs.close()
    ratios = [rival.wall_s / own.wall_s for own, rival in pairs]

    def middle(side: int, name: str) -> float:
        return statistics.median(getattr(pair[side], name) for pair in pairs)

    return {
        "case": case,
        "dtype": dtype,
        "ratio": statistics.median(ratios),
        "ours": middle(0, "wall_s"),
        "rival": middle(1, "wall_s"),
        "spread": [min(ratios), max(ratios)],
        "rollout_s": [middle(0, "rollout_s"), middle(1, "rollout_s")],
        "update_s": [middle(0, "update_s"), middle(1, "update_s")],
        "peak_mib": [middle(0, "peak_bytes") / 2**20, middle(1, "peak_bytes") / 2**20],
        "above_base_mib": [
            statistics.median((p[side].peak_bytes - p[side].base_bytes) / 2**20 for p in pairs) for side in (0, 1)
        ],
        "repeats": repeats,
        "threads": threads,
        "rival_micro_batch": micro_batch,
    }


def main() -> None:
    """Prints a table and, with --out, writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["all"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rival-micro-batch", type=int, default=8, help="rows per backward pass of TRL; 8 is fastest here"
    )
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--serve", action="store_true", help="run steerlab's steps, one per line on standard input")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        workload.serve(make_step(options.dtypes[0], CASES[options.cases[0]], options.token_budget))
        return
    from steerlab.models import origins
    from steerlab.runs import atomic_write, environment

    folder = origins.alias_folder("smollm2-135m")
    rows = [
        compare(dtype, case, options.repeats, options.threads, folder, options.rival_micro_batch)
        for dtype in options.dtypes
        for case in options.cases
    ]
    print("| dtype | case | ratio (range) | steerlab s | TRL s | rollout s | update s | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["spread"]
        pair = {name: " / ".join(f"{v:.2f}" for v in row[name]) for name in ("rollout_s", "update_s")}
        peak = " / ".join(f"{v:.0f}" for v in row["peak_mib"])
        print(
            f"| {row['dtype']} | {row['case']} | **{row['ratio']:.2f}** ({low:.2f}–{high:.2f}) | {row['ours']:.2f} | "
            f"{row['rival']:.2f} | {pair['rollout_s']} | {pair['update_s']} | {peak} |"
        )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        atomic_write(
            options.out / "rl_step.json", json.dumps({"machine": environment(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
