"""Planted activations, and small streams of a tiny model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from planted import Planted
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.saes.activations import Activations, record
from steerlab.saes.load import Sae, package
from steerlab.saes.streams import Kind, Stream

POST = Site("resid_post", 2)
WANTED = Activations(POST, buffer=500, batch_tokens=512)


@pytest.fixture(scope="session")
def planted() -> Planted:
    """64 true directions in 32 dimensions, 3 of them at a time on average."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)

    def drawn(n: int) -> Stream:
        on = torch.rand(n, 64, generator=generator) < 3 / 64
        strength = on * (1 + torch.rand(n, 64, generator=generator))
        noise = 0.02 * torch.randn(n, 32, generator=generator)
        return Stream.of(3 + 2 * strength @ directions + noise)

    return Planted(directions, drawn(60_000), drawn(4_000))


@pytest.fixture(scope="session")
def prose() -> list[Text]:
    """Tokens that follow each other by a rule, so that a loss can be told from chance."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 200, (40,), generator=generator).tolist()
    return [Text(tuple(5 + (start + 7 * i) % 200 for i in range(24)), 8) for start in starts]


@pytest.fixture(scope="session")
def recorded(tiny_llama: LanguageModel, prose: list[Text]) -> Stream:
    return record(tiny_llama, prose, WANTED)


@pytest.fixture(scope="session")
def by_hand() -> Callable[..., Sae]:
    """x = relu(x) − relu(−x): a standard SAE of sae-lens that is exact; scale: of what it writes."""

    def made(scale: float = 1.0, bias: float = 0.0, kind: Kind = "residual", dead: int = 0) -> Sae:
        lens = package()
        inner = lens.StandardSAE(lens.StandardSAEConfig(d_in=32, d_sae=64 + dead))
        eye, nothing = torch.eye(32), torch.zeros(32, dead)
        both = torch.cat([eye, -eye, nothing], dim=1)
        inner.load_state_dict(
            {"W_enc": both, "W_dec": scale * both.T, "b_enc": torch.zeros(64 + dead), "b_dec": torch.full((32,), bias)}
        )
        return Sae(inner.requires_grad_(False), POST, kind)

    return made
