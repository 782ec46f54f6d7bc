"""Workload W: what both sides of every step benchmark must do, drawn once and stored in `workload.json`.

SmolLM2-135M, 4 prompts of 60, 80, 100 and 140 tokens × 8 samples, completion lengths of 16 to 64 tokens with mean 40
(1,280 in all), rewards −1 or +1 that differ within every group. A length counts the tokens that are generated and
trained on. A side must keep the end-of-sequence token from appearing earlier and must end the row at its length, by
forcing that token as the last one or by stopping; it is free in everything else. Prompts are stored as text and as
tokens, so that a trainer that tokenizes by itself can be checked.

Here too, for every benchmark: what a measured step reports; `serve` and `Side`, by which sides run in processes of
their own (a memory peak is then its own) while they are timed in turns; the model as steerlab's users have it; the
options that all have, and `table`, from them to what is printed and written. Left out: the sides themselves.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from steerlab.runs import atomic_write, environment, give_back_memory

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

HERE = Path(__file__).parent
STORED = HERE / "workload.json"
MIB = 2**20
Scale = Literal["tiny", "small"]
Dtype = Literal["bf16", "fp32"]
Row = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What every timing asks; a script adds its own."""

    out: Path | None = None  # folder for the JSON
    scale: Scale = "small"  # tiny measures nothing, it is for tests
    dtypes: tuple[Dtype, ...] = ("bf16", "fp32")
    repeats: int = 5  # after one warm-up
    threads: int = 2


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

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of every prompt."""
        return tuple(group.tokens for group in self.groups)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def alive(self) -> list[int]:
        """Rows whose token t is drawn, for t = 0, 1, …: those longer than t."""
        return [sum(length > t for length in self.lengths) for t in range(max(self.lengths))]

    def with_prompts(self, n: int) -> Workload:
        """n groups, the stored ones over and over (each stays a prompt of its own)."""
        return replace(self, groups=tuple(self.groups[i % len(self.groups)] for i in range(n)))

    def with_samples(self, n: int) -> Workload:
        """n samples of every prompt, the stored lengths and rewards over and over."""

        def repeated(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i % len(values)] for i in range(n))

        return replace(
            self,
            groups=tuple(replace(g, lengths=repeated(g.lengths), rewards=repeated(g.rewards)) for g in self.groups),
        )

    def with_lengths(self, tokens: int) -> Workload:
        """Every completion of the same length."""
        return replace(self, groups=tuple(replace(g, lengths=(tokens,) * len(g.lengths)) for g in self.groups))

    def with_prompt_tokens(self, tokens: int) -> Workload:
        """Only the first tokens of every prompt."""
        return replace(self, groups=tuple(replace(g, tokens=g.tokens[:tokens]) for g in self.groups))

    def tiny(self, eos: int, d_vocab: int) -> Workload:
        """Two short prompts, two samples of each, for tests of the scripts: it measures nothing."""
        first, second = (tuple(t % d_vocab for t in g.tokens[:n]) for g, n in zip(self.groups, (3, 5), strict=False))
        groups = Group("", first, (2, 4), (-1.0, 1.0)), Group("", second, (3, 4), (1.0, -1.0))
        return Workload(groups, eos)


@dataclass(frozen=True)
class StepInfo:
    """One full step as measured: rollout, rewards, update, optimiser.

    wall_s: all of it. rollout_s: generating completions. update_s: the rest. peak_bytes: highest resident memory of the
    process during the step; base_bytes: resident memory just before it. update_peak_bytes, update_base_bytes: the same
    of the update alone, on a process's first step; 0 later (see `Peaks`).
    """

    wall_s: float
    rollout_s: float
    update_s: float
    prompt_tokens: int
    completion_tokens: int
    base_bytes: int
    peak_bytes: int
    update_base_bytes: int = 0
    update_peak_bytes: int = 0
    exchanged_bytes: int = 0


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


class Peaks:
    """Memory of the steps of a process.

    A heap that is warm hides what a step takes: freed memory stays resident. So on the process's first step, which is
    a warm-up and not timed, freed memory is returned to the system just before the update. Later steps are left alone.
    """

    def __init__(self) -> None:
        self.first = True

    def start(self) -> None:
        """Before the step."""
        self.base, self.rollout_peak, self.update_base = reset_peak_memory(), 0, 0

    def between(self) -> None:
        """After the rollout."""
        if self.first:
            self.rollout_peak = peak_memory()
            give_back_memory()
            self.update_base = reset_peak_memory()

    def stop(self) -> dict[str, int]:
        """After the step: those fields of StepInfo."""
        peak, update_base = peak_memory(), self.update_base
        update_peak, self.first = max(peak, update_base) if update_base else 0, False
        return {
            "base_bytes": self.base,
            "peak_bytes": max(peak, self.rollout_peak),
            "update_base_bytes": update_base,
            "update_peak_bytes": update_peak,
        }


def serve(step: Callable[[], StepInfo]) -> None:
    """Runs one step per line on standard input and answers with one line of JSON; says so first when it is ready."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(step())), flush=True)


