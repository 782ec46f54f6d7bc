"""Token substitution: what stands in for a vector, on a model whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import pytest

from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.substitution import raised_first, substitution
from steerlab.interp.texts import Text
from steerlab.interp.token_effects import token_effects
from steerlab.models import LanguageModel, Site
from steerlab.rollouts import Evaluation, Sampling
from steerlab.tasks import Judgement, Message, Problem, Prompt

Pick = Callable[..., pd.DataFrame]
EVALUATION = Evaluation(samples=4, sampling=Sampling(max_new_tokens=3), shots=0)


@dataclass(frozen=True)
class BeginsWith:
    """Right when the answer begins with `letter`: a task that one token decides."""

    letter: str
    opening: str = ""
    name: str = "begins_with"

    def problems(self, split: str) -> list[Problem]:
        return [Problem(i, f"say {'so ' * i}", self.letter) for i in range(6 if split == "test" else 2)]

    def prompt(self, problem: Problem) -> Prompt:
        return Prompt((Message("user", problem.question),), "chat", self.opening)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        right = [(self.opening + text).startswith(self.letter) for text in texts]
        return [Judgement(float(r), r, None) for r in right]

    def validate(self) -> list[tuple[Problem, Judgement]]:
        return []

    def few_shot(self, n: int, seed: int = 0) -> BeginsWith:
        return self  # has no examples to show

    def opened(self, words: str) -> BeginsWith:
        return replace(self, opening=words)


def towards(model: LanguageModel, letter: str, length: float = 200.0) -> SteeringVectors:
    """A last-layer vector that makes the model say one letter."""
    (token,) = model.tokenizer.encode(letter, add_special_tokens=False)
    row = model.unembedding.weight[token].detach()
    return SteeringVectors({Site("resid_post", model.n_layers - 1): length * row / row.norm()})


def test_a_task_of_one_token(exact: Callable[..., LanguageModel], pick: Pick) -> None:
    model = exact()
    found = substitution(model, BeginsWith("q"), towards(model, "q"), EVALUATION, "q", "z")
    value = found.set_index(["condition", "temperature"])["value"]
    for heat in (1.0, 0.0):
        assert value["steered", heat] == value["first_position", heat] > 0.8, "the same draws decide the first token"
        assert value["appended", heat] == 1.0
        assert value["appended_other", heat] == 0.0
        assert value["later_positions", heat] == value["base", heat], "the first token is the base model's own"
        (share,) = pick(found, condition="appended", temperature=heat)["share"]
        assert share >= 1.0
    assert value["steered", 0.0] == 1.0
    assert set(found["n_seeds"]) == {1}


def test_several_seeds_are_pooled(exact: Callable[..., LanguageModel], pick: Pick) -> None:
    model = exact()
    sets = [towards(model, "q"), towards(model, "k")]
    found = substitution(model, BeginsWith("q"), sets, EVALUATION, "q", "z", temperatures=(0.0,))
    (steered,) = pick(found, condition="steered").to_dict("records")
    assert (steered["value"], steered["n_seeds"]) == (0.5, 2)


def test_the_token_is_the_raised_one(exact: Callable[..., LanguageModel]) -> None:
    model = exact()
    text = Text((40, 41, 42, 43, 44), 3)
    raised, lowered = raised_first(token_effects(model, [text], towards(model, "q"), k=1))
    assert raised == "q" != lowered


def test_bad_input(exact: Callable[..., LanguageModel]) -> None:
    model = exact()
    with pytest.raises(UsageError, match="name a token"):
        substitution(model, BeginsWith("q"), towards(model, "q"), EVALUATION, "", "z")
    part = SteeringVectors(towards(model, "q").vectors, Scope.generated())
    with pytest.raises(UsageError, match="token scope all"):
        substitution(model, BeginsWith("q"), part, EVALUATION, "q", "z")
