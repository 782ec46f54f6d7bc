"""Streams of activations at a site, of a model or of the difference that an adapter makes, shuffled.

Forward passes end at the site's block. Texts are taken in order until a buffer of tokens is full (a text is never
divided); what they hold comes out in a random order of the buffer's own, drawn from the seed and the buffer's number.
Neither how texts are fed together nor how long shards are changes that order, and a killed stream goes on at the buffer
where it was, to the same bytes. Each position of each text comes out once.

A difference is steered − base on the same tokens, in fp32 from what both passes hold (of a bf16 model it carries the
rounding of bf16: load the model in fp32 to measure it). The steered pass begins where the adapter first acts.

Positions that act as attention sinks are left out: the first of every text, and such others as their length betrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlab.adapters import Adapter, Layout
from steerlab.errors import RunFailed, UsageError
from steerlab.interp.states import check_texts
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, hooks
from steerlab.models.forward import ending_after
from steerlab.rollouts.policy import in_use
from steerlab.runs import tensors_sha256
from steerlab.saes.hook_names import hf_name, lens_name
from steerlab.saes.streams import DTYPES, Activations, Origin, Rows, Stream, Writer
from steerlab.training import Texts

Hear = Callable[[int, int], None]  # tokens so far, tokens in all


@dataclass(frozen=True)
class Fed:
    """Texts fed together, padded on the right: no token sees what stands behind it. texts: their numbers."""

    texts: tuple[int, ...]
    tokens: Int[Tensor, "batch pos"]
    layout: Layout


def prose_texts(model: LanguageModel, source: Texts) -> tuple[list[Text], list[Text]]:
    """Running text in rows of equal length: to train on, and held out. Raises UsageError as `Texts.cut`."""
    train, held_out = ([Text(tuple(row), len(row)) for row in rows.tolist()] for rows in source.cut(model))
    return train, held_out


def record(
    model: LanguageModel,
    texts: Sequence[Text],
    wanted: Activations,
    adapter: Adapter | None = None,
    folder: str | Path | None = None,
    *,
    shard_tokens: int = 16_384,
    hear: Hear | None = None,
) -> Stream:
    """The activations of `texts` under `adapter`, in memory, or in `folder` (which is then gone on with, or read).

    Raises UsageError for texts that cannot be read or have no position to keep, a site the model does not have, a
    difference without an adapter that acts at or before it, a folder with something else in it, or too little disk;
    RunFailed for an activation that is not finite.
    """
    origin = origin_of(model, texts, wanted, adapter)
    spans = buffers([len(kept(text, wanted)) for text in texts], wanted.buffer)
    writer = None if folder is None else Writer(folder, origin, shard_tokens)
    parts: list[Rows] = []
    for index in range(len(writer.buffers) if writer else 0, len(spans)):
        rows = _buffer(model, texts, wanted, adapter, index, range(*spans[index]))
        if writer is None:
            parts.append(rows)
        else:
            writer.append(rows, last=index == len(spans) - 1)
        if hear is not None:
            hear(sum(len(kept(text, wanted)) for text in texts[: spans[index][1]]), origin.n_tokens)
    return Stream(parts, origin) if folder is None else Stream.open(folder)


def origin_of(
    model: LanguageModel, texts: Sequence[Text], wanted: Activations, adapter: Adapter | None = None
) -> Origin:
    """What a stream of these will be, before anything is computed. Raises UsageError as `record`."""
    check_texts(model, texts)
    width = model.width(wanted.site.kind)
    model.doors.place(wanted.site)
    if wanted.kind == "difference":
        if adapter is None:
            raise UsageError("a difference needs an adapter (steering vectors) to compare the base model with")
        if adapter.first_block > wanted.site.layer + (wanted.site.kind == "resid_post"):
            raise UsageError(f"the adapter first acts behind {wanted.site}, where nothing differs; choose a later site")
    n_tokens = sum(len(kept(text, wanted)) for text in texts)
    if not n_tokens:
        raise UsageError(f"no position is left with skip {wanted.skip}; give longer texts, or skip fewer")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(np.array([text.n_prompt, len(text.tokens), *text.tokens], dtype=np.int64).tobytes())
    return Origin(
        wanted=wanted,
        model=model.name,
        weights_sha256=model.weights_sha256,
        width=width,
        hook_name=lens_name(model, wanted.site),
        hf_hook_name=hf_name(model, wanted.site),
        n_texts=len(texts),
        n_tokens=n_tokens,
        longest=max(len(text.tokens) for text in texts),
        texts_sha256=digest.hexdigest(),
        adapter_sha256="" if adapter is None else tensors_sha256(adapter.snapshot()),
    )


def kept(text: Text, wanted: Activations) -> range:
    """The positions of a text that are recorded."""
    first = max(wanted.skip, text.n_prompt if wanted.generated_only else 0)
    return range(min(first, len(text.tokens)), len(text.tokens))


def fed_together(texts: Sequence[Text], numbers: Sequence[int], budget: int, device: torch.device) -> Iterator[Fed]:
    """The texts with these numbers, similar lengths together, at most `budget` tokens with their padding at a time."""
    waiting: list[int] = []
    for number in sorted(numbers, key=lambda i: len(texts[i].tokens)):
        if waiting and (len(waiting) + 1) * len(texts[number].tokens) > budget:
            yield _padded(texts, waiting, device)
            waiting = []
        waiting.append(number)
    if waiting:
        yield _padded(texts, waiting, device)


def _padded(texts: Sequence[Text], numbers: Sequence[int], device: torch.device) -> Fed:
    tokens = torch.zeros(len(numbers), max(len(texts[i].tokens) for i in numbers), dtype=torch.long)
    for row, i in zip(tokens, numbers, strict=True):
        row[: len(texts[i].tokens)] = torch.tensor(texts[i].tokens)
    tokens = tokens.to(device)
    layout = Layout.of_texts(tokens, 1)
    n_prompt = torch.tensor([texts[i].n_prompt for i in numbers], device=device)
    return Fed(tuple(numbers), tokens, Layout(tokens, n_prompt, layout.sequence, layout.position))


@torch.no_grad()
def values(
    model: LanguageModel, adapter: Adapter | None, fed: Fed, wanted: Activations
) -> tuple[Float[Tensor, "batch pos width"], Float[Tensor, "batch pos width"]]:
    """What a stream records at every position of one batch, padding included, and the activations by whose length sinks
    are known. Of a difference (at least fp32) those are the base model's, else they are the same."""
    if wanted.kind == "residual":
        own = site_values(model, adapter, fed, wanted.site)
        return own, own
    assert adapter is not None
    block = adapter.first_block
    seam: list[Tensor] = []  # what both passes have in common
    with hooks.written(model, {block: seam.append} if block else {}):
        base = site_values(model, None, fed, wanted.site)
    steered = site_values(model, adapter, fed, wanted.site, block, seam[0] if seam else None)
    exact = torch.promote_types(base.dtype, torch.float32)
    return steered.to(exact) - base.to(exact), base


