"""What a model computes over a text under an adapter: residual states by layer, final hidden states, what they say.

One text at a time, whole, teacher-forced; the family's own arithmetic (nothing of `models/engine.py` is in force).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steerlab.adapters import Adapter, Layout
from steerlab.errors import UsageError
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.models.hooks import Keep
from steerlab.rollouts.policy import in_use


def check_texts(model: LanguageModel, texts: Sequence[Text]) -> None:
    """Raise UsageError if there is no text, or one is too long for the model."""
    if not texts:
        raise UsageError("nothing to read; give at least one text")
    longest = max(len(text.tokens) for text in texts)
    if longest > model.context:
        raise UsageError(
            f"a text of {longest} tokens exceeds the context of {model.name} ({model.context}); shorten it"
        )


def check_answers(model: LanguageModel, texts: Sequence[Text]) -> None:
    """`check_texts`; and raise UsageError if a text is a prompt only."""
    check_texts(model, texts)
    if any(len(text.tokens) <= text.n_prompt for text in texts):
        raise UsageError("a text has no generated token, so nothing is predicted; give prompts with completions")


def states_under(
    model: LanguageModel,
    adapter: Adapter | None,
    text: Text,
    layers: Iterable[int],
    *,
    block: int = 0,
    written: Float[Tensor, "pos d_model"] | None = None,
) -> dict[int, Float[Tensor, "pos d_model"]]:
    """What blocks write (`resid_post`, vectors included), by layer. block, written: where to begin, and what the block
    below wrote; see `models/forward.py`."""
    return passed_under(model, adapter, text, layers, block=block, written=written)[0]


def passed_under(
    model: LanguageModel,
    adapter: Adapter | None,
    text: Text,
    layers: Iterable[int],
    *,
    block: int = 0,
    written: Float[Tensor, "pos d_model"] | None = None,
) -> tuple[dict[int, Float[Tensor, "pos d_model"]], Float[Tensor, "pos d_model"]]:
    """`states_under` and `hidden_under` of one pass."""
    states: dict[int, Tensor] = {}

    def keeping(layer: int) -> tuple[Site, Keep]:
        def keep(x: Tensor) -> None:
            states[layer] = x[0]

        return Site("resid_post", layer), keep

    tokens = torch.tensor([text.tokens], device=model.device)
    with in_use(adapter, model) as attached:
        if attached is not None:
            attached.place(None, Layout.of_texts(tokens, text.n_prompt))
        with model.doors.open((), [keeping(layer) for layer in layers]):
            hidden = model.hidden(tokens) if written is None else model.forward_from(block, written[None])
    return states, hidden[0]


def hidden_under(model: LanguageModel, adapter: Adapter | None, text: Text) -> Float[Tensor, "pos d_model"]:
    """Hidden states after the final norm."""
    tokens = torch.tensor([text.tokens], device=model.device)
    with in_use(adapter, model) as attached:
        if attached is not None:
            attached.place(None, Layout.of_texts(tokens, text.n_prompt))
        return model.hidden(tokens)[0]


def logits_of(model: LanguageModel, hidden: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
    """What final hidden states say, in at least fp32."""
    return model.unembed(hidden).to(torch.promote_types(model.dtype, torch.float32))
