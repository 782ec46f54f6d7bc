"""What the page of a sparse autoencoder says: how training went, and how good it is on held-out tokens."""

from __future__ import annotations

import pandas as pd

from steerlab.plots import saes as plots
from steerlab.report.page import Section
from steerlab.runs import Run


def sae_headline(quality: pd.DataFrame) -> str:
    """One sentence of the first SAE: what it explains beside the principal components, and what it leaves dead."""
    row = quality.iloc[0].to_dict()
    recovered = row["loss_recovered"]
    which = f"{row['architecture']}, {row['kind']} {row['site']}"
    spliced = f", and spliced into the model recovers {recovered:.1%} of the loss" if recovered == recovered else ""
    return (
        f"With {row['l0']:.1f} of {row['d_sae']:,} latents per token ({which}) "
        f"it explains {row['explained_variance']:.1%} of the variance of {row['n_tokens']:,} held-out tokens, where "
        f"{row['pca_components']} principal components explain {row['pca_explained_variance']:.1%}{spliced}. "
        f"{row['dead_share']:.1%} of its latents fire on none of these tokens."
    )


def sae_sections(run: Run) -> list[Section]:
    """The sections whose tables the run has."""
    names, found = set(run.tables()), []
    if "sae_quality" in names:
        table = run.table("sae_quality")
        losses = table.iloc[0].to_dict()
        found.append(
            Section(
                "Quality of the sparse autoencoder",
                "Variance explained is 1 − squared error / variance. Loss recovered is (zero − SAE) / (zero − model), "
                "losses being of the tokens behind the positions whose activations are replaced by the reconstruction, "
                "or by zeros (of a difference: by the base model's). Sink positions are left as they are and out of "
                "every figure.",
                figures=(plots.sae_quality(table),),
                note=f"Losses in nats per token: model {losses['loss_model']:.3f}, SAE {losses['loss_sae']:.3f}, "
                f"zero {losses['loss_zero']:.3f} ({losses['n_loss_tokens']:,} tokens).",
            )
        )
    if "sae_training" in names:
        figure = plots.sae_training(run.table("sae_training"))
        found.append(
            Section(
                "Training the sparse autoencoder",
                "Measured on each step's own batch, before its update.",
                figures=(figure,),
            )
        )
    return found
