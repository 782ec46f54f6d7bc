"""Token-wise scaling: λ is what the adapter adds, and shares are counted right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from steerlab.adapters import LoRA, LoRAWeights
from steerlab.errors import UsageError
from steerlab.interp.adaptive import adaptive, shares
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.models.hooks import cache
from steerlab.plots.adaptive import adaptive as draw
from steerlab.plots.adaptive import adaptive_shares
from steerlab.tasks import encode, make, segments

Exact = Callable[..., LanguageModel]
RANK_1 = LoRA(rank=1, alpha=1.0, targets=("down_proj",), layers=(1, 2))
NAMES = [["system", "question", "question"], ["system", "question"]]


@pytest.fixture
def weights() -> Callable[..., LoRAWeights]:
    def made(model: LanguageModel, spec: LoRA = RANK_1) -> LoRAWeights:
        found = spec.init(model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, up in found.pairs.values():
                up.copy_(torch.randn(up.shape, generator=generator))
        return found

    return made


def test_scale_is_the_length_of_what_is_added(exact: Exact, texts: list[Text], weights: Callable) -> None:
    model = exact()
    low_rank = weights(model, LoRA(rank=1, alpha=1.0, targets=("down_proj",), layers=(1,)))
    table = adaptive(model, low_rank, texts, NAMES)
    site, found = Site("mlp_out", 1), []
    for text in texts:
        tokens = torch.tensor([text.tokens])
        with low_rank.attach(model):
            steered = cache(model, tokens, [site])[site][0]
        base = cache(model, tokens, [site])[site][0]  # nothing below block 1 differs
        found.append(((steered - base).norm(dim=-1), base.norm(dim=-1)))
    added, written = (torch.cat(parts) for parts in zip(*found, strict=True))
    expected = (added / written.mean()).detach().numpy()
    assert np.allclose(table["scale"].abs(), expected, atol=1e-9)
    assert table["scale"].mean() > 0
    assert draw(table).data


def test_turning_both_vectors_round_changes_nothing(exact: Exact, texts: list[Text], weights: Callable) -> None:
    model = exact()
    low_rank = weights(model)
    before = adaptive(model, low_rank, texts, NAMES)
    with torch.no_grad():
        for down, up in low_rank.pairs.values():
            down.neg_()
            up.neg_()
    pd.testing.assert_frame_equal(adaptive(model, low_rank, texts, NAMES), before)


def of_scales(scales: np.ndarray, names: list[str]) -> pd.DataFrame:
    rows = [
        {"text": t, "position": p, "token": "x", "segment": names[p], "layer": 0, "scale": float(s), "cosine": 0.0}
        for t, row in enumerate(scales)
        for p, s in enumerate(row)
    ]
    return pd.DataFrame(rows)


def test_shares_find_a_planted_preference() -> None:
    names = ["system"] * 11 + ["question"] * 10 + ["answer"] * 10
    planted = np.tile(np.where(np.array(names) == "question", 5.0, 1.0), (6, 1))
    planted[:, 0] = 1e6  # the first token is left out
    found = shares(of_scales(planted, names)).set_index("segment")
    assert found.loc["question", "magnitude_share"] == pytest.approx(50 / 70)
    assert found.loc["question", "token_share"] == pytest.approx(1 / 3)
    assert found["p"].lt(0.05).all()
    assert adaptive_shares(found.reset_index()).data


def test_smooth_noise_is_no_preference() -> None:
    names = ["system"] * 11 + ["question"] * 10 + ["answer"] * 10
    generator = np.random.default_rng(0)
    # slow waves with a random phase: large stretches of every text, but on no segment in particular
    waves = np.stack([1 + np.sin(np.arange(31) / 5 + generator.uniform(0, 6.28)) for _ in range(12)])
    assert shares(of_scales(waves, names))["p"].gt(0.05).all()


def test_segments_of_a_prompt(exact: Exact) -> None:
    tokenizer = exact().tokenizer
    task = make("chain_sum", system="Be brief.", shots=1, opening="So ")
    prompt = task.prompt(task.problems("test")[0])
    ids, names = encode(prompt, tokenizer), segments(prompt, tokenizer)
    assert len(ids) == len(names)
    words: dict[str, str] = {}
    for token, name in zip(ids, names, strict=True):
        words[name] = words.get(name, "") + tokenizer.decode([token])
    assert words["system"] == "Be brief."
    assert words["question"] == prompt.messages[-1].content
    assert words["example"] == prompt.messages[1].content + prompt.messages[2].content
    assert words["opening"] == "So "
    assert words["generation prompt"] == "<|end|><|assistant|>"


def test_bad_input(exact: Exact, texts: list[Text], weights: Callable) -> None:
    model = exact()
    with pytest.raises(UsageError, match="rank 1 on down_proj"):
        adaptive(model, weights(model, LoRA(rank=2, targets=("down_proj",))), texts, NAMES)
    with pytest.raises(UsageError, match="rank 1 on down_proj"):
        adaptive(model, weights(model, LoRA(rank=1, targets=("up_proj",))), texts, NAMES)
    with pytest.raises(UsageError, match="still zero"):
        adaptive(model, RANK_1.init(model), texts, NAMES)
    with pytest.raises(UsageError, match="name one per token"):
        adaptive(model, weights(model), texts, [["system"], ["system", "question"]])
