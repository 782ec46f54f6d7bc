"""The rival: one GRPO step of TRL 1.16 on workload W, tuned as far as its own settings go, or with LoRA as shipped.

`--adapter bias` (tuned). The trained parameters are ours: a Llama with `mlp_bias=True` in which everything but
`down_proj.bias` is frozen, which in this pre-norm family *is* a steering vector at `resid_post` (DESIGN §5). PEFT would
add overhead to the same thing. Weights and biases are resident in the dtype that steerlab uses in the same comparison;
TRL's own defaults (fp32 master with bf16 autocast, gradient checkpointing, logging) are off because each makes it
slower here. No reference model (beta = 0), one update per batch, `dapo` loss, Hugging Face generation: what TRL offers
on a machine without a GPU.

`--adapter lora` (as shipped): what TRL's own `get_peft_config(ModelConfig(use_peft=True))` gives: PEFT LoRA of rank 16,
alpha 32, dropout 0.05, on PEFT's targets for Llama (q_proj, v_proj), gradient checkpointing on. Not as shipped, as in
every case here: the bf16 flag (autocast over fp32 weights) is off, because this is a CPU and weights are resident in
the dtype of the comparison (PEFT keeps its own matrices in fp32); all 32 rows make one update; nothing is logged or
saved; plain AdamW, constant learning rate and clipping at 2, as on the other side. Rows per backward pass: 8, also
TRL's default.
`--adapter lora-tuned`: the same matrices without checkpointing and without dropout: what then remains of a ratio is the
engines' own.

What is not stock TRL, all in `_TimedTrainer` and `ForcedLengths`, and why:
1. `generate` gets one more logits processor, which keeps the end token away until a row's length is reached and then
   forces it. Cost: two indexed writes a token; a row that is done is done, as with any end token.
2. Times are taken around `generate`, and from the trainer's own step-begin to its step-end event. Building the data
   loader and the optimizer anew for every `train()` call is *not* counted, nor is anything else outside a step.
Tokenizing, sampling, padding, rewards, advantages, log-probs, loss, backward, clipping and AdamW are TRL's and
transformers' code, called by `trainer.train()`.

`python analyses/benchmarks/trl_baseline.py FOLDER --dtype float32` prints a step per line; `--serve` waits for a line
on standard input before each. FOLDER is a Hugging Face folder of SmolLM2-135M.
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
import workload
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config
from workload import ForcedLengths, Peaks, StepInfo, Workload, lengths_of


@dataclass(frozen=True)
class Options:
    """The rival's setting. The backward pass stops at the lowest of `layers` here as well."""

    folder: tyro.conf.Positional[Path]
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: Literal["bias", "lora", "lora-tuned"] = "bias"
    micro_batch: int = 8  # rows per forward and backward pass of the update; generation is one batch in any case
    layers: tuple[int, ...] | None = None  # trained layers; all of them when not given
    threads: int = 2
    steps: int = 2  # the first is a warm-up
    serve: bool = False  # one step per line on standard input


class _TimedTrainer(GRPOTrainer):
    """GRPOTrainer that times its own parts; see the module's header for what else it does."""

    def force(self, lengths: tuple[int, ...], eos: int) -> None:
        """Every later `generate` ends each row at its length."""
        processor, generate = ForcedLengths(lengths, eos), self.model.generate

        def timed(input_ids: Tensor, **inputs: object) -> Tensor:
            processor.n_prompt = input_ids.shape[1]
            start = time.perf_counter()
            tokens = generate(input_ids=input_ids, logits_processor=LogitsProcessorList([processor]), **inputs)
            self.rollout_s = time.perf_counter() - start
            start = time.perf_counter()
            self.peaks.between()
            self.paused_s = time.perf_counter() - start
            self.completion_tokens = int(lengths_of(tokens[:, input_ids.shape[1] :], eos).sum())
            return tokens

        self.model.generate = timed


