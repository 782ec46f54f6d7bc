"""The tuned lens' objective: every layer is to say what the model says (Belrose et al. 2023, arXiv 2303.08112, eq. 8).

    loss = (1 / L·N) Σ_layers Σ_tokens KL(model ‖ lens of the layer),   N = positions that count in the whole batch

The mean over the L translated layers makes the loss nats per layer and token; a layer's own gradient is that of its
mean KL divided by L, which an optimiser such as AdamW, indifferent to scale, does not notice.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from steerlab.batches import TokenBatch
from steerlab.objectives.objective import Learner, Loss


def lens_divergence_loss(kl_nats: Float[Tensor, "layer token"], denominator: float) -> Float[Tensor, ""]:
    """Mean over layers of Σ KL over tokens, divided by `denominator`."""
    return kl_nats.sum() / (len(kl_nats) * denominator)


@dataclass(frozen=True)
class LensDivergence:
    """KL of each layer's lens from the model's own distribution."""

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        """The denominator: positions that count."""
        return batch.over(float(batch.n_tokens))

    def __call__(self, policy: Learner, batch: TokenBatch) -> Loss:
        if batch.denominator is None:
            raise ValueError("call prepare() on the whole batch first")
        return Loss(lens_divergence_loss(policy.lens_divergences(batch), batch.denominator))
