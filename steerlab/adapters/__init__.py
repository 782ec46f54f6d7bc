"""What is trained; everything else is frozen."""

from steerlab.adapters.adapter import Adapter, AdapterSpec, Attached, Layout
from steerlab.adapters.lora import LoRA, LoRAWeights
from steerlab.adapters.scopes import Scope
from steerlab.adapters.steering import RowBank, Steering, SteeringVectors
from steerlab.adapters.translators import Translators, TunedLens

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Attached",
    "Layout",
    "LoRA",
    "LoRAWeights",
    "RowBank",
    "Scope",
    "Steering",
    "SteeringVectors",
    "Translators",
    "TunedLens",
]
