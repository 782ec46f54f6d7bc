"""Keys and values while many rows are decoded: every prompt's once, every row's own behind them.

`Decoding` is the attention plan of one new token per row. Rows that continue one unit (a prompt under one set of
vectors) attend to its keys in one product, then each to what it has written itself, and one softmax joins the two.
Which unit a row continues may differ by layer: rows whose vectors are equal up to a layer share units there and part
company above (`Sharing`). Rows that have ended are dropped without moving a prompt. `ByRow` is the same plan with one
kernel per layer (`operators.attend`), on a CPU whose model uses kernels: rows there keep their place and share nothing
but the prompt's memory.

A static `Decoding` does the same operators on the same memory at every step, places not yet written being hidden, and
asks the device for nothing: a step can be captured (`graphs.py`).

On a CPU attention of a bf16 model is computed in fp32: for products this small it is faster, and scores are not
rounded. Keys and values are held so too; `ByRow` holds them as the model wrote them, since they come from memory at
every step, and in the order that its kernel reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab.models.attention import Rule


@dataclass(frozen=True)
class UnitKeys:
    """One layer's keys and values of all units, padded with zeros on the right."""

    key: Float[Tensor, "unit kv_head slot d"]
    value: Float[Tensor, "unit kv_head slot d_value"]


