"""Verifiers: what they read, what they accept, and that nothing hostile takes long."""

import concurrent.futures
import multiprocessing
import os
import time

import pytest

from steerlab.errors import UsageError
from steerlab.tasks import Boxed, Callback, FinalText, Function, LastNumber, MultipleChoice, Problem, Regex
from steerlab.tasks.numbers import last_number
from steerlab.tasks.verifiers import last_boxed


def says(verifier, gold, text):
    return verifier([Problem(0, "?", gold)], [text])[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4 - 7 = -3", "-3"),
        ("5-3", "3"),
        ("(2)-7", "7"),
        ("it is $1,234.50.", "1234.50"),
        ("12.", "12"),
        (".5", ".5"),
        ("−5", "-5"),
        ("half, 1/2", "1/2"),
        (r"$\frac{-3}{4}$", "-3/4"),
        ("1e3", "1e3"),
        ("10{,}000", "10000"),
        ("3,4", "4"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, found):
    assert last_number(text) == found


def test_last_number_compares_exactly():
    assert says(LastNumber(), "1234.5", "1,234.50").correct
    assert says(LastNumber(), "0.5", "1/2").correct
    assert not says(LastNumber(), "4", "8/2").correct, "a quotient leaves the sum to the verifier"
    assert not says(LastNumber(), "3", "3.0001").correct
    assert says(LastNumber(tolerance=1e-3), "3", "3.0001").correct
    assert not says(LastNumber(), "1", "1" * 5000).correct


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \{ b}", r"a \{ b"),
        (r"\boxed{7} and \boxed{unclosed", "7"),
        (r"\boxed{\text{\boxed{3}}}", "3"),
        ("none", None),
    ],
)
def test_last_boxed(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("(1,2)", "(2,1)", False),
        ("72", "73", False),
        ("-7", "-7", True),
        ("1000", "1,000", True),
    ],
)
def test_boxed_by_math_verify(gold, answer, right):
    assert says(Boxed(), gold, f"so \\boxed{{{answer}}}").correct is right


def test_boxed_needs_a_box_and_r1_a_tag():
    assert not says(Boxed(), "7", "the answer is 7").correct
    assert says(Boxed(tag=True), "7", "x</think> <answer> 7 </answer>").correct


def test_hostile_completions_are_bounded_in_time():
    hostile = ["9" + "^{9" * 9 + "}" * 9, "9^{9^{9^9}}", "(" * 900, r"\int" * 300, "1" * 1900 + "!"]
    verifier = Boxed(limit_s=1.0)
    verifier([Problem(0, "", "1/3")], [r"\boxed{1/2}"])
    start = time.monotonic()
    verdicts = verifier([Problem(0, "", "1/3")] * len(hostile), [f"\\boxed{{{h}}}" for h in hostile])
    assert time.monotonic() - start < 60
    assert not any(v.correct for v in verdicts)
    assert says(verifier, "1/3", r"\boxed{\frac{2}{6}}").correct, "the pool works on after a kill"
    slow = says(Regex(r"((a+)+)$", limit_s=1.0), "1", "a" * 40 + "b")
    assert not slow.correct and "time" in slow.note


def _in_process(queue):
    queue.put(says(Boxed(), "1/2", r"\boxed{0.5}").correct)


def test_boxed_from_threads_and_processes():
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda i: says(Boxed(), "1/2", f"\\boxed{{{i}/{2 * i}}}").correct, range(1, 9))
        assert all(answers)
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("spawn").Process(target=_in_process, args=(queue,))
    process.start()
    process.join(120)
    assert queue.get()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own_workers():
    assert says(Boxed(), "1/2", r"\boxed{0.50}").correct
    child = os.fork()
    if child == 0:
        os._exit(0 if says(Boxed(), "1/2", r"\boxed{3/6}").correct else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert says(Boxed(), "1/2", r"\boxed{4/8}").correct


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        (r"\boxed{\text{C}}", "C"),
        ("A dog barks. Answer: **D**", "D"),
        ("B", "B"),
        ("B) because", "B"),
        ("A dog barks.", None),
        ("I pick (A) no (E)", "E"),
    ],
)
def test_multiple_choice(text, letter):
    verdict = says(MultipleChoice(), "(b)", text)
    assert verdict.extracted == letter
    assert verdict.correct is (letter == "B")


def test_regex_and_final_text():
    assert says(Regex(r"= (\S+)"), "-3", "1 = 2, 4 - 7 = -3").correct
    assert says(Regex(r"= (\S+)"), "3", "= 3.0").correct
    with pytest.raises(UsageError, match="regular expression"):
        Regex("(")
    with pytest.raises(UsageError, match="groups"):
        Regex("a")
    assert says(FinalText(), "True", "Hm.\nThe answer is True.").correct
    assert says(FinalText(), "2, 5, 11", "2,5,11").correct
    assert not says(FinalText(), "True", "False").correct


def test_user_function_in_a_worker(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def same(text, answer, entry):\n    print('noise')\n    return text == answer\n"
        "def score(text, answer, entry):\n    return len(text) / 10\n"
        "def breaks(text, answer, entry):\n    return text.nothing\n"
        "def hangs(text, answer, entry):\n    while True: pass\n"
    )
    assert says(Function(f"{file}:same"), "7", "7").correct
    assert says(Function(f"{file}:score"), "7", "12345").reward == 0.5
    assert "time" in says(Function(f"{file}:hangs", limit_s=1.0), "7", "7").note
    with pytest.raises(UsageError, match="AttributeError"):
        says(Function(f"{file}:breaks"), "7", "7")
    with pytest.raises(UsageError, match="no file"):
        Function("nowhere.py:same")
    with pytest.raises(UsageError, match=r"file\.py:function"):
        Function("mine")


def test_callback_judges_the_batch():
    assert says(Callback(lambda problems, texts: [0.25 for _ in texts]), "", "x").reward == 0.25
    with pytest.raises(UsageError, match="finite"):
        says(Callback(lambda problems, texts: [float("nan")]), "", "x")
    with pytest.raises(UsageError, match="one for each"):
        says(Callback(lambda problems, texts: []), "", "x")
