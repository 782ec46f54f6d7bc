"""Does a vector push down tokens of other languages? The whole vocabulary by class, with controls (2509.06608 §5).

The paper's evidence that vectors below the last two layers suppress non-English tokens is a few bottom tokens of the
output effect m_i = mean_t Δ_t^{i→L−1}. Here, of every layer's vector added alone, the mean over the tokens of each
class (`vocabulary`) of two readouts: `cosine` of m_i with the token's row of the unembedding, and `logprob`, the change
of the token's log-probability under the model's own final norm and head, mean over all positions of the same texts.
The quotable number is the gap: mean over tokens of other languages and scripts minus mean over English ones (a constant
shift of all log-probabilities cancels in it).

Intervals are bootstraps over the tokens of a class and, for `logprob`, over texts. They say how well the mean is
known, not whether a direction is special: any fixed direction has a gap of some sign. So random directions of equal
length go the same way, several of them, and the gap counts against their spread and against the last layer's vector.

Every token weighs the same, however improbable it is. Left out: shares of probability mass, vectors acting together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.persistence import sources_of
from steerlab.interp.residual_lens import readout
from steerlab.interp.states import check_texts, states_under
from steerlab.interp.texts import Text
from steerlab.interp.vocabulary import CLASSES, NON_ENGLISH, vocabulary_classes
from steerlab.models import LanguageModel
from steerlab.rollouts.statistics import resampled_means

READOUTS = ("cosine", "logprob")
CHUNK_POSITIONS = 128
_TAILS = (0.025, 0.975)
_OTHER = "non_english"
Span = tuple[int, ...]  # source layers that a row averages over


@dataclass(frozen=True)
class Languages:
    """classes: table `vocabulary_classes`. table: `languages`. gaps: `language_gaps`, empty without English tokens or
    without others."""

    classes: pd.DataFrame
    table: pd.DataFrame
    gaps: pd.DataFrame


@dataclass(frozen=True)
class _Read:
    """What the vectors did, a cell per draw (0: the trained vectors) and source layer.

    effects: m_i. changes: of each token's log-probability, mean over texts. by_text: the same, mean over each class.
    """

    effects: Float[Tensor, "draw source d_model"]
    changes: Float[np.ndarray, "draw source d_vocab"]
    by_text: Float[np.ndarray, "text draw source group"]


@dataclass(frozen=True)
class _Means:
    """Of one class; readout by draw by source. tokens: resampled over tokens, None for a single one. texts: of the
    log-probabilities, resampled over texts, None for a single one."""

    n: int
    mean: Float[np.ndarray, "readout draw source"]
    tokens: Float[np.ndarray, "resample readout draw source"] | None
    texts: Float[np.ndarray, "resample draw source"] | None


@torch.no_grad()
def languages(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    *,
    classes: pd.DataFrame | None = None,
    draws: int = 4,
    seed: int = 0,
) -> Languages:
    """What each layer's vector alone does to the classes of tokens, on `texts`, beside `draws` random directions.

    classes: a table `vocabulary_classes` of the model's vocabulary; None: made here. Classes without tokens are absent.
    Rows that average over several source layers: thirds of those below the last layer; of gaps, all of those.
    Raises UsageError for draws < 1, vectors at other sites than `resid_post`, only zero vectors, no text, or classes of
    another vocabulary.
    """
    check_texts(model, texts)
    sources = sources_of(model, vectors)
    if draws < 1:
        raise UsageError(f"draws is {draws}; a gap says nothing without at least 1 random direction beside it")
    found = vocabulary_classes(model.tokenizer, model.d_vocab) if classes is None else classes
    groups = _groups(found, model.d_vocab)
    generator, chosen = torch.Generator().manual_seed(seed), vectors.select(sources)
    tried = [chosen, *(chosen.randomise(generator) for _ in range(draws))]
    read = _read(model, tried, sources, texts, groups)
    means = {
        name: _means(model, read, index, ids, seed) for index, (name, ids) in enumerate(groups.items()) if len(ids)
    }
    singles: list[Span] = [(source,) for source in sources]
    spans = [*singles, *_thirds(sources, model.n_layers)]
    order = [name for name in CLASSES if name in means]
    table = pd.DataFrame(
        [row for name in order for span in spans for row in _class_rows(name, means[name], sources, span, len(texts))]
    )
    gaps = tables.empty("language_gaps")
    if {"english", _OTHER} <= means.keys():
        whole = tuple(source for source in sources if source < model.n_layers - 1)
        if len(whole) > 1 and whole not in spans:
            spans.append(whole)
        gaps = pd.DataFrame(
            [row for span in spans for row in _gap_rows(means["english"], means[_OTHER], sources, span, len(texts))]
        )
    return Languages(found, tables.check(table, "languages"), tables.check(gaps, "language_gaps"))


def _groups(classes: pd.DataFrame, d_vocab: int) -> dict[str, Int[np.ndarray, " token"]]:
    """Ids of the tokens of every class, and of all other languages together."""
    tables.check(classes, "vocabulary_classes")
    if classes["token_id"].tolist() != list(range(d_vocab)):
        raise UsageError(f"the classes are not of a vocabulary of {d_vocab} tokens; make them with vocabulary_classes")
    of = classes["token_class"].to_numpy()
    if strange := sorted(set(of) - set(CLASSES)):
        raise UsageError(f"unknown classes of tokens: {', '.join(strange)}; use {', '.join(CLASSES)}")
    return {name: np.flatnonzero(of == name) for name in CLASSES} | {_OTHER: np.flatnonzero(np.isin(of, NON_ENGLISH))}


def _read(
    model: LanguageModel,
    tried: Sequence[SteeringVectors],
    sources: Sequence[int],
    texts: Sequence[Text],
    groups: dict[str, Int[np.ndarray, " token"]],
) -> _Read:
    """Every vector alone over every text; the vocabulary is held once per vector, positions only in chunks."""
    last = model.n_layers - 1
    shape = (len(tried), len(sources))
    effects = torch.zeros(*shape, model.d_model, dtype=torch.float64)
    changes = np.zeros((*shape, model.d_vocab), dtype=np.float32)
    by_text = np.zeros((len(texts), *shape, len(groups)))
    for number, text in enumerate(texts):
        base = states_under(model, None, text, range(min(sources), model.n_layers))
        spoken = _logprobs(model, base[last])
        for draw, chosen in enumerate(tried):
            for place, source in enumerate(sources):
                single, written = chosen.select([source]), base[source]
                state = states_under(model, single, text, [last], block=source + 1, written=written)[last]
                effects[draw, place] += (state.double() - base[last].double()).sum(0).cpu()
                change = _logprobs(model, state) - spoken
                changes[draw, place] += change.astype(np.float32) / len(texts)
                by_text[number, draw, place] = [change[ids].mean() if len(ids) else 0.0 for ids in groups.values()]
    return _Read(effects / sum(len(text.tokens) for text in texts), changes, by_text)


def _logprobs(model: LanguageModel, states: Float[Tensor, "pos d_model"]) -> Float[np.ndarray, " d_vocab"]:
    """Log-probability of every token as the next one, mean over positions."""
    total = torch.zeros(model.d_vocab, dtype=torch.float64, device=states.device)
    for part in states.split(CHUNK_POSITIONS):
        logits = readout(model, part)
        total += logits.sum(0) - logits.logsumexp(-1).sum()
    return (total / len(states)).cpu().numpy()


def _means(model: LanguageModel, read: _Read, index: int, ids: Int[np.ndarray, " token"], seed: int) -> _Means:
    """Of the tokens `ids`, whose means by text stand at `index`."""
    rows = model.unembedding.weight[torch.from_numpy(ids).to(model.device)].double()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)  # an unused row has cosine 0
    effects = read.effects / read.effects.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    cosines = torch.einsum("vd,csd->vcs", unit.cpu(), effects).numpy().astype(np.float32)
    scores = np.stack([cosines, np.moveaxis(read.changes[..., ids], -1, 0)], axis=1)
    shape = scores.shape[1:]
    tokens = resampled_means(scores.reshape(len(ids), -1), seed=seed) if len(ids) > 1 else None
    by_text = read.by_text[..., index]
    texts = resampled_means(by_text.reshape(len(by_text), -1), seed=seed) if len(by_text) > 1 else None
    return _Means(
        len(ids),
        scores.mean(0, dtype=np.float64),
        None if tokens is None else tokens.reshape(-1, *shape),
        None if texts is None else texts.reshape(-1, *shape[1:]),
    )


def _thirds(sources: Sequence[int], n_layers: int) -> list[Span]:
    """Sources below the last layer in up to three parts of several layers each, low to high."""
    below = [source for source in sources if source < n_layers - 1]
    return [tuple(part.tolist()) for part in np.array_split(np.array(below, dtype=np.int64), 3) if len(part) > 1]


def _class_rows(
    name: str, means: _Means, sources: Sequence[int], span: Span, n_texts: int
) -> Iterator[dict[str, object]]:
    at = [sources.index(source) for source in span]
    for r, kind in enumerate(READOUTS):
        for draw in range(means.mean.shape[1]):
            tokens = None if means.tokens is None else means.tokens[:, r, draw, at].mean(-1)
            texts = None if means.texts is None or kind == "cosine" else means.texts[:, draw, at].mean(-1)
            yield {
                "condition": "random" if draw else "trained", "draw": max(draw - 1, 0),
                "from_layer": span[0], "to_layer": span[-1], "readout": kind, "token_class": name,
                "value": float(means.mean[r, draw, at].mean()), **_intervals(tokens, texts),
                "n_tokens": means.n, "n_texts": n_texts,
            }  # fmt: skip


def _gap_rows(
    english: _Means, other: _Means, sources: Sequence[int], span: Span, n_texts: int
) -> Iterator[dict[str, object]]:
    """Trained, random (mean over draws) and their difference, each readout."""
    at = [sources.index(source) for source in span]
    for r, kind in enumerate(READOUTS):
        gap = (other.mean - english.mean)[r][:, at].mean(-1)
        tokens = texts = None
        if other.tokens is not None and english.tokens is not None:
            tokens = (other.tokens - english.tokens)[:, r][:, :, at].mean(-1)
        if kind == "logprob" and other.texts is not None and english.texts is not None:
            texts = (other.texts - english.texts)[:, :, at].mean(-1)
        trained, mean = np.eye(len(gap))[0], np.array([0.0, *([1 / (len(gap) - 1)] * (len(gap) - 1))])
        for condition, weights, spread in (
            ("trained", trained, None),
            ("random", mean, gap[1:]),
            ("trained − random", trained - mean, gap[0] - gap[1:]),
        ):
            ends = (float("nan"),) * 2 if spread is None else (float(spread.min()), float(spread.max()))
            yield {
                "condition": condition, "from_layer": span[0], "to_layer": span[-1], "readout": kind,
                "value": float(gap @ weights),
                **_intervals(*(None if v is None else v @ weights for v in (tokens, texts))),
                "low_draws": ends[0], "high_draws": ends[1],
                "n_english": english.n, "n_other": other.n, "n_texts": n_texts, "n_draws": len(gap) - 1,
            }  # fmt: skip


def _intervals(
    tokens: Float[np.ndarray, " resample"] | None, texts: Float[np.ndarray, " resample"] | None
) -> dict[str, float]:
    """Missing where there is one unit only, which says nothing of its spread."""
    none = (float("nan"), float("nan"))
    low, high = none if tokens is None else np.quantile(tokens, _TAILS)
    low_texts, high_texts = none if texts is None else np.quantile(texts, _TAILS)
    return {"low": float(low), "high": float(high), "low_texts": float(low_texts), "high_texts": float(high_texts)}
