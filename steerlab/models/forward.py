"""Forward passes that begin at a block, or end behind one: nothing below or above it runs.

With ℓ the lowest layer whose vector is trained, what block ℓ itself writes depends on no trained number, so it can be
kept from decoding and everything later begins at block ℓ+1. The family's own forward is used, with the blocks below
replaced by ones that pass their input on, so masks, rotary embeddings and windows stay the family's.

A pass that begins at block b takes what block b−1 wrote, *before* any edit there: edits at `resid_post` of b−1 apply
to it (a steering vector at ℓ is added at the seam). Sites below the seam are not computed and must not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from steerlab.errors import UsageError
from steerlab.models.attention import Plan, attending
from steerlab.models.sites import architecture
from steerlab.models.swap import swapped

if TYPE_CHECKING:
    from transformers import Cache

    from steerlab.models.handle import LanguageModel


@contextmanager
def beginning_at(model: LanguageModel, block: int, written: Tensor) -> Iterator[None]:
    """Inside the `with` a forward pass takes `written` for what block `block`−1 wrote, and runs only what follows."""
    if not 1 <= block <= model.n_layers:
        raise UsageError(
            f"cannot begin at block {block} of {model.n_layers}: choose 1 to {model.n_layers} (the last: only the "
            "final norm), or run the whole model"
        )
    tuples = architecture(model.family).tuples
    seam, below = model.blocks[block - 1], model.blocks[: block - 1]
    with swapped([*((module, _passing(tuples)) for module in below), (seam, _giving(written, tuples))]):
        yield


@contextmanager
def ending_after(model: LanguageModel, block: int) -> Iterator[None]:
    """Inside the `with` a forward pass computes nothing behind `block` but the final norm. Sites up to there have their
    own values; what the pass returns predicts nothing."""
    tuples = architecture(model.family).tuples
    with swapped((module, _passing(tuples)) for module in model.blocks[block + 1 :]):
        yield


def _passing(tuples: bool) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Any:
        return (hidden_states, None) if tuples else hidden_states

    return forward


def _giving(written: Tensor, tuples: bool) -> Callable[..., Any]:
    def forward(*_args: object, **_kwargs: object) -> Any:
        return (written, None) if tuples else written

    return forward


def forward_from(
    model: LanguageModel,
    block: int,
    written: Float[Tensor, "batch pos d_model"],
    *,
    mask: Tensor | None = None,
    positions: Int[Tensor, "batch pos"] | None = None,
    kv: Cache | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Hidden states after the final norm; see the module's header for `block` and `written`."""
    with beginning_at(model, block, written):
        return model.backbone(
            inputs_embeds=written,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=kv,
            use_cache=kv is not None,
        ).last_hidden_state


def planned(
    model: LanguageModel,
    plan: Plan,
    tokens: Int[Tensor, "batch new"],
    positions: Int[Tensor, "batch new"],
    *,
    block: int = 0,
    written: Float[Tensor, "batch new d_model"] | None = None,
) -> Float[Tensor, "batch new d_model"]:
    """Hidden states after the final norm, attention being `plan`'s; begins at `block` if `written` is given."""
    with attending(model, plan), nullcontext() if written is None else beginning_at(model, block, written):
        given = {"input_ids": tokens} if written is None else {"inputs_embeds": written}
        return model.backbone(**given, position_ids=positions, use_cache=False).last_hidden_state
