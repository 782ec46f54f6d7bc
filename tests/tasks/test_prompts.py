"""Prompts in every style, few-shot examples, and the controls."""

import pytest

from steerlab.errors import UsageError
from steerlab.models import tiny
from steerlab.tasks import FormatOnlyReward, RandomReward, encode, make


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.model("llama").tokenizer


def written(task, problem, tokenizer):
    return tokenizer.decode(encode(task.prompt(problem), tokenizer))


def test_every_style_contains_the_question_and_ends_where_the_answer_begins(tokenizer):
    question = make("chain_sum").problems("test")[0]
    texts = {s: written(make("chain_sum", style=s), question, tokenizer) for s in ("chat", "plain", "qwen_math", "r1")}
    assert all(question.question in text for text in texts.values())
    assert texts["plain"].endswith(question.question)
    assert texts["r1"].endswith("Assistant: <think>")
    assert "\\boxed{}" in texts["qwen_math"]
    turns = [{"role": "user", "content": question.question}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert texts["chat"] == expected


def test_system_and_instruction_are_written(tokenizer):
    task = make("chain_sum", system="Be brief.", instruction="\nOnly the number.")
    text = written(task, task.problems("test")[0], tokenizer)
    assert "Be brief." in text and "=\nOnly the number." in text


def test_tokenizer_without_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    task = make("chain_sum")
    problem = task.problems("test")[0]
    with pytest.raises(UsageError, match="style plain"):
        encode(task.prompt(problem), tokenizer)
    text = written(make("chain_sum", style="qwen_math"), problem, tokenizer)
    assert text.endswith("Assistant:") and "User: " in text


def test_few_shot_shows_train_problems_only_and_never_the_question_itself():
    task = make("chain_sum").few_shot(4, seed=3)
    held_out = {p.question for p in task.problems("test")}
    for problem in task.problems("train") + task.problems("test"):
        messages = task.prompt(problem).messages
        assert [m.role for m in messages] == ["user", "assistant"] * 4 + ["user"]
        shown = {m.content for m in messages[:-1:2]}
        assert len(shown) == 4 and not shown & held_out and problem.question not in shown
        assert messages[-1].content == problem.question
    train = {p.question: f"The answer is {p.answer}." for p in task.problems("train")}
    assert all(train[q.content] == a.content for q, a in zip(messages[:-1:2], messages[1::2], strict=True))
    assert task.few_shot(4, seed=3) == task and task.few_shot(4, seed=4).prompt(problem) != task.prompt(problem)
    with pytest.raises(UsageError, match="ask for fewer"):
        make("chain_sum", train=3).few_shot(3)
    with pytest.raises(UsageError, match=r"may use .*expression"):
        make("chain_sum", solution="{result}").few_shot(1).prompt(problem)


def test_reward_pairs():
    task = make("chain_sum", wrong=0.0)
    problem = task.problems("train")[0]
    assert [j.reward for j in task.judge([problem] * 2, [problem.answer, "x"])] == [1.0, 0.0]


def test_random_reward_ignores_the_answer_and_repeats():
    task = make("chain_sum", control="random_reward", control_p=0.3)
    assert isinstance(task, RandomReward)
    problems = task.problems("train") * 10
    texts = [p.answer for p in problems]
    judged = task.judge(problems, texts)
    assert all(j.correct for j in judged)
    assert 0.25 < sum(j.reward == 1.0 for j in judged) / len(judged) < 0.35
    assert task.judge(problems, texts) == judged
    again = task.judge(problems, [*texts[:-1], "other"])
    assert [j.reward for j in again] != [j.reward for j in judged]


def test_format_only_reward_pays_the_form():
    bare = make("chain_sum", control="format_only_reward")
    assert isinstance(bare, FormatOnlyReward)
    problem = bare.problems("train")[0]
    texts = ["999", "-999.", "it is 999", "x", problem.answer]
    judged = bare.judge([problem] * 5, texts)
    assert [j.reward for j in judged] == [1, 1, -1, -1, 1]
    assert [j.correct for j in judged] == [False, False, False, False, True]
    found = make("chain_sum", control="format_found_reward").judge([problem] * 5, texts)
    assert [j.reward for j in found] == [1, 1, 1, -1, 1]
    assert bare.few_shot(2).task.layout.shots == 2


def test_tasks_survive_the_codec():
    from steerlab import runs

    for options in ({}, {"control": "random_reward"}, {"verifier": "boxed", "style": "r1", "shots": 2}):
        task = make("chain_sum", **options)
        again = runs.decode(runs.encode(task))
        assert again == task and again.problems("test") == task.problems("test")


def test_an_opened_answer_is_asked_and_judged_with_its_opening(tokenizer):
    task = make("chain_sum")
    opened = task.opened("It is 1")
    problem = task.problems("test")[0]
    plain, asked = (encode(one.prompt(problem), tokenizer) for one in (task, opened))
    assert asked == [*plain, *tokenizer.encode("It is 1", add_special_tokens=False)]
    assert opened.judge([problem], ["2."])[0].extracted == "12"
    assert make("chain_sum", opening="It is 1") == opened
    assert not opened.validate(), "gold answers stand by themselves"
    bare = make("chain_sum", control="format_only_reward").opened("1")
    assert [j.reward for j in bare.judge([problem] * 2, ["2", "2 apples"])] == [1, -1]
