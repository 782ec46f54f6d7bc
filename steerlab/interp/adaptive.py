"""Token-wise scaling: a steering vector whose strength each token sets for itself (arXiv 2509.06608 §10).

A LoRA of rank 1 on a block's down-projection adds (aᵀz_t)·b: the direction is b, the token's scale λ_t = aᵀz_t·‖b‖. It
is divided by the mean length of what the projection itself writes, and its sign (a and b can both be turned round) is
the one that makes its mean over all tokens positive. `adaptive` has λ and cos(W_down z_t, b) of every token; `shares`
asks which parts of prompt and answer have more of Σ|λ| than of the tokens. Its null moves λ round in circles within
each text, which keeps how it varies along a text and breaks only what it stands on.

The first token of a text is left out of the shares: most models write huge activations there. Left out: higher ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped

from steerlab import tables
from steerlab.adapters import Layout, LoRAWeights
from steerlab.adapters.lora import layer_of
from steerlab.errors import UsageError
from steerlab.interp.logit_lens import token_texts
from steerlab.interp.states import check_texts
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site
from steerlab.models.hooks import cache
from steerlab.models.sites import architecture
from steerlab.rollouts.statistics import bootstrap_interval

ANSWER = "answer"


@torch.no_grad()
def adaptive(
    model: LanguageModel, weights: LoRAWeights, texts: Sequence[Text], segments: Sequence[Sequence[str]]
) -> pd.DataFrame:
    """Table `adaptive`: λ of every token of `texts` at every layer that has an adapter, which is in force.

    segments: of each text, what each token of its prompt belongs to (`tasks.prompts.segments`); the rest is the answer.
    Raises UsageError for another adapter than rank 1 on down-projections, one that is still zero, or segments that do
    not fit the texts.
    """
    check_texts(model, texts)
    paths = _projections(model, weights)
    for text, of_prompt in zip(texts, segments, strict=True):
        if len(of_prompt) != text.n_prompt:
            raise UsageError(f"{len(of_prompt)} segments for a prompt of {text.n_prompt} tokens; name one per token")
    parts: list[pd.DataFrame] = []
    for number, (text, of_prompt) in enumerate(zip(texts, segments, strict=True)):
        tokens = torch.tensor([text.tokens], device=model.device)
        sites = {layer: Site("mlp_neurons", layer) for layer in paths}
        with weights.attach(model, layout=Layout.of_texts(tokens, text.n_prompt)):
            inputs = cache(model, tokens, sites.values())
        common = {
            "text": number,
            "position": np.arange(len(text.tokens)),
            "token": token_texts(model.tokenizer, np.array(text.tokens)),
            "segment": [*of_prompt, *[ANSWER] * (len(text.tokens) - text.n_prompt)],
        }
        for layer, path in paths.items():
            scale, length, cosine = _said(model, weights, path, inputs[sites[layer]][0])
            parts.append(pd.DataFrame(common | {"layer": layer, "scale": scale, "cosine": cosine, "length": length}))
    table = pd.concat(parts, ignore_index=True)
    mean = table.pivot_table(index="layer", values=["length", "scale"]).loc[table["layer"]]
    sign = np.where(mean["scale"].to_numpy() < 0, -1.0, 1.0)
    table = table.assign(scale=table["scale"] / mean["length"].to_numpy() * sign, cosine=table["cosine"] * sign)
    return tables.check(table.drop(columns="length"), "adaptive")


def shares(table: pd.DataFrame, *, shuffles: int = 2_000, seed: int = 0) -> pd.DataFrame:
    """Table `adaptive_shares`: of each layer and segment, its share of the tokens and of Σ|λ| (mean over texts, with
    interval), and the share of circular shifts that put it as far from the tokens' share, or further."""
    tables.check(table, "adaptive")
    generator = np.random.default_rng(seed)
    names = list(dict.fromkeys(table["segment"]))
    rows: list[dict[str, object]] = []
    for layer, of_layer in table.loc[table["position"] > 0].groupby("layer"):
        texts = [part.sort_values("position") for _, part in of_layer.groupby("text")]
        sizes = [np.abs(part["scale"].to_numpy()) for part in texts]
        inside = [np.stack([(part["segment"] == name).to_numpy() for name in names], 1) for part in texts]
        of_tokens = np.stack([mask.mean(0) for mask in inside])
        of_size = np.stack([_share(size, mask) for size, mask in zip(sizes, inside, strict=True)])
        apart = np.abs((of_size - of_tokens).mean(0))
        as_far = np.zeros(len(names))
        for _ in range(shuffles):
            turned = [
                _share(np.roll(size, generator.integers(len(size))), mask)
                for size, mask in zip(sizes, inside, strict=True)
            ]
            as_far += np.abs((np.stack(turned) - of_tokens).mean(0)) >= apart - 1e-12
        for place, name in enumerate(names):
            interval = bootstrap_interval(of_size[:, place], seed=seed)
            rows.append(
                {"layer": layer, "segment": name, "token_share": of_tokens[:, place].mean()}
                | {"magnitude_share": interval.value, "low": interval.low, "high": interval.high}
                | {"p": (1 + as_far[place]) / (1 + shuffles), "n_texts": len(texts)}
            )
    return tables.check(pd.DataFrame(rows), "adaptive_shares")


def _share(size: Float[np.ndarray, " pos"], inside: Shaped[np.ndarray, "pos segment"]) -> Float[np.ndarray, " segment"]:
    return size @ inside / max(size.sum(), np.finfo(float).tiny)


def _projections(model: LanguageModel, weights: LoRAWeights) -> Mapping[int, str]:
    """The down-projection of each layer that has an adapter, by its path."""
    down = architecture(model.family).down
    paths = {layer_of(path): path for path in weights.pairs}
    wrong = [p for p in weights.pairs if not p.endswith(f".{down}")]
    if weights.spec.rank != 1 or wrong:
        named = f"rank {weights.spec.rank} on {', '.join(sorted({p.rpartition('.')[2] for p in weights.pairs}))}"
        raise UsageError(
            f"this adapter is of {named}; token-wise scaling is rank 1 on {down.rpartition('.')[2]} alone "
            "(steerlab train … --adapter adaptive)"
        )
    zero = [layer for layer, path in paths.items() if not weights.pairs[path][1].any()]
    if zero:
        raise UsageError(f"the adapters of layers {zero} are still zero, so they scale nothing; train them first")
    return paths


def _said(
    model: LanguageModel, weights: LoRAWeights, path: str, z: Float[torch.Tensor, "pos d_mlp"]
) -> tuple[Float[np.ndarray, " pos"], Float[np.ndarray, " pos"], Float[np.ndarray, " pos"]]:
    """aᵀz·‖b‖ times the adapter's own scale; length of W_down z; cosine of W_down z and b."""
    down, up = (part.detach().double() for part in weights.pairs[path])
    written = model.hf.get_submodule(path)(z).double()
    direction = up[:, 0]
    scale = weights.scale * (z.double() @ down[0]) * direction.norm()
    cosine = torch.nn.functional.cosine_similarity(written, direction, dim=-1)
    return scale.cpu().numpy(), written.norm(dim=-1).cpu().numpy(), cosine.cpu().numpy()
