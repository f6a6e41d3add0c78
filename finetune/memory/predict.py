"""Memory before the run: the real step on fake tensors, which have shapes and no memory."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.device import resolve_device
from ...base.model.config import ModelConfig
from ...base.model.config_checks import PATTERNS
from ...base.run import TrainConfig
from ...kernels.dispatch import predicting
from ..adapters.config import LoraConfig, is_regex
from .count import LiveBytes, Peak, Place
from .devices import CUDA_GRANULE, cpu_bytes_within, cuda_bytes_within, workspace_bytes
from .settings import MemorySettings, read_model_config
from .shapes import ShapeTensor
from .step import (
    Work,
    make_micro_batches,
    make_optimizer,
    run_decoding,
    run_generation,
    run_training_step,
    shaped_model,
)

SAMPLES = (3, 4)  # repetitions of a group of layers that are run in place of more
LONGEST_GROUP = 8  # layers that may repeat as a group, such as five with a window and one without


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one step. What lives through the run (`steady`), the most at any time, when that is and what it is made of."""

    method: str
    device: str  # cpu or cuda: which kernels were counted
    settings: MemorySettings
    n_params: int  # of the model without adapters
    n_trained: int
    weights: int  # as the method keeps them, adapters not included
    adapters: int
    gradients: int  # all of them, as after a backward pass
    optimizer: int  # its state
    cache: int  # keys and values; 0 unless the method is generate
    activations: tuple[int, ...]  # kept for the backward pass by each layer, embedding and loss not included
    loss: int  # the most that the final norm, the logits and the loss add at a time
    peak_bytes: int
    peak_at: str  # for example "backward, layer 0"
    at_peak: dict[str, int] = field(default_factory=dict)  # kind -> bytes, adding up to peak_bytes
    phases: dict[str, int] = field(default_factory=dict)  # phase -> its own peak

    @property
    def steady_bytes(self) -> int:
        """Weights, adapters, gradients and optimizer state: what full fine-tuning counts 16 bytes a parameter for."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"steady_bytes": self.steady_bytes}


def estimate_memory(
    config_or_dir: ModelConfig | Path | str,  # sizes, a preset's name, a model folder or a config.json
    *,
    method: str = "full",
    batch_size: int = 1,
    seq_len: int = 512,
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    checkpointing: bool = True,
    micro_batch: int | None = None,
    rank: int = 16,
    targets: tuple[str, ...] = MemorySettings.targets,
    double_quant: bool = True,
    lora: LoraConfig | None = None,  # an adapter with more than a rank and targets, in place of both
    device: str = "auto",  # whose kernels: cpu, cuda (no GPU is needed to ask), auto for what is here
) -> MemoryEstimate:
    """Predict the memory of one step: forward, backward, clipping and update run on fake tensors and every byte is counted.

    Needs no GPU and no memory. Layers that repeat, singly or as a group, are run 3 times and 4 times, and what each repetition
    adds is added for the rest: exact, since their specs are equal. For `cuda` each tensor is rounded up to 512 bytes and
    cuBLAS's workspace is added, as torch.cuda.max_memory_allocated counts them. Not covered: fragmentation and the CUDA context
    (about 0.5 GB outside the allocator), memory that a library takes within one operator, and other processes. Raises
    ValueError for unknown names.
    """
    settings = MemorySettings(
        method,
        batch_size,
        micro_batch,
        seq_len,
        dtype,
        optimizer,
        checkpointing,
        rank,
        tuple(targets),
        double_quant,
        lora,
    )
    return estimate(read_model_config(config_or_dir), settings, device=device)


def estimate(
    config: ModelConfig,
    settings: MemorySettings,
    *,
    device: str = "auto",
    whole: bool = False,  # run all layers however many there are
    work: Work | None = None,  # what the stage computes; None: the next token's loss
) -> MemoryEstimate:
    """`estimate_memory` on a settings object."""
    if (work is None) != (settings.stage == "sft"):
        raise ValueError(f"stage {settings.stage} and its work go together; see finetune/stages.py")
    if settings.method == "generate" and settings.seq_len > config.max_seq_len:
        raise ValueError(f"seq_len={settings.seq_len} is more than the model's max_seq_len={config.max_seq_len}")
    kind = device_kind(device)
    differs = differs_by_layer(settings.adapter) or settings.recompute_layers is not None
    run = over_layers(config, lambda fewer: _run(fewer, settings, kind, work), whole=whole or differs)
    return summarize(run, config, settings, kind)


def predict_run(
    config: ModelConfig,
    *,
    method: str,
    train: TrainConfig,
    seq_len: int,
    lora: LoraConfig | None = None,
    double_quant: bool = True,
    optimizer: str = "adamw",
    device: str = "auto",
    stage: str = "sft",
    work: Work | None = None,
) -> int:
    """Peak bytes of a run before it starts, for the training commands to print: about a second."""
    settings = MemorySettings(
        method=method,
        batch_size=train.batch_size,
        micro_batch=min(train.micro_batch, train.batch_size),
        seq_len=seq_len,
        dtype=train.dtype,
        optimizer=optimizer,
        checkpointing=train.checkpointing,
        lora=lora,
        double_quant=double_quant,
        stage=stage,
        recompute_layers=train.recompute_layers,
        averages=train.ema_decay > 0,
    )
    return estimate(config, settings, device=device, work=work).peak_bytes


def fits(device: str, n_bytes: int) -> str | None:
    """None when the device has that much free, else one line to warn with."""
    free = free_bytes(device)
    if n_bytes <= free:
        return None
    return (
        f"predicted peak {n_bytes / 2**30:.2f} GiB is more than the {free / 2**30:.2f} GiB free on {device}; "
        "lower micro_batch or the sequence length, set checkpointing=true, or use --lora or --qlora"
    )


def free_bytes(device: str) -> int:
    """What a new run can have: CUDA's free memory, or the RAM that the system calls available."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux: all pages, used or not
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- running and extrapolating -------------------------------------------------------------------------------------


