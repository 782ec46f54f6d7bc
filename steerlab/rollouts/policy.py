"""A policy: a frozen model with an adapter, which speaks (sample) and is asked what it would have said (logprobs).

Log-probabilities are teacher-forced the way sampling was: each prompt once per group, its keys and values shared by
the group's completions with the graph intact, the head applied to completion tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from steerlab.adapters import Adapter, Attached, Layout
from steerlab.batches import RolloutBatch
from steerlab.models import LanguageModel
from steerlab.models.attention import short_sequences
from steerlab.models.head import token_logprobs
from steerlab.models.kv_cache import GrowingCache
from steerlab.rollouts.sampler import Completions, Prompts, Rows, left_padded, sample
from steerlab.rollouts.sampling import Sampling


class Policy:
    """model: frozen. adapter: what is added, None for the base model. reference: what the policy is compared with
    (None is the base model)."""

    def __init__(self, model: LanguageModel, adapter: Adapter | None = None, reference: Adapter | None = None) -> None:
        self.model, self.adapter, self.reference = model, adapter, reference

    def sample(
        self, prompts: Prompts, rows: Rows, sampling: Sampling, *, seed: int, step: int = 0, max_rows: int = 256
    ) -> Completions:
        """Completions of `rows`; see `sampler.sample`."""
        with in_use(self.adapter, self.model) as attached:
            return sample(self.model, attached, prompts, rows, sampling, seed=seed, step=step, max_rows=max_rows)

    def logprobs(self, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
        """Log-probability (nats) of each completion token at the batch's temperature, 0 on padding; has a graph."""
        with in_use(self.adapter, self.model) as attached:
            return teacher_forced(self.model, attached, batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
        """The same under the reference, without a graph: the same model with other vectors."""
        with in_use(self.reference, self.model) as attached:
            return teacher_forced(self.model, attached, batch)


@contextmanager
def in_use(adapter: Adapter | None, model: LanguageModel) -> Iterator[Attached | None]:
    """Attach `adapter` if there is one, and let attention be that of short sequences where it pays."""
    with short_sequences(model):
        if adapter is None:
            yield None
        else:
            with adapter.attach(model) as attached:
                yield attached


def teacher_forced(model: LanguageModel, attached: Attached | None, batch: RolloutBatch) -> Float[Tensor, "row pos"]:
    """Log-probabilities of a batch's completions under whatever is attached to `model` (one set, not a row bank)."""
    device = model.device
    prompts, prompt_mask = (t.to(device) for t in left_padded(batch.prompts))
    group, targets, mask = batch.group.to(device), batch.completions.to(device), batch.mask.to(device)
    slots, kv = prompts.shape[1], GrowingCache()
    if attached is not None:
        attached.place(None, Layout(prompts, prompt_mask, slots))
    hidden = model.hidden(
        prompts,
        mask=None if bool(prompt_mask.all()) else prompt_mask,
        positions=(prompt_mask.long().cumsum(1) - 1).clamp(min=0),
        kv=kv,
    )
    states = hidden[:, -1][group][:, None]
    if targets.shape[1] > 1:
        kv.take_rows(group)
        tokens = torch.cat([prompts[group], targets[:, :-1]], 1)
        seen = torch.cat([prompt_mask[group], mask[:, :-1]], 1)
        if attached is not None:
            attached.place(None, Layout(tokens, seen, slots))
        positions = prompt_mask.sum(1)[group][:, None] + torch.arange(targets.shape[1] - 1, device=device)
        states = torch.cat([states, model.hidden(targets[:, :-1], mask=seen, positions=positions, kv=kv)], 1)
    head = model.unembedding
    flat = token_logprobs(
        states[mask], targets[mask], head.weight, head.bias, batch.temperature, softcap=model.logit_softcap
    )
    return torch.zeros(targets.shape, dtype=flat.dtype, device=device).masked_scatter(mask, flat)
