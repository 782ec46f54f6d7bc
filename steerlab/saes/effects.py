"""What a vector does to the latents of an SAE: what it resembles, what the encoder makes of it, what happens.

Per latent three numbers side by side, of the vector and of random directions of its length: the cosine of the vector
with what the latent writes; the encoder's linear response to the vector; and the change of its activation on texts,
steered − base on the same generated tokens, wherever the vector acts. The first two know nothing of thresholds, of the
other latents or of the blocks between the vector's place and the SAE's; the third does.

`decomposition` asks how few of the SAE's directions make up a vector: orthogonal matching pursuit, the error by the
number of directions, beside random directions of equal length. Left out: encoders that are not linear before their
activation function, SAEs of differences (whose latents already are the change).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import Adapter, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.states import check_answers
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.rollouts.statistics import resampled_means
from steerlab.saes.activations import by_text
from steerlab.saes.load import Sae
from steerlab.saes.streams import Activations


@torch.no_grad()
def latent_effects(
    model: LanguageModel,
    sae: Sae,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    *,
    control: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Table `latent_effects`: a row per sender (trained, random) and latent.

    cosine and response are missing unless the vectors have one at the SAE's own site. Raises UsageError for an SAE of
    differences or without a site, texts without generated tokens, and vectors that act behind the SAE.
    """
    if sae.kind != "residual" or sae.site is None:
        raise UsageError("latent effects are of an SAE of the residual stream with a site; give such an SAE")
    if vectors.first_block > sae.site.layer + (sae.site.kind == "resid_post"):
        raise UsageError(f"the vectors first act behind {sae.site}, where the SAE sees nothing; choose a later site")
    check_answers(model, texts)
    senders = {"trained": vectors}
    if control:
        senders["random"] = vectors.randomise(torch.Generator().manual_seed(seed))
    base = _means(model, sae, None, texts)
    frames = []
    for sender, of in senders.items():
        steered = _means(model, sae, of, texts)
        change = steered[0] - base[0]
        low, high = np.full((2, sae.d_sae), np.nan)
        if len(texts) > 1:
            low, high = np.quantile(resampled_means(change, seed=seed), [0.025, 0.975], axis=0)
        cosine, response = _directly(sae, of)
        frames.append(
            pd.DataFrame(
                {
                    "sender": sender,
                    "latent": np.arange(sae.d_sae),
                    "cosine": cosine,
                    "response": response,
                    "base": base[0].mean(0),
                    "change": change.mean(0),
                    "low": low,
                    "high": high,
                    "base_rate": base[1].mean(0),
                    "rate": steered[1].mean(0),
                    "n_texts": len(texts),
                }
            )
        )
    return tables.check(pd.concat(frames, ignore_index=True), "latent_effects")


@torch.no_grad()
def firing_rates(
    model: LanguageModel, sae: Sae, texts: Sequence[Text], adapter: Adapter | None = None
) -> Float[np.ndarray, " latent"]:
    """On which share of generated tokens each latent fires. Raises UsageError for texts without such tokens."""
    check_answers(model, texts)
    return _means(model, sae, adapter, texts)[1].mean(0)


def _directly(sae: Sae, vectors: SteeringVectors) -> tuple[np.ndarray, np.ndarray]:
    """Cosine with what latents write, and the encoder's linear response."""
    if sae.site not in vectors.vectors:
        missing = np.full(sae.d_sae, np.nan)
        return missing, missing
    vector = vectors.vectors[sae.site].detach().to(sae.directions)
    cosine = torch.nn.functional.cosine_similarity(sae.directions, vector[None], dim=1)
    return cosine.cpu().numpy().astype(float), (vector @ sae.inner.W_enc.detach()).cpu().numpy().astype(float)


def _means(
    model: LanguageModel, sae: Sae, adapter: Adapter | None, texts: Sequence[Text]
) -> tuple[Float[np.ndarray, "text latent"], Float[np.ndarray, "text latent"]]:
    """Of each text the mean activation of each latent over generated tokens, and how often it fires."""
    if sae.site is None:
        raise UsageError("the SAE does not say at which site of the model it belongs; load it with site=…")
    wanted = Activations(sae.site, sae.kind, generated_only=True)
    mean, rate = np.zeros((2, len(texts), sae.d_sae))
    for number, own, inside in by_text(model, texts, wanted, adapter):
        latents = sae.encode(own[inside]).double()
        if len(latents):
            mean[number] = latents.mean(0).cpu().numpy()
            rate[number] = (latents != 0).double().mean(0).cpu().numpy()
    return mean, rate


def decomposition(
    sae: Sae, vector: Float[Tensor, " width"], *, n: int = 32, control: int = 8, seed: int = 0
) -> pd.DataFrame:
    """Table `decomposition`: the vector as a sum of 1 to `n` directions of the SAE, each time the one that the rest
    resembles most (by |cosine|) and all coefficients anew; `error` is |rest|² / |vector|². Senders random-0, … are
    directions of equal length.

    Raises UsageError for a vector of another width or without length, n < 1, or more directions than the SAE has.
    """
    if vector.shape != (sae.width,) or not bool(vector.any()):
        raise UsageError(f"the SAE reads width {sae.width}; give one vector of that width that is not 0")
    if not 1 <= n <= min(sae.d_sae, sae.width):
        raise UsageError(f"n is {n}; the SAE has {min(sae.d_sae, sae.width)} independent directions, give 1 or more")
    atoms = torch.nn.functional.normalize(sae.directions.double(), dim=1).cpu()
    generator = torch.Generator().manual_seed(seed)
    senders = {"trained": vector.detach().double().cpu()}
    for number in range(control):
        drawn = torch.randn(sae.width, generator=generator, dtype=torch.float64)
        senders[f"random-{number}"] = drawn * (senders["trained"].norm() / drawn.norm())
    rows = [row for name, of in senders.items() for row in _pursued(name, of, atoms, n)]
    return tables.check(pd.DataFrame(rows), "decomposition")


def _pursued(
    sender: str, vector: Float[Tensor, " width"], atoms: Float[Tensor, "latent width"], n: int
) -> Iterator[dict[str, object]]:
    """Rows of one vector."""
    chosen: list[int] = []
    rest = vector
    for count in range(1, n + 1):
        resembles = (atoms @ rest).abs()
        resembles[chosen] = -1
        chosen.append(int(resembles.argmax()))
        basis = atoms[chosen].T
        weights = torch.linalg.lstsq(basis, vector[:, None]).solution[:, 0]
        rest = vector - basis @ weights
        error = float(rest.square().sum() / vector.square().sum())
        yield {"sender": sender, "n": count, "latent": chosen[-1], "weight": float(weights[-1]), "error": error}
