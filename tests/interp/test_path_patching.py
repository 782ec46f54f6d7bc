"""Path patching: paths add up, agree with what is done by hand, and patching every path is the other run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Pair, Place, activation_patching, logit_difference
from steerlab.interp.path_patching import Receiver, Sender, hears, path_patching, receivers, senders
from steerlab.models import LanguageModel, Site, tiny

Exact = Callable[..., LanguageModel]
Vectors = Callable[..., SteeringVectors]
CLEAN = torch.tensor([[40, 41, 42, 43, 44, 45], [60, 61, 62, 63, 64, 65]])
OTHER = torch.tensor([[40, 41, 52, 43, 54, 45], [60, 61, 62, 73, 64, 66]])
METRIC = logit_difference(torch.tensor([7, 8]), torch.tensor([9, 10]))


def value(model: LanguageModel, pair: Pair, sender: Sender, receiver: Receiver, through: str = "direct") -> float:
    return float(path_patching(model, pair, sender, [receiver], METRIC, through=through)["value"].iloc[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_by_hand(family: str, exact: Exact) -> None:
    """What a head says to another head's queries and to an MLP: the sender's change added to what is read, by hand."""
    model, pair = exact(family), Pair(CLEAN, OTHER)
    sender, layer, d = Sender("head", 1, 1), 2, model.d_head
    z, attn = Site("z", 1), Site("attn_out", 1)
    with torch.no_grad():
        clean = model.cache(CLEAN, [z])[z]

        def sent(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[..., d : 2 * d] = clean[..., d : 2 * d]
            return x

        before = model.cache(OTHER, [attn])[attn]
        with model.intervene({z: sent}):
            said = model.cache(OTHER, [attn])[attn] - before
        for receiver, reads, heard_at, part in (
            (Receiver("q", layer, 0), "attn_in", "q", slice(0, d)),
            (Receiver("v", layer, 0), "attn_in", "v", slice(0, d)),
            (Receiver("mlp", layer), "mlp_in", "mlp_out", slice(None)),
        ):
            with model.intervene({Site(reads, layer): lambda x: x + said}):
                heard = model.cache(OTHER, [Site(heard_at, layer)])[Site(heard_at, layer)]

            def given(x: torch.Tensor, heard: torch.Tensor = heard, part: slice = part) -> torch.Tensor:
                x = x.clone()
                x[..., part] = heard[..., part]
                return x

            with model.intervene({Site(heard_at, layer): given}):
                wanted = float(METRIC(model.logits(OTHER)[:, -1]).mean())
            assert value(model, pair, sender, receiver) == pytest.approx(wanted, abs=1e-6), receiver
        hidden = model.cache(OTHER, [Site("resid_post", 3)])[Site("resid_post", 3)] + said
        wanted = float(METRIC(model.unembed(model.final_norm(hidden))[:, -1]).mean())
        assert value(model, pair, sender, Receiver("logits")) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_parts_add_up(family: str, exact: Exact, vectors: Vectors) -> None:
    model = exact(family)
    steered = vectors(model, layers=(1,))
    for pair, sender in ((Pair(CLEAN, OTHER), Sender("embedding")), (Pair(CLEAN, CLEAN, steered), Sender("vector", 1))):
        table = path_patching(model, pair, sender, [Receiver("logits")], METRIC)
        assert table.attrs["unexplained"] < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_ends(family: str, exact: Exact, vectors: Vectors) -> None:
    """The last MLP's only path is the direct one; a vector of the last block is all direct; nothing frozen is left
    below."""
    model, pair = exact(family), Pair(CLEAN, OTHER)
    last = model.n_layers - 1
    patched = activation_patching(model, pair, [Place("mlp_out", last), Place("attn_out", last)], METRIC)["value"]
    assert value(model, pair, Sender("mlp", last), Receiver("logits")) == pytest.approx(patched[0], abs=1e-9)
    through_mlp = value(model, pair, Sender("attention", last), Receiver("logits"), "mlps")
    assert through_mlp == pytest.approx(patched[1], abs=1e-9)
    vector = vectors(model, layers=(last,))
    told = path_patching(model, Pair(CLEAN, CLEAN, vector), Sender("vector", last), [Receiver("logits")], METRIC)
    assert told["value"].iloc[0] == pytest.approx(told["clean"].iloc[0], abs=1e-9)


def test_a_vector_as_sender(exact: Exact, vectors: Vectors) -> None:
    """The direct path of a vector to one head's queries, by hand: queries of the state plus the vector."""
    model = exact("qwen3")
    vector, d = vectors(model, layers=(0,)), model.d_head
    s = vector.vectors[vector.sites[0]].detach()
    q, part = Site("q", 2), slice(d, 2 * d)
    with torch.no_grad():
        with model.intervene({Site("attn_in", 2): lambda x: x + s.to(x)}):
            heard = model.cache(CLEAN, [q])[q]

        def given(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[..., part] = heard[..., part]
            return x

        with model.intervene({q: given}):
            wanted = float(METRIC(model.logits(CLEAN)[:, -1]).mean())
    got = value(model, Pair(CLEAN, CLEAN, vector), Sender("vector", 0), Receiver("q", 2, 1))
    assert got == pytest.approx(wanted, abs=1e-6)


def test_who_hears_whom(exact: Exact) -> None:
    model = exact("llama")
    assert len(senders(model, ("embedding", "head", "mlp"))) == 1 + 4 * (model.n_heads + 1)
    head = Sender("head", 2, 0)
    assert {(of.kind, of.layer) for of in receivers(model, head, ("q", "mlp", "logits"))} == {
        ("mlp", 2), ("q", 3), ("mlp", 3), ("logits", 4),
    }  # fmt: skip
    assert not hears(model, Sender("mlp", 2), Receiver("mlp", 2)) and hears(
        model, Sender("embedding"), Receiver("q", 0)
    )
    assert not hears(exact("gpt_neox"), head, Receiver("mlp", 2)), "parallel blocks"


def test_bad_input_is_one_line(exact: Exact, vectors: Vectors) -> None:
    model, pair = exact(), Pair(CLEAN, OTHER)

    def refused(says: str, sender: Sender, heard_by: list[Receiver], of: Pair = pair) -> None:
        with pytest.raises(UsageError, match=says) as caught:
            path_patching(model, of, sender, heard_by, METRIC)
        assert "\n" not in str(caught.value)

    logits = [Receiver("logits")]
    refused("unknown sender", Sender("neuron"), logits)
    refused("unknown receiver", Sender("mlp"), [Receiver("z", 1, 0)])
    refused("at least one", Sender("mlp"), [])
    refused("layers 0 to 3", Sender("mlp", 4), logits)
    refused("heads 0 to", Sender("head", 1, 99), logits)
    refused("does not exist", Sender("mlp", 0), [Receiver("k", 1, 99)])
    refused("does not hear", Sender("mlp", 2), [Receiver("q", 1, 0)])
    refused("one vector at resid_post.1", Sender("vector", 1), logits)
    refused("one vector at resid_post.1", Sender("vector", 1), logits, Pair(CLEAN, CLEAN, vectors(model)))
