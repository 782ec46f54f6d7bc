"""Tasks from files: formats, splits, errors that name file and line, and the benchmarks' field mappings."""

import gzip
import json
import os
from pathlib import Path

import pytest

from steerlab.errors import UsageError
from steerlab.tasks import make
from steerlab.tasks.evidence import equation_doubt, solution_doubt

SHARED = Path(os.environ.get("STEERLAB_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data folder")


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def sums(n):
    return [{"question": f"{i} + 1?", "answer": i + 1} for i in range(n)]


def test_user_file_is_split_disjointly(tmp_path):
    path = lines(tmp_path / "mine.jsonl", sums(20) + sums(3))
    task = make(path)
    train, test = task.problems("train"), task.problems("test")
    assert (len(train), len(test)) == (16, 4)
    assert len({p.question for p in train + test}) == 20
    assert all(p.question == f"{p.id} + 1?" for p in train + test)
    assert task.validate() == []
    assert make(path, split_seed=1).problems("test") != test
    assert len(make(path, train=5, test=3).problems("train")) == 5
    with pytest.raises(UsageError, match="20 distinct problems"):
        make(path, train=18, test=3).problems("train")


def test_a_changed_file_is_read_again(tmp_path):
    path = lines(tmp_path / "mine.jsonl", sums(10))
    assert len(make(path).problems("train")) == 8
    lines(tmp_path / "mine.jsonl", sums(20))
    assert len(make(path).problems("train")) == 16


def test_csv_with_other_columns_and_two_files(tmp_path):
    (tmp_path / "a.csv").write_text('q,gold\n"1, 2 or 3?",2\nsame?,1\n')
    (tmp_path / "b.csv").write_text("q,gold\nsame?,1\n")
    task = make(str(tmp_path / "a.csv"), question="q", answer="gold", test_path=str(tmp_path / "b.csv"))
    assert [p.question for p in task.problems("train")] == ["1, 2 or 3?"]
    assert [p.question for p in task.problems("test")] == ["same?"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"question": "x", "answer": 1}\n{"question": "y"}\n', "line 2 has no field 'answer'"),
        ("a.jsonl", b'{"question": "x", "answer": ""}\n', "line 1 has an empty answer"),
        ("a.jsonl", b'{"question": "x", "answer": 1}\n{"qu\n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"question,answer\n", "is empty"),
        ("a.csv", b"question,answer\nx,1\ny\n", "line 3 has not as many cells"),
        ("a.csv", b"question,answer\nx,1\n\xff,2\n", "line 3 is not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot read"),
        ("a.json", b'{"question": "x"}', "must be a list"),
        ("a.parquet", b"nothing", "not a parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        make(str(tmp_path / name)).problems("train")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_data_has_a_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("STEERLAB_DATA", raising=False)
    with pytest.raises(UsageError, match="STEERLAB_DATA"):
        make("gsm8k")
    with pytest.raises(UsageError, match="cannot read"):
        make("gsm8k", path=str(tmp_path / "none.jsonl")).problems("train")
    with pytest.raises(UsageError, match="give the folder"):
        make("gsm8k", path=str(tmp_path))
    with pytest.raises(UsageError, match="needs path="):
        make("records")
    (tmp_path / "gsm8k").mkdir()
    with gzip.open(tmp_path / "gsm8k" / "test.jsonl.gz", "wt") as file:
        file.write(json.dumps({"question": "q", "answer": "so <<2+1=3>>3\n#### 3"}) + "\n")
    monkeypatch.setenv("STEERLAB_DATA", str(tmp_path))
    assert make("gsm8k").problems("test")[0].answer == "3"
    with pytest.raises(UsageError, match="no train problems"):
        make("gsm8k").problems("train")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("math500", {"problem": "q", "solution": "s", "answer": r"\frac{1}{2}"}),
        ("deepscaler", {"problem": "q", "answer": r"\frac12", "solution": ""}),
        ("aime24", {"ID": "1", "Problem": "q", "Solution": "s", "Answer": 204}),
        ("aime25", {"question": "q", "answer": "70"}),
        ("amc23", {"problem": "q", "answer": 27.0}),
        ("minerva", {"problem": "q", "solution": r"so \boxed{\arcsin{1.3}}"}),
        ("olympiadbench", {"question": "q", "final_answer": ["$2$"], "answer": None}),
    ],
)
def test_benchmark_formats_validate(tmp_path, name, row):
    task = make(name, path=lines(tmp_path / "data.jsonl", [row]))
    split = "train" if name == "deepscaler" else "test"
    problem = task.problems(split)[0]
    assert problem.question == "q"
    assert task.validate() == []
    assert task.prompt(problem).style == "qwen_math"


def test_hub_without_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="path=") as caught:
        make("math500", path="hub").problems("test")
    assert "\n" not in str(caught.value)


def test_evidence_against_gold_answers():
    assert equation_doubt("( 4.0 - 2.0 ) + 3.0", "5") == ""
    assert "gives 5" in equation_doubt("( ( 4.0 - 2.0 ) + 3.0 )", "1")
    assert "cannot" in equation_doubt("__import__('os')", "1")
    assert solution_doubt("16/40 = $0.50\n#### 50", "50") == ""
    assert "last number is 64" in solution_doubt("48 + 16 = 64 points.\n#### 66", "66")


@shared
def test_shared_word_problems_validate_but_for_known_wrong_gold_answers():
    svamp = make("svamp", path=str(SHARED / "svamp"))
    assert [p.id for p, _ in svamp.validate()] == [679]
    gsm8k = make("gsm8k", path=str(SHARED / "gsm8k"))
    assert [p.id for p, _ in gsm8k.validate()] == [356, 786, 1154, 2770, 3334, 4796, 5350, 6157, 6760, 7444]
    mathematics = make("deepmind_mathematics", path=str(SHARED / "deepmind-mathematics"), test_split="[ie]*")
    assert mathematics.validate() == []
    assert len(mathematics.problems("train")) == 3300
    easy = make("deepmind_mathematics", path=str(SHARED / "deepmind-mathematics"), module="arithmetic__*")
    assert {str(p.entry["module"]).split("__")[0] for p in easy.problems("train")} == {"arithmetic"}


@shared
def test_shared_ifeval_strict_and_loose():
    task = make("ifeval", path=str(SHARED / "ifeval"), train=30, test=20)
    assert task.validate() == []
    problems = make("ifeval", path=str(SHARED / "ifeval")).problems("train")
    wanted = next(p for p in problems if p.entry["instruction_id_list"] == ["punctuation:no_comma"])
    texts = ["no commas here", "Sure, here it is:\nno commas here"]
    assert [j.correct for j in task.judge([wanted] * 2, texts)] == [True, False]
    loose = make("ifeval", path=str(SHARED / "ifeval"), mode="loose")
    assert [j.correct for j in loose.judge([wanted] * 2, texts)] == [True, True]
    with pytest.raises(UsageError, match="no gold answers"):
        task.few_shot(2)
