"""Path patching: what one sender says to one receiver, and what that does to the answer (Wang et al. 2022; Goldowsky-
Dill et al. 2023).

Of two runs over token sequences of equal length (`activation_patching.Pair`: two prompts, or the same tokens with and
without a steering vector), a sender has its clean value: the embedding, the vector, a head, attention, an MLP. In a
first pass of the corrupted run everything behind it is frozen at what the corrupted run wrote, so that only the direct
path through the residual stream is left (`through="mlps"`: only attention is frozen). What receivers would read there,
a head's queries, a group's keys or values, an MLP, is noted; the logits are received there and then. In a second pass
of the corrupted run one receiver has what was noted, and all that follows is computed as usual.

One first pass serves all receivers of a sender; second passes begin at the receiver's block. Sites are those before
QK-norm and rotary embedding and behind post-norms, so grouped queries, post-norm and parallel blocks need nothing of
their own. `table.attrs["unexplained"]`: the part of the last residual state's change that embedding, vectors, attention
and MLPs do not add up to, relative to it. Left out: paths through more than one receiver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError, unknown
from steerlab.interp.activation_patching import Metric, Pair, Work, measured
from steerlab.models import LanguageModel, Site
from steerlab.models.hooks import Edit, Keep

Through = Literal["direct", "mlps"]
SENDERS = {"head": "z", "attention": "attn_out", "mlp": "mlp_out"}
RECEIVERS = {"q": "q", "k": "k", "v": "v", "mlp": "mlp_out"}


@dataclass(frozen=True)
class Sender:
    """kind: embedding, vector, head, attention or mlp. layer: of the block (the vector: of its block)."""

    kind: str
    layer: int = 0
    head: int = -1

    @property
    def last(self) -> int:
        """The block whose attention cannot hear it any more, but whose MLP may."""
        return -1 if self.kind == "embedding" else self.layer


@dataclass(frozen=True)
class Receiver:
    """kind: q, k, v, mlp or logits. head: of q; of k and v the group of heads."""

    kind: str
    layer: int = 0
    head: int = -1


def senders(model: LanguageModel, kinds: Sequence[str] = ("head", "mlp")) -> list[Sender]:
    """Every head, attention or MLP, and the embedding, as `kinds` say."""
    found = [Sender("embedding")] if "embedding" in kinds else []
    for layer in range(model.n_layers):
        if "head" in kinds:
            found += [Sender("head", layer, head) for head in range(model.n_heads)]
        found += [Sender(kind, layer) for kind in ("attention", "mlp") if kind in kinds]
    return found


def receivers(
    model: LanguageModel, sender: Sender, kinds: Sequence[str] = ("q", "k", "v", "mlp", "logits")
) -> list[Receiver]:
    """All that can hear a sender: heads of later blocks, MLPs of later blocks and of its own behind attention."""
    found = []
    n = {"q": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}
    for layer in range(max(sender.last, 0), model.n_layers):
        for kind in (kind for kind in kinds if kind in RECEIVERS):
            if hears(model, sender, Receiver(kind, layer)):
                found += [Receiver(kind, layer, head) for head in (range(n[kind]) if kind in n else [-1])]
    return found + [Receiver("logits", model.n_layers)] * ("logits" in kinds)


def hears(model: LanguageModel, sender: Sender, receiver: Receiver) -> bool:
    """Whether there is a direct path."""
    if receiver.kind == "logits" or receiver.layer > sender.last:
        return True
    same = receiver.kind == "mlp" and receiver.layer == sender.layer and sender.kind in ("head", "attention")
    return same and model.norm_placement != "parallel"


@torch.no_grad()
def path_patching(
    model: LanguageModel,
    pair: Pair,
    sender: Sender,
    heard_by: Sequence[Receiver],
    metric: Metric,
    *,
    through: Through = "direct",
) -> pd.DataFrame:
    """Table `path_patching`: the metric with what `sender` says to each receiver from the clean run, mean over
    sequences with its interval.

    Raises UsageError for a sender or receiver that the model does not have or that cannot hear, none, or the vector as
    a sender where the clean run has none of that layer.
    """
    check_paths(model, pair, sender, heard_by)
    work = Work(model, pair)
    frozen_at = [Site(kind, layer) for layer in range(model.n_layers) for kind in ("attn_out", "mlp_out")]
    source = [Site(SENDERS[sender.kind], sender.layer)] if sender.kind in SENDERS else []
    ends = [Site("resid_pre", 0), Site("resid_post", model.n_layers - 1)]
    clean_end, clean = work.run(pair.clean, pair.clean_adapter, {*frozen_at, *source, *ends})
    corrupted_end, corrupted = work.begin({*frozen_at, *source, *ends})
    noted: dict[Site, Tensor] = {}
    wanted = {Site(RECEIVERS[of.kind], of.layer) for of in heard_by if of.kind != "logits"}
    edits = _frozen(model, sender, corrupted, through) | _sent(model, sender, clean, corrupted)
    notes = [(site, _keep(noted, site)) for site in sorted(wanted)]
    adapter = pair.clean_adapter if sender.kind == "vector" else None
    heard = work.onward(max(sender.last, 0), edits, notes, adapter)
    rows = []
    for receiver in heard_by:
        end = heard
        if receiver.kind != "logits":
            site = Site(RECEIVERS[receiver.kind], receiver.layer)
            end = work.onward(receiver.layer, {site: _giving(noted[site], _part(model, receiver.head))})
        rows.append(
            {"sender": sender.kind, "sender_layer": sender.last, "sender_head": sender.head}
            | {"receiver": receiver.kind, "receiver_layer": receiver.layer, "receiver_head": receiver.head}
            | {"through": through}
            | measured(metric(end), metric(clean_end), metric(corrupted_end))
        )
    table = tables.check(pd.DataFrame(rows), "path_patching")
    table.attrs["unexplained"] = _unexplained(pair, clean, corrupted, frozen_at, ends)
    return table


def check_paths(model: LanguageModel, pair: Pair, sender: Sender, heard_by: Sequence[Receiver]) -> None:
    """Raise UsageError for a path that there is not."""
    if sender.kind not in {*SENDERS, "embedding", "vector"}:
        raise unknown("sender", sender.kind, (*SENDERS, "embedding", "vector"))
    if not heard_by:
        raise UsageError("no receiver; give at least one")
    if not 0 <= sender.layer < model.n_layers:
        raise UsageError(f"layer {sender.layer} does not exist; {model.name} has layers 0 to {model.n_layers - 1}")
    if sender.kind == "head" and not 0 <= sender.head < model.n_heads:
        raise UsageError(f"head {sender.head} does not exist; {model.name} has heads 0 to {model.n_heads - 1}")
    if sender.kind == "vector":
        vectors = pair.clean_adapter
        there = isinstance(vectors, SteeringVectors) and vectors.sites == (Site("resid_post", sender.layer),)
        if not there or pair.corrupted_adapter is not None or not torch.equal(pair.clean, pair.corrupted):
            raise UsageError(
                f"the clean run is not the corrupted one with one vector at resid_post.{sender.layer}; give "
                "Pair(tokens, tokens, vectors.select([layer]))"
            )
    for receiver in heard_by:
        if receiver.kind not in {*RECEIVERS, "logits"}:
            raise unknown("receiver", receiver.kind, (*RECEIVERS, "logits"))
        inside = receiver.kind == "logits" or 0 <= receiver.layer < model.n_layers
        n = {"q": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}.get(receiver.kind)
        if not inside or (n is not None and not 0 <= receiver.head < n):
            raise UsageError(f"{receiver} does not exist in {model.name}; see `receivers`")
        if not hears(model, sender, receiver):
            raise UsageError(f"{receiver} does not hear {sender}: it is not behind it; choose a later block")


def _frozen(model: LanguageModel, sender: Sender, corrupted: dict[Site, Tensor], through: Through) -> dict[Site, Edit]:
    """What is written behind the sender, at what the corrupted run wrote."""
    kinds = ("attn_out", "mlp_out") if through == "direct" else ("attn_out",)
    sites = [Site(kind, layer) for layer in range(sender.last + 1, model.n_layers) for kind in kinds]
    if through == "direct" and sender.kind in ("head", "attention"):
        sites.append(Site("mlp_out", sender.layer))
    return {site: _giving(corrupted[site]) for site in sites}


def _sent(
    model: LanguageModel, sender: Sender, clean: dict[Site, Tensor], corrupted: dict[Site, Tensor]
) -> dict[Site, Edit]:
    """The sender's clean value in its place; the vector comes as the clean run's adapter."""
    if sender.kind == "vector":
        return {}
    if sender.kind == "embedding":
        site = Site("resid_pre", 0)
        return {site: _giving(clean[site])}
    site = Site(SENDERS[sender.kind], sender.layer)
    if sender.kind != "head":
        return {site: _giving(clean[site])}
    part = _part(model, sender.head)
    value = corrupted[site].clone()
    value[..., part] = clean[site][..., part]
    return {site: _giving(value)}


def _part(model: LanguageModel, head: int) -> slice:
    return slice(None) if head < 0 else slice(head * model.d_head, (head + 1) * model.d_head)


def _giving(value: Tensor, part: slice = slice(None)) -> Edit:
    def edit(x: Tensor) -> Tensor:
        if part == slice(None):
            return value
        x = x.clone()
        x[..., part] = value[..., part]
        return x

    return edit


def _keep(noted: dict[Site, Tensor], site: Site) -> Keep:
    return lambda x: noted.__setitem__(site, x)


def _unexplained(
    pair: Pair, clean: dict[Site, Tensor], corrupted: dict[Site, Tensor], parts: Sequence[Site], ends: Sequence[Site]
) -> float:
    """Part of the last state's change that is not a sum of what was written, at the last position."""
    first, last = ends
    rows, at = torch.arange(len(pair.end), device=pair.end.device), pair.end - pair.common
    change = {site: (clean[site] - corrupted[site])[rows, at].double() for site in (first, last, *parts)}
    total = change[first] + torch.stack([change[site] for site in parts]).sum(0)
    for adapter, sign in ((pair.clean_adapter, 1), (pair.corrupted_adapter, -1)):
        if isinstance(adapter, SteeringVectors):
            for site, vector in adapter.vectors.items():
                if site.kind == "resid_post":
                    total = total + sign * vector.detach().to(total)
    return float((change[last] - total).abs().max() / change[last].abs().max().clamp_min(1e-30))
