"""What is left of an effect under patches: by answers and on texts, against everything done the long way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp import patched as p
from steerlab.interp.patching import patched_answers, patched_texts
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, tiny
from steerlab.plots.patching import patching as plot
from steerlab.rollouts import Evaluation, Sampling
from steerlab.tasks import Task

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


def of(table: pd.DataFrame, column: str, **wanted: object) -> float:
    for name, value in wanted.items():
        table = table.loc[table[name] == value]
    assert len(table) == 1
    return float(table[column].iloc[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_texts_the_long_way(family: str, exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact(family)
    vector = vectors(model, layers=(1,))
    table = patched_texts(model, vector, texts, p.sweep(model, "head"), control=False)

    def logprobs(adapter: object, text: Text) -> torch.Tensor:
        tokens = torch.tensor([text.tokens])
        with torch.no_grad():
            if adapter is None:
                return model.logits(tokens)[0, text.n_prompt - 1 : -1].log_softmax(-1)
            with adapter.attach(model):  # type: ignore[attr-defined]
                return model.logits(tokens)[0, text.n_prompt - 1 : -1].log_softmax(-1)

    for patch in (p.skip("head", 1), p.skip_attention(), p.skip_mlp()):
        kls, to_base, differences = [], [], []
        for text in texts:
            whole, plain = logprobs(vector, text), logprobs(None, text)
            cut = logprobs(p.Patched(vector, patch), text)
            kls.append(float((whole.exp() * (whole - cut)).sum(-1).mean()))
            to_base.append(float((whole.exp() * (whole - plain)).sum(-1).mean()))
            answer = torch.tensor(text.tokens[text.n_prompt :])
            told = []
            for at, token in enumerate(answer.tolist()):
                others = plain[at].clone()
                others[token] = -torch.inf
                told.append(float(cut[at, token] - cut[at, int(others.argmax())]))
            differences.append(np.mean(told))
        assert of(table, "value", patch=patch.name, metric="kl_nats") == pytest.approx(np.mean(kls), abs=1e-10)
        kept = 1 - np.mean(kls) / np.mean(to_base)
        assert of(table, "kept", patch=patch.name, metric="kl_nats") == pytest.approx(kept, abs=1e-8)
        assert of(table, "value", patch=patch.name, metric="logit_diff") == pytest.approx(
            np.mean(differences), abs=1e-9
        )


def test_the_ends_of_the_scale(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    table = patched_texts(model, vectors(model, layers=(1,)), texts, [], metrics=("kl_nats",))
    assert set(table["sender"]) == {"trained", "random"}
    assert set(table["patch"]) == {line().name for line in p.LINES}
    for sender in ("trained", "random"):
        assert of(table, "kept", sender=sender, patch="no_patch") == pytest.approx(1)
        assert of(table, "kept", sender=sender, patch="base") == pytest.approx(0, abs=1e-12)
        assert of(table, "value", sender=sender, patch="no_patch") == pytest.approx(0, abs=1e-12)


def test_seeds_are_pooled(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    """Two equal seeds on the same texts say what one says."""
    model = exact()
    vector = vectors(model, layers=(1,))
    one = patched_texts(model, vector, texts, [p.skip("head", 0)], control=False)
    two = patched_texts(model, [vector, vector], [texts, texts], [p.skip("head", 0)], control=False)
    assert np.allclose(one["value"], two["value"]) and set(two["n_seeds"]) == {2}


def test_a_patch_that_matters_changes_answers(letters: Task) -> None:
    """Causal: a vector of the block before the last that makes the first token a letter acts through the residual
    stream, so skipping attention leaves its effect and taking the vector away does not."""
    model = tiny.model("llama")
    direction = model.unembedding.weight[model.tokenizer.encode("a")[0]].detach()
    vector = SteeringVectors({Site("resid_post", model.n_layers - 2): 500 * direction})
    evaluation = Evaluation(samples=2, sampling=Sampling(max_new_tokens=1))
    table = patched_answers(model, letters, vector, [p.skip("head", 0)], evaluation)
    assert of(table, "value", patch="no_patch") > of(table, "value", patch="base") + 0.3
    assert of(table, "kept", patch="skip_attention") == pytest.approx(1, abs=0.2)
    assert of(table, "kept", patch="base") == 0
    assert len(plot(table).data) > 3


def test_figure(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    table = patched_texts(model, vectors(model, layers=(1,)), texts, [*p.sweep(model, "head"), *p.sweep(model, "v")])
    figure = plot(table.loc[table["metric"] == "kl_nats"])
    titles = [note.text for note in figure.layout.annotations]
    assert any("skip head" in title for title in titles) and any("steer v" in title for title in titles)
    kept = plot(table.loc[table["metric"] == "kl_nats"], "random", "kept")
    assert "kept" in kept.layout.yaxis.title.text
    with pytest.raises(UsageError, match="one metric"):
        plot(table)
    with pytest.raises(UsageError, match="empty"):
        plot(table.iloc[:0])


def test_bad_input_is_one_line(exact: Exact, vectors: Vectors, texts: list[Text], letters: Task) -> None:
    model = exact()
    vector, other = vectors(model, layers=(1,)), vectors(model, layers=(2,))

    def refused(says: str, ask: Callable[[], object]) -> None:
        with pytest.raises(UsageError, match=says) as caught:
            ask()
        assert "\n" not in str(caught.value)

    refused("different layers", lambda: patched_texts(model, [vector, other], texts, []))
    refused("at least one set", lambda: patched_texts(model, [], texts, []))
    refused("at least one text", lambda: patched_texts(model, vector, [], []))
    refused("one per seed", lambda: patched_texts(model, [vector, vector], [texts], []))
    refused("no block behind", lambda: patched_answers(model, letters, vectors(model, layers=(3,)), [], Evaluation()))
    refused("does not exist", lambda: patched_answers(model, letters, vector, [p.skip("head", 99)], Evaluation()))
