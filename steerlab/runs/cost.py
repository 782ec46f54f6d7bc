"""The cost ledger: seconds, tokens and bytes of a run, summed over steps and carried through a resume."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping

from steerlab.errors import unknown


@dataclasses.dataclass
class CostLedger:
    """What a run cost so far. Seconds are wall clock; bytes of optimiser state are a level, exchanged bytes a sum.

    `exchanged_bytes` is what each process sent of gradients to the others; a process that trains alone sends none.
    Seconds, memory and bytes are those of the process that writes the run, tokens those of all.
    """

    rollout_s: float = 0.0
    reward_s: float = 0.0
    update_s: float = 0.0
    evaluate_s: float = 0.0
    steps: int = 0
    tokens_prompt: int = 0
    tokens_completion: int = 0
    trained_parameters: int = 0
    optimiser_bytes: int = 0
    exchanged_bytes: int = 0
    peak_memory_bytes: int = 0

    def add(self, **amounts: int | float) -> None:
        """Adds to the named sums; raises UsageError for a name the ledger does not have."""
        for name, amount in amounts.items():
            if name not in self.__dataclass_fields__:
                raise unknown("cost", name, self.__dataclass_fields__)
            setattr(self, name, getattr(self, name) + amount)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the wall-clock seconds of the block to the field `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - start})

    def to_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, amounts: Mapping[str, int | float]) -> CostLedger:
        ledger = cls()
        ledger.add(**amounts)
        return ledger
