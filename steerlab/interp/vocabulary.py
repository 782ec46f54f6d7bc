"""The whole vocabulary in classes: of which script a token is, and where that is Latin, whether English or another's.

Every token is in exactly one class, by the first rule that fits it (its text decoded alone, spaces around it aside):

- `special`: control tokens of the tokenizer, and rows of the unembedding beyond its vocabulary.
- `bytes`: its bytes alone are no text.
- `whitespace`: nothing but spaces and line breaks.
- `digits`, `punctuation`: without a letter of any script; with a number in it, or not (symbols and emoji are here).
- a script by name (`cyrillic`, `han`, `kana`, …, `other_script`): all its letters are of that script. Japanese mixes
  Han with kana: such a token is `kana`.
- `code`: Latin letters together with anything but letters and apostrophes (`.get`, `_name`, `x1`), or a capital after
  a small letter (`camelCase`).
- `english`: a word in small letters with a leading space, `MIN_ZIPF` common, and `MARGIN` more common in English than
  in each of `OTHER_LANGUAGES`. Zipf units: log10 of uses in a billion words, from the package wordfreq (Speer 2022).
- `other_latin`: one that is `OTHER_MARGIN` more common in one of these than in English, and `OTHER_MARGIN` − `MARGIN`
  more than all English words that it begins (`complet`): an English vocabulary has such pieces for its own words.
- `fragments`: Latin letters that are no such word in any of the languages.
- `ambiguous`: everything a rule would have to force: words about as common in both (`hotel`), capitals (names,
  acronyms, the beginnings of sentences), one letter alone (Greek ones are mathematics), words without a leading
  space, which may be the inside of another, letters of several scripts.

Left out: which of the other languages, languages with small word lists (Turkish, Vietnamese: their words are mostly
`fragments`), and what a token means inside a longer word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Protocol, runtime_checkable

import pandas as pd
import regex

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.interp.logit_lens import token_text

MIN_ZIPF = 3.0  # one use in a million words
MARGIN = 1.0  # ten times as common
OTHER_MARGIN = 2.0  # a hundred times: most tokens of most vocabularies were made for English text
FLOOR_ZIPF = MIN_ZIPF - MARGIN  # rarer words lose to any word, so lists are read down to here
OTHER_LANGUAGES = ("ca", "cs", "de", "es", "fi", "fr", "it", "nb", "nl", "pl", "pt", "sv")

_UNICODE = (
    "Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Armenian", "Georgian", "Devanagari", "Bengali", "Gurmukhi",
    "Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Tibetan", "Myanmar", "Khmer",
    "Ethiopic", "Hangul", "Hiragana", "Katakana", "Han",
)  # fmt: skip
_KANA = {"hiragana", "katakana"}
SCRIPTS = (*sorted({name.lower() for name in _UNICODE} - _KANA - {"latin"}), "kana", "other_script")
NON_ENGLISH = ("other_latin", *SCRIPTS)
CLASSES = (
    "english", *NON_ENGLISH, "ambiguous", "fragments", "code", "digits", "punctuation", "whitespace", "bytes",
    "special",
)  # fmt: skip

_SCRIPT = regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in _UNICODE))
_NO_SCRIPT = regex.compile(r"[\p{Script=Common}\p{Script=Inherited}]")
_LETTERS, _NUMBER = regex.compile(r"[\p{L}\p{M}]"), regex.compile(r"\p{N}")
_PLAIN, _CAMEL = regex.compile(r"[\p{L}\p{M}'’]+"), regex.compile(r"\p{Ll}\p{Lu}")

# Zipf frequencies of a language's words, those below FLOOR_ZIPF left out.
Frequencies = Callable[[str], Mapping[str, float]]


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def decode(self, token_ids: list[int], /) -> str: ...

    def convert_ids_to_tokens(self, ids: int, /) -> str | None: ...


def wordfreq_zipf(language: str) -> dict[str, float]:
    """From wordfreq's large list. Raises UsageError if the package is not installed."""
    try:
        import wordfreq
    except ImportError:
        raise UsageError("classes of words need the package wordfreq; pip install 'steerlab[languages]'") from None
    by_rank = wordfreq.get_frequency_list(language, "large")
    zipf = (wordfreq.cB_to_zipf(-rank) for rank in range(len(by_rank)))  # in hundredths of a decade below certainty
    found = {word: value for value, words in zip(zipf, by_rank, strict=True) if value >= FLOOR_ZIPF for word in words}
    wordfreq.get_frequency_list.cache_clear()  # the package would keep every list it has read
    return found


