"""Which tokens belong to which words."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from steerlab.errors import UsageError
from steerlab.interp.words import REST, WORDS, read_words, word_groups

TOKENS = [
    " First",
    "first",
    "firstly",
    " fir",
    " \n",
    "\n\n",
    " :",
    "::",
    "<|im_end|>",
    " 7",
    "77",
    "Seven",
    " ",
    "WAIT",
]


class Few:
    """A tokenizer of TOKENS, with rows beyond its vocabulary."""

    def decode(self, token_ids: list[int]) -> str:
        return TOKENS[token_ids[0]]

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return TOKENS[ids] if ids < len(TOKENS) else None


def test_spaces_and_case_do_not_matter_and_groups_without_tokens_are_absent() -> None:
    found = word_groups(Few(), len(TOKENS) + 2)
    named = {name: [TOKENS[i] if i < len(TOKENS) else "" for i in ids] for name, ids in found.items()}
    assert named == {
        "process": [" First", "first", "firstly"],
        "verification": ["WAIT"],
        "structure": [" \n", "\n\n", " :"],
        "numbers": [" 7", "77", "Seven"],
        "end": ["<|im_end|>"],
        REST: [" fir", "::", " ", "", ""],
    }
    assert np.array_equal(np.sort(np.concatenate(list(found.values()))), np.arange(len(TOKENS) + 2))


def test_no_word_is_in_two_groups_or_twice_in_one() -> None:
    sets = {name: {word.strip(" ").casefold() for word in words} for name, words in WORDS.items()}
    assert all(len(sets[name]) == len(words) and "" not in sets[name] for name, words in WORDS.items())
    for one, other in itertools.combinations(sets, 2):
        assert not sets[one] & sets[other], (one, other)


def test_groups_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text('{"mine": ["FIRST", "7"], "also": ["first"]}')
    found = word_groups(Few(), len(TOKENS), read_words(file))
    assert found["mine"].tolist() == [0, 1, 9] and found["also"].tolist() == [0, 1] and len(found[REST]) == 11
    assert REST not in word_groups(Few(), len(TOKENS), {"all": TOKENS})
    with pytest.raises(UsageError, match="'none'"):
        word_groups(Few(), len(TOKENS), {"none": ["several words"]})
    with pytest.raises(UsageError, match="another name"):
        word_groups(Few(), len(TOKENS), {REST: ["first"]})
    for content, says in (
        ('{"mine": "so"}', "not words by group"),
        ("[1", "cannot be read"),
        ('{"a": [1]}', "not words"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=says):
            read_words(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_words(tmp_path / "missing.json")
