"""Key/value caches that rows of one group can share, on transformers' own cache interface.

`GrowingCache` keeps gradients (the update needs them: prompt keys and values are computed once per group and
read by every completion). `ReservedCache` is for sampling: it takes its memory once and writes in place, where
transformers' default copies the whole cache at every token. Both hold every position, also for models with
sliding windows; the window is applied by the attention mask.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingCache(Cache):
    """Cache that grows by concatenation and keeps the graph."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)

    def take_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Row i becomes what row `rows[i]` was; gradients of shared rows add up."""
        for layer in self.layers:
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class ReservedLayer(DynamicLayer):
    """One layer's keys and values in a buffer of `capacity` positions, filled from the left."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, d_key = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer = key_states.new_empty(batch, heads, self.capacity, d_key)
        self.value_buffer = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.key_buffer[:, :, start : self.filled] = key_states
        self.value_buffer[:, :, start : self.filled] = value_states
        return self._expose()

    def take_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Row i becomes what row `rows[i]` was; only filled positions are copied."""
        old_keys, old_values = self._expose()
        _, heads, _, d_key = old_keys.shape
        self.key_buffer = old_keys.new_empty(len(rows), heads, self.capacity, d_key)
        self.value_buffer = old_values.new_empty(len(rows), heads, self.capacity, old_values.shape[-1])
        torch.index_select(old_keys, 0, rows, out=self.key_buffer[:, :, : self.filled])
        torch.index_select(old_values, 0, rows, out=self.value_buffer[:, :, : self.filled])
        self._expose()

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.capacity

    def _expose(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.key_buffer[:, :, : self.filled], self.value_buffer[:, :, : self.filled]
        return self.keys, self.values


class ReservedCache(Cache):
    """Cache of `capacity` positions for sampling, without gradients."""

    def __init__(self, n_layers: int, capacity: int) -> None:
        super().__init__(layers=[ReservedLayer(capacity) for _ in range(n_layers)])

    def take_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Row i becomes what row `rows[i]` was: one prompt for many rows, or only the rows still running."""
        for layer in self.layers:
            assert isinstance(layer, ReservedLayer)
            layer.take_rows(rows)
