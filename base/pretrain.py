"""`graft pretrain`: token shards -> a base folder that transformers opens."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..kernels.float8_linear import float8_problem
from .callbacks import Callbacks
from .data.ahead import BatchesAhead
from .data.batches import WindowBatches
from .data.ramp import BatchRamp
from .data.training_text import Specs, TrainingText, WindowOptions
from .device import explain_device, memory_bytes, peak_bytes, reset_peak, resolve_device
from .evaluate import HeldOut
from .follower import open_run
from .idle import refuse_idle
from .meter import Meter, peak_flops
from .model.config import ModelConfig
from .model.float8 import use_float8_
from .model.huggingface import left_out, save_model
from .model.init import parameter_roles
from .model.own_json import own_layout_note
from .model.presets import preset
from .model.sizes import with_sizes
from .model.transformer import Transformer, initialize_
from .optim.mup import check_width
from .parallel.export import export_model
from .parallel.mesh import Mesh, holds_model, is_copied, make_mesh, meets_in_micro_batches
from .parallel.ranks import join, ranks
from .parallel.same import check_same, facts_of
from .plan import flops_per_token
from .pretrain_config import PretrainConfig
from .progress import step_progress
from .recipe import check_resumed_depth, depth_settings
from .run import Input, Run, TrainConfig, check_same_inputs, resumed_settings
from .runlog import RunFolder
from .samples import Samples
from .settings import check_settings, split_settings
from .tokenizer.tokenizer import Tokenizer
from .train import train
from .training.checkpoints import checkpoint_of
from .training.compiled import compile_layers
from .training.history import check_evaluation
from .training.optimizers import check_optimizer
from .training.result import Result
from .training.sharded import evaluated, mesh_optimizer

Scorer = Callable[[Transformer, Tokenizer], dict[str, float]]
# (NAME=FILE ..., questions of each, tokenizer, max_seq_len)
BenchmarkOpener = Callable[[Sequence[str], int, Tokenizer, int], Scorer]
PARTS = {
    "model": ModelConfig,
    "train": TrainConfig,
    "data": WindowOptions,
    "pretrain": PretrainConfig,
}  # whose keys `graft pretrain` takes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def resolve(settings: Mapping[str, Any], *, preset_name: str | None, vocab_size: int) -> Run:
    """Preset + settings (from TOML, --set and flags) -> one config.

    Raises ValueError for unknown keys and sizes that don't fit each other.
    """
    checked = check_settings(settings, *PARTS.values())
    sizes, loop, windows, own = split_settings(checked, *PARTS.values())
    if sizes.pop("vocab_size", vocab_size) != vocab_size:
        raise ValueError(f"vocab_size={checked['vocab_size']} differs from the tokenizer's {vocab_size}; leave it out")
    model = with_sizes(replace(preset(preset_name or "micro"), vocab_size=vocab_size), **sizes)
    train = TrainConfig(**loop)
    check_optimizer(train.optimizer)
    if own.get("float8") and train.dtype != "bfloat16":
        raise ValueError(f"float8=true goes with dtype=bfloat16, got {train.dtype}: what isn't float8 is bfloat16")
    return Run(train=train, model=model, data=WindowOptions(**windows), pretrain=PretrainConfig(**own))


def check_size(config: ModelConfig, device: str) -> None:
    """Raise ValueError for a model that can't be built on this machine, before it is tried."""
    weights, available = 4 * config.n_params, memory_bytes(device)
    if available is not None and weights > available:
        raise ValueError(
            f"{config.n_params:,} parameters take {weights:,} bytes in float32, {device} has {available:,}; "
            "lower d_model, n_layers or d_ff"
        )


