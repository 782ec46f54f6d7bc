"""Oracle: the gradient of TRL's `dapo` loss with respect to every `down_proj.bias`. Runs as a script of its own.

    python tests/objectives/trl_dapo_gradient.py FOLDER INPUTS.safetensors OUTPUTS.safetensors

FOLDER holds a Llama as `model.hf.save_pretrained(folder)` writes it. It is loaded with `mlp_bias=True`, so that the
bias of a block's down-projection is a steering vector at that block's `resid_post`.

INPUTS, tensors:
    prompt_ids, prompt_mask          int64 [batch, prompt]      padded on the left, mask 1 on tokens
    completion_ids, completion_mask  int64 [batch, completion]  padded on the right, mask 1 on trained tokens
    advantages                       float32 [batch] or [batch, completion]
    vectors.resid_post.{layer}       float32 [d_model]          optional, zero where missing
OUTPUTS, tensors: gradients.resid_post.{layer} (float32), loss (scalar).

The loss is `GRPOTrainer._compute_loss` of a real trainer, called once on this one batch: ratio 1 (no old log-probs), no
KL, and the denominator is the number of tokens in completion_mask. TRL changes global state and is slow to import,
hence a process of its own.
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

PREFIX = "vectors.resid_post."


def main(folder: Path, inputs: Path, outputs: Path) -> None:
    torch.set_num_threads(1)
    batch = load_file(inputs)
    vectors = {int(n.removeprefix(PREFIX)): batch.pop(n) for n in list(batch) if n.startswith(PREFIX)}
    model = _model(folder, vectors)
    trainer = _trainer(model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer.train(), which is not run here
    loss = trainer._compute_loss(trainer.model, batch | {"num_items_in_batch": batch["completion_mask"].sum()})
    loss.backward()
    gradients = {
        f"gradients.resid_post.{layer}": block.mlp.down_proj.bias.grad.contiguous()
        for layer, block in enumerate(model.model.layers)
    }
    save_file(gradients | {"loss": loss.detach()}, outputs)


def _model(folder: Path, vectors: dict[int, torch.Tensor]) -> LlamaForCausalLM:
    config = LlamaConfig.from_pretrained(folder)
    config.mlp_bias = True
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if ".mlp." in name and name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        parameter.requires_grad_(name.endswith("down_proj.bias"))
    for layer, vector in vectors.items():
        model.model.layers[layer].mlp.down_proj.bias.data.copy_(vector)
    return model


def _trainer(model: LlamaForCausalLM) -> GRPOTrainer:
    """A trainer that is only asked for its loss; its tokenizer and data set are never used."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        num_generations=2,
        steps_per_generation=1,
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=[lambda prompts, **_: [0.0] * len(prompts)],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