class Sharing:
    """Seats of rows by unit: unit u has seats (u, 0) to (u, width − 1), of which the first few are taken by its rows.

    unit: of each row. lengths: prompt tokens of each unit. used: units that have rows, None if all have.
    """

    def __init__(self, unit: Int[Tensor, " row"], lengths: Int[Tensor, " unit"]) -> None:
        self.unit, self.all_lengths = unit, lengths
        counts = torch.bincount(unit, minlength=len(lengths))
        used = torch.nonzero(counts).flatten()
        self.used = used if len(used) < len(lengths) else None
        self.lengths, self.n_units, self.width = lengths[used], len(used), int(counts.max())
        order = torch.argsort(unit, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(unit), device=unit.device) - (counts.cumsum(0) - counts)[unit[order]]
        self.seat = (torch.cumsum((counts > 0).long(), 0) - 1)[unit] * self.width + rank
        self.row = torch.zeros(self.n_units * self.width, dtype=torch.long, device=unit.device)
        self.row[self.seat] = torch.arange(len(unit), device=unit.device)
        self.in_order = torch.equal(self.seat, torch.arange(len(self.row), device=unit.device))
        self.longest = int(self.lengths.max())
        self.padded = bool((self.lengths < lengths.max()).any())

    def seated(self, x: Float[Tensor, "row kv_head *axes"]) -> Float[Tensor, "unit kv_head seat *axes"]:
        """Rows brought to their seats (a view where they are there already); empty seats repeat row 0."""
        taken = x if self.in_order else x.index_select(0, self.row)
        return taken.unflatten(0, (self.n_units, self.width)).transpose(1, 2)

    def risen(self, x: Float[Tensor, "unit kv_head seat *axes"]) -> Float[Tensor, "row kv_head *axes"]:
        """The inverse of `seated`."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows if self.in_order else rows.index_select(0, self.seat)

    def select(self, rows: Int[Tensor, " kept"]) -> Sharing:
        return Sharing(self.unit[rows], self.all_lengths)


class Decoding:
    """prompt: keys of all units, per layer. sharing: per layer (equal objects are shared). capacity: tokens per row.
    static: see above."""

    def __init__(
        self, prompt: Iterable[UnitKeys], sharing: Sequence[Sharing], capacity: int, static: bool = False
    ) -> None:
        self.prompt, self.sharing, self.capacity = [_working(keys) for keys in prompt], list(sharing), capacity
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(self.prompt)
        self.static = static
        self.at = torch.full((1,), -1, device=self.prompt[0].key.device)  # the place that is written
        self.filled = capacity if static else 0  # places that a step reads
        self._bias: dict[tuple[int, int | None], Tensor | None] = {}

    def advance(self) -> None:
        """The next forward writes the next place."""
        self.at += 1
        if not self.static:
            self.filled += 1
        self._bias.clear()

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Row i becomes what row `rows[i]` was; only places that are filled are copied."""
        renewed = {place: old.select(rows) for place, old in {id(s): s for s in self.sharing}.items()}
        for layer, old in enumerate(self.sharing):
            new = self.sharing[layer] = renewed[id(old)]
            pair = self.own[layer]
            if pair is not None:
                seats = old.seat[rows][new.row]
                self.own[layer] = self._moved(pair[0], old, new, seats), self._moved(pair[1], old, new, seats)

    def _moved(self, buffer: Tensor, old: Sharing, new: Sharing, seats: Tensor) -> Tensor:
        filled = buffer[:, :, :, : self.filled][seats // old.width, :, seats % old.width]
        moved = buffer.new_empty(new.n_units, buffer.shape[1], new.width, *buffer.shape[3:])
        moved[:, :, :, : self.filled] = filled.unflatten(0, (new.n_units, new.width)).transpose(1, 2)
        return moved

    def _written(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Own keys and values so far, (unit, kv_head, seat, filled, d), the new ones included."""
        pair = self.own[layer]
        if pair is None:
            like = self.prompt[layer].key
            shape = (*key.shape[:3], self.capacity)
            # What is hidden must be a number where it is read at all: 0 · NaN is NaN.
            make = like.new_zeros if self.static else like.new_empty
            pair = make(*shape, key.shape[3]), make(*shape, value.shape[3])
            self.own[layer] = pair
        for buffer, new in zip(pair, (key, value), strict=True):
            buffer.index_copy_(3, self.at, new.to(buffer.dtype)[:, :, :, None])
        return pair[0][:, :, :, : self.filled], pair[1][:, :, :, : self.filled]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        rows, heads, _, width = query.shape
        kv_heads = key.shape[1]
        sharing, prompt = self.sharing[layer], self.prompt[layer]
        unit_key, unit_value = prompt.key, prompt.value
        if sharing.used is not None:
            unit_key, unit_value = unit_key[sharing.used], unit_value[sharing.used]
        own_key, own_value = self._written(layer, sharing.seated(key[:, :, 0]), sharing.seated(value[:, :, 0]))
        grouped = query.reshape(rows, kv_heads, heads // kv_heads, width).to(unit_key.dtype) * rule.scale
        asked = sharing.seated(grouped).contiguous()  # (unit, kv_head, seat, repeat, d)
        bias = self._bias_of(sharing, unit_key.shape[2], rule)
        n_prompt = unit_key.shape[2]
        shape = asked.shape[:4]
        on_prompt = torch.bmm(asked.flatten(2, 3).flatten(0, 1), unit_key.flatten(0, 1).transpose(1, 2))
        on_own = torch.bmm(asked.flatten(0, 2), own_key.flatten(0, 2).transpose(1, 2))
        scores = torch.cat([on_prompt.view(*shape, -1), on_own.view(*shape, -1)], -1)
        if rule.softcap is not None:
            scores = torch.tanh(scores / rule.softcap) * rule.softcap
        if bias is not None:
            scores += bias
        exact = torch.promote_types(scores.dtype, torch.float32)
        pattern = torch.softmax(scores, -1, dtype=exact).to(unit_value.dtype)
        mixed = torch.bmm(pattern[..., n_prompt:].flatten(0, 2), own_value.flatten(0, 2)).view(*shape, -1)
        at_prompt = pattern[..., :n_prompt].flatten(2, 3).flatten(0, 1)
        mixed += torch.bmm(at_prompt, unit_value.flatten(0, 1)).view(mixed.shape)
        return sharing.risen(mixed).reshape(rows, heads, 1, -1).to(value.dtype)

    def _bias_of(self, sharing: Sharing, slots: int, rule: Rule) -> Tensor | None:
        """−∞ on padding behind a prompt and on what a window has left behind, (unit, 1, 1, 1, key); None if nothing."""
        place = (id(sharing), rule.window)
        if place not in self._bias:
            self._bias[place] = self._hiding(sharing, slots, rule.window)
        return self._bias[place]

    def _hiding(self, sharing: Sharing, slots: int, window: int | None) -> Tensor | None:
        longest = sharing.longest + self.filled
        if not self.static and not sharing.padded and (window is None or longest <= window):
            return None
        length = sharing.lengths[:, None]
        device = length.device
        own, on_prompt = torch.arange(self.filled, device=device), torch.arange(slots, device=device)
        later = (own > self.at).expand(len(length), -1)
        hidden = torch.cat([on_prompt >= length, later], 1)
        if window is not None:
            at = torch.cat([on_prompt.expand(len(length), -1), length + own], 1)
            hidden |= length + self.at - at >= window
        like = self.prompt[0].key
        lowest = torch.finfo(like.dtype).min
        return torch.zeros(hidden.shape, dtype=like.dtype, device=device).masked_fill_(hidden, lowest)[
            :, None, None, None
        ]


class ByRow:
    """The same arguments, and the same plan."""

    def __init__(self, prompt: Iterable[UnitKeys], sharing: Sequence[Sharing], capacity: int) -> None:
        from steerlab.models import operators

        self.prompt = [(operators.keys_in_blocks(x.key), operators.padded_values(x.value)) for x in prompt]
        self.capacity = capacity
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(self.prompt)
        self.unit, self.lengths = [s.unit for s in sharing], [s.all_lengths for s in sharing]
        self.places = len(self.unit[0])
        self.place = torch.arange(self.places)
        self.filled, self.scratch = 0, torch.empty(0)

    def advance(self) -> None:
        """The next forward writes the next place."""
        self.filled += 1

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Row i becomes what row `rows[i]` was; nothing is moved."""
        kept = {place: unit[rows] for place, unit in {id(unit): unit for unit in self.unit}.items()}
        self.unit, self.place = [kept[id(unit)] for unit in self.unit], self.place[rows]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        from steerlab.models import operators

        prompt, own = self.prompt[layer], self.own[layer]
        if own is None:  # for all places: rows may have left before the first step
            room = self.places, key.shape[1], self.capacity
            own = self.own[layer] = operators.room_for_keys(key, *room), operators.room_for_values(value, *room)
        needed = operators.scratch_size(query.shape[0], query.shape[1], key.shape[3], prompt[1], own[1])
        if len(self.scratch) < needed:
            self.scratch = torch.empty(needed, dtype=operators.working(key.dtype))
        index = self.unit[layer], self.place, self.lengths[layer]
        return operators.attend(
            query, key, value, prompt, own, index, self.filled, rule.scale, rule.softcap, rule.window, self.scratch
        )


def _working(keys: UnitKeys) -> UnitKeys:
    """In the dtype that attention is computed in."""
    if keys.key.device.type == "cpu" and keys.key.dtype == torch.bfloat16:
        return UnitKeys(keys.key.float(), keys.value.float())
    return keys
