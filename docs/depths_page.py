"""The page of the dial: what each depth of `graft pretrain --depth` sets, and the small presets, with their memory and time."""

from dataclasses import replace

from graft.base.model.config import ModelConfig
from graft.base.model.presets import PRESETS
from graft.base.plan import DEVICES, compute_optimal_tokens, flops_per_token, training_seconds
from graft.base.recipe import RECIPE, model_at, training
from graft.base.run import TrainConfig
from graft.finetune.memory.predict import predict_run
from graft.finetune.memory.settings import SMALL_VOCAB
from graft.finetune.memory.units import say_bytes, say_seconds

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
SMALL = ("nano", "micro", "mini", "small", "medium")
CPU_FLOPS = 1e11  # of the column's title: a few cores of a CPU at float32
GPU_MFU = 0.4


def page() -> str:
    """Markdown. Memory is predicted by running each step on tensors of shapes (about half a second a row)."""
    head = "| layers | d_model | parameters | tokens | sequence | batch | rate | memory | at 1e+11 FLOP/s | one H100 |"
    lines = [
        "# Depths and presets",
        "",
        "`graft pretrain --depth N` sets the model's sizes, batch, steps, optimizer, rate and schedule by the recipe in "
        "`base/recipe.py`; whatever a flag, `--set` or a TOML file gives wins over it. `graft plan --budget 20min` times steps on "
        "your machine and chooses the depth and the tokens that fill the time.",
        "",
        f"A vocabulary of {SMALL_VOCAB:,}; {RECIPE.tokens_per_param:g} tokens a parameter; the memory of a step's tensors in "
        f"float32 as graft predicts it; time at {CPU_FLOPS:.0e} FLOP/s (`graft plan --budget` measures yours), and at "
        f"{GPU_MFU:.0%} of an H100's bfloat16 rate.",
        "",
        head,
        "| ---: " * 10 + "|",
    ]
    for depth in DEPTHS:
        model = model_at(depth, SMALL_VOCAB)
        lines.append(_row(str(depth), model, TrainConfig(**training(model))))
    lines += [
        "",
        "The presets, sizes alone: batch, rate and steps are `graft pretrain`'s defaults until you set them, so `tokens` are those "
        "that a model of this size wants.",
        "",
        head.replace("layers", "preset"),
        "| ---: " * 10 + "|",
    ]
    for name in SMALL:
        model = replace(PRESETS[name], vocab_size=SMALL_VOCAB)
        lines.append(_row(f"`{name}`", model, TrainConfig()))
    return "\n".join([*lines, ""])


def _row(name: str, model: ModelConfig, train: TrainConfig) -> str:
    tokens = compute_optimal_tokens(model.n_params)
    flops = flops_per_token(model, model.max_seq_len) * tokens
    memory = predict_run(
        model, method="full", train=train, seq_len=model.max_seq_len, optimizer=train.optimizer, device="cpu"
    )
    times = [flops / CPU_FLOPS, training_seconds(flops, device_flops=DEVICES["h100"].flops, mfu=GPU_MFU)]
    cells = [
        *(name, f"{model.d_model:,}", f"{model.n_params:,}", f"{tokens:.3g}", f"{model.max_seq_len:,}"),
        *(f"{train.batch_size:,}", f"{train.learning_rate:.3g}", say_bytes(memory), *map(say_seconds, times)),
    ]
    return f"| {' | '.join(cells)} |"
