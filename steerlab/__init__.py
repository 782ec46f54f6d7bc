"""steerlab: train steering vectors on frozen language models with reinforcement learning, and read what they do.

The public names, imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerlab.adapters import LoRA, Steering, SteeringVectors
    from steerlab.adapters.formats import load as load_vectors
    from steerlab.errors import RunFailed, UsageError
    from steerlab.execute import execute as train
    from steerlab.execute import resume
    from steerlab.interp.geometry import cosines_between, relative_dose
    from steerlab.interp.languages import languages
    from steerlab.interp.logit_lens import logit_lens
    from steerlab.interp.persistence import persistence
    from steerlab.interp.residual_lens import residual_lens
    from steerlab.interp.texts import Text
    from steerlab.interp.token_effects import token_effects
    from steerlab.interp.vocabulary import vocabulary_classes
    from steerlab.models import LanguageModel, Site
    from steerlab.models import load as load_model
    from steerlab.recipes import RECIPES, rloo
    from steerlab.rollouts import Evaluation, Policy, Sampling, evaluate
    from steerlab.runs import Run, RunStore
    from steerlab.sweep import sweep_layers
    from steerlab.tasks import make as make_task
    from steerlab.training import Experiment

_HOMES = {
    "Evaluation": "steerlab.rollouts:Evaluation",
    "Experiment": "steerlab.training:Experiment",
    "LanguageModel": "steerlab.models:LanguageModel",
    "LoRA": "steerlab.adapters:LoRA",
    "Policy": "steerlab.rollouts:Policy",
    "RECIPES": "steerlab.recipes:RECIPES",
    "Run": "steerlab.runs:Run",
    "RunFailed": "steerlab.errors:RunFailed",
    "RunStore": "steerlab.runs:RunStore",
    "Sampling": "steerlab.rollouts:Sampling",
    "Site": "steerlab.models:Site",
    "Steering": "steerlab.adapters:Steering",
    "SteeringVectors": "steerlab.adapters:SteeringVectors",
    "Text": "steerlab.interp.texts:Text",
    "UsageError": "steerlab.errors:UsageError",
    "cosines_between": "steerlab.interp.geometry:cosines_between",
    "evaluate": "steerlab.rollouts:evaluate",
    "languages": "steerlab.interp.languages:languages",
    "load_model": "steerlab.models:load",
    "load_vectors": "steerlab.adapters.formats:load",
    "logit_lens": "steerlab.interp.logit_lens:logit_lens",
    "make_task": "steerlab.tasks:make",
    "persistence": "steerlab.interp.persistence:persistence",
    "relative_dose": "steerlab.interp.geometry:relative_dose",
    "residual_lens": "steerlab.interp.residual_lens:residual_lens",
    "resume": "steerlab.execute:resume",
    "rloo": "steerlab.recipes:rloo",
    "sweep_layers": "steerlab.sweep:sweep_layers",
    "token_effects": "steerlab.interp.token_effects:token_effects",
    "train": "steerlab.execute:execute",
    "vocabulary_classes": "steerlab.interp.vocabulary:vocabulary_classes",
}

__all__ = [
    "RECIPES",
    "Evaluation",
    "Experiment",
    "LanguageModel",
    "LoRA",
    "Policy",
    "Run",
    "RunFailed",
    "RunStore",
    "Sampling",
    "Site",
    "Steering",
    "SteeringVectors",
    "Text",
    "UsageError",
    "cosines_between",
    "evaluate",
    "languages",
    "load_model",
    "load_vectors",
    "logit_lens",
    "make_task",
    "persistence",
    "relative_dose",
    "residual_lens",
    "resume",
    "rloo",
    "sweep_layers",
    "token_effects",
    "train",
    "vocabulary_classes",
]


def __getattr__(name: str) -> Any:
    """A public name, from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'steerlab' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
