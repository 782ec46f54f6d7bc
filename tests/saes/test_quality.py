"""A reconstruction that is exact changes nothing, zeros recover nothing, the figures are the definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from planted import Planted
from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.saes.activations import Activations, record
from steerlab.saes.load import Sae
from steerlab.saes.quality import Losses, sae_quality, spliced_losses
from steerlab.saes.streams import Stream

POST = Site("resid_post", 2)
Made = Callable[..., Sae]


def test_an_exact_reconstruction_changes_no_loss(tiny_llama: LanguageModel, prose: list[Text], by_hand: Made) -> None:
    wanted = Activations(POST)
    found = spliced_losses(tiny_llama, by_hand(), prose, wanted)
    assert found.sae == pytest.approx(found.model, abs=1e-6) and found.recovered == pytest.approx(1, abs=1e-5)
    assert found.n_tokens == len(prose) * 22
    nothing = spliced_losses(tiny_llama, by_hand(scale=0), prose, wanted)
    assert nothing.sae == nothing.zero == found.zero != found.model and nothing.recovered == 0
    assert abs(spliced_losses(tiny_llama, by_hand(scale=0.5), prose, wanted).sae - found.model) > 0


def test_the_losses_are_the_models_own(tiny_llama: LanguageModel, prose: list[Text], by_hand: Made) -> None:
    texts = [*prose[:3], Text(prose[0].tokens[:9], 2), Text(prose[0].tokens[:1], 1)]
    wanted = Activations(POST, skip=2)

    def loss(zeroed: bool) -> float:
        total, n = 0.0, 0
        for text in texts:
            tokens = torch.tensor([text.tokens])
            edit = {POST: lambda x: torch.cat([x[:, :2], 0 * x[:, 2:]], 1)} if zeroed else {}
            with torch.no_grad(), tiny_llama.intervene(edit):
                said = tiny_llama.logits(tokens).log_softmax(-1)[0]
            for p in range(2, len(text.tokens) - 1):
                total, n = total - float(said[p, text.tokens[p + 1]]), n + 1
        return total / n

    found = spliced_losses(tiny_llama, by_hand(), texts, wanted)
    assert found.model == pytest.approx(loss(zeroed=False), abs=1e-5)
    assert found.zero == pytest.approx(loss(zeroed=True), abs=1e-5)


def test_a_difference_is_spliced_into_the_steered_model(
    tiny_llama: LanguageModel, prose: list[Text], by_hand: Made
) -> None:
    vectors = SteeringVectors({Site("resid_post", 1): torch.linspace(-2, 2, 32)})
    wanted = Activations(POST, "difference")
    base = spliced_losses(tiny_llama, by_hand(), prose, Activations(POST)).model
    steered = spliced_losses(tiny_llama, by_hand(), prose, Activations(POST), vectors).model
    found = spliced_losses(tiny_llama, by_hand(kind="difference"), prose, wanted, vectors)
    assert found.model == pytest.approx(steered, abs=1e-6) and abs(steered - base) > 1e-3
    assert found.sae == pytest.approx(steered, abs=1e-5)
    everywhere = Activations(POST, skip=0)
    whole = spliced_losses(tiny_llama, by_hand(kind="difference"), prose, replace(wanted, skip=0), vectors)
    assert whole.zero == pytest.approx(spliced_losses(tiny_llama, by_hand(), prose, everywhere).model, abs=1e-5)
    with pytest.raises(UsageError, match="needs the adapter"):
        spliced_losses(tiny_llama, by_hand(kind="difference"), prose, wanted)
    with pytest.raises(UsageError, match=r"the SAE is of residual resid_post\.2, the stream of difference"):
        spliced_losses(tiny_llama, by_hand(), prose, wanted, vectors)


def test_figures_are_their_definitions(planted: Planted, by_hand: Made) -> None:
    sae = by_hand(scale=0.9, bias=0.1, dead=16)
    table = tables.check(sae_quality(sae, planted.held_out, planted.train, components=8), "sae_quality")
    row = table.iloc[0].to_dict()
    x = planted.held_out.rows(0, 4_000).activations.double()
    error = (x - sae.decode(sae.encode(x.float())).double()).square().sum()
    variance = (x - x.mean(0)).square().sum()
    assert row["explained_variance"] == pytest.approx(float(1 - error / variance), abs=1e-5)
    trained = planted.train.rows(0, 60_000).activations.double()
    basis = torch.linalg.svd(trained - trained.mean(0), full_matrices=False).Vh[:8].T
    off = x - trained.mean(0)
    beside = (off - off @ basis @ basis.T).square().sum()
    assert row["pca_explained_variance"] == pytest.approx(float(1 - beside / variance), abs=1e-4)
    assert row["l0"] == 32 and row["n_tokens"] == 4_000
    on = (x.float() - 0.1 > 0).any(0).sum() + (x.float() - 0.1 < 0).any(0).sum()
    assert row["dead_share"] == pytest.approx(1 - int(on) / 80)
    assert table["loss_recovered"].isna().all() and row["n_loss_tokens"] == 0


def test_all_components_explain_everything(planted: Planted, by_hand: Made) -> None:
    row = sae_quality(by_hand(), planted.held_out, planted.train, Losses(1.0, 2.0, 5.0, 7)).iloc[0]
    assert row["pca_components"] == 32 and row["pca_explained_variance"] == pytest.approx(1, abs=1e-4)
    assert row["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert row["loss_recovered"] == 0.75 and row["n_loss_tokens"] == 7


def test_what_cannot_be_measured(
    tiny_llama: LanguageModel, prose: list[Text], by_hand: Made, planted: Planted, recorded: Stream
) -> None:
    with pytest.raises(UsageError, match="no text has a token to predict"):
        spliced_losses(tiny_llama, by_hand(), [Text((5, 6), 1)], Activations(POST))
    narrow = Stream.of(torch.randn(10, 8))
    with pytest.raises(UsageError, match="the SAE reads width 32, the stream has 8"):
        sae_quality(by_hand(), narrow, planted.train)
    kinds = record(tiny_llama, prose[:2], Activations(Site("mlp_neurons", 1)))
    with pytest.raises(UsageError, match="the stream has 64"):
        sae_quality(by_hand(), recorded, kinds)
