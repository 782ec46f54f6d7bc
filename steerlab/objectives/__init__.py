"""What is minimised: tensors in, scalar out."""

from steerlab.objectives.advantages import Advantage, GroupMean, GroupNormalised, LeaveOneOut
from steerlab.objectives.objective import Learner, Loss, Objective
from steerlab.objectives.policy_gradient import PolicyGradient, policy_gradient_loss

__all__ = [
    "Advantage",
    "GroupMean",
    "GroupNormalised",
    "Learner",
    "LeaveOneOut",
    "Loss",
    "Objective",
    "PolicyGradient",
    "policy_gradient_loss",
]