def pretrain(
    *,
    data: Specs,
    tokenizer: Path | str,
    out: Path | str,
    preset: str | None = None,  # whose sizes hold where `settings` gives none: nano, micro, ...
    depth: int | None = None,  # or the recipe's settings at so many layers (recipe.py)
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = False,
    **settings: Any,  # keys of ModelConfig, TrainConfig and WindowOptions, as `graft config pretrain` lists them
) -> dict[str, Any]:
    """`graft pretrain` from Python: trains a base on token shards into `out`; returns the summary's figures.

    Raises ValueError or OSError for bad input, Interrupted after a signal.
    """
    return run_pretrain(
        data=data,
        tokenizer=tokenizer,
        out=out,
        preset_name=preset,
        depth=depth,
        settings=settings,
        resume=resume,
        force=force,
        device=device,
        progress=progress,
    )


def run_pretrain(
    *,
    data: Specs,  # folders of token shards, each perhaps with =WEIGHT (data/mixture.py)
    tokenizer: Path | str,
    out: Path | str,
    preset_name: str | None = None,
    depth: int | None = None,  # sets what `settings` leaves open (recipe.py)
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = True,
    fit: Callable[[ModelConfig, TrainConfig, str], TrainConfig] | None = None,  # meets memory_budget
    predict: Callable[[ModelConfig, TrainConfig, str], int] | None = None,  # says the peak memory in bytes beforehand
    benchmarks: BenchmarkOpener | None = None,  # reads config.benchmarks' files; finetune/evaluation has it
) -> dict[str, Any]:
    """Pretrain a Transformer on shards and leave a base folder in `out`; returns the summary.

    The result depends on the config and the seed only: a run that was killed and resumed ends with the same weights. Under
    torchrun every rank reads its share of each step; rank 0 writes, and the others return the same summary.
    Raises ValueError or OSError for bad input, Interrupted after a signal.
    """
    requested_device, device = device, resolve_device(device)
    together, device = join(device)
    progress = progress and together.is_first
    tok = Tokenizer.load(tokenizer)
    text = TrainingText(data, tok.fingerprint(), tokenizer)
    with open_run(together, out, stage="pretrain", resume=resume, force=force) as run:
        inputs = {
            "data": text.input(),
            "tokenizer": Input.of(
                tokenizer, [path for name in TOKENIZER_FILES if (path := Path(tokenizer) / name).exists()]
            ),
        }
        config = _asked(settings or {}, run, inputs, preset_name=preset_name, depth=depth, vocab_size=tok.vocab_size)
        assert config.model is not None
        check_size(config.model, device)
        config = replace(config, model=with_special_ids(config.model, tok), inputs=inputs)
        check_same(together, facts_of(config))
        assert config.model is not None
        if config.train.memory_budget and fit is None:
            raise ValueError(
                "memory_budget is met by the command graft pretrain; in Python set checkpointing=True and recompute_layers"
            )
        if fit is not None:
            config = replace(config, train=fit(config.model, config.train, device))
            assert config.model is not None
        loop, seq_len = config.train, config.model.max_seq_len
        mesh = make_mesh(loop, config.model, together, device)
        ramp = BatchRamp(loop.batch_size, config.pretrain.batch_warmup_start, config.pretrain.batch_warmup_steps)
        _check_mesh(config, mesh, ramp)
        batches = text.batches(config.data, loop, seq_len=seq_len, n_readers=mesh.readers.n, ramp=ramp)
        windows = text.figures(batches, loop.steps)
        if progress:
            print(explain_device(requested_device, device), *text.notes(windows), sep="\n", file=sys.stderr)
            if note := own_layout_note(config.model):
                print(note, file=sys.stderr)
        predicted = predict(config.model, loop, device) if predict and together.is_first else None
        score = open_benchmarks(config.pretrain, benchmarks, tok, seq_len, copied=is_copied(mesh.shape, loop))
        model = Transformer(config.model).to(device)
        ratio = width_ratio(config.pretrain, model)
        initialize_(model, seed=loop.seed, width_ratio=ratio)
        model.checkpointing, model.recompute_layers = loop.checkpointing, loop.recompute_layers
        if config.pretrain.float8 and (note := start_float8(model, device)) and progress:
            print(note, file=sys.stderr)
        reset_peak(device)
        peak, peak_is = peak_flops(device)
        watch = Watch(tok, score, peak and peak * together.n, progress)
        names = [name for name, _ in model.named_parameters()]  # before it is divided
        result = _train(model, config, ratio, mesh, batches, text, run, device, watch)
        if together.is_first:
            _leave_base(model, tok, config, mesh, run, result, names)
        summary = {
            "n_params": config.model.n_params,
            **result.summary(),
            "n_train_tokens": text.n_tokens,
            "tokens_read": ramp.before(result.steps) * seq_len,
            **(text.figures(batches, result.steps) if result.steps != loop.steps else windows),
            **left_out(model),
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "mfu_peak_is": peak_is,
            "device": device,
            "n_ranks": together.n,
        }
        run.finish(summary)
        return summary


