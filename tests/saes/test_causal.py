"""Edits of latents: nothing where nothing is edited, by hand, and a causal effect on answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from letters import Letters, towards_letters
from steerlab import readings
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.contrast import of_answers
from steerlab.models import LanguageModel, Site
from steerlab.rollouts import Evaluation, Policy, Rows, Sampling
from steerlab.saes.causal import LatentEdit, alike, latents_causal
from steerlab.saes.load import Sae

POST = Site("resid_post", 2)
TOKENS = torch.tensor([[40, 41, 42, 43, 44, 45], [60, 61, 62, 63, 64, 65]])
Made = Callable[..., Sae]


def under(model: LanguageModel, edit: LatentEdit) -> torch.Tensor:
    with torch.no_grad(), edit.attach(model):
        return model.logits(TOKENS)


def test_by_hand(tiny_llama: LanguageModel, by_hand: Made) -> None:
    """Latents 4 and 36 are relu(±x_4)."""
    sae = by_hand()

    def with_x4(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def edit(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[..., 4] = change(x[..., 4])
            return x

        with torch.no_grad(), tiny_llama.intervene({POST: edit}):
            return tiny_llama.logits(TOKENS)

    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(under(tiny_llama, LatentEdit(sae, [4, 36])), with_x4(torch.zeros_like), **close)
    torch.testing.assert_close(under(tiny_llama, LatentEdit(sae, [4])), with_x4(lambda x: x.clamp(max=0)), **close)
    clamped = under(tiny_llama, LatentEdit(sae, [4], "clamp", 2.0))
    torch.testing.assert_close(clamped, with_x4(lambda x: 2.0 + x.clamp(max=0)), **close)
    torch.testing.assert_close(under(tiny_llama, LatentEdit(sae, [4], "add", 3.0)), with_x4(lambda x: x + 3), **close)


def test_latents_that_do_not_fire_change_no_bit(tiny_llama: LanguageModel, by_hand: Made) -> None:
    plain = tiny_llama.logits(TOKENS)
    assert torch.equal(under(tiny_llama, LatentEdit(by_hand(dead=3), [64, 65])), plain)


def test_it_sees_what_vectors_did(tiny_llama: LanguageModel, by_hand: Made) -> None:
    """A vector along coordinate 4 alone, and both of the coordinate's latents at zero: the vector is gone."""
    vector = torch.zeros(32)
    vector[4] = 5.0
    vectors, sae = SteeringVectors({POST: vector}), by_hand()
    edited = under(tiny_llama, LatentEdit(sae, [4, 36], adapter=vectors))
    torch.testing.assert_close(edited, under(tiny_llama, LatentEdit(sae, [4, 36])), atol=1e-5, rtol=1e-5)


def test_sampling_with_a_cache_is_the_whole_forward(tiny_llama: LanguageModel, by_hand: Made) -> None:
    """Greedy tokens under an edit are the likeliest of whole passes under it."""
    edit, prompt = LatentEdit(by_hand(), [4, 7, 40], "clamp", 4.0), (40, 41, 42)
    out = Policy(tiny_llama, edit).sample(
        [prompt], Rows.grid([0], 1), Sampling(max_new_tokens=6, temperature=0.0), seed=0
    )
    text = list(prompt)
    for token in out.tokens[0, : out.lengths[0]].tolist():
        with torch.no_grad(), edit.attach(tiny_llama):
            assert int(tiny_llama.logits(torch.tensor([text]))[0, -1].argmax()) == token
        text.append(token)


def test_latents_alike() -> None:
    rate = np.linspace(0, 1, 101)
    drawn = alike(rate, [20, 80], 5)
    assert len(drawn) == 5 and all(len(set(of.tolist())) == 2 and not {20, 80} & set(of.tolist()) for of in drawn)
    assert all(np.abs(np.sort(rate[of]) - [0.2, 0.8]).max() < 0.11 for of in drawn)
    with pytest.raises(UsageError, match="too few"):
        alike(np.array([0.1, 0.2, 0.3]), [0, 1], 1)


def test_an_edit_that_undoes_a_vector_undoes_its_answers(tiny_llama: LanguageModel, by_hand: Made) -> None:
    """A vector makes answers letters; with the latents of its direction set to zero they are not, with others they
    are."""
    vectors = towards_letters(tiny_llama, 2, 30.0)
    sae, v = by_hand(), vectors.vectors[POST].detach()
    strongest = v.abs().argsort(descending=True)[:8]
    latents = [int(i) + 32 * int(v[i] < 0) for i in strongest]
    evaluation = Evaluation(samples=4, limit=6, sampling=Sampling(max_new_tokens=3))
    table = latents_causal(
        tiny_llama, Letters(), sae, latents, np.full(64, 0.5), evaluation, adapter=vectors, draws=2
    ).set_index("condition")
    assert set(table.index) == {"as it is", "edited", "random-0", "random-1"}
    assert (table.loc["as it is", ["change", "change_low", "change_high"]] == 0).all(), (
        "nothing is compared with itself"
    )
    assert table.loc["as it is", "value"] > 0.6
    assert table.loc["edited", "value"] < table.loc["as it is", "value"] - 0.2
    assert table.loc["edited", "beyond_random"] < 0


def test_answers_are_scored(tiny_llama: LanguageModel, by_hand: Made) -> None:
    """Right and wrong answers of a task, by latents: every way of matching, replication, probes."""
    evaluation = Evaluation(samples=8, limit=10, sampling=Sampling(max_new_tokens=3))
    answers = of_answers(tiny_llama, Letters(), evaluation)
    read = readings.latent_correctness(tiny_llama, by_hand(), answers, folds=3)
    assert set(read.tables) == {"latent_correctness", "latent_replication", "correctness_probes"}
    table = read.tables["latent_correctness"]
    assert set(table["matched"]) == {"none", "length", "problem"} and table["n_problems"].iloc[0] == 10
    assert table["n_correct"].iloc[0] == len(answers.positive)
    assert set(read.figures) == {"latent_correctness", "latent_volcano"}


def test_bad_input_is_one_line(tiny_llama: LanguageModel, by_hand: Made) -> None:
    for says, call in (
        ("among 0 to 63", lambda: LatentEdit(by_hand(), [64])),
        ("among 0 to 63", lambda: LatentEdit(by_hand(), [])),
        ("how='add'", lambda: LatentEdit(by_hand(kind="difference"), [1])),
        ("site=", lambda: LatentEdit(Sae(by_hand().inner, None), [1])),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
