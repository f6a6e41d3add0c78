"""`compile=true`: the layers as one graph of torch.compile, whose kernels are written in C++ or Triton at the first step.

From embedding to final norm; the loss keeps its own kernel, which never holds all logits. Batch and length are dynamic, so that
batches of other lengths compile nothing again (one more graph where a batch has a single row, and one for packed documents).
Weights, their names and checkpoints are those of the model without it; evaluation and generation run uncompiled.
"""

import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor

from ..model.transformer import Transformer
from ..run import TrainConfig

COMPILERS = ("g++", "clang++", "c++")


def compile_layers(model: Transformer, config: TrainConfig, *, backend: str = "inductor") -> None:
    """Compile what the model does in training, in place; nothing is compiled before the first step.

    Raises ValueError for layers and meshes that aren't covered, and where no C++ compiler is.
    """
    check_compile(model, config, needs_compiler=backend == "inductor")
    from torch._dynamo import maybe_mark_dynamic
    from torch._dynamo.exc import TorchDynamoException

    run = torch.compile(model.hidden_states, backend=backend)
    worked = False

    def call(ids: Tensor, **options: Any) -> Tensor:
        nonlocal worked
        tensors = [ids, *(value for value in options.values() if isinstance(value, Tensor))]
        for tensor in tensors:
            for dim in range(tensor.ndim):
                maybe_mark_dynamic(tensor, dim)
        if worked:
            return run(ids, **options)
        with warnings.catch_warnings():
            # torch.compile itself instantiates autograd functions, which warns.
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
            try:
                hidden = run(ids, **options)
            except TorchDynamoException as error:
                reason = str(error).strip().splitlines()[0][:200]
                raise ValueError(f"compile=true failed: {reason}; leave compile out") from error
        worked = True
        return hidden

    model.compiled = call


def check_compile(model: Transformer, config: TrainConfig, *, needs_compiler: bool = True) -> None:
    """Raise ValueError for what `compile_layers` doesn't cover."""
    if model.config.n_linear_layers or model.config.n_experts:
        kind = "linear attention" if model.config.n_linear_layers else "mixtures of experts"
        raise ValueError(f"compile=true is not covered for {kind}, whose loops depend on the data; leave it out")
    if model.config.n_predict:
        raise ValueError("compile=true is not covered with n_predict; leave one of them out")
    axes = {axis.partition(":")[0].strip() for axis in config.mesh.split(",")}
    if axes != {"dp"} or config.zero:
        raise ValueError(
            f"compile=true is not covered with mesh={config.mesh}, zero={config.zero}: only copies on dp are; leave one of them out"
        )
    compiler = os.environ.get("CXX")
    found = shutil.which(compiler) if compiler else next(filter(None, map(shutil.which, COMPILERS)), None)
    if needs_compiler and found is None:
        looked_for = compiler or ", ".join(COMPILERS)
        raise ValueError(
            f"compile=true needs a C++ compiler, and {looked_for} is not on the PATH; install g++, set CXX, or leave compile out"
        )
