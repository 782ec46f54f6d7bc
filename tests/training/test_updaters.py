"""AdamW: warm-up, clipping, state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steerlab.errors import UsageError
from steerlab.training import AdamW
from steerlab.training.updaters import LARGEST_RATE


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(3)]


def give_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator)


def test_warm_up_is_linear_then_constant() -> None:
    spec = AdamW(lr=1.0, warmup=0.03)
    assert [spec.rate(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert spec.rate(99, 100) == 1.0
    assert AdamW(lr=0.5, warmup=0.0).rate(0, 100) == 0.5
    assert AdamW(lr=0.5, warmup=0.03).rate(0, 20) == 0.5


def test_is_torchs_adamw_on_clipped_gradients() -> None:
    ours, theirs = parameters(), parameters()
    updater = AdamW(lr=0.1, warmup=0.0, clip=2.0, weight_decay=0.01).open(ours, 10)
    optimiser = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01)
    for step, scale in enumerate((0.1, 50.0, 0.0, 1.0)):
        give_gradients(ours, step, scale)
        give_gradients(theirs, step, scale)
        norm = torch.cat([p.grad for p in theirs]).norm()
        for p in theirs:
            p.grad *= torch.clamp(2.0 / (norm + 1e-6), max=1.0)
        optimiser.step()
        reported = updater.update(step)
        assert reported["grad_norm"] == pytest.approx(float(norm), rel=1e-6), "the norm is that before clipping"
        assert reported["lr"] == 0.1
        assert all(p.grad is None for p in ours)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-6)


def test_warm_up_scales_the_first_steps() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    AdamW(lr=0.1, warmup=0.03, eps=1e-12).open(params, 100).update(0)
    for p, b in zip(params, before, strict=True):  # Adam's first step has length lr in every coordinate
        assert torch.allclose((p.detach() - b).abs(), torch.tensor(0.025), rtol=1e-4)


def test_state_round_trip() -> None:
    spec, straight = AdamW(lr=0.1), parameters()
    updater = spec.open(straight, 10)
    for step in range(3):
        give_gradients(straight, step, 3.0)
        updater.update(step)
    resumed = [nn.Parameter(p.detach().clone()) for p in straight]
    again = spec.open(resumed, 10)
    assert again.snapshot() == {} and again.state_bytes == 0
    state = updater.snapshot()
    again.restore(state)
    assert again.snapshot().keys() == state.keys()
    assert all(torch.equal(again.snapshot()[k], state[k]) for k in state)
    for step in range(3, 6):
        for params, up in ((straight, updater), (resumed, again)):
            give_gradients(params, step, 3.0)
            up.update(step)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert all(torch.equal(again.snapshot()[k], v) for k, v in updater.snapshot().items())
    assert not all(torch.equal(state[k], v) for k, v in updater.snapshot().items()), "a snapshot is a copy"
    assert updater.state_bytes == 3 * (2 * 5 * 4 + 4)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"warmup": 1.0},
        {"warmup": -0.1},
        {"clip": 0.0},
    ],
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        AdamW(**options)


def test_rates_that_torch_cannot_hold_are_refused() -> None:
    """torch would speak of a value that cannot be converted without overflow."""
    with pytest.raises(UsageError, match=r"learning rate is 1e\+38; .* at most 1e\+30"):
        AdamW(lr=1e38)
    params = parameters()
    give_gradients(params, 0)
    AdamW(lr=LARGEST_RATE, warmup=0.0).open(params, 1).update(0)
    assert all(bool(torch.isfinite(p).all()) for p in params)
