"""Perplexity and divergences against the two models' own logits, identities, neutral texts, what is refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.corpus import OWN, Prose
from steerlab.errors import UsageError
from steerlab.interp import side_effects as effects
from steerlab.interp.neutral import Neutral, neutral
from steerlab.interp.side_effects import side_effects
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.rollouts import Evaluation, Sampling
from steerlab.tasks import Task

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


def logprobs(model: LanguageModel, adapter: SteeringVectors | None, text: Text) -> torch.Tensor:
    tokens = torch.tensor([text.tokens])
    with torch.no_grad():
        if adapter is None:
            return model.logits(tokens)[0, :-1].log_softmax(-1)
        with adapter.attach(model):
            return model.logits(tokens)[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("chunk", [2, 128])
def test_it_is_what_the_logits_say(
    family: str,
    chunk: int,
    exact: Exact,
    vectors: Vectors,
    texts: list[Text],
    pick: Pick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(effects, "CHUNK_POSITIONS", chunk)
    model = exact(family)
    sets = {"base": None, "steered": vectors(model), "back": -vectors(model)}
    found = side_effects(model, sets, Neutral("mine", tuple(texts)))
    assert set(found["measured_on"]) == {"mine"} and set(found["n"]) == {2}
    for name, adapter in sets.items():
        told: dict[str, list[float]] = {"perplexity": [], "kl_steered_base": [], "kl_base_steered": []}
        for text in texts:
            p, q = (logprobs(model, which, text) for which in (None, adapter))
            said = torch.tensor(text.tokens[1:])
            told["perplexity"].append(-float(q[torch.arange(len(said)), said].mean()))
            told["kl_steered_base"].append(float((q.exp() * (q - p)).sum(-1).mean()))
            told["kl_base_steered"].append(float((p.exp() * (p - q)).sum(-1).mean()))
        for quantity, values in told.items():
            row = pick(found, condition=name, quantity=quantity).iloc[0]
            change = np.exp if quantity == "perplexity" else np.abs
            assert row["value"] == pytest.approx(float(change(np.mean(values))), abs=1e-9)
            assert row["low"] == pytest.approx(float(change(min(values))), abs=1e-9)  # of two texts: the two
            assert row["high"] == pytest.approx(float(change(max(values))), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_vectors_have_no_side_effect(dtype: torch.dtype, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    from steerlab.models import tiny

    model = tiny.model("llama", dtype=dtype)
    found = side_effects(model, {"base": None, "zero": vectors(model) * 0.0}, Neutral("mine", tuple(texts)))
    divergences = found.loc[found["quantity"] != "perplexity"]
    assert (divergences[["value", "low", "high"]] == 0).all().all() and len(divergences) == 4
    perplexity = pick(found, quantity="perplexity").set_index("condition")
    assert (perplexity.loc["base", ["value", "low", "high"]] == perplexity.loc["zero", ["value", "low", "high"]]).all()


def test_another_task_is_scored_beside(
    tiny_llama: LanguageModel, vectors: Vectors, texts: list[Text], letters: Task, pick: Pick
) -> None:
    evaluation = Evaluation(samples=2, sampling=Sampling(max_new_tokens=4), limit=3)
    sets = {"base": None, "steered": vectors(tiny_llama), "none": vectors(tiny_llama) * 0.0}
    heard: list[str] = []
    found = side_effects(
        tiny_llama,
        sets,
        Neutral("mine", tuple(texts)),
        task=letters,
        evaluation=evaluation,
        done=lambda name, n: heard.append(name),
    )
    scores = pick(found, quantity="avg@2").set_index("condition")
    assert set(scores["measured_on"]) == {"letters"} and set(scores["n"]) == {3} and set(scores.index) == set(sets)
    assert scores.loc["base", "value"] == scores.loc["none", "value"] and set(heard) == set(sets)


def test_one_text_has_no_interval(tiny_llama: LanguageModel, vectors: Vectors, texts: list[Text]) -> None:
    found = side_effects(tiny_llama, {"steered": vectors(tiny_llama)}, Neutral("one", (texts[0],)))
    assert found["low"].isna().all() and found["high"].isna().all() and found["value"].notna().all()


def test_neutral_text_without_any_file(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEERLAB_DATA", raising=False)
    found = neutral(tiny_llama)
    assert found == neutral(tiny_llama, "") and found.name == OWN and len(found.texts) == 14
    assert {len(text.tokens) for text in found.texts} == {128}
    words = Prose().text().split()
    assert len(words) > 300 and tiny_llama.tokenizer.decode(found.texts[0].tokens).startswith(" ".join(words[:8]))
    few = neutral(tiny_llama, limit=3, n_tokens=20)
    assert len(few.texts) == 3 and {len(text.tokens) for text in few.texts} == {20}


def test_neutral_text_from_files(tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paragraphs = [f"paragraph {i} " + "of wrapped\nwords " * 12 for i in range(6)]
    content = " = Title = \r\n\r\n" + "\n \n".join(paragraphs)
    (tmp_path / "own.txt").write_text(content)
    found = neutral(tiny_llama, tmp_path / "own.txt", limit=3, n_tokens=64)
    starts = [tiny_llama.tokenizer.decode(text.tokens)[:12] for text in found.texts]
    assert found.name == "own.txt" and starts == ["paragraph 0 ", "paragraph 2 ", "paragraph 4 "]
    (tmp_path / "english-text").mkdir()
    (tmp_path / "english-text" / "wikitext-2-valid.txt.gz").write_bytes(gzip.compress(content.encode()))
    monkeypatch.setenv("STEERLAB_DATA", str(tmp_path))
    there = neutral(tiny_llama, limit=3, n_tokens=64)
    assert there.name == "wikitext-2-valid.txt.gz" and there.texts == found.texts
    assert neutral(tiny_llama, "").name == OWN


def test_what_is_no_neutral_text_is_refused(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short\n\nand short")
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no paragraph of 32 tokens"):
        neutral(tiny_llama, tmp_path / "short.txt")
    for name in ("broken.gz", "binary.txt", "missing.txt"):
        with pytest.raises(UsageError, match="cannot be read as text"):
            neutral(tiny_llama, tmp_path / name)
    with pytest.raises(UsageError, match="neutral text"):
        neutral(tiny_llama, limit=0)


def test_what_cannot_be_measured_is_refused(tiny_llama: LanguageModel, texts: list[Text]) -> None:
    with pytest.raises(UsageError, match="no conditions"):
        side_effects(tiny_llama, {}, Neutral("mine", tuple(texts)))
    with pytest.raises(UsageError, match="one token"):
        side_effects(tiny_llama, {"base": None}, Neutral("mine", (Text((40,), 1),)))
    with pytest.raises(UsageError, match="nothing to read"):
        side_effects(tiny_llama, {"base": None}, Neutral("mine", ()))
