"""What a run's page says of the token effects of patches: numbers, groups of words, and the texts where a part matters
most, token by token."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from steerlab.plots import patch_effects as plots
from steerlab.plots.house import readable, words
from steerlab.report.page import Passage, Section, Table
from steerlab.report.tokens import coloured

COLOURED_PATCHES, TEXTS_EACH = 3, 2
STRONGEST = 0.98  # share of a patch's positions whose KL is below the strongest colour


def patch_effects_section(positions: pd.DataFrame, tokens: pd.DataFrame, groups: pd.DataFrame) -> Section:
    """What parts of the block do to which tokens, and where."""
    figures = (plots.patch_effects(positions), plots.patch_groups(groups))
    random = _kl_by(positions.loc[positions["sender"] == "random"], "patch")
    positions = positions.loc[positions["sender"] == "trained"]
    told = ", ".join(
        f"{words(patch)} {mean:.3g}{f' (random direction {random[patch][0]:.3g})' if random else ''}"
        for patch, (mean, _) in _kl_by(positions, "patch").items()
    )
    layer = int(positions["layer"].iloc[0])
    text = (
        f"Block {layer + 1} with a patch beside the same block without it, on the same {positions['text'].nunique()} "
        f"answers, token by token. What a part (an attention, an MLP, for base the whole vector) does with the vector "
        f"of layer {layer}, as KL in nats per token: {told}. {_beyond(groups)}"
    )
    note = (
        "A positive Δp reads: the part raises the token. Groups are short word lists of this package "
        "(steerlab/interp/words.py) or your own; the control draws as many tokens, about as likely without a "
        "vector. Its p-values are not corrected for the number of groups and patches, and do not say that the vector "
        "is special: a random direction moves related words together too. Coloured texts: those "
        f"with the largest KL of the {COLOURED_PATCHES} patches that matter most; rest on a token for its numbers."
    )
    return Section(
        "Token effects of patches",
        text,
        figures=figures,
        folded=(("Tokens raised and lowered by each part", _tokens(tokens)), ("Groups of words", _groups(groups))),
        passages=tuple(_passages(positions)),
        note=note,
    )


def _beyond(groups: pd.DataFrame) -> str:
    """How many groups their control does not explain, beside how many of a random direction's."""
    known = groups.dropna(subset=["p"])
    counts = {}
    for sender, part in known.groupby("sender", sort=False):
        counts[str(sender)] = [int((part[name].to_numpy() < 0.05).sum()) for name in ("p", "raised_p")]
    if not counts:
        return "No word of the groups is a token of the vocabulary."
    mass, raised = counts["trained"]
    random = f" (of a random direction {counts['random'][0]} and {counts['random'][1]})" if "random" in counts else ""
    return (
        f"Of {len(known) // len(counts)} pairs of a patch and a group of words {mass} differ from tokens about as "
        f"likely by their Δp, and {raised} by the share of their tokens that rise{random}."
    )


def _passages(positions: pd.DataFrame) -> Iterator[Passage]:
    """The texts of the largest KL, of the patches of the largest mean."""
    by_patch = _kl_by(positions, "patch")
    for patch in sorted(by_patch, key=lambda patch: -by_patch[patch][0])[:COLOURED_PATCHES]:
        mine = positions.loc[positions["patch"] == patch]
        top = float(np.quantile(mine["kl_nats"].to_numpy(), STRONGEST))
        if top <= 0:
            continue
        by_text = _kl_by(mine, "text")
        for text in sorted(by_text, key=lambda text: -by_text[text][1])[:TEXTS_EACH]:
            rows = mine.loc[mine["text"] == int(text)].sort_values("generated")
            mean, largest = by_text[text]
            title = f"{words(patch)}, text {text}: KL {mean:.2g} nats per token, at most {largest:.2g}"
            says = [_says(row) for row in rows.to_dict("records")]
            values = rows["kl_nats"].tolist()
            yield coloured(title, rows["token"].tolist(), values, says, top=top, unit="nats or more")


def _kl_by(positions: pd.DataFrame, column: str) -> dict[str, tuple[float, float]]:
    """Mean and largest KL by patch or text."""
    parts = {str(name): part["kl_nats"].to_numpy() for name, part in positions.groupby(column, sort=False)}
    return {name: (float(kl.mean()), float(kl.max())) for name, kl in parts.items()}


def _says(row: dict[Hashable, Any]) -> str:
    return (
        f"KL {row['kl_nats']:.2g} nats; raises {readable(str(row['raised']))} {row['raised_delta']:+.2g}, "
        f"lowers {readable(str(row['lowered']))} {row['lowered_delta']:+.2g}"
    )


def _tokens(tokens: pd.DataFrame) -> Table:
    rows = tuple(
        (
            str(row["sender"]), words(str(row["patch"])), str(row["end"]), readable(str(row["token"])),
            f"{row['delta']:+.2e}",
            f"{row['low']:+.1e} – {row['high']:+.1e}",
        )
        for row in tokens.to_dict("records")
    )  # fmt: skip
    caption = f"Means over positions, intervals over {tokens['n_texts'].iloc[0]} texts."
    header = ("vector", "patch", "end", "token", "mean Δp", "95 % interval")
    return Table(header, rows, frozenset({4, 5}), caption)


def _groups(groups: pd.DataFrame) -> Table:
    rows = tuple(
        (
            str(row["sender"]), words(str(row["patch"])), words(str(row["word_group"])), str(row["n_tokens"]),
            f"{row['base_mass']:.3f}", f"{row['mass']:+.2e}", f"{row['low']:+.1e} – {row['high']:+.1e}",
            *(
                ("",) * 6 if row["p"] != row["p"]
                else (f"{row['control']:+.1e} ({row['control_low']:+.1e} – {row['control_high']:+.1e})",
                      f"{row['control_base_mass']:.3f}", f"{row['p']:.3f}", f"{row['raised_share']:.0%}",
                      f"{row['control_raised_share']:.0%}", f"{row['raised_p']:.3f}")
            ),
        )
        for row in groups.to_dict("records")
    )  # fmt: skip
    header = (
        "vector", "patch", "group", "tokens", "probability without vector", "Δp per position", "95 % interval",
        "control (95 % of draws)", "its probability", "p",
        "tokens raised", "of the control's", "p",
    )  # fmt: skip
    return Table(header, rows, frozenset(range(3, 13)))
