"""Tasks: what a good answer is. A task owns its problems, its prompt and its reward."""

from __future__ import annotations

from steerlab.tasks.gym import Gym, GymScore
from steerlab.tasks.prompts import encode
from steerlab.tasks.register import TASKS, make
from steerlab.tasks.task import Judgement, Layout, Message, Problem, ProblemSet, Prompt, Rewards, Task

__all__ = [
    "TASKS",
    "Gym",
    "GymScore",
    "Judgement",
    "Layout",
    "Message",
    "Problem",
    "ProblemSet",
    "Prompt",
    "Rewards",
    "Task",
    "encode",
    "make",
]