def _asked(
    settings: Mapping[str, Any],
    run: RunFolder,
    inputs: Mapping[str, Input],
    *,
    preset_name: str | None,
    depth: int | None,
    vocab_size: int,
) -> Run:
    """The config of a new run, or of the one that is resumed. Raises ValueError where what is asked for can't be."""
    given = requested = check_settings(settings, *PARTS.values())
    if run.previous:
        saved = run.previous["config"]
        check_same_inputs(saved, inputs)
        check_resumed_depth(depth, saved)
        requested = resumed_settings(given, saved)
        if preset_name is not None:
            _check_resumed_preset(preset_name, given, requested, vocab_size)
    elif depth is not None:
        if preset_name is not None:
            raise ValueError(f"--depth {depth} and --preset {preset_name} contradict each other; give one")
        requested = depth_settings(depth, vocab_size=vocab_size, given=given)
    config = resolve(requested, preset_name=preset_name, vocab_size=vocab_size)
    if not run.previous:
        refuse_idle(given, config)
    return config


def _check_resumed_preset(name: str, given: Mapping[str, Any], saved: Mapping[str, Any], vocab_size: int) -> None:
    """Raise ValueError when a run is resumed with a preset that isn't its model; the first start's own command may be given."""
    models = [
        resolve(settings, preset_name=one, vocab_size=vocab_size).model
        for settings, one in ((given, name), (saved, None))
    ]
    asked, own = (vars(model) for model in models)
    for key, value in asked.items():
        if value != own[key] and not key.endswith("_token_id"):
            raise ValueError(
                f"--resume goes on with {key}={own[key]!r}, preset {name} has {value!r}; leave it out, or --force a new run"
            )


def _check_mesh(config: Run, mesh: Mesh, ramp: BatchRamp) -> None:
    """Raise ValueError for settings of pretraining that this mesh would not follow."""
    if mesh.shape.pp > 1 and config.data.document_mask:
        raise ValueError(f"document_mask can't be passed on from stage to stage of mesh={mesh.shape}; leave pp out")
    if ramp.steps and meets_in_micro_batches(mesh.shape, config.train):
        raise ValueError(
            f"batch_warmup_steps={ramp.steps} is not covered for mesh={mesh.shape}, zero={config.train.zero}; leave it out"
        )


def _leave_base(
    model: Transformer,
    tokenizer: Tokenizer,
    config: Run,
    mesh: Mesh,
    run: RunFolder,
    result: Result,
    names: Sequence[str],  # of the parameters before they were divided
) -> None:
    """Write the base's files: from the model, or from the checkpoint's parts where no rank holds it whole."""
    assert config.model is not None
    with run.results() as folder:
        if holds_model(mesh.shape, config.train):
            save_model(model.cpu(), folder)
        else:
            checkpoint = checkpoint_of(run.checkpoints, result.best_step or result.steps)
            export_model(checkpoint, config.model, names, folder)
        tokenizer.save(folder)


@dataclass(frozen=True)
class Watch:
    """What looks at a run while it trains."""

    tokenizer: Tokenizer
    score: Scorer | None  # benchmarks at each evaluation
    peak: float | None  # FLOP/s of all ranks' devices, for MFU
    progress: bool


