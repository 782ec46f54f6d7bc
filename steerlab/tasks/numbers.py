"""Numbers in running text: the last one written, and its exact value. Bounded: no number of more than 64 characters."""

from __future__ import annotations

import re
from fractions import Fraction

# A sign counts only where it cannot be a subtraction ("5-3" ends in 3, "= -3" in -3).
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.%])[-+])?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?"
    r"(?:(?<=\d)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?![\w]))?"
    r"(?:\s?/\s?\d+(?!\w))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_LONGEST = 64


def last_number(text: str) -> str | None:
    r"""The last number in `text` as written, without thousands commas; `\frac{a}{b}` reads a/b. None without one."""
    plain = _LATEX_FRACTION.sub(r" \1/\2 ", text.replace("−", "-").replace("\\,", "").replace("{,}", ","))
    found = None
    for match in _NUMBER.finditer(plain):
        if match.group().strip("+-"):
            found = match.group()
    return None if found is None else re.sub(r"[,\s]", "", found)


def value(number: str) -> Fraction | None:
    """Exact value of a number as `last_number` returns it (or a gold answer); None where it is not one number."""
    text = number.strip().replace(",", "").replace("−", "-").lstrip("$").rstrip(".")
    if len(text) > _LONGEST:
        return None
    try:
        top, slash, bottom = text.partition("/")
        return Fraction(top) / Fraction(bottom) if slash else Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def same(gold: str, answer: str, tolerance: float = 0.0) -> bool:
    """Whether two numbers are equal, or within `tolerance` relative to the gold one.

    A whole number is not answered by a quotient: "8/2" would leave the sum of "how many is 8 / 2" to the verifier.
    """
    want, got = value(gold), value(answer)
    if want is None or got is None:
        return False
    if "/" in answer and want.denominator == 1:
        return False
    return abs(got - want) <= Fraction(tolerance) * abs(want)
