"""What a patch's part does to tokens: against passes done the long way, and effects that were planted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import Adapter, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp import patched as p
from steerlab.interp.patch_effects import patch_effects, permutation_p, shuffled
from steerlab.interp.texts import Text
from steerlab.interp.token_effects import token_effects
from steerlab.models import LanguageModel, Site
from steerlab.plots import patch_effects as plots

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


def probabilities(model: LanguageModel, adapter: Adapter | None, text: Text) -> torch.Tensor:
    with torch.no_grad(), nullcontext() if adapter is None else adapter.attach(model):
        return model.logits(torch.tensor([text.tokens]))[0, text.n_prompt - 1 : -1].softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_positions_the_long_way(family: str, exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    model = exact(family)
    vector = vectors(model, layers=(1,))
    pairs = {
        "skip_mlp": (p.skip_mlp(), p.no_patch(), 1),
        "skip_head(1)": (p.skip("head", 1), p.no_patch(), 1),
        "steer_head(1)": (p.steer("head", 1), p.skip_attention(), -1),
    }
    found = patch_effects(
        model, vector, texts, [patch for patch, _, _ in pairs.values()], draws=2, control=False
    ).positions
    for name, (patch, reference, sign) in pairs.items():
        assert set(pick(found, patch=name)["reference"]) == {reference.name}
        for number, text in enumerate(texts):
            before, after = (probabilities(model, p.Patched(vector, of), text) for of in (reference, patch))
            change = sign * (before - after)
            rows = pick(found, patch=name, text=number)
            assert rows["generated"].tolist() == list(range(len(change)))
            assert np.allclose(rows["kl_nats"], (before * (before / after).log()).sum(-1), atol=1e-10)
            assert rows["raised_id"].tolist() == change.argmax(-1).tolist()
            assert np.allclose(rows["raised_delta"], change.max(-1).values, atol=1e-10)
            assert np.allclose(rows["lowered_delta"], change.min(-1).values, atol=1e-10)
            own = [model.tokenizer.decode([token]) for token in text.tokens[text.n_prompt :]]
            assert rows["token"].tolist() == own


def test_the_ends_of_the_scale(exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    """Unpatched nothing happens; without the vector, what the vector does as `token_effects` has it."""
    model = exact()
    vector = vectors(model, layers=(1,))
    found = patch_effects(model, vector, texts, [p.no_patch(), p.base()], draws=2, control=False)
    nothing, whole = (pick(found.positions, patch=name) for name in ("no_patch", "base"))
    for column in ("kl_nats", "raised_delta", "lowered_delta"):
        assert (nothing[column] == 0).all()
    assert (pick(found.groups, patch="no_patch")["mass"] == 0).all()
    effects = token_effects(model, texts, vector).positions
    assert np.allclose(whole["kl_nats"], effects["kl_nats"], atol=1e-12) and (whole["kl_nats"] > 1e-4).all()
    assert np.allclose(whole["raised_delta"], effects["raised_delta"], atol=1e-12)
    assert whole["raised_id"].tolist() == effects["raised_id"].tolist()


def test_cut_off_and_left_alone_read_the_same_way(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    """With all neurons in one group, cutting it off and leaving the vector to it are about the same part."""
    model = exact()
    vector = vectors(model, layers=(1,))
    cut, left = (
        patch_effects(model, vector, texts, [patch], k=261, draws=2, control=False)
        for patch in (p.skip_neurons(0, 1), p.steer_neurons(0, 1))
    )
    assert set(left.positions["reference"]) == {"skip_mlp"}
    assert np.allclose(cut.positions["raised_delta"], left.positions["raised_delta"], atol=1e-10)
    assert np.allclose(
        cut.tokens.sort_values(["end", "token_id"])["delta"],
        left.tokens.sort_values(["end", "token_id"])["delta"],
        atol=1e-7,
    )
    assert np.allclose(cut.groups["mass"], left.groups["mass"], atol=1e-7)


def test_means_and_masses_are_those_of_the_whole_vocabulary(
    exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick
) -> None:
    model = exact()
    vector = vectors(model, layers=(1,))
    found = patch_effects(model, vector, texts, [p.skip_layer()], k=261, draws=50, control=False)
    before, after = (
        [probabilities(model, p.Patched(vector, patch), text) for text in texts]
        for patch in (p.no_patch(), p.skip_layer())
    )
    by_text = torch.stack([(b - a).mean(0) for b, a in zip(before, after, strict=True)])
    rows = pick(found.tokens, end="raised").sort_values("token_id")
    assert np.allclose(rows["delta"], by_text.mean(0), atol=1e-7) and set(rows["n_texts"]) == {2}
    digits = [model.tokenizer.encode(str(digit))[0] for digit in range(10)]
    groups = found.groups.set_index("word_group")
    assert groups.loc["numbers", "n_tokens"] == 10 and groups.loc["numbers", "per_token"] * 10 == pytest.approx(
        float(by_text[:, digits].sum(1).mean()), abs=1e-7
    )
    base = torch.stack([probabilities(model, None, text).mean(0) for text in texts]).mean(0)
    assert groups.loc["numbers", "base_mass"] == pytest.approx(float(base[digits].sum()), abs=1e-9)
    assert groups["mass"].sum() == pytest.approx(0, abs=1e-7) and groups["base_mass"].sum() == pytest.approx(1)
    assert pd.isna(groups.loc["other", "p"]) and groups.drop("other")[["p", "raised_p"]].gt(0).all(axis=None)
    raised = (by_text.mean(0)[digits] > 0).double().mean()
    assert groups.loc["numbers", "raised_share"] == pytest.approx(float(raised))
    assert (groups["low"] <= groups["mass"]).all() and (groups["mass"] <= groups["high"]).all()


def test_a_planted_group_beats_its_control_and_others_do_not(exact: Exact, texts: list[Text], pick: Pick) -> None:
    model = exact()
    digits = [model.tokenizer.encode(str(digit))[0] for digit in range(10)]
    direction = model.unembedding.weight[digits].detach().sum(0).float()
    vector = SteeringVectors({Site("resid_post", model.n_layers - 2): 20 * direction / direction.norm()})
    whole = patch_effects(model, vector, texts, [p.base()], control=False)
    groups = whole.groups.set_index("word_group")
    numbers, others = groups.loc["numbers"], groups.drop(["numbers", "other"])
    assert groups["mass"].idxmax() == "numbers" and numbers["mass"] > 0.05
    assert numbers["mass"] > numbers["control_high"] and numbers["p"] < 0.01
    assert numbers["raised_share"] > 0.8 > numbers["control_raised_share"] and numbers["raised_p"] < 0.01
    assert (others["mass"] < numbers["control_high"]).all() and (others["p"] > 0.05).any()
    assert groups["mass"]["other"] < 0, "what they gain, the rest loses"
    assert set(pick(whole.tokens, end="raised").head(3)["token"]) <= set("0123456789")
    down = (
        patch_effects(model, vector * -1.0, texts, [p.base()], control=False)
        .groups.set_index("word_group")
        .loc["numbers"]
    )
    assert down["mass"] == pytest.approx(-down["base_mass"], rel=0.1), "nothing is left of it"


def test_the_control_is_calibrated_and_matched() -> None:
    """Groups drawn at random reject as often as they may; one whose tokens are likely is compared with likely ones."""
    generator = np.random.default_rng(0)
    base = generator.dirichlet(np.full(400, 0.1))
    change = base * generator.normal(size=400)  # likelier tokens move more

    def ps_of(change: np.ndarray, **groups: np.ndarray) -> list[float]:
        drawn = shuffled(base, groups, np.stack([change]), 199, seed=1)
        return [permutation_p(change[ids].sum(), drawn[name][0]) for name, ids in groups.items()]

    groups = {f"g{n}": generator.choice(400, 12, replace=False) for n in range(60)}
    ps = ps_of(change, **groups)
    assert np.mean(np.array(ps) < 0.05) < 0.15 and 0.3 < np.mean(ps) < 0.8
    assert ps_of(change, **groups) == ps
    planted = change + 0.05 * np.isin(np.arange(400), groups["g0"])
    assert ps_of(planted, g0=groups["g0"]) == [pytest.approx(0.01)]
    likely = np.argsort(-base)[:12]
    assert ps_of(np.abs(change), likely=likely)[0] > 0.01
    assert shuffled(base, {"likely": likely}, base[None], 199, seed=1)["likely"].mean() > 0.6 * base[likely].sum()
    assert permutation_p(0.0, np.zeros(9)) == 1 and np.isnan(permutation_p(0.0, np.array([np.nan])))


def test_a_random_direction_goes_the_same_way(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    vector, patches = vectors(model, layers=(1,)), [p.base(), p.steer("head", 0)]
    both = patch_effects(model, vector, texts, patches, draws=9, seed=3)
    random = vector.randomise(torch.Generator().manual_seed(3))
    for sender, of in (("trained", vector), ("random", random)):
        alone = patch_effects(model, of, texts, patches, draws=9, control=False, seed=3)
        for name in ("positions", "tokens", "groups"):
            table = getattr(both, name)
            mine = table.loc[table["sender"] == sender].drop(columns="sender").reset_index(drop=True)
            pd.testing.assert_frame_equal(mine, getattr(alone, name).drop(columns="sender"))


def test_figures(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    patches = [line() for line in p.LINES]
    found = patch_effects(
        model, vectors(model, layers=(1,)), texts, patches, words={"<b>": ["a"], "digits": ["1"]}, draws=9
    )
    curves = plots.patch_effects(found.positions)
    names = [patch.name.replace("_", " ") for patch in patches]
    assert [trace.name.partition(" (")[0] for trace in curves.data] == names * 2
    assert [trace.line.dash for trace in curves.data] == ["solid"] * 5 + ["dot"] * 5
    assert min(curves.data[0].x) == plots.SMALLEST and curves.layout.xaxis.type == "log"
    random = found.positions.query("patch == 'base' and sender == 'random'")
    assert max(curves.data[-1].x) == pytest.approx(random["kl_nats"].max())
    groups = plots.patch_groups(found.groups)
    titles = [note.text for note in groups.layout.annotations]
    assert titles == ["skip attention", "skip mlp", "skip layer", "base"], "no_patch moves nothing"
    crosses = [trace for trace in groups.data if trace.legendgroup == "random"]
    wanted = found.groups.query("patch == 'base' and sender == 'random'")["mass"].tolist()
    assert len(crosses) == 4 and list(crosses[-1].x) == wanted
    assert groups.layout.yaxis.ticktext[0] == "&lt;b&gt; (2)"
    for plot, table in ((plots.patch_effects, found.positions), (plots.patch_groups, found.groups)):
        with pytest.raises(UsageError, match="empty"):
            plot(table.iloc[:0])


def test_what_cannot_be_asked(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    one = vectors(model, layers=(1,))

    def refused(says: str, **changed: object) -> None:
        given = {"vectors": one, "texts": texts, "patches": [p.skip_mlp()], **changed}
        with pytest.raises(UsageError, match=says) as caught:
            patch_effects(model, **given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused("select one layer", vectors=vectors(model))
    refused("no block behind", vectors=vectors(model, layers=(3,)))
    refused("does not exist", patches=[p.skip("head", 99)])
    refused("0 patches", patches=[])
    refused("0 draws", draws=0)
    refused("k=0", k=0)
    refused("at least one text", texts=[])
    refused("no generated token", texts=[Text((1, 2), 2)])
    refused("no word of group 'mine'", words={"mine": ["several letters"]})
