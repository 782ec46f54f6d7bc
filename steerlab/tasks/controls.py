"""Controls: the same task paid for something other than being right. `correct` stays true correctness.

Random rewards show what training does without a signal; format-only rewards show how much of a gain is only learning to
answer in the expected form (Shao et al. 2025, "Spurious Rewards", arXiv:2506.10947).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from steerlab.tasks.task import Judgement, Problem, ProblemSet, Prompt, Split


@dataclass(frozen=True)
class RandomReward:
    """Pays the right-answer reward with probability `p`, whatever the completion says.

    Rewards are drawn from (seed, every problem id and text of the batch, place in the batch): nothing is remembered
    between calls, so a resumed run pays the same, while the same text met again in another batch is paid anew.
    """

    task: ProblemSet
    seed: int = 0
    p: float = 0.5

    @property
    def name(self) -> str:
        return f"{self.task.name}+random_reward"

    def problems(self, split: Split) -> list[Problem]:
        return self.task.problems(split)

    def prompt(self, problem: Problem) -> Prompt:
        return self.task.prompt(problem)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        """Random rewards, true correctness."""
        batch = hashlib.sha256(repr((self.seed, [p.id for p in problems], list(texts))).encode())
        judged = self.task.judge(problems, texts)
        return [_paid(self.task, j, _uniform(batch.digest(), place) < self.p) for place, j in enumerate(judged)]

    def validate(self) -> list[tuple[Problem, Judgement]]:
        return self.task.validate()

    def few_shot(self, n: int, seed: int = 0) -> RandomReward:
        return replace(self, task=self.task.few_shot(n, seed))

    def opened(self, words: str) -> RandomReward:
        return replace(self, task=self.task.opened(words))


@dataclass(frozen=True)
class FormatOnlyReward:
    """Pays the right-answer reward for an answer in the right form, whatever its value.

    `form` "found": the verifier finds an answer in the completion (a box, a number). "bare": the completion is that
    answer and nothing else, the form of the solved examples; the stronger control where any text has a last number in
    it.
    """

    task: ProblemSet
    form: Literal["found", "bare"] = "bare"

    @property
    def name(self) -> str:
        return f"{self.task.name}+format_only_reward"

    def problems(self, split: Split) -> list[Problem]:
        return self.task.problems(split)

    def prompt(self, problem: Problem) -> Prompt:
        return self.task.prompt(problem)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        """Rewards for the form, true correctness."""
        judged = self.task.judge(problems, texts)
        return [
            _paid(self.task, j, self._in_form(problem, text, j.extracted))
            for problem, text, j in zip(problems, texts, judged, strict=True)
        ]

    def validate(self) -> list[tuple[Problem, Judgement]]:
        return self.task.validate()

    def few_shot(self, n: int, seed: int = 0) -> FormatOnlyReward:
        return replace(self, task=self.task.few_shot(n, seed))

    def opened(self, words: str) -> FormatOnlyReward:
        return replace(self, task=self.task.opened(words))

    def _in_form(self, problem: Problem, text: str, extracted: str | None) -> bool:
        if extracted is None:
            return False
        if self.form == "found":
            return True
        alone = self.task.verifier.solved(replace(problem, answer=extracted))
        text = self.task.layout.opening + text
        return alone is not None and text.replace(",", "").strip().rstrip(".") == alone.replace(",", "").strip()


def _paid(task: ProblemSet, judgement: Judgement, right: bool) -> Judgement:
    return replace(judgement, reward=task.rewards.right if right else task.rewards.wrong)


def _uniform(digest: bytes, place: int) -> float:
    return int.from_bytes(hashlib.sha256(digest + place.to_bytes(8, "big")).digest()[:7], "big") / (1 << 56)
