"""Streams of activations at a site, of a model or of the difference that an adapter makes, shuffled.

Forward passes end at the site's block. Texts are taken in order until a buffer of tokens is full (a text is never
divided); what they hold comes out in a random order of the buffer's own, drawn from the seed and the buffer's number.
Neither how texts are fed together nor how long shards are changes that order, and a killed stream goes on at the buffer
where it was, to the same bytes. Each position of each text comes out once.

A difference is steered − base on the same tokens, in fp32 from what both passes hold (of a bf16 model it carries the
rounding of bf16: load the model in fp32 to measure it). The steered pass begins where the adapter first acts.

Left out: positions behind the first few that act as sinks too, which no rule finds before they are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
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
    if folder is None:
        parts = list(_shuffled(model, texts, wanted, adapter, 0, origin.n_tokens, hear))
        return Stream(parts, origin)
    writer = Writer(folder, origin, shard_tokens)
    if not writer.complete:
        for rows in _shuffled(model, texts, wanted, adapter, writer.done, origin.n_tokens, hear):
            writer.append(rows)
    return Stream.open(folder)


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
    """The positions of a text that a stream holds."""
    return range(max(wanted.skip, text.n_prompt if wanted.generated_only else 0), len(text.tokens))


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
) -> Float[Tensor, "batch pos width"]:
    """What a stream holds of every position of one batch, padding included; at least fp32 for a difference."""
    if wanted.kind == "residual":
        return site_values(model, adapter, fed, wanted.site)
    assert adapter is not None
    block = adapter.first_block
    seam: list[Tensor] = []  # what both passes have in common
    with hooks.written(model, {block: seam.append} if block else {}):
        base = site_values(model, None, fed, wanted.site)
    steered = site_values(model, adapter, fed, wanted.site, block, seam[0] if seam else None)
    exact = torch.promote_types(base.dtype, torch.float32)
    return steered.to(exact) - base.to(exact)


def site_values(
    model: LanguageModel,
    adapter: Adapter | None,
    fed: Fed,
    site: Site,
    block: int = 0,
    written: Float[Tensor, "batch pos d_model"] | None = None,
) -> Float[Tensor, "batch pos width"]:
    """A site's values in a pass that ends there; block, written: where it begins (`models/forward.py`)."""
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


def _shuffled(
    model: LanguageModel,
    texts: Sequence[Text],
    wanted: Activations,
    adapter: Adapter | None,
    done: int,
    n_tokens: int,
    hear: Hear | None,
) -> Iterator[Rows]:
    """Rows of every buffer from row `done` on."""
    before = 0
    counts = [len(kept(text, wanted)) for text in texts]
    for index, (first, last) in enumerate(buffers(counts, wanted.buffer)):
        size = sum(counts[first:last])
        if size and before + size > done:
            rows = _buffer(model, texts, wanted, adapter, index, range(first, last), size)
            yield rows.select(max(0, done - before), size)
            if hear is not None:
                hear(before + size, n_tokens)
        before += size


def _buffer(
    model: LanguageModel,
    texts: Sequence[Text],
    wanted: Activations,
    adapter: Adapter | None,
    index: int,
    numbers: range,
    size: int,
) -> Rows:
    """All rows of one buffer, each computed row put where it comes out."""
    places = torch.from_numpy(np.random.default_rng([wanted.seed, index]).permutation(size))
    starts = dict(zip(numbers, np.cumsum([0, *(len(kept(texts[i], wanted)) for i in numbers)]).tolist(), strict=False))
    rows = Rows(
        torch.empty(size, model.width(wanted.site.kind), dtype=DTYPES[wanted.dtype]),
        torch.empty(size, dtype=torch.int32),
        torch.empty(size, dtype=torch.int32),
    )
    for fed in fed_together(texts, numbers, wanted.batch_tokens, model.device):
        found = values(model, adapter, fed, wanted)
        for of_text, number in zip(found, fed.texts, strict=True):
            span = kept(texts[number], wanted)
            if not span:
                continue
            x = of_text[span.start : span.stop]
            _check_finite(x, number, span.start, wanted.site)
            to = places[starts[number] : starts[number] + len(span)]
            rows.activations[to] = x.to(rows.activations)
            rows.text[to], rows.position[to] = number, torch.arange(span.start, span.stop, dtype=torch.int32)
    return rows


def _check_finite(x: Float[Tensor, "pos width"], text: int, start: int, site: Site) -> None:
    if not bool(torch.isfinite(x).all()):
        at = start + int(torch.nonzero(~torch.isfinite(x).all(1))[0])
        raise RunFailed(
            f"an activation at {site} is not finite (text {text}, position {at}); load the model in fp32, or leave the "
            "text out"
        )
