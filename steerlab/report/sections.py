"""What the page of a run says: one function per section, each from the run's tables, absent where its table is.

Numbers come from the tables as they are; the only statistics made here are the paired gain of the headline
(`rollouts.statistics.gain`) and, where completions were not kept, its interval from the two scores' own intervals
(square-and-add: Zou & Donner 2008, doi 10.1002/sim.3095). Left out: comparison of runs.
"""

from __future__ import annotations

import math
from statistics import fmean

import pandas as pd

from steerlab.errors import UsageError
from steerlab.interp import geometry
from steerlab.plots import geometry as geometry_plots
from steerlab.plots import logit_lens as lens_plots
from steerlab.plots import scores as score_plots
from steerlab.plots import training as training_plots
from steerlab.plots.house import readable, words
from steerlab.report.comparisons import comparison_sections
from steerlab.report.latents import latent_sections
from steerlab.report.lens_fit import lens_fit_section, lens_headline
from steerlab.report.page import Comparison, Report, Section, Side, Table
from steerlab.report.paths import path_sections
from steerlab.report.readouts import reading_sections
from steerlab.report.saes import sae_headline, sae_sections
from steerlab.report.setup import cost, facts, setup, title
from steerlab.rollouts.statistics import Interval, gain
from steerlab.runs import Run

_COMPARISONS = 12
_LENS_RANKS = 10


def from_run(run: Run) -> str:
    """The page of a run as HTML. Sections whose tables the run does not have are absent."""
    names = set(run.tables())
    scores = run.table("scores") if "scores" in names else None
    completions = run.table("completions") if "completions" in names else None
    norms = run.table("norms") if "norms" in names else None
    cosines = run.table("cosines") if "cosines" in names else None
    metrics = run.metrics()
    fit = run.table("lens_fit") if "lens_fit" in names else None
    said = headline(scores, completions) if fit is None else lens_headline(fit)
    if "sae_quality" in names:
        said = sae_headline(run.table("sae_quality"))
    report = Report(title(run), said, facts(run))
    if scores is not None:
        report.add(score_section(scores))
    if fit is not None:
        report.add(lens_fit_section(fit))
    for section, metric in ((training_section, "reward"), (loss_section, "loss_ema")):
        if {"step", metric} <= set(metrics.columns):
            report.add(section(metrics))
    if completions is not None:
        report.add(completion_section(completions))
    if "logit_lens" in names:
        report.add(lens_section(run.table("logit_lens")))
    if norms is not None:
        dose = run.table("relative_dose") if "relative_dose" in names else None
        report.add(geometry_section(norms, cosines, dose))
    kinds = (sae_sections, latent_sections, reading_sections, path_sections, comparison_sections)
    for section in (section for sections in kinds for section in sections(run)):
        report.add(section)
    report.add(cost(run, metrics))
    report.add(setup(run))
    return report.html()


def headline(scores: pd.DataFrame | None, completions: pd.DataFrame | None) -> str:
    """One sentence: the gain with its interval, against the base and against the best that needs no training."""
    pair = _base_and_steered(scores)
    if scores is None or pair is None:
        return "This run has not been evaluated, so nothing is claimed about it."
    base, steered = pair
    difference, how = _difference(base, steered, completions)
    where = "held-out problems" if steered["split"] == "test" else f"{steered['split']} problems"
    verb = "raised" if difference.low > 0 else "lowered" if difference.high < 0 else "did not measurably change"
    certain = difference.low > 0 or difference.high < 0
    interval = f"95 % interval {_points(difference.low)} to {_points(difference.high)}, {how}"
    text = (
        f"Steering {verb} {steered['metric']} on the {steered['n_problems']} {where} of {steered['task']}"
        f"{' ' if certain else ': '}from {_interval(base)} to {_interval(steered)}, "
        f"a gain of {_points(difference.value)} points ({interval})."
    )
    same = scores.loc[(scores["task"] == steered["task"]) & (scores["split"] == steered["split"])]
    others = same.loc[~same["condition"].isin(["base", "steered"]) & same["metric"].str.startswith("avg@")]
    if others.empty:
        return text
    best = others.sort_values("value", kind="stable").iloc[-1]
    verdict = "above" if steered["value"] > best["value"] else "not above"
    return f"{text} That is {verdict} the best other condition, {words(best['condition'])} ({_percent(best['value'])})."


