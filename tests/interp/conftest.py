"""What readouts are tried on: short texts, exact tiny models, vectors with a direction of their own."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from letters import Letters
from steerlab.adapters import Scope, SteeringVectors
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, tiny
from steerlab.tasks import Task

EVERYWHERE = Scope.all()


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
