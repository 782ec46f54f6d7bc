"""Direct logit attribution of a vector's effect: through which heads and MLPs does it reach the logits, exactly.

With h the last residual state and Δ steered minus base on the same tokens, Δh = s + Σ Δattn_out + Σ Δmlp_out.
Of the readout d = W_U[next token] − W_U[the other token that the base model holds likeliest],

    d · (norm(h_steered) − norm(h_base)) = Σ over components c of  d · N(Δc)  +  d · (what the norm's scale changed)

with N the final norm at the scale of the steered run. It adds up, which is checked on every call. Heads are parts of
attn_out through the output projection; behind a post-norm (Gemma, OLMo 2) they go through that norm in the same way,
and what its scale changed is a component of its own. Logits are those before a soft cap. Direct effects only: what one
component does to a later one is counted where it arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerlab import tables
from steerlab.adapters import Adapter, Layout, SteeringVectors
from steerlab.errors import RunFailed
from steerlab.interp.persistence import sources_of
from steerlab.interp.states import check_texts
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.models.sites import architecture
from steerlab.rollouts.policy import in_use
from steerlab.rollouts.statistics import resampled_means

LOUD = 1e4  # so large that a norm's epsilon is nothing beside it
SUM_TO = 1e-3  # of the largest component
Component = tuple[str, int, int]  # kind, layer, head


class FrozenNorm:
    """A norm (root mean square or layer norm) seen as linear, its scale held at what some states gave it."""

    def __init__(self, norm: nn.Module, width: int, like: Tensor) -> None:
        signs = torch.ones(width, dtype=like.dtype, device=like.device)
        signs[1::2] = -1
        self.norm, self.bias = norm, norm(torch.zeros_like(signs))
        self.gain = (norm(LOUD * signs) - self.bias) * signs
        self.centred = not bool((norm(LOUD * signs.abs()) - self.bias).abs().gt(0.5 * self.gain.abs()).any())

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def per_scale(self, x: Float[Tensor, "pos width"]) -> Float[Tensor, "pos one"]:
        """1 / the scale of each state."""
        through = self.centre(x) * self.gain
        return ((self.norm(x) - self.bias) * through).sum(-1, keepdim=True) / through.square().sum(-1, keepdim=True)

    def pulled(self, readout: Float[Tensor, "pos width"], states: Float[Tensor, "pos width"]) -> Tensor:
        """What the readout behind the norm is in front of it, the scale being that of `states`."""
        return self.centre(readout * self.gain) * self.per_scale(states)

    def by_scale(self, readout: Tensor, base: Tensor, steered: Tensor) -> Float[Tensor, " pos"]:
        """What the change of scale adds to the readout."""
        gap = self.per_scale(steered) - self.per_scale(base)
        return (readout * self.gain * self.centre(base) * gap).sum(-1)


@dataclass(frozen=True)
class _Run:
    """At the positions that predict generated tokens: values by site, and the last residual state."""

    values: dict[Site, Float[Tensor, "new width"]]
    last: Float[Tensor, "new d_model"]


@torch.no_grad()
def attribution(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    *,
    control: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Table `attribution`: of every head, MLP and vector, and of the final norm's scale, what it adds to the logit of a
    text's next token minus the base model's likeliest other; mean over texts, at each generated position and over all
    (`generated` −1), with 95 % intervals over texts. control: also of random directions of equal length.

    Raises UsageError as `persistence` does, and for no text; RunFailed if the parts do not add up.
    """
    sources_of(model, vectors)
    check_texts(model, texts)
    senders = {"trained": vectors}
    if control:
        senders["random"] = vectors.randomise(torch.Generator().manual_seed(seed))
    frames = []
    for sender, chosen in senders.items():
        by_text = [_parts(model, chosen, text) for text in texts]
        frames.append(_table(sender, by_text, seed))
    return tables.check(pd.concat(frames, ignore_index=True), "attribution")


