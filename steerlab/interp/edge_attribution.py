"""Edge attribution: what every sender says to every receiver, to first order, all at once (Syed et al. 2023).

Path patching asks for one pass per receiver (`interp/path_patching.py`); this is its estimate for all of a model's
edges. Of a pair of runs, a sender's change Δ in the residual stream (embedding, vectors, a head, an MLP: clean −
corrupted) times the metric's gradient where a receiver reads the stream (a head's queries, a group's keys or values, an
MLP, the logits): Δ · ∂metric/∂read. Gradients through one head's queries alone go back through the projection and the
norm in front of it, so grouped queries, QK-norm, post-norm and parallel blocks need nothing of their own.

`steps`: at how many places between the corrupted (0) and the clean run (1) gradients are taken and averaged, embeddings
and vectors being mixed (integrated gradients: Hanna et al. 2024, here at the middles of equal parts); 0: at the
corrupted run only, plain edge attribution. The two ask for different things: integrated effects add up to the whole
change; gradients at the corrupted run say what patching a single edge into that run does, and agree with it better.
`interp/agreement.py` measures how far either is from exact path patching.

What embeddings and vectors say to all that hear them adds up to the metric's change as `steps` grows;
`table.attrs["unexplained"]` is the part that it does not, relative to the change. Left out: positions one by one, edges
between positions, adapters that write elsewhere than `resid_post`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerlab import tables
from steerlab.adapters import Adapter, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Metric, Pair, Work
from steerlab.interp.integrated import midpoints, on_the_way
from steerlab.interp.path_patching import Receiver, Sender, hears
from steerlab.models import LanguageModel, Site
from steerlab.models.sites import architecture
from steerlab.rollouts.statistics import resampled_means

BLOCK = 4_096  # edges whose intervals are drawn at once


def edge_attribution(
    model: LanguageModel, pair: Pair, metric: Metric, *, steps: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Table `edges`: of every edge the change of the metric, mean over sequences with its 95 % interval.

    Raises UsageError for steps < 0, or a way between the runs that there is not (see `integrated.on_the_way`).
    """
    _check(pair)
    work = Work(model, pair)
    sent, change = _sent(model, work, metric)
    heard: dict[Receiver, Tensor] = {}
    for place in midpoints(steps):
        for receiver, slope in _slopes(model, work, metric, place):
            heard[receiver] = heard.get(receiver, 0) + slope / max(steps, 1)
    said = _products(sent, heard)
    edges = [
        (n, m) for n, sender in enumerate(sent) for m, receiver in enumerate(heard) if hears(model, sender, receiver)
    ]
    rows, columns = (list(of) for of in zip(*edges, strict=True))
    senders, receivers = list(sent), list(heard)
    table = _table([(senders[n], receivers[m]) for n, m in edges], said[:, rows, columns], steps, seed)
    first = table["sender"].isin(("embedding", "vector"))
    rest = float(table.loc[first, "effect"].sum()) - change
    table.attrs["unexplained"] = abs(rest) / max(abs(change), 1e-30)
    return table


def _check(pair: Pair) -> None:
    """Raise UsageError for adapters whose effect does not start at `resid_post`."""
    for adapter in (pair.clean_adapter, pair.corrupted_adapter):
        if adapter is None:
            continue
        if not isinstance(adapter, SteeringVectors) or {site.kind for site in adapter.sites} != {"resid_post"}:
            raise UsageError(f"edges start at embeddings and vectors of resid_post, not {adapter!r}; give such vectors")


@torch.no_grad()
def _sent(
    model: LanguageModel, work: Work, metric: Metric
) -> tuple[dict[Sender, Float[Tensor, "batch pos d_model"]], float]:
    """What each sender changes in the stream, and by how much the metric changes in all."""
    pair, first = work.pair, Site("resid_pre", 0)
    clean_end, clean, by_clean = _run(model, work, pair.clean, pair.clean_adapter)
    corrupted_end, corrupted, by_corrupted = _run(model, work, pair.corrupted, pair.corrupted_adapter)
    found = {Sender("embedding"): clean[first] - corrupted[first]}
    for layer in range(model.n_layers):
        z, mlp = Site("z", layer), Site("mlp_out", layer)
        found |= dict(_heads(model, layer, clean[z], corrupted[z]))
        found[Sender("mlp", layer)] = clean[mlp] - corrupted[mlp]
        found[Sender("vector", layer)] = by_clean[layer] - by_corrupted[layer]
    change = float((metric(clean_end) - metric(corrupted_end)).mean())
    return {of: x for of, x in found.items() if x.any()}, change


def _run(
    model: LanguageModel, work: Work, tokens: Tensor, adapter: Adapter | None
) -> tuple[Float[Tensor, "batch d_vocab"], dict[Site, Tensor], dict[int, Tensor]]:
    """Of one run the last logits, values by site, and by layer what the adapter added behind the block."""
    layers, before = range(model.n_layers), dict[int, Tensor]()
    wanted = [Site(kind, layer) for layer in layers for kind in ("z", "mlp_out", "resid_post")]
    notes = [(Site("resid_post", layer), _keep(before, layer)) for layer in layers]
    end, values = work.run(tokens, adapter, [Site("resid_pre", 0), *wanted], notes)
    return end, values, {layer: values[Site("resid_post", layer)] - before[layer] for layer in layers}


