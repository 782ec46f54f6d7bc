"""An experiment: one point in the product model × adapter × source × objective × updater, and how it is evaluated.

Plain frozen data. `runs.encode` writes it to a run's manifest, `runs.decode` rebuilds it; a recipe is a function that
returns one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from steerlab.adapters import AdapterSpec
from steerlab.errors import UsageError
from steerlab.objectives import Objective
from steerlab.rollouts import Evaluation, Policy
from steerlab.runs import CostLedger
from steerlab.tasks import Task
from steerlab.training.sources import Rollouts, Source
from steerlab.training.texts import HeldOut
from steerlab.training.updaters import AdamW
from steerlab.training.world import ALONE, World


@runtime_checkable
class SourceSpec(Protocol):
    """Frozen description of a source."""

    def facts(self) -> dict[str, str]:
        """What is trained on, for manifest, provenance and page: `task` and `reward`, or `corpus` and its digest."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of a row (a completion, a text) of full length."""
        ...

    @property
    def watched(self) -> str:
        """The metric whose moving mean tells how training goes."""
        ...

    def open(self, policy: Policy, seed: int, ledger: CostLedger, world: World = ALONE) -> Source: ...


@dataclass(frozen=True)
class Experiment:
    """recipe: the name it was made under. model, dtype: what `models.load` takes. steps: updates. seed: of every draw.
    token_budget: tokens per micro-batch, which bounds memory; None: see `training/memory.py`."""

    recipe: str
    model: str
    adapter: AdapterSpec
    source: SourceSpec
    objective: Objective
    updater: AdamW
    evaluation: Evaluation | HeldOut
    steps: int
    seed: int = 0
    dtype: str = "auto"
    token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}; a run needs at least 1")
        if self.token_budget is not None and self.token_budget < 1:
            raise UsageError(f"token_budget is {self.token_budget}; it must be positive")

    @property
    def answers(self) -> Evaluation:
        """How answers to the task are evaluated. Raises UsageError where nothing is answered."""
        if isinstance(self.evaluation, Evaluation):
            return self.evaluation
        raise self._without_answers()

    @property
    def task(self) -> Task:
        """What judges the answers. Raises UsageError where nothing is answered."""
        if isinstance(self.source, Rollouts):
            return self.source.task
        raise self._without_answers()

    def _without_answers(self) -> UsageError:
        return UsageError(f"{self.recipe} trains nothing that answers a task; give a run that does")
