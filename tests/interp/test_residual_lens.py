"""The lens of the residual stream against the model's own logits, and against everything done the long way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import Scope, SteeringVectors, Translators, TunedLens
from steerlab.errors import RunFailed, UsageError
from steerlab.interp.residual_lens import residual_lens
from steerlab.interp.texts import Text, contrasts
from steerlab.models import LanguageModel, Site, tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_layer_is_the_model(
    family: str, exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick
) -> None:
    model = exact(family)
    steered = vectors(model)
    found = residual_lens(model, texts, {"base": None, "steered": steered}, k=5)
    for condition, adapter in (("base", None), ("steered", steered)):
        for number, text in enumerate(texts):
            tokens = torch.tensor([text.tokens])
            if adapter is None:
                logits = model.logits(tokens)[0]
            else:
                with adapter.attach(model):
                    logits = model.logits(tokens)[0]
            wanted = logits.detach().log_softmax(-1).topk(5)
            part = pick(found.tokens, condition=condition, text=number, layer=3)
            assert part["token_id"].tolist() == wanted.indices.flatten().tolist()
            assert np.allclose(part["logprob"], wanted.values.flatten(), atol=1e-9)
    last = pick(found.spread, layer=3)
    assert np.allclose(last["kl_nats"], 0, atol=1e-9)


Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_every_number_the_long_way(family: str, exact: Exact, texts: list[Text], pick: Pick) -> None:
    model, watch = exact(family), (50, 99)
    found = residual_lens(model, texts[:1], {"base": None}, watch=watch, layers=(0, 2), k=3)
    tokens = torch.tensor([texts[0].tokens])
    states = model.cache(tokens, [Site("resid_post", layer) for layer in range(4)])
    final = model.logits(tokens)[0].log_softmax(-1)
    for layer in (0, 2):
        with torch.no_grad():
            logprobs = model.unembed(model.final_norm(states[Site("resid_post", layer)]))[0].log_softmax(-1)
        for position in range(len(texts[0].tokens)):
            row = logprobs[position]
            spread = pick(found.spread, layer=layer, position=position).iloc[0]
            assert spread["entropy_nats"] == pytest.approx(-float((row.exp() * row).sum()), abs=1e-9)
            kl = float((final[position].exp() * (final[position] - row)).sum())
            assert spread["kl_nats"] == pytest.approx(kl, abs=1e-9)
            for token in watch:
                one = pick(found.watched, layer=layer, position=position, token_id=token).iloc[0]
                assert one["rank"] == int((row > row[token]).sum())
                assert one["logprob"] == pytest.approx(float(row[token]), abs=1e-9)


def test_generated_positions_begin_at_the_last_prompt_token(exact: Exact, texts: list[Text], pick: Pick) -> None:
    found = residual_lens(exact(), texts, {"base": None}, generated_only=True, k=1)
    assert sorted(set(pick(found.tokens, text=0)["position"])) == [2, 3, 4, 5]
    assert sorted(set(pick(found.tokens, text=1)["position"])) == [1, 2]


def test_scopes_are_kept(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    """A vector for generated tokens changes nothing at prompt tokens."""
    model = exact()
    found = residual_lens(model, texts[:1], {"base": None, "steered": vectors(model, scope=Scope.generated())}, k=4)
    both = found.tokens.pivot_table(index=["position", "layer", "rank"], columns="condition", values="logprob")
    same = np.isclose(both["base"], both["steered"], atol=1e-12)
    prompt = both.index.get_level_values("position") < 3
    assert same[prompt].all() and not same[~prompt].all()


def test_contrasts_are_of_equal_length(exact: Exact, vectors: Vectors) -> None:
    steered = vectors(exact())
    found = contrasts(steered, scales=(-1.0, 2.0))
    assert list(found) == ["base", "steered", "steered × −1", "steered × 2", "random"]
    random = found["random"]
    assert isinstance(random, SteeringVectors)
    for site, length in steered.norms().items():
        assert random.norms()[site] == pytest.approx(length, rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(random.vectors[site], steered.vectors[site], dim=0)
        assert abs(float(cosine.detach())) < 0.9
    again = contrasts(steered)["random"]
    assert isinstance(again, SteeringVectors)
    assert torch.equal(random.vectors[random.sites[0]], again.vectors[random.sites[0]])


def test_a_wrong_norm_is_noticed(monkeypatch: pytest.MonkeyPatch, exact: Exact, texts: list[Text]) -> None:
    model = exact()
    monkeypatch.setattr(model, "final_norm", torch.nn.Identity())
    with pytest.raises(RunFailed, match="not tiny-llama-0's own output"):
        residual_lens(model, texts, {"base": None})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"texts": []}, "at least one text"),
        ({"conditions": {}}, "at least one condition"),
        ({"k": 0}, "k=0"),
        ({"watch": (999,)}, "999"),
        ({"layers": (4,)}, "layers 0 to 3"),
        ({"texts": [Text((40,) * 600, 1)]}, "exceeds the context"),
    ],
)
def test_bad_input_is_one_line(change: dict, says: str, exact: Exact, texts: list[Text]) -> None:
    given = {"texts": texts, "conditions": {"base": None}} | change
    with pytest.raises(UsageError, match=says) as caught:
        residual_lens(exact(), **given)
    assert "\n" not in str(caught.value)


def test_a_text_has_a_prompt() -> None:
    for n_prompt in (0, 4):
        with pytest.raises(UsageError, match="cannot have"):
            Text((1, 2, 3), n_prompt)


def tuned(model: LanguageModel, scale: float) -> TunedLens:
    lens, draw = Translators().init(model), torch.Generator().manual_seed(0)
    lens.restore({name: scale * torch.randn(x.shape, generator=draw) for name, x in lens.snapshot().items()})
    return lens


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_zero_translators_are_the_plain_lens(family: str, tiny_models: dict[str, LanguageModel]) -> None:
    """Bit for bit, and the tables say which lens it was."""
    model, texts = tiny_models[family], [Text(tuple(range(40, 60)), 8)]
    options = {"k": 3, "watch": (50,)}
    plain = residual_lens(model, texts, {"base": None}, **options)
    zero = residual_lens(model, texts, {"base": None}, translators=tuned(model, 0.0), **options)
    for name in ("tokens", "watched", "spread"):
        table = getattr(zero, name)
        assert set(table["lens"]) == {"tuned"} and "lens" not in getattr(plain, name)
        pd.testing.assert_frame_equal(table.drop(columns="lens"), getattr(plain, name))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_states_are_translated_all_but_the_last(family: str, tiny_models: dict[str, LanguageModel]) -> None:
    model, text = tiny_models[family], Text(tuple(range(40, 60)), 8)
    lens = tuned(model, 0.1)
    with torch.no_grad():
        spread = residual_lens(model, [text], {"base": None}, translators=lens).spread
        states = model.cache(torch.tensor([text.tokens]), [Site("resid_post", layer) for layer in range(4)])
        own = model.logits(torch.tensor([text.tokens]))[0].log_softmax(-1)
        for site, h in states.items():
            said = model.unembed(model.final_norm(lens(site.layer, h[0]))).log_softmax(-1)
            expected = (own.exp() * (own - said)).sum(-1)
            found = spread.loc[spread["layer"] == site.layer, "kl_nats"].to_numpy(copy=True)
            torch.testing.assert_close(torch.from_numpy(found).to(expected), expected, rtol=1e-3, atol=1e-4)
    assert spread.loc[spread["layer"] == 3, "kl_nats"].max() < 1e-5


def test_translators_of_another_model_are_refused(tiny_llama: LanguageModel) -> None:
    other = TunedLens({0: (torch.zeros(8, 8), torch.zeros(8))}, 4)
    with pytest.raises(UsageError, match="another model"):
        residual_lens(tiny_llama, [Text((40, 41), 1)], {"base": None}, translators=other)
