"""What a trainable addition is: made from a frozen spec, attached in a `with`, kept as a few named tensors.

`Layout` tells an adapter where in its sequence each token of a forward pass stands, which some token scopes
need. It is written by whoever runs the model (sampler, log-probs) and read by whoever adds the vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steerlab.models import LanguageModel


@dataclass(frozen=True)
class Layout:
    """Where tokens stand: prompts are padded on the left, so every row's completion begins in the same slot.

    tokens: all tokens so far, the ones being fed last.
    mask: False on padding.
    prompt_slots: slots that hold the prompt; generated tokens start at this slot.
    """

    tokens: Int[Tensor, "batch slot"]
    mask: Bool[Tensor, "batch slot"]
    prompt_slots: int

    @classmethod
    def of_texts(cls, tokens: Int[Tensor, "batch slot"], prompt_length: int) -> Layout:
        """Unpadded sequences whose first `prompt_length` tokens are the prompt."""
        return cls(tokens, torch.ones_like(tokens, dtype=torch.bool), prompt_length)


@runtime_checkable
class Attached(Protocol):
    """An adapter in use. The runner says, before a forward, which rows it feeds and where they stand."""

    def place(self, rows: Int[Tensor, " batch"] | None, layout: Layout | None) -> None:
        """`rows`: which member of a row bank each batch row uses. `layout`: see `Layout`."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """A trainable addition to a frozen model."""

    @property
    def n_parameters(self) -> int: ...

    def parameters(self) -> Iterable[torch.nn.Parameter]: ...

    def attach(
        self, model: LanguageModel, rows: Int[Tensor, " batch"] | None = None, layout: Layout | None = None
    ) -> AbstractContextManager[Attached]:
        """Use the adapter inside the `with`; the model is untouched before and after."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all state, by name."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a snapshot back, in place."""
        ...
