"""Prompts as token ids: the tokenizer's chat template, plain text, and the two templates of the core papers.

core.md §2: `qwen_math` is the chat template with the Qwen-Math system instruction where the tokenizer has a template,
else a plain "User: … Assistant:" dialogue; `r1` is an R1-Zero-style preamble that ends in an opened <think>. The
preamble is worded by us, its tags and turns are the papers'. Left out: multimodal content and tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped
from transformers import PreTrainedTokenizerBase

from steerlab.errors import UsageError, unknown
from steerlab.tasks.task import STYLES, Message, Prompt

QWEN_MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question and the Assistant solves it. The Assistant "
    "first thinks about the reasoning in its mind and then gives the answer. The reasoning and the answer are enclosed "
    "in <think> </think> and <answer> </answer> tags: <think> reasoning here </think> <answer> answer here </answer>."
)

SEGMENTS = ("system", "role tag", "example", "question", "generation prompt", "opening")


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt, special tokens included, ending where the completion begins: after the opening, if any.

    UsageError for a chat prompt and a tokenizer without a chat template, and for an unknown style.
    """
    return _asked(prompt, tokenizer) + _ids(prompt.opening, tokenizer)


def _asked(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    templated = bool(tokenizer.chat_template)
    match prompt.style:
        case "chat":
            if not templated:
                raise UsageError("this tokenizer has no chat template; ask for the prompt style plain")
            return _chat(prompt.messages, tokenizer)
        case "qwen_math" if templated:
            return _chat(_with_system(prompt.messages, QWEN_MATH_SYSTEM), tokenizer)
        case "qwen_math":
            return _start(tokenizer) + _ids(_dialogue(prompt.messages, f"\n{QWEN_MATH_SYSTEM}", ""), tokenizer)
        case "r1":
            text = f"{R1_PREAMBLE}\n{_dialogue(prompt.messages, '', ' <think>')}"
            return _start(tokenizer) + _ids(text, tokenizer)
        case "plain":
            return _start(tokenizer) + _ids(_plain(prompt.messages), tokenizer)
        case style:
            raise unknown("prompt style", style, STYLES)


def segments(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token of `encode(prompt, tokenizer)` belongs to: one of SEGMENTS.

    A message's own words are "system", "question" (the last user turn) or "example" (turns before it); of what the
    template adds, what stands between a special token and the end of its line is a "role tag", what follows the last
    turn's words is the "generation prompt", other words before the first turn are "system". Raises UsageError for a
    tokenizer that does not say which characters a token stands for.
    """
    ids = _asked(prompt, tokenizer)
    if not tokenizer.is_fast:
        raise UsageError("this tokenizer does not say where its tokens stand in a text; use its fast version")
    text = str(tokenizer.decode(ids))
    kinds = np.full(len(text), "", dtype=object)
    cursor = 0
    last = max(i for i, message in enumerate(prompt.messages) if message.role == "user")
    for place, message in enumerate(prompt.messages):
        words = message.content.strip()
        start = text.find(words, cursor)
        if start < 0:
            raise UsageError(f"the template has changed the words of the {message.role} turn; segments are not known")
        cursor = start + len(words)
        kinds[start:cursor] = "system" if message.role == "system" else "question" if place == last else "example"
    kinds[cursor:] = "generation prompt"
    found = _named(ids, text, kinds, tokenizer)
    return found + ["opening"] * len(_ids(prompt.opening, tokenizer))


def _named(
    ids: list[int], text: str, kinds: Shaped[np.ndarray, " char"], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The kind of each token, by the characters that decoding up to it adds."""
    special = set(tokenizer.all_special_ids)
    found, tagged, before = [], True, 0
    for place, token in enumerate(ids):
        end = len(tokenizer.decode(ids[: place + 1]))
        inside = [kind for kind in kinds[before:end] if kind]
        before = min(end, len(text))
        if inside:
            found.append(inside[-1])
            continue
        tagged = token in special or tagged
        found.append("role tag" if tagged else "system")
        if "\n" in tokenizer.decode([token]):
            tagged = False
    return found


def _chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return _ids(str(text), tokenizer)


def _with_system(messages: Sequence[Message], system: str) -> tuple[Message, ...]:
    if messages and messages[0].role == "system":
        return tuple(messages)
    return (Message("system", system), *messages)


def _dialogue(messages: Sequence[Message], question_suffix: str, opening: str) -> str:
    """ "User: … Assistant: …" turns; solved examples are closed, the last one is left open with `opening`."""
    parts = []
    for m in messages:
        if m.role == "user":
            parts.append(f"User: {m.content}{question_suffix}\nAssistant:{opening}")
        elif m.role == "assistant":
            parts.append(f" {m.content}\n")
        else:
            parts.append(f"{m.content}\n")
    return "".join(parts)


def _plain(messages: Sequence[Message]) -> str:
    """Question and answer on one line, turns apart by a blank line, nothing after the last question."""
    parts = []
    for m in messages:
        parts.append({"user": m.content, "assistant": f" {m.content}\n\n"}.get(m.role, f"{m.content}\n\n"))
    return "".join(parts)


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, for the tokenizers that put one before plain text by themselves."""
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and tokenizer("a").input_ids[:1] == [bos] else []


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
