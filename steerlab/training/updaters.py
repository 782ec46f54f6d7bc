"""How gradients become new parameters: AdamW with a warm-up and a limit on the gradient's norm.

The papers' settings (core of 2505.18706, 2509.06608): AdamW without weight decay, linear warm-up over 3 % of the steps
then constant, gradient norm clipped at 2. The optimiser itself is torch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerlab.errors import UsageError

LARGEST_RATE = 1e30  # AdamW's step, some times the rate, is an fp32 number; vectors of this size are no use long before


@dataclass(frozen=True)
class AdamW:
    """lr: peak learning rate. warmup: share of all steps spent raising it from zero. clip: largest gradient norm."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.lr <= LARGEST_RATE:
            raise UsageError(f"learning rate is {self.lr}; it must be positive and at most {LARGEST_RATE:g}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is {self.warmup}; it is a share of the steps, 0 or more and below 1")
        if not self.clip > 0:
            raise UsageError(f"clip is {self.clip}; the largest gradient norm must be positive (infinity for no limit)")

    def open(self, parameters: Iterable[nn.Parameter], total_steps: int) -> Updater:
        """The updater of one run."""
        return Updater(self, list(parameters), total_steps)

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of step `step` (from 0)."""
        warm = int(self.warmup * total_steps)
        return self.lr * min(1.0, (step + 1) / (warm + 1))


class Updater:
    """AdamW over a few parameters, whose state is a flat dict of tensors."""

    def __init__(self, spec: AdamW, parameters: list[nn.Parameter], total_steps: int) -> None:
        self.spec, self.parameters, self.total_steps = spec, parameters, total_steps
        self.optimiser = torch.optim.AdamW(
            parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
        )

    def update(self, step: int) -> dict[str, float]:
        """One step from the accumulated gradients, which are then cleared. Reports rate and norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.spec.clip)
        rate = self.spec.rate(step, self.total_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {"lr": rate, "grad_norm": float(norm)}

    @property
    def state_bytes(self) -> int:
        """Bytes that the optimiser keeps beside the parameters."""
        return sum(t.numel() * t.element_size() for t in self.snapshot().values())

    def snapshot(self) -> dict[str, Tensor]:
        """First and second moments and the step counter of every parameter that has been updated."""
        state = self.optimiser.state_dict()["state"]
        return {f"{i}.{name}": tensor.clone() for i in sorted(state) for name, tensor in sorted(state[i].items())}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a snapshot back."""
        whole = self.optimiser.state_dict()
        whole["state"] = {}
        for key, tensor in state.items():
            index, name = key.split(".", 1)
            whole["state"].setdefault(int(index), {})[name] = tensor.clone()
        self.optimiser.load_state_dict(whole)
