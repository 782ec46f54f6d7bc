"""The public benchmarks: their files and hub names, the fields that hold question and answer, and their verifiers.

Hub names of the mathematics benchmarks are the core papers' (core.md §3). The local names are those of a folder of
data as `STEERLAB_DATA` or `path=` may give it (`gsm8k/train.jsonl.gz`, …). Left out: the data themselves, and code
benchmarks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steerlab.corpus import DATA_VARIABLE
from steerlab.errors import UsageError
from steerlab.tasks.ifeval import Follows
from steerlab.tasks.reading import HUB, SUFFIXES
from steerlab.tasks.records import Columns, Place, Records
from steerlab.tasks.task import Layout, ProblemSet, Verifier
from steerlab.tasks.verifiers import Boxed, FinalText, LastNumber

Where = tuple[tuple[str, str], ...]
_CHAT = Layout()


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is stored. `train` and `test` are file stems in `folder`, empty where it has no such split.

    `split`: one file, divided by seed, unless the hub has both splits. Hub places are "repository:config:split".
    """

    folder: str
    train: str
    test: str
    hub_train: tuple[str, ...]
    hub_test: tuple[str, ...]
    columns: Columns
    verifier: Verifier
    layout: Layout = _CHAT
    split: bool = False


_MATH = Columns(("problem", "question", "Problem"), ("answer", "Answer", "final_answer"))
_BOXED = Boxed()
_QWEN = Layout(style="qwen_math")

BENCHMARKS: Mapping[str, Benchmark] = {
    "gsm8k": Benchmark(
        "gsm8k", "train", "test", ("openai/gsm8k:main:train",), ("openai/gsm8k:main:test",),
        Columns(gold="after_hashes", working="solution"), LastNumber(),
    ),
    "svamp": Benchmark(
        "svamp", "", "svamp", ("ChilleD/SVAMP::train",), ("ChilleD/SVAMP::test",),
        Columns(("question", "question_concat"), ("answer", "Answer"), working="equation"), LastNumber(), split=True,
    ),
    "deepmind_mathematics": Benchmark(
        "deepmind-mathematics", "sample", "sample", (), (), Columns(), FinalText(),
    ),
    "math500": Benchmark("math500", "", "test", (), ("HuggingFaceH4/MATH-500::test",), _MATH, _BOXED, _QWEN),
    "deepscaler": Benchmark(
        "deepscaler", "train", "", ("agentica-org/DeepScaleR-Preview-Dataset::train",), (), _MATH, _BOXED, _QWEN
    ),
    "aime24": Benchmark("aime24", "", "test", (), ("Maxwell-Jia/AIME_2024::train",), _MATH, _BOXED, _QWEN),
    "aime25": Benchmark(
        "aime25", "", "test", (), ("opencompass/AIME2025:AIME2025-I:test", "opencompass/AIME2025:AIME2025-II:test"),
        _MATH, _BOXED, _QWEN,
    ),
    "amc23": Benchmark("amc23", "", "test", (), ("knoveleng/AMC-23::train",), _MATH, _BOXED, _QWEN),
    "minerva": Benchmark(
        "minerva", "", "test", (), ("knoveleng/Minerva-Math::train",),
        Columns(("problem", "question"), ("solution",), "last_boxed"), _BOXED, _QWEN,
    ),
    "olympiadbench": Benchmark(
        "olympiadbench", "", "test", (), ("knoveleng/OlympiadBench::train",), _MATH, _BOXED, _QWEN
    ),
    "ifeval": Benchmark(
        "ifeval", "", "input_data", (), ("google/IFEval::train",),
        Columns(("prompt",), gold="none"), Follows(), split=True,
    ),
}  # fmt: skip


def benchmark(
    name: str,
    path: str = "",
    train: int = 0,
    test: int = 0,
    split_seed: int = 0,
    split: bool = False,
    train_where: Where = (),
    test_where: Where = (),
) -> ProblemSet:
    """The task of a benchmark; sizes of 0 take all there is. UsageError where its data are not found.

    One file for both splits is divided by `split_seed`, unless `train_where` and `test_where` tell its rows apart;
    `split` divides a benchmark that has only one of the two.
    """
    made = BENCHMARKS[name]
    train_paths, test_paths = _paths(name, made, path or _default_folder(name, made))
    train_places = tuple(Place(p, train_where) for p in train_paths)
    test_places = tuple(Place(p, test_where) for p in test_paths)
    if train_places == test_places:
        train_places, split = (), True
    elif train_places and test_places:
        split = False
    else:
        split = split or made.split
    source = Records(train_places, test_places, made.columns, train, test, split, split_seed)
    return ProblemSet(name, source, made.verifier, made.layout)


def _paths(name: str, made: Benchmark, found: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where train and test problems are read from; a single file or hub data set serves both."""
    if found == HUB.rstrip(":"):
        if not made.hub_train and not made.hub_test:
            raise UsageError(f"{name} is on no hub; give its file or folder as path=")
        return tuple(HUB + p for p in made.hub_train), tuple(HUB + p for p in made.hub_test)
    if found.startswith(HUB) or not Path(found).is_dir():
        one = found if found.startswith(HUB) else str(Path(found).absolute())
        return (one,) if made.train else (), (one,) if made.test else ()
    folder = Path(found).absolute()
    train, test = _files(folder, made.train), _files(folder, made.test)
    if not train and not test:
        raise UsageError(
            f"{found} has no {made.test or made.train}.jsonl (.csv, .gz); give the folder or file of {name}"
        )
    return train, test


def _files(folder: Path, stem: str) -> tuple[str, ...]:
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if stem and (folder / f"{stem}{suffix}").is_file()]
    return (str(found[0]),) if found else ()


def _default_folder(name: str, made: Benchmark) -> str:
    root = os.environ.get(DATA_VARIABLE, "")
    if root and (Path(root) / made.folder).is_dir():
        return str(Path(root) / made.folder)
    hub = " (path=hub downloads it)" if made.hub_train or made.hub_test else ""
    raise UsageError(
        f"no data for {name}; give its file or folder as path={hub}, "
        f"or set {DATA_VARIABLE} to the folder that holds {made.folder}/"
    )