@dataclass
class Counted:
    """What one run on fake tensors counted."""

    n_layers: int
    sizes: Counter[str]  # weights, adapters, gradients, optimizer, cache; n_trained
    kept: list[int]  # activations by layer, when the backward pass began
    peaks: dict[Place, Peak]


def device_kind(device: str) -> str:
    """cpu or cuda. Raises ValueError for another device."""
    kind = resolve_device("auto") if device == "auto" else device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    return kind


def new_counter(device: str) -> LiveBytes:
    """A counter of ShapeTensors that counts as the allocator of that device does."""
    if device == "cuda":
        return LiveBytes(shapes=True, granule=CUDA_GRANULE, within=cuda_bytes_within)
    return LiveBytes(shapes=True, within=cpu_bytes_within)


def add_workspace(counter: LiveBytes, *, backward: bool) -> Tensor:
    """Count what a GPU's libraries take from PyTorch's allocator, as long as the tensor that is returned lives."""
    n_bytes = workspace_bytes(backward=backward)
    workspace = ShapeTensor(torch.empty(n_bytes, dtype=torch.uint8, device="meta"))
    counter.add([workspace], "workspace")
    return workspace


def over_layers(config: ModelConfig, run: Callable[[ModelConfig], Counted], *, whole: bool = False) -> Counted:
    """run(config), or where layers repeat often its extrapolation from 3 and from 4 repetitions; `whole` runs all of them."""
    start, size, n_groups = (0, 1, 0) if whole else repeated_group(config)
    more = SAMPLES[1]
    if n_groups <= more:
        return run(config)
    runs = [run(with_groups(config, start, size, n_groups, keep=n)) for n in SAMPLES]
    return extrapolate(*runs, start=start, size=size, steps=n_groups - more)


def _run(config: ModelConfig, settings: MemorySettings, device: str, work: Work | None) -> Counted:
    """The step on a fake model. The tensors are the CPU's throughout, since fake CUDA ones need a CUDA build of PyTorch; for
    a GPU the kernels are chosen as there."""
    on_gpu = device == "cuda"
    counter = new_counter(device)
    with predicting("cuda" if on_gpu else "cpu"):
        model = shaped_model(config, settings, work)
        batches = None if work is None else make_micro_batches(config, settings, work)
        sizes = count_model(model, counter)
        if on_gpu:
            workspace = add_workspace(counter, backward=settings.method != "generate")  # noqa: F841 (it lives to the end)
        with counter:
            if settings.method == "generate":
                counter.enter("prompt", "", "temporaries")
                sizes["cache"] = run_generation(model, settings, "cpu", counter=counter).n_bytes
            else:
                optimizer = make_optimizer(model, settings)
                counter.add(optimizer.state_tensors().values(), "optimizer")
                sizes["optimizer"] = counter.kinds["optimizer"]
                if work is not None and (rows := work.rollout_rows(settings.batch_size)):
                    counter.enter("rollout", "", "temporaries")
                    sizes["cache"] = run_decoding(model, settings, "cpu", rows, counter=counter).n_bytes
                for batch in batches or ():
                    counter.add(batch.values(), "batch")
                run_training_step(model, optimizer, settings, "cpu", counter=counter, work=work, micro_batches=batches)
    kept = [counter.kept[i] for i in range(config.n_layers)]
    return Counted(config.n_layers, sizes, kept, counter.peaks)


def count_model(model: nn.Module, counter: LiveBytes) -> Counter[str]:
    """Count the model's tensors by kind and say how much of each there is, with the gradients to come."""
    trained = [p for p in model.parameters() if p.requires_grad]
    named = [*model.named_parameters(), *model.named_buffers()]
    adapters = [tensor for name, tensor in named if ".adapters." in name]
    counter.add(adapters, "adapters")
    own = {id(tensor) for tensor in adapters}
    counter.add([t for t in [*model.parameters(), *model.buffers()] if id(t) not in own], "weights")
    gradients = sum(counter.rounded(p.numel() * p.element_size()) for p in trained)
    return Counter(
        weights=counter.kinds["weights"],
        adapters=counter.kinds["adapters"],
        gradients=gradients,
        n_trained=sum(p.numel() for p in trained),
    )