def held(
    own: Float[Tensor, "batch pos width"], fed: Fed, texts: Sequence[Text], wanted: Activations
) -> Bool[Tensor, "batch pos"]:
    """Which positions of a batch the stream has: those of `kept` that are no sinks."""
    inside = torch.zeros(fed.tokens.shape, dtype=torch.bool, device=own.device)
    lengths = own.float().norm(dim=-1)
    for row, number in enumerate(fed.texts):
        span = kept(texts[number], wanted)
        inside[row, span.start : span.stop] = True
        lengths[row, len(texts[number].tokens) :] = torch.nan
    if wanted.sink is None:
        return inside
    return inside & ~(lengths > wanted.sink * lengths.nanmedian(dim=1, keepdim=True).values)


@torch.no_grad()
def by_text(
    model: LanguageModel, texts: Sequence[Text], wanted: Activations, adapter: Adapter | None = None
) -> Iterator[tuple[int, Float[Tensor, "pos width"], Bool[Tensor, " pos"]]]:
    """Of each text, similar lengths together, its number, what a stream records at all its positions, in at least fp32,
    and which of them the stream keeps."""
    for fed in fed_together(texts, range(len(texts)), wanted.batch_tokens, model.device):
        found, own = values(model, adapter, fed, wanted)
        inside = held(own, fed, texts, wanted)
        for row, number in enumerate(fed.texts):
            length = len(texts[number].tokens)
            x = found[row, :length]
            yield number, x.to(torch.promote_types(x.dtype, torch.float32)), inside[row, :length]


