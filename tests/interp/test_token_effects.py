"""Δp against the two models' own probabilities, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.texts import Text
from steerlab.interp.token_effects import token_effects
from steerlab.models import LanguageModel

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


def probabilities(model: LanguageModel, adapter: SteeringVectors, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([text.tokens])
    with torch.no_grad():
        p = model.logits(tokens)[0].softmax(-1)
        with adapter.attach(model):
            q = model.logits(tokens)[0].softmax(-1)
    return p[text.n_prompt - 1 : -1], q[text.n_prompt - 1 : -1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neo"])
def test_positions(family: str, exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    model = exact(family)
    found = token_effects(model, texts, vectors(model)).positions
    assert len(found) == sum(len(text.tokens) - text.n_prompt for text in texts)
    for number, text in enumerate(texts):
        p, q = probabilities(model, vectors(model), text)
        rows = pick(found, text=number)
        assert rows["generated"].tolist() == list(range(len(p)))
        assert rows["raised_id"].tolist() == (q - p).argmax(-1).tolist()
        assert np.allclose(rows["raised_delta"], (q - p).max(-1).values, atol=1e-12)
        assert np.allclose(rows["lowered_delta"], (q - p).min(-1).values, atol=1e-12)
        assert rows["argmax_changed"].tolist() == (p.argmax(-1) != q.argmax(-1)).tolist()
        assert rows["raised_was_base_argmax"].tolist() == ((q - p).argmax(-1) == p.argmax(-1)).tolist()
        assert np.allclose(rows["entropy_base_nats"], -(p * p.log()).sum(-1), atol=1e-9)
        assert np.allclose(rows["kl_nats"], (q * (q / p).log()).sum(-1), atol=1e-9)


def test_means_over_texts_at_the_first_position_and_later(
    exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick
) -> None:
    model = exact()
    found = token_effects(model, texts, vectors(model), k=261).tokens
    changes = [q - p for p, q in (probabilities(model, vectors(model), text) for text in texts)]
    first = torch.stack([change[0] for change in changes]).mean(0)
    rest = changes[0][1:].mean(0)  # the second text has one generated token only
    for where, wanted, n_texts in (("first", first, 2), ("rest", rest, 1)):
        rows = pick(found, where=where, end="raised").sort_values("token_id")
        assert np.allclose(rows["delta"], wanted, atol=1e-12) and set(rows["n_texts"]) == {n_texts}
        assert (rows["low"] <= rows["delta"] + 1e-12).all() and (rows["delta"] <= rows["high"] + 1e-12).all()


def test_nothing_is_raised_by_a_zero_vector(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    found = token_effects(model, texts, vectors(model) * 0.0).positions
    assert (found["raised_delta"] == 0).all() and not found["argmax_changed"].any() and (found["kl_nats"] == 0).all()


def test_texts_without_an_answer_are_refused(exact: Exact, vectors: Vectors) -> None:
    model = exact()
    with pytest.raises(UsageError, match="no generated token"):
        token_effects(model, [Text((40, 41), 2)], vectors(model))
