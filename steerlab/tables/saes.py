"""Schemas of what training a sparse autoencoder leaves behind, and of how good it is."""

from __future__ import annotations

from steerlab.tables.column import Column

_WHICH = (
    Column("architecture", "str", "1", "topk, batchtopk, jumprelu, gated, matryoshka; of a stranger: sae-lens' word"),
    Column("site", "str", "1", "where in the model; empty for activations that no model computed"),
    Column("kind", "str", "1", "residual (the values) or difference (steered − base on the same tokens)"),
    Column("d_sae", "int", "latents", "how many latents there are"),
)

SAES: dict[str, tuple[Column, ...]] = {
    "sae_training": (
        Column("step", "int", "updates", "0-based training step"),
        Column("tokens", "int", "tokens", "trained on so far, this step included"),
        Column("loss", "float", "1", "all of what is minimised, on the step's batch, activations scaled to √width"),
        Column("explained_variance", "float", "share", "1 − squared error / variance of the step's batch"),
        Column("l0", "float", "latents", "that fire per token, mean of the step's batch"),
        Column("dead_share", "float", "share", "latents that have not fired for as long as makes them dead"),
        Column("lr", "float", "1", "learning rate of the next update"),
        Column("tokens_per_s", "float", "tokens/s", "of the step alone"),
    ),
    "sae_quality": (
        *_WHICH,
        Column("n_tokens", "int", "tokens", "held-out tokens that everything but the losses is measured on"),
        Column("explained_variance", "float", "share", "1 − squared error / variance of the held-out tokens"),
        Column("pca_components", "int", "1", "of the principal components beside it; fewer for narrow activations"),
        Column("pca_explained_variance", "float", "share", "theirs on the same tokens, fitted to training tokens"),
        Column("l0", "float", "latents", "that fire per token, mean"),
        Column("dead_share", "float", "share", "latents that no held-out token fires"),
        Column("loss_model", "float", "nats", "per token, of the model as it is (of a difference: steered)"),
        Column("loss_sae", "float", "nats", "with the reconstruction in its place; sinks are left as they are"),
        Column("loss_zero", "float", "nats", "with zeros in its place (of a difference: the base model)"),
        Column("loss_recovered", "float", "share", "(zero − SAE) / (zero − model); missing without a model"),
        Column("n_loss_tokens", "int", "tokens", "held-out tokens whose prediction the losses are of"),
    ),
}
