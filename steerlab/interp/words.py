"""Groups of words that a solution is made of, and which tokens of a vocabulary belong to them.

A token belongs to a group if its text, decoded alone, spaces around it aside and case-folded, is one of the group's
words: ` First`, `first` and `FIRST` are one word, and so are `\\n` and ` \\n`. The list is ours, written from what
is generally said of worked solutions (arXiv 2509.06608 §7 speaks of process words and structure symbols without
listing them); it is English, short, and no token is in two of its groups. `-` and `*` count as bullets though they are
operators too. Left out: words of several tokens, which no single token stands for, and what a word means where it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from steerlab.errors import UsageError
from steerlab.interp.logit_lens import Tokenizer, token_text

REST = "other"
EXAMPLE = '{"mine": ["so", "then"]}'
Words = Mapping[str, Sequence[str]]

_DIGITS = tuple(dict.fromkeys(f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)))

WORDS: dict[str, tuple[str, ...]] = {
    "process": (
        "add", "adding", "apply", "applying", "begin", "break", "calculate", "calculating", "combine", "combining",
        "compute", "computing", "consider", "define", "denote", "determine", "divide", "dividing", "evaluate", "expand",
        "factor", "find", "finding", "first", "firstly", "following", "given", "identify", "let", "let's", "lets",
        "multiply", "multiplying", "next", "now", "perform", "proceed", "rearrange", "recall", "rewrite", "second",
        "set", "simplify", "simplifying", "since", "so", "solve", "solving", "start", "starting", "step", "steps",
        "substitute", "substituting", "subtract", "subtracting", "sum", "then", "third", "total", "understand", "use",
        "using", "we",
    ),
    "conclusion": (
        "answer", "answers", "conclude", "conclusion", "consequently", "equals", "final", "finally", "gives", "hence",
        "implies", "means", "result", "results", "solution", "therefore", "thus", "yields", "∴",
    ),
    "verification": (
        "actually", "alternatively", "although", "assume", "but", "check", "checking", "confirm", "correct", "error",
        "however", "incorrect", "indeed", "instead", "maybe", "might", "mistake", "oops", "perhaps", "probably",
        "reconsider", "suppose", "sure", "unless", "verify", "verifying", "wait", "wrong",
    ),
    "structure": (
        "\n", "\n\n", "\n\n\n", "\r\n", "\t", ".\n", ".\n\n", ":\n", ":\n\n", ":", ";", "=", "==", "(", ")", "[", "]",
        "{", "}", "|", "#", "##", "###", "-", "--", "---", "*", "**", "***", "•", "`", "```", "$", "$$", "\\", "\\(",
        "\\)", "\\[", "\\]", "\\boxed", "boxed", "->", "=>", "→", "⇒", "&=", "\\\\",
    ),
    "operators": (
        "+", "−", "×", "÷", "/", "·", "^", "<", ">", "≤", "≥", "≈", "%", "frac", "sqrt", "cdot", "times", "plus",
        "minus", "\\frac", "\\sqrt", "\\cdot", "\\times", "\\div",
    ),
    "numbers": (
        *_DIGITS, "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
        "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
        "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "million",
    ),
    "end": (
        "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<|return|>", "<end_of_turn>",
        "<eos>", "</s>",
    ),
}  # fmt: skip


def word_groups(tokenizer: Tokenizer, d_vocab: int, words: Words | None = None) -> dict[str, Int[np.ndarray, " token"]]:
    """Ids of the tokens of each group, low to high, of the `d_vocab` rows of an unembedding; last `other`, those in
    none, if there are any.

    words: a mapping of your own, whose groups may overlap; None: `WORDS`, of which groups without a token in the
    vocabulary are absent. Raises UsageError for a group of your own without one, or called `other`.
    """
    asked = WORDS if words is None else words
    if REST in asked:
        raise UsageError(f"{REST!r} is what is in no group; give the group another name")
    by_word: dict[str, list[int]] = {}
    for token in range(d_vocab):
        by_word.setdefault(_word(token_text(tokenizer, token)), []).append(token)
    found = {}
    for name, members in asked.items():
        ids = sorted({token for word in members for token in by_word.get(_word(word), ())})
        if ids:
            found[name] = np.array(ids, dtype=np.int64)
        elif words is not None:
            raise UsageError(
                f"no word of group {name!r} is a token of the vocabulary; give words of one token, or none"
            )
    taken = np.concatenate(list(found.values())) if found else np.empty(0, dtype=np.int64)
    rest = np.setdiff1d(np.arange(d_vocab), taken)
    return found | ({REST: rest} if len(rest) else {})


def _word(text: str) -> str:
    """As it is compared."""
    return text.strip(" ").casefold()


def read_words(path: str | Path) -> dict[str, tuple[str, ...]]:
    """A mapping of one's own: a JSON file {group: [word, …]}. Raises UsageError for anything else."""
    try:
        read = json.loads(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}); write {EXAMPLE}") from error
    shaped = isinstance(read, dict) and all(isinstance(of, list) for of in read.values())
    if not shaped or not all(isinstance(word, str) for of in read.values() for word in of):
        raise UsageError(f"{path} is not words by group; write {EXAMPLE}")
    return {name: tuple(of) for name, of in read.items()}
