"""What is attached where: the settings of an adapter of any kind."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the output head
DEFAULT = "default"  # the adapter's name where there is only one, as in PEFT
KINDS = ("lora", "prefix", "bottleneck")
INITS = ("default", "gaussian", "pissa")


@dataclass(frozen=True)
class LoraConfig:
    """What is attached where. The defaults follow "LoRA Without Regret" (Schulman et al. 2025): every linear, alpha 32.

    Raises ValueError for values that can't work, and for options of one kind of adapter that another kind doesn't have.
    """

    rank: int = 16  # of the update's two factors
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the adapter's input, while training
    # last parts of module paths, or whole paths, or all-linear, or regular expressions that match a whole path
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rank_stabilized: bool = False  # scale = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732, eq. 4)
    use_dora: bool = False  # train each output's magnitude apart from its direction (Liu et al. 2024, arXiv:2402.09353)
    init: str = "default"  # of A and B: default (PEFT's), gaussian, or pissa (the weight's largest singular vectors)
    lora_plus_ratio: float = 1.0  # learning rate of B over that of A (Hayou et al. 2024, arXiv:2402.12354); 16 is usual
    rank_pattern: dict | None = None  # other ranks: {regular expression for the end of a path = rank}, as PEFT's
    alpha_pattern: dict | None = None  # other alphas, in the same way
    exclude_modules: tuple[str, ...] = ()  # what the targets name and shall stay bare, written like targets
    layers_to_transform: tuple[int, ...] = ()  # numbers of the layers that get an adapter; none given: all
    layers_pattern: tuple[str, ...] = ()  # names of the lists that these numbers count in; none given: any
    modules_to_save: tuple[
        str, ...
    ] = ()  # ends of the paths of embeddings, heads, norms and linears that train in full
    trainable_token_indices: tuple[int, ...] = ()  # ids whose rows of the embedding (and of a tied head) train
    ensure_weight_tying: bool = False  # a tied embedding in modules_to_save stays tied to the head
    adapter_kind: str = (
        "lora"  # or prefix (Li & Liang 2021, arXiv:2101.00190), bottleneck (Houlsby 2019, arXiv:1902.00751)
    )
    prefix_tokens: int = 16  # prefix: learned keys and values before each layer's own
    bottleneck_size: int = 64  # bottleneck: width between the down and the up projection

    def __post_init__(self) -> None:
        for name in ("rank", "prefix_tokens", "bottleneck_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1; start from {getattr(LoraConfig, name)}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be > 0 and finite; start from 32")
        if not 0 < self.lora_plus_ratio < math.inf:
            raise ValueError(
                f"lora_plus_ratio={self.lora_plus_ratio} must be > 0 and finite; 16 is usual, 1 is plain LoRA"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        for name, value, known in (("adapter_kind", self.adapter_kind, KINDS), ("init", self.init, INITS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose {', '.join(known)}")
        self._check_patterns()
        self._check_together()

    def _check_patterns(self) -> None:
        for name, table in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern, value in (table or {}).items():
                whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
                if not (whole if name == "rank_pattern" else number):
                    expected = "a whole number of at least 1" if name == "rank_pattern" else "a number above 0"
                    raise ValueError(f"{name}: {pattern!r} has {value!r}; expected {expected}")
                compiled(pattern, name, f"(.*\\.)?({pattern})$")
        for name in ("targets", "exclude_modules"):
            for target in getattr(self, name):
                if is_regex(target):
                    compiled(target, name)
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("layers_pattern needs layers_to_transform; give the layers' numbers, or leave it out")
        if self.layers_to_transform and (regex := next(filter(is_regex, self.targets), None)):
            raise ValueError(
                f"layers_to_transform can't be used with the regular expression {regex!r} in targets; put the layers into it"
            )

    def _check_together(self) -> None:
        default = LoraConfig.__dataclass_fields__
        if self.adapter_kind != "lora":
            for name in default:
                if name in ("dropout", "adapter_kind", "prefix_tokens", "bottleneck_size"):
                    continue
                if getattr(self, name) != default[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is about LoRA; adapter_kind={self.adapter_kind} has none"
                    )
            if self.dropout and self.adapter_kind == "prefix":
                raise ValueError(f"dropout={self.dropout} is not defined for adapter_kind=prefix; leave it out")
        if self.init == "pissa" and self.use_dora:
            raise ValueError("init=pissa with use_dora=true can't be saved as a plain adapter; choose one of them")
        if self.trainable_token_indices and min(self.trainable_token_indices) < 0:
            raise ValueError(f"trainable_token_indices holds {min(self.trainable_token_indices)}; ids start at 0")
        if len(set(self.trainable_token_indices)) != len(self.trainable_token_indices):
            raise ValueError("trainable_token_indices names an id twice; give each once")
        if self.ensure_weight_tying and not self.modules_to_save:
            raise ValueError(
                "ensure_weight_tying=true is about modules_to_save; name the embedding there, or leave it out"
            )

    @property
    def scale(self) -> float:
        """Of layers that no pattern names."""
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        """What B A is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but pairs of A and B with one learning rate."""
        return self.beyond_lora is None

    @property
    def beyond_lora(self) -> str | None:
        """The first setting that makes it more than pairs of A and B with one learning rate, as key=value; or None."""
        for name in (*("adapter_kind", "use_dora", "lora_plus_ratio", "modules_to_save", "trainable_token_indices"),):
            value = getattr(self, name)
            if value != LoraConfig.__dataclass_fields__[name].default:
                return f"{name}={list(value) if isinstance(value, tuple) else value}"
        return "init=pissa" if self.init == "pissa" else None


def is_regex(target: str) -> bool:
    """Whether a target is a regular expression: module paths hold letters, digits, "_", "-" and "." alone."""
    return re.fullmatch(r"[\w.\-]*", target) is None


def compiled(pattern: str, where: str, used: str | None = None) -> re.Pattern[str]:
    """The regular expression, in the form in which it is used. Raises ValueError for what is none."""
    try:
        return re.compile(used or pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} holds {pattern!r}, no regular expression ({error})") from None


def pattern_value(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """The value of the first pattern that matches the end of a path from a dot on, as PEFT reads rank_pattern."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return (patterns or {}).get(path, default)
