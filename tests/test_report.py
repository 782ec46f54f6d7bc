"""The page of a run: complete, honest about absence, self-contained, deaf to what a model wrote."""

from __future__ import annotations

import html
import importlib.util
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from steerlab import report
from steerlab.errors import UsageError
from steerlab.interp import geometry
from steerlab.interp.logit_lens import logit_lens
from steerlab.models.sites import Site
from steerlab.report import Report, Section, Table
from steerlab.report.sections import headline
from steerlab.rollouts.statistics import summarise
from steerlab.runs import CostLedger, Run, atomic_write

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "\"quotes\" & 'more' `${x}` {{ 7 * 7 }} %{x}",
    "nul \x00 right-to-left \u202eevil\u202c mark \u200f separator \u2028",
    "<!-- comment ]]> <a href='javascript:window.hacked=1'>link</a>",
]


class Tokens:
    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.decode([ids])

    def decode(self, token_ids: list[int]) -> str:
        return HOSTILE[token_ids[0]] if token_ids[0] < len(HOSTILE) else f" t{token_ids[0]}"


def completions(n_problems: int = 15, samples: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"task": "sums", "split": "test", "condition": condition, "seed": 0, "problem": problem, "sample": sample}
        | {"question": f"What is {problem} + 1? {HOSTILE[0]}", "answer": str(problem + 1)}
        | {"text": HOSTILE[problem % len(HOSTILE)], "extracted": HOSTILE[1] if problem else None}
        | {"reward": 1.0 if (correct := bool(rng.random() < chance)) else -1.0, "correct": correct}
        | {"n_tokens": 4, "finished": True}
        for condition, chance in (("base", 0.1), ("steered", 0.9))
        for problem in range(n_problems)
        for sample in range(samples)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def run(tmp_path) -> Run:
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.randn(30, 8, generator=generator)
    vectors = {Site("resid_post", layer): unembedding[layer] for layer in range(5)}
    vectors[Site("resid_post", 5)] = torch.zeros(8)
    run = Run.create(tmp_path / "run", recipe="rloo", model="tiny", task=HOSTILE[0], seed=3, weights_sha256="ab" * 32)
    run.update(cost=CostLedger(rollout_s=2.0, update_s=1.0, tokens_completion=1234).to_dict())
    for step in range(6):
        run.log({"step": step, "reward": step / 6, "signal_share": 1 - step / 6, "wall_s": 1.0})
    run.save_table("completions", completions())
    run.save_table("scores", summarise(completions(), model="tiny", temperature=1.0))
    run.save_table("norms", geometry.norms(vectors))
    run.save_table("cosines", geometry.cosine_matrix(vectors))
    run.save_table("logit_lens", logit_lens(vectors, unembedding, Tokens(), k=5))
    return run


def test_page_has_every_section_and_no_way_out(run):
    page = report.from_run(run)
    for heading in ("Scores", "Learning curve", "Completions before", "Logit lens", "Geometry", "Cost", "What was run"):
        assert re.search(f"<h2>{heading}", page), heading
    assert page.count("plotly.js v") == 1 and len(page) < 6_000_000
    own = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)=["'](?!#)""", own) and "default-src &#39;none&#39;" in own
    assert own.count('<article class="pair">') == 12
    assert report.from_run(run) == page


def test_no_model_written_string_is_markup(run):
    page = report.from_run(run)
    assert "window.hacked = 1</script>" not in page and "<img" not in re.sub(
        r"<script[^>]*>.*?</script>", "", page, flags=re.S
    )
    assert html.escape(HOSTILE[0]) in page and "{{ 7 * 7 }}" in page
    assert not set("\x00\u202e\u202c\u200f\u2028") & set(re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.S))
    assert "⟨U+202E⟩" in page


def test_surrogates_and_markup_in_a_bare_report():
    figure = go.Figure(go.Bar(x=["</script>\ud800<!--"], y=[1]))
    made = Report("\ud800 <title>", "<b>")
    made.add(Section("a & b", figures=(figure,), tables=(Table(("<th>",), (("\udfff</td>",),)),)))
    made.add(None)
    page = made.html()
    page.encode("utf-8")
    assert "⟨U+D800⟩ &lt;title&gt;" in page and "⟨U+DFFF⟩&lt;/td&gt;" in page and 'href="#a-b"' in page
    assert "plotly" not in Report("text only").html().lower()


def test_an_empty_run_has_a_page(tmp_path):
    page = report.from_run(Run.create(tmp_path / "new"))
    assert "not been evaluated" in page and "<h2>What was run" in page and "<h2>Scores" not in page


