"""One config for every training run, in parts; its inputs known by content; what a resumption may change.

A flag, `--set key=value`, a key of a TOML file and a keyword argument in Python all name a field of one of the parts.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .model.config import ModelConfig
from .optim.schedule import SCHEDULES
from .settings import plain

# What may change between a run and its resumption. (`steps` moves the rest of the schedule: that is asked for.)
RESUMABLE = frozenset(
    {"steps", "checkpoint_every", "eval_every", "eval_batches", "keep", "patience", "mesh", "zero", "stages_per_rank"}
)
# What parameters are for, as base/model/init.py's Role has them (that module imports torch, this one doesn't).
VECTORS = ("gain", "offset", "bias", "balance", "log_rate", "time_step")
ROLES = ("embedding", "head", "hidden", "residual", "router", "conv", *VECTORS, "adapter")
DECAYED = tuple(role for role in ROLES if role not in VECTORS)  # weight decay acts on these
# The model's fields that follow from the tokenizer, so that no setting gives them.
FROM_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TrainConfig:
    """What the loop needs to know. Raises ValueError for values that can't work."""

    steps: int = 1000  # optimizer updates
    batch_size: int = 32  # sequences an update
    micro_batch: int = 32  # sequences at once on the device; the rest of the batch is accumulated
    learning_rate: float = 1e-3  # peak
    schedule: str = "cosine"  # of the rate after the warm-up: cosine, linear, constant or wsd (constant, then down)
    final_lr_fraction: float = 0.1  # of the peak, at the last step; a constant schedule has none
    decay_fraction: float = 0.2  # wsd: the last part of the steps, in which the rate falls
    warmup_steps: int | float = 20  # updates in which the rate rises to its peak; below 1: this share of all steps
    optimizer: str = "adamw"  # or muon (orthogonalized updates of hidden matrices), soap (AdamW in a better basis)
    embedding_rate: float = 1.0  # of the embedding and a tied head, times learning_rate
    head_rate: float = 1.0  # of an untied head, times learning_rate
    hidden_rate: float = 1.0  # of the matrices between hidden states and of routers, times learning_rate
    gain_rate: float = 1.0  # of norms and biases, times learning_rate
    decayed_roles: tuple[str, ...] = DECAYED  # what weight decay acts on; gain, bias and such may be added
    muon_momentum: float = 0.95  # muon: decay rate of the gradient's mean
    muon_polynomial: str = "best"  # muon: best (Polar Express) or jordan (one quintic; takes muon_iterations=5)
    muon_iterations: int = 3  # muon: polynomials in turn
    muon_normalize_rows: bool = False  # muon: each row by its running mean square too (NorMuon)
    soap_every: int = 10  # soap: updates between two refreshes of the eigenvectors
    soap_largest: int = 4096  # soap: longest side that is rotated
    weight_decay: float = 0.1  # of matrices, times the learning rate
    beta1: float = 0.9  # decay rate of the gradient's mean
    beta2: float = 0.95  # decay rate of the squared gradient's mean
    eps: float = 1e-8  # added to the root of the squared gradient's mean
    ema_decay: float = 0.0  # exponential average of the weights, evaluated beside them and exported; 0: none
    ema_result: bool = True  # with ema_decay: the average is the run's result, not the last step's weights
    noise_scale_every: int = 0  # steps between two measurements of the gradient noise scale; 0: never
    grad_clip: float = 1.0  # global 2-norm; 0: never clip
    dtype: str = "float32"  # of the arithmetic: float32, bfloat16 or float16; weights and moments stay float32
    checkpointing: bool = False  # recompute activations layer by layer in the backward pass
    recompute_layers: int | None = None  # how many layers, the first ones, checkpointing recomputes; none: all
    memory_budget: str = ""  # such as 6GiB: as few layers are recomputed as keep the predicted peak within it
    compile: bool = False  # pretraining and SFT: torch.compile of the layers, once; needs a C++ compiler
    checkpoint_every: int = 200  # steps; 0: only at the end
    keep: str = "last"  # which checkpoints stay: last or last=K, best (see best_by) and every=N, joined by commas
    best_by: str = (
        "val_loss"  # an evaluation's figure that says what is best: a loss (the lowest), or another (the highest)
    )
    eval_every: int = 100  # steps; 0: only at the end
    eval_batches: int = 16  # batches of batch_size sequences (pretraining)
    patience: int = 0  # evaluations in a row without a better one (see best_by) that end the run; 0: never
    seed: int = 0  # decides weights, data order and dropout
    mesh: str = (
        "dp"  # ranks along named axes, "dp:2,tp:2" (dp, fsdp, tp, pp, cp, ep); one without a number takes the rest
    )
    zero: int = (
        0  # ZeRO stage of dp's ranks: 0 copies; divided are 1 the optimizer's state, 2 gradients too, 3 weights too
    )

    stages_per_rank: int = 1  # of a pipeline: 1 is the 1F1B schedule, more the interleaved one

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "stages_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name in (
            *(
                "noise_scale_every",
                "warmup_steps",
                "checkpoint_every",
                "eval_every",
                "eval_batches",
                "patience",
                "seed",
            ),
            *("weight_decay", "grad_clip", "learning_rate", "final_lr_fraction", "eps"),
            *("embedding_rate", "head_rate", "hidden_rate", "gain_rate"),
        ):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be >= 0 and finite")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps={self.warmup_steps} must be a whole number of steps, or a share below 1")
        if self.recompute_layers is not None and not (self.checkpointing and self.recompute_layers >= 1):
            raise ValueError(
                f"recompute_layers={self.recompute_layers} is how many layers checkpointing recomputes; it must be >= 1, with "
                "checkpointing=true"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {self.dtype!r}; choose float32, bfloat16 or float16")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose {', '.join(SCHEDULES)}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie in (0, 1]")
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero} is no ZeRO stage; choose 0, 1, 2 or 3")
        if self.noise_scale_every and self.micro_batch >= self.batch_size:
            raise ValueError(
                f"noise_scale_every={self.noise_scale_every} compares a micro-batch with the whole batch, which is one of "
                f"{self.batch_size}; set micro_batch={max(1, self.batch_size // 2)} or less"
            )
        if unknown := sorted(set(self.decayed_roles) - set(ROLES)):
            raise ValueError(f"decayed_roles: {unknown[0]!r} is none of {', '.join(ROLES)}")
        self.kept_every  # noqa: B018 (raises for a `keep` that can't be read)

    @property
    def n_warmup(self) -> int:
        """Updates in which the rate rises."""
        return round(self.warmup_steps * self.steps) if self.warmup_steps < 1 else int(self.warmup_steps)

    @property
    def role_rates(self) -> dict[str, float]:
        """Each role's factor of the learning rate."""
        rates = dict.fromkeys(ROLES, 1.0) | {"embedding": self.embedding_rate, "head": self.head_rate}
        rates |= dict.fromkeys(("hidden", "residual", "router", "conv"), self.hidden_rate)
        return rates | dict.fromkeys(VECTORS, self.gain_rate)

    @property
    def keeps_best(self) -> bool:
        """The best checkpoint stays, and its weights are the run's result."""
        return "best" in self.keep.split(",")

    @property
    def kept_every(self) -> int:
        """Checkpoints at multiples of this many steps stay; 0: none for that reason."""
        return self._kept("every", 0)

    @property
    def kept_last(self) -> int:
        """So many of the newest checkpoints stay."""
        return self._kept("last", 1)

    def _kept(self, wanted: str, default: int) -> int:
        """The number of a word of `keep`. Raises ValueError for a word that means nothing."""
        found = default
        for word in self.keep.split(","):
            name, _, number = word.partition("=")
            if name in ("last", "every") and number.isdecimal() and int(number) > 0:
                found = int(number) if name == wanted else found
            elif word not in ("last", "best"):
                raise ValueError(
                    f"keep={self.keep!r}: {word!r} is none of last, last=K, best, every=N; join them by commas"
                )
        return found


