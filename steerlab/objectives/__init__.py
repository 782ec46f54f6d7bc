"""What is minimised: tensors in, scalar out."""

from steerlab.objectives.advantages import Advantage, GroupMean, GroupNormalised, LeaveOneOut
from steerlab.objectives.lens import LensDivergence, lens_divergence_loss
from steerlab.objectives.objective import Learner, Loss, Objective
from steerlab.objectives.policy_gradient import PolicyGradient, policy_gradient_loss

__all__ = [
    "Advantage",
    "GroupMean",
    "GroupNormalised",
    "Learner",
    "LeaveOneOut",
    "LensDivergence",
    "Loss",
    "Objective",
    "PolicyGradient",
    "lens_divergence_loss",
    "policy_gradient_loss",
]
