"""Prompts as token ids: the tokenizer's chat template, plain text, and the two templates of the core papers.

core.md §2: `qwen_math` is the chat template with the Qwen-Math system instruction where the tokenizer has a template,
else a plain "User: … Assistant:" dialogue; `r1` is an R1-Zero-style preamble that ends in an opened <think>. The
preamble is worded by us, its tags and turns are the papers'. Left out: multimodal content and tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from steerlab.errors import UsageError, unknown
from steerlab.tasks.task import STYLES, Message, Prompt

QWEN_MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question and the Assistant solves it. The Assistant "
    "first thinks about the reasoning in its mind and then gives the answer. The reasoning and the answer are enclosed "
    "in <think> </think> and <answer> </answer> tags: <think> reasoning here </think> <answer> answer here </answer>."
)


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
