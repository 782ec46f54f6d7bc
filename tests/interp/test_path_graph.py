"""Path graphs: what is kept leads from a start to the logits, groups add up, and the JSON is what viewers read."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Pair, logit_difference
from steerlab.interp.edge_attribution import edge_attribution
from steerlab.interp.path_graph import path_graph
from steerlab.models import LanguageModel
from steerlab.plots.path_graph import path_graph as plot

Exact = Callable[..., LanguageModel]
Vectors = Callable[..., SteeringVectors]
TOKENS = torch.tensor([[40, 41, 42, 43, 44, 45], [60, 61, 62, 63, 64, 65]])
METRIC = logit_difference(torch.tensor([7, 8]), torch.tensor([9, 10]))
HAND = [  # sender, layer, head, receiver, layer, head, effect
    ("vector", 0, -1, "q", 1, 0, 3.0),
    ("vector", 0, -1, "k", 1, 0, 1.0),
    ("vector", 0, -1, "v", 1, 1, 0.5),
    ("head", 1, 0, "logits", 4, -1, 2.0),
    ("head", 1, 1, "logits", 4, -1, -0.5),
    ("mlp", 1, -1, "mlp", 3, -1, 9.0),  # from nowhere, to nowhere
    ("vector", 0, -1, "mlp", 2, -1, 5.0),  # a dead end
    ("vector", 0, -1, "logits", 4, -1, 0.1),
]


def by_hand() -> pd.DataFrame:
    names = ["sender", "sender_layer", "sender_head", "receiver", "receiver_layer", "receiver_head", "effect"]
    return pd.DataFrame(HAND, columns=names).assign(steps=0, low=0.0, high=0.0, n=2)


def test_what_leads_nowhere_is_left_out(exact: Exact) -> None:
    """Two heads of the tiny llama share keys and values; queries are theirs alone, links are their group's."""
    model = exact("llama")
    assert model.n_heads // model.n_kv_heads == 2
    graph = path_graph(model, by_hand())
    links = {(row["source"], row["target"]): row["effect"] for row in graph.links.to_dict("records")}
    assert links == {
        ("vector 0", "heads 1.0–1"): 4.0,
        ("heads 1.0–1", "logits"): 1.5,
        ("vector 0", "logits"): 0.1,
    }
    assert list(graph.nodes["node"]) == ["vector 0", "heads 1.0–1", "logits"]
    strongest = path_graph(model, by_hand().iloc[[0, 3, 7]], n_links=2)
    assert len(strongest.links) == 2, "the weakest went first"


def test_the_viewers_json(exact: Exact) -> None:
    graph = path_graph(exact("llama"), by_hand()).as_json("one", "tiny-llama")
    assert {"slug", "scan", "prompt_tokens", "prompt", "transcoder_list"} <= graph["metadata"].keys()
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids) == len({node["jsNodeId"] for node in graph["nodes"]}) == 3
    assert all({link["source"], link["target"]} <= set(ids) for link in graph["links"])
    kinds = {node["clerp"]: (node["feature_type"], node["layer"]) for node in graph["nodes"]}
    assert kinds['Output "metric" (p=1.000)'] == ("logit", "5"), "viewers read a probability behind it"
    assert kinds["vector 0"] == ("cross layer transcoder", "0")
    assert all(node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"]) for node in graph["nodes"])
    reached = [node["influence"] for node in graph["nodes"]]
    assert max(reached) == pytest.approx(1) and min(reached) > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_of_a_model(family: str, exact: Exact, vectors: Vectors) -> None:
    model = exact(family)
    edges = edge_attribution(model, Pair(TOKENS, TOKENS, vectors(model)), METRIC, steps=1)
    graph = path_graph(model, edges, n_links=25)
    assert 0 < len(graph.links) <= 25
    figure = plot(graph.nodes, graph.links)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == len(graph.links)
    whole = path_graph(model, edges, n_links=len(edges))
    assert whole.links["effect"].sum() == pytest.approx(edges["effect"].sum(), rel=1e-6)


def test_bad_input_is_one_line(exact: Exact) -> None:
    model = exact("llama")
    for says, table, n in (
        ("at least 1", by_hand(), 0),
        ("give a table", by_hand().iloc[:0], 5),
        ("no path", by_hand(), 1),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            path_graph(model, table, n_links=n)
        assert "\n" not in str(caught.value)
