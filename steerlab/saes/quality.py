"""How good an SAE is, on tokens that it was not trained on: what it explains, how many latents fire, which never do,
and how well the model goes on with the reconstruction in place of its own activations.

Beside it stand the first 32 principal components of the training tokens: dense, linear, as many numbers per token as a
k of 32. The held-out stream holds no sink positions, and the splice leaves them, and padding, as they are. An SAE of
differences is spliced as base + reconstructed difference into the steered model, and zeroed as the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import Adapter
from steerlab.errors import UsageError
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.models.head import token_logprobs
from steerlab.models.hooks import Edit
from steerlab.rollouts.policy import in_use
from steerlab.saes.activations import Fed, fed_together, held, site_values
from steerlab.saes.load import Sae
from steerlab.saes.streams import Activations, Stream

ROWS = 1_024  # encoded at a time
FITTED = 131_072  # training tokens that the components are fitted to
COMPONENTS = 32


@dataclass(frozen=True)
class Losses:
    """Mean loss (nats per token) of the model, with the reconstruction, and with zeros in its place."""

    model: float
    sae: float
    zero: float
    n_tokens: int

    @property
    def recovered(self) -> float:
        """(zero − SAE) / (zero − model)."""
        gap = self.zero - self.model
        return (self.zero - self.sae) / gap if gap else float("nan")


def sae_quality(
    sae: Sae,
    held_out: Stream,
    trained_on: Stream,
    losses: Losses | None = None,
    *,
    components: int = COMPONENTS,
) -> pd.DataFrame:
    """The `sae_quality` table of one SAE. losses: see `spliced_losses`. Raises UsageError for streams of another
    width."""
    for stream in (held_out, trained_on):
        if stream.width != sae.width:
            raise UsageError(
                f"the SAE reads width {sae.width}, the stream has {stream.width}; give streams of its site"
            )
    components = min(components, sae.width)
    mean, basis = principal(trained_on, components)
    center = _moments(held_out, len(held_out))[0]
    error = by_components = variance = fired_in_all = 0.0
    silent = torch.ones(sae.d_sae, dtype=torch.bool)
    for start in range(0, len(held_out), ROWS):
        x = held_out.rows(start, min(start + ROWS, len(held_out))).activations.float()
        latents = sae.encode(x)
        fires = latents != 0
        silent &= ~fires.any(0).cpu()
        fired_in_all += float(fires.sum())
        error += _squared(x - sae.decode(latents).cpu())
        shifted = x - mean
        by_components += _squared(shifted - shifted @ basis @ basis.T)
        variance += _squared(x - center)
    row = {
        "architecture": sae.architecture,
        "site": "" if sae.site is None else str(sae.site),
        "kind": sae.kind,
        "d_sae": sae.d_sae,
        "n_tokens": len(held_out),
        "explained_variance": 1 - error / variance,
        "pca_components": components,
        "pca_explained_variance": 1 - by_components / variance,
        "l0": fired_in_all / len(held_out),
        "dead_share": float(silent.float().mean()),
        "loss_model": losses.model if losses else float("nan"),
        "loss_sae": losses.sae if losses else float("nan"),
        "loss_zero": losses.zero if losses else float("nan"),
        "loss_recovered": losses.recovered if losses else float("nan"),
        "n_loss_tokens": losses.n_tokens if losses else 0,
    }
    return tables.check(pd.DataFrame([row]), "sae_quality")


def principal(stream: Stream, n: int) -> tuple[Float[Tensor, " width"], Float[Tensor, "width n"]]:
    """Mean and first principal components of the first activations of a stream."""
    rows = min(FITTED, len(stream))
    mean, second = _moments(stream, rows)
    _, vectors = torch.linalg.eigh(second - torch.outer(mean.double(), mean.double()))
    return mean, vectors[:, -n:].float()


def _moments(stream: Stream, rows: int) -> tuple[Float[Tensor, " width"], Float[Tensor, "width width"]]:
    """Mean of x (fp32) and of x xᵀ (fp64)."""
    first = torch.zeros(stream.width, dtype=torch.float64)
    second = torch.zeros(stream.width, stream.width, dtype=torch.float64)
    for start in range(0, rows, ROWS):
        x = stream.rows(start, min(start + ROWS, rows)).activations.double()
        first += x.sum(0)
        second += x.T @ x
    return (first / rows).float(), second / rows


def _squared(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


@torch.no_grad()
def spliced_losses(
    model: LanguageModel,
    sae: Sae,
    texts: Sequence[Text],
    wanted: Activations,
    adapter: Adapter | None = None,
) -> Losses:
    """Losses on `texts` of the tokens behind the positions that the stream `wanted` holds, which alone are changed.

    adapter: what the stream was recorded under. Raises UsageError for an SAE of another site or kind, or for texts
    without a token to predict.
    """
    if (sae.site, sae.kind) != (wanted.site, wanted.kind):
        raise UsageError(
            f"the SAE is of {sae.kind} {sae.site}, the stream of {wanted.kind} {wanted.site}; give those of one place"
        )
    if sae.kind == "difference" and adapter is None:
        raise UsageError("a difference needs the adapter (steering vectors) that it was recorded under")
    totals: dict[str, float] = {"model": 0.0, "sae": 0.0, "zero": 0.0}
    n_tokens = 0
    for fed in fed_together(texts, range(len(texts)), wanted.batch_tokens, model.device):
        own = site_values(model, None if sae.kind == "difference" else adapter, fed, wanted.site)
        inside = held(own, fed, texts, wanted)
        predicting = inside.clone()
        for row, number in enumerate(fed.texts):
            predicting[row, len(texts[number].tokens) - 1] = False
        n_tokens += int(predicting.sum())
        for name, edit in _edits(sae, inside, own if sae.kind == "difference" else None).items():
            with in_use(adapter, model) as attached:
                if attached is not None:
                    attached.place(None, fed.layout)
                with model.intervene({wanted.site: edit} if edit else {}):
                    totals[name] += _loss(model, fed, predicting)
    if not n_tokens:
        raise UsageError("no text has a token to predict behind a position that is kept; give longer texts")
    return Losses(**{name: total / n_tokens for name, total in totals.items()}, n_tokens=n_tokens)


def _edits(
    sae: Sae, inside: Bool[Tensor, "batch pos"], base: Float[Tensor, "batch pos width"] | None
) -> dict[str, Edit | None]:
    """What each condition does to the site's value."""

    def put(x: Tensor, new: Tensor) -> Tensor:
        changed = x.clone()
        changed[inside] = new.to(x)
        return changed

    def reconstructed(x: Tensor) -> Tensor:
        own = x[inside].float() if base is None else x[inside].float() - base[inside].float()
        new = sae.decode(sae.encode(own)).to(x.device)
        return put(x, new if base is None else base[inside].float() + new)

    def zeroed(x: Tensor) -> Tensor:
        return put(x, torch.zeros_like(x[inside]) if base is None else base[inside])

    return {"model": None, "sae": reconstructed, "zero": zeroed}


def _loss(model: LanguageModel, fed: Fed, predicting: Bool[Tensor, "batch pos"]) -> float:
    """Summed over the tokens that follow the predicting positions."""
    hidden, head = model.hidden(fed.tokens)[predicting], model.unembedding
    targets = fed.tokens[:, 1:][predicting[:, :-1]]
    said = token_logprobs(hidden, targets, head.weight, head.bias, softcap=model.logit_softcap)
    return -float(said.double().sum())
