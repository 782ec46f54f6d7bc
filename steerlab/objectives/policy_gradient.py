"""REINFORCE on completions, as both steering papers train (arXiv 2505.18706, 2509.06608).

    loss = −(1/N) Σ_rows A_row Σ_t log π(y_t | ·),   N = all completion tokens of the batch

The denominator is global, so every token weighs the same however the batch is cut; groups without a signal count
in it but need no forward pass. There is one update per batch, so the importance ratio is exactly 1 and there is
nothing to clip. No KL term, no entropy term, no value function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlab.batches import RolloutBatch
from steerlab.objectives.advantages import Advantage, LeaveOneOut
from steerlab.objectives.objective import Learner, Loss


def policy_gradient_loss(
    logprobs: Float[Tensor, "row pos"],
    advantages: Float[Tensor, " row"],
    mask: Bool[Tensor, "row pos"],
    denominator: float,
) -> Float[Tensor, ""]:
    """−Σ A·log π over masked tokens, divided by `denominator`."""
    return -(logprobs * advantages[:, None] * mask).sum() / denominator


@dataclass(frozen=True)
class PolicyGradient:
    """advantage: how a group's rewards become credit."""

    advantage: Advantage = LeaveOneOut()

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Advantages per group, the token-global denominator, and only the rows with a non-zero advantage."""
        advantages = torch.zeros_like(batch.rewards)
        for g in range(len(batch.prompts)):
            rows = batch.group == g
            advantages[rows] = self.advantage(batch.rewards[rows])
        ready = replace(batch, advantages=advantages, denominator=float(batch.n_tokens))
        return ready.select(torch.nonzero(advantages).flatten())

    def __call__(self, policy: Learner, batch: RolloutBatch) -> Loss:
        if batch.advantages is None or batch.denominator is None:
            raise ValueError("call prepare() on the whole batch first")
        logprobs = policy.logprobs(batch)
        mask = batch.mask.to(logprobs.device)
        advantages = batch.advantages.to(logprobs)
        value = policy_gradient_loss(logprobs, advantages, mask, batch.denominator)
        drift = (logprobs.detach() - batch.logprobs.to(logprobs)) * mask
        return Loss(value, {"drift_nats": float(drift.abs().max()) if len(batch) else 0.0})
