"""Problems from rows: which fields hold question and answer, which part of the answer is gold, and who is held out.

One file is split by seed; two files are taken as they are, and train problems whose text is also held out are
dropped. Texts are distinct in every split: the first row of each text is kept. Ids are row numbers from 0, so they do
not move with sizes.
"""

from __future__ import annotations

import fnmatch
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from steerlab.errors import UsageError
from steerlab.tasks.evidence import equation_doubt, solution_doubt
from steerlab.tasks.reading import Row, rows, stamp
from steerlab.tasks.task import Problem, Split
from steerlab.tasks.verifiers import last_boxed

Gold = Literal["whole", "after_hashes", "last_boxed", "none"]
HELD_OUT_SHARE = 0.2  # of a single file, where no size is given


@dataclass(frozen=True)
class Columns:
    """Names of the fields, the first present one counts; and which part of the answer is gold.

    "after_hashes" is what stands after the last #### (GSM8K), "last_boxed" the last `\\boxed{}` of a solution
    (Minerva), "none" a task without gold answers (IFEval). `working` says which working the rows carry, for
    `validate()`: the field "equation" (SVAMP), or a solution in the answer field (GSM8K).
    """

    question: tuple[str, ...] = ("question",)
    answer: tuple[str, ...] = ("answer",)
    gold: Gold = "whole"
    working: Literal["", "equation", "solution"] = ""


@dataclass(frozen=True)
class Place:
    """A file or hub data set, and the rows wanted of it: every (column, pattern) must match (shell patterns)."""

    path: str
    where: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Records:
    """Problems of the `train` and the `test` places; with `split`, all of them together are divided by `split_seed`.

    Sizes of 0 mean all there are (with `split`: a fifth held out); a smaller size is drawn with `split_seed`.
    """

    train: tuple[Place, ...] = ()
    test: tuple[Place, ...] = ()
    columns: Columns = Columns()
    train_size: int = 0
    test_size: int = 0
    split: bool = False
    split_seed: int = 0

    def load(self) -> Mapping[Split, tuple[Problem, ...]]:
        """Both splits. UsageError: file, field or size that cannot be had."""
        return _load(self, tuple(stamp(place.path) for place in self.train + self.test))

    def doubt(self, problem: Problem) -> str:
        """Why the row's own working speaks against its gold answer, or ""."""
        if self.columns.working == "equation" and "equation" in problem.entry:
            return equation_doubt(str(problem.entry["equation"]), problem.answer)
        if self.columns.working == "solution":
            solution = next((str(problem.entry[n]) for n in self.columns.answer if n in problem.entry), "")
            return solution_doubt(solution, problem.answer)
        return ""


@lru_cache(maxsize=32)
def _load(source: Records, _stamps: tuple[tuple[int, int], ...]) -> Mapping[Split, tuple[Problem, ...]]:
    train, test = (_problems(places, source.columns) for places in (source.train, source.test))
    if source.split:
        return _divided(source, train + test)
    held_out = {p.question for p in test}
    chosen: dict[Split, tuple[Problem, ...]] = {
        "train": _sized(
            tuple(p for p in train if p.question not in held_out), source.train_size, "train", source.split_seed
        ),
        "test": _sized(test, source.test_size, "test", source.split_seed),
    }
    return MappingProxyType(chosen)


def _divided(source: Records, problems: tuple[Problem, ...]) -> Mapping[Split, tuple[Problem, ...]]:
    n = len(problems)
    held = source.test_size or (n - source.train_size if source.train_size else max(1, round(n * HELD_OUT_SHARE)))
    train = source.train_size or n - held
    if train <= 0 or held <= 0 or train + held > n:
        raise UsageError(
            f"{source.train[0].path if source.train else source.test[0].path} has {n} distinct problems, too few for "
            f"{max(train, 1)} train + {max(held, 1)} test; ask for fewer"
        )
    shuffled = list(problems)
    random.Random(source.split_seed).shuffle(shuffled)
    return MappingProxyType({"train": tuple(shuffled[:train]), "test": tuple(shuffled[train : train + held])})


def _sized(problems: tuple[Problem, ...], size: int, split: str, seed: int) -> tuple[Problem, ...]:
    if size == 0 or size == len(problems):
        return problems
    if not 0 < size <= len(problems):
        raise UsageError(f"{size} {split} problems are asked for, but there are {len(problems)}; ask for fewer")
    chosen = sorted(random.Random(seed).sample(range(len(problems)), size))
    return tuple(problems[i] for i in chosen)


def _problems(places: tuple[Place, ...], columns: Columns) -> tuple[Problem, ...]:
    kept: dict[str, Problem] = {}
    offset = 0
    for place in places:
        for problem in _each(place, columns, offset):
            kept.setdefault(problem.question, problem)
        offset += len(rows(place.path))
    return tuple(kept.values())


def _each(place: Place, columns: Columns, offset: int) -> Iterable[Problem]:
    matched = False
    for number, (where, row) in enumerate(rows(place.path)):
        if not all(fnmatch.fnmatchcase(str(_field(where, row, (name,))), pattern) for name, pattern in place.where):
            continue
        matched = True
        question = _written(_field(where, row, columns.question)).strip()
        gold = "" if columns.gold == "none" else _gold(where, _field(where, row, columns.answer), columns.gold)
        if not question:
            raise UsageError(f"{where} has an empty question; fill it in or remove the row")
        yield Problem(offset + number, question, gold, row)
    if not matched:
        wanted = ", ".join(f"{name}={pattern}" for name, pattern in place.where)
        raise UsageError(f"{place.path} has no rows with {wanted}; choose other values")


def _field(where: str, row: Row, names: tuple[str, ...]) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    wanted = " or ".join(repr(n) for n in names)
    raise UsageError(
        f"{where} has no field {wanted} (it has {', '.join(map(str, row))}); name the fields with question=, answer="
    )


def _written(value: Any) -> str:
    """A field as text: lists of one element are that element, longer ones are joined by commas."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(_written(v) for v in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _gold(where: str, value: Any, gold: Gold) -> str:
    text = _written(value).strip()
    if gold == "after_hashes":
        _, marks, text = text.rpartition("####")
        if not marks:
            raise UsageError(f"{where} has no '#### answer' in its solution; is this the GSM8K format?")
        text = text.strip().replace(",", "")
    elif gold == "last_boxed":
        box = last_boxed(text)
        if box is None:
            raise UsageError(f"{where} has no \\boxed answer in its solution; is this the Minerva format?")
        text = box
    if not text:
        raise UsageError(f"{where} has an empty answer; fill it in or remove the row")
    return text
