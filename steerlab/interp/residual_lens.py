"""Logit lens of the residual stream: what the model would say if a layer were its last (nostalgebraist 2020).

At every position of a text and after every block l, softmax(unembed(norm(h_l))) with the model's own final norm and
soft cap; under several conditions on the same tokens. Three tables: the likeliest tokens (`residual_lens`), chosen
tokens by rank and log-probability (`lens_watched`), and how spread out and how far from the final answer each
distribution is (`lens_spread`). After the last block the lens is the model's own output, which is checked on each call.
With translators it is the tuned lens (Belrose et al. 2023, 2303.08112): softmax(unembed(norm(h'_l))), h'_l being the
translated state. They were fitted to the unsteered model; what a steered one says is read through the same.

Nothing of size tokens × vocabulary is ever held (`models/distributions.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab import tables
from steerlab.adapters import TunedLens
from steerlab.adapters.steering import check_layers
from steerlab.errors import RunFailed, UsageError
from steerlab.interp.logit_lens import token_texts
from steerlab.interp.states import check_texts, logits_of, passed_under
from steerlab.interp.texts import Conditions, Text
from steerlab.models import LanguageModel
from steerlab.models.distributions import Said, Vocabulary

CHECKED = 16  # positions
SAME = {torch.float64: 1e-9, torch.float32: 1e-3}  # log-probabilities, against the model's own


@dataclass(frozen=True)
class ResidualLens:
    """The three tables; see the module's header."""

    tokens: pd.DataFrame
    watched: pd.DataFrame
    spread: pd.DataFrame


@dataclass(frozen=True)
class _Part:
    """What layers say at some positions of one text."""

    condition: str
    text: int
    positions: Int[np.ndarray, " pos"]
    said: Said  # (layer, pos, …)


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
    translators: TunedLens | None = None,
) -> ResidualLens:
    """The lens at every position of `texts` after each of `layers` (None: all) under each of `conditions`.

    watch: ids of the tokens to follow. generated_only: from the last prompt token on, which predicts the first
    generated one. Position p predicts token p + 1. translators: a tuned lens in place of the plain one; the tables then
    have a column `lens` that says so. Raises UsageError for no text, no condition, a layer or a token that the model
    does not have, k < 1, or translators of another model; RunFailed if the last layer's lens is not the model's own
    output.
    """
    wanted = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    check_layers(wanted, model.n_layers)
    _check(model, texts, conditions, k, watch)
    if translators is not None:
        translators.check(model)
    vocabulary, last = Vocabulary(model), model.n_layers - 1
    chosen = torch.tensor(list(watch), dtype=torch.long, device=model.device)
    parts: list[_Part] = []
    for name, adapter in conditions.items():
        for number, text in enumerate(texts):
            states, hidden = passed_under(model, adapter, text, {*wanted, last})
            start = text.n_prompt - 1 if generated_only else 0
            read = [_through(translators, layer, states[layer][start:]) for layer in sorted(states)]
            said = vocabulary.read([model.final_norm(h) for h in read], k, chosen)
            if number == 0:
                _check_last(model, hidden[start:], said)
            parts.append(_Part(name, number, np.arange(start, len(text.tokens)), said))
    return _tables(model, texts, parts, watch, sorted(wanted), None if translators is None else "tuned")


def _through(
    translators: TunedLens | None, layer: int, h: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "pos d_model"]:
    """A state as the lens reads it."""
    return h if translators is None else translators(layer, h)


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


def _check_last(model: LanguageModel, hidden: Float[Tensor, "pos d_model"], said: Said) -> None:
    """Raise RunFailed unless what was read of the last layer is the model's own output."""
    rows = torch.linspace(0, len(hidden) - 1, min(len(hidden), CHECKED)).long().to(hidden.device)
    own = logits_of(model, hidden[rows]).log_softmax(-1)
    apart = float((own.gather(1, said.top_ids[-1, rows]) - said.top_logprobs[-1, rows]).abs().max())
    if not apart <= SAME.get(model.dtype, 0.1):
        raise RunFailed(
            f"the lens of the last layer is not {model.name}'s own output (log-probabilities differ by {apart:.2g}); "
            "its final norm or head is not where it was looked for"
        )


def readout(model: LanguageModel, states: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
    """Logits of residual states through the final norm, in at least fp32."""
    return logits_of(model, model.final_norm(states))


def _tables(
    model: LanguageModel,
    texts: Sequence[Text],
    parts: Sequence[_Part],
    watch: Sequence[int],
    layers: Sequence[int],
    lens: str | None,
) -> ResidualLens:
    """Columns, not rows: a lens has millions of cells."""
    n_layers, k = len(layers), parts[0].said.top_ids.shape[-1]
    cells = [n_layers * len(part.positions) for part in parts]

    def each(values: Sequence[np.ndarray]) -> np.ndarray:
        """Of every position, at every layer."""
        return np.concatenate([np.tile(of, n_layers) for of in values])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part.said, name)[:n_layers].cpu().numpy().reshape(-1) for part in parts])

    common = {
        "condition": np.repeat(np.arange(len(parts)), cells),
        "text": np.repeat([part.text for part in parts], cells),
        "position": each([part.positions for part in parts]),
        "generated": each([part.positions + 1 - texts[part.text].n_prompt for part in parts]),
        "layer": np.concatenate([np.repeat(layers, len(part.positions)) for part in parts]),
    }
    names = list(dict.fromkeys(part.condition for part in parts))
    numbers = np.array([names.index(part.condition) for part in parts])

    def frame(name: str, per_position: int, **columns: np.ndarray) -> pd.DataFrame:
        repeated: dict[str, Any] = {column: np.repeat(values, per_position) for column, values in common.items()}
        repeated["condition"] = pd.Categorical.from_codes(numbers[repeated["condition"]], names)
        if lens is not None:
            repeated["lens"] = pd.Categorical.from_codes(np.zeros(len(repeated["text"]), dtype=np.int8), [lens])
        return tables.check(pd.DataFrame(repeated | columns), name)

    at = each([np.array(texts[part.text].tokens)[part.positions] for part in parts])
    ids, followed = joined("top_ids"), np.tile(np.array(watch, dtype=np.int64), sum(cells))
    tokens = frame(
        "residual_lens",
        k,
        context=np.repeat(token_texts(model.tokenizer, at), k),
        rank=np.tile(np.arange(k), sum(cells)),
        token_id=ids,
        token=token_texts(model.tokenizer, ids),
        logprob=joined("top_logprobs"),
    )
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
