"""`graft reward`: preference rows -> a model that scores answers (Bradley-Terry on a scalar head), and that model as a reward.

The folder is an adapter (lora, qlora) or a base (full), and reward_head.safetensors beside it, which other readers ignore.
`model:FOLDER` in a reward spec scores a completion by it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...base.checkpoint import load_tensors, save_tensors
from ...base.json_fields import read_json
from ...base.model.transformer import Transformer
from ...base.pretrain import TOKENIZER_FILES
from ...base.run import Input, Run
from ...base.tokenizer.tokenizer import Tokenizer
from ...base.training.objective import Batch, Figures, Objective
from ..adapters.bank import AdapterBank
from ..adapters.files import CONFIG, GRAFT, read_adapter
from ..data.chat import ChatTemplate, encode_record, encode_whole
from ..data.records import Message, Record, to_record
from ..loading import load_model
from ..sft import row_limit
from . import preference_task, setup
from .preference_rows import PreferenceData
from .preference_task import PreferenceTask
from .prompts import prompt_of
from .reward_model import ScalarHead, bradley_terry_loss
from .run import Source, Stage, align
from .step_memory import PairWork

HEAD = "reward_head.safetensors"
LEARNING_RATES = {"full": 1e-5, "lora": 3e-4, "qlora": 3e-4}  # peak


@dataclass(frozen=True)
class RewardModelOptions:
    """The loss, and how rows become batches. Raises ValueError for values that can't work."""

    center: float = 0.0  # weight of (chosen + rejected)^2, which keeps scores around 0; 0.01 is usual
    epochs: float = 1.0  # passes over the pairs, when `steps` is not given
    max_seq_len: int | None = None  # tokens of prompt and answer, longer ones are cut; none: the model's
    packing: bool = True  # answers end to end in one row, each seeing only itself, instead of one a row, padded

    def __post_init__(self) -> None:
        if not (self.center >= 0 and math.isfinite(self.center)):
            raise ValueError(f"center={self.center} must be >= 0 and finite")


class RewardObjective:
    """-log s(score of chosen - score of rejected), summed over pairs. Figures: accuracy, margin, chosen and rejected score."""

    def __init__(self, options: RewardModelOptions) -> None:
        self.options = options

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        chosen, rejected = answer_scores(cast(Transformer, model), batch).view(-1, 2).unbind(1)
        n = chosen.shape[0]
        value = bradley_terry_loss(chosen, rejected, center=self.options.center)
        margin = (chosen - rejected).detach()
        figures = {"accuracy": (margin > 0).float().sum(), "margin": margin.sum()}
        return value * n, figures | {"chosen_score": chosen.detach().sum(), "rejected_score": rejected.detach().sum()}

    def n_labels(self, batch: Batch) -> int:
        return batch["index"].shape[0]

    def n_tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()


def answer_scores(model: Transformer, batch: Mapping[str, Tensor]) -> Tensor:
    """The value head's score at each document's last token, (n_docs,)."""
    cu_seqlens, lengths = batch.get("cu_seqlens"), batch["lengths"]
    hidden = model.hidden_states(batch["ids"], positions=batch.get("positions"), cu_seqlens=cu_seqlens)  # (B, T, D)
    if cu_seqlens is not None:
        last = hidden[0, cu_seqlens[1 : len(lengths) + 1].long() - 1]  # (n_docs, D)
    else:
        last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    return cast(ScalarHead, model.value_head)(last)


def add_head(model: Transformer, *, seed: int = 0) -> None:
    """Give the model a scalar head, model.value_head, on its device."""
    head = ScalarHead(model.config.d_model, seed=seed).to(model.model.embed_tokens.weight.device)
    model.value_head = head  # pyright: ignore[reportArgumentType]


# --- training ------------------------------------------------------------------------------------------------------


