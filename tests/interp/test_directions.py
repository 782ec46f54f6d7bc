"""Directions from contrasts: what is known of them by construction, held-out scores, controls, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp import contrast as contrasts
from steerlab.interp import directions as by_contrast
from steerlab.interp.contrast import Contrast, class_states, of_answers, of_completions, of_pairs, of_texts
from steerlab.interp.directions import METHODS, at_norms_of, directions, linear_probe, mean_difference, pca
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.rollouts import Evaluation, Sampling
from steerlab.tasks import Task

Exact = Callable[..., LanguageModel]
PAIRS = [(f"yes {i} ok!", f"no! {i} bad") for i in range(12)]


def planted(seed: int, n: int = 200, width: int = 24, strength: float = 3.0) -> tuple[np.ndarray, ...]:
    """Two clouds of noise that is wide along other axes, apart along one direction."""
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=width)
    direction /= np.linalg.norm(direction)
    return direction, generator.normal(size=(n, width)) + strength * direction, generator.normal(size=(n, width))


def test_a_shift_is_recovered_exactly() -> None:
    generator = np.random.default_rng(0)
    # numbers on a grid of 2⁻¹⁰, so that sums and their quotient by 64 are exact
    states, shift = (np.round(generator.normal(size=s) * 1024) / 1024 for s in ((64, 32), 32))
    assert (mean_difference(states + shift, states) == shift).all()
    along = pca(states + shift, states, True)
    assert along * np.linalg.norm(shift) == pytest.approx(shift, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_direction_is_found(method: str, seed: int) -> None:
    direction, positive, negative = planted(seed)
    found = METHODS[method](positive, negative, False)
    assert found @ direction / np.linalg.norm(found) > 0.9


def test_the_probe_minimises_its_loss_whatever_the_units() -> None:
    """A change of units of one coordinate changes the weights by its inverse, no prediction."""
    _, positive, negative = planted(3, n=40, strength=1.0)
    units = np.exp(np.random.default_rng(0).normal(size=24) * 3)
    plain, scaled = linear_probe(positive, negative), linear_probe(positive * units, negative * units) * units
    assert scaled / np.linalg.norm(scaled) == pytest.approx(plain, abs=1e-3)


def test_the_sign_points_to_the_positive_class() -> None:
    _, positive, negative = planted(4)
    for method in METHODS.values():
        there, back = method(positive, negative, False), method(negative, positive, False)
        assert there == pytest.approx(-back, abs=1e-3) and there @ (positive.mean(0) - negative.mean(0)) > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_states_are_those_of_a_whole_pass(family: str, exact: Exact, texts: list[Text]) -> None:
    model, three = exact(family), [*texts, Text((50, 51, 52, 53, 54, 55), 2)]
    for position in contrasts.POSITIONS:
        found = class_states(model, three, (0, 3), position)
        for number, text in enumerate(three):
            with torch.no_grad():
                whole = model.cache(torch.tensor([text.tokens]), [Site("resid_post", layer) for layer in (0, 3)])
            for layer in (0, 3):
                states = whole[Site("resid_post", layer)][0]
                wanted = states[-1] if position == "last" else states[text.n_prompt :].mean(0)
                assert torch.allclose(found[layer][number], wanted, atol=1e-10)


def test_pairs_of_strings_give_vectors_and_a_table(tiny_llama: LanguageModel) -> None:
    found = directions(tiny_llama, of_pairs(tiny_llama, PAIRS), (1, 3), shuffles=3)
    assert list(found.vectors) == list(METHODS)
    states = class_states(tiny_llama, of_pairs(tiny_llama, PAIRS).texts, (1, 3))
    for layer, both in states.items():
        site = Site("resid_post", layer)
        difference = both[:12].mean(0) - both[12:].mean(0)
        assert torch.allclose(found.vectors["mean_difference"].vectors[site].detach(), difference.float(), atol=1e-6)
        for vectors in found.vectors.values():  # as long as the classes are apart along it
            own = vectors.vectors[site].detach().double()
            assert float(own @ difference / own.norm()) == pytest.approx(float(own.norm()), rel=1e-4)
    table = found.table.set_index(["method", "layer"])
    assert len(table) == 6 and set(table["n_positive"]) == set(table["n_negative"]) == {12}
    # every pair ends in other letters, so that any text of one class differs from all of the other
    assert (table["auroc"] > 0.95).all() and (table["accuracy"] > 0.9).all()
    assert (table["low"] <= table["auroc"]).all() and (table["auroc"] <= table["high"]).all()
    assert (table["shuffled_low"] <= table["shuffled"]).all() and (table["shuffled"] <= table["shuffled_high"]).all()
    again = directions(tiny_llama, of_pairs(tiny_llama, PAIRS), (1, 3), shuffles=3)
    assert again.table.equals(found.table)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("method", ["mean_difference", "linear_probe"])
def test_where_nothing_differs_nothing_is_separated(method: str, paired: bool) -> None:
    """Held-out scores of noise are about one half, though the fitted texts are separated without a mistake."""
    values = []
    for seed in range(12):
        noise = np.random.default_rng(seed).normal(size=(60, 40))
        groups = np.tile(np.arange(30), 2) if paired else np.arange(60)
        told = by_contrast._held_out(METHODS[method], noise, np.arange(60) < 30, groups, paired, seed)
        assert told is not None
        values.append(told[0])
    assert np.mean([v.value for v in values]) == pytest.approx(0.5, abs=0.07)
    assert sum(v.low <= 0.5 <= v.high for v in values) >= 9


def test_groups_are_never_on_both_sides() -> None:
    """Texts that are recognised only by their group are not separated when it is held out."""
    generator = np.random.default_rng(0)
    own = generator.normal(size=(20, 60)) * 10  # of each group; its label is drawn at random
    groups = np.repeat(np.arange(20), 6)
    label = np.repeat(generator.permutation(20) < 10, 6)
    order = np.argsort(~label, kind="stable")
    states = own[groups] + generator.normal(size=(120, 60))
    found, leaked = (
        by_contrast._held_out(linear_probe, states[order], label[order], numbers, False, 0)
        for numbers in (groups[order], np.arange(120))
    )
    assert found is not None and leaked is not None and found[0].value < 0.8 < 0.99 < leaked[0].value


def test_answers_of_the_base_are_sorted_by_whether_they_are_right(tiny_llama: LanguageModel, letters: Task) -> None:
    evaluation = Evaluation(split="train", samples=4, sampling=Sampling(max_new_tokens=5))
    found = of_answers(tiny_llama, letters, evaluation)
    for right, side in ((True, found.positive), (False, found.negative)):
        for text in side:
            said = tiny_llama.tokenizer.decode(text.tokens[text.n_prompt :])
            assert (said[:1].isascii() and said[:1].isalpha()) is right
    assert set(found.groups) <= {problem.id for problem in letters.problems("train")} and not found.paired
    vectors = directions(tiny_llama, found, (2,), position="mean", shuffles=1).vectors
    assert all(made.layers == (2,) for made in vectors.values())


def test_lengths_of_another_set(tiny_llama: LanguageModel, vectors: Callable[..., SteeringVectors]) -> None:
    other = vectors(tiny_llama, (1, 2, 3))
    own = vectors(tiny_llama, (1, 3)) * 7.0
    found = at_norms_of(own, other)
    assert found.norms() == pytest.approx(other.select((1, 3)).norms())
    for site in found.sites:
        cosine = torch.nn.functional.cosine_similarity(found.vectors[site].detach(), own.vectors[site].detach(), dim=0)
        assert float(cosine) == pytest.approx(1.0)
    with pytest.raises(UsageError, match=r"resid_post\.1"):
        at_norms_of(other, own.select((3,)))
    with pytest.raises(UsageError, match="zero vectors"):
        at_norms_of(own * 0.0, other)


def test_what_is_no_contrast_is_refused(tiny_llama: LanguageModel, texts: list[Text], letters: Task) -> None:
    for positive, negative, name in (([], texts, "positive"), (texts, [], "negative")):
        with pytest.raises(UsageError, match=f"no {name} text"):
            of_texts(positive, negative)
    with pytest.raises(UsageError, match="no pairs"):
        of_texts(texts, texts[:1], paired=True)
    with pytest.raises(UsageError, match="no pairs of strings"):
        of_pairs(tiny_llama, [])
    with pytest.raises(UsageError, match="groups"):
        Contrast(tuple(texts), tuple(texts), (0, 1))
    with pytest.raises(UsageError, match="its pairs"):
        Contrast(tuple(texts), tuple(texts), (0, 1, 1, 0), paired=True)
    table = pd.DataFrame(
        [{"task": "letters", "split": "test", "condition": "base", "seed": 0, "problem": 999, "sample": 0}]
    ).assign(question="", answer="", text="a", extracted="a", reward=1.0, correct=True, n_tokens=1, finished=True)
    with pytest.raises(UsageError, match="is right"):
        of_completions(tiny_llama, letters, table.assign(problem=10, correct=False))
    with pytest.raises(UsageError, match="is wrong"):
        of_completions(tiny_llama, letters, table.assign(problem=10))
    with pytest.raises(UsageError, match="no problem 999"):
        of_completions(tiny_llama, letters, table)
    with pytest.raises(UsageError, match="steered"):
        of_completions(tiny_llama, letters, table, "steered")


def test_what_gives_no_direction_is_refused(tiny_llama: LanguageModel) -> None:
    pairs = of_pairs(tiny_llama, PAIRS)
    with pytest.raises(UsageError, match="method"):
        directions(tiny_llama, pairs, (1,), methods=("svm",))
    with pytest.raises(UsageError, match="at least one"):
        directions(tiny_llama, pairs, ())
    with pytest.raises(UsageError, match=r"\[4\]"):
        directions(tiny_llama, pairs, (4,))
    with pytest.raises(UsageError, match="no generated tokens"):
        directions(tiny_llama, pairs, (1,), position="mean")
    with pytest.raises(UsageError, match="do not differ at layer 1"):
        directions(tiny_llama, of_pairs(tiny_llama, [("same", "same")] * 6), (1,))
    with pytest.raises(UsageError, match="hold out"):
        directions(tiny_llama, of_pairs(tiny_llama, PAIRS[:1]), (1,))
    with pytest.raises(UsageError, match="context"):
        directions(tiny_llama, of_pairs(tiny_llama, [("a" * 600, "b")] * 2), (1,))