@dataclass(frozen=True)
class Input:
    """A file or folder that a run reads."""

    path: Path  # where it was
    sha256: str  # of the bytes of its files, one after the other

    @classmethod
    def of(cls, path: Path | str, files: Sequence[Path] | None = None) -> "Input":
        """Read `files` (the path itself when not given). Raises OSError for what is missing or no regular file."""
        whole = hashlib.sha256()
        for file in files if files is not None else [Path(path)]:
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist or is not a regular file")
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return cls(Path(path), whole.hexdigest())


@dataclass(frozen=True)
class Run:
    """Everything that decides a training run, saved in run.json.

    A part that a stage doesn't have is None. `data`, `records`, `lora`, `quant` and `objective` are dataclasses of finetune, of
    which base knows no more than that they are dataclasses.
    """

    train: TrainConfig
    model: ModelConfig | None = None  # None: the base's own
    method: str = "full"  # which weights train: full, lora or qlora
    data: Any = None  # how rows become batches
    records: Any = None  # how records become rows
    pretrain: Any = None  # what pretraining alone has
    lora: Any = None  # the adapter
    quant: Any = None  # how a frozen base is stored
    objective: Any = None  # what alignment minimizes; None: the next token's cross entropy
    inputs: Mapping[str, Input] = field(default_factory=dict)  # what is read: data, tokenizer, base, eval_data

    def saved(self) -> dict[str, Any]:
        """The config as JSON knows it."""
        return plain(self)


def settings_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings of a saved config: field name -> value, over all its parts."""
    parts = [
        saved[name]
        for name in ("model", "train", "pretrain", "data", "records", "lora", "quant", "objective")
        if isinstance(saved.get(name), dict)
    ]
    return {key: value for part in parts for key, value in part.items() if key not in FROM_TOKENIZER}


def resumed_settings(requested: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved run's settings, with what may change taken from `requested` (checked by check_settings).

    Raises ValueError when something is requested that would make it another run.
    """
    settings = settings_of(saved)
    for key, value in requested.items():
        if key in settings and settings[key] != plain(value) and key not in RESUMABLE:
            raise ValueError(
                f"--resume goes on with {key}={settings[key]!r}, got {plain(value)!r}; leave it out, or --force a new run"
            )
        settings[key] = value
    return settings


def check_same_inputs(saved: Mapping[str, Any], now: Mapping[str, Input]) -> None:
    """Raise ValueError when a resumed run would read other bytes than it was started with. A moved file may be resumed."""
    before = saved.get("inputs")
    if not isinstance(before, dict):
        raise ValueError("run.json doesn't say which data the run was started with; start it over with --force")
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        flag = "--" + name.replace("_", "-")
        if old is None:
            assert new is not None
            raise ValueError(f"--resume: the run was started without {flag}, got {new.path}; leave it out")
        if not (isinstance(old, dict) and isinstance(old.get("sha256"), str)):
            raise ValueError(f"run.json is damaged: inputs.{name} is {old!r}; start the run over with --force")
        if new is None:
            raise ValueError(f"--resume: the run was started with {flag} {old.get('path')}; give it again")
        if old["sha256"] != new.sha256:
            raise ValueError(
                f"--resume: {name} {new.path} is not what the run was started with ({old.get('path')}, sha256 "
                f"{old['sha256'][:12]} then, {new.sha256[:12]} now); give the same content, or --force a new run"
            )
