"""Classes of a vocabulary whose tokens are known, and effects that were planted in one class."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.languages import languages
from steerlab.interp.persistence import persistence
from steerlab.interp.texts import Text
from steerlab.interp.vocabulary import FLOOR_ZIPF, vocabulary_classes, wordfreq_zipf
from steerlab.models import LanguageModel, Site, tiny

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]

EXPECTED = {
    " house": "english", " between": "english", " größe": "other_latin", " nuestro": "other_latin",
    " hotel": "ambiguous", " London": "ambiguous", " a": "ambiguous", "house": "ambiguous", "α": "ambiguous",
    " complet": "ambiguous", "ию": "cyrillic", " слово": "cyrillic", "λόγος": "greek", "的": "han", "，我": "han",
    "食べる": "kana", "カ": "kana", "안": "hangul", "שלום": "hebrew", "ال": "arabic", "हिन्दी": "devanagari",
    "ꓮ": "other_script", "aж": "ambiguous", "xqzt": "fragments", " xqzt": "fragments", ".get": "code", "_name": "code",
    "x1": "code", "camelCase": "code", "12": "digits", "½": "digits", " 7": "digits", "...": "punctuation",
    "😀": "punctuation", "++": "punctuation", "\n\n": "whitespace", "  ": "whitespace", "\ufffd": "bytes",
    "<0x41>": "bytes", "<|end|>": "special",
}  # fmt: skip


class Words:
    """A tokenizer of the words in EXPECTED, with rows beyond its vocabulary."""

    all_special_ids: list[int] = [list(EXPECTED).index("<|end|>")]  # noqa: RUF012

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, token_ids: list[int]) -> str:
        return list(EXPECTED)[token_ids[0]].replace("<0x41>", "A")

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return list(EXPECTED)[ids] if ids < len(EXPECTED) else None


def test_every_token_is_in_the_class_that_its_rule_says() -> None:
    found = vocabulary_classes(Words(), len(EXPECTED) + 2)
    tables.check(found, "vocabulary_classes")
    assert dict(zip(EXPECTED, found["token_class"], strict=False)) == EXPECTED
    assert found["token_class"].tolist()[-2:] == ["special", "special"]
    scripts = dict(zip(EXPECTED, found["script"], strict=False))
    assert (scripts[" house"], scripts["aж"], scripts["12"], scripts["的"]) == ("latin", "mixed", "none", "han")


def test_words_are_weighed_against_every_other_language() -> None:
    lists = {"en": {"house": 5.0, "so": 5.0}, "fr": {"so": 4.5}, "de": {"house": 3.9, "hund": 4.5, "hou": 5.5}}
    wanted = {
        " house": "english",
        " so": "ambiguous",
        " hund": "other_latin",
        " hou": "ambiguous",
        " rare": "fragments",
    }

    class Few(Words):
        all_special_ids: list[int] = []  # noqa: RUF012

        def decode(self, token_ids: list[int]) -> str:
            return list(wanted)[token_ids[0]]

    lists["en"]["housed"] = 5.4  # as common as the piece "hou" of it
    found = vocabulary_classes(Few(), len(wanted), lambda language: lists.get(language, {}))
    assert dict(zip(wanted, found["token_class"], strict=True)) == wanted


def test_word_lists_are_read_down_to_the_floor_in_the_packages_own_units() -> None:
    import wordfreq

    found = wordfreq_zipf("en")
    assert min(found.values()) >= FLOOR_ZIPF
    for word in ("the", "house", "perpendicular"):
        assert found[word] == pytest.approx(wordfreq.zipf_frequency(word, "en", "large"), abs=0.006)


@pytest.fixture
def classes() -> pd.DataFrame:
    """A class for each part of a tiny model's vocabulary; nothing is Arabic."""
    kinds = ["english"] * 100 + ["other_latin"] * 60 + ["han"] * 40 + ["thai"] + ["digits"] * 60
    return pd.DataFrame({"token_id": range(261), "token": "x", "script": "latin", "token_class": kinds})


