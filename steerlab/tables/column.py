"""A column of a table: its dtype, unit and meaning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column: `dtype` is int, float, str or bool; `unit` is "1" where dimensionless."""

    name: str
    dtype: str
    unit: str
    meaning: str
    optional: bool = False