def vocabulary_classes(tokenizer: Tokenizer, d_vocab: int, zipf: Frequencies = wordfreq_zipf) -> pd.DataFrame:
    """Script and class of each of the `d_vocab` rows of an unembedding: table `vocabulary_classes`. Rules: above.

    zipf: where frequencies are from. Raises UsageError for an empty vocabulary.
    """
    if d_vocab < 1:
        raise UsageError(f"a vocabulary of {d_vocab} tokens has no classes; give the unembedding's number of rows")
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    texts = [token_text(tokenizer, token) for token in range(d_vocab)]
    scripts, classes = [], []
    for token, text in enumerate(texts):
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None or token in special:
            script, found = "none", "special"
        else:
            script, found = _by_letters(text, regex.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None)
        scripts.append(script)
        classes.append(found)
    pairs = list(zip(texts, classes, strict=True))
    language = _languages({_word(text) for text, found in pairs if found == ""}, zipf)
    for token, (text, found) in enumerate(pairs):
        if found == "":
            known = language[_word(text)]
            plain = text[:1].isspace() and text == text.lower()
            classes[token] = known if plain or known == "fragments" else "ambiguous"
    table = pd.DataFrame({"token_id": range(d_vocab), "token": texts, "script": scripts, "token_class": classes})
    return tables.check(table, "vocabulary_classes")


def _word(text: str) -> str:
    """As the word lists write it."""
    return text.strip().casefold().replace("’", "'")


def _by_letters(text: str, is_byte: bool) -> tuple[str, str]:
    """Script and class of a token that is not special; class "" for Latin letters that may be a word."""
    core = text.strip()
    if is_byte or "\ufffd" in core or regex.fullmatch(r"(<0x[0-9A-F]{2}>)+", core):
        return "none", "bytes"
    if not core:
        return "none", "whitespace"
    letters = _LETTERS.findall(core)
    scripts = {script for letter in letters if (script := _script(letter)) != "none"}
    if not scripts:
        return "none", "digits" if _NUMBER.search(core) else "punctuation"
    if scripts & _KANA and scripts <= {"han", *_KANA}:
        return "kana", "kana"
    if len(scripts) > 1:
        return "mixed", "ambiguous"
    (script,) = scripts
    if script != "latin":
        return script, "ambiguous" if script == "greek" and len(letters) == 1 else script
    if not _PLAIN.fullmatch(core) or _CAMEL.search(core):
        return script, "code"
    return script, "ambiguous" if len(letters) == 1 else ""


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """Name of the letter's script in small letters; `none` for marks and letters that several scripts share."""
    found = _SCRIPT.match(letter)
    if found is not None:
        return str(found.lastgroup).lower()
    return "none" if _NO_SCRIPT.match(letter) else "other_script"


def _languages(words: Collection[str], zipf: Frequencies) -> dict[str, str]:
    """english, other_latin, ambiguous or fragments, by word."""
    if not words:
        return {}
    english = zipf("en")
    others: dict[str, float] = {}
    for language in OTHER_LANGUAGES:
        known = zipf(language)
        others |= {word: max(known[word], others.get(word, FLOOR_ZIPF)) for word in words if word in known}
    begun = dict.fromkeys(others, 0.0)  # uses in a billion words of all English words that begin so
    for word, value in english.items():
        for end in range(1, len(word)):
            if word[:end] in begun:
                begun[word[:end]] += 10**value
    found = {}
    for word in words:
        en, other = max(english.get(word, FLOOR_ZIPF), FLOOR_ZIPF), others.get(word, FLOOR_ZIPF)
        if max(en, other) < MIN_ZIPF:
            found[word] = "fragments"
        elif en - other >= MARGIN:
            found[word] = "english"
        else:
            rival = max(en, math.log10(max(begun.get(word, 0.0), 1.0)) - MARGIN)
            found[word] = "other_latin" if other - rival >= OTHER_MARGIN else "ambiguous"
    return found
