"""Schemas of our tidy tables: every column with its dtype, unit and meaning, as data; `check` holds a table to them.

A table may have more columns than its schema names (a sweep adds `learning_rate`); it may not lack one, and the named
ones must have the stated kind. Left out: value ranges, which belong to the tests of whoever makes the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steerlab.errors import UsageError, unknown

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Column:
    """One column: `dtype` is int, float, str or bool; `unit` is "1" where dimensionless."""

    name: str
    dtype: str
    unit: str
    meaning: str
    optional: bool = False


_SPLIT = (
    Column("task", "str", "1", "name of the task"),
    Column("split", "str", "1", "train or test (held out)"),
    Column("condition", "str", "1", "base, steered, greedy, few_shot, random_reward, format_reward, …"),
)
_SITE = (
    Column("site", "str", "1", "site kind of the vector, e.g. resid_post"),
    Column("layer", "int", "1", "0-based decoder block"),
)
_POSITION = (
    Column("condition", "str", "1", "base, steered, steered × −1, random, …"),
    Column("text", "int", "1", "index of the text"),
    Column("position", "int", "1", "0-based token of the text, whose successor is predicted"),
)

_SPAN = (
    Column("from_layer", "int", "1", "lowest 0-based block whose vector, added alone, the row averages over"),
    Column("to_layer", "int", "1", "of the highest; equal to from_layer for one vector"),
    Column("readout", "str", "1", "cosine (output effect with unembedding rows) or logprob (change in nats)"),
)
_LANGUAGE_INTERVALS = (
    Column("low", "float", "cosine | nats", "lower end of the 95 % interval over tokens; missing for one token"),
    Column("high", "float", "cosine | nats", "upper end of the 95 % interval over tokens"),
    Column("low_texts", "float", "nats", "lower end of the 95 % interval over texts; missing for cosine, for one text"),
    Column("high_texts", "float", "nats", "upper end of the 95 % interval over texts"),
)

SCHEMAS: dict[str, tuple[Column, ...]] = {
    "scores": (
        Column("model", "str", "1", "model name"),
        *_SPLIT,
        Column("temperature", "float", "1", "sampling temperature; 0 is greedy"),
        Column("metric", "str", "1", "avg@k or pass@k"),
        Column("value", "float", "share", "estimate over problems (and seeds)"),
        Column("low", "float", "share", "lower end of the 95 % interval"),
        Column("high", "float", "share", "upper end of the 95 % interval"),
        Column("n_problems", "int", "problems", "problems evaluated"),
        Column("n_samples", "int", "completions", "completions per problem and seed"),
        Column("n_seeds", "int", "seeds", "training seeds the estimate covers"),
    ),
    "completions": (
        *_SPLIT,
        Column("seed", "int", "1", "seed of the sampling streams"),
        Column("problem", "int", "1", "id of the problem within its task"),
        Column("sample", "int", "1", "index of the completion within its problem"),
        Column("question", "str", "1", "the question, without the prompt template"),
        Column("answer", "str", "1", "gold answer"),
        Column("text", "str", "1", "the completion as the model wrote it"),
        Column("extracted", "str", "1", "answer found by the verifier; missing if none"),
        Column("reward", "float", "1", "reward of the task"),
        Column("correct", "bool", "1", "extracted answer equals the gold answer"),
        Column("n_tokens", "int", "tokens", "length of the completion"),
        Column("finished", "bool", "1", "ended by a stop token, not by the length limit"),
    ),
    "curve": (
        Column("step", "int", "updates", "0-based training step"),
        Column("reward", "float", "1", "mean reward of the step's rollouts"),
        Column("reward_ema", "float", "1", "exponential moving mean of the reward", optional=True),
        Column("signal_share", "float", "share", "groups whose rewards are not all equal", optional=True),
        Column("loss", "float", "1", "value of the objective", optional=True),
        Column("grad_norm", "float", "1", "global gradient norm before clipping", optional=True),
        Column("lr", "float", "1", "learning rate of the update", optional=True),
        Column("tokens_per_s", "float", "tokens/s", "completion tokens per second of the whole step", optional=True),
        Column("completion_tokens", "float", "tokens", "mean completion length", optional=True),
        Column("rollout_s", "float", "s", "seconds spent sampling", optional=True),
        Column("reward_s", "float", "s", "seconds spent judging", optional=True),
        Column("update_s", "float", "s", "seconds spent in forward, backward and optimiser", optional=True),
        Column("wall_s", "float", "s", "seconds of the step", optional=True),
        Column("run", "str", "1", "name of the run, where several are drawn together", optional=True),
        Column("seed", "int", "1", "training seed, where several are drawn together", optional=True),
    ),
    "layers": (
        Column("layer", "int", "1", "0-based decoder block that has the vector, the only one trained"),
        Column("seed", "int", "1", "training seed"),
        Column("metric", "str", "1", "avg@k or pass@k"),
        Column("value", "float", "share", "estimate over problems"),
        Column("low", "float", "share", "lower end of the 95 % interval"),
        Column("high", "float", "share", "upper end of the 95 % interval"),
        Column("n_problems", "int", "problems", "problems evaluated"),
        Column("n_samples", "int", "completions", "completions per problem"),
    ),
    "logit_lens": (
        *_SITE,
        Column("readout", "str", "1", "dot, cosine or softmax"),
        Column("end", "str", "1", "top or bottom of the vocabulary"),
        Column("rank", "int", "1", "0 is the most extreme token of that end"),
        Column("token_id", "int", "1", "vocabulary index"),
        Column("token", "str", "1", "text of the token, decoded alone"),
        Column("score", "float", "logit | cosine | share", "value of the readout"),
    ),
    "residual_lens": (
        *_POSITION,
        Column("layer", "int", "1", "0-based decoder block after which the stream is read"),
        Column("rank", "int", "1", "0 is the likeliest"),
        Column("token_id", "int", "1", "vocabulary index"),
        Column("token", "str", "1", "text of the token, decoded alone"),
        Column("logprob", "float", "nats", "log-probability of the token"),
    ),
    "lens_watched": (
        *_POSITION,
        Column("layer", "int", "1", "0-based decoder block after which the stream is read"),
        Column("token_id", "int", "1", "vocabulary index of the watched token"),
        Column("token", "str", "1", "its text, decoded alone"),
        Column("rank", "int", "1", "tokens that are likelier"),
        Column("logprob", "float", "nats", "its log-probability"),
    ),
    "lens_spread": (
        *_POSITION,
        Column("layer", "int", "1", "0-based decoder block after which the stream is read"),
        Column("entropy_nats", "float", "nats", "entropy of what the layer would say"),
        Column("kl_nats", "float", "nats", "KL(the model's own output ‖ what the layer would say)"),
    ),
    "token_effects": (
        Column("text", "int", "1", "index of the text"),
        Column("generated", "int", "1", "position in the completion, 0 is its first token"),
        Column("raised_id", "int", "1", "token whose probability grew most"),
        Column("raised", "str", "1", "its text"),
        Column("raised_delta", "float", "share", "by how much"),
        Column("lowered_id", "int", "1", "token whose probability fell most"),
        Column("lowered", "str", "1", "its text"),
        Column("lowered_delta", "float", "share", "by how much (negative)"),
        Column("raised_was_base_argmax", "bool", "1", "the raised token was the base model's likeliest already"),
        Column("raised_is_steered_argmax", "bool", "1", "it is the steered model's likeliest"),
        Column("argmax_changed", "bool", "1", "the two models' likeliest tokens differ"),
        Column("entropy_base_nats", "float", "nats", "entropy of the base model's next token"),
        Column("kl_nats", "float", "nats", "KL(steered ‖ base) of the next token"),
    ),
    "raised_tokens": (
        Column("where", "str", "1", "first generated position, or rest"),
        Column("end", "str", "1", "raised or lowered"),
        Column("rank", "int", "1", "0 is the most changed token of that end"),
        Column("token_id", "int", "1", "vocabulary index"),
        Column("token", "str", "1", "text of the token, decoded alone"),
        Column("delta", "float", "share", "mean change of its probability, over texts"),
        Column("low", "float", "share", "lower end of the 95 % interval over texts"),
        Column("high", "float", "share", "upper end of the 95 % interval over texts"),
        Column("n_texts", "int", "texts", "texts that have such a position"),
    ),
    "persistence": (
        Column("condition", "str", "1", "trained, or a random direction of equal length"),
        Column("source", "int", "1", "0-based decoder block whose vector is added"),
        Column("layer", "int", "1", "0-based decoder block where its effect is looked for"),
        Column("quantity", "str", "1", "diff_vector, diff_diff, mean_vector or length"),
        Column("value", "float", "cosine | activation units", "mean over texts; missing where there is no direction"),
        Column("low", "float", "cosine | activation units", "lower end of the 95 % interval over texts"),
        Column("high", "float", "cosine | activation units", "upper end of the 95 % interval over texts"),
        Column("n_texts", "int", "texts", "texts that have a value"),
    ),
    "vocabulary_classes": (
        Column("token_id", "int", "1", "vocabulary index"),
        Column("token", "str", "1", "text of the token, decoded alone"),
        Column("script", "str", "1", "Unicode script of its letters; none, mixed, or other_script"),
        Column("token_class", "str", "1", "english, other_latin, a script, code, …; rules in interp/vocabulary.py"),
    ),
    "languages": (
        Column("condition", "str", "1", "trained, or random: a direction of equal length"),
        Column("draw", "int", "1", "which random direction; 0 for trained"),
        *_SPAN,
        Column("token_class", "str", "1", "class of tokens, as in vocabulary_classes"),
        Column("value", "float", "cosine | nats", "mean over the tokens of the class (and over texts)"),
        *_LANGUAGE_INTERVALS,
        Column("n_tokens", "int", "tokens", "tokens of the class"),
        Column("n_texts", "int", "texts", "texts read"),
    ),
    "language_gaps": (
        Column("condition", "str", "1", "trained, random (mean over draws), or trained − random"),
        *_SPAN,
        Column("value", "float", "cosine | nats", "mean over non-English tokens minus mean over English ones"),
        *_LANGUAGE_INTERVALS,
        Column("low_draws", "float", "cosine | nats", "lowest over random directions; missing for trained"),
        Column("high_draws", "float", "cosine | nats", "highest over random directions; missing for trained"),
        Column("n_english", "int", "tokens", "English tokens"),
        Column("n_other", "int", "tokens", "tokens of another language or script"),
        Column("n_texts", "int", "texts", "texts read"),
        Column("n_draws", "int", "directions", "random directions per vector"),
    ),
    "norms": (*_SITE, Column("norm", "float", "activation units", "Euclidean length of the vector")),
    "cosines": (
        Column("site_i", "str", "1", "site kind of the first vector"),
        Column("layer_i", "int", "1", "0-based decoder block of the first vector"),
        Column("site_j", "str", "1", "site kind of the second vector"),
        Column("layer_j", "int", "1", "0-based decoder block of the second vector"),
        Column("cosine", "float", "1", "cosine of the two vectors; missing if one is zero"),
    ),
    "cosines_between": (
        Column("run_i", "str", "1", "name of the first set of vectors"),
        Column("run_j", "str", "1", "name of the second"),
        *_SITE,
        Column("cosine", "float", "1", "cosine of the two sets' vectors there; missing if one is zero"),
        Column("low_random", "float", "1", "lower end of the range of 95 % of random directions' cosines"),
        Column("high_random", "float", "1", "its upper end"),
    ),
    "relative_dose": (
        *_SITE,
        Column("norm", "float", "activation units", "Euclidean length of the vector"),
        Column("stream", "float", "activation units", "mean length of what the block writes without it"),
        Column("value", "float", "share", "length of the vector over that of the stream, mean over texts"),
        Column("low", "float", "share", "lower end of the 95 % interval over texts; missing for one text"),
        Column("high", "float", "share", "upper end of the 95 % interval over texts"),
        Column("n_texts", "int", "texts", "texts read"),
    ),
    "stable_rank": (
        Column("site", "str", "1", "site kind of the vectors"),
        Column("n_vectors", "int", "vectors", "vectors stacked as rows"),
        Column("stable_rank", "float", "1", "Σσ²/σ₁² of the stack; missing if all vectors are zero"),
    ),
    "singular_values": (
        Column("site", "str", "1", "site kind of the vectors"),
        Column("index", "int", "1", "0 is the largest"),
        Column("singular_value", "float", "activation units", "singular value of the stacked vectors"),
    ),
}
SCHEMAS["metrics"] = SCHEMAS["curve"]


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