def test_headline_is_the_paired_gain_and_says_when_there_is_none():
    table = completions()
    scores = summarise(table, model="m", temperature=1.0)
    by_name = scores[scores["metric"] == "avg@2"].set_index("condition")["value"]
    gain = 100 * (by_name["steered"] - by_name["base"])
    assert f"raised avg@2 on the 15 held-out problems of sums from {100 * by_name['base']:.1f} %" in headline(
        scores, table
    )
    assert f"a gain of {gain:+.1f} points" in headline(scores, table) and "paired over problems" in headline(
        scores, table
    )
    assert "from the two intervals" in headline(scores, None)
    assert "from the two intervals" in headline(scores, table[table["problem"] < 5])
    same = table.assign(correct=table["problem"] % 2 == 0)
    assert "did not measurably change" in headline(summarise(same, model="m", temperature=1.0), same)
    worse = table.assign(condition=table["condition"].map({"base": "steered", "steered": "base"}))
    assert "lowered" in headline(summarise(worse, model="m", temperature=1.0), worse)
    better = scores[scores["condition"] == "base"].assign(condition="few_shot", value=0.99)
    assert "not above the best other condition, few shot" in headline(pd.concat([scores, better]), table)


class Parsed(HTMLParser):
    """Names of all tags and attributes of a page, as a browser would read them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_coloured_tokens_are_data():
    tokens = [*HOSTILE, "\n", "\r\n", " next\t", "x" * 10_000, "\u202e{{ 7 * 7 }}", "\ud800", ""]
    values = [0.0, 0.5, 1.0, 2.0, -1.0, float("nan"), *([0.25] * 6)]
    made = report.coloured(HOSTILE[1], tokens, values, [f'" onmouseover="hacked {token}' for token in tokens], top=1.0)
    assert [colour for _, colour, _ in made.tokens] == [0, 0.5, 1, 1, -1, 0, *([0.25] * 6)]
    assert made.legend == ("−1", "1")
    bare = Report("tokens")
    bare.add(Section("Coloured", passages=(made,)))
    page = bare.html()
    page.encode("utf-8")
    body = page[page.index("<main>") :]
    spans = re.findall(r'<bdi(?: class="below")? style="--much:(\d\.\d{3})" title="([^"<>]*)">([^<>]*)</bdi>', body)
    assert len(spans) == len(tokens) and [float(much) for much, _, _ in spans[:5]] == [0, 0.5, 1, 1, 1]
    parsed = Parsed()
    parsed.feed(body)
    assert {"script", "img", "a"}.isdisjoint(parsed.tags) and parsed.attributes <= {
        "class",
        "id",
        "style",
        "title",
        "dir",
    }
    assert body.count('class="below"') == 1 and body.count("scale both") == 1
    assert not set("\x00\u202e\u202c\u200f\u2028\ud800") & set(body) and "⟨U+202E⟩{{ 7 * 7 }}" in body
    shown = [html.unescape(text) for _, _, text in spans]
    assert shown[0].startswith("</script><script>") and shown[5:8] == ["⏎\n", "⏎\n", " next⇥\t"]
    assert shown[8] == "x" * 47 + "…" and shown[9] == "⟨U+202E⟩{{ 7 * 7 }}" and shown[11] == ""
    up = report.coloured("up", ["a"], [0.3], ["b"], top=0.2, unit="nats")
    assert up.legend == ("0", "0.2 nats") and up.tokens == (("a", 1.0, "b"),)
    with pytest.raises(UsageError, match="2 tokens"):
        report.coloured("", ["a", "b"], [1.0], ["c"], top=1.0)
    with pytest.raises(UsageError, match="no colours"):
        report.coloured("", ["a"], [1.0], ["c"], top=0.0)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="the playwright package is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(run, width):
    from playwright.sync_api import sync_playwright

    path = run.path("report.html")
    atomic_write(path, report.from_run(run))
    said, asked = [], []
    with sync_playwright() as playwright:
        flags = [*FLAGS.split(), "--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        drawn = page.evaluate("[...document.querySelectorAll('.plot')].map(p => !!p.querySelector('svg.main-svg'))")
        hacked = page.evaluate("window.hacked === undefined")
        texts = page.locator(".said").all_inner_texts()
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        cells = page.evaluate(
            "[...document.querySelectorAll('.heatmap-label, .heatmaplayer text')].map(t => t.textContent)"
        )
        browser.close()
    assert said == [] and asked == [path.as_uri()] and hacked and overflow <= 0
    assert len(drawn) == 6 and all(drawn)
    assert HOSTILE[0] in texts and HOSTILE[1] in texts and any("⟨U+202E⟩evil" in text for text in texts)
    assert any(cell.startswith("</script>") for cell in cells)
