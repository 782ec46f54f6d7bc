"""Schemas of what a run's training and evaluation leave behind."""

from __future__ import annotations

from steerlab.tables.column import Column

_SPLIT = (
    Column("task", "str", "1", "name of the task"),
    Column("split", "str", "1", "train or test (held out)"),
    Column("condition", "str", "1", "base, steered, greedy, few_shot, random_reward, format_reward, …"),
)

TRAINING: dict[str, tuple[Column, ...]] = {
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
        Column(
            "reward",
            "float",
            "1",
            "mean reward of the step's rollouts; absent where nothing is rewarded",
            optional=True,
        ),
        Column("reward_ema", "float", "1", "exponential moving mean of the reward", optional=True),
        Column("signal_share", "float", "share", "groups whose rewards are not all equal", optional=True),
        Column("loss", "float", "1", "value of the objective", optional=True),
        Column("loss_ema", "float", "1", "exponential moving mean of the loss", optional=True),
        Column("grad_norm", "float", "1", "global gradient norm before clipping", optional=True),
        Column("lr", "float", "1", "learning rate of the update", optional=True),
        Column(
            "tokens_per_s",
            "float",
            "tokens/s",
            "tokens drawn (of texts: read) per second of the whole step",
            optional=True,
        ),
        Column("completion_tokens", "float", "tokens", "mean completion length", optional=True),
        Column("rollout_s", "float", "s", "seconds spent sampling", optional=True),
        Column("reward_s", "float", "s", "seconds spent judging", optional=True),
        Column("update_s", "float", "s", "seconds spent in forward, backward and optimiser", optional=True),
        Column("wall_s", "float", "s", "seconds of the step", optional=True),
        Column("run", "str", "1", "name of the run, where several are drawn together", optional=True),
        Column("seed", "int", "1", "training seed, where several are drawn together", optional=True),
    ),
    "lens_fit": (
        Column("lens", "str", "1", "plain (final norm and head alone) or tuned (through the layer's translator)"),
        Column("layer", "int", "1", "0-based decoder block after which the stream is read"),
        Column("kl_nats", "float", "nats", "KL(the model's own output ‖ what the layer says), mean over texts"),
        Column("low", "float", "nats", "lower end of the 95 % interval over texts; missing for one text"),
        Column("high", "float", "nats", "upper end of the 95 % interval over texts"),
        Column("gain_nats", "float", "nats", "by how much it is less than the plain lens'; 0 for the plain lens"),
        Column("gain_low", "float", "nats", "lower end of the gain's 95 % interval, paired over texts"),
        Column("gain_high", "float", "nats", "upper end of the gain's 95 % interval"),
        Column("n_texts", "int", "texts", "held-out texts"),
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
}
