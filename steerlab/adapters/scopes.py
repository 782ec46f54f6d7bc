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

    def mask(self, layout: Layout) -> Bool[Tensor, "batch new"]:
        """True at fed tokens that receive the vector."""
        position = layout.position
        match self.kind:
            case "all":
                return torch.ones_like(position, dtype=torch.bool)
            case "prompt":
                return position < layout.prompt_length[layout.sequence]
            case "generated":
                return position >= layout.prompt_length[layout.sequence]
            case "positions":
                return self._within(position)
            case "predicting":
                return self._within(position - (layout.prompt_length[layout.sequence] - 1))
            case "after":
                hits = (layout.sequences == self.token).long()
                return ((hits.cumsum(1) - hits) > 0)[layout.sequence, position]

    def _within(self, index: Tensor) -> Tensor:
        inside = index >= self.start
        return inside if self.stop is None else inside & (index < self.stop)
