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
from jaxtyping import Int
from torch import Tensor

from steerlab.models import LanguageModel


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward pass stand, whatever shape they are fed in.

    sequences: the sequences they belong to, prompt first, padded on the right. prompt_length: of each sequence.
    sequence, position: of every fed token, which sequence and where in it (a token of a prompt that several sequences
    share may name any of them).
    """

    sequences: Int[Tensor, "sequence slot"]
    prompt_length: Int[Tensor, " sequence"]
    sequence: Int[Tensor, "batch new"]
    position: Int[Tensor, "batch new"]

    @classmethod
    def of_texts(cls, tokens: Int[Tensor, "batch pos"], prompt_length: int) -> Layout:
        """Unpadded sequences, fed whole, whose first `prompt_length` tokens are the prompt."""
        sequence, position = torch.meshgrid(
            *(torch.arange(n, device=tokens.device) for n in tokens.shape), indexing="ij"
        )
        return cls(tokens, torch.full_like(tokens[:, 0], prompt_length), sequence, position)


@runtime_checkable
class Attached(Protocol):
    """An adapter in use. The runner says, before a forward, which tokens it feeds and where they stand."""

    @property
    def first_blocks(self) -> tuple[int, ...]:
        """Of each member of a row bank (else of the one there is): see `Adapter.first_block`."""
        ...

    def place(self, members: Int[Tensor, "batch new"] | None, layout: Layout | None) -> None:
        """`members`: which member of a row bank each fed token uses, −1 for none. `layout`: see `Layout`."""
        ...


@dataclass(frozen=True)
class Everywhere:
    """An attached adapter that does the same to every row and token: it need not be told where they stand."""

    first_blocks: tuple[int, ...]

    def place(self, members: Int[Tensor, "batch new"] | None, layout: Layout | None) -> None: ...


@runtime_checkable
class Adapter(Protocol):
    """A trainable addition to a frozen model."""

    @property
    def n_parameters(self) -> int: ...

    @property
    def first_block(self) -> int:
        """What the block before this one writes (before a vector is added to it) depends on no trained number."""
        ...

    @property
    def keeps_inputs(self) -> bool:
        """Whether its gradient needs what modules read, which a pass then keeps for the backward pass."""
        ...

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


@runtime_checkable
class AdapterSpec(Protocol):
    """Frozen description of an adapter, stored in a run's manifest."""

    @property
    def learning_rate(self) -> float:
        """What recipes train it with unless told otherwise."""
        ...

    def init(self, model: LanguageModel, generator: torch.Generator | None = None) -> Adapter:
        """The adapter in its first state, for `model`. Raises UsageError for what the model does not have."""
        ...
