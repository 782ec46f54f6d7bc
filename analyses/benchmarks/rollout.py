"""Sampling alone: steerlab's engine against Hugging Face `generate`, on one model object, in turns, in one sitting.

Case `ragged`: workload W, completions forced to their own lengths; `generate` gets all 32 rows as one batch, padded on
the left, as TRL gives it. Case `decode`: 32 rows × 48 tokens behind prompts of 8, timed from the moment that the first
token's logits are there, so that reading the prompts is not in it. Unit: completion tokens per second. Both sides draw
at temperature 1 from the whole vocabulary. steerlab carries steering vectors (at zero) at all layers, as in training,
and Hugging Face carries none; both have sdpa or their own attention, no gradients, the same dtype. Memory: highest
resident above what was resident before, of one more run of each side, with freed memory returned to the system first.

    uv run python analyses/benchmarks/rollout.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import tyro
import workload
from workload import MIB, ForcedLengths, Row, Workload, lengths_of

from steerlab.runs import give_back_memory

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

PROMPT_TOKENS, DECODE_TOKENS = 8, 48
COLUMNS = ("dtype", "case", "ratio", "spread", "ours_tokens_per_s", "rival_tokens_per_s", "ours", "rival", "peak_mib")


@dataclass(frozen=True)
class Options(workload.Options):
    """cases: ragged lengths with prompts, or decoding alone."""

    cases: tuple[Literal["ragged", "decode"], ...] = ("ragged", "decode")


@dataclass(frozen=True)
class Run:
    """wall_s: all of it. decode_s: from the first token's logits on. peak_bytes: above what was resident before."""

    wall_s: float
    decode_s: float
    peak_bytes: int


class Watch:
    """Seconds and memory of one side's run."""

    def __init__(self) -> None:
        self.base, self.first, self.start = workload.reset_peak_memory(), 0.0, time.perf_counter()

    def hear(self) -> None:
        """Logits are there."""
        self.first = self.first or time.perf_counter()

    def stop(self) -> Run:
        end = time.perf_counter()
        return Run(end - self.start, end - self.first, workload.peak_memory() - self.base)


def ours(model: LanguageModel, work: Workload) -> Callable[[], Run]:
    """steerlab's sampler with forced lengths."""
    from steerlab.adapters import Steering
    from steerlab.rollouts import Policy, Rows, Sampling

    policy = Policy(model, Steering().init(model))
    rows = replace(Rows.grid(range(len(work.groups)), work.group_size), limit=torch.tensor(work.lengths))
    sampling = Sampling(max_new_tokens=max(work.lengths))
    steps = iter(range(1_000_000))

    def run() -> Run:
        watch = Watch()
        with workload.without_end(model, work.eos, watch.hear):
            done = policy.sample(work.prompts, rows, sampling, seed=0, step=next(steps))
        found = watch.stop()
        assert done.lengths.tolist() == list(work.lengths), "the forced lengths were not kept"
        return found

    return run


def rival(model: LanguageModel, work: Workload) -> Callable[[], Run]:
    """Hugging Face `generate` with forced lengths, all rows as one batch padded on the left."""
    from transformers import LogitsProcessorList

    prompts = [tokens for tokens in work.prompts for _ in range(work.group_size)]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[work.eos] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    forced = ForcedLengths(work.lengths, work.eos)
    forced.n_prompt = longest

    def run() -> Run:
        watch = Watch()

        def heard(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            watch.hear()
            return forced(input_ids, scores)

        with torch.no_grad():
            out = model.hf.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(work.lengths),
                eos_token_id=work.eos,
                pad_token_id=work.eos,
                logits_processor=LogitsProcessorList([heard]),
            )
        found = watch.stop()
        assert lengths_of(out[:, longest:], work.eos).tolist() == list(work.lengths), "the forced lengths were not kept"
        return found

    return run


def compare(model: LanguageModel, work: Workload, case: str, options: Options) -> Row:
    """One row of the table."""
    if case == "decode":
        work = work.with_prompt_tokens(PROMPT_TOKENS).with_lengths(
            DECODE_TOKENS if options.scale == "small" else max(work.lengths)
        )
    sides = ours(model, work), rival(model, work)
    _, *turns = workload.in_turns(sides, options.repeats)
    own, other = zip(*turns, strict=True)
    peaks = []
    for side in sides:
        give_back_memory()
        peaks.append(side().peak_bytes / MIB)
    tokens = sum(work.lengths) - (len(work.lengths) if case == "decode" else 0)

    def seconds(runs: tuple[Run, ...]) -> list[float]:
        return [run.decode_s if case == "decode" else run.wall_s for run in runs]

    return {
        "case": case,
        **workload.compared(seconds(own), seconds(other)),
        "ours_tokens_per_s": statistics.median(tokens / s for s in seconds(own)),
        "rival_tokens_per_s": statistics.median(tokens / s for s in seconds(other)),
        "peak_mib": peaks,
        "prompt_tokens": [len(prompt) for prompt in work.prompts],
        "rows": len(work.lengths),
        "completion_tokens": sum(work.lengths),
        "longest_completion": max(work.lengths),
    }


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    return workload.table(
        options, COLUMNS, "rollout", lambda model, work: [compare(model, work, case, options) for case in options.cases]
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
