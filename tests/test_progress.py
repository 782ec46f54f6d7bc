"""The progress line: what it says, one line per step in a log, one line redrawn on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from steerlab.progress import Progress, duration, step_line
from steerlab.training import StepDone

METRICS = {"reward": -0.25, "reward_ema": 0.125, "signal_share": 0.5, "tokens_per_s": 812.4, "wall_s": 2.0}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 s"), (59.6, "1 min 00 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 05 min"), (270e3, "3.1 days")],
)
def test_duration_reads_as_said(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_line_has_everything_a_person_waits_for() -> None:
    line = step_line(StepDone(3, 40, METRICS), pace_s=2.0)
    assert line == "step  4/40  reward -0.250  mean +0.125  signal 50% of groups  812 tokens/s  ETA 1 min 12 s"


def test_the_last_step_has_nothing_left() -> None:
    assert "ETA" not in step_line(StepDone(39, 40, METRICS), pace_s=2.0)


def test_a_log_gets_one_whole_line_per_step_and_no_control_codes() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=20)) as progress:
        progress.stage("training [bold]10[/bold] parameters")
        for step in range(5):
            progress.step(StepDone(step, 5, METRICS))
        progress.answered("base", 80)
    lines = file.getvalue().splitlines()
    assert len(lines) == 7
    assert lines[0] == "training [bold]10[/bold] parameters"
    assert [line[:8] for line in lines[1:6]] == [f"step {i}/5" for i in range(1, 6)]
    assert lines[6].strip() == "base: 80 completions"
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_a_log_line_is_there_before_the_next_step() -> None:
    class Recorder(io.StringIO):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1

    file = Recorder()
    progress = Progress(Console(file=file))
    progress.step(StepDone(0, 5, METRICS))
    assert file.flushes >= 1


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, force_terminal=True, width=120)) as progress:
        for step in range(5):
            progress.step(StepDone(step, 5, METRICS))
    shown = file.getvalue()
    assert "\x1b[2K" in shown
    assert shown.count("\n") == 1, "only the settled line ends in a new line"
    assert "step 5/5" in shown


def test_a_notice_is_a_line_of_its_own() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, force_terminal=True, width=120)) as progress:
        progress.step(StepDone(0, 5, METRICS))
        progress.notice("at most 512 tokens at a time from now on")
        progress.step(StepDone(1, 5, METRICS))
    assert "at most 512 tokens at a time from now on\n" in file.getvalue()


def test_the_pace_is_that_of_the_last_steps() -> None:
    file = io.StringIO()
    progress = Progress(Console(file=file, width=200))
    progress.step(StepDone(0, 100, {**METRICS, "wall_s": 1000.0}))
    for step in range(1, 11):
        progress.step(StepDone(step, 100, {**METRICS, "wall_s": 1.0}))
    assert file.getvalue().splitlines()[-1].endswith("ETA 1 min 29 s")
