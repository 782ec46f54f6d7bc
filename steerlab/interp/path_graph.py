"""A path graph: the strongest edges from vectors and embeddings to the logits, with nothing that leads nowhere.

Nodes are what both speaks and hears: embedding, vectors, MLPs, logits, and heads by group that shares keys and values
(what a group's keys hear cannot be told apart by head; effects to first order add up, so a group's are sums of its
heads'). `as_json` writes what the viewers of circuit-tracer and Neuronpedia read; positions are summed over, so their
axis shows the kind of node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.interp.agreement import EDGE
from steerlab.models import LanguageModel

STARTS = ("embedding", "vector")
COLUMNS_OF_EDGES = [*EDGE, "effect"]
Node = tuple[str, int, int]  # kind, layer, group of heads
Link = tuple[Node, Node]
COLUMNS = ("embedding", "vector", "heads", "mlp", "logits")  # in the viewer's place of tokens


@dataclass(frozen=True)
class PathGraph:
    """nodes: table `path_nodes`; links: table `path_links`, both sorted by layer. n_layers: of the model."""

    nodes: pd.DataFrame
    links: pd.DataFrame
    n_layers: int

    def as_json(self, slug: str, model: str, prompt: str = "") -> dict[str, Any]:
        """The graph as circuit-tracer's viewer reads it. slug: its name there. model: shown as the scan's name."""
        ids = {node["node"]: self._id(node) for node in self.nodes.to_dict("records")}
        strength = self.nodes["strength"].to_numpy()
        order = np.argsort(-strength, kind="stable")
        reached = np.empty_like(strength)
        reached[order] = strength[order].cumsum() / max(strength.sum(), 1e-30)
        return {
            "metadata": {
                "slug": slug,
                "scan": model,
                "transcoder_list": [],
                "prompt_tokens": list(COLUMNS),
                "prompt": prompt,
                "node_threshold": None,
                "schema_version": 1,
            },
            "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": [
                _node(node, ids[node["node"]], float(part))
                for node, part in zip(self.nodes.to_dict("records"), reached, strict=True)
            ],
            "links": [
                {"source": _node_id(ids[source]), "target": _node_id(ids[target]), "weight": float(effect)}
                for source, target, effect in self.links.itertuples(index=False, name=None)
            ],
        }

    def _id(self, node: dict[Any, Any]) -> tuple[str, int, int]:
        layers = {"embedding": "E", "logits": str(self.n_layers + 1)}
        column = COLUMNS.index(node["kind"])
        return layers.get(node["kind"], str(node["layer"])), max(int(node["head"]), 0) + 1_000 * column, column


def path_graph(model: LanguageModel, edges: pd.DataFrame, *, n_links: int = 60) -> PathGraph:
    """The `n_links` strongest links of a table `edges`, of which those are kept that lie on a path from an embedding or
    a vector to the logits.

    Raises UsageError for n_links < 1, an empty table, or one with no such path.
    """
    tables.check(edges, "edges")
    if n_links < 1 or edges.empty:
        raise UsageError("no links to draw; give a table of edges and n_links of at least 1")
    per_group = model.n_heads // model.n_kv_heads
    effects: dict[Link, float] = {}
    for kind, layer, head, to, behind, part, effect in edges[COLUMNS_OF_EDGES].itertuples(index=False, name=None):
        link = _node_of(kind, layer, head, per_group), _node_of(to, behind, part, per_group if to == "q" else 1)
        effects[link] = effects.get(link, 0.0) + effect
    strongest = sorted(effects, key=lambda link: -abs(effects[link]))[:n_links]
    kept = _leading_on(strongest)
    if not kept:
        raise UsageError(f"the {n_links} strongest links leave no path to the logits; give more")
    return _graph({link: effects[link] for link in kept}, per_group, model.n_layers)


def _leading_on(links: Sequence[Link]) -> list[Link]:
    """Those that lie on a path from a start to the logits."""
    graph = nx.DiGraph(links)
    after = {node for start in graph if start[0] in STARTS for node in (start, *nx.descendants(graph, start))}
    before = {node for end in graph if end[0] == "logits" for node in (end, *nx.ancestors(graph, end))}
    return [(a, b) for a, b in links if {a, b} <= after & before]


def _node_of(kind: str, layer: int, head: int, per_group: int) -> Node:
    """The node that a sender or receiver belongs to."""
    if kind in ("head", "q", "k", "v"):
        return "heads", int(layer), int(head) // per_group
    return kind, int(layer), -1


def _graph(links: Mapping[Link, float], per_group: int, n_layers: int) -> PathGraph:
    """Nodes and links as tables."""
    nodes = sorted(
        {node for link in links for node in link}, key=lambda node: (node[1], COLUMNS.index(node[0]), node[2])
    )
    order = {node: n for n, node in enumerate(nodes)}
    rows = []
    for node in nodes:
        said, heard = (sum(abs(effect) for link, effect in links.items() if link[end] == node) for end in (0, 1))
        rows.append(
            {"node": _label(node, per_group), "kind": node[0], "layer": node[1], "head": node[2]}
            | {"said": said, "heard": heard, "strength": max(said, heard)}
        )
    told = [
        {"source": _label(link[0], per_group), "target": _label(link[1], per_group), "effect": links[link]}
        for link in sorted(links, key=lambda link: (order[link[0]], order[link[1]]))
    ]
    return PathGraph(
        tables.check(pd.DataFrame(rows).astype({"said": float, "heard": float, "strength": float}), "path_nodes"),
        tables.check(pd.DataFrame(told), "path_links"),
        n_layers,
    )


def _label(node: Node, per_group: int) -> str:
    kind, layer, group = node
    if kind in ("embedding", "logits"):
        return kind
    if kind != "heads":
        return f"{'MLP' if kind == 'mlp' else kind} {layer}"
    first = group * per_group
    return f"head {layer}.{first}" if per_group == 1 else f"heads {layer}.{first}–{first + per_group - 1}"


def _node_id(identity: tuple[str, int, int]) -> str:
    return "_".join(map(str, identity))


def _node(node: dict[Any, Any], identity: tuple[str, int, int], reached: float) -> dict[str, Any]:
    layer, feature, column = identity
    types = {"embedding": "embedding", "logits": "logit"}
    return {
        "node_id": _node_id(identity),
        "jsNodeId": f"{layer}_{feature}-{column}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": column,
        "feature_type": types.get(node["kind"], "cross layer transcoder"),
        "token_prob": float(node["kind"] == "logits"),
        "is_target_logit": node["kind"] == "logits",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        # the viewer looks for a probability behind the name of a logit
        "clerp": 'Output "metric" (p=1.000)' if node["kind"] == "logits" else node["node"],
        "influence": reached,
        "activation": float(node["said"]),
    }
