"""What a run's page says of single places and paths of the whole model, where the vectors decide what is said."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd

from steerlab.plots import activation_patching as place_plots
from steerlab.plots import path_graph as graph_plots
from steerlab.plots import path_patching as path_plots
from steerlab.report.page import Section, Table
from steerlab.runs import Run


def circuit_sections(run: Run) -> list[Section]:
    """The sections whose tables the run has."""
    names, found = set(run.tables()), []
    decided = decisions_table(run.table("decisions")) if "decisions" in names else None
    if "activation_patching" in names:
        found.append(activation_patching_section(run.table("activation_patching"), decided))
    if "path_patching" in names:
        found.append(path_patching_section(run.table("path_patching"), decided))
    if {"edges", "path_nodes", "path_links"} <= names:
        checked = run.table("agreement") if "agreement" in names else None
        edges, nodes, links = (run.table(name) for name in ("edges", "path_nodes", "path_links"))
        found.append(edges_section(edges, nodes, links, checked))
    return found


def decisions_table(table: pd.DataFrame) -> Table:
    """What steered and base model would say where each answer is cut."""
    rows = [
        (row["steered"], row["base"], "yes" if row["changed"] else "no", f"{row['kl_nats']:.2f}", str(row["position"]))
        for row in table.to_dict("records")
    ]
    header = ("steered model's token", "base model's (or its likeliest other)", "likeliest changes", "KL, nats", "at")
    return Table(header, tuple(rows), frozenset({3, 4}))


def activation_patching_section(table: pd.DataFrame, decided: Table | None) -> Section:
    """Which single places bring the decision back."""
    parts = {"heads": table.loc[table["head"] >= 0], "whole sites": table.loc[table["head"] < 0]}
    told = "; ".join(f"of {name} {_ends(part)}" for name, part in parts.items() if len(part))
    text = (
        f"{_question(table.iloc[0])} One place of the steered run at a time is put into the base run: {told} (share of "
        "the whole change, 95 % over texts)."
    )
    figures = [place_plots.activation_patching(part) for part in parts.values() if len(part)]
    return Section("Activation patching", text, figures=tuple(figures), folded=_folded(decided))


def path_patching_section(table: pd.DataFrame, decided: Table | None) -> Section:
    """Who hears a sender."""
    first, most = table.iloc[0], _first(table)
    sender = first["sender"] + (f" {first['sender_layer']}" if first["sender_layer"] >= 0 else "")
    sender += f".{first['sender_head']}" if first["sender_head"] >= 0 else ""
    head = f".{most['receiver_head']}" if most["receiver_head"] >= 0 else ""
    to = "the logits" if most["receiver"] == "logits" else f"{most['receiver']} {most['receiver_layer']}{head}"
    text = (
        f"{_question(first)} One receiver at a time hears what {sender} says in the steered run, by "
        f"{'direct paths only' if first['through'] == 'direct' else 'direct paths and through MLPs'}. Of {len(table)} "
        f"receivers, {to} matters most: {_recovered(most)} (share of the whole change, 95 % over texts)."
    )
    return Section("Path patching", text, figures=(path_plots.path_patching(table),), folded=_folded(decided))


def edges_section(
    edges: pd.DataFrame, nodes: pd.DataFrame, links: pd.DataFrame, checked: pd.DataFrame | None
) -> Section:
    """The strongest paths, and what the estimate is worth."""
    strongest = links.iloc[int(np.argmax(np.abs(links["effect"].to_numpy())))]
    first = edges.iloc[0]
    text = (
        f"All {len(edges):,} edges between embeddings, vectors, heads, MLPs and logits, to first order "
        f"({_gradients(int(first['steps']))}; {first['n']} texts). The {len(links)} drawn are the strongest that lead "
        f"to the logits; the largest, {strongest['source']} → {strongest['target']}, moves the decision by "
        f"{strongest['effect']:+.2f} logits."
    )
    if checked is not None:
        told = "; ".join(
            f"{row['estimate']}: rank correlation {row['spearman']:.2f} ({row['low']:.2f} – {row['high']:.2f}), error "
            f"{row['error']:.0%} of the effects"
            for row in checked.to_dict("records")
        )
        text += f" Beside {checked['n'].iloc[0]} exactly patched edges: {told}."
    note = "graphs/paths.json in the run's folder is the same graph for circuit-tracer's viewer."
    return Section("Paths to the logits", text, figures=(graph_plots.path_graph(nodes, links),), note=note)


def _question(row: pd.Series) -> str:
    return (
        f"{row['n']} answers, each cut where the vectors move its next token most. The logit of what the steered model "
        f"would say is {row['corrupted']:+.2f} above what the base model would in the base run, {row['clean']:+.2f} in "
        "the steered one."
    )


def _gradients(steps: int) -> str:
    return f"integrated gradients of {steps} steps" if steps else "gradients of the base run"


def _ends(table: pd.DataFrame) -> str:
    """What brings back most, and what works against it most."""
    moved = (table["value"] - table["corrupted"]).to_numpy()
    most, least = table.iloc[int(moved.argmax())].to_dict(), table.iloc[int(moved.argmin())].to_dict()
    told = f"{_place(most)} brings back most, {_recovered(most)}"
    return told + (f", {_place(least)} works against it most, {_recovered(least)}" if moved.min() < 0 else "")


def _first(table: pd.DataFrame) -> dict[Hashable, Any]:
    """The row of the largest change."""
    moved = np.abs(np.subtract(table["value"].to_numpy(), table["corrupted"].to_numpy()))
    return table.iloc[int(moved.argmax())].to_dict()


def _place(row: dict[Hashable, Any]) -> str:
    return f"{row['kind']} {row['layer']}" + (f".{row['head']}" if row["head"] >= 0 else "")


def _recovered(row: dict[Hashable, Any]) -> str:
    if row["recovered"] != row["recovered"]:
        return f"{row['value'] - row['corrupted']:+.2f} logits"
    return f"{row['recovered']:.2f} ({row['recovered_low']:.2f} – {row['recovered_high']:.2f})"


def _folded(decided: Table | None) -> tuple[tuple[str, Table], ...]:
    return () if decided is None else (("What is decided, text by text", decided),)
