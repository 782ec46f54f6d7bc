"""A policy: a frozen model with an adapter, which speaks (sample) and is asked what it would have said (logprobs).

Log-probabilities are teacher-forced without padding: prompts and completions stand one behind the other in one row of
tokens, each prompt once per group, with the graph intact; the head is applied to completion tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from steerlab.adapters import Adapter, Attached, TunedLens
from steerlab.batches import RolloutBatch, TokenBatch
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, engine
from steerlab.models.attention import Stream
from steerlab.models.divergence import divergences
from steerlab.models.forward import planned
from steerlab.models.head import recorded_logprobs, token_logprobs
from steerlab.rollouts.packing import Packed
from steerlab.rollouts.sampler import Completions, Prompts, Rows, sample
from steerlab.rollouts.sampling import Sampling


class Policy:
    """model: frozen. adapter: what is added, None for the base model. reference: what the policy is compared with
    (None is the base model)."""

    def __init__(self, model: LanguageModel, adapter: Adapter | None = None, reference: Adapter | None = None) -> None:
        self.model, self.adapter, self.reference = model, adapter, reference

    def sample(
        self,
        prompts: Prompts,
        rows: Rows,
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        max_rows: int = 256,
        keep: bool = False,
    ) -> Completions:
        """Completions of `rows`; see `sampler.sample`."""
        with engine.decoding(self.model), in_use(self.adapter, self.model) as attached:
            return sample(
                self.model, attached, prompts, rows, sampling, seed=seed, step=step, max_rows=max_rows, keep=keep
            )

    @property
    def numbers(self) -> object:
        """Equal as long as no number of the adapter has been written to."""
        return () if self.adapter is None else tuple((p.data_ptr(), p._version) for p in self.adapter.parameters())

    def logprobs(self, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
        """Log-probability (nats) of each completion token at the batch's temperature, 0 on padding; has a graph.

        Where the batch has slopes that were drawn under the adapter's present numbers, the log-probabilities are those
        that were recorded, and the head is not applied again.
        """
        if batch.slopes is not None and batch.slopes.drawn_under != self.numbers:
            batch = replace(batch, slopes=None)
        with engine.reading(self.model), in_use(self.adapter, self.model) as attached:
            return teacher_forced(self.model, attached, batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
        """The same under the reference, without a graph: the same model with other vectors."""
        batch = replace(batch, slopes=None)
        with engine.reading(self.model), in_use(self.reference, self.model) as attached:
            return teacher_forced(self.model, attached, batch)

    def lens_divergences(self, batch: TokenBatch) -> Float[Tensor, "layer token"]:
        """KL (nats) of what each layer that the tuned lens translates says from what the model says, at positions that
        count; has a graph in the translators. Raises UsageError for another adapter than a tuned lens."""
        lens, model = self.adapter, self.model
        if not isinstance(lens, TunedLens):
            raise UsageError("this objective trains a tuned lens; give the experiment the adapter Translators()")
        sites = [Site("resid_post", layer) for layer in (*lens.layers, model.n_layers - 1)]
        with engine.reading(model), in_use(lens, model):
            with torch.no_grad():
                read = model.cache(batch.tokens.to(model.device), sites)
                *states, last = (read[site][batch.counted.to(model.device)] for site in sites)
            head = model.unembedding
            translated = [lens(layer, h) for layer, h in zip(lens.layers, states, strict=True)]
            return divergences(last, translated, model.final_norm, head.weight, head.bias, model.logit_softcap)


@contextmanager
def in_use(adapter: Adapter | None, model: LanguageModel) -> Iterator[Attached | None]:
    """Attach `adapter` if there is one."""
    if adapter is None:
        yield None
    else:
        with adapter.attach(model) as attached:
            yield attached


def teacher_forced(model: LanguageModel, attached: Attached | None, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
    """Log-probabilities of a batch's completions under whatever is attached to `model` (one set, not a row bank).

    One row of tokens holds each prompt followed by its completions, all but their last tokens. It begins above the
    bottom where the batch has kept what the blocks below wrote, and the adapter changes nothing there.
    """
    device = model.device
    packed = Packed.of(batch, device)
    kept = batch.kept
    if kept is not None and attached is not None and kept.block > min(attached.first_blocks):
        kept = None
    if attached is not None:
        attached.place(torch.zeros_like(packed.layout.position), packed.layout)
    hidden = planned(
        model,
        Stream(packed.segments, fused=model.kernels == "fused"),
        packed.tokens,
        packed.layout.position,
        block=0 if kept is None else kept.block,
        written=None if kept is None else packed.gather(kept),
    )
    head, mask, predicting = model.unembedding, batch.mask.to(device), hidden[0][packed.predicting]
    if batch.slopes is not None:
        flat = recorded_logprobs(predicting, batch.logprobs.to(device)[mask], batch.slopes.values[mask])
    else:
        flat = token_logprobs(
            predicting,
            batch.completions.to(device)[mask],
            head.weight,
            head.bias,
            batch.temperature,
            softcap=model.logit_softcap,
            fused=model.kernels == "fused",
        )
    return torch.zeros(mask.shape, dtype=flat.dtype, device=device).masked_scatter(mask, flat)
