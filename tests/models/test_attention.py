"""A stream of prompts and completions attends as every sequence alone does, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from steerlab.models import LanguageModel, attention, tiny
from steerlab.models.attention import Rule, Segment, Stream, attending
from steerlab.models.forward import planned

CPU = torch.device("cpu")
KV_HEADS, REPEAT, D, D_VALUE = 2, 3, 8, 5
# Two prompts of 4 and 1 tokens; three completions of the first (two brought to one length), two of the second.
SEGMENTS = (
    Segment.of(0, (4,), (0, 0), CPU),
    Segment.of(4, (3, 1), (0, 4), CPU),
    Segment.of(8, (2,), (0, 4), CPU),
    Segment.of(10, (1,), (0, 0), CPU),
    Segment.of(11, (2, 2), (10, 11), CPU),
)
# Slots of every whole sequence: prompt and completion.
SEQUENCES = (
    [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7], [0, 1, 2, 3, 8, 9], [10, 11, 12], [10, 13, 14],
)  # fmt: skip
N_SLOTS = 15


def drawn(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((KV_HEADS * REPEAT, D), (KV_HEADS, D), (KV_HEADS, D_VALUE))
    return [
        torch.randn(1, heads, N_SLOTS, d, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, d in shapes
    ]


def plainly(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Every sequence by itself, written out; slots that several share are the same in all."""
    out = torch.zeros(1, KV_HEADS * REPEAT, N_SLOTS, D_VALUE, dtype=torch.float64)
    for slots in SEQUENCES:
        q = query[0, :, slots]
        k, v = (x[0, :, slots].repeat_interleave(REPEAT, 0) for x in (key, value))
        scores = q @ k.transpose(1, 2) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        at = torch.arange(len(slots))
        hidden = at[None, :] > at[:, None]
        if rule.window is not None:
            hidden = hidden | (at[:, None] - at[None, :] >= rule.window)
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        out = out.index_put((torch.tensor(0), torch.arange(KV_HEADS * REPEAT)[:, None], torch.tensor(slots)), mixed)
    return out


RULES = [Rule(0.3), Rule(0.3, softcap=2.0), Rule(0.5, window=3), Rule(1.0, softcap=1.0, window=2), Rule(1.0, window=1)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("span", [1, 2, 128])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_forward_and_every_gradient(rule: Rule, span: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPAN", span)
    ours, theirs = drawn(), drawn()
    weights = torch.randn(1, KV_HEADS * REPEAT, N_SLOTS, D_VALUE, generator=torch.Generator().manual_seed(5)).double()
    a, b = Stream(SEGMENTS, fused=fused).attend(0, *ours, rule), plainly(*theirs, rule)
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    (a * weights).sum().backward()
    # In the written-out form a shared slot is put once per sequence; the last one counts, all are equal.
    (b * weights).sum().backward()
    for name, x, y in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert x.grad is not None and y.grad is not None
        assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-12), name


def test_gradients_by_finite_differences() -> None:
    query, key, value = (x.detach().requires_grad_() for x in drawn(1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Stream(SEGMENTS).attend(0, q, k, v, Rule(0.4, softcap=3.0, window=4))

    assert torch.autograd.gradcheck(attend, (query, key, value), fast_mode=True)


def test_memory_does_not_hold_the_pattern() -> None:
    """What is saved for the backward pass is queries, keys and values, whatever the context."""
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    tensors = drawn()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        Stream(SEGMENTS).attend(0, *tensors, Rule(1.0))
    assert sorted(saved) == sorted(x.numel() for x in tensors)


def one_by_one(model: LanguageModel, sequences: list[list[int]]) -> list[Tensor]:
    return [model.hidden(torch.tensor([tokens]))[0] for tokens in sequences]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_whole_models_in_one_stream(family: str) -> None:
    """Longer than the tiny models' windows of 24, so that they matter."""
    model = tiny.model(family, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 261, (n,), generator=generator).tolist() for n in (30, 7, 40)]
    stops = list(itertools.accumulate(map(len, texts)))
    segments = [Segment.of(stop - len(t), (len(t),), (0, 0), CPU) for stop, t in zip(stops, texts, strict=True)]
    positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
    with torch.no_grad():
        hidden = planned(model, Stream(segments), torch.tensor([[*itertools.chain(*texts)]]), positions)[0]
        alone = one_by_one(model, texts)
    # transformers' own Gemma 2 and GPT-Neo attend in fp32 inside an fp64 model
    atol = 1e-3 if family in ("gemma2", "gpt_neo") else 1e-9
    for stop, text, expected in zip(stops, texts, alone, strict=True):
        assert torch.allclose(hidden[stop - len(text) : stop], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_the_model_is_as_before_also_after_an_error(family: str) -> None:
    model = tiny.model(family)
    tokens = torch.tensor([[5, 6, 7]])
    before, kind = model.logits(tokens), model.hf.config._attn_implementation
    with pytest.raises(RuntimeError, match="broken"), attending(model, Stream(())):
        raise RuntimeError("broken")
    assert model.hf.config._attn_implementation == kind
    assert torch.equal(model.logits(tokens), before)
