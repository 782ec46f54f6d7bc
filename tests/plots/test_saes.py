"""Figures of SAEs show their tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from steerlab.errors import UsageError
from steerlab.plots.saes import sae_quality, sae_training


def test_the_learning_curve_has_every_quantity_by_tokens() -> None:
    rows = [
        {"step": step, "tokens": 64 * (step + 1), "loss": 9.0 - step, "explained_variance": 0.1 * step}
        | {"l0": 32.0, "dead_share": 0.25, "lr": 1e-3, "tokens_per_s": 900.0}
        for step in (2, 0, 1)
    ]
    made = sae_training(pd.DataFrame(rows))
    assert [list(trace.x) for trace in made.data] == [[64, 128, 192]] * 4
    assert list(made.data[0].y) == [9.0, 8.0, 7.0] and list(made.data[3].y) == [0.25] * 3
    assert made.layout.xaxis4.title.text == "tokens" and made.layout.yaxis2.tickformat == ".0%"
    with pytest.raises(UsageError, match="'l0' is missing"):
        sae_training(pd.DataFrame(rows).drop(columns="l0"))


def test_quality_stands_beside_the_components() -> None:
    row = {
        "architecture": "<b>mine</b>", "site": "resid_post.3", "kind": "residual", "d_sae": 9_216, "n_tokens": 500,
        "explained_variance": 0.8, "pca_components": 32, "pca_explained_variance": 0.6, "l0": 31.9, "dead_share": 0.1,
        "loss_model": 3.0, "loss_sae": 3.1, "loss_zero": 9.0, "loss_recovered": np.nan, "n_loss_tokens": 0,
    }  # fmt: skip
    made = sae_quality(pd.DataFrame([row, row | {"architecture": "topk", "loss_recovered": 0.98}]))
    assert len(made.data) == 4 and "<b>" not in made.data[0].x[0] and "9,216 latents, L0 31.9" in made.data[0].x[0]
    assert list(made.data[0].y) == [0.8, 0.8] and list(made.data[1].y) == [0.6, 0.6] and made.data[2].y[1] == 0.98
