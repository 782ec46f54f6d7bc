"""Decode steps that a GPU captures, replayed on a CPU: recorded once, operator by operator, and done again on the same
tensors. What is sampled is what is sampled call by call; a question to the device would end a capture, and is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from steerlab.adapters import LoRA, RowBank, Scope, Steering, SteeringVectors
from steerlab.models import LanguageModel, Site, graphs, tiny
from steerlab.rollouts import Policy, Rows, Sampling

LONG = [(7 * i) % 200 + 10 for i in range(30)]  # beyond the tiny models' windows
PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50], LONG]
SAMPLING = Sampling(max_new_tokens=24, stop=tuple("abcdefghijklmnopqrstuvwxyzABCDEF"))
# Results depend on numbers, or whose shapes do: a GPU would have to be waited for.
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")


class Recording(TorchDispatchMode):
    """Notes every operator with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.changed: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ASKING, f"{name} asks the device"
        indices = tree_flatten(args[1])[0] if name in ("index", "index_put", "index_put_") else []
        assert not any(t is not None and t.dtype == torch.bool for t in indices), f"{name} by a mask asks the device"
        for tensor, of in zip(args, func._schema.arguments, strict=False):
            if of.alias_info is not None and of.alias_info.is_write:
                self.changed.append((tensor, tensor.clone()))
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out


class Replayed:
    """In place of `graphs.Captured`. The recording itself does a step; what it changed is put back."""

    leave, least = graphs.Captured.leave, graphs.Captured.least
    made = 0

    def __init__(self, step: Callable[[], None]) -> None:
        Replayed.made += 1
        step()
        recording = Recording()
        with recording:
            step()
        self.done = recording.done
        for changed, before in reversed(recording.changed):
            changed.copy_(before)

    def __call__(self) -> None:
        for func, args, kwargs, before in self.done:
            for old, new in zip(tree_flatten(before)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def exact(family: str) -> LanguageModel:
    return tiny.model(family, dtype=torch.float64)


def vectors(model: LanguageModel, seed: int = 0, scope: Scope = Scope()) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    sites = [Site("resid_post", layer) for layer in (1, 3)]
    return SteeringVectors({s: 0.3 * torch.randn(32, generator=generator, dtype=torch.float64) for s in sites}, scope)


def both(model: LanguageModel, adapter: Any, monkeypatch: pytest.MonkeyPatch, members: int = 1) -> None:
    """Asserts that both ways give the same."""
    rows, policy = Rows.grid([5, 6, 7], 6, members=members), Policy(model, adapter)
    rows = replace(rows, limit=1 + 5 * torch.arange(len(rows)) % 22)
    eager = policy.sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    monkeypatch.setattr(graphs, "Captured", Replayed)
    monkeypatch.setattr(model, "steps", "captured")
    # What transformers itself does while a stream is captured: GPT-2 does not look for padding tokens then.
    monkeypatch.setattr("transformers.modeling_utils.is_tracing", lambda _: True)
    Replayed.made = 0
    captured = policy.sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    assert Replayed.made > 1, "no row left the batch, so only one graph was tried"
    assert torch.equal(eager.tokens, captured.tokens) and torch.equal(eager.lengths, captured.lengths)
    assert torch.equal(eager.finished, captured.finished)
    assert torch.allclose(eager.logprobs, captured.logprobs, rtol=0, atol=1e-9)
    if eager.slopes is not None:
        real = torch.arange(eager.slopes.shape[1]) < eager.lengths[:, None]
        assert torch.allclose(eager.slopes[real], captured.slopes[real], rtol=0, atol=1e-9)
    if eager.written is not None:
        fed = torch.arange(eager.written.shape[1]) < eager.lengths[:, None] - 1
        assert torch.allclose(eager.written[fed], captured.written[fed], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_is_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact(family)
    both(model, vectors(model), monkeypatch)


@pytest.mark.parametrize("scope", [Scope.generated(), Scope.predicting(0, 3), Scope.after(60)])
def test_row_banks_and_scopes(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact("llama")
    both(model, RowBank([vectors(model, 1, scope), None, vectors(model, 2, scope)]), monkeypatch, members=3)


def test_low_rank_and_one_late_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact("qwen3")
    both(model, LoRA(rank=2, alpha=4.0).init(model, torch.Generator().manual_seed(0)), monkeypatch)
    both(model, Steering((3,)).init(model), monkeypatch)


def test_what_is_asked_of_the_device_is_noticed() -> None:
    x = torch.ones(3)
    for ask in (lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.nonzero(x), lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="asks the device"), Recording():
            ask()


def test_a_cpu_has_no_graphs() -> None:
    model = tiny.model("llama")
    assert not graphs.able(model) and graphs.measured_choice(model) == "eager"