def score_section(scores: pd.DataFrame) -> Section:
    """Every condition's scores, as a figure and as numbers."""
    constant = [name for name in ("task", "split", "n_problems", "n_seeds") if len(set(scores[name])) == 1]
    varying = [name for name in ("task", "split", "n_problems", "n_seeds") if name not in constant]
    rows = []
    for r in scores.to_dict("records"):
        if r["metric"] == "pass@1":  # the same number as avg@1
            continue
        what = (words(r["condition"]), *(str(r[name]) for name in varying), r["metric"], f"{r['temperature']:g}")
        score = (_percent(r["value"]), f"{_percent(r['low'])} – {_percent(r['high'])}")
        rows.append((*what, *score, str(r["n_samples"])))
    caption = "; ".join(f"{name.removeprefix('n_')}: {scores[name].iloc[0]}" for name in constant)
    names = (name.removeprefix("n_") for name in varying)
    header = ("condition", *names, "metric", "temperature", "score", "95 % interval", "samples per problem")
    numeric = frozenset(range(len(header) - 4, len(header)))
    return Section(
        "Scores: base and steered",
        "Base is the untouched model. Greedy and few-shot show how much of a gain is elicitation: they change no "
        "weights and train nothing. Intervals are over problems (and seeds where there are several).",
        figures=(score_plots.scores(scores),),
        tables=(Table(header, tuple(rows), numeric, caption),),
    )