@torch.no_grad()
def site_values(
    model: LanguageModel,
    adapter: Adapter | None,
    fed: Fed,
    site: Site,
    block: int = 0,
    written: Float[Tensor, "batch pos d_model"] | None = None,
) -> Float[Tensor, "batch pos width"]:
    """A site's values under an adapter, in a pass that ends there; block, written: where it begins
    (`models/forward.py`)."""
    seen: list[Tensor] = []
    with in_use(adapter, model) as attached, ending_after(model, site.layer):
        if attached is not None:
            attached.place(None, fed.layout)
        with model.doors.open((), [(site, seen.append)]):
            if written is None:
                model.hidden(fed.tokens)
            else:
                model.forward_from(block, written)
    return seen[0]


def buffers(counts: Sequence[int], size: int) -> list[tuple[int, int]]:
    """First and last + 1 of the texts of each buffer, whose kept tokens are at most `size`, or one text alone."""
    found, start, held = [], 0, 0
    for number, count in enumerate(counts):
        if number > start and held + count > size:
            found.append((start, number))
            start, held = number, 0
        held += count
    return [*found, (start, len(counts))]


def _buffer(
    model: LanguageModel,
    texts: Sequence[Text],
    wanted: Activations,
    adapter: Adapter | None,
    index: int,
    numbers: range,
) -> Rows:
    """The rows of one buffer: each is put where it comes out; then those of sinks are left out."""
    counts = [len(kept(texts[i], wanted)) for i in numbers]
    size, starts = sum(counts), dict(zip(numbers, np.cumsum([0, *counts]).tolist(), strict=False))
    places = torch.from_numpy(np.random.default_rng([wanted.seed, index]).permutation(size))
    rows = Rows(
        torch.empty(size, model.width(wanted.site.kind), dtype=DTYPES[wanted.dtype]),
        torch.empty(size, dtype=torch.int32),
        torch.empty(size, dtype=torch.int32),
    )
    within = torch.empty(size, dtype=torch.bool)
    for fed in fed_together(texts, numbers, wanted.batch_tokens, model.device):
        found, own = values(model, adapter, fed, wanted)
        inside = held(own, fed, texts, wanted).cpu()
        for row, number in enumerate(fed.texts):
            span = kept(texts[number], wanted)
            x = found[row, span.start : span.stop]
            _check_finite(x, number, span.start, wanted.site)
            to = places[starts[number] : starts[number] + len(span)]
            rows.activations[to] = x.to(rows.activations)
            rows.text[to], rows.position[to] = number, torch.arange(span.start, span.stop, dtype=torch.int32)
            within[to] = inside[row, span.start : span.stop]
    return rows if bool(within.all()) else Rows(rows.activations[within], rows.text[within], rows.position[within])


def _check_finite(x: Float[Tensor, "pos width"], text: int, start: int, site: Site) -> None:
    if not bool(torch.isfinite(x).all()):
        at = start + int(torch.nonzero(~torch.isfinite(x).all(1))[0])
        raise RunFailed(
            f"an activation at {site} is not finite (text {text}, position {at}); load the model in fp32, or leave the "
            "text out"
        )
