"""Experiments are plain data: to JSON and back, and refused when they make no sense."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from steerlab.adapters import Scope, Steering
from steerlab.errors import UsageError
from steerlab.objectives import GroupNormalised, PolicyGradient
from steerlab.rollouts import Evaluation, Sampling
from steerlab.runs import decode, encode
from steerlab.tasks import make
from steerlab.training import AdamW, Experiment, Rollouts

EXPERIMENT = Experiment(
    recipe="rloo",
    model="tiny",
    adapter=Steering(layers=(1, 3), site="attn_out", scope=Scope.predicting(0, 1)),
    source=Rollouts(make("chain_sum"), prompts=4, samples=3, sampling=Sampling(temperature=0.7, stop=("\n",))),
    objective=PolicyGradient(GroupNormalised(1e-3)),
    updater=AdamW(lr=3e-3),
    evaluation=Evaluation(samples=2, limit=5),
    steps=7,
)


def test_json_round_trip() -> None:
    text = json.dumps(encode(EXPERIMENT))
    again = decode(json.loads(text))
    assert again == EXPERIMENT
    assert json.dumps(encode(again)) == text


def test_equality_sees_every_part() -> None:
    for change in (
        {"adapter": Steering()},
        {"objective": PolicyGradient()},
        {"updater": AdamW()},
        {"seed": 1},
        {"token_budget": 4096},
    ):
        assert replace(EXPERIMENT, **change) != EXPERIMENT
        assert encode(replace(EXPERIMENT, **change)) != encode(EXPERIMENT)


@pytest.mark.parametrize("options", [{"steps": 0}, {"token_budget": 0}])
def test_bad_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        replace(EXPERIMENT, **options)