class Side:
    """A process that runs one step at a time, or several that do so together: one for each of `environments`."""

    def __init__(self, arguments: Sequence[str], environments: Sequence[Mapping[str, str]] = ({},)) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=HERE,
                env={**os.environ, **added},
            )
            for added in environments
        ]
        self._answers()

    def step(self) -> StepInfo:
        """One step; what the first process says of it, and the highest memory peak of any."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        answers = [StepInfo(**answer) for answer in self._answers()]
        return replace(answers[0], peak_bytes=max(answer.peak_bytes for answer in answers))

    def close(self) -> None:
        for process in self.processes:
            process.communicate()

    def _answers(self) -> list[dict[str, Any]]:
        return [_answer(process) for process in self.processes]


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"the process {process.args} ended")


def subject(scale: Scale, dtype: str) -> tuple[LanguageModel, Workload]:
    """The model, tuned as the trainer does at step 0, and the workload; tiny ones for tests."""
    from steerlab.models import load as load_model
    from steerlab.models import tiny

    work = load()
    if scale == "tiny":
        model = tiny.model("llama", dtype=DTYPES[dtype])
        work = work.tiny(model.tokenizer.eos_token_id, model.d_vocab)
    else:
        model = load_model("smollm2-135m", dtype=dtype)
    model.tune()
    return model, work


def dtype_name(model: LanguageModel) -> str:
    """As the scripts' options name it."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.dtype)


@contextmanager
def without_end(model: LanguageModel, eos: int, hear: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the `with` the end token is kept away. hear: called whenever logits are there."""
    unembed = model.unembed

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        logits = unembed(hidden)
        logits[:, eos] = -torch.inf
        hear()
        return logits

    model.unembed = logits_of  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.unembed


class ForcedLengths:
    """A logits processor for Hugging Face `generate`: the end token at each row's own length and nowhere before.

    n_prompt: padded tokens of the prompts, to be set before each `generate`.
    """

    def __init__(self, lengths: Sequence[int], eos: int) -> None:
        self.lengths, self.eos, self.n_prompt = torch.tensor(lengths), eos, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.lengths <= input_ids.shape[1] - self.n_prompt + 1
        scores[ends] = -torch.inf
        scores[:, self.eos] = torch.where(ends, 0.0, -torch.inf).to(scores.dtype)
        return scores


def lengths_of(tokens: torch.Tensor, eos: int) -> torch.Tensor:
    """Tokens up to and including the first end token, per row."""
    return ((tokens == eos).cumsum(1) == 0).sum(1) + 1


def in_turns(sides: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[Any, ...]]:
    """What the sides return, one after the other: a warm-up of each, which comes first, then `repeats` times."""
    return [tuple(side() for side in sides) for _ in range(1 + repeats)]


def median(measured: Iterable[object], name: str) -> float:
    """Of one of their fields."""
    return statistics.median(getattr(each, name) for each in measured)


def compared(ours: Sequence[float], rival: Sequence[float]) -> Row:
    """Medians, and the ratio rival ÷ ours pair by pair with its range."""
    ratios = [theirs / own for own, theirs in zip(ours, rival, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ours": statistics.median(ours),
        "rival": statistics.median(rival),
        "spread": [min(ratios), max(ratios)],
        "repeats": len(ratios),
    }


def table(
    options: Options, columns: Sequence[str], name: str, rows_of: Callable[[LanguageModel, Workload], Iterable[Row]]
) -> list[Row]:
    """The rows of every dtype, reported. products: the faster way to multiply, as this process measured it."""
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for dtype in options.dtypes:
        model, work = subject(options.scale, dtype)
        stated = {
            "dtype": dtype,
            "products": model.products,
            "kernels": model.kernels,
            "threads": options.threads,
            "repeats": options.repeats,
        }
        rows += [stated | row for row in rows_of(model, work)]
    report(rows, columns, options.out, name)
    return rows


def report(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], out: Path | None, name: str) -> None:
    """Prints these columns of the rows as a table and, with `out`, writes all of the rows as JSON."""
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print(f"| {' | '.join(_shown(row.get(column)) for column in columns)} |", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        written = {"machine": environment(), "rows": list(rows)}
        atomic_write(out / f"{name}.json", json.dumps(written, indent=1) + "\n")


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return " / ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "–" if value is None else str(value)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"this system does not report {field}; peak memory can be measured on Linux only")
    return int(found[1]) * 1024