def test_what_it_reads_is_the_difference_of_two_whole_passes(
    exact: Exact, vectors: Vectors, texts: list[Text], classes: pd.DataFrame, pick: Pick
) -> None:
    model = exact()
    steered = vectors(model)
    found = languages(model, steered, texts, classes=classes, draws=2)
    effects = persistence(model, steered, texts, control=False).effects
    english = classes.index[classes["token_class"] == "english"]
    for source in (1, 2):
        changes = []
        for text in texts:
            tokens = torch.tensor([text.tokens])
            base = model.logits(tokens)[0].log_softmax(-1)
            with steered.select([source]).attach(model):
                changes.append((model.logits(tokens)[0].log_softmax(-1) - base).mean(0).detach().numpy())
        rows = pick(found.table, condition="trained", from_layer=source, to_layer=source, token_class="english")
        value = rows.set_index("readout")["value"]
        assert value["logprob"] == pytest.approx(np.mean(changes, 0)[english].mean(), abs=1e-6)
        cosine = torch.nn.functional.cosine_similarity(model.unembedding.weight[english], effects[source][None])
        assert value["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-6)


def test_a_vector_made_of_a_class_raises_it_and_random_ones_do_not(
    exact: Exact, texts: list[Text], classes: pd.DataFrame, pick: Pick
) -> None:
    model = exact()
    last = Site("resid_post", model.n_layers - 1)
    han = model.unembedding.weight[classes.index[classes["token_class"] == "han"]].detach()
    found = languages(model, SteeringVectors({last: han.sum(0)}), texts, classes=classes, draws=6)
    for readout in ("cosine", "logprob"):
        of = pick(found.table, condition="trained", readout=readout).set_index("token_class")
        assert of["value"].idxmax() == "han" and of.loc["han", "low"] > of.loc["english", "high"]
        gaps = pick(found.gaps, readout=readout).set_index("condition")
        assert gaps.loc["trained", "low"] > gaps.loc["random", "high_draws"]
        assert gaps.loc["trained − random", "low"] > 0 and gaps.loc["trained − random", "low_draws"] > 0
        assert gaps.loc["trained − random", "value"] == pytest.approx(
            gaps.loc["trained", "value"] - gaps.loc["random", "value"]
        )
    down = languages(model, SteeringVectors({last: -han.sum(0)}), texts, classes=classes, draws=1)
    assert (pick(down.gaps, condition="trained")["high"] < 0).all()


def test_random_directions_have_no_gap_on_average(
    exact: Exact, vectors: Vectors, texts: list[Text], classes: pd.DataFrame, pick: Pick
) -> None:
    """At the last layer a direction and its opposite have opposite cosines, so the mean over directions is 0."""
    model = exact()
    found = languages(model, vectors(model, (3,)), texts, classes=classes, draws=24)
    table = pick(found.table, condition="random", readout="cosine").set_index(["token_class", "draw"])
    others = ["other_latin", "han", "thai"]
    total = sum(table.loc[name, "value"] * table.loc[name, "n_tokens"] for name in others)
    gaps = total / sum(table.loc[name, "n_tokens"] for name in others) - table.loc["english", "value"]
    assert len(gaps) == 24 and abs(gaps.mean()) < 3 * gaps.std() / math.sqrt(24)
    random = pick(found.gaps, condition="random", readout="cosine")
    assert random["value"].item() == pytest.approx(gaps.mean(), abs=1e-6)
    assert random["low_draws"].item() == pytest.approx(gaps.min(), abs=1e-6)


def test_gaps_are_means_over_tokens_and_groups_over_layers(
    exact: Exact, vectors: Vectors, texts: list[Text], classes: pd.DataFrame, pick: Pick
) -> None:
    model = exact()
    found = languages(model, vectors(model, (0, 1, 2, 3)), texts, classes=classes, draws=2)
    spans = set(zip(found.gaps["from_layer"], found.gaps["to_layer"], strict=True))
    assert spans == {(0, 0), (1, 1), (2, 2), (3, 3), (0, 2)}, "the last layer stands alone"
    trained = pick(found.table, condition="trained", readout="logprob", from_layer=2, to_layer=2)
    value, n = (trained.set_index("token_class")[name] for name in ("value", "n_tokens"))
    others = ["other_latin", "han", "thai"]
    gap = (value[others] * n[others]).sum() / n[others].sum() - value["english"]
    gaps = pick(found.gaps, condition="trained", readout="logprob")
    alone = gaps.loc[gaps["from_layer"] == gaps["to_layer"]].set_index("from_layer")["value"]
    assert alone[2] == pytest.approx(gap, abs=1e-6)
    assert pick(gaps, from_layer=0, to_layer=2)["value"].item() == pytest.approx(alone[[0, 1, 2]].mean(), abs=1e-7)
    assert set(found.gaps["n_english"]) == {100} and set(found.gaps["n_other"]) == {101}


def test_classes_without_tokens_are_absent_and_one_token_has_no_interval(
    exact: Exact, vectors: Vectors, texts: list[Text], classes: pd.DataFrame, pick: Pick
) -> None:
    model = exact()
    found = languages(model, vectors(model), texts[:1], classes=classes, draws=1)
    assert set(found.table["token_class"]) == {"english", "other_latin", "han", "thai", "digits"}
    assert found.table["value"].notna().all() and pick(found.table, token_class="thai")["low"].isna().all()
    assert found.table["low_texts"].isna().all(), "one text"
    both = languages(model, vectors(model), texts, classes=classes, draws=1).table
    assert (
        pick(both, readout="logprob")["low_texts"].notna().all()
        and pick(both, readout="cosine")["low_texts"].isna().all()
    )
    own = languages(model, vectors(model), texts, draws=1)
    assert own.gaps.empty and {"ambiguous", "digits", "bytes", "special"} <= set(own.table["token_class"])


def test_what_cannot_be_asked(exact: Exact, vectors: Vectors, texts: list[Text], classes: pd.DataFrame) -> None:
    model = exact()
    some = vectors(model)
    with pytest.raises(UsageError, match="at least 1 random"):
        languages(model, some, texts, classes=classes, draws=0)
    with pytest.raises(UsageError, match="vocabulary of 261"):
        languages(model, some, texts, classes=classes.head(5))
    with pytest.raises(UsageError, match="martian"):
        languages(model, some, texts, classes=classes.assign(token_class="martian"))
    with pytest.raises(UsageError, match="every vector is zero"):
        languages(model, some * 0.0, texts, classes=classes)
    with pytest.raises(UsageError, match="resid_post"):
        languages(model, SteeringVectors({Site("attn_out", 1): torch.ones(32)}), texts, classes=classes)
    with pytest.raises(UsageError, match="0 tokens"):
        vocabulary_classes(tiny.tokenizer(), 0)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wordfreq", None)
    with pytest.raises(UsageError, match=r"steerlab\[languages\]"):
        wordfreq_zipf("en")
    assert math.isclose(FLOOR_ZIPF, 2.0)
