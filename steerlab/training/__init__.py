"""How it is minimised: the loop, where batches come from, how parameters move."""

from steerlab.training.experiment import Experiment
from steerlab.training.sources import Rollouts
from steerlab.training.texts import HeldOut, Texts
from steerlab.training.trainer import StepDone, Trainer
from steerlab.training.updaters import AdamW

__all__ = ["AdamW", "Experiment", "HeldOut", "Rollouts", "StepDone", "Texts", "Trainer"]
