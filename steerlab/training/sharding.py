"""Frozen weights kept in pieces: each process of a world holds an n-th of every block (torch's FSDP2, `fully_shard`).

A block's weights are brought together when a pass enters it and dropped behind it, so a process needs room for its
pieces and one block; what crosses the wire is then the weights, once per pass, where data-parallel training alone sends
only the adapter's gradient. Embedding, final norm and head stay whole. Doors, adapters and numbers are as without: the
same bits.

Bringing together is an exchange, so all processes must enter the same blocks equally often. They do not: completions
end when they end. In `uneven` a process says before every pass that it makes one; who has nothing left to do lends its
pieces to the others' passes until nobody makes any. In the update it makes passes whose loss weighs nothing (`even`).
Left out: loading in pieces (a process first holds all weights), fetching the next block ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from steerlab.batches import Batch
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.rollouts import Completions, Policy
from steerlab.training.world import World


class Shards:
    """`model` with its blocks in pieces, from now on. Raises UsageError if there is only one process."""

    def __init__(self, model: LanguageModel, world: World) -> None:
        if world.size == 1:
            raise UsageError("one process alone cannot keep a share of the weights; start several with torchrun")
        _ = model.weights_sha256  # of the whole weights, while they are there
        self.model, self.world = model, world
        mesh = init_device_mesh(model.device.type, (world.size,))
        for block in model.blocks:
            if not isinstance(block, FSDPModule):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)

    @property
    def blocks(self) -> list[FSDPModule]:
        return [block for block in self.model.blocks if isinstance(block, FSDPModule)]

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """Inside the `with` processes may make different numbers of passes, without gradients. All must enter it."""

        def announce(_module: nn.Module, _inputs: Any) -> None:
            self.world.gather(True)

        handle = self.model.backbone.register_forward_pre_hook(announce)
        try:
            yield
            handle.remove()
            while any(self.world.gather(False)):
                for block in self.blocks:
                    block.unshard()
                    block.reshard()
        finally:
            handle.remove()

    def even(self, batch: Batch, spare: Batch, token_budget: int) -> Iterator[tuple[Batch, float]]:
        """Micro-batches and the weights of their losses, as many as the process with the most has: `spare` with weight
        0 in place of those that this one lacks."""
        n = sum(1 for _ in batch.micro_batches(token_budget))
        most = max(self.world.gather(n))
        yield from ((micro, 1.0) for micro in batch.micro_batches(token_budget))
        yield from ((spare, 0.0) for _ in range(most - n))


class ShardedPolicy(Policy):
    """A policy whose processes each sample their own completions from weights in pieces."""

    def __init__(self, shards: Shards, adapter: Any) -> None:
        super().__init__(shards.model, adapter)
        self.shards = shards

    def sample(self, *arguments: Any, **named: Any) -> Completions:
        """See `Policy.sample`; every process of the world must call it."""
        with self.shards.uneven():
            return super().sample(*arguments, **named)
