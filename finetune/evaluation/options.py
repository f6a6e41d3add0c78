"""How `graft eval` reads records and scores them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ...base.generate.sampling import Sampling
from ..data.dataset import DatasetOptions

Score = Literal["exact", "likelihood"]
TEXT_METRICS = ("chrf", "bleu")  # of answers that are free text, by sacrebleu
OF_SAMPLES = ("temperature", "top_p", "seed", "verify")  # choices that one greedy answer hasn't
MAX_LABELS = 20  # so few distinct answers are classes, and F1 is given


@dataclass(frozen=True)
class EvalOptions:
    """How records are read and scored. Raises ValueError for an unknown choice."""

    # exact: the greedy answer equals the record's; likelihood: the record's answer is the most probable of all answers
    score: Score = "exact"
    on_too_long: str = "error"  # records whose prompt leaves no room for an answer: error (all are listed), or drop
    on_empty: str = "error"  # records with a null or empty answer or text: error (all are listed), or drop
    special_tokens: str = "text"  # what a special token that the data spells is: plain text, or the token
    fields: Mapping[str, str] | None = None  # other field names of the rows
    chat_template: str | None = None  # a name or a file; None: the adapter's, else the base's
    template_args: Mapping[str, Any] | None = None  # None: those of training
    batch_size: int = 32
    metrics: tuple[str, ...] = ()  # of TEXT_METRICS, beside the share of right answers
    max_new_tokens: int | None = None  # of an answer; None: the longest true one's and two
    n_samples: int = 0  # answers drawn for each record; 0: one greedy answer
    temperature: float = 0.8  # of those samples
    top_p: float | None = 0.95
    seed: int = 0
    verify: str = "exact"  # what makes a sample right: a reward's name (finetune/align/rewards.py), 1 being right
    pass_k: tuple[int, ...] = ()  # ks of pass@k; (): 1, 2, 4, ... up to n_samples

    def __post_init__(self) -> None:
        for name, known in (("score", get_args(Score)), ("on_too_long", ("error", "drop"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)!r} is unknown; choose {', '.join(known)}"
                )
        if unknown := [name for name in self.metrics if name not in TEXT_METRICS]:
            raise ValueError(f"--metric {unknown[0]!r} is unknown; choose {', '.join(TEXT_METRICS)}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size} must be >= 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} must be >= 1")
        if self.max_new_tokens is not None and self.score == "likelihood":
            raise ValueError("--max-new-tokens is about answers and --score likelihood writes none; leave one out")
        self.dataset  # noqa: B018 (raises for an unknown choice)
        self._check_samples()

    def _check_samples(self) -> None:
        if self.n_samples < 0:
            raise ValueError(f"--samples {self.n_samples} must be >= 0; 0 takes one greedy answer")
        if self.pass_k and not self.n_samples:
            raise ValueError("--pass-k is about several samples a record; add --samples N")
        if wrong := [k for k in self.pass_k if not 1 <= k <= self.n_samples]:
            raise ValueError(f"--pass-k {wrong[0]} must lie between 1 and --samples {self.n_samples}")
        if not self.n_samples:
            for one in fields(self):
                if one.name in OF_SAMPLES and getattr(self, one.name) != one.default:
                    raise ValueError(
                        f"--{one.name.replace('_', '-')} is about several samples a record; add --samples N"
                    )
            return
        if self.score == "likelihood":
            raise ValueError("--samples draws answers and --score likelihood writes none; leave one out")
        self.sampling(1)
        if self.temperature == 0:
            raise ValueError("--temperature 0 draws the same answer each time; choose one above 0 with --samples")

    def sampling(self, room: int) -> Sampling:
        """How the samples are drawn."""
        return Sampling(self.temperature, top_p=self.top_p, max_new_tokens=room, seed=self.seed)

    @property
    def ks(self) -> tuple[int, ...]:
        """The ks of pass@k."""
        return self.pass_k or tuple(1 << i for i in range(self.n_samples.bit_length()))

    @property
    def dataset(self) -> DatasetOptions:
        """The same choices for `encode_dataset`; texts become windows."""
        return DatasetOptions("auto", self.on_empty, self.special_tokens)  # pyright: ignore[reportArgumentType]
