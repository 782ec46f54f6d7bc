"""Other `forward`s for some modules, for a while: a model is left as it was found.

A module may already have a `forward` of its own beside its class's (accelerate keeps its offload hooks there); that one
is put back, where deleting the entry would lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def swapped(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside the `with` each module computes the function beside it."""
    before: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module, forward in forwards:
            before.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own
