"""What a vector does to attention: whom heads look at, and how much of the effect is where they look.

Of every head above the vector, the total variation between its pattern with and without the vector, ½ Σ |a − b|, mean
over the positions that predict generated tokens (0: it looks at the same tokens, 1: at none of them), beside a random
direction of equal length. `frozen_attention` asks what that matters for: queries and keys of all blocks above are held
at the base run's, so patterns are the base's while values are the steered run's; what is left of the effect is what
does not need heads to look elsewhere. Patterns are read with eager attention. Left out: patterns while decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import Layout, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.patched import Patch, base, no_patch
from steerlab.interp.patching import Metric, Scale, grids_of, predicting, told
from steerlab.interp.states import check_texts, hidden_under
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.rollouts.policy import in_use
from steerlab.rollouts.statistics import resampled_means


@torch.no_grad()
def attention(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    *,
    control: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Table `attention`: total variation of every head above the lowest vector, mean over texts with its interval.

    Raises UsageError for no text, or vectors above which there is no block."""
    check_texts(model, texts)
    layers = _above(model, vectors)
    frames = []
    for sender, chosen in _senders(vectors, control, seed).items():
        by_text = np.stack([_variation(model, chosen, text, layers) for text in texts])
        flat = by_text.reshape(len(texts), -1)
        draws = resampled_means(flat, seed=seed) if len(texts) > 1 else np.full((1, flat.shape[1]), np.nan)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        frames.append(
            pd.DataFrame(
                {
                    "sender": sender,
                    "layer": np.repeat(list(layers), model.n_heads),
                    "head": np.tile(np.arange(model.n_heads), len(layers)),
                    "value": flat.mean(0),
                    "low": low,
                    "high": high,
                    "n_texts": len(texts),
                }
            )
        )
    return tables.check(pd.concat(frames, ignore_index=True), "attention")


@torch.no_grad()
def frozen_attention(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    *,
    metrics: Sequence[Metric] = ("kl_nats", "logit_diff"),
    control: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Table `patching` of one patch, `frozen_attention`, beside the vectors as they are and the base model. `layer` is
    the lowest vector's. Raises UsageError as `attention` does."""
    check_texts(model, texts)
    layers, patches = _above(model, vectors), [no_patch(), Patch("frozen_attention"), base()]
    sites = [Site(kind, layer) for layer in layers for kind in "qk"]
    frames = []
    for sender, chosen in _senders(vectors, control, seed).items():
        said = []
        for text in texts:
            tokens = torch.tensor([text.tokens], device=model.device)
            held = model.cache(tokens, sites)
            plain = predicting(model, hidden_under(model, None, text), text)
            unpatched = predicting(model, hidden_under(model, chosen, text), text)
            with model.intervene({site: _giving(held[site]) for site in sites}):
                frozen = predicting(model, hidden_under(model, chosen, text), text)
            scale = Scale(text, plain, unpatched)
            said.append([scale.of(logits) for logits in (unpatched, frozen, plain)])
        for metric in metrics:
            grids = {patch.name: grids_of([of[n] for of in said], metric, 1) for n, patch in enumerate(patches)}
            frames.append(told(sender, vectors.layers[0], patches, metric, grids))
    return pd.concat(frames, ignore_index=True)


def _above(model: LanguageModel, vectors: SteeringVectors) -> range:
    """Blocks that the vectors can change. Raises UsageError for none."""
    vectors.check(model)
    if vectors.first_block >= model.n_layers:
        raise UsageError(f"no block reads what the vector of layer {vectors.layers[0]} adds; choose a lower layer")
    return range(vectors.first_block, model.n_layers)


def _senders(vectors: SteeringVectors, control: bool, seed: int) -> dict[str, SteeringVectors]:
    found = {"trained": vectors}
    if control:
        found["random"] = vectors.randomise(torch.Generator().manual_seed(seed))
    return found


def _giving(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _x: value


def _variation(
    model: LanguageModel, vectors: SteeringVectors, text: Text, layers: range
) -> Float[np.ndarray, "layer head"]:
    """Between base and steered patterns of one text, mean over its generated positions."""
    sites = [Site("pattern", layer) for layer in layers]
    tokens = torch.tensor([text.tokens], device=model.device)
    before, rows = model.cache(tokens, sites), slice(text.n_prompt - 1, -1)
    with in_use(vectors, model) as attached:
        assert attached is not None
        attached.place(None, Layout.of_texts(tokens, text.n_prompt))
        after = model.cache(tokens, sites)
    gaps = [(after[site] - before[site])[0, :, rows].double().abs().sum(-1).mean(-1) / 2 for site in sites]
    return torch.stack(gaps).cpu().numpy()
