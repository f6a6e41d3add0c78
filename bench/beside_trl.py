"""graft's fine-tuning and TRL's SFTTrainer with PEFT on one base, ready to take the same steps: for parity.py and finetune.py.

Same rows in the same order, same AdamW, same constant rate, and PEFT's adapter is given the numbers of graft's. Each side
tokenizes, masks and collates by itself. Both compute in float32 without checkpointing, dropout or packing.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.base.loss import n_labels, next_token_loss
from graft.base.model.huggingface import load_config
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer
from graft.base.precision import LossScaler
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.base.training.optimizers import Optimizer, make_optimizer
from graft.base.training.step import one_step
from graft.finetune import sft
from graft.finetune.adapters.lora import lora_layers
from graft.finetune.data.dataset import encode_dataset
from graft.finetune.data.records import read_all
from graft.finetune.optimizers import OPTIMIZERS

RANK, ALPHA = 16, 32.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 1.0}


class Ours:
    """graft's model, batches and optimizer as `graft sft` makes them."""

    def __init__(
        self,
        base: Path,
        rows: Sequence[dict[str, Any]],
        *,
        method: str,
        steps: int,
        batch_size: int,
        rate: float,
        chat_template: str | None = None,
        seed: int = 0,
    ) -> None:
        settings = {
            **ADAM, "steps": steps, "batch_size": batch_size, "learning_rate": rate, "seed": seed, "warmup_steps": 0,
            "schedule": "constant", "rank": RANK, "alpha": ALPHA, "chat_template": chat_template,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            inputs, records = sft.run_inputs(base, file), read_all([file])
        config = sft.resolve(settings, method=method, n_rows=len(rows))
        self.config = dataclasses.replace(config, inputs=inputs)
        tokenizer = Tokenizer.load(base)
        self.template = sft.template_for(config.data, tokenizer, None)
        limit = sft.row_limit(None, load_config(base))
        encoded, _ = encode_dataset(records, tokenizer, self.template, limit)
        self.batches, _ = sft.make_batches(self.config, encoded, [])
        self.rows = [
            rows[i] for step in range(steps) for i in self.batches.records_at(step)
        ]  # in the order of training
        self.model: Transformer = sft.prepare_model(self.config, "cpu")
        self.model.train()
        self.step_number, self.scaler = 0, LossScaler("float32")
        self.optimizer: Optimizer | None = None

    def step(self) -> float:
        """The next step of `graft sft`; its loss."""
        if self.optimizer is None:
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            self.optimizer = make_optimizer(trained, self.config.train, OPTIMIZERS, roles=parameter_roles(self.model))
        line = one_step(
            self.model, self.optimizer, self.batches.batch_at(self.step_number), self.config.train, self.scaler,
            self.step_number, next_token_loss, n_labels, "cpu",
        )  # fmt: skip
        self.step_number += 1
        return line["loss"]


def trainer_beside(
    ours: Ours,
    base: Path,
    *,
    steps: int,
    around_step: tuple[Callable[[], None], Callable[[], None]] | None = None,  # called before and after each step
) -> tuple[Any, list[float]]:
    """TRL's trainer over the same rows with the adapter of `ours`, and the list that its `train()` appends losses to."""
    import datasets
    import peft
    import transformers
    import trl

    quantized = ours.config.method == "qlora"
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if quantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    is_chat = "messages" in ours.rows[0]
    if is_chat:
        tokenizer.chat_template = ours.template.source
    losses: list[float] = []

    class Recorded(trl.SFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    class Around(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if around_step is not None:
                around_step[0]()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if around_step is not None:
                around_step[1]()

    loop = ours.config.train
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=loop.batch_size, learning_rate=loop.learning_rate,
            lr_scheduler_type="constant", optim="adamw_torch_fused", adam_beta1=loop.beta1, adam_beta2=loop.beta2,
            adam_epsilon=loop.eps, weight_decay=loop.weight_decay, max_grad_norm=loop.grad_clip, use_cpu=True, bf16=False,
            gradient_checkpointing=False, train_sampling_strategy="sequential", packing=False, max_length=None,
            assistant_only_loss=is_chat, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Recorded(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(list(ours.rows)),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"
            ),
            callbacks=[Around()],
        )
    adapted: nn.Module = trainer.model.base_model.model
    for path, layer in lora_layers(ours.model):
        (update,) = layer.updates.values()
        peer: Any = adapted.get_submodule(path)
        for name, weights in (("lora_A", update.lora_a), ("lora_B", update.lora_b)):
            parameter = getattr(peer, name)["default"].weight
            parameter.data = weights.detach().clone().float()  # TRL holds a 4-bit model's adapter in bfloat16
    return trainer, losses
