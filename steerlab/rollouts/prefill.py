"""Prompts before decoding: each once per set of vectors, and below the first changed block once for all sets.

A unit is a prompt under one member of a row bank. Members agree up to the block at which their vectors first act, so
the base model reads the prompts once, and every member goes on from what the base wrote there; keys and values of the
blocks below are the base's. With one member nothing is shared and its vectors are in force from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab.adapters import Attached, Layout
from steerlab.models import LanguageModel, hooks
from steerlab.models.attention import Segment, Stream
from steerlab.models.decoding import ByRow, Decoding, Sharing, UnitKeys
from steerlab.models.forward import planned

PREFILL_TOKENS = 4096  # prompt tokens in one forward pass
NOBODY = -1  # the member of a row bank that has no vectors
Unit = tuple[int, int]  # prompt, member


@dataclass
class Prefilled:
    """keys: per layer (and behind them what `attention.kept_apart` keeps), of every unit that differs there. unit: per
    layer, name → place in `keys`. last: of each unit, the hidden state of its last prompt token. written: of each unit,
    what the block below its first one wrote."""

    keys: list[list[tuple[Tensor, Tensor]]]
    unit: list[dict[Unit, int]]
    last: dict[Unit, Float[Tensor, " d_model"]] = field(default_factory=dict)
    written: dict[Unit, Float[Tensor, "pos d_model"]] = field(default_factory=dict)

    def plan(self, names: Sequence[Unit], capacity: int, model: LanguageModel) -> Decoding | ByRow:
        """The plan of rows that continue the units `names`, as `model` computes; empties `keys` layer by layer."""
        prompt: list[list[tuple[Tensor, Tensor]]] = []
        sharing: list[Sharing] = []
        shared: dict[tuple[int, ...], Sharing] = {}
        distinct = list(dict.fromkeys(names))
        for layer, unit in enumerate(self.unit):
            places = tuple(unit[name] for name in distinct)
            used = sorted(set(places))
            pairs = [self.keys[layer][place] for place in used]
            if places not in shared:
                device, at = pairs[0][0].device, {place: i for i, place in enumerate(used)}
                rows = torch.tensor([at[unit[name]] for name in names], device=device)
                shared[places] = Sharing(rows, torch.tensor([key.shape[1] for key, _ in pairs], device=device))
            sharing.append(shared[places])
            prompt.append(pairs)
            self.keys[layer] = []

        def padded() -> Iterator[UnitKeys]:
            """Layer by layer, so that what was padded is let go at once."""
            while prompt:
                yield _padded(prompt.pop(0))

        if model.kernels == "fused":
            return ByRow(padded(), sharing, capacity)
        return Decoding(padded(), sharing, capacity, static=model.steps == "captured")


def _padded(pairs: Sequence[tuple[Tensor, Tensor]]) -> UnitKeys:
    """Units side by side, zeros behind the shorter ones."""
    longest = max(key.shape[1] for key, _ in pairs)

    def block(which: int) -> Tensor:
        first = pairs[0][which]
        out = first.new_zeros(len(pairs), first.shape[0], longest, first.shape[2])
        for place, pair in enumerate(pairs):
            out[place, :, : pair[which].shape[1]] = pair[which]
        return out

    return UnitKeys(block(0), block(1))


@dataclass(frozen=True)
class Reader:
    """Reads prompts with `model`; `attached` is in use. keep: also what was written below each member's first block."""

    model: LanguageModel
    attached: Attached | None
    prompts: Sequence[Sequence[int]]
    keep: bool = False

    def read(self, units: Sequence[Unit]) -> Prefilled:
        """Keys, values and last hidden states of all units."""
        n_layers = self.model.n_layers
        found = Prefilled([[] for _ in range(n_layers)], [{} for _ in range(n_layers)])
        first = {member: self.first_block(member) for _, member in units}
        if sum(block > 0 for block in first.values()) < 2:
            self.pass_over(found, units, 0, {}, set())
            return found
        base = [(prompt, NOBODY) for prompt in sorted({prompt for prompt, _ in units})]
        seams = self.pass_over(found, base, 0, {}, set(first.values()) - {0})
        for block in sorted(set(first.values())):
            mine = [unit for unit in units if first[unit[1]] == block]
            self.pass_over(found, mine, block, {u: seams[u[0], NOBODY][block] for u in mine} if block else {}, set())
            for unit in mine:  # below its first block a unit is the base's
                for layer in range(block):
                    found.unit[layer][unit] = found.unit[layer][unit[0], NOBODY]
        return found

    def first_block(self, member: int) -> int:
        """The block before which a member changes nothing; the number of layers for the base model."""
        if self.attached is None or member == NOBODY:
            return self.model.n_layers
        return self.attached.first_blocks[min(member, len(self.attached.first_blocks) - 1)]

    def kept(self, member: int) -> int:
        """The block before which a member's states are kept; 0 for nothing."""
        return self.first_block(member) if self.keep and self.attached is not None and member != NOBODY else 0

    def pass_over(
        self, found: Prefilled, units: Sequence[Unit], block: int, entry: dict[Unit, Tensor], seams: set[int]
    ) -> dict[Unit, dict[int, Tensor]]:
        """Forward passes from `block` on, fed `entry` if that is not the bottom; what was written before each seam."""
        wanted = {self.kept(member) for _, member in units} - {0} | seams
        out: dict[Unit, dict[int, Tensor]] = {}
        for part in self.chunks(units):
            lengths = [len(self.prompts[prompt]) for prompt, _ in part]
            written = torch.cat([entry[unit] for unit in part])[None] if entry else None
            hidden, seen = self.forward(found, part, lengths, block, written, wanted)
            stops = torch.tensor(lengths).cumsum(0).tolist()
            for unit, n, stop in zip(part, lengths, stops, strict=True):
                found.last[unit] = hidden[0, stop - 1]
                out[unit] = {b: states[stop - n : stop] for b, states in seen.items()}
                if self.kept(unit[1]):
                    found.written[unit] = out[unit][self.kept(unit[1])].clone()
        return out

    def chunks(self, units: Sequence[Unit]) -> Iterator[list[Unit]]:
        """Units in order, at most PREFILL_TOKENS prompt tokens at a time (one unit is always let through)."""
        part: list[Unit] = []
        total = 0
        for unit in units:
            n = len(self.prompts[unit[0]])
            if part and total + n > PREFILL_TOKENS:
                yield part
                part, total = [], 0
            part, total = [*part, unit], total + n
        yield part

    def forward(
        self,
        found: Prefilled,
        part: list[Unit],
        lengths: list[int],
        block: int,
        entry: Tensor | None,
        seams: set[int],
    ) -> tuple[Float[Tensor, "one slot d_model"], dict[int, Float[Tensor, "slot d_model"]]]:
        """Hidden states of one pass over some units, and what was written before each of `seams`."""
        device, model = self.model.device, self.model
        stops = torch.tensor(lengths).cumsum(0).tolist()
        bounds = [(stop - n, stop) for n, stop in zip(lengths, stops, strict=True)]
        tokens = torch.tensor([t for prompt, _ in part for t in self.prompts[prompt]], device=device)[None]
        layout = prompt_layout([self.prompts[prompt] for prompt, _ in part], device)
        if self.attached is not None:
            members = torch.tensor([member for _, member in part], device=device)
            self.attached.place(members[layout.sequence], layout)

        def keep_keys(layer: int, key: Tensor, value: Tensor) -> None:
            while len(found.keys) <= layer:
                found.keys.append([])
                found.unit.append({})
            place = len(found.keys[layer])
            for i, (start, stop) in enumerate(bounds):
                # Copies: a view would keep alive what was computed together with it (queries, for one).
                found.keys[layer].append((key[:, start:stop].clone(), value[:, start:stop].clone()))
                found.unit[layer][part[i]] = place + i

        segments = [Segment.of(start, (stop - start,), (0, 0), device) for start, stop in bounds]
        seen: dict[int, Tensor] = {}
        with hooks.written(model, {seam: partial(_note, seen, seam) for seam in seams if seam >= max(block, 1)}):
            hidden = planned(
                model,
                Stream(segments, keep_keys, model.kernels == "fused"),
                tokens,
                layout.position,
                block=block,
                written=entry,
            )
        return hidden, seen


def _note(seen: dict[int, Tensor], seam: int, x: Tensor) -> None:
    seen[seam] = x[0]


def prompt_layout(prompts: Sequence[Sequence[int]], device: torch.device) -> Layout:
    """Prompts one behind the other in one row of tokens."""
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    sequences = torch.tensor([list(p) + [0] * (longest - len(p)) for p in prompts], device=device)
    sequence = torch.repeat_interleave(torch.arange(len(prompts), device=device), lengths)
    position: Int[Tensor, " slot"] = torch.cat([torch.arange(len(p), device=device) for p in prompts])
    return Layout(sequences, lengths, sequence[None], position[None])