def _heads(
    model: LanguageModel, layer: int, clean: Tensor, corrupted: Tensor
) -> Iterator[tuple[Sender, Float[Tensor, "batch pos d_model"]]]:
    """What attention writes with one head's output from the clean run, beside what it wrote in the corrupted one."""
    arch, block = architecture(model.family), model.blocks[layer]
    projection = block.get_submodule(arch.z)
    stored: Tensor = projection.weight  # type: ignore[assignment]
    weight = stored if isinstance(projection, nn.Linear) else stored.T
    after = nn.Identity() if arch.ln1_post is None else block.get_submodule(arch.ln1_post)
    before = projection(corrupted)
    written = after(before)
    for head in range(model.n_heads):
        part = slice(head * model.d_head, (head + 1) * model.d_head)
        said = (clean - corrupted)[..., part] @ weight[:, part].T
        yield Sender("head", layer, head), said if arch.ln1_post is None else after(before + said) - written


def _slopes(
    model: LanguageModel, work: Work, metric: Metric, place: float
) -> Iterator[tuple[Receiver, Float[Tensor, "batch pos d_model"]]]:
    """Gradients of the metric where receivers read the stream, at one place on the way."""
    layers = range(model.n_layers)
    heads = [Site(kind, layer) for layer in layers for kind in ("q", "k", "v")]
    reads = [Site(kind, layer) for layer in layers for kind in ("attn_in", "mlp_in")]
    end = Site("resid_post", model.n_layers - 1)
    values: dict[Site, Tensor] = {}
    added: dict[Site, Tensor] = {}

    def apart(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            values[site], added[site] = x, torch.zeros_like(x).requires_grad_()
            return x + added[site]

        return edit

    with torch.enable_grad(), on_the_way(model, work.pair, place, work.start) as adapter:
        with model.intervene({site: apart(site) for site in (*reads, *heads, end)}):
            logits, _ = work.run(work.pair.corrupted, adapter, ())
        wanted = [*(Site("mlp_in", layer) for layer in layers), end, *heads]
        found = torch.autograd.grad(metric(logits).sum(), [added[of] for of in wanted], retain_graph=True)
        slopes = dict(zip(wanted, found, strict=True))
        for layer in layers:
            yield Receiver("mlp", layer), slopes[Site("mlp_in", layer)]
        yield Receiver("logits", model.n_layers), slopes[end]
        for site in heads:
            source = added[Site("attn_in", site.layer)]
            for head, by_head in enumerate(_by_head(slopes[site], model.d_head)):
                (back,) = torch.autograd.grad(values[site], source, by_head, retain_graph=True)
                yield Receiver(site.kind, site.layer, head), back


def _by_head(slope: Float[Tensor, "batch pos width"], d_head: int) -> Iterator[Tensor]:
    """The gradient of one head (or group) at a time, 0 for the others."""
    for start in range(0, slope.shape[-1], d_head):
        only = torch.zeros_like(slope)
        only[..., start : start + d_head] = slope[..., start : start + d_head]
        yield only


def _products(sent: dict[Sender, Tensor], heard: dict[Receiver, Tensor]) -> Float[np.ndarray, "batch sender receiver"]:
    """Change · gradient by sequence, sender and receiver, summed over positions and coordinates."""
    batch = next(iter(sent.values())).shape[0]
    found = []
    for row in range(batch):
        left = torch.stack([x[row].flatten() for x in sent.values()])
        right = torch.stack([x[row].flatten() for x in heard.values()])
        found.append((left @ right.T).double().cpu().numpy())
    return np.stack(found)


def _keep(into: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    return lambda x: into.__setitem__(layer, x)


def _table(
    edges: list[tuple[Sender, Receiver]], found: Float[np.ndarray, "batch edge"], steps: int, seed: int
) -> pd.DataFrame:
    """A row per edge."""
    low, high = np.full((2, found.shape[1]), np.nan)
    if len(found) > 1:
        for start in range(0, found.shape[1], BLOCK):
            draws = resampled_means(found[:, start : start + BLOCK], seed=seed)
            low[start : start + BLOCK], high[start : start + BLOCK] = np.quantile(draws, [0.025, 0.975], axis=0)
    columns = {
        "sender": [of.kind for of, _ in edges],
        "sender_layer": [of.last for of, _ in edges],
        "sender_head": [of.head for of, _ in edges],
        "receiver": [of.kind for _, of in edges],
        "receiver_layer": [of.layer for _, of in edges],
        "receiver_head": [of.head for _, of in edges],
        "steps": steps,
        "effect": found.mean(0),
        "low": low,
        "high": high,
        "n": len(found),
    }
    return tables.check(pd.DataFrame(columns), "edges")
