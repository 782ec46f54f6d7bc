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
    Column("generated", "int", "1", "place of that successor in the completion; negative inside the prompt"),
)
_VALUE = (
    Column("metric", "str", "1", "avg@k"),
    Column("value", "float", "share", "estimate over problems (and seeds)"),
    Column("low", "float", "share", "lower end of the 95 % interval"),
    Column("high", "float", "share", "upper end of the 95 % interval"),
)
_COUNTS = (
    Column("n_problems", "int", "problems", "problems evaluated"),
    Column("n_samples", "int", "completions", "completions per problem and seed"),
    Column("n_seeds", "int", "seeds", "training seeds the estimate covers"),
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
    "gradient_energy": (
        Column("layer", "int", "1", "0-based decoder block"),
        Column("energy", "float", "reward² / activation units²", "‖∂J/∂s_l‖² at zero vectors, without its noise"),
        Column("low", "float", "reward² / activation units²", "lower end of its 95 % interval over problems"),
        Column("high", "float", "reward² / activation units²", "upper end of its 95 % interval over problems"),
        Column("with_noise", "float", "reward² / activation units²", "squared length of the mean gradient"),
        Column("n_problems", "int", "problems", "problems answered"),
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
        Column("context", "str", "1", "text of the token at this position"),
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
    "substitution": (
        Column(
            "condition", "str", "1", "base, appended, appended_other, steered, random, first_position, later_positions"
        ),
        Column("temperature", "float", "1", "sampling temperature; 0 is greedy"),
        Column("metric", "str", "1", "avg@k"),
        Column("value", "float", "share", "estimate over problems (and seeds of the vectors)"),
        Column("low", "float", "share", "lower end of the 95 % interval"),
        Column("high", "float", "share", "upper end of the 95 % interval"),
        Column("gain", "float", "share", "value minus that of the base model, paired over problems"),
        Column("gain_low", "float", "share", "lower end of its 95 % interval"),
        Column("gain_high", "float", "share", "upper end of its 95 % interval"),
        Column("share", "float", "1", "share of the vectors' gain; missing where that is not above 0"),
        Column("share_low", "float", "1", "lower end of its 95 % interval"),
        Column("share_high", "float", "1", "upper end of its 95 % interval"),
        Column("n_problems", "int", "problems", "problems evaluated"),
        Column("n_seeds", "int", "seeds", "training seeds of the vectors"),
        Column("token", "str", "1", "what the base model was given to begin with"),
        Column("other", "str", "1", "what it was given as a control"),
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
    "adaptive": (
        Column("text", "int", "1", "index of the text"),
        Column("position", "int", "1", "0-based token of the text"),
        Column("token", "str", "1", "text of the token, decoded alone"),
        Column("segment", "str", "1", "system, role tag, example, question, generation prompt, opening or answer"),
        Column("layer", "int", "1", "0-based decoder block that has the rank-1 adapter"),
        Column("scale", "float", "1", "λ: strength of the vector over the mean length of what the projection writes"),
        Column("cosine", "float", "1", "cosine of what the projection writes and the adapter's direction"),
    ),
    "adaptive_shares": (
        Column("layer", "int", "1", "0-based decoder block that has the rank-1 adapter"),
        Column("segment", "str", "1", "system, role tag, example, question, generation prompt, opening or answer"),
        Column("token_share", "float", "share", "of the tokens, mean over texts"),
        Column("magnitude_share", "float", "share", "of Σ|λ|, mean over texts"),
        Column("low", "float", "share", "lower end of its 95 % interval over texts"),
        Column("high", "float", "share", "upper end of its 95 % interval over texts"),
        Column("p", "float", "1", "share of circular shifts of λ that are as far from the tokens' share"),
        Column("n_texts", "int", "texts", "texts read"),
    ),
    "directions": (
        Column("method", "str", "1", "mean_difference, pca or linear_probe"),
        Column("layer", "int", "1", "0-based decoder block whose output is read"),
        Column("norm", "float", "activation units", "length: how far the class means are apart along the direction"),
        Column("n_positive", "int", "texts", "texts of the positive class"),
        Column("n_negative", "int", "texts", "texts of the negative class"),
        Column("auroc", "float", "share", "held-out pairs of a positive and a negative text in the right order"),
        Column("low", "float", "share", "lower end of its 95 % interval over groups (pairs, problems)"),
        Column("high", "float", "share", "upper end of its 95 % interval over groups (pairs, problems)"),
        Column("accuracy", "float", "share", "held-out texts on the right side of the middle, mean of both classes"),
        Column(
            "shuffled",
            "float",
            "share",
            "held-out AUROC with shuffled labels, mean over shuffles; missing if none can be",
        ),
        Column("shuffled_low", "float", "share", "least of the shuffles"),
        Column("shuffled_high", "float", "share", "most of the shuffles"),
    ),
    "magnitudes": (
        Column("condition", "str", "1", "trained, random (a direction of equal length), mean_difference, …"),
        Column("scale", "float", "1", "factor of the vectors; 0 is the base model"),
        Column("metric", "str", "1", "avg@k"),
        Column("value", "float", "share", "estimate over problems"),
        Column("low", "float", "share", "lower end of the 95 % interval"),
        Column("high", "float", "share", "upper end of the 95 % interval"),
        Column("n_problems", "int", "problems", "problems evaluated"),
        Column("n_samples", "int", "completions", "completions per problem"),
    ),
    "side_effects": (
        Column("condition", "str", "1", "base, steered, random, mean_difference, steered × 2, …"),
        Column("quantity", "str", "1", "perplexity, kl_steered_base, kl_base_steered, or avg@k on another task"),
        Column("measured_on", "str", "1", "the neutral text, or the task"),
        Column("value", "float", "1 | nats per token | share", "mean over texts or problems"),
        Column("low", "float", "1 | nats per token | share", "lower end of the 95 % interval; missing for one text"),
        Column("high", "float", "1 | nats per token | share", "upper end of the 95 % interval; missing for one text"),
        Column("n", "int", "texts | problems", "texts or problems"),
    ),
    "at_equal_kl": (
        Column("condition", "str", "1", "base, or the set of vectors"),
        Column("target_nats", "float", "nats per token", "KL(steered ‖ base) on neutral text that was asked for"),
        Column("scale", "float", "1", "factor of the vectors that has it; missing if none was found"),
        Column("kl_nats", "float", "nats per token", "KL there, mean over neutral texts"),
        Column("kl_low", "float", "nats per token", "lower end of its 95 % interval"),
        Column("kl_high", "float", "nats per token", "upper end of its 95 % interval"),
        Column("metric", "str", "1", "avg@k"),
        Column("value", "float", "share", "score on the task at that scale"),
        Column("low", "float", "share", "lower end of the 95 % interval over problems"),
        Column("high", "float", "share", "upper end of the 95 % interval over problems"),
        Column("gain", "float", "share", "score less the base's, same problems"),
        Column("gain_low", "float", "share", "lower end of its 95 % interval"),
        Column("gain_high", "float", "share", "upper end of its 95 % interval"),
        Column("n_problems", "int", "problems", "problems evaluated"),
        Column("n_samples", "int", "completions", "completions per problem"),
    ),
    "norms": (*_SITE, Column("norm", "float", "activation units", "Euclidean length of the vector")),
    "cosines": (
        Column("site_i", "str", "1", "site kind of the first vector"),
        Column("layer_i", "int", "1", "0-based decoder block of the first vector"),
        Column("site_j", "str", "1", "site kind of the second vector"),
        Column("layer_j", "int", "1", "0-based decoder block of the second vector"),
        Column("cosine", "float", "1", "cosine of the two vectors; missing if one is zero"),
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
    "composition": (
        Column("condition", "str", "1", "trained, or random: directions of equal lengths"),
        Column("layer_i", "int", "1", "0-based decoder block of the first vector"),
        Column("layer_j", "int", "1", "of the second, at least layer_i; equal: the vector by itself"),
        *_VALUE,
        Column("gain", "float", "share", "value less that of the better of the two alone; 0 on the diagonal"),
        Column("gain_low", "float", "share", "lower end of its paired 95 % interval"),
        Column("gain_high", "float", "share", "upper end of its paired 95 % interval"),
        Column("relative", "float", "1", "gain as a share of what vectors trained together gain; missing: see why"),
        Column("relative_low", "float", "1", "lower end of its 95 % interval"),
        Column("relative_high", "float", "1", "upper end of its 95 % interval"),
        Column("why", "str", "1", "why relative is missing; empty where it is not"),
        *_COUNTS,
    ),
    "composition_sets": (
        Column("condition", "str", "1", "base, greedy, sum, random sum, together"),
        Column("layers", "str", "1", "layers whose vectors are added, in the order they were chosen"),
        Column("n_vectors", "int", "vectors", "how many they are"),
        Column("split", "str", "1", "of the problems; greedy chooses on one and is told on the other"),
        *_VALUE,
        *_COUNTS,
    ),
    "composition_agreement": (
        Column("predictor", "str", "1", "diff_vector, diff_diff (see persistence; source i, layer j) or distance"),
        Column("outcome", "str", "1", "column of composition that is to be predicted"),
        Column("r", "float", "1", "Pearson's r over pairs i < j; missing where one of them is constant"),
        Column("low", "float", "1", "lower end of the 95 % interval, layers resampled; missing with less than five"),
        Column("high", "float", "1", "upper end of the 95 % interval"),
        Column("p", "float", "share", "layers permuted: how often |r| is at least as large"),
        Column("n_pairs", "int", "pairs", "pairs that have both"),
    ),
    "transfer": (
        Column("donor", "str", "1", "whose vectors; none for the recipient without any"),
        Column("recipient", "str", "1", "model and task that they are put into"),
        Column("map", "str", "1", "base, own, direct, procrustes, ridge; random map, random direction (controls)"),
        *_VALUE,
        Column("normalised", "float", "1", "0 as the recipient without vectors, 1 as with its own; missing: see why"),
        Column("normalised_low", "float", "1", "lower end of its 95 % interval"),
        Column("normalised_high", "float", "1", "upper end of its 95 % interval"),
        Column("why", "str", "1", "why normalised is missing; empty where it is not"),
        *_COUNTS,
    ),
    "transfer_maps": (
        Column("donor", "str", "1", "model that is mapped from"),
        Column("recipient", "str", "1", "model that is mapped to"),
        Column("method", "str", "1", "procrustes or ridge"),
        Column("layer_donor", "int", "1", "0-based decoder block"),
        Column("layer_recipient", "int", "1", "0-based decoder block at the same relative depth"),
        Column("r2", "float", "1", "share of the recipient's variance that is predicted on held-out texts"),
        Column("ridge", "float", "1", "penalty, in mean variances of a donor coordinate; missing for procrustes"),
        Column("dose", "float", "1", "recipient's median length of a state over the donor's"),
        Column("n_positions", "int", "positions", "aligned positions that were fitted"),
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
