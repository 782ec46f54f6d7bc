"""Schemas are complete, and `check` finds what is wrong."""

from __future__ import annotations

import pandas as pd
import pytest

from steerlab import tables
from steerlab.errors import UsageError


def test_schemas_are_complete_and_hold_their_own_empty_tables():
    for name, columns in tables.SCHEMAS.items():
        assert len({column.name for column in columns}) == len(columns)
        assert all(c.dtype in {"int", "float", "str", "bool"} and c.unit and c.meaning for c in columns)
        assert tables.check(tables.empty(name), name).empty


def test_check_names_every_fault_in_one_line():
    df = pd.DataFrame({"site": ["resid_post"], "layer": [1.5]})
    with pytest.raises(UsageError) as caught:
        tables.check(df, "norms")
    message = str(caught.value)
    assert "'norm' is missing" in message and "'layer' is float64" in message and "\n" not in message
    with pytest.raises(UsageError, match="norms"):
        tables.check(df, "norm")


def test_check_takes_what_parquet_gives_back():
    df = pd.DataFrame({"site": ["a"], "layer": pd.Series([1], dtype="int32"), "norm": [1], "learning_rate": [0.1]})
    assert tables.check(df, "norms") is df
    tables.check(df.astype({"site": "category"}), "norms")
    tables.check(df.astype({"site": object}), "norms")
    with pytest.raises(UsageError):
        tables.check(df.assign(site=1), "norms")


def test_a_column_missing_throughout_is_text():
    row = {c.name: {"int": 1, "float": 0.5, "str": "x", "bool": True}[c.dtype] for c in tables.SCHEMAS["completions"]}
    tables.check(pd.DataFrame([{**row, "extracted": None}]), "completions")
