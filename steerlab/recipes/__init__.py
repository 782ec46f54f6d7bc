"""The methods, by name. A recipe is a function that returns an `Experiment`."""

from __future__ import annotations

from collections.abc import Callable

from steerlab.recipes.rloo import rloo
from steerlab.training import Experiment

RECIPES: dict[str, Callable[..., Experiment]] = {"rloo": rloo}

__all__ = ["RECIPES", "rloo"]