def _parts(model: LanguageModel, vectors: SteeringVectors, text: Text) -> dict[Component, Float[np.ndarray, " new"]]:
    """Of one text, by component; ("total", -1, -1) is what they add up to."""
    base, steered = _run(model, None, text, vectors), _run(model, vectors, text, vectors)
    answer = torch.tensor(text.tokens[text.n_prompt :], device=model.device)[:, None]
    weight = model.unembedding.weight
    rival = model.unembed(model.final_norm(base.last)).scatter(-1, answer, -torch.inf).argmax(-1)
    readout = weight[answer[:, 0]] - weight[rival]
    norm = FrozenNorm(model.final_norm, model.d_model, base.last)
    pulled = norm.pulled(readout, steered.last)
    found: dict[Component, Tensor] = {}
    for site, vector in vectors.vectors.items():
        found["vector", site.layer, -1] = pulled @ vector.detach().to(pulled)
    for layer in range(vectors.first_block, model.n_layers):
        found |= dict(_of_block(model, layer, pulled, base, steered))
    found["norm", model.n_layers, -1] = norm.by_scale(readout, base.last, steered.last)
    total = (readout * (model.final_norm(steered.last) - model.final_norm(base.last))).sum(-1)
    parts = torch.stack(list(found.values()))
    apart, largest = float((parts.sum(0) - total).abs().max()), float(parts.abs().max())
    if apart > SUM_TO * max(largest, 1e-6):
        raise RunFailed(f"parts of the effect do not add up for {model.name} (by {apart:.2g} of {largest:.2g} logits)")
    return {name: value.double().cpu().numpy() for name, value in {**found, ("total", -1, -1): total}.items()}


def _of_block(
    model: LanguageModel, layer: int, pulled: Tensor, base: _Run, steered: _Run
) -> Iterator[tuple[Component, Float[Tensor, " new"]]]:
    """Heads, MLP, and what the post-norms' scales changed."""
    arch, block = architecture(model.family), model.blocks[layer]
    mlp, z = Site("mlp_out", layer), Site("z", layer)
    yield ("mlp", layer, -1), (pulled * (steered.values[mlp] - base.values[mlp])).sum(-1)
    projection = block.get_submodule(arch.z)
    in_front = pulled
    if arch.ln1_post is not None:
        norm = FrozenNorm(block.get_submodule(arch.ln1_post), model.d_model, pulled)
        before, after = projection(base.values[z]), projection(steered.values[z])
        in_front = norm.pulled(pulled, after)
        yield ("norm", layer, -1), norm.by_scale(pulled, before, after)
    stored: Tensor = projection.weight  # type: ignore[assignment]
    weight = stored if isinstance(projection, nn.Linear) else stored.T
    by_head = ((in_front @ weight) * (steered.values[z] - base.values[z])).unflatten(-1, (model.n_heads, -1)).sum(-1)
    for head in range(model.n_heads):
        yield ("head", layer, head), by_head[:, head]


def _run(model: LanguageModel, adapter: Adapter | None, text: Text, vectors: SteeringVectors) -> _Run:
    """One pass over a text."""
    last = Site("resid_post", model.n_layers - 1)
    wanted = [Site(kind, layer) for layer in range(vectors.first_block, model.n_layers) for kind in ("z", "mlp_out")]
    tokens = torch.tensor([text.tokens], device=model.device)
    with in_use(adapter, model) as attached:
        if attached is not None:
            attached.place(None, Layout.of_texts(tokens, text.n_prompt))
        values = model.cache(tokens, [*wanted, last])
    new = {site: value[0, text.n_prompt - 1 : -1] for site, value in values.items()}
    return _Run(new, new.pop(last))


def _table(sender: str, by_text: Sequence[dict[Component, np.ndarray]], seed: int) -> pd.DataFrame:
    """Means over texts, at each position that a text has and over a text's own."""
    longest = max(len(parts["total", -1, -1]) for parts in by_text)
    names = list(by_text[0])
    grid = np.full((len(by_text), len(names), longest + 1), np.nan)
    for number, parts in enumerate(by_text):
        values = np.stack([parts[name] for name in names])
        grid[number, :, 0], grid[number, :, 1 : 1 + values.shape[1]] = values.mean(1), values
    rows = []
    for place in range(longest + 1):
        there = grid[:, :, place][np.isfinite(grid[:, 0, place])]
        draws = resampled_means(there, seed=seed) if len(there) > 1 else np.full((1, len(names)), np.nan)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        total = there[:, names.index(("total", -1, -1))].mean()
        for n, (kind, layer, head) in enumerate(names):
            value = there[:, n].mean()
            rows.append(
                {"sender": sender, "kind": kind, "layer": layer, "head": head, "generated": place - 1}
                | {"value": value, "low": low[n], "high": high[n]}
                | {"share": value / total if total else np.nan, "n_texts": len(there)}
            )
    return pd.DataFrame(rows)
