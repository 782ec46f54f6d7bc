"""What an objective is, and what it may ask of the thing that learns.

Objectives are mathematics: they see tensors and a `Learner`, never a model. `rollouts.Policy` is a Learner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from steerlab.batches import Batch, RolloutBatch, TokenBatch


@runtime_checkable
class Learner(Protocol):
    """The policy being trained, as an objective sees it."""

    def logprobs(self, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
        """Log-probability (nats) of each completion token at the batch's temperature; 0 on padding. Has a graph."""
        ...

    def reference_logprobs(self, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
        """The same under the reference policy, without a graph."""
        ...

    def lens_divergences(self, batch: TokenBatch) -> Float[Tensor, "layer token"]:
        """KL (nats) of what each translated layer says from what the model says, at every position that counts, row
        after row. Has a graph in the translators. Raises UsageError where there are none."""
        ...


@dataclass(frozen=True)
class Loss:
    """value: what is differentiated. metrics: of this micro-batch; the trainer reports the largest of a step."""

    value: Float[Tensor, ""]
    metrics: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """Frozen, callable. `prepare` sees the whole batch once; the call sees one micro-batch of what it returned. Which
    kind of batch it takes is its own: a recipe pairs it with a source that makes such."""

    def prepare(self, batch: Any) -> Batch:
        """All that needs the whole batch: advantages, the denominator, and leaving out rows that cannot matter."""
        ...

    def __call__(self, policy: Learner, batch: Any) -> Loss: ...
