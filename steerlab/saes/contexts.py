"""Looking at a latent: where it fires most, and which tokens it writes towards.

`latent_contexts`: of each latent the texts in which it fires most, once per text, with the tokens around the peak and
the activation at each; the first token and sinks do not count (`saes/activations.py`). `latent_tokens`: the logit lens
of what the latent writes. Left out: labels by a language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from steerlab import tables
from steerlab.adapters import Adapter
from steerlab.errors import UsageError
from steerlab.interp.logit_lens import token_texts
from steerlab.interp.residual_lens import check_k
from steerlab.interp.states import check_texts
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.saes.activations import by_text
from steerlab.saes.load import Sae
from steerlab.saes.streams import Activations


@torch.no_grad()
def latent_contexts(
    model: LanguageModel,
    sae: Sae,
    texts: Sequence[Text],
    latents: Sequence[int],
    adapter: Adapter | None = None,
    *,
    n: int = 5,
    before: int = 16,
    after: int = 6,
) -> pd.DataFrame:
    """Table `latent_contexts`: a row per token of the `n` strongest contexts of each latent; a latent that never fires
    has none.

    Raises UsageError for no latent, one that the SAE does not have, n < 1, or an SAE without a site.
    """
    chosen = _checked(sae, latents)
    check_texts(model, texts)
    if sae.site is None or n < 1:
        raise UsageError(f"the SAE is at {sae.site}, n is {n}; give an SAE with a site and n of at least 1")
    wanted = Activations(sae.site, sae.kind)
    found: list[Float[np.ndarray, "pos latent"]] = [np.empty((0, len(chosen)))] * len(texts)
    for number, own, inside in by_text(model, texts, wanted, adapter):
        fires = sae.encode(own)[:, chosen] * inside[:, None]
        found[number] = fires.double().cpu().numpy()
    peaks = np.stack([fires.max(0) for fires in found])
    frames = []
    for column, latent in enumerate(chosen):
        strongest = np.argsort(-peaks[:, column], kind="stable")[:n]
        for rank, number in enumerate(of for of in strongest.tolist() if peaks[of, column] > 0):
            at = int(found[number][:, column].argmax())
            span = range(max(0, at - before), min(len(texts[number].tokens), at + after + 1))
            ids = np.array([texts[number].tokens[i] for i in span])
            frames.append(
                pd.DataFrame(
                    {
                        "latent": latent,
                        "rank": rank,
                        "text": number,
                        "position": list(span),
                        "token": token_texts(model.tokenizer, ids),
                        "activation": found[number][span.start : span.stop, column],
                        "peak": [i == at for i in span],
                    }
                )
            )
    columns = ["latent", "rank", "text", "position", "token", "activation", "peak"]
    return tables.check(pd.concat(frames, ignore_index=True) if frames else _empty(columns), "latent_contexts")


def _empty(columns: list[str]) -> pd.DataFrame:
    kinds = {"token": "str", "activation": "float64", "peak": "bool"}
    return pd.DataFrame({name: pd.Series(dtype=kinds.get(name, "int64")) for name in columns})


@torch.no_grad()
def latent_tokens(model: LanguageModel, sae: Sae, latents: Sequence[int], *, k: int = 10) -> pd.DataFrame:
    """Table `latent_tokens`: the tokens that what each latent writes raises and lowers most, by its dot product with
    the unembedding. Raises UsageError as `latent_contexts`, and for an SAE outside the residual stream."""
    chosen = _checked(sae, latents)
    check_k(model, k)
    if sae.site is None or not sae.site.kind.startswith("resid"):
        raise UsageError(f"the unembedding reads the residual stream, and {sae.site} is not in it; give such an SAE")
    weight = model.unembedding.weight
    scores = sae.directions[chosen].to(weight) @ weight.T
    frames = []
    for end, largest in (("top", True), ("bottom", False)):
        best = scores.topk(k, dim=1, largest=largest)
        for latent, ids, of in zip(chosen, best.indices.cpu().numpy(), best.values.float().cpu().numpy(), strict=True):
            columns = {"latent": latent, "end": end, "rank": np.arange(k), "token_id": ids}
            frames.append(
                pd.DataFrame(columns | {"token": token_texts(model.tokenizer, ids), "score": of.astype(float)})
            )
    return tables.check(pd.concat(frames, ignore_index=True), "latent_tokens")


def _checked(sae: Sae, latents: Sequence[int]) -> list[int]:
    wrong = [latent for latent in latents if not 0 <= latent < sae.d_sae]
    if wrong or not len(latents):
        raise UsageError(f"latents {list(latents)[:5]} are not all among 0 to {sae.d_sae - 1}; give some that are")
    return list(dict.fromkeys(int(of) for of in latents))
