"""What is trained; everything else is frozen."""

from steerlab.adapters.adapter import Adapter, Attached, Layout
from steerlab.adapters.scopes import Scope
from steerlab.adapters.steering import RowBank, Steering, SteeringVectors

__all__ = ["Adapter", "Attached", "Layout", "RowBank", "Scope", "Steering", "SteeringVectors"]
