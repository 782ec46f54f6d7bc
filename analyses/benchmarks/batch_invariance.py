"""How far a completion depends on the batch it was sampled in, and log-probs on how they were computed, per dtype.

Claim: with each row drawing from its own stream, fp64 gives the same tokens whatever the batch split; in fp32 and bf16
a few tokens differ, because matrix products of other shapes round otherwise. Reported: the shares of `completions` and
of `tokens` that differ from the split of all rows at once (tokens after a first difference count as different), and
teacher-forced minus recorded log-probabilities in nats.

    uv run python analyses/benchmarks/batch_invariance.py --out analyses/benchmarks/results
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from workload import Row, Scale, report

from steerlab.batches import RolloutBatch
from steerlab.models import load
from steerlab.rollouts import Completions, Policy, Rows, Sampling
from steerlab.tasks import encode, make

COLUMNS = ("case", "completions", "tokens", "logprob_gap_mean_nats", "logprob_gap_max_nats")


@dataclass(frozen=True)
class Options:
    """splits: rows decoded at once, compared with all at once."""

    out: Path | None = None
    scale: Scale = "small"
    dtypes: tuple[str, ...] = ("fp64", "fp32", "bf16")
    splits: tuple[int, ...] = (32, 7)
    model: str = "smollm2-135m"


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    n_problems, tokens = (2, 6) if options.scale == "tiny" else (12, 24)
    found: list[Row] = []
    for dtype in options.dtypes:
        model = load(options.model, dtype=dtype)
        task = make("chain_sum")
        problems = task.problems("train")[:n_problems]
        prompts = tuple(tuple(encode(task.prompt(p), model.tokenizer)) for p in problems)
        rows, sampling, policy = Rows.grid([p.id for p in problems], 8), Sampling(max_new_tokens=tokens), Policy(model)
        whole = policy.sample(prompts, rows, sampling, seed=0)
        batch = batch_of(prompts, rows, whole)
        gap = (policy.reference_logprobs(batch) - whole.logprobs)[batch.mask]
        for split in options.splits:
            other = policy.sample(prompts, rows, sampling, seed=0, max_rows=split)
            differing = first_difference(whole, other)
            found.append(
                {
                    "case": f"{dtype}, {split} rows at once",
                    "completions": sum(d is not None for d in differing) / len(rows),
                    "tokens": sum(
                        n - d for n, d in zip(whole.lengths.tolist(), differing, strict=True) if d is not None
                    )
                    / int(whole.lengths.sum()),
                    "logprob_gap_mean_nats": float(gap.abs().mean()),
                    "logprob_gap_max_nats": float(gap.abs().max()),
                }
            )
    report(found, COLUMNS, options.out, "batch_invariance")
    return found


def batch_of(prompts: tuple[tuple[int, ...], ...], rows: Rows, done: Completions) -> RolloutBatch:
    """The completions as a batch without rewards."""
    nothing = torch.zeros(len(rows))
    return RolloutBatch(prompts, rows.prompt, done.tokens, done.lengths, done.logprobs, nothing, nothing > 0)


def first_difference(one: Completions, other: Completions) -> list[int | None]:
    """Per row the first position where the completions differ, None where they are the same."""
    found: list[int | None] = []
    for i, (n, m) in enumerate(zip(one.lengths.tolist(), other.lengths.tolist(), strict=True)):
        a, b = one.tokens[i, :n].tolist(), other.tokens[i, :m].tolist()
        places = [t for t in range(min(n, m)) if a[t] != b[t]]
        found.append(places[0] if places else (min(n, m) if n != m else None))
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
