"""reasoning-gym tasks: distinct texts, disjoint splits, stable ids, full scores for gold answers."""

import pytest

from steerlab.errors import UsageError
from steerlab.tasks import GymScore, make
from steerlab.tasks.workers import Worker


def test_one_digit_sums_are_exactly_200_and_split_disjointly():
    task = make("chain_sum")
    train, test = task.problems("train"), task.problems("test")
    assert (len(train), len(test)) == (100, 100)
    assert len({p.question for p in train + test}) == 200
    assert len({p.id for p in train + test}) == 200
    assert task.validate() == []
    with pytest.raises(UsageError, match="has 200 distinct problems"):
        make("chain_sum", train=101).problems("train")


def test_split_seed_moves_problems_between_splits_only():
    first, second = make("chain_sum"), make("chain_sum", split_seed=1)
    assert first.problems("test") != second.problems("test")

    def everything(task):
        return {(p.id, p.question) for s in ("train", "test") for p in task.problems(s)}

    assert everything(first) == everything(second)


def test_ids_do_not_move_with_sizes():
    small = {p.question: p.id for p in make("chain_sum", train=20, test=10).problems("train")}
    large = {p.question: p.id for s in ("train", "test") for p in make("chain_sum").problems(s)}
    assert small.items() <= large.items()


@pytest.mark.parametrize("name", ["basic_arithmetic", "leg_counting", "word_ladder", "gsm_symbolic", "power_function"])
def test_other_data_sets_validate(name):
    assert make(name, train=6, test=4).validate() == []


def test_data_set_without_gold_answers_says_so():
    failures = make("graph_color", train=2, test=1).validate()
    assert len(failures) == 3
    assert "no gold answer" in failures[0][1].note


def test_problems_do_not_depend_on_the_hash_seed(monkeypatch):
    drawn = []
    request = {"op": "draw", "dataset": "ransom_note", "parameters": "{}", "seed": 42, "wanted": 4}
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        worker = Worker("gym")
        drawn.append(worker.ask(request, 60.0))
        worker.kill()
    assert drawn[0] == drawn[1]
    assert len(drawn[0]["problems"]) == 4


def test_partial_credit_is_not_correct_and_the_last_number_is_read():
    task = make("gsm_symbolic", train=3, test=1)
    problem = task.problems("train")[0]
    good, bad, none = task.judge(
        [problem] * 3, [f"12345 hmm, so {problem.answer}.", f"{problem.answer} no, 98765", "?"]
    )
    assert good.correct and good.reward == 1.0
    assert not bad.correct and bad.reward == -1.0
    assert none.extracted is None and not none.correct
    tagged = GymScore(extract="tag")
    assert tagged.extracted(problem, "<answer>1</answer> <answer> 2 </answer>") == "2"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("chain_sun", {}, "did you mean chain_sum"),
        ("chain_sum", {"min_digit": 1}, "did you mean min_digits"),
        ("chain_sum", {"train": "x"}, "give it as int"),
        ("leg_counting", {"max_animal": 3}, "did you mean max_animals"),
        ("gym", {"dataset": "leg_countin"}, "did you mean leg_counting"),
        ("chain_sum", {"style": "chatt"}, "did you mean chat"),
        ("chain_sum", {"control": "random"}, "unknown control"),
        ("chain_sum", {"shots": 1.5}, "give it as int"),
        ("gym", {"extract": "numbers"}, "did you mean number"),
        ("chain_sum", {"verifier": "last"}, "unknown verifier"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "change these values"),
        ("chain_sum", {"train": 0, "test": 0}, "positive sizes"),
    ],
)
def test_bad_options_are_one_line(name, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        make(name, **options).problems("train")
    assert "\n" not in str(caught.value)
