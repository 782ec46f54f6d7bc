"""Activation patching: one value of a clean run put into a corrupted run, and how much of the answer it brings back.

One generic sweep (`activation_patching`): an index of places → an intervention at each → a metric of the last logits;
`heads`, `blocks` and `head_positions` are indices. The two runs are over token sequences of equal length, each under an
adapter or none: two prompts, or the same tokens with and without steering vectors (`interp/decisions.py` finds where
those decide). `recovered` is 0 as the corrupted run and 1 as the clean one (Meng et al. 2022; Wang et al. 2022).

A pass begins at the block that is patched, from what the corrupted run wrote there, and applies the head to the last
token only. Leading tokens on which the runs agree are computed once: their keys and values are kept.

`interp/attribution_patching.py` estimates all places at once. Left out: resampling and mean ablation, more than one
place at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from steerlab import tables
from steerlab.adapters import Adapter, Layout
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, hooks
from steerlab.models.hooks import Edit, Keep
from steerlab.rollouts.policy import in_use
from steerlab.rollouts.statistics import bootstrap_interval, share_of_gain

Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted run over tokens of one shape, each under an adapter or none.

    prompt_length: of all sequences or of each, for vectors that act on part of the tokens; None: all are prompt.
    last: of each sequence the position whose logits are looked at, all behind it being padding; None: the last one.
    """

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "_ _"]  # of the same shape
    clean_adapter: Adapter | None = None
    corrupted_adapter: Adapter | None = None
    prompt_length: int | Int[Tensor, " batch"] | None = None
    last: Int[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupted.shape:
            raise UsageError(
                f"the clean run has tokens of shape {tuple(self.clean.shape)}, the corrupted one "
                f"{tuple(self.corrupted.shape)}; give prompts of equal length"
            )

    @property
    def common(self) -> int:
        """Leading positions that are the same in both runs; at least one is left to compute."""
        if self.clean_adapter is not self.corrupted_adapter:
            return 0
        same = (self.clean == self.corrupted).all(0).long().cumprod(0)
        return min(int(same.sum()), int(self.end.min()))

    @property
    def end(self) -> Int[Tensor, " batch"]:
        """Of each sequence the position whose logits are looked at."""
        return torch.full_like(self.clean[:, 0], self.clean.shape[1] - 1) if self.last is None else self.last

    def layout(self, tokens: Int[Tensor, "batch pos"], start: int = 0, stop: int | None = None) -> Layout:
        """Where the tokens from `start` to `stop` stand."""
        whole = Layout.of_texts(tokens, tokens.shape[1])
        lengths = whole.prompt_length if self.prompt_length is None else self.prompt_length + 0 * whole.prompt_length
        part = slice(start, stop)
        return replace(whole, prompt_length=lengths, sequence=whole.sequence[:, part], position=whole.position[:, part])


@dataclass(frozen=True)
class Place:
    """A site of one block; head: that part of it; position: that token only; None: all."""

    kind: str
    layer: int
    head: int | None = None
    position: int | None = None


def heads(model: LanguageModel, kind: str = "z") -> list[Place]:
    """Every head's output (or q, k, v, by head or group of heads), at all positions."""
    n = model.width(kind) // model.d_head
    return [Place(kind, layer, head) for layer in range(model.n_layers) for head in range(n)]


def blocks(
    model: LanguageModel, positions: int, kinds: Sequence[str] = ("resid_pre", "attn_out", "mlp_out")
) -> list[Place]:
    """Residual stream, attention and MLP of every block at every position."""
    return [
        Place(kind, layer, None, position)
        for kind in kinds
        for layer in range(model.n_layers)
        for position in range(positions)
    ]


def head_positions(model: LanguageModel, positions: int) -> list[Place]:
    """Every head's output at every position."""
    return [replace(place, position=position) for place in heads(model) for position in range(positions)]


def logit_difference(right: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"]) -> Metric:
    """logit[right] − logit[wrong] of every sequence."""
    return lambda logits: (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]


@torch.no_grad()
def activation_patching(model: LanguageModel, pair: Pair, places: Sequence[Place], metric: Metric) -> pd.DataFrame:
    """Table `activation_patching`: the metric with each of `places` taken from the clean run, mean over sequences with
    its interval. Raises UsageError for no place, or one that the model or the tokens do not have."""
    check_places(model, pair, places)
    work = Work(model, pair)
    sites = {Site(place.kind, place.layer) for place in places}
    clean_end, clean = work.run(pair.clean, pair.clean_adapter, sites)
    corrupted_end, corrupted = work.begin(sites)
    found = []
    for place in places:
        site, at = Site(place.kind, place.layer), (slice(None), work.position(place), work.part(place))
        same = torch.equal(clean[site][at], corrupted[site][at])  # below a vector, say
        found.append(metric(corrupted_end if same else work.patched(place, clean[site])))
    return table_of(places, found, metric(clean_end), metric(corrupted_end))


def check_places(model: LanguageModel, pair: Pair, places: Sequence[Place]) -> None:
    """Raise UsageError for what cannot be patched."""
    if not places:
        raise UsageError("nothing to patch; give at least one place")
    for place in places:
        width = model.width(place.kind)
        model.doors.place(Site(place.kind, place.layer))
        if place.head is not None and (width % model.d_head or not 0 <= place.head < width // model.d_head):
            raise UsageError(f"head {place.head} of {place.kind} does not exist in {model.name}; choose another")
        if place.position is not None and not 0 <= place.position < pair.clean.shape[1]:
            raise UsageError(f"position {place.position} is outside the {pair.clean.shape[1]} tokens; choose another")


class Work:
    """Passes over the tokens behind those that the runs have in common."""

    def __init__(self, model: LanguageModel, pair: Pair) -> None:
        self.model, self.pair, self.start = model, pair, pair.common
        batch, length = pair.clean.shape
        self.positions = torch.arange(self.start, length, device=model.device).expand(batch, -1)
        self.kv: DynamicCache | None = None
        self.written: dict[int, Tensor] = {}
        if self.start:
            self.kv = DynamicCache()
            with torch.no_grad(), in_use(pair.corrupted_adapter, model) as attached:
                if attached is not None:
                    attached.place(None, pair.layout(pair.corrupted, 0, self.start))
                model.hidden(pair.corrupted[:, : self.start], kv=self.kv)

    def said(self, hidden: Float[Tensor, "batch rest d_model"]) -> Float[Tensor, "batch d_vocab"]:
        """The logits that are looked at."""
        at = (self.pair.end - self.start)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self.model.unembed(hidden.gather(1, at)[:, 0])

    @contextmanager
    def _under(self, tokens: Tensor, adapter: Adapter | None) -> Iterator[None]:
        """The adapter in use on the tokens behind the common ones; the common ones' keys alone are left afterwards."""
        with in_use(adapter, self.model) as attached:
            if attached is not None:
                attached.place(None, self.pair.layout(tokens, self.start))
            yield
        layers: list[Any] = [] if self.kv is None else self.kv.layers
        for layer in layers:  # those below where a pass began have grown by nothing
            layer.keys, layer.values = layer.keys[:, :, : self.start], layer.values[:, :, : self.start]

    def run(
        self, tokens: Tensor, adapter: Adapter | None, sites: Iterable[Site], notes: Iterable[tuple[Site, Keep]] = ()
    ) -> tuple[Float[Tensor, "batch d_vocab"], dict[Site, Float[Tensor, "batch rest width"]]]:
        """The last logits of one whole run, and what stands at `sites`; notes read before any edit."""
        values: dict[Site, Tensor] = {}
        reads = [(site, lambda x, s=site: values.__setitem__(s, x)) for site in sites]
        with self._under(tokens, adapter), self.model.doors.open((), reads, notes):
            hidden = self.model.hidden(tokens[:, self.start :], positions=self.positions, kv=self.kv)
        return self.said(hidden), values

    def begin(
        self, sites: Iterable[Site] = ()
    ) -> tuple[Float[Tensor, "batch d_vocab"], dict[Site, Float[Tensor, "batch rest width"]]]:
        """`run` of the corrupted tokens; what their blocks wrote is kept."""
        keep = {block: self._keep(block) for block in range(1, self.model.n_layers)}
        with hooks.written(self.model, keep):
            return self.run(self.pair.corrupted, self.pair.corrupted_adapter, sites)

    def _keep(self, block: int) -> Callable[[Tensor], None]:
        return lambda x: self.written.__setitem__(block, x)

    def position(self, place: Place) -> slice:
        """Of the tokens that are computed; nothing for one of the common ones."""
        if place.position is None:
            return slice(None)
        at = place.position - self.start
        return slice(at, at + 1) if at >= 0 else slice(0, 0)

    def part(self, place: Place) -> slice:
        d = self.model.d_head
        return slice(None) if place.head is None else slice(place.head * d, (place.head + 1) * d)

    def patched(self, place: Place, clean: Float[Tensor, "batch rest width"]) -> Float[Tensor, "batch d_vocab"]:
        """The last logits of the corrupted run with one place from the clean one."""
        where, part = self.position(place), self.part(place)

        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, where, part] = clean[:, where, part]
            return x

        return self.onward(place.layer, {Site(place.kind, place.layer): edit})

    def onward(
        self,
        block: int,
        edits: Mapping[Site, Edit],
        notes: Iterable[tuple[Site, Keep]] = (),
        adapter: Adapter | None = None,
    ) -> Float[Tensor, "batch d_vocab"]:
        """The last logits of the corrupted run from `block` on under `edits`; notes read before them. adapter: in the
        place of the corrupted run's."""
        model, tokens = self.model, self.pair.corrupted
        used = self.pair.corrupted_adapter if adapter is None else adapter
        with self._under(tokens, used), model.doors.open(edits.items(), notes=notes):
            if block == 0:
                hidden = model.hidden(tokens[:, self.start :], positions=self.positions, kv=self.kv)
            else:
                hidden = model.forward_from(block, self.written[block], positions=self.positions, kv=self.kv)
        return self.said(hidden)


def measured(found: Tensor, clean: Tensor, corrupted: Tensor) -> dict[str, float]:
    """The columns that say what a metric is, and how far it has gone from the corrupted to the clean run."""
    floor, ceiling, value = (end.double().cpu().numpy()[None] for end in (corrupted, clean, found))
    bounds = float(min(value.min(), floor.min())), float(max(value.max(), ceiling.max()))
    interval = bootstrap_interval(value, resamples=1_000, bounds=bounds)
    share = share_of_gain(value, [floor], ceiling, resamples=1_000)
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "recovered": share.value,
        "recovered_low": share.low,
        "recovered_high": share.high,
        "clean": float(np.mean(ceiling)),
        "corrupted": float(np.mean(floor)),
        "n": len(found),
    }


def table_of(places: Sequence[Place], found: Sequence[Tensor], clean: Tensor, corrupted: Tensor) -> pd.DataFrame:
    """A row per place, in order."""
    rows = [
        {"kind": place.kind, "layer": place.layer}
        | {"head": -1 if place.head is None else place.head}
        | {"position": -1 if place.position is None else place.position}
        | measured(end, clean, corrupted)
        for place, end in zip(places, found, strict=True)
    ]
    return tables.check(pd.DataFrame(rows), "activation_patching")
