"""Activations whose true directions are known."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steerlab.saes.streams import Stream


@dataclass(frozen=True)
class Planted:
    """Sums of a few of `directions` (unit length), behind a mean that is not zero."""

    directions: Tensor
    train: Stream
    held_out: Stream
