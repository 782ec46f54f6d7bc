"""Logit lens of the residual stream: what the model would say if a layer were its last (nostalgebraist 2020).

At every position of a text and after every block l, softmax(unembed(norm(h_l))) with the model's own final norm and
soft cap; under several conditions on the same tokens. Three tables: the likeliest tokens (`residual_lens`), chosen
tokens by rank and log-probability (`lens_watched`), and how spread out and how far from the final answer each
distribution is (`lens_spread`). After the last block the lens is the model's own output, which is checked on each call.

The vocabulary is read for a few positions at a time, so that nothing of size layers × tokens × vocabulary is ever held.
Top tokens are sought among blocks of the vocabulary whose largest logit is large enough. Left out: learned translators.
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
from steerlab.adapters import Adapter
from steerlab.adapters.steering import check_layers
from steerlab.errors import RunFailed, UsageError
from steerlab.interp.logit_lens import token_texts
from steerlab.interp.states import check_texts, hidden_under, logits_of, states_under
from steerlab.interp.texts import Conditions, Text
from steerlab.models import LanguageModel

CHUNK_POSITIONS = 128
BLOCK = 128  # of the vocabulary
SAME = {torch.float64: 1e-9, torch.float32: 1e-3}  # logits, against the model's own


@dataclass(frozen=True)
class ResidualLens:
    """The three tables; see the module's header."""

    tokens: pd.DataFrame
    watched: pd.DataFrame
    spread: pd.DataFrame


@dataclass(frozen=True)
class _Part:
    """What one layer says at some positions of one text."""

    condition: str
    text: int
    layer: int
    positions: Int[np.ndarray, " pos"]
    top_ids: Int[np.ndarray, "pos k"]
    top_logprobs: Float[np.ndarray, "pos k"]
    ranks: Int[np.ndarray, "pos watched"]
    watched_logprobs: Float[np.ndarray, "pos watched"]
    entropy_nats: Float[np.ndarray, " pos"]
    kl_nats: Float[np.ndarray, " pos"]


@torch.no_grad()
def residual_lens(
    model: LanguageModel,
    texts: Sequence[Text],
    conditions: Conditions,
    *,
    layers: Sequence[int] | None = None,
    k: int = 10,
    watch: Sequence[int] = (),
    generated_only: bool = False,
) -> ResidualLens:
    """The lens at every position of `texts` after each of `layers` (None: all) under each of `conditions`.

    watch: ids of the tokens to follow. generated_only: from the last prompt token on, which predicts the first
    generated one. Position p predicts token p + 1. Raises UsageError for no text, no condition, a layer or a token
    that the model does not have, or k < 1; RunFailed if the last layer's lens is not the model's own output.
    """
    wanted = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    check_layers(wanted, model.n_layers)
    _check(model, texts, conditions, k, watch)
    parts: list[_Part] = []
    for name, adapter in conditions.items():
        for number, text in enumerate(texts):
            states = states_under(model, adapter, text, {*wanted, model.n_layers - 1})
            if number == 0:
                _check_last(model, adapter, text, states[model.n_layers - 1])
            first = text.n_prompt - 1 if generated_only else 0
            parts += _read(model, states, wanted, first, k, watch, name, number)
    return _tables(model, texts, parts, watch)


def _check(model: LanguageModel, texts: Sequence[Text], conditions: Conditions, k: int, watch: Sequence[int]) -> None:
    """Raise UsageError for what cannot be read."""
    check_texts(model, texts)
    if not conditions:
        raise UsageError("nothing to read: give at least one condition, such as {'base': None}")
    check_k(model, k)
    strange = [token for token in watch if not 0 <= token < model.d_vocab]
    if strange:
        raise UsageError(f"tokens {strange} do not exist; the vocabulary has ids 0 to {model.d_vocab - 1}")


def check_k(model: LanguageModel, k: int) -> None:
    """Raise UsageError for a number of tokens that the vocabulary does not have."""
    if not 1 <= k <= model.d_vocab:
        raise UsageError(f"k={k} tokens of a vocabulary of {model.d_vocab}; choose a k between 1 and {model.d_vocab}")


def _check_last(model: LanguageModel, adapter: Adapter | None, text: Text, last: Float[Tensor, "pos d_model"]) -> None:
    """Raise RunFailed unless the last layer's lens is the model's own output."""
    own = logits_of(model, hidden_under(model, adapter, text))
    apart = float((own - readout(model, last)).abs().max())
    if not apart <= SAME.get(model.dtype, 0.1):
        raise RunFailed(
            f"the lens of the last layer is not {model.name}'s own output (logits differ by {apart:.2g}); its final "
            "norm or head is not where it was looked for"
        )


