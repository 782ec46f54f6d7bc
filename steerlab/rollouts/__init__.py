"""Who speaks: policies, the decode engine, evaluation and its statistics."""

from steerlab.rollouts.evaluate import Condition, Evaluation, evaluate
from steerlab.rollouts.policy import Policy
from steerlab.rollouts.sampler import Completions, Rows, sample
from steerlab.rollouts.sampling import Sampling
from steerlab.rollouts.statistics import summarise

__all__ = ["Completions", "Condition", "Evaluation", "Policy", "Rows", "Sampling", "evaluate", "sample", "summarise"]
