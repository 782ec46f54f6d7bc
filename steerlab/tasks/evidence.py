"""Does a data set's own working lead to its gold answer? The check behind `validate()` that finds wrong gold answers.

Two kinds of working: an equation (SVAMP) must have the gold value, and a worked solution (GSM8K) must contain it
somewhere, as it stands or as a hundredth (cents answered from dollars). Conservative: it misses wrong answers whose
working is wrong too.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from steerlab.tasks.numbers import last_number, value

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def equation_doubt(equation: str, gold: str) -> str:
    """Why the equation speaks against the gold answer, or "". Rounded to the data set's four decimals."""
    try:
        result = _evaluate(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return f"equation {equation!r} cannot be evaluated"
    want = value(gold)
    if want is not None and abs(result - want) < Fraction(1, 10_000):
        return ""
    return f"gold answer {gold}, but its equation {equation.strip()} gives {float(result):g}"


def solution_doubt(solution: str, gold: str) -> str:
    """Why the worked solution speaks against the gold answer, or ""."""
    want = value(gold)
    if want is None:
        return f"gold answer {gold!r} is not a number"
    marks = re.findall(r"=([^<>=]*)>>", solution)
    if marks and value(marks[-1]) == want:
        return ""
    text = re.sub(r"(?<=\d) (?=\d{3}\b)", "", solution.rpartition("####")[0] or solution)
    reached = {value(n) for piece in re.split(r"[\s=<>:()]+", text) if (n := last_number(piece)) is not None}
    words = {Fraction(_WORDS.index(w)) for w in re.findall(r"[a-z]+", text.lower()) if w in _WORDS}
    if want in reached or want / 100 in reached or want in words:
        return ""
    last = last_number(re.sub(r"<<.*?>>", "", text))
    return f"gold answer {gold}, but its solution never reaches it (its last number is {last})"


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left), _evaluate(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
    raise ValueError("not a sum, difference, product or quotient of numbers")
