"""The toy task of the tests: right is a completion that begins with an ASCII letter, as about one in five of a tiny
model's do; and vectors that make it more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steerlab.adapters import SteeringVectors
from steerlab.models import LanguageModel, Site
from steerlab.tasks import Judgement, Message, Problem, Prompt


@dataclass(frozen=True)
class Letters:
    """train, test: ids of the problems, whose questions differ in length. wrong: what a wrong answer is paid."""

    train: tuple[int, ...] = tuple(range(1000, 1100, 10))
    test: tuple[int, ...] = tuple(range(0, 120, 10))
    wrong: float = 0.0
    opening: str = ""
    shots: int = 0
    name: str = "letters"

    def problems(self, split: str) -> list[Problem]:
        ids = self.test if split == "test" else self.train
        return [Problem(i, f"say {'so ' * (i // 10 % 5)}{i}", "a") for i in ids]

    def prompt(self, problem: Problem) -> Prompt:
        return Prompt((Message("user", "solved! " * self.shots + problem.question),), "chat", self.opening)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        right = [t[:1].isascii() and t[:1].isalpha() for t in (self.opening + text for text in texts)]
        return [Judgement(1.0 if r else self.wrong, r, t[:1] or None) for r, t in zip(right, texts, strict=True)]

    def validate(self) -> list[tuple[Problem, Judgement]]:
        return []

    def opened(self, words: str) -> Letters:
        return replace(self, opening=words)

    def few_shot(self, n: int, seed: int = 0) -> Letters:
        return replace(self, shots=n)


def towards_letters(model: LanguageModel, layer: int, scale: float) -> SteeringVectors:
    """One vector of length `scale` towards letters in the unembedding, so that it raises the score."""
    ids = [model.tokenizer.encode(c, add_special_tokens=False)[0] for c in "aekQR"]
    towards = model.unembedding.weight[ids].mean(0).detach().double()
    return SteeringVectors({Site("resid_post", layer): scale * towards / towards.norm()})
