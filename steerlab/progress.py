"""What a person sees while a run goes on: one live line on a terminal, plain lines in a log.

`Progress` is a `Reporter`. The line has the step, the reward (or the loss) and its moving mean, the share of groups
with a signal, tokens per second, and the time that the remaining steps will take at the pace of the last ones. A log
gets at most one line per step, complete and flushed. Left out: pictures, and anything that decides.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from steerlab.training import StepDone

PACE_STEPS = 10  # as many as the moving mean of the reward looks back


@runtime_checkable
class Reporter(Protocol):
    """Hears what a run is doing; decides nothing."""

    def stage(self, text: str) -> None: ...

    def step(self, done: StepDone) -> None: ...

    def notice(self, text: str) -> None: ...

    def answered(self, condition: str, completions: int) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str) -> None: ...

    def step(self, done: StepDone) -> None: ...

    def notice(self, text: str) -> None: ...

    def answered(self, condition: str, completions: int) -> None: ...


class Progress:
    """Use it in a `with`; what it shows stays on the console afterwards as one last line per stage.

    console: where to show it. On a terminal the step's line is redrawn in place, elsewhere every step is a line.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console()
        self.console = console
        self.live: Live | None = None
        self.walls: deque[float] = deque(maxlen=PACE_STEPS)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()

    def stage(self, text: str) -> None:
        """A new part of the run begins."""
        self.settle()
        self.say(text)

    def step(self, done: StepDone) -> None:
        """A training step is finished."""
        self.walls.append(done.metrics["wall_s"])
        line = step_line(done, sum(self.walls) / len(self.walls))
        if not self.console.is_terminal:
            self.say(line)
            return
        if self.live is None:
            self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self.live.start()
        self.live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def notice(self, text: str) -> None:
        """Something that a person should know and need not act on."""
        self.settle()
        self.say(text)

    def answered(self, condition: str, completions: int) -> None:
        """One condition of an evaluation is finished."""
        self.settle()
        self.say(f"  {condition}: {completions} completions")

    def settle(self) -> None:
        """Leave the live line as it is and go on below it."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        """One whole line, whatever its length, without markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


def step_line(done: StepDone, pace_s: float) -> str:
    """One step in one line; `pace_s` is seconds per step of late. Numbers a source does not report are left out."""
    m = done.metrics
    shown = [f"step {done.step + 1:>{len(str(done.steps))}}/{done.steps}"]
    shown += [f"reward {m['reward']:+.3f}"] if "reward" in m else []
    shown += [f"mean {m['reward_ema']:+.3f}"] if "reward_ema" in m else []
    shown += [f"loss {m['loss']:.4f}  mean {m['loss_ema']:.4f}"] if "loss_ema" in m else []
    shown += [f"signal {m['signal_share']:.0%} of groups"] if "signal_share" in m else []
    shown += [f"{m['tokens_per_s']:.0f} tokens/s"] if "tokens_per_s" in m else []
    left = done.steps - done.step - 1
    shown += [f"ETA {duration(pace_s * left)}"] if left else []
    return "  ".join(shown)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min, 3.1 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"
