"""How well a tuned lens fits: KL of what each layer says from what the model says, on held-out texts, beside the plain
logit lens (Belrose et al. 2023, arXiv 2303.08112, figure 3).

Both lenses read the same positions of the same texts. Intervals are bootstraps over texts. Left out: the last layer,
where both are the model's own output.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from steerlab import tables
from steerlab.adapters import Translators, TunedLens
from steerlab.batches import TokenBatch
from steerlab.models import LanguageModel
from steerlab.rollouts import Policy
from steerlab.rollouts.statistics import resampled_means

LENSES = ("plain", "tuned")
LEVEL = 0.95


@torch.no_grad()
def distances(model: LanguageModel, lens: TunedLens, texts: TokenBatch) -> Float[np.ndarray, "lens text layer"]:
    """Mean KL (nats) over the positions of each text that count, of the plain and of the tuned lens."""
    readers = [Policy(model, which) for which in (Translators(lens.layers).init(model), lens)]
    rows = [
        [reader.lens_divergences(row).mean(1).double().cpu().numpy() for row in texts.micro_batches(1)]
        for reader in readers
    ]
    return np.array(rows).reshape(len(LENSES), len(texts), len(lens.layers))


def lens_fit(found: Float[np.ndarray, "lens text layer"], layers: tuple[int, ...], *, seed: int = 0) -> pd.DataFrame:
    """The `lens_fit` table of what `distances` found (texts of several processes one after the other). `gain_nats` is
    plain − tuned, paired over texts; one text has no interval."""
    plain, tuned = found
    n_texts, tail, parts = len(plain), (1 - LEVEL) / 2, []
    for name, kl in zip(LENSES, (plain, tuned), strict=True):
        low, high = np.quantile(resampled_means(kl, seed=seed), [tail, 1 - tail], axis=0)
        gain_low, gain_high = np.quantile(resampled_means(plain - kl, seed=seed), [tail, 1 - tail], axis=0)
        known = n_texts > 1
        parts.append(
            pd.DataFrame(
                {
                    "lens": name,
                    "layer": layers,
                    "kl_nats": kl.mean(0),
                    "low": low if known else np.nan,
                    "high": high if known else np.nan,
                    "gain_nats": (plain - kl).mean(0),
                    "gain_low": gain_low if known else np.nan,
                    "gain_high": gain_high if known else np.nan,
                    "n_texts": n_texts,
                }
            )
        )
    return tables.check(pd.concat(parts, ignore_index=True), "lens_fit")
