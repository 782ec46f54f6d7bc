"""What vectors do to latents, by an SAE whose latents are the coordinates and their negatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.contrast import Contrast, of_texts
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.report import latents as report
from steerlab.saes.activity import activity
from steerlab.saes.contexts import latent_contexts, latent_tokens
from steerlab.saes.effects import decomposition, latent_effects
from steerlab.saes.load import Sae

POST = Site("resid_post", 2)
Made = Callable[..., Sae]


@pytest.fixture
def vectors() -> SteeringVectors:
    return SteeringVectors({POST: torch.randn(32, generator=torch.Generator().manual_seed(1))})


def test_by_hand(tiny_llama: LanguageModel, prose: list[Text], by_hand: Made, vectors: SteeringVectors) -> None:
    """Latents i and 32 + i are relu(±x_i): their change is that of the coordinate's positive and negative part."""
    texts = [*prose[:4], Text(prose[5].tokens[:15], 6)]
    table = latent_effects(tiny_llama, by_hand(), vectors, texts)
    part = table.loc[table["sender"] == "trained"].set_index("latent")
    v = vectors.vectors[POST].detach()
    assert np.allclose(part["cosine"], torch.cat([v, -v]) / v.norm(), atol=1e-6)
    assert np.allclose(part["response"], torch.cat([v, -v]), atol=1e-6)
    changes = []
    for text in texts:
        x = tiny_llama.cache(torch.tensor([text.tokens]), [POST])[POST][0, text.n_prompt :]
        both = [torch.cat([y, -y], dim=1).relu() for y in (x, x + v)]
        changes.append((both[1] - both[0]).mean(0))
    assert np.allclose(part["change"], torch.stack(changes).mean(0), atol=1e-4)
    assert (part["low"] <= part["change"] + 1e-9).all() and (part["change"] <= part["high"] + 1e-9).all()
    beside = table.loc[table["sender"] == "random"].set_index("latent")
    assert beside["cosine"].pow(2).sum() == pytest.approx(part["cosine"].pow(2).sum(), rel=1e-5)


def test_elsewhere_there_is_no_direct_effect(tiny_llama: LanguageModel, prose: list[Text], by_hand: Made) -> None:
    below = SteeringVectors({Site("resid_post", 0): torch.ones(32)})
    table = latent_effects(tiny_llama, by_hand(), below, prose[:2], control=False)
    assert table["cosine"].isna().all() and table["change"].abs().max() > 0
    with pytest.raises(UsageError, match="act behind"):
        latent_effects(tiny_llama, by_hand(), SteeringVectors({Site("resid_post", 3): torch.ones(32)}), prose[:2])
    with pytest.raises(UsageError, match="residual stream"):
        latent_effects(tiny_llama, by_hand(kind="difference"), below, prose[:2])


def test_pursuit_finds_what_a_vector_is_made_of(by_hand: Made) -> None:
    vector = torch.zeros(32)
    vector[3], vector[9], vector[20] = 3.0, -2.0, 1.0
    table = decomposition(by_hand(), vector, n=5)
    mine = table.loc[table["sender"] == "trained"]
    assert mine["latent"].tolist()[:3] in ([3, 9, 20], [3, 41, 20]) or set(mine["latent"][:3] % 32) == {3, 9, 20}
    assert np.allclose(mine["error"].iloc[:3], [5 / 14, 1 / 14, 0], atol=1e-9)
    for _, part in table.groupby("sender"):
        assert (np.diff(part["error"]) <= 1e-12).all()
    assert table.loc[(table["sender"] != "trained") & (table["n"] == 3), "error"].min() > 0.3
    for says, call in (
        ("not 0", lambda: decomposition(by_hand(), torch.zeros(32))),
        ("width 32", lambda: decomposition(by_hand(), torch.ones(16))),
        ("independent directions", lambda: decomposition(by_hand(), vector, n=33)),
    ):
        with pytest.raises(UsageError, match=says):
            call()


def test_activity_by_hand(tiny_llama: LanguageModel, prose: list[Text], by_hand: Made) -> None:
    texts = [*prose[:3], Text(prose[4].tokens[:12], 5)]
    completions: Contrast = of_texts(texts[:2], texts[2:])
    found = activity(tiny_llama, by_hand(), completions)
    assert found.correct.tolist() == [True, True, False, False] and found.length.tolist() == [16, 16, 16, 7]
    for row, text in enumerate(texts):
        x = tiny_llama.cache(torch.tensor([text.tokens]), [POST])[POST][0, text.n_prompt :]
        latents = torch.cat([x, -x], dim=1).relu()
        assert np.array_equal(found.fired[row], (latents > 0).any(0).numpy())
        assert np.allclose(found.mean[row], latents.mean(0), atol=1e-5)
        assert np.allclose(found.dense[row], x.mean(0), atol=1e-5)
    with pytest.raises(UsageError, match="give the steering vectors"):
        activity(tiny_llama, by_hand(kind="difference"), completions)


def test_differences_are_of_the_vector(
    tiny_llama: LanguageModel, prose: list[Text], by_hand: Made, vectors: SteeringVectors
) -> None:
    """At its own layer the difference is the vector, at every token."""
    found = activity(tiny_llama, by_hand(kind="difference"), of_texts(prose[:2], prose[2:4]), vectors)
    v = vectors.vectors[POST].detach()
    assert np.allclose(found.mean, torch.cat([v, -v]).relu().expand(4, -1), atol=1e-5)


def test_contexts_by_hand(tiny_llama: LanguageModel, prose: list[Text], by_hand: Made) -> None:
    """Latents 4 and 36 are relu(±x_4): the peak is the largest coordinate of a text, the first token aside."""
    table = latent_contexts(tiny_llama, by_hand(dead=1), prose[:6], [4, 36, 64], n=3, before=2, after=1)
    assert set(table["latent"]) <= {4, 36}, "a latent that never fires has no context"
    largest = []
    for text in prose[:6]:
        x = tiny_llama.cache(torch.tensor([text.tokens]), [POST])[POST][0, 1:, 4]
        largest.append((float(x.max()), 1 + int(x.argmax())))
    order = sorted((n for n in range(6) if largest[n][0] > 0), key=lambda n: -largest[n][0])[:3]
    peaks = table.loc[(table["latent"] == 4) & table["peak"]]
    assert peaks["text"].tolist() == order and peaks["position"].tolist() == [largest[n][1] for n in order]
    assert np.allclose(peaks["activation"], [largest[n][0] for n in order], atol=1e-5)
    assert max(table.groupby(["latent", "rank"]).size()) <= 4
    with pytest.raises(UsageError, match="among 0 to 63"):
        latent_contexts(tiny_llama, by_hand(), prose[:2], [64])


def test_tokens_are_the_lens_of_what_is_written(tiny_llama: LanguageModel, by_hand: Made) -> None:
    table = latent_tokens(tiny_llama, by_hand(), [4], k=3)
    scores = tiny_llama.unembedding.weight[:, 4].detach()
    top = table.loc[table["end"] == "top"]
    assert top["token_id"].tolist() == scores.topk(3).indices.tolist()
    assert np.allclose(top["score"], scores.topk(3).values)
    section = report.cards_section(latent_contexts(tiny_llama, by_hand(), [Text((40, 41, 42, 43), 1)], [4, 36]), table)
    assert section.passages and all(-1 <= colour <= 1 for _, colour, _ in section.passages[0].tokens)
