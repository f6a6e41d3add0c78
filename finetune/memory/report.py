"""What the training commands say about memory before they start."""

import sys

from ...base.model.config import ModelConfig
from ...base.run import TrainConfig
from ..adapters.config import LoraConfig
from .predict import fits, predict_run
from .step import Work
from .units import say_bytes


def print_prediction(
    config: ModelConfig,
    train: TrainConfig,
    device: str,
    *,
    method: str = "full",
    seq_len: int | None = None,  # tokens a row; None: the model's longest
    lora: LoraConfig | None = None,
    double_quant: bool = True,
    stage: str = "sft",
    work: Work | None = None,  # of alignment's stages
) -> int:
    """Print the predicted peak of a step to standard error, warn when the device has less free, and return it in bytes."""
    predicted = predict_run(
        config,
        method=method,
        train=train,
        seq_len=seq_len or config.max_seq_len,
        lora=lora,
        double_quant=double_quant,
        optimizer=train.optimizer,
        device=device,
        stage=stage,
        work=work,
    )
    print(f"predicted peak memory of tensors: {say_bytes(predicted)} on {device}", file=sys.stderr)
    warning = fits(device, predicted)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return predicted
