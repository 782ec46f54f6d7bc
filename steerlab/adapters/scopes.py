"""Token scopes: at which tokens of a sequence a steering vector is added.

A token is named by where it stands as *input*. `predicting(0, 1)` is the exception that the papers ask for: the
position whose output is the first generated token, i.e. the last prompt token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from steerlab.adapters.adapter import Layout
from steerlab.errors import UsageError

Kind = Literal["all", "prompt", "generated", "positions", "predicting", "after"]


@dataclass(frozen=True)
class Scope:
    """Which input tokens receive the vector; make one with the class methods below.

    kind: all | prompt | generated | positions (counted from the first prompt token) | predicting (counted from
        the last prompt token, which predicts generated token 0) | after (every token behind the first `token`).
    start, stop: half-open range for positions and predicting; stop None is open.
    token: token id for after.
    """

    kind: Kind = "all"
    start: int = 0
    stop: int | None = None
    token: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise UsageError(f"token scope {self}: needs 0 <= start < stop")
        if (self.kind == "after") != (self.token is not None):
            raise UsageError(f"token scope {self}: a token id belongs to kind 'after' and only there")

    @classmethod
    def all(cls) -> Scope:
        return cls()

    @classmethod
    def prompt(cls) -> Scope:
        return cls("prompt")

    @classmethod
    def generated(cls) -> Scope:
        return cls("generated")

    @classmethod
    def positions(cls, start: int, stop: int | None = None) -> Scope:
        return cls("positions", start, stop)

    @classmethod
    def predicting(cls, start: int, stop: int | None = None) -> Scope:
        return cls("predicting", start, stop)

    @classmethod
    def after(cls, token: int) -> Scope:
        return cls("after", token=token)

    def mask(self, layout: Layout, n_new: int) -> Bool[Tensor, "batch new"]:
        """True where the last `n_new` tokens of `layout` receive the vector. Raises UsageError if it has fewer."""
        if n_new > layout.tokens.shape[1]:
            raise UsageError(
                f"{n_new} tokens were fed but the layout describes {layout.tokens.shape[1]}; "
                "attach with a layout of all of them"
            )
        slots = torch.arange(layout.tokens.shape[1], device=layout.tokens.device)
        match self.kind:
            case "all":
                inside = torch.ones_like(layout.mask)
            case "prompt":
                inside = (slots < layout.prompt_slots).expand_as(layout.mask)
            case "generated":
                inside = (slots >= layout.prompt_slots).expand_as(layout.mask)
            case "positions":
                inside = self._within(layout.mask.long().cumsum(1) - 1)
            case "predicting":
                inside = self._within(slots - (layout.prompt_slots - 1)).expand_as(layout.mask)
            case "after":
                hits = ((layout.tokens == self.token) & layout.mask).long()
                inside = (hits.cumsum(1) - hits) > 0
        return (inside & layout.mask)[:, layout.tokens.shape[1] - n_new :]

    def _within(self, index: Tensor) -> Tensor:
        inside = index >= self.start
        return inside if self.stop is None else inside & (index < self.stop)
