"""Tasks: what a good answer is. A task owns its problems, its prompt and its reward."""

from __future__ import annotations

from steerlab.tasks.controls import FormatOnlyReward, RandomReward
from steerlab.tasks.gym import Gym, GymScore
from steerlab.tasks.ifeval import Follows
from steerlab.tasks.prompts import encode, segments
from steerlab.tasks.records import Columns, Place, Records
from steerlab.tasks.register import TASKS, make
from steerlab.tasks.task import (
    Judgement,
    Layout,
    Message,
    Problem,
    ProblemSet,
    Prompt,
    Rewards,
    Source,
    Task,
    Verdict,
    Verifier,
)
from steerlab.tasks.verifiers import Boxed, Callback, FinalText, Function, LastNumber, MultipleChoice, Regex

__all__ = [
    "TASKS",
    "Boxed",
    "Callback",
    "Columns",
    "FinalText",
    "Follows",
    "FormatOnlyReward",
    "Function",
    "Gym",
    "GymScore",
    "Judgement",
    "LastNumber",
    "Layout",
    "Message",
    "MultipleChoice",
    "Place",
    "Problem",
    "ProblemSet",
    "Prompt",
    "RandomReward",
    "Records",
    "Regex",
    "Rewards",
    "Source",
    "Task",
    "Verdict",
    "Verifier",
    "encode",
    "make",
    "segments",
]