def _read(
    model: LanguageModel,
    states: dict[int, Float[Tensor, "pos d_model"]],
    wanted: Sequence[int],
    first: int,
    k: int,
    watch: Sequence[int],
    condition: str,
    number: int,
) -> Iterator[_Part]:
    """Every wanted layer at positions `first` …, a few at a time."""
    last, chosen = states[model.n_layers - 1], torch.tensor(list(watch), dtype=torch.long, device=model.device)
    for start in range(first, len(last), CHUNK_POSITIONS):
        rows = slice(start, min(start + CHUNK_POSITIONS, len(last)))
        final = readout(model, last[rows])
        p_final = final.softmax(-1)
        entropy_final = final.logsumexp(-1) - torch.linalg.vecdot(p_final, final)
        for layer in wanted:
            z = final if layer == model.n_layers - 1 else readout(model, states[layer][rows])
            total = z.logsumexp(-1)
            kl = total - torch.linalg.vecdot(p_final, z) - entropy_final
            entropy = total - torch.linalg.vecdot(z.softmax(-1), z)
            ids, logits = top(z, k)
            seen = z[:, chosen]
            ranks = torch.stack([(z > one[:, None]).sum(-1) for one in seen.T], 1) if len(chosen) else seen.long()
            yield _Part(
                condition,
                number,
                layer,
                np.arange(rows.start, rows.stop),
                ids.cpu().numpy(),
                (logits - total[:, None]).cpu().numpy(),
                ranks.cpu().numpy(),
                (seen - total[:, None]).cpu().numpy(),
                entropy.cpu().numpy(),
                kl.clamp(min=0).cpu().numpy(),
            )


def readout(model: LanguageModel, states: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
    """Logits of residual states through the final norm, in at least fp32."""
    return logits_of(model, model.final_norm(states))


def top(z: Float[Tensor, "pos d_vocab"], k: int) -> tuple[Int[Tensor, "pos k"], Float[Tensor, "pos k"]]:
    """Ids and values of the k largest of each row, largest first: they lie in the k blocks with the largest maxima."""
    n = z.shape[1] // BLOCK
    if n <= k:
        values, ids = z.topk(k, -1)
        return ids, values
    whole = z[:, : n * BLOCK].unflatten(1, (n, BLOCK))
    blocks = whole.amax(-1).topk(k, -1).indices
    inside = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=z.device)).flatten(1)
    rest = torch.arange(n * BLOCK, z.shape[1], device=z.device).expand(len(z), -1)
    candidates = torch.cat([inside, rest], 1)
    values, places = z.gather(1, candidates).topk(k, -1)
    return candidates.gather(1, places), values


def _tables(model: LanguageModel, texts: Sequence[Text], parts: Sequence[_Part], watch: Sequence[int]) -> ResidualLens:
    """Columns, not rows: a lens has millions of cells."""

    def frame(name: str, per_position: int, **columns: np.ndarray) -> pd.DataFrame:
        sizes = [len(part.positions) * per_position for part in parts]
        generated = [part.positions + 1 - texts[part.text].n_prompt for part in parts]
        common = {
            "condition": pd.Categorical(np.repeat([part.condition for part in parts], sizes)),
            "text": np.repeat([part.text for part in parts], sizes),
            "position": np.concatenate([np.repeat(part.positions, per_position) for part in parts]),
            "generated": np.concatenate([np.repeat(places, per_position) for places in generated]),
            "layer": np.repeat([part.layer for part in parts], sizes),
        }
        return tables.check(pd.DataFrame(common | columns), name)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name).reshape(-1) for part in parts])

    k = parts[0].top_ids.shape[1]
    positions = sum(len(part.positions) for part in parts)
    ids = joined("top_ids")
    at = np.concatenate([np.array(texts[part.text].tokens)[part.positions] for part in parts])
    tokens = frame(
        "residual_lens",
        k,
        context=np.repeat(token_texts(model.tokenizer, at), k),
        rank=np.tile(np.arange(k), positions),
        token_id=ids,
        token=token_texts(model.tokenizer, ids),
        logprob=joined("top_logprobs"),
    )
    followed = np.tile(np.array(watch, dtype=np.int64), positions)
    watched = frame(
        "lens_watched",
        len(watch),
        token_id=followed,
        token=token_texts(model.tokenizer, followed),
        rank=joined("ranks"),
        logprob=joined("watched_logprobs"),
    )
    spread = frame("lens_spread", 1, entropy_nats=joined("entropy_nats"), kl_nats=joined("kl_nats"))
    return ResidualLens(tokens, watched, spread)