class _Clock(TrainerCallback):
    """Seconds and memory between the trainer's step-begin and step-end events."""

    def __init__(self, peaks: Peaks) -> None:
        self.peaks = peaks

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:  # noqa: ARG002
        self.peaks.start()
        self.start = time.perf_counter()

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:  # noqa: ARG002
        self.wall_s = time.perf_counter() - self.start
        self.memory = self.peaks.stop()


def build_model(options: Options) -> LlamaForCausalLM:
    """SmolLM2 as a Llama with MLP biases of zero; only the down-projections' are trained, of `layers` or of all.

    For LoRA the model as it is; the trainer wraps it.
    """
    dtype = getattr(torch, options.dtype)
    if options.adapter != "bias":
        return LlamaForCausalLM.from_pretrained(options.folder, dtype=dtype)
    config = LlamaConfig.from_pretrained(options.folder)
    config.mlp_bias = True
    logging.set_verbosity_error()  # it would report the new biases as missing
    model = LlamaForCausalLM.from_pretrained(options.folder, config=config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if ".mlp." in name and name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        parameter.requires_grad_(False)
    for layer in range(config.num_hidden_layers) if options.layers is None else options.layers:
        model.model.layers[layer].mlp.down_proj.bias.requires_grad_(True)
    return model


def lora_config(options: Options) -> PeftConfig | None:
    """TRL's default LoRA, of `layers` or of all; None for the bias."""
    if options.adapter == "bias":
        return None
    dropout = {"lora_dropout": 0.0} if options.adapter == "lora-tuned" else {}
    config = get_peft_config(ModelConfig(use_peft=True, **dropout))
    config.layers_to_transform = None if options.layers is None else list(options.layers)
    return config


def make_step(options: Options) -> Callable[[], StepInfo]:
    """A function that runs one full step of TRL on workload W and reports it. Call it once to warm up."""
    work = workload.load()
    trainer = _trainer(work, options)
    trainer.remove_callback(PrinterCallback)  # it would print between the lines that `serve` writes
    trainer.force(work.lengths, work.eos)
    trainer.peaks = Peaks()
    clock = _Clock(trainer.peaks)
    trainer.add_callback(clock)

    def step() -> StepInfo:
        trainer.train()
        wall_s = clock.wall_s - trainer.paused_s
        assert trainer.completion_tokens == sum(work.lengths), "the forced lengths were not kept"
        return StepInfo(
            wall_s=wall_s,
            rollout_s=trainer.rollout_s,
            update_s=wall_s - trainer.rollout_s,
            prompt_tokens=work.prompt_tokens * work.group_size,
            completion_tokens=trainer.completion_tokens,
            **clock.memory,
        )

    return step


def _trainer(work: Workload, options: Options) -> _TimedTrainer:
    model, tokenizer = build_model(options), AutoTokenizer.from_pretrained(options.folder, padding_side="left")
    for group in work.groups:
        assert tuple(tokenizer(group.text)["input_ids"]) == group.tokens, "this tokenizer is not SmolLM2's"
    rows = len(work.lengths)

    def reward(prompts: list[str], **_: object) -> list[float]:
        assert prompts == [group.text for group in work.groups for _ in group.lengths], "rows are in another order"
        return list(work.rewards)

    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=1,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=rows // options.micro_batch,
        steps_per_generation=rows // options.micro_batch,
        num_generations=work.group_size,
        max_completion_length=max(work.lengths),
        shuffle_dataset=False,
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=2.0,
        gradient_checkpointing=options.adapter == "lora",
        use_cpu=True,
        bf16=False,
        fp16=False,
        optim="adamw_torch",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return _TimedTrainer(
        model=model,
        reward_funcs=[reward],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [group.text for group in work.groups]}),
        processing_class=tokenizer,
        peft_config=lora_config(options),
    )


def main(options: Options) -> None:
    """Prints steps as lines of JSON; or serves."""
    torch.set_num_threads(options.threads)
    step = make_step(options)
    if options.serve:
        workload.serve(step)
        return
    for _ in range(options.steps):
        print(json.dumps(asdict(step())), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
