"""Schemas of our tidy tables: every column with its dtype, unit and meaning, as data; `check` holds a table to them.

A table may have more columns than its schema names (a sweep adds `learning_rate`); it may not lack one, and the named
ones must have the stated kind. Left out: value ranges, which belong to the tests of whoever makes the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerlab.errors import UsageError, unknown
from steerlab.tables.column import Column
from steerlab.tables.saes import SAES
from steerlab.tables.texts import TEXTS
from steerlab.tables.training import TRAINING
from steerlab.tables.vectors import VECTORS

if TYPE_CHECKING:
    import pandas as pd


SCHEMAS: dict[str, tuple[Column, ...]] = TRAINING | TEXTS | VECTORS | SAES | {"metrics": TRAINING["curve"]}


def check(df: pd.DataFrame, name: str) -> pd.DataFrame:
    """Returns the table if it has the columns of schema `name`; else UsageError naming every fault in one line."""
    if name not in SCHEMAS:
        raise unknown("table schema", name, SCHEMAS)
    faults = []
    for column in SCHEMAS[name]:
        if column.name not in df.columns:
            if not column.optional:
                faults.append(f"column {column.name!r} is missing")
        elif not _holds(df.loc[:, column.name], column.dtype):
            faults.append(f"column {column.name!r} is {df[column.name].dtype}, not {column.dtype}")
    if faults:
        raise UsageError(f"not a {name!r} table: {'; '.join(faults)}; see steerlab.tables.SCHEMAS")
    return df


def empty(name: str) -> pd.DataFrame:
    """A table of schema `name` without rows, with the right dtypes."""
    import pandas as pd

    if name not in SCHEMAS:
        raise unknown("table schema", name, SCHEMAS)
    dtypes = {"int": "int64", "float": "float64", "str": "str", "bool": "bool"}
    return pd.DataFrame({c.name: pd.Series(dtype=dtypes[c.dtype]) for c in SCHEMAS[name] if not c.optional})


def _holds(values: pd.Series, dtype: str) -> bool:
    from pandas.api import types

    if values.isna().all() and len(values):  # a column that is missing throughout has no dtype of its own
        return dtype in ("str", "float")
    if dtype == "int":
        return types.is_integer_dtype(values)
    if dtype == "float":
        return types.is_float_dtype(values) or types.is_integer_dtype(values)
    if dtype == "bool":
        return types.is_bool_dtype(values)
    return (
        types.is_string_dtype(values.dropna())
        or isinstance(values.dtype, types.CategoricalDtype)
        or types.infer_dtype(values, skipna=True) in ("string", "empty")
    )
