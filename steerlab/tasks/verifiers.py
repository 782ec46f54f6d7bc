r"""What a right answer is: last number, last `\boxed{}`, a letter, a pattern, the last line, or a function of the
user's.

Each verifier is a frozen dataclass called with problems and completions in batches. Whatever could take unbounded
time on a hostile completion (symbolic checks, patterns, user code) runs in `workers`; the rest is linear in the text.
core.md §2: the papers compare `\boxed{gold}` with the last `\boxed{…}` by math-verify, and wrap the last <answer> of
the r1 template in a box first; no box means wrong. Known limits of math-verify 0.9: it says `50\%` ≠ `1/2`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlab.errors import UsageError
from steerlab.tasks.numbers import last_number, same, value
from steerlab.tasks.task import Problem, Verdict
from steerlab.tasks.workers import pool

_LONGEST_BOX = 2_000  # characters; a longer one is refused, not checked
_LONGEST_TEXT = 50_000
_LATE = "checking ran out of time"


@dataclass(frozen=True)
class LastNumber:
    """The last number in the completion, compared exactly (or within a relative `tolerance`)."""

    tolerance: float = 0.0

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order."""
        verdicts = []
        for problem, text in zip(problems, texts, strict=True):
            found = last_number(text)
            verdicts.append(Verdict(found is not None and same(problem.answer, found, self.tolerance), found))
        return verdicts

    def solved(self, problem: Problem) -> str:
        """The gold number."""
        return problem.answer


@dataclass(frozen=True)
class Boxed:
    r"""The last `\boxed{…}`, compared by math-verify within `limit_s`; with `tag`, the last <answer>…</answer> counts
    as a box.
    """

    tag: bool = False
    limit_s: float = 5.0

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order."""
        answers = [self._extracted(t) for t in texts]
        verdicts = [_judge_plainly(p.answer, a) for p, a in zip(problems, answers, strict=True)]
        asked = [i for i, v in enumerate(verdicts) if v is None]
        found = pool("math").ask_all(
            [{"op": "math", "gold": problems[i].answer, "answer": answers[i]} for i in asked], self.limit_s
        )
        for i, reply in zip(asked, found, strict=True):
            note = _LATE if reply is None else str(reply.get("note") or reply.get("error") or "")
            verdicts[i] = Verdict(reply is not None and reply["correct"], answers[i], note)
        return [v for v in verdicts if v is not None]

    def solved(self, problem: Problem) -> str:
        """The gold answer in a box, or in the tag."""
        return f"<answer>{problem.answer}</answer>" if self.tag else f"\\boxed{{{problem.answer}}}"

    def _extracted(self, text: str) -> str | None:
        if self.tag and "<answer>" in text:
            return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
        return last_boxed(text)


def _judge_plainly(gold: str, answer: str | None) -> Verdict | None:
    """What needs no symbolic check: no box, an oversized box, two plain integers."""
    if answer is None:
        return Verdict(False, None)
    if len(answer) > _LONGEST_BOX:
        return Verdict(False, answer[:_LONGEST_BOX], f"answer longer than {_LONGEST_BOX} characters")
    if re.fullmatch(r"-?\d{1,18}", gold) and re.fullmatch(r"-?\d{1,18}", answer):
        return Verdict(int(gold) == int(answer), answer)
    return None


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{…}` (or `\fbox{…}`), nested braces included; None without one."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text[-_LONGEST_TEXT:])]):
        body, depth = text[-_LONGEST_TEXT:], 1
        for brace in re.finditer(r"\\.|[{}]", body[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return body[start : start + brace.start()].strip()
    return None


@dataclass(frozen=True)
class MultipleChoice:
    r"""One letter: in the last `\boxed{}`, after "answer is" or "answer:", in brackets, or alone on the last line."""

    letters: str = "ABCDE"

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order."""
        verdicts = []
        for problem, text in zip(problems, texts, strict=True):
            found = self._extracted(text[-_LONGEST_TEXT:])
            verdicts.append(Verdict(found is not None and found == self._letter(problem.answer), found))
        return verdicts

    def solved(self, problem: Problem) -> str:
        """The gold letter."""
        return self._letter(problem.answer)

    def _letter(self, answer: str) -> str:
        return answer.strip(" ().").upper()

    def _extracted(self, text: str) -> str | None:
        letter = f"[{re.escape(self.letters)}]"
        box = last_boxed(text)
        if box is not None:
            bare = re.sub(r"\\text(?:bf)?|[{}()\s.$]", "", box)
            return bare if re.fullmatch(letter, bare) else None
        for pattern in (rf"(?i:answer)\s*(?i:is)?\s*:?\s*[*$]*\(?({letter})\b", rf"\(({letter})\)"):
            found = re.findall(pattern, text)
            if found:
                return found[-1]
        last_line = text.strip().rpartition("\n")[2]
        alone = re.match(rf"\W*({letter})(?:\W*$|[).:])", last_line)
        return alone.group(1) if alone else None


