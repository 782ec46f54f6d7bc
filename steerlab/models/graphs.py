"""A decode step that is done again and again: call by call, or on a GPU as one CUDA graph.

A decode step of a small model is some thousand launches of kernels that each take less time than a launch. A CUDA graph
is launched once. It does the same work on the same memory each time, so what it captures must have fixed shapes, read
and write tensors in place (`Decoding(static=True)`, the sampler's state, steering vectors) and never ask the GPU for a
number. Rows leave the batch rarely here, when half have ended, because the smaller batch is another graph.

`measured_choice` captures a step of the model at hand, compares what it computes with the same step done call by call,
and times both. Leaves out: graphs that outlive a call of the sampler. Not yet run on a GPU; `tests/rollouts` replays
the sampler's steps operator by operator on a CPU, where a question to the device is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from steerlab.models.attention import Segment, Stream
from steerlab.models.decoding import Decoding, Sharing, UnitKeys
from steerlab.models.forward import planned

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

Steps = Literal["eager", "captured"]
ROWS, PROMPT, TRIALS = 32, 64, 8  # of the step that is measured; the first trial is a warm-up
SAME = 2e-2  # largest difference of hidden states, as a share of the largest of them


class Repeated(Protocol):
    """Made from a step, which is then done for the first time; each call does it once more."""

    def __call__(self) -> None: ...


class Eager:
    """Call by call. leave: rows leave the batch when a share of 1 / leave of them has ended. least: steps from which on
    it is worth making."""

    leave, least = 8, 1

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step
        step()

    def __call__(self) -> None:
        self.step()


class Captured:
    """As one CUDA graph."""

    leave, least = 2, 4

    def __init__(self, step: Callable[[], None]) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records; nothing is computed
            step()

    def __call__(self) -> None:
        self.graph.replay()


def able(model: LanguageModel) -> bool:
    """Whether the model is on a device that has graphs."""
    return model.device.type == "cuda"


def measured_choice(model: LanguageModel) -> Steps:
    """What is faster here and now for a decode step of ROWS rows; "eager" where a graph cannot be made of this model's
    step or computes something else."""
    if not able(model):
        return "eager"
    with torch.no_grad():
        eager = _Trial(model)
        repeated: dict[Steps, Repeated] = {"eager": Eager(eager.step)}
        try:
            captured = _Trial(model)
            repeated["captured"] = Captured(captured.step)
        except RuntimeError:  # the family asks the GPU for a number, say
            torch.cuda.synchronize()
            return "eager"
        spent: dict[Steps, list[float]] = {"eager": [], "captured": []}
        for _ in range(TRIALS):
            for name, again in repeated.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                again()
                torch.cuda.synchronize()
                spent[name].append(time.perf_counter() - start)
            apart = (eager.hidden - captured.hidden).abs().max()
            if not bool(apart <= SAME * eager.hidden.abs().max()):
                return "eager"
    return min(spent, key=lambda name: min(spent[name][1:]))


class _Trial:
    """Rows that feed one token after another behind a prompt of zeros."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, device = model, model.device
        keys: list[UnitKeys] = []

        def keep(_layer: int, key: Tensor, value: Tensor) -> None:
            keys.append(UnitKeys(key[None], value[None]))

        tokens, at = torch.zeros(1, PROMPT, dtype=torch.long, device=device), torch.arange(PROMPT, device=device)[None]
        planned(model, Stream([Segment.of(0, (PROMPT,), (0, 0), device)], keep), tokens, at)
        unit, length = torch.zeros(ROWS, dtype=torch.long, device=device), torch.tensor([PROMPT], device=device)
        self.plan = Decoding(keys, [Sharing(unit, length)] * len(keys), TRIALS + 2, static=True)
        self.tokens = torch.arange(ROWS, device=device)[:, None]
        self.position = torch.full((ROWS, 1), PROMPT, device=device)
        self.hidden = torch.zeros(ROWS, 1, model.d_model, dtype=model.dtype, device=device)

    def step(self) -> None:
        self.plan.advance()
        self.hidden.copy_(planned(self.model, self.plan, self.tokens, self.position))
        self.position += 1
