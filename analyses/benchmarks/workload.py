"""Workload W: what both sides of every step benchmark must do, drawn once and stored in `workload.json`.

SmolLM2-135M, 4 prompts of 60, 80, 100 and 140 tokens × 8 samples, completion lengths of 16 to 64 tokens with mean 40
(1,280 in all), rewards −1 or +1 that differ within every group. A length counts the tokens that are generated and
trained on. A side must keep the end-of-sequence token from appearing earlier and must end the row at its length, by
forcing that token as the last one or by stopping; it is free in everything else. Prompts are stored as text and as
tokens, so that a trainer that tokenizes by itself can be checked.

Here too: what a measured step reports, and `serve`, by which each side runs in a process of its own (its memory peak
is then its own) while the two are timed in turns. Left out: the two sides themselves.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

STORED = Path(__file__).with_name("workload.json")


@dataclass(frozen=True)
class Group:
    """One prompt and what its samples are made to be."""

    text: str
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Workload:
    """groups: prompts in order; row r of a batch is sample r mod 8 of prompt r div 8. eos: id of the last token."""

    groups: tuple[Group, ...]
    eos: int

    @property
    def group_size(self) -> int:
        return len(self.groups[0].lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Completion length in tokens, the last one included, row by row."""
        return tuple(length for group in self.groups for length in group.lengths)

    @property
    def rewards(self) -> tuple[float, ...]:
        """Reward of every row."""
        return tuple(reward for group in self.groups for reward in group.rewards)


@dataclass(frozen=True)
class StepInfo:
    """One full step as measured: rollout, rewards, update, optimiser.

    wall_s: all of it. rollout_s: generating completions. update_s: the rest. peak_bytes: highest resident memory of the
    process during the step; base_bytes: resident memory just before it.
    """

    wall_s: float
    rollout_s: float
    update_s: float
    prompt_tokens: int
    completion_tokens: int
    base_bytes: int
    peak_bytes: int


def load(path: Path = STORED) -> Workload:
    """The stored workload."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    groups = tuple(
        Group(
            text=group["text"],
            tokens=tuple(group["tokens"]),
            lengths=tuple(group["lengths"]),
            rewards=tuple(float(reward) for reward in group["rewards"]),
        )
        for group in stored["groups"]
    )
    return Workload(groups, stored["eos"])


def reset_peak_memory() -> int:
    """Starts the peak anew (Linux) and returns the memory resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_memory() -> int:
    """Highest resident memory since `reset_peak_memory`, in bytes (Linux)."""
    return _status_bytes("VmHWM")


def serve(step: Callable[[], StepInfo]) -> None:
    """Runs one step per line on standard input and answers with one line of JSON; says so first when it is ready."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(step())), flush=True)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"this system does not report {field}; peak memory can be measured on Linux only")
    return int(found[1]) * 1024
