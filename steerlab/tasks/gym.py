"""Any reasoning-gym data set as a source of problems, with its difficulty parameters, and its own scorer as verifier.

reasoning-gym seeds overlap (item i of seed s is item i − 1 of seed s + 1), so train and held-out problems come from
ONE data set: indices are walked in order, the first problem of each distinct text is kept, and the kept ones are
split by `split_seed`. Partial credit is not kept: only a full score is correct. Drawing and scoring happen in a
worker process (fixed hash seed: some data sets depend on it; bounded time: some scorers run sympy on the completion).
Left out: reasoning-gym's curricula and `composite`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from steerlab.errors import UsageError, unknown
from steerlab.tasks.numbers import last_number, value
from steerlab.tasks.task import Problem, Split, Verdict
from steerlab.tasks.workers import START_S, pool

Parameter = str | int | float | bool | tuple
Parameters = tuple[tuple[str, Parameter], ...]
ONE_DIGIT_SUMS: Parameters = (("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 1))
_DRAW_S = 1800.0
_LONGEST_ANSWER = 20_000  # characters


@dataclass(frozen=True)
class Gym:
    """`train` + `test` distinct problems of one reasoning-gym data set, split by `split_seed`.

    `seed` chooses the data set's content, `split_seed` only who goes where. Problem ids are indices in the data set.
    """

    dataset: str = "chain_sum"
    parameters: Parameters = ONE_DIGIT_SUMS
    train: int = 100
    test: int = 100
    seed: int = 42
    split_seed: int = 0

    def load(self) -> Mapping[Split, tuple[Problem, ...]]:
        """Both splits. UsageError: unknown data set or parameter, or fewer distinct problems than asked for."""
        return _load(self)

    def doubt(self, problem: Problem) -> str:
        """Nothing: generated problems carry no working."""
        del problem
        return ""


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """All data sets that reasoning-gym registers."""
    return tuple((pool("gym").ask({"op": "names"}, START_S) or {}).get("names", ()))


@lru_cache(maxsize=128)
def parameter_names(dataset: str) -> tuple[str, ...]:
    """Difficulty parameters of a data set (its size and seed are ours to choose). UsageError if it is unknown."""
    if dataset not in names():
        raise unknown("reasoning-gym data set", dataset, names())
    return tuple((pool("gym").ask({"op": "parameters", "dataset": dataset}, START_S) or {}).get("names", ()))


@lru_cache(maxsize=32)
def _load(source: Gym) -> Mapping[Split, tuple[Problem, ...]]:
    if source.train < 0 or source.test < 0 or source.train + source.test == 0:
        raise UsageError(f"train={source.train}, test={source.test} asks for no problems; give positive sizes")
    wanted = source.train + source.test
    kept = list(_distinct(source.dataset, source.parameters, source.seed, wanted))
    if len(kept) < wanted:
        raise UsageError(
            f"{source.dataset} has {len(kept)} distinct problems with these parameters, fewer than "
            f"{source.train} train + {source.test} test; ask for fewer or make it harder"
        )
    random.Random(source.split_seed).shuffle(kept)
    return MappingProxyType({"train": tuple(kept[: source.train]), "test": tuple(kept[source.train : wanted])})


@lru_cache(maxsize=32)
def _distinct(dataset: str, parameters: Parameters, seed: int, wanted: int) -> tuple[Problem, ...]:
    """The first `wanted` problems with texts all different, in order of index; fewer where the texts run out."""
    known = parameter_names(dataset)
    for name, _ in parameters:
        if name not in known:
            raise unknown(f"parameter of {dataset}", name, known)
    request = {"op": "draw", "dataset": dataset, "parameters": _written(parameters), "seed": seed, "wanted": wanted}
    answer = pool("gym").ask(request, _DRAW_S)
    if answer is None:
        raise UsageError(
            f"{dataset} did not make {wanted} problems within {_DRAW_S:.0f} s; ask for fewer or easier ones"
        )
    reason = answer.get("refused") or answer.get("error")
    if reason:
        raise UsageError(f"{dataset} cannot be made with {dict(parameters)}: {reason}; change these values")
    return tuple(Problem(i, q, "" if a is None else str(a), m) for i, q, a, m in answer["problems"])


def _written(parameters: Parameters) -> str:
    return json.dumps(dict(parameters), sort_keys=True)


@dataclass(frozen=True)
class GymScore:
    """reasoning-gym's own scorer on an answer that we extract; only the full score of 1 is correct.

    `extract`: "number" is the last number, "tag" the last <answer>…</answer>, "text" the whole completion; "auto"
    takes the tag if there is one, else the last number where the gold answer is a number, else the whole completion.
    `dataset`, `parameters` and `seed` must be those of the source: the scorer is given the problem of that index.
    """

    dataset: str = "chain_sum"
    parameters: Parameters = ONE_DIGIT_SUMS
    seed: int = 42
    extract: Literal["auto", "number", "tag", "text"] = "auto"
    limit_s: float = 10.0

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in order."""
        answers = [self.extracted(p, t) for p, t in zip(problems, texts, strict=True)]
        common = {"op": "score", "dataset": self.dataset, "parameters": _written(self.parameters), "seed": self.seed}
        scored = pool("gym").ask_all(
            [
                {**common, "index": p.id, "answer": (a or "")[:_LONGEST_ANSWER]}
                for p, a in zip(problems, answers, strict=True)
            ],
            self.limit_s,
        )
        return [_verdict(s, a) for s, a in zip(scored, answers, strict=True)]

    def extracted(self, problem: Problem, text: str) -> str | None:
        """The answer in a completion, or None."""
        _, tag, rest = text.rpartition("<answer>")
        if self.extract in ("auto", "tag") and tag:
            return rest.partition("</answer>")[0].strip() or None
        if self.extract == "tag":
            return None
        if self.extract == "number" or (self.extract == "auto" and value(problem.answer) is not None):
            return last_number(text)
        return text.strip() or None

    def solved(self, problem: Problem) -> str:
        """The gold answer, in the tag if only the tag is read."""
        return f"<answer>{problem.answer}</answer>" if self.extract == "tag" else problem.answer


def _verdict(scored: Mapping | None, answer: str | None) -> Verdict:
    if scored is None:
        return Verdict(False, answer, "scorer ran out of time")
    note = scored.get("note") or scored.get("error") or ""
    return Verdict(bool(scored["correct"]) and answer is not None, answer, str(note))