@dataclass(frozen=True)
class Regex:
    """The last match of `pattern`, its `group`; equal to the gold answer as text, or as a number.

    `shown` says how a right completion looks, with {answer} in it (few-shot examples, validation).
    """

    pattern: str
    group: int = 1
    shown: str = "{answer}"
    limit_s: float = 5.0

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UsageError(f"pattern {self.pattern!r} is not a regular expression: {error}; correct it") from error
        if not 0 <= self.group <= groups:
            raise UsageError(
                f"pattern {self.pattern!r} has {groups} groups, not {self.group}; put ( ) round the answer"
            )

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order."""
        found = pool("regex").ask_all(
            [{"op": "regex", "pattern": self.pattern, "group": self.group, "text": t} for t in texts], self.limit_s
        )
        verdicts = []
        for problem, reply in zip(problems, found, strict=True):
            answer = None if reply is None else reply.get("extracted")
            note = _LATE if reply is None else str(reply.get("error", ""))
            verdicts.append(Verdict(answer is not None and _equal(problem.answer, answer), answer, note))
        return verdicts

    def solved(self, problem: Problem) -> str:
        """The gold answer in `shown`."""
        return self.shown.replace("{answer}", problem.answer)


@dataclass(frozen=True)
class FinalText:
    r"""The last `\boxed{}`, else what follows the last "answer is" or "answer:", else the last line; compared as text.

    For short answers of any kind ("True", "2, 5, 11", "6*d"): blanks, a final full stop and $ signs do not count,
    numbers are compared as numbers.
    """

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order."""
        verdicts = []
        for problem, text in zip(problems, texts, strict=True):
            found = self._extracted(text[-_LONGEST_TEXT:])
            verdicts.append(Verdict(found is not None and _equal(problem.answer, found), found))
        return verdicts

    def solved(self, problem: Problem) -> str:
        """The gold answer."""
        return problem.answer

    def _extracted(self, text: str) -> str | None:
        box = last_boxed(text)
        if box is not None:
            return box
        last_line = text.strip().rpartition("\n")[2]
        return re.split(r"(?i)\banswer(?:\s+is\b|\s*:)\s*:?", last_line)[-1].strip() or None


def _equal(gold: str, answer: str) -> bool:
    def bare(text: str) -> str:
        return re.sub(r"[\s$]+", "", text).rstrip(".")

    if bare(gold) == bare(answer):
        return True
    return value(gold) is not None and same(gold, answer.strip())


@dataclass(frozen=True)
class Function:
    """The user's own judge, as "file.py:function" (called in a bounded worker, one completion at a time).

    The function takes (completion, gold answer, entry of the data set) and returns a bool (then the task's rewards are
    paid) or a number (which is the reward; `correct_from` and above count as correct).
    """

    target: str
    correct_from: float = 1.0
    limit_s: float = 30.0

    def __post_init__(self) -> None:
        file, _, name = self.target.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise UsageError(f"verifier {self.target!r} is not of the form file.py:function; write it so")
        if not Path(file).is_file():
            raise UsageError(f"there is no file {file}; give the path of the verifier's Python file")

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order. UsageError where the function fails: a fault in it must not look like a wrong answer."""
        file, _, name = self.target.rpartition(":")
        where = {"op": "function", "file": str(Path(file).resolve()), "name": name}
        found = pool("function").ask_all(
            [
                {**where, "text": t, "answer": p.answer, "entry": dict(p.entry)}
                for p, t in zip(problems, texts, strict=True)
            ],
            self.limit_s,
            remember=False,
        )
        return [self._verdict(reply) for reply in found]

    def solved(self, problem: Problem) -> str:
        """The gold answer."""
        return problem.answer

    def _verdict(self, reply: dict[str, Any] | None) -> Verdict:
        if reply is None:
            return Verdict(False, None, _LATE)
        if "error" in reply:
            raise UsageError(f"verifier {self.target} failed: {reply['error']}; correct the function")
        return scored(reply["value"], self.correct_from, self.target)


@dataclass(frozen=True)
class Callback:
    """A Python callable that judges a whole batch: (problems, completions) → bools or rewards. For reward models.

    It runs in this process, unbounded, and cannot be stored in a run's manifest (`Function` can).
    """

    function: Callable[[Sequence[Problem], Sequence[str]], Sequence[bool | float]]
    correct_from: float = 1.0

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order."""
        values = self.function(problems, texts)
        if len(values) != len(texts):
            raise UsageError(
                f"the scorer returned {len(values)} values for {len(texts)} completions; return one for each"
            )
        return [scored(v, self.correct_from, "the scorer") for v in values]

    def solved(self, problem: Problem) -> str:
        """The gold answer."""
        return problem.answer


def scored(value_: bool | float, correct_from: float, who: str) -> Verdict:
    """A verdict from what a scorer returned."""
    if isinstance(value_, bool):
        return Verdict(value_, None)
    number = float(value_)
    if not math.isfinite(number):
        raise UsageError(f"{who} returned {number}; a reward must be a finite number")
    return Verdict(number >= correct_from, None, reward=number)
