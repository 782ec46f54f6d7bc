"""Patterns with and without a vector, and the counterfactual of heads that look where they looked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.attention import attention, frozen_attention
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, tiny
from steerlab.plots.attention import attention as plot

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_patterns_the_long_way(family: str, exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    model = exact(family)
    vector = vectors(model, layers=(1,))
    table = attention(model, vector, texts, control=False)
    assert table["value"].between(0, 1).all() and set(table["layer"]) == {2, 3} and table["value"].max() > 1e-4
    found = []
    for text in texts:
        tokens, site = torch.tensor([text.tokens]), Site("pattern", 3)
        before = model.cache(tokens, [site])[site]
        with vector.attach(model):
            after = model.cache(tokens, [site])[site].detach()
        found.append(
            np.mean(
                [
                    float((after - before)[0, 1, i].abs().sum()) / 2
                    for i in range(text.n_prompt - 1, len(text.tokens) - 1)
                ]
            )
        )
    assert pick(table, layer=3, head=1)["value"].item() == pytest.approx(np.mean(found), abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_frozen_heads_look_where_the_base_model_looks(family: str, exact: Exact, vectors: Vectors) -> None:
    """Queries and keys of the base run give its patterns, whatever is done to values."""
    model = exact(family)
    vector, tokens = vectors(model, layers=(1,)), torch.tensor([[40, 41, 42, 43]])
    held_at = [Site(kind, layer) for layer in (2, 3) for kind in "qk"]
    pattern, values = Site("pattern", 3), Site("v", 3)
    with torch.no_grad():
        base = model.cache(tokens, [*held_at, pattern, values])
        with vector.attach(model), model.intervene({site: (lambda _x, s=site: base[s]) for site in held_at}):
            frozen = model.cache(tokens, [pattern, values])
    assert torch.allclose(frozen[pattern], base[pattern], atol=1e-7)
    assert not torch.allclose(frozen[values], base[values], atol=1e-3)


def test_the_ends_of_the_scale(exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    table = frozen_attention(exact(), vectors(exact()), texts)
    assert set(table["sender"]) == {"trained", "random"} and set(table["metric"]) == {"kl_nats", "logit_diff"}
    kl = pick(table, sender="trained", metric="kl_nats").set_index("patch")
    assert kl.loc["no_patch", "kept"] == pytest.approx(1) and kl.loc["base", "kept"] == pytest.approx(0, abs=1e-9)
    assert 0 < kl.loc["frozen_attention", "value"] < kl.loc["base", "value"]


def test_a_vector_that_only_values_carry_keeps_everything(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    """Causal: above a vector of the last block but one, with its queries and keys already unmoved, freezing changes
    nothing."""
    model = exact()
    vector = vectors(model, layers=(2,))
    for projection in ("q_proj", "k_proj"):
        torch.nn.init.zeros_(model.blocks[3].get_submodule(f"self_attn.{projection}").weight)  # type: ignore[arg-type]
    table = frozen_attention(model, vector, texts, control=False).set_index(["metric", "patch"])
    assert table.loc[("kl_nats", "frozen_attention"), "value"] == pytest.approx(0, abs=1e-12)
    assert attention(model, vector, texts, control=False)["value"].max() < 1e-7


def test_figure_and_bad_input(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    table = attention(model, vectors(model), texts)
    assert len(plot(table).data) == 2
    with pytest.raises(UsageError, match="empty"):
        plot(table.iloc[:0])
    with pytest.raises(UsageError, match="choose a lower layer"):
        attention(model, vectors(model, layers=(3,)), texts)
    with pytest.raises(UsageError, match="at least one text"):
        frozen_attention(model, vectors(model), [])