def differs_by_layer(lora: LoraConfig) -> bool:
    """Whether an adapter may treat layers that are alike differently, so that none can stand for the others."""
    names = (*lora.targets, *lora.exclude_modules, *lora.modules_to_save, *(lora.rank_pattern or {}))
    return bool(lora.layers_to_transform) or any("." in name or is_regex(name) for name in names)


def repeated_group(config: ModelConfig) -> tuple[int, int, int]:
    """(first layer, layers in a group, how often the group repeats) of the repetition that leaves out the most layers.

    (0, 1, n_layers) where all layers are equal; (0, 6, 8) for 48 layers of which each sixth sees everything.
    """
    specs = [config.layer(i) for i in range(config.n_layers)]
    best = (0, 1, 1)
    for size in range(1, min(LONGEST_GROUP, config.n_layers) + 1):
        start = 0
        while start + size <= config.n_layers:
            end = start + size
            while end < config.n_layers and specs[end] == specs[end - size]:
                end += 1
            n = (end - start) // size
            if (n - 1) * size > (best[2] - 1) * best[1]:
                best = (start, size, n)
            start = max(start + 1, end - size + 1)
    return best


def with_groups(config: ModelConfig, start: int, size: int, n_groups: int, *, keep: int) -> ModelConfig:
    """The config with only `keep` repetitions of the group that repeated_group found."""
    left_out = range(start + keep * size, start + n_groups * size)
    layers = [i for i in range(config.n_layers) if i not in left_out]
    by_layer = {
        name: pattern and tuple(pattern[i] for i in layers) for name in PATTERNS for pattern in [getattr(config, name)]
    }
    return replace(config, n_layers=len(layers), **by_layer)


def extrapolate(few: Counted, more: Counted, *, start: int, size: int, steps: int) -> Counted:
    """From runs with 3 and with 4 repetitions of a group to `steps` more than 4.

    At each place (the first layer's backward pass, say) bytes grow by the same amount with every group added anywhere else.
    Between the first two and the last groups they change by the same amount from group to group, so the ends hold the peak.
    """
    aligned_from_end = start + 2 * size  # layers from the third group on are counted from the end
    peaks = {}
    for place, peak in more.peaks.items():
        phase, where = place
        if isinstance(where, int) and where >= aligned_from_end:
            before, after = (phase, where - size), (phase, where + steps * size)
        else:
            before, after = place, place
        peaks[after] = _further(few.peaks[before], peak, steps)
    sizes = Counter({key: n + steps * (n - few.sizes[key]) for key, n in more.sizes.items()})
    group = more.kept[start + size : aligned_from_end]
    kept = [*more.kept[:aligned_from_end], *group * steps, *more.kept[aligned_from_end:]]
    return Counted(more.n_layers + steps * size, sizes, kept, peaks)


def _further(few: Peak, more: Peak, steps: int) -> Peak:
    """What a peak becomes with `steps` more groups; bytes that neither run has are none."""
    kinds = {
        kind: more.kinds[kind] + steps * (more.kinds[kind] - few.kinds[kind]) for kind in {**few.kinds, **more.kinds}
    }
    return Peak(more.n_bytes + steps * (more.n_bytes - few.n_bytes), Counter(kinds))


def summarize(run: Counted, config: ModelConfig, settings: MemorySettings, device: str) -> MemoryEstimate:
    place = max(run.peaks, key=lambda at: run.peaks[at].n_bytes)
    phases: dict[str, int] = {}
    for (phase, _), peak in run.peaks.items():
        phases[phase] = max(phases.get(phase, 0), peak.n_bytes)
    phases.pop("start", None)
    loss = run.peaks.get(("forward", "loss"), Peak()).kinds["loss"]
    return MemoryEstimate(
        method=settings.method,
        device=device,
        settings=settings,
        n_params=config.n_params,
        n_trained=run.sizes["n_trained"],
        weights=run.sizes["weights"],
        adapters=run.sizes["adapters"],
        gradients=run.sizes["gradients"],
        optimizer=run.sizes["optimizer"],
        cache=run.sizes["cache"],
        activations=tuple(run.kept),
        loss=loss,
        peak_bytes=run.peaks[place].n_bytes,
        peak_at=_say(place),
        at_peak={kind: n for kind, n in run.peaks[place].kinds.most_common() if n},
        phases=phases,
    )


def _say(place: Place) -> str:
    phase, where = place
    if isinstance(where, int):
        return f"{phase}, layer {where}"
    return f"{phase}, {where}" if where else phase
