"""Direct logit attribution: it adds up in every family, and each part is what one finds by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.attribution import FrozenNorm, attribution
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, tiny
from steerlab.plots.attribution import attribution as plot
from steerlab.plots.attribution import attribution_heads

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_adds_up(family: str, exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    model = exact(family)
    steered = vectors(model)
    table = attribution(model, steered, texts)
    for key, part in table.groupby(["sender", "generated"]):
        total = part.loc[part["kind"] == "total", "value"].item()
        assert part.loc[part["kind"] != "total", "value"].sum() == pytest.approx(total, abs=1e-6), (
            key
        )  # families take roots in fp32
    # and the total is what the model's own logits say, where they have no cap
    if model.logit_softcap is not None:
        return
    found = []
    for text in texts:
        tokens = torch.tensor([text.tokens])
        with torch.no_grad(), steered.attach(model):
            with_it = model.logits(tokens)[0, text.n_prompt - 1 : -1]
        without = model.logits(tokens)[0, text.n_prompt - 1 : -1]
        answer = torch.tensor(text.tokens[text.n_prompt :])[:, None]
        rival = without.scatter(-1, answer, -torch.inf).argmax(-1, keepdim=True)
        gap = with_it - without
        found.append(float((gap.gather(-1, answer) - gap.gather(-1, rival)).mean()))
    total = pick(table, sender="trained", generated=-1, kind="total")["value"].item()
    assert total == pytest.approx(np.mean(found), abs=1e-6)


def test_a_head_by_hand(exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    """Taking what a head wrote because of the vector out of the last state, at the steered run's scale."""
    model = exact("llama")
    steered, text, layer, head = vectors(model, layers=(1,)), texts[0], 2, 1
    table = attribution(model, steered, [text], control=False)
    z, last = Site("z", layer), Site("resid_post", model.n_layers - 1)
    tokens = torch.tensor([text.tokens])
    with torch.no_grad():
        base = model.cache(tokens, [z, last])
        with steered.attach(model):
            moved = model.cache(tokens, [z, last])
        part = slice(head * model.d_head, (head + 1) * model.d_head)
        weight = model.blocks[layer].get_submodule("self_attn.o_proj").weight[:, part]  # type: ignore[index]
        wrote = (moved[z] - base[z])[0, :, part] @ weight.T
        scale = moved[last][0].square().mean(-1, keepdim=True).sqrt()
        through = wrote * model.final_norm.weight / scale
        logits = model.unembed(model.final_norm(base[last]))[0]
        for place in range(text.n_prompt - 1, len(text.tokens) - 1):
            answer = text.tokens[place + 1]
            others = logits[place].clone()
            others[answer] = -torch.inf
            readout = model.unembedding.weight[answer] - model.unembedding.weight[int(others.argmax())]
            generated = place - text.n_prompt + 1
            told = pick(table, kind="head", layer=layer, head=head, generated=generated)["value"].item()
            assert told == pytest.approx(float(through[place] @ readout), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_a_frozen_norm_is_the_norm_at_its_own_scale(norm: type[torch.nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    module = norm(16).double()  # type: ignore[call-arg]
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x, y, readout = (torch.randn(5, 16, dtype=torch.float64, generator=generator) for _ in range(3))
    with torch.no_grad():
        frozen = FrozenNorm(module, 16, x)
        assert frozen.centred == (norm is torch.nn.LayerNorm)
        told = (frozen.pulled(readout, y) * (y - x)).sum(-1) + frozen.by_scale(readout, x, y)
        assert torch.allclose(told, (readout * (module(y) - module(x))).sum(-1), atol=1e-7)


def test_figures_and_bad_input(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    table = attribution(model, vectors(model, layers=(1,)), texts)
    assert attribution_heads(table, "random").data[0].z.shape == (2, model.n_heads)
    assert "in all" in plot(table, generated=0).layout.title.text
    with pytest.raises(UsageError, match="no rows of sender other"):
        plot(table, "other")
    last = attribution(model, vectors(model, layers=(3,)), texts)
    with pytest.raises(UsageError, match="no head above the vector"):
        attribution_heads(last)
    with pytest.raises(UsageError, match="at least one text"):
        attribution(model, vectors(model), [])
