"""What latents do over whole completions: whether each fires on a generated token, and how strongly on average.

The completions are a `Contrast`: right and wrong answers, each with its problem. A position counts as a stream counts
it (`saes/activations.py`): generated, and no attention sink.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from steerlab.adapters import Adapter
from steerlab.errors import UsageError
from steerlab.interp.contrast import Contrast
from steerlab.models import LanguageModel
from steerlab.saes.activations import by_text
from steerlab.saes.load import Sae
from steerlab.saes.streams import Activations


@dataclass(frozen=True)
class Activity:
    """fired: at one generated token at least. mean: over generated tokens, of each latent. dense: the mean of what the
    SAE reads. correct: the answer. problem: which it answers. length: generated tokens."""

    fired: Bool[np.ndarray, "text latent"]
    mean: Float[np.ndarray, "text latent"]
    dense: Float[np.ndarray, "text width"]
    correct: Bool[np.ndarray, " text"]
    problem: Int[np.ndarray, " text"]
    length: Int[np.ndarray, " text"]

    def __post_init__(self) -> None:
        if self.correct.all() or not self.correct.any():
            raise UsageError("completions are all right, or all wrong; give some of either")

    def select(self, texts: Int[np.ndarray, " some"]) -> Activity:
        """Of some completions. Raises UsageError if they are all right, or all wrong."""
        return Activity(*(getattr(self, name)[texts] for name in self.__dataclass_fields__))

    def with_labels(self, correct: Bool[np.ndarray, " text"]) -> Activity:
        """With other answers to which are right: shuffled ones, as a control."""
        return replace(self, correct=correct)


@torch.no_grad()
def activity(
    model: LanguageModel, sae: Sae, completions: Contrast, adapter: Adapter | None = None, *, batch_tokens: int = 2_048
) -> Activity:
    """Read `completions` under `adapter`, at the site of `sae`. An SAE of differences needs the adapter.

    Raises UsageError for an SAE without a site, one of differences without an adapter, and a text that has no generated
    token.
    """
    if sae.site is None:
        raise UsageError("the SAE does not say at which site of the model it belongs; load it with site=…")
    if sae.kind == "difference" and adapter is None:
        raise UsageError("an SAE of differences reads what an adapter changes; give the steering vectors")
    texts = completions.texts
    if any(len(text.tokens) <= text.n_prompt for text in texts):
        raise UsageError("a completion has no token; leave it out")
    wanted = Activations(sae.site, sae.kind, generated_only=True, batch_tokens=batch_tokens)
    fired = np.zeros((len(texts), sae.d_sae), dtype=bool)
    mean = np.zeros((len(texts), sae.d_sae), dtype=np.float32)
    dense = np.zeros((len(texts), sae.width), dtype=np.float32)
    for number, own, inside in by_text(model, texts, wanted, adapter):
        if len(x := own[inside]):
            latents = sae.encode(x)
            fired[number] = (latents != 0).any(0).cpu().numpy()
            mean[number], dense[number] = latents.mean(0).cpu().numpy(), x.mean(0).cpu().numpy()
    return Activity(
        fired,
        mean,
        dense,
        np.arange(len(texts)) < len(completions.positive),
        np.asarray(completions.groups, dtype=np.int64),
        np.array([len(text.tokens) - text.n_prompt for text in texts], dtype=np.int64),
    )