def training_section(metrics: pd.DataFrame) -> Section:
    """The learning curve."""
    ordered = metrics.sort_values("step")
    window = max(1, min(5, len(ordered) // 2))
    rewards = ordered["reward"].tolist()
    first, last = fmean(rewards[:window]), fmean(rewards[-window:])
    text = (
        f"Mean reward went from {_signed(first)} (first {window} steps) to {_signed(last)} (last {window}) "
        f"in {len(ordered)} steps."
    )
    if "signal_share" in ordered.columns and len(ordered["signal_share"].dropna()):
        early, late = ordered["signal_share"].head(window).mean(), ordered["signal_share"].tail(window).mean()
        text += (
            f" A group whose samples all earn the same reward teaches nothing; the share of groups with a signal went "
            f"from {early:.0%} to {late:.0%}."
        )
    return Section("Learning curve", text, figures=(training_plots.learning_curve(ordered),))


def loss_section(metrics: pd.DataFrame) -> Section:
    """The loss of a run without rewards, step by step."""
    ordered = metrics.sort_values("step")
    window = max(1, min(5, len(ordered) // 2))
    first, last = (fmean(part["loss"].tolist()) for part in (ordered.head(window), ordered.tail(window)))
    text = (
        f"The loss went from {first:.3f} (first {window} steps) to {last:.3f} (last {window}) in {len(ordered)} steps."
    )
    return Section("Learning curve", text, figures=(training_plots.loss_curve(ordered),))


def completion_section(completions: pd.DataFrame) -> Section | None:
    """Twelve problems answered before and after: evenly spaced, first sample each, whatever the outcome."""
    table = completions.loc[completions["condition"].isin(["base", "steered"])]
    if "steered" in set(table["condition"]):
        asked = table.loc[table["condition"] == "steered", ["task", "split"]].iloc[0]
        table = table.loc[(table["task"] == asked["task"]) & (table["split"] == asked["split"])]
    first = table.sort_values(["seed", "sample"], kind="stable").drop_duplicates(["condition", "problem"])
    by_problem = {
        problem: {record["condition"]: record for record in part.to_dict("records")}
        for problem, part in first.groupby("problem", sort=True)
    }
    both = [problem for problem, sides in by_problem.items() if sides.keys() == {"base", "steered"}]
    if not both:
        return None
    count = min(_COMPARISONS, len(both))
    chosen = [both[index * len(both) // count] for index in range(count)]
    pairs = tuple(_comparison(by_problem[problem]) for problem in chosen)
    return Section(
        "Completions before and after",
        f"The first sample of {count} problems, evenly spaced over the {len(both)} evaluated, "
        "not chosen by outcome. The table covers all samples of these conditions.",
        tables=(_changes(table),),
        comparisons=pairs,
    )


def lens_section(lens: pd.DataFrame) -> Section:
    """What each vector points to in the vocabulary: a figure, and every layer's numbers folded below."""
    text = (
        "The unembedding read directly on each vector, without the final norm: tokens at the top become likelier "
        "where the vector survives to the output. Early layers' vectors pass through many blocks first, so what "
        "they show is a hint."
    )
    silent = lens.attrs.get("zero", [])
    note = f"Zero vectors, which point nowhere: {', '.join(silent)}." if silent else ""
    if lens.empty:
        return Section("Logit lens of the vectors", text, note=note)
    readout = "cosine" if "cosine" in set(lens["readout"]) else str(lens["readout"].iloc[0])
    places = sorted(set(zip(lens["site"], lens["layer"], strict=True)))
    folded = []
    for site, layer in places:
        part = lens.loc[(lens["site"] == site) & (lens["layer"] == layer) & (lens["rank"] < _LENS_RANKS)]
        top = part.loc[(part["readout"] == readout) & (part["end"] == "top")].sort_values("rank")
        folded.append((f"{site}.{layer}: {' · '.join(readable(t) for t in top['token'].head(6))}", _lens_table(part)))
    figure = lens_plots.logit_lens(lens, readout)
    return Section("Logit lens of the vectors", text, figures=(figure,), folded=tuple(folded), note=note)


def geometry_section(norms: pd.DataFrame, cosines: pd.DataFrame | None, dose: pd.DataFrame | None = None) -> Section:
    """Lengths, angles and the stable rank; lengths beside the stream's, where that was read."""
    largest = norms.loc[norms["norm"].idxmax()]
    text = f"The longest vector is at {largest['site']}.{largest['layer']} (‖s‖ = {largest['norm']:.3g})."
    figures = [geometry_plots.norms(norms)]
    if dose is not None:
        most, least = (dose.loc[dose["value"] == end].iloc[0] for end in (dose["value"].max(), dose["value"].min()))
        text += (
            f" Beside what its block writes on {most['n_texts']} texts (mean length over tokens, a text's first aside) "
            f"a vector is at most {most['value']:.2%} long, at layer {most['layer']}, and at least "
            f"{least['value']:.2%}, at layer {least['layer']}."
        )
        figures.append(geometry_plots.relative_dose(dose))
    tables: tuple[Table, ...] = ()
    if cosines is not None:
        between = cosines.loc[(cosines["layer_i"] < cosines["layer_j"]) & (cosines["site_i"] == cosines["site_j"])]
        known = between.dropna(subset=["cosine"])
        next_to = known.loc[known["layer_j"] - known["layer_i"] == 1, "cosine"].tolist()
        if next_to:
            text += (
                f" Vectors of neighbouring layers have a mean cosine of {_signed(fmean(next_to))}, "
                f"those of any two layers {_signed(fmean(known['cosine']))}."
            )
        spectrum = geometry.spectrum(norms, cosines)
        figures += [geometry_plots.cosines(cosines), geometry_plots.singular_values(spectrum)]
        rows = []
        for site, part in spectrum.groupby("site", sort=True):
            squares = [value**2 for value in part["singular_value"]]
            rank = f"{sum(squares) / max(squares):.2f}" if max(squares) else "— (all vectors are zero)"
            rows.append((str(site), str(len(part)), rank))
        caption = (
            "Stable rank Σσ²/σ₁²: 1 if all layers share one direction, the number of vectors if all are orthogonal."
        )
        tables = (Table(("site", "vectors", "stable rank"), tuple(rows), frozenset({1, 2}), caption),)
    return Section("Geometry of the vectors", text, figures=tuple(figures), tables=tables)


def _base_and_steered(scores: pd.DataFrame | None) -> tuple[dict, dict] | None:
    if scores is None:
        return None
    averages = scores.loc[scores["metric"].str.startswith("avg@")].to_dict("records")
    averages.sort(key=lambda record: record["split"] != "test")
    for steered in averages:
        for base in averages:
            same = all(steered[key] == base[key] for key in ("model", "task", "split", "metric", "temperature"))
            if same and (base["condition"], steered["condition"]) == ("base", "steered"):
                return base, steered
    return None


def _difference(base: dict, steered: dict, completions: pd.DataFrame | None) -> tuple[Interval, str]:
    """The gain and what its interval rests on; from completions only if they are those the scores were made of."""
    value = steered["value"] - base["value"]
    if completions is not None:
        same = (completions["task"] == steered["task"]) & (completions["split"] == steered["split"])
        try:
            paired = gain(completions.loc[same], metric=steered["metric"])
        except UsageError:  # a sample of the completions was kept, not the full grid
            paired = None
        if paired is not None and math.isclose(paired.value, value, abs_tol=1e-9):
            return paired, "paired over problems"
    low = value - math.hypot(steered["value"] - steered["low"], base["high"] - base["value"])
    high = value + math.hypot(steered["high"] - steered["value"], base["value"] - base["low"])
    return Interval(value, low, high), "from the two intervals"


def _comparison(sides: dict[str, dict]) -> Comparison:
    made = tuple(
        Side(
            condition=words(condition),
            text=sides[condition]["text"],
            reward=float(sides[condition]["reward"]),
            correct=bool(sides[condition]["correct"]),
            extracted=None if pd.isna(sides[condition]["extracted"]) else sides[condition]["extracted"],
            n_tokens=int(sides[condition]["n_tokens"]),
            finished=bool(sides[condition]["finished"]),
        )
        for condition in ("base", "steered")
    )
    return Comparison(sides["base"]["question"], sides["base"]["answer"], made)


def _changes(table: pd.DataFrame) -> Table:
    """How often the same problem and sample changed its verdict, and how the texts differ in form."""
    rows = []
    for condition in ("base", "steered"):
        part = table.loc[table["condition"] == condition]
        found = part["extracted"].notna().mean()
        shares = (part["correct"].mean(), found, part["finished"].mean())
        rows.append((condition, str(len(part)), *(_percent(s) for s in shares), f"{part['n_tokens'].mean():.1f}"))
    header = ("condition", "completions", "correct", "an answer was found", "ended by itself", "mean length (tokens)")
    return Table(header, tuple(rows), frozenset({1, 2, 3, 4, 5}))


def _lens_table(part: pd.DataFrame) -> Table:
    columns = [
        (readout, end)
        for readout in ("dot", "cosine", "softmax")
        for end in ("top", "bottom")
        if not part.loc[(part["readout"] == readout) & (part["end"] == end)].empty
    ]
    cells = {
        (r["readout"], r["end"], r["rank"]): f"{readable(r['token'])}  {r['score']:.3g}"
        for r in part.to_dict("records")
    }
    ranks = sorted(set(part["rank"]))
    rows = tuple((str(rank + 1), *(cells.get((*column, rank), "") for column in columns)) for rank in ranks)
    return Table(("rank", *(f"{readout}, {end}" for readout, end in columns)), rows, frozenset({0}))


def _interval(score: dict) -> str:
    return f"{_percent(score['value'])} [{_percent(score['low'])}, {_percent(score['high'])}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")
