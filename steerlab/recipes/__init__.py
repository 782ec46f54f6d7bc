"""The methods, by name. A recipe is a function that returns an `Experiment`."""

from __future__ import annotations

from collections.abc import Callable

from steerlab.recipes.rloo import rloo
from steerlab.recipes.tuned_lens import tuned_lens
from steerlab.training import Experiment

RECIPES: dict[str, Callable[..., Experiment]] = {"rloo": rloo, "tuned_lens": tuned_lens}

__all__ = ["RECIPES", "rloo", "tuned_lens"]
