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
    from steerlab.interp.activation_patching import Pair, activation_patching
    from steerlab.interp.adaptive import adaptive
    from steerlab.interp.at_equal_kl import at_equal_kl, scale_at_kl
    from steerlab.interp.attention import attention, frozen_attention
    from steerlab.interp.attribution import attribution
    from steerlab.interp.attribution_patching import attribution_patching
    from steerlab.interp.composition import composition
    from steerlab.interp.contrast import Contrast
    from steerlab.interp.decisions import decisions
    from steerlab.interp.directions import at_norms_of, directions
    from steerlab.interp.edge_attribution import edge_attribution
    from steerlab.interp.geometry import cosines_between, relative_dose
    from steerlab.interp.gradient_energy import gradient_energy
    from steerlab.interp.languages import languages
    from steerlab.interp.logit_lens import logit_lens
    from steerlab.interp.magnitudes import magnitudes
    from steerlab.interp.neutral import neutral
    from steerlab.interp.patch_effects import patch_effects
    from steerlab.interp.patched import Patched
    from steerlab.interp.patching import patched_answers, patched_texts
    from steerlab.interp.path_patching import path_patching
    from steerlab.interp.persistence import persistence
    from steerlab.interp.residual_lens import residual_lens
    from steerlab.interp.residual_maps import fit_map
    from steerlab.interp.side_effects import side_effects
    from steerlab.interp.substitution import substitution
    from steerlab.interp.texts import Text
    from steerlab.interp.token_effects import token_effects
    from steerlab.interp.transfer import Donor, Recipient, transfer
    from steerlab.interp.vocabulary import vocabulary_classes
    from steerlab.models import LanguageModel, Site
    from steerlab.models import load as load_model
    from steerlab.models.bridges import to_nnsight, to_transformer_lens
    from steerlab.recipes import RECIPES, rloo
    from steerlab.rollouts import Evaluation, Policy, Sampling, evaluate
    from steerlab.runs import Run, RunStore
    from steerlab.saes.activations import record as record_activations
    from steerlab.saes.activity import activity
    from steerlab.saes.causal import LatentEdit, latents_causal
    from steerlab.saes.contexts import latent_contexts, latent_tokens
    from steerlab.saes.correctness import latent_correctness
    from steerlab.saes.effects import decomposition, latent_effects
    from steerlab.saes.load import load as load_sae
    from steerlab.saes.quality import sae_quality, spliced_losses
    from steerlab.saes.streams import Activations
    from steerlab.saes.training import SaeTraining
    from steerlab.saes.training import train as train_sae
    from steerlab.sweep import sweep_layers
    from steerlab.tasks import make as make_task
    from steerlab.training import Experiment