def open_benchmarks(
    config: PretrainConfig, opener: BenchmarkOpener | None, tokenizer: Tokenizer, max_seq_len: int, *, copied: bool
) -> Scorer | None:
    """What scores config.benchmarks, whose files are read now; None without any.

    Raises ValueError where nothing can, and for samples or benchmarks of a model that no rank holds whole.
    """
    for name, value in (("sample_every", config.sample_every), ("benchmarks", config.benchmarks)):
        if value and not copied:
            raise ValueError(f"{name} needs the whole model on each rank; use mesh dp with zero=0, or leave it out")
    if not config.benchmarks:
        return None
    if opener is None:
        raise ValueError(
            "benchmarks need a reader of their files; use graft pretrain, or give run_pretrain benchmarks="
        )
    return opener(config.benchmarks, config.benchmark_questions, tokenizer, max_seq_len)


def _train(
    model: Transformer,
    config: Run,
    ratio: float,  # muP's
    mesh: Mesh,
    batches: WindowBatches,
    text: TrainingText,
    run: RunFolder,
    device: str,
    watch: Watch,
) -> Result:
    loop, own = config.train, config.pretrain
    held_out = HeldOut(
        text.names, text.val, seq_len=batches.seq_len, batch_size=loop.batch_size, n_batches=loop.eval_batches
    )

    def evaluate() -> dict[str, float]:
        figures = held_out.figures(evaluated(model, optimizer), loop.dtype, device)
        return figures | watch.score(model, watch.tokenizer) if watch.score else figures

    check_evaluation(loop, has_evaluation=held_out.exists)
    samples = []
    if own.sample_every:
        settings = {"every": own.sample_every, "prompts": own.sample_prompts, "n_tokens": own.sample_tokens}
        samples = [Samples(model, watch.tokenizer, **settings, seed=loop.seed, shown=watch.progress)]
    meter = Meter(steps=loop.steps, flops_per_token=flops_per_token(model.config, batches.seq_len), peak=watch.peak)
    if (own.sample_every or own.benchmarks) and not (holds_model(mesh.shape, loop) and mesh.shape.cp == 1):
        raise ValueError(
            f"sample_every and benchmarks generate with the whole model, which mesh={mesh.shape} with zero={loop.zero} divides; "
            "leave them out, or use dp with zero 0 to 2"
        )
    optimizer = mesh_optimizer(model, loop, mesh, roles=parameter_roles(model), width_ratio=ratio)
    if loop.compile:
        compile_layers(model, loop)
    # All validation is done: only now may --force touch what a former run left.
    run.start(config.saved(), seed=loop.seed)
    ranks().wait()  # --force sets a former run's checkpoints aside in there: no rank may take them for its own
    with step_progress("pretrain", loop.steps, shown=watch.progress) as observe:
        return train(
            model,
            optimizer,
            BatchesAhead(batches.batch_at, n_steps=loop.steps, pin=device.startswith("cuda")),
            loop,
            run,
            evaluate=evaluate if held_out.exists else None,
            on_step=observe,
            meter=meter,
            callbacks=Callbacks(samples),
            device=device,
        )


def start_float8(model: Transformer, device: str) -> str:
    """Use float8 products where the device has them; returns what happened, in a line."""
    if problem := float8_problem(device):
        return f"float8=true: {problem}; products are in bfloat16"
    return f"float8 products in {use_float8_(model)} linears"


def width_ratio(config: PretrainConfig, model: Transformer) -> float:
    """muP's r = d_model / base width; 1 without it. Raises ValueError for an architecture that it doesn't cover."""
    if config.mup_base_width is None:
        return 1.0
    names = {name for name, _ in model.named_parameters()}
    scales = model.config.scale_embeddings
    return check_width(config.mup_base_width, model.config.d_model, names, scales_embeddings=scales)


def with_special_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The tokenizer's bos, eos and pad ids, which config.json repeats for generation."""
    return replace(
        config,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
