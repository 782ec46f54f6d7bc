"""What the page of a tuned lens says: how far it is from the model's own output, beside the plain lens."""

from __future__ import annotations

import pandas as pd

from steerlab.plots import lens_fit as lens_plots
from steerlab.report.page import Section, Table


def lens_headline(fit: pd.DataFrame) -> str:
    """One sentence: mean KL over the layers, plain and tuned, and at how many layers the difference is certain."""
    plain, tuned = (fit.loc[fit["lens"] == lens].sort_values("layer") for lens in ("plain", "tuned"))
    better, worse = (tuned["gain_low"] > 0).sum(), (tuned["gain_high"] < 0).sum()
    return (
        f"On {tuned['n_texts'].iloc[0]} held-out texts the tuned lens is {tuned['kl_nats'].mean():.3f} nats from the "
        f"model's own output, the plain logit lens {plain['kl_nats'].mean():.3f} (KL, mean over {len(tuned)} layers). "
        f"It is nearer at {better} layers and farther at {worse} (paired 95 % intervals over texts)."
    )


def lens_fit_section(fit: pd.DataFrame) -> Section:
    """KL by layer as a figure, and as numbers."""
    both = {str(lens): part.sort_values("layer").to_dict("records") for lens, part in fit.groupby("lens")}
    rows = tuple(
        (
            str(plain["layer"]), f"{plain['kl_nats']:.3f}", f"{plain['low']:.3f} – {plain['high']:.3f}",
            f"{tuned['kl_nats']:.3f}", f"{tuned['low']:.3f} – {tuned['high']:.3f}",
            f"{tuned['gain_nats']:.3f}", f"{tuned['gain_low']:.3f} – {tuned['gain_high']:.3f}",
        )
        for plain, tuned in zip(both["plain"], both["tuned"], strict=True)
    )  # fmt: skip
    header = ("layer", "plain lens", "95 % interval", "tuned lens", "95 % interval", "gain", "95 % interval")
    return Section(
        "Fit of the tuned lens",
        "KL(the model's own output ‖ what a layer says) in nats: the plain lens is the model's final norm and head on "
        "what a block writes, the tuned lens the same behind the layer's trained translator. Intervals are over texts "
        "that were held out; the gain's is paired. The last layer is the model's output in both.",
        figures=(lens_plots.lens_fit(fit),),
        folded=(("All layers", Table(header, rows, frozenset(range(7)))),),
    )
