"""Where vectors decide: the tokens are what each model says there, and texts of different lengths go together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Place, activation_patching
from steerlab.interp.decisions import decisions
from steerlab.interp.path_patching import Sender, path_patching, receivers
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.plots.path_patching import path_patching as plot

Exact = Callable[..., LanguageModel]
Vectors = Callable[..., SteeringVectors]
TEXTS = [Text(tuple(range(40, 52)), 4), Text(tuple(range(80, 87)), 3), Text(tuple(range(120, 135)), 6)]


def test_each_model_says_its_own_there(exact: Exact, vectors: Vectors) -> None:
    model = exact("llama")
    steered = 4.0 * vectors(model, layers=(1,))
    found = decisions(model, steered, TEXTS)
    assert found.changed.any()
    for row, text in enumerate(TEXTS):
        at = int(found.pair.end[row])
        assert text.n_prompt - 1 <= at < len(text.tokens) - 1
        tokens = torch.tensor([text.tokens])
        assert found.pair.clean[row, : at + 1].tolist() == list(text.tokens[: at + 1])
        with torch.no_grad():
            base = model.logits(tokens)[0]
            with steered.attach(model):
                moved = model.logits(tokens)[0]
        assert int(moved[at].argmax()) == int(found.right[row])
        new = slice(text.n_prompt - 1, len(text.tokens) - 1)
        p, q = moved[new].log_softmax(-1), base[new].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        changed = moved[new].argmax(-1) != base[new].argmax(-1)
        assert bool(found.changed[row]) == bool(changed.any())
        assert float(found.kl_nats[row]) == pytest.approx(float(kl[changed].max() if changed.any() else kl.max()))
        if changed.any():
            assert int(base[at].argmax()) == int(found.wrong[row])
        assert int(found.wrong[row]) != int(found.right[row])


def test_they_can_be_patched(exact: Exact, vectors: Vectors) -> None:
    model = exact("llama")
    found = decisions(model, 4.0 * vectors(model, layers=(1,)), TEXTS)
    table = activation_patching(model, found.pair, [Place("resid_pre", 2), Place("z", 0, 1)], found.metric)
    assert table["clean"].iloc[0] > table["corrupted"].iloc[0]
    assert table["recovered"].iloc[0] == pytest.approx(1) and table["value"].iloc[1] == table["corrupted"].iloc[1]
    sender = Sender("vector", 1)
    paths = path_patching(model, found.pair, sender, receivers(model, sender), found.metric)
    figure = plot(paths)
    assert [trace.z.shape for trace in figure.data] == [(3, model.n_heads), (3, 2), (3, 2), (3, 1), (3, 1)]
    told = found.table(model)
    assert len(told) == 3 and {"steered", "base", "changed"} <= set(told.columns)
    with pytest.raises(UsageError, match="one sender"):
        plot(paths.assign(sender_head=range(len(paths))))


def test_a_vector_that_changes_no_favourite(exact: Exact, vectors: Vectors) -> None:
    model = exact("llama")
    found = decisions(model, 1e-6 * vectors(model, layers=(1,)), TEXTS)
    assert not found.changed.any() and (found.right != found.wrong).all()


def test_bad_input_is_one_line(exact: Exact, vectors: Vectors) -> None:
    model = exact("llama")
    for says, texts in (("at least one text", []), ("no generated token", [Text((40, 41), 2)])):
        with pytest.raises(UsageError, match=says):
            decisions(model, vectors(model), texts)
