"""Credit within a group: rewards of the completions of one prompt → one number each. Pure functions.

With K completions and mean m: leave-one-out gives r_i − mean of the others = K/(K−1)·(r_i − m), the estimator of
both steering papers (1.0667 × the centred reward at K = 16); `GroupMean` is the same without the factor (Dr. GRPO);
`GroupNormalised` divides by the group's standard deviation (GRPO), Bessel-corrected with 1e-4 added as in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from steerlab.errors import UsageError


@runtime_checkable
class Advantage(Protocol):
    """Rewards of one group → advantages of the same shape; a group of equal rewards gives zeros."""

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]: ...


@dataclass(frozen=True)
class LeaveOneOut:
    """r_i minus the mean of the others (RLOO). Needs two completions per prompt."""

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        if len(rewards) < 2:
            raise UsageError("leave-one-out needs at least 2 samples per prompt; raise `samples`")
        relative = _shifted(rewards)
        return relative - (relative.sum() - relative) / (len(rewards) - 1)


@dataclass(frozen=True)
class GroupMean:
    """r_i minus the group's mean."""

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        relative = _shifted(rewards)
        return relative - relative.mean()


@dataclass(frozen=True)
class GroupNormalised:
    """r_i minus the group's mean, divided by the group's standard deviation + `epsilon`."""

    epsilon: float = 1e-4

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        if len(rewards) < 2:
            raise UsageError("group normalisation needs at least 2 samples per prompt; raise `samples`")
        relative = _shifted(rewards)
        return (relative - relative.mean()) / (relative.std() + self.epsilon)


def _shifted(rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
    """Counted from the first one, which no advantage notices, so that equal rewards give exactly zero."""
    return rewards - rewards[:1]
