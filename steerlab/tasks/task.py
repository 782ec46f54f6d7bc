"""What a task is: problems, prompts and a judge; and `ProblemSet`, the one implementation behind all built-in tasks.

A task is a point in a product of choices, source × layout × verifier × rewards (DESIGN §1 in small): where problems
come from (`gym.Gym`, `records.Records`), how they are asked (`Layout`), what a right answer is (`verifiers`) and what
it pays (`Rewards`). All four are frozen dataclasses of plain values, so `runs.encode` can store a task; loaded
problems are cached outside the fields. Left out: turn-taking environments, and rewards between right and wrong (pass
a callable for these).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

from steerlab.errors import UsageError

Split = Literal["train", "test"]
Style = Literal["chat", "plain", "qwen_math", "r1"]
SPLITS: tuple[Split, ...] = ("train", "test")
STYLES: tuple[Style, ...] = ("chat", "plain", "qwen_math", "r1")


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer. `id` is stable: the place in the data set, whatever the split sizes."""

    id: int
    question: str
    answer: str
    entry: Mapping[str, object] = field(default_factory=dict, hash=False, repr=False)


@dataclass(frozen=True)
class Judgement:
    """What one completion earned. `extracted` is None where no answer in the expected format was found."""

    reward: float
    correct: bool
    extracted: str | None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion, before rewards are paid; `reward` set means the verifier pays itself."""

    correct: bool
    extracted: str | None
    note: str = ""
    reward: float | None = None


@dataclass(frozen=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """Turns that end with the question, and the style in which `prompts.encode` writes them. opening: the first words
    of the answer, given."""

    messages: tuple[Message, ...]
    style: Style
    opening: str = ""


@dataclass(frozen=True)
class Rewards:
    """Reward of a wrong and of a right answer: (−1, +1) as in the papers (core.md §2), or (0, 1)."""

    wrong: float = -1.0
    right: float = 1.0


@dataclass(frozen=True)
class Layout:
    """How a problem is asked: prompt style, system text, a suffix to the question, solved train examples before it.

    opening: words that every answer is given to begin with; they belong to the prompt, and to what is judged.
    solution: what a solved example answers; `{answer}` and the fields of `Problem.entry` are filled in. The wording
    matters: on one-digit sums the embedded model scores 0.15 with bare answers, 0.48 with this sentence, and 0.64 with
    "{expression} = {answer}" (greedy, four examples).
    """

    style: Style = "chat"
    system: str = ""
    instruction: str = ""
    solution: str = "The answer is {answer}."
    shots: int = 0
    shots_seed: int = 0
    opening: str = ""


@runtime_checkable
class Source(Protocol):
    """Where problems come from. Loading is deterministic; `load` may be called often and should cache."""

    def load(self) -> Mapping[Split, tuple[Problem, ...]]: ...

    def doubt(self, problem: Problem) -> str:
        """Why the data set's own working speaks against its gold answer; "" if nothing does."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """What a right answer is."""

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """One verdict for each completion, in order."""
        ...

    def solved(self, problem: Problem) -> str | None:
        """The gold answer alone, written the way this verifier reads answers; None where the task has no gold
        answers.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """What the rest of steerlab sees of a task."""

    @property
    def name(self) -> str: ...

    def problems(self, split: Split) -> list[Problem]: ...

    def prompt(self, problem: Problem) -> Prompt: ...

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]: ...

    def validate(self) -> list[tuple[Problem, Judgement]]: ...

    def few_shot(self, n: int, seed: int = 0) -> Task: ...

    def opened(self, words: str) -> Task: ...


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one source with a verifier. `texts` given to `judge` are completions without special tokens."""

    name: str
    source: Source
    verifier: Verifier
    layout: Layout = Layout()
    rewards: Rewards = Rewards()

    def problems(self, split: Split) -> list[Problem]:
        """Problems of one split, always in the same order. UsageError for a split that is unknown or empty."""
        if split not in SPLITS:
            raise UsageError(f"unknown split {split!r}; use train or test")
        found = self.source.load()[split]
        if not found:
            raise UsageError(f"task {self.name} has no {split} problems; give it some with {split}=N")
        return list(found)

    def prompt(self, problem: Problem) -> Prompt:
        """The question after the system text and the solved examples, if any."""
        layout = self.layout
        turns = [Message("system", layout.system)] if layout.system else []
        for example in self.examples(problem):
            turns += [Message("user", self._asked(example)), Message("assistant", self._solved(example))]
        turns.append(Message("user", self._asked(problem)))
        return Prompt(tuple(turns), layout.style, layout.opening)

    def examples(self, problem: Problem) -> tuple[Problem, ...]:
        """The train problems shown solved before `problem`: the same ones for all, except the problem itself."""
        if self.layout.shots == 0:
            return ()
        drawn = _draw_examples(self.source, self.layout.shots, self.layout.shots_seed)
        return tuple(e for e in drawn if e.question != problem.question)[: self.layout.shots]

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        """Reward and correctness of each completion; `problems` and `texts` run in parallel."""
        if len(problems) != len(texts):
            raise ValueError(f"{len(problems)} problems but {len(texts)} texts")
        return [self._paid(v) for v in self.verifier(problems, [self.layout.opening + text for text in texts])]

    def validate(self) -> list[tuple[Problem, Judgement]]:
        """Problems of both splits whose gold answer does not score, or contradicts the working that the row carries.

        Each comes with a judgement whose note says why. Without gold answers (IFEval): problems about which the
        verifier complains in a note that begins "bad problem".
        """
        everything = list(self._everything())
        golds = [self.verifier.solved(p) for p in everything]
        judged = [self._paid(v) for v in self.verifier(everything, [gold or "" for gold in golds])]
        failures = []
        for problem, gold, judgement in zip(everything, golds, judged, strict=True):
            if gold is None:
                fails, why = judgement.note.startswith("bad problem"), judgement.note
            else:
                doubt = self.source.doubt(problem)
                fails, why = bool(doubt) or not judgement.correct, doubt or judgement.note
            if fails:
                failures.append((problem, replace(judgement, reward=self.rewards.wrong, correct=False, note=why)))
        return failures

    def few_shot(self, n: int, seed: int = 0) -> ProblemSet:
        """The same task with `n` solved train examples before each question, drawn with `seed`."""
        if n < 0:
            raise UsageError(f"few-shot needs n ≥ 0, not {n}")
        if n and any(self.verifier.solved(e) is None for e in _draw_examples(self.source, n, seed)):
            raise UsageError(f"task {self.name} has no gold answers to show; use it without few-shot examples")
        return replace(self, layout=replace(self.layout, shots=n, shots_seed=seed))

    def opened(self, words: str) -> ProblemSet:
        """The same task, every answer of which is given to begin with `words`."""
        return replace(self, layout=replace(self.layout, opening=words))

    def _paid(self, verdict: Verdict) -> Judgement:
        reward = self.rewards.right if verdict.correct else self.rewards.wrong
        own = verdict.reward
        return Judgement(reward if own is None else own, verdict.correct, verdict.extracted, verdict.note)

    def _everything(self) -> Iterator[Problem]:
        for split in SPLITS:
            yield from self.source.load()[split]

    def _solved(self, example: Problem) -> str:
        fields = {**example.entry, "answer": self.verifier.solved(example) or ""}
        try:
            return self.layout.solution.format_map(fields)
        except (KeyError, ValueError, IndexError) as error:
            raise UsageError(
                f"solution {self.layout.solution!r} does not fit ({error}); it may use {', '.join(fields)}"
            ) from error

    def _asked(self, problem: Problem) -> str:
        return problem.question + self.layout.instruction


@lru_cache(maxsize=64)
def _draw_examples(source: Source, n: int, seed: int) -> tuple[Problem, ...]:
    """n + 1 train examples, so that a train problem never sees itself; none shares its text with a test problem."""
    splits = source.load()
    held_out = {p.question for p in splits["test"]}
    distinct = {p.question: p for p in splits["train"] if p.question not in held_out}
    if len(distinct) < n + 1:
        raise UsageError(f"{n} examples need {n + 1} train problems, but there are {len(distinct)}; ask for fewer")
    return tuple(random.Random(seed).sample(list(distinct.values()), n + 1))
