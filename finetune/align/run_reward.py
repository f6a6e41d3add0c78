"""`graft reward`: preference rows -> a model that scores answers (Bradley-Terry on a scalar head), and that model as a reward.

The folder is an adapter (lora, qlora) or a base (full), and reward_head.safetensors beside it, which other readers ignore.
`model:FOLDER` in a reward spec scores a completion by it.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...base.checkpoint import load_tensors, save_tensors
from ...base.device import peak_bytes, reset_peak, resolve_device
from ...base.json_fields import read_json
from ...base.model.huggingface import fingerprint, load_config
from ...base.model.transformer import Transformer
from ...base.pretrain import TOKENIZER_FILES
from ...base.progress import step_progress
from ...base.run import Input, Run, check_same_inputs, resumed_settings
from ...base.runlog import RunFolder
from ...base.settings import check_settings
from ...base.tokenizer.tokenizer import Tokenizer
from ...base.train import Batch, Figures, Result, check_evaluation, train
from ..adapters.bank import AdapterBank
from ..adapters.files import CONFIG, GRAFT, read_adapter
from ..data.chat import ChatTemplate, encode_record
from ..data.packing import steps_for_epochs
from ..data.records import Message, Record, read_records, to_record
from ..loading import load_model
from ..sft import row_limit, save_trained, stored_in_4_bits
from . import setup
from .preferences import PreferenceBatches
from .reward_model import ScalarHead, bradley_terry_loss
from .rollouts import prompt_of
from .run_dpo import PreferenceData, encode_preferences, evaluate_preferences

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
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs={self.epochs} must be > 0 and finite")


PARTS = setup.parts(RewardModelOptions)


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


def reward(
    *,
    base: Path | str,
    data: Path | str,
    out: Path | str,
    method: str = "lora",
    eval_data: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = False,
    **settings: Any,  # keys of the parts: center, rank, learning_rate, epochs, ...
) -> dict[str, Any]:
    """`graft reward` from Python: trains a reward model on the preference rows in `data` into `out`; returns the summary.

    Raises ValueError or OSError for bad input, Interrupted after a signal.
    """
    base, data, device = Path(base), Path(data), resolve_device(device)
    if Path(out).resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    eval_data = Path(eval_data) if eval_data is not None else None
    records = read_records(data)
    with RunFolder(out, stage=f"reward {method}", resume=resume, force=force) as run:
        requested = check_settings(settings, *PARTS.values())
        model_config = load_config(base)
        inputs = setup.all_inputs(base, data, eval_data, None)
        if run.previous:
            check_same_inputs(run.previous["config"], inputs)
            requested = resumed_settings(requested, run.previous["config"])
        limit = min(row_limit(requested.get("max_seq_len"), model_config), model_config.max_seq_len)
        tokenizer = Tokenizer.load(base)
        template = ChatTemplate.of(tokenizer)
        rows = encode_preferences(records, "sigmoid", tokenizer, template, limit)
        held_out = read_records(eval_data) if eval_data is not None else []
        rows_eval = encode_preferences(held_out, "sigmoid", tokenizer, template, limit) if held_out else None
        defaults: dict[str, Any] = {
            "batch_size": 16,
            "weight_decay": 0.0,
            "learning_rate": LEARNING_RATES.get(method, 0.0),
        }
        epochs = requested.get("epochs", RewardModelOptions.epochs)
        defaults["steps"] = steps_for_epochs(
            len(rows.pairs), requested.get("batch_size", defaults["batch_size"]), epochs
        )
        config = setup.resolve(requested, PARTS, method=method, defaults=defaults, inputs=inputs)
        stored_in_4_bits(config)  # refuses what doesn't go together
        check_evaluation(config.train, has_evaluation=rows_eval is not None)
        if rows.n_equal:
            print(f"note: {rows.n_equal:,} rows have equal answers and were left out", file=sys.stderr)
        reset_peak(device)
        model = setup.make_policy(config, device, None).model
        metadata = {
            "prompt_format": "chat" if any(record.messages is not None for record in records) else "text",
            "base_fingerprint": fingerprint(model),
            "method": f"reward {method}",
            "tokenizer_sha256": inputs["tokenizer"].sha256,
            "max_seq_len": limit,
        }
        add_head(model, seed=config.train.seed)
        result = _train(model, config, rows, rows_eval, run, device, progress)
        with run.results() as folder:
            save_tensors(folder / HEAD, dict(cast(nn.Module, model.value_head).state_dict()))
            del model.value_head
            save_trained(model, config, folder, tokenizer, template, metadata)
        summary = {"method": method, **result.summary(), **rows.figures(), **peak_bytes(device), "device": device}
        run.finish(summary)
        return summary


def _train(
    model: Transformer,
    config: Run,
    rows: PreferenceData,
    rows_eval: PreferenceData | None,
    run: RunFolder,
    device: str,
    progress: bool,
) -> Result:
    loop = config.train
    batches, val = (
        None
        if one is None
        else PreferenceBatches(
            one.pairs,
            batch_size=loop.batch_size,
            max_tokens=2 * min(loop.micro_batch, loop.batch_size) * one.longest,
            packed=config.objective.packing,
            seed=loop.seed,
        )
        for one in (rows, rows_eval)
    )
    assert batches is not None
    optimizer, objective = setup.policy_optimizer(model, config), RewardObjective(config.objective)
    run.start(config.saved(), seed=loop.seed)

    def evaluate() -> dict[str, float]:
        assert val is not None
        return evaluate_preferences(model, objective, val, dtype=loop.dtype, device=device)

    with step_progress(f"reward {config.method}", loop.steps, shown=progress) as observe:
        return train(
            model,
            optimizer,
            batches.batch_at,
            loop,
            run,
            objective=objective,
            evaluate=evaluate if val is not None else None,
            on_step=observe,
            device=device,
        )


# --- scoring -------------------------------------------------------------------------------------------------------


class RewardModel:
    """A trained reward model as a reward function: (prompt, completion, row) -> score, a log-odds against other answers."""

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
        encoded = encode_record(record, self.tokenizer, self.template, self.about["max_seq_len"])
        ids = torch.from_numpy(encoded.ids).long()[None].to(self.model.model.embed_tokens.weight.device)
        return float(
            answer_scores(self.model, {"ids": ids, "lengths": torch.tensor([ids.shape[1]], device=ids.device)})[0]
        )
