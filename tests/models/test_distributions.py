"""What is read of distributions block by block, against distributions that are held whole."""

from __future__ import annotations

import pytest
import torch

from steerlab.models import LanguageModel, distributions, tiny
from steerlab.models.distributions import Said, Vocabulary

K, WATCH = 7, (5, 50, 99)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that there are several, the last of them shorter."""
    monkeypatch.setattr(distributions, "VOCABULARY", 48)
    monkeypatch.setattr(distributions, "POSITIONS", 16)
    if request.param == "torch":
        monkeypatch.setattr(distributions, "absorber", lambda _device: distributions.absorb)


def states_of(model: LanguageModel, n: int = 3, positions: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(positions, model.d_model, generator=generator).to(model.dtype) for _ in range(n)]


def read(model: LanguageModel, hidden: list[torch.Tensor], k: int = K) -> Said:
    with torch.no_grad():
        return Vocabulary(model).read(hidden, k, torch.tensor(WATCH))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_as_if_held_whole(family: str, dtype: torch.dtype) -> None:
    model = tiny.model(family, dtype=dtype)
    hidden = states_of(model)
    said, exact = read(model, hidden), torch.promote_types(dtype, torch.float32)
    near = 1e-10 if exact == torch.float64 else 2e-5
    whole = [model.unembed(states).to(exact).log_softmax(-1) for states in hidden]
    for layer, logprobs in enumerate(whole):
        top = logprobs.topk(K)
        assert torch.allclose(said.top_logprobs[layer], top.values, atol=near)
        assert torch.allclose(logprobs.gather(1, said.top_ids[layer]), top.values, atol=near)  # ties are any of them
        for w, token in enumerate(WATCH):
            assert torch.equal(said.ranks[layer, :, w], (logprobs > logprobs[:, token, None]).sum(-1))
            assert torch.allclose(said.watched_logprobs[layer, :, w], logprobs[:, token], atol=near)
        assert torch.allclose(said.entropy_nats[layer], -(logprobs.exp() * logprobs).sum(-1), atol=near)
        kl = (whole[-1].exp() * (whole[-1] - logprobs)).sum(-1)
        assert torch.allclose(said.kl_nats[layer], kl, atol=near)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("k", [1, 48, 100])
def test_any_number_of_tokens(k: int) -> None:
    """Also more than a block has."""
    model = tiny.model("llama", dtype=torch.float64)
    hidden = states_of(model)
    said = read(model, hidden, k)
    for layer, states in enumerate(hidden):
        assert torch.equal(said.top_ids[layer], model.unembed(states).topk(k).indices)


@pytest.mark.usefixtures("way")
def test_a_sharp_distribution_after_a_flat_one() -> None:
    """Sums of early blocks shrink to nothing where a later block has a logit far above theirs."""
    model = tiny.model("llama", dtype=torch.float64)
    hidden = states_of(model)
    logits = torch.stack([model.unembed(400 * states) for states in hidden])
    said = read(model, [400 * states for states in hidden])
    logprobs = logits.log_softmax(-1)
    kl = (logprobs[-1].exp() * (logprobs[-1] - logprobs)).sum(-1)
    assert float(kl.max()) > 100 and torch.allclose(said.kl_nats, kl, rtol=1e-10, atol=1e-10)
    assert torch.allclose(said.top_logprobs, logprobs.topk(K).values, atol=1e-10)


def test_a_head_with_a_bias() -> None:
    model = tiny.model("gpt2", dtype=torch.float64)
    model.unembedding.bias = torch.nn.Parameter(torch.linspace(-2, 2, model.d_vocab, dtype=torch.float64), False)
    hidden = states_of(model)
    said = read(model, hidden)
    logprobs = model.unembed(hidden[0]).log_softmax(-1)
    assert torch.allclose(said.top_logprobs[0], logprobs.topk(K).values, atol=1e-10)
    assert torch.allclose(said.watched_logprobs[0], logprobs[:, WATCH], atol=1e-10)