class RewardMethod:
    """The method of a PreferenceTask; the score's head trains beside the adapter."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source, self.limit = source, limit

    def attach(self, model: Transformer, config: Run) -> None:
        """A new head."""
        add_head(model, seed=config.train.seed)

    def detach(self, model: Transformer, folder: Path, config: Run) -> dict[str, Any]:
        """The head to its own file; what a policy's tokenizer is compared with."""
        save_tensors(folder / HEAD, dict(cast(nn.Module, model.value_head).state_dict()))
        del model.value_head
        return {"tokenizer_sha256": config.inputs["tokenizer"].sha256, "max_seq_len": self.limit}

    def objective(self, data: PreferenceData, config: Run) -> Objective:
        """Bradley-Terry."""
        return RewardObjective(config.objective)

    def needs_reference(self, config: Run) -> bool:
        """A score is compared with nothing."""
        return False

    def see(self, line: Mapping[str, Any]) -> None:
        """Nothing to warn of."""

    def figures(self, config: Run) -> dict[str, Any]:
        """None of its own."""
        return {}


def _read(draft: Run, source: Source) -> PreferenceTask:
    limit = min(row_limit(draft.objective.max_seq_len, source.model), source.model.max_seq_len)
    return PreferenceTask.read(RewardMethod(source, limit), draft, source)


def _work(config: Run) -> PairWork:
    return PairWork(config, RewardObjective(config.objective), attach=add_head, reference=False)


STAGE = Stage(
    "reward", setup.parts(RewardModelOptions), partial(preference_task.defaults, LEARNING_RATES), _read, _work
)


def reward(*, base: Path | str, data: Path | str, out: Path | str, **options: Any) -> dict[str, Any]:
    """`graft reward` from Python: trains a reward model on the preference rows in `data` into `out`; returns the summary.

    options: `align`'s arguments and keys of the parts (center, rank, learning_rate, epochs, ...). Raises as `align`.
    """
    return align(STAGE, base=base, data=data, out=out, **options)


# --- scoring -------------------------------------------------------------------------------------------------------


class RewardModel:
    """A trained reward model as a reward function: (prompt, completion, row) -> score, a log-odds against other answers.

    What is longer than it was trained on is cut, and counted in `n_cut`.
    """

    def __init__(self, folder: Path | str, *, device: str = "cpu") -> None:
        self.folder = Path(folder)
        if not (self.folder / HEAD).exists():
            raise ValueError(f"reward model {folder} has no {HEAD}; train one with graft reward")
        base = self.folder
        if is_adapter := (self.folder / CONFIG).exists():
            base = Path(str(read_adapter(self.folder).config["base_model_name_or_path"]))
        self.about = read_json(self.folder / GRAFT, {"tokenizer_sha256": str, "max_seq_len": int})
        self.model, self.tokenizer = load_model(base, device=device), Tokenizer.load(base)
        if is_adapter:
            bank = AdapterBank(self.model)
            bank.load("reward", self.folder)
            bank.use("reward")
        add_head(self.model)
        cast(nn.Module, self.model.value_head).load_state_dict(load_tensors(self.folder / HEAD))
        self.template = ChatTemplate.of(self.tokenizer)
        self.n_cut = 0

    def check_tokenizer(self, base: Path) -> None:
        """Raise ValueError when the policy at `base` has another tokenizer: a truncated or odd answer would be other tokens."""
        files = [path for name in TOKENIZER_FILES if (path := base / name).exists()]
        if Input.of(base, files).sha256 != self.about["tokenizer_sha256"]:
            raise ValueError(
                f"reward model {self.folder} was trained with another tokenizer than {base}'s; train one on this base, or on a "
                "base with the same tokenizer files"
            )

    @torch.no_grad()
    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        turns: Any = prompt
        if not isinstance(row.get("prompt", prompt), str) or "messages" in row or "conversations" in row:
            turns, _ = prompt_of(to_record(dict(row), "row"))
        if isinstance(turns, str):
            record = Record("row", prompt=turns, completion=completion)
        else:
            answer: Message = {"role": "assistant", "content": completion}
            record = Record("row", messages=(*turns, answer), n_prompt_messages=len(turns))
        encoded, limit = encode_whole(record, self.tokenizer, self.template), self.about["max_seq_len"]
        if len(encoded.ids) > limit:
            self.n_cut += 1
            encoded = encode_record(record, self.tokenizer, self.template, limit)  # raises where no answer is left
        ids = torch.from_numpy(encoded.ids).long()[None].to(self.model.model.embed_tokens.weight.device)
        return float(
            answer_scores(self.model, {"ids": ids, "lengths": torch.tensor([ids.shape[1]], device=ids.device)})[0]
        )
