"""IFEval: instructions that a program can check, strict and loose, through the package if-verifiable.

"strict" wants every instruction of a prompt followed by the completion as it is; "loose" also tries it without its
first or last line and without asterisks (Zhou et al. 2023, arXiv:2311.07911). The package reads nltk's punkt_tab data
for two kinds of instruction; without that download the worker uses nltk's rules alone, and says so in the note where
sentences are counted. Left out: the share of instructions followed as a reward (a Callback can pay it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from steerlab.tasks.task import Problem, Verdict
from steerlab.tasks.workers import pool


@dataclass(frozen=True)
class Follows:
    """Correct if all instructions of the prompt are followed. `extracted` is the completion itself."""

    mode: Literal["strict", "loose"] = "strict"
    limit_s: float = 20.0

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order; a note that begins "bad problem" says that its instructions cannot be checked."""
        found = pool("ifeval").ask_all(
            [
                {
                    "op": "ifeval",
                    "ids": p.entry["instruction_id_list"],
                    "options": p.entry["kwargs"],
                    "prompt": p.question,
                    "text": t,
                }
                for p, t in zip(problems, texts, strict=True)
            ],
            self.limit_s,
        )
        verdicts = []
        for reply, text in zip(found, texts, strict=True):
            if reply is None:
                verdicts.append(Verdict(False, text or None, "checking ran out of time"))
            elif "error" in reply:
                verdicts.append(Verdict(False, text or None, f"bad problem: {reply['error']}"))
            else:
                verdicts.append(Verdict(bool(reply[self.mode]), text or None, str(reply["note"])))
        return verdicts

    def solved(self, problem: Problem) -> None:
        """IFEval has no gold answers."""
        del problem