_HOMES = {
    "Activations": "steerlab.saes.streams:Activations",
    "Contrast": "steerlab.interp.contrast:Contrast",
    "Donor": "steerlab.interp.transfer:Donor",
    "Evaluation": "steerlab.rollouts:Evaluation",
    "Experiment": "steerlab.training:Experiment",
    "LanguageModel": "steerlab.models:LanguageModel",
    "LatentEdit": "steerlab.saes.causal:LatentEdit",
    "LoRA": "steerlab.adapters:LoRA",
    "Pair": "steerlab.interp.activation_patching:Pair",
    "Patched": "steerlab.interp.patched:Patched",
    "Policy": "steerlab.rollouts:Policy",
    "RECIPES": "steerlab.recipes:RECIPES",
    "Recipient": "steerlab.interp.transfer:Recipient",
    "Run": "steerlab.runs:Run",
    "RunFailed": "steerlab.errors:RunFailed",
    "RunStore": "steerlab.runs:RunStore",
    "SaeTraining": "steerlab.saes.training:SaeTraining",
    "Sampling": "steerlab.rollouts:Sampling",
    "Site": "steerlab.models:Site",
    "Steering": "steerlab.adapters:Steering",
    "SteeringVectors": "steerlab.adapters:SteeringVectors",
    "Text": "steerlab.interp.texts:Text",
    "UsageError": "steerlab.errors:UsageError",
    "activation_patching": "steerlab.interp.activation_patching:activation_patching",
    "activity": "steerlab.saes.activity:activity",
    "adaptive": "steerlab.interp.adaptive:adaptive",
    "at_equal_kl": "steerlab.interp.at_equal_kl:at_equal_kl",
    "at_norms_of": "steerlab.interp.directions:at_norms_of",
    "attention": "steerlab.interp.attention:attention",
    "attribution": "steerlab.interp.attribution:attribution",
    "attribution_patching": "steerlab.interp.attribution_patching:attribution_patching",
    "composition": "steerlab.interp.composition:composition",
    "cosines_between": "steerlab.interp.geometry:cosines_between",
    "decisions": "steerlab.interp.decisions:decisions",
    "decomposition": "steerlab.saes.effects:decomposition",
    "directions": "steerlab.interp.directions:directions",
    "edge_attribution": "steerlab.interp.edge_attribution:edge_attribution",
    "evaluate": "steerlab.rollouts:evaluate",
    "fit_map": "steerlab.interp.residual_maps:fit_map",
    "frozen_attention": "steerlab.interp.attention:frozen_attention",
    "gradient_energy": "steerlab.interp.gradient_energy:gradient_energy",
    "languages": "steerlab.interp.languages:languages",
    "latent_contexts": "steerlab.saes.contexts:latent_contexts",
    "latent_correctness": "steerlab.saes.correctness:latent_correctness",
    "latent_effects": "steerlab.saes.effects:latent_effects",
    "latent_tokens": "steerlab.saes.contexts:latent_tokens",
    "latents_causal": "steerlab.saes.causal:latents_causal",
    "load_model": "steerlab.models:load",
    "load_sae": "steerlab.saes.load:load",
    "load_vectors": "steerlab.adapters.formats:load",
    "logit_lens": "steerlab.interp.logit_lens:logit_lens",
    "magnitudes": "steerlab.interp.magnitudes:magnitudes",
    "make_task": "steerlab.tasks:make",
    "neutral": "steerlab.interp.neutral:neutral",
    "patch_effects": "steerlab.interp.patch_effects:patch_effects",
    "patched_answers": "steerlab.interp.patching:patched_answers",
    "patched_texts": "steerlab.interp.patching:patched_texts",
    "path_patching": "steerlab.interp.path_patching:path_patching",
    "persistence": "steerlab.interp.persistence:persistence",
    "record_activations": "steerlab.saes.activations:record",
    "relative_dose": "steerlab.interp.geometry:relative_dose",
    "residual_lens": "steerlab.interp.residual_lens:residual_lens",
    "resume": "steerlab.execute:resume",
    "rloo": "steerlab.recipes:rloo",
    "sae_quality": "steerlab.saes.quality:sae_quality",
    "scale_at_kl": "steerlab.interp.at_equal_kl:scale_at_kl",
    "side_effects": "steerlab.interp.side_effects:side_effects",
    "spliced_losses": "steerlab.saes.quality:spliced_losses",
    "substitution": "steerlab.interp.substitution:substitution",
    "sweep_layers": "steerlab.sweep:sweep_layers",
    "to_nnsight": "steerlab.models.bridges:to_nnsight",
    "to_transformer_lens": "steerlab.models.bridges:to_transformer_lens",
    "token_effects": "steerlab.interp.token_effects:token_effects",
    "train": "steerlab.execute:execute",
    "train_sae": "steerlab.saes.training:train",
    "transfer": "steerlab.interp.transfer:transfer",
    "vocabulary_classes": "steerlab.interp.vocabulary:vocabulary_classes",
}

__all__ = [
    "RECIPES",
    "Activations",
    "Contrast",
    "Donor",
    "Evaluation",
    "Experiment",
    "LanguageModel",
    "LatentEdit",
    "LoRA",
    "Pair",
    "Patched",
    "Policy",
    "Recipient",
    "Run",
    "RunFailed",
    "RunStore",
    "SaeTraining",
    "Sampling",
    "Site",
    "Steering",
    "SteeringVectors",
    "Text",
    "UsageError",
    "activation_patching",
    "activity",
    "adaptive",
    "at_equal_kl",
    "at_norms_of",
    "attention",
    "attribution",
    "attribution_patching",
    "composition",
    "cosines_between",
    "decisions",
    "decomposition",
    "directions",
    "edge_attribution",
    "evaluate",
    "fit_map",
    "frozen_attention",
    "gradient_energy",
    "languages",
    "latent_contexts",
    "latent_correctness",
    "latent_effects",
    "latent_tokens",
    "latents_causal",
    "load_model",
    "load_sae",
    "load_vectors",
    "logit_lens",
    "magnitudes",
    "make_task",
    "neutral",
    "patch_effects",
    "patched_answers",
    "patched_texts",
    "path_patching",
    "persistence",
    "record_activations",
    "relative_dose",
    "residual_lens",
    "resume",
    "rloo",
    "sae_quality",
    "scale_at_kl",
    "side_effects",
    "spliced_losses",
    "substitution",
    "sweep_layers",
    "to_nnsight",
    "to_transformer_lens",
    "token_effects",
    "train",
    "train_sae",
    "transfer",
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
