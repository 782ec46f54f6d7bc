"""What readouts are tried on: short texts, exact tiny models, vectors with a direction of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch

from steerlab.adapters import Scope, SteeringVectors
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, tiny
from steerlab.tasks import Judgement, Message, Problem, Prompt, Task

EVERYWHERE = Scope.all()


@dataclass(frozen=True)
class Letters:
    """A task that is right when the completion begins with an ASCII letter."""

    name: str = "letters"
    opening: str = ""

    def problems(self, split: str) -> list[Problem]:
        return [Problem(10 * i, f"say {'so ' * (i % 3)}{i}", "a") for i in range(10)]

    def prompt(self, problem: Problem) -> Prompt:
        return Prompt((Message("user", problem.question),), "chat", self.opening)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        right = [t[:1].isascii() and t[:1].isalpha() for t in (self.opening + text for text in texts)]
        return [Judgement(float(r), r, t[:1] or None) for r, t in zip(right, texts, strict=True)]

    def validate(self) -> list[tuple[Problem, Judgement]]:
        return []

    def few_shot(self, n: int, seed: int = 0) -> Letters:
        return self

    def opened(self, words: str) -> Letters:
        return replace(self, opening=words)


@pytest.fixture
def letters() -> Task:
    return Letters()


@pytest.fixture
def texts() -> list[Text]:
    return [Text((40, 41, 42, 43, 44, 45), 3), Text((60, 61, 62), 2)]


@pytest.fixture
def exact() -> Callable[..., LanguageModel]:
    def made(family: str = "llama") -> LanguageModel:
        return tiny.model(family, dtype=torch.float64)

    return made


@pytest.fixture
def vectors() -> Callable[..., SteeringVectors]:
    def made(model: LanguageModel, layers: tuple[int, ...] = (1, 2), scope: Scope = EVERYWHERE) -> SteeringVectors:
        generator = torch.Generator().manual_seed(0)
        sites = [Site("resid_post", layer) for layer in layers]
        return SteeringVectors({s: 0.5 * torch.randn(model.d_model, generator=generator) for s in sites}, scope)

    return made


@pytest.fixture
def pick() -> Callable[..., pd.DataFrame]:
    """Rows of a table whose columns have the given values."""

    def picked(df: pd.DataFrame, **wanted: object) -> pd.DataFrame:
        for column, value in wanted.items():
            df = df.loc[df[column] == value]
        return df

    return picked
