"""`graft dpo`: a base (or an SFT adapter) + preference rows -> a policy that prefers the chosen answers.

The reference is the same base with the adapter off, or with the adapter that training started from. Its log-probabilities
of the answers never change, so they are computed once before the first step and kept on disk.
"""

import hashlib
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ...base.checkpoint import load_tensors, save_tensors
from ...base.device import explain_device, peak_bytes, reset_peak, resolve_device
from ...base.model.huggingface import fingerprint, load_config
from ...base.model.transformer import Transformer
from ...base.precision import autocast
from ...base.progress import step_progress
from ...base.run import Run, check_same_inputs, resumed_settings
from ...base.runlog import RunFolder
from ...base.settings import check_settings
from ...base.tokenizer.tokenizer import Tokenizer
from ...base.train import Batch, Figures, Objective, check_evaluation, train
from ..adapters.files import read_adapter
from ..data.chat import ChatTemplate, Encoded, encode_record
from ..data.packing import steps_for_epochs
from ..data.records import Record, read_records
from ..memory.report import print_prediction
from ..sft import row_limit, save_trained, stored_in_4_bits
from . import setup
from .dpo import dpo_loss
from .kto import kto_kl, kto_loss
from .logprobs import response_logprobs
from .orpo import orpo_loss
from .preferences import Pair, PreferenceBatches, answer_sums, content_hash, encode_pairs, mismatched, split_pair
from .simpo import simpo_loss

Loss = Literal["sigmoid", "ipo", "robust", "hinge", "kto", "orpo", "simpo"]
WITHOUT_REFERENCE = ("orpo", "simpo")
DEFAULT_BETA = {"simpo": 2.0}  # of the others: 0.1
LEARNING_RATES = {"full": 5e-6, "lora": 1e-4, "qlora": 1e-4}  # peak; preferences want about a fifth of fine-tuning's
FALL = 0.5  # nats that both answers' log-probabilities must have lost, in the mean of FALL_STEPS steps, for a warning
FALL_STEPS = 10


@dataclass(frozen=True)
class DPOOptions:
    """Which loss, and how rows become batches. Raises ValueError for values that can't work."""

    loss: Loss = "sigmoid"  # sigmoid (DPO), ipo, robust, hinge, kto, orpo or simpo
    beta: float | None = None  # how near the policy stays to the reference; none: 0.1, simpo 2.0
    label_smoothing: float = 0.0  # sigmoid and robust: share of pairs thought to be swapped, in [0, 0.5)
    gamma: float = 1.0  # simpo: the margin that chosen must lead by
    desirable_weight: float = 1.0  # kto: weight of the good answers
    undesirable_weight: float = 1.0  # kto: weight of the bad ones
    epochs: float = 1.0  # passes over the pairs, when `steps` is not given
    max_seq_len: int | None = None  # tokens of prompt and answer, longer ones are cut; none: the model's
    packing: bool = True  # answers end to end in one row, each seeing only itself, instead of one a row, padded

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"unknown preference loss {self.loss!r}; choose {', '.join(get_args(Loss))}")
        if self.beta is not None and not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta} must be > 0 and finite; start from {self.used_beta_default}")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs={self.epochs} must be > 0 and finite")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must lie in [0, 0.5), the share of swapped labels"
            )
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is for the losses sigmoid and robust, got {self.loss}"
            )

    @property
    def used_beta_default(self) -> float:
        return DEFAULT_BETA.get(self.loss, 0.1)

    @property
    def used_beta(self) -> float:
        return self.used_beta_default if self.beta is None else self.beta


PARTS = setup.parts(DPOOptions)


# --- the objective -------------------------------------------------------------------------------------------------


class PreferenceObjective:
    """A preference loss as the loop's objective: summed over a micro-batch's pairs (kto: over its answers).

    Figures, means over pairs: margin, in nats, between what the policy gained on chosen and on rejected; accuracy, the share
    of pairs with margin > 0; chosen_logp and rejected_logp of the policy, nats an answer; chosen_gain and rejected_gain, the
    same minus the reference's; kl, (log pi_ref - log pi) a token of both answers, which estimates KL(pi_ref, pi) as far as
    the answers are like the reference's own. Without a reference (orpo, simpo) it counts as 0 and kl is left out; margin and
    accuracy are then of log-probabilities a token.

    kto's z_0 is estimated on each micro-batch, so there, unlike in the other losses, micro_batch changes the result.
    """

    def __init__(self, options: DPOOptions, desirable: Tensor | None = None) -> None:
        self.options, self.desirable = options, desirable  # (n_rows,) bool, kto's labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        sums, lengths = answer_logps(cast(Transformer, model), batch)  # (P, 2), (P, 2)
        chosen, rejected = sums.unbind(1)
        n = sums.shape[0]
        if self.options.loss in WITHOUT_REFERENCE:
            gain = sums / lengths
            value = self._without_reference(*gain.unbind(1))
        else:
            ref = batch["ref_logp"]
            gain = sums - ref
            if self.options.loss == "kto":
                return self._kto(sums, ref, batch["index"])
            scale = lengths if self.options.loss == "ipo" else torch.ones_like(lengths)
            value = dpo_loss(
                *(sums / scale).unbind(1),
                *(ref / scale).unbind(1),
                beta=self.options.used_beta,
                kind=self.options.loss,  # pyright: ignore[reportArgumentType]
                label_smoothing=self.options.label_smoothing,
            )
        margin = (gain[:, 0] - gain[:, 1]).detach()
        figures: dict[str, Tensor] = {
            "margin": margin.sum(),
            "accuracy": (margin > 0).float().sum(),
            "chosen_logp": chosen.detach().sum(),
            "rejected_logp": rejected.detach().sum(),
        }
        if self.options.loss not in WITHOUT_REFERENCE:
            figures |= {
                "chosen_gain": gain[:, 0].detach().sum(),
                "rejected_gain": gain[:, 1].detach().sum(),
                "kl": n * -gain.detach().sum() / lengths.sum(),
            }
        return value * n, figures

    def _without_reference(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.options.loss == "orpo":
            return orpo_loss(chosen, rejected, beta=self.options.used_beta)
        return simpo_loss(chosen, rejected, beta=self.options.used_beta, gamma=self.options.gamma)

    def _kto(self, sums: Tensor, ref: Tensor, index: Tensor) -> tuple[Tensor, Figures]:
        """Column 0 is the labelled answer, column 1 another row's answer to the same prompt."""
        assert self.desirable is not None
        desirable = self.desirable.to(index.device)[index]
        kl = kto_kl(sums[:, 1], ref[:, 1])
        value = kto_loss(
            sums[:, 0],
            ref[:, 0],
            desirable,
            kl,
            beta=self.options.used_beta,
            desirable_weight=self.options.desirable_weight,
            undesirable_weight=self.options.undesirable_weight,
        )
        gain = (sums - ref)[:, 0].detach()
        figures = {
            "accuracy": ((gain > kl) == desirable).float().sum(),
            "desirable_gain": gain.where(desirable, 0.0).sum(),
            "undesirable_gain": gain.where(~desirable, 0.0).sum(),
            "kl": kl * len(gain),
        }
        return value * len(gain), figures

    def n_labels(self, batch: Batch) -> int:
        return batch["index"].shape[0]

    def n_tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()


def answer_logps(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """(P, 2) log-probabilities of each pair's two answers, summed over their tokens, and how many tokens they have."""
    positions, cu_seqlens = batch.get("positions"), batch.get("cu_seqlens")
    logp = response_logprobs(model, batch["ids"], batch["mask"], positions=positions, cu_seqlens=cu_seqlens)
    assert isinstance(logp, Tensor)
    lengths = answer_sums(batch["mask"].to(logp.dtype), batch["lengths"])
    return answer_sums(logp, batch["lengths"]).view(-1, 2), lengths.view(-1, 2)


# --- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceData:
    """Encoded rows. For kto a pair is (the labelled answer, another row's answer to the same prompt)."""

    pairs: list[Pair]
    desirable: Tensor | None  # (n,) bool for kto
    n_equal: int  # rows whose answers are the same tokens, left out
    n_cut: int  # answers that fill max_seq_len: their end may be cut off

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(len(one.ids) for pair in self.pairs for one in (pair.chosen, pair.rejected))

    def figures(self) -> dict[str, int]:
        return {"n_pairs": len(self.pairs), "n_equal": self.n_equal, "n_cut": self.n_cut}


def encode_preferences(
    records: Sequence[Record], loss: str, tokenizer: Tokenizer, template: ChatTemplate, limit: int
) -> PreferenceData:
    """Rows as the loss takes them. Raises ValueError naming the row for one without a preference."""
    if loss != "kto":
        for record in records:
            if record.label is not None and record.chosen is None:
                raise ValueError(
                    f"{record.where}: a row with one labelled answer, which loss {loss} can't use; train with --loss kto, or "
                    "give prompt, chosen and rejected"
                )
        pairs, n_equal = encode_pairs(records, tokenizer, template, limit)
        sides = [one for pair in pairs for one in (pair.chosen, pair.rejected)]
        return PreferenceData(pairs, None, n_equal, sum(len(one.ids) == limit for one in sides))
    labelled: list[tuple[Encoded, bool]] = []
    n_equal = 0
    for record in records:
        answers = _labelled(record)
        encoded = [(encode_record(one, tokenizer, template, limit), good) for one, good in answers]
        if len(encoded) == 2 and encoded[0][0].ids.tolist() == encoded[1][0].ids.tolist():
            n_equal += 1
            continue
        labelled += encoded
    if len(labelled) < 2:
        raise ValueError(
            f"kto needs at least 2 labelled answers, got {len(labelled)} ({n_equal} rows have equal answers)"
        )
    rows = [one for one, _ in labelled]
    pairs = [Pair(*both) for both in zip(rows, (cut_to(one, limit) for one in mismatched(rows)), strict=True)]
    return PreferenceData(
        pairs, torch.tensor([good for _, good in labelled]), n_equal, sum(len(one.ids) == limit for one in rows)
    )


def _labelled(record: Record) -> list[tuple[Record, bool]]:
    """The answers of a row with their labels: one of KTO's own rows, two of a pair."""
    if record.label is None:
        chosen, rejected = split_pair(record)
        return [(chosen, True), (rejected, False)]
    n = record.n_prompt_messages or (len(record.messages) - 1 if record.messages else 0)
    return [(replace(record, label=None, n_prompt_messages=n), record.label)]


def cut_to(one: Encoded, limit: int) -> Encoded:
    """The first `limit` tokens."""
    return Encoded(one.ids[:limit], one.loss_mask[:limit])


# --- the reference -------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_logps(
    policy: setup.Policy, batches: PreferenceBatches, indices: Sequence[int], config: Run, folder: Path, device: str
) -> Tensor:
    """(n_pairs, 2) log-probabilities under the reference, NaN for pairs that `indices` doesn't name.

    Read from `folder` where a run with the same rows, base and adapter has left them (resuming); else computed and written.
    """
    digest = hashlib.sha256(content_hash(batches.pairs).encode())
    digest.update(repr(sorted(indices)).encode() + config.train.dtype.encode() + config.method.encode())
    for name in ("base", "adapter"):
        digest.update(config.inputs[name].sha256.encode() if name in config.inputs else b"none")
    file = folder / f"reference-{digest.hexdigest()[:16]}.safetensors"
    if file.exists():
        return load_tensors(file)["ref_logp"]
    values = torch.full((len(batches.pairs), 2), math.nan)
    with policy.before_training():
        for batch in batches.micro_batches(sorted(indices)):
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            with autocast(config.train.dtype, device):
                values[batch["index"]] = answer_logps(policy.model, moved)[0].float().cpu()
    save_tensors(file, {"ref_logp": values})
    return values


@torch.no_grad()
def evaluate_preferences(
    model: Transformer, objective: Objective, batches: PreferenceBatches, *, dtype: str, device: str
) -> dict[str, float]:
    """The objective's loss and figures over all pairs, with the prefix val_."""
    totals: dict[str, float] = {}
    for batch in batches.micro_batches(range(len(batches.pairs))):
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast(dtype, device):
            found = objective.loss(model, moved)
        value, figures = found if isinstance(found, tuple) else (found, {})
        for name, figure in {"loss": value, **figures}.items():
            totals[name] = totals.get(name, 0.0) + float(figure)
    return {f"val_{name}": total / len(batches.pairs) for name, total in totals.items()}


class FallWatch:
    """Warns, once, when both answers have become less probable than under the reference: the policy then learns to avoid
    the rejected answer by moving to other text, not to the chosen one."""

    def __init__(self) -> None:
        self.chosen: deque[float] = deque(maxlen=FALL_STEPS)
        self.rejected: deque[float] = deque(maxlen=FALL_STEPS)
        self.warned_at: int | None = None

    def see(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics."""
        if "chosen_gain" not in line or self.warned_at is not None:
            return
        self.chosen.append(line["chosen_gain"])
        self.rejected.append(line["rejected_gain"])
        means = [sum(values) / len(values) for values in (self.chosen, self.rejected)]
        if len(self.chosen) == FALL_STEPS and max(means) < -FALL:
            self.warned_at = line["step"]
            print(
                f"warning: step {line['step']}: both answers fell below the reference (chosen by {-means[0]:.2f} nats, "
                f"rejected by {-means[1]:.2f}); lower the learning rate, raise beta, or fine-tune on the chosen answers first",
                file=sys.stderr,
            )


# --- the run -------------------------------------------------------------------------------------------------------


def dpo(
    *,
    base: Path | str,
    data: Path | str,
    out: Path | str,
    method: str = "lora",
    adapter: Path | str | None = None,
    eval_data: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = False,
    **settings: Any,  # keys of the parts, as `graft config dpo` lists them: loss, beta, rank, learning_rate, epochs, ...
) -> dict[str, Any]:
    """`graft dpo` from Python: trains `base` on the preference rows in `data` into `out`; returns the summary's figures.

    `adapter`: an SFT adapter to go on with, which is then the reference too. Raises ValueError or OSError for bad input,
    Interrupted after a signal.
    """
    requested_device, device = device, resolve_device(device)
    base, data = Path(base), Path(data)
    if Path(out).resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    adapter, eval_data = (Path(path) if path is not None else None for path in (adapter, eval_data))
    records = read_records(data)
    held_out = read_records(eval_data) if eval_data else []
    with RunFolder(out, stage=f"dpo {method}", resume=resume, force=force) as run:
        requested = check_settings(settings, *PARTS.values())
        if adapter is not None:
            requested = setup.adapter_settings(read_adapter(adapter), requested, method)
        model_config = load_config(base)
        inputs = setup.all_inputs(base, data, eval_data, adapter)
        if run.previous:
            check_same_inputs(run.previous["config"], inputs)
            requested = resumed_settings(requested, run.previous["config"])
        options = DPOOptions(**{k: v for k, v in requested.items() if k in DPOOptions.__dataclass_fields__})
        limit = min(row_limit(options.max_seq_len, model_config), model_config.max_seq_len)
        tokenizer = Tokenizer.load(base)
        template = ChatTemplate.of(tokenizer)
        rows = encode_preferences(records, options.loss, tokenizer, template, limit)
        rows_eval = encode_preferences(held_out, options.loss, tokenizer, template, limit) if held_out else None
        _say_counts(rows, limit)
        config = _resolve(requested, method, len(rows.pairs), inputs)
        stored = stored_in_4_bits(config)
        check_evaluation(config.train, has_evaluation=rows_eval is not None)
        if progress:
            print(explain_device(requested_device, device), file=sys.stderr)
        predicted = print_prediction(
            model_config,
            setup.doubled(config.train),
            device,
            method="qlora" if stored else config.method,
            seq_len=rows.longest,
            lora=config.lora,
            double_quant=stored["double_quant"] if stored else config.quant.double_quant,
        )
        reset_peak(device)
        policy = setup.make_policy(config, device, adapter)
        metadata = {
            "prompt_format": "chat" if any(record.messages is not None for record in records) else "text",
            "base_fingerprint": fingerprint(policy.model),
            "method": f"dpo {method}",
        }
        watch = FallWatch()
        result = _train(policy, config, rows, rows_eval, run, device, progress, watch)
        with run.results() as folder:
            save_trained(policy.model, config, folder, tokenizer, template, metadata)
        summary = {
            "method": method,
            "loss": config.objective.loss,
            **result.summary(),
            **rows.figures(),
            "both_fell_at_step": watch.warned_at,
            "n_trained_params": sum(p.numel() for p in policy.model.parameters() if p.requires_grad),
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "device": device,
        }
        run.finish(summary)
        return summary


def _resolve(requested: Mapping[str, Any], method: str, n_pairs: int, inputs: Mapping[str, Any]) -> Run:
    defaults: dict[str, Any] = {"batch_size": 16, "weight_decay": 0.0, "learning_rate": LEARNING_RATES.get(method, 0.0)}
    epochs = requested.get("epochs", DPOOptions.epochs)
    defaults["steps"] = steps_for_epochs(n_pairs, requested.get("batch_size", defaults["batch_size"]), epochs)
    return setup.resolve(requested, PARTS, method=method, defaults=defaults, inputs=inputs)


def _say_counts(rows: PreferenceData, limit: int) -> None:
    if rows.n_equal:
        print(f"note: {rows.n_equal:,} rows have equal answers and were left out", file=sys.stderr)
    if rows.n_cut:
        print(
            f"note: {rows.n_cut:,} answers fill max_seq_len={limit:,} tokens; their end may be cut off", file=sys.stderr
        )


def _train(
    policy: setup.Policy,
    config: Run,
    rows: PreferenceData,
    rows_eval: PreferenceData | None,
    run: RunFolder,
    device: str,
    progress: bool,
    watch: FallWatch,
) -> Any:
    loop, options = config.train, config.objective
    batches = _batches(rows, config)
    val = _batches(rows_eval, config) if rows_eval is not None else None
    optimizer = setup.policy_optimizer(policy.model, config)
    # All validation is done: only now may --force touch what a former run left.
    run.start(config.saved(), seed=loop.seed)
    if options.loss not in WITHOUT_REFERENCE:
        read = {i for step in range(loop.steps) for i in batches.pairs_at(step)}
        batches.ref_logp = reference_logps(policy, batches, sorted(read), config, run.checkpoints, device)
        if val is not None:
            every = range(len(val.pairs))
            val.ref_logp = reference_logps(policy, val, every, config, run.checkpoints, device)
    objective = PreferenceObjective(options, rows.desirable)
    val_objective = PreferenceObjective(options, rows_eval.desirable if rows_eval is not None else None)
    with step_progress(f"dpo {config.method}", loop.steps, shown=progress) as observe:

        def on_step(line: dict[str, Any]) -> None:
            watch.see(line)
            observe(line)

        def evaluate() -> dict[str, float]:
            assert val is not None
            return evaluate_preferences(policy.model, val_objective, val, dtype=loop.dtype, device=device)

        return train(
            policy.model,
            optimizer,
            batches.batch_at,
            loop,
            run,
            objective=objective,
            evaluate=evaluate if val is not None else None,
            on_step=on_step,
            device=device,
        )


def _batches(rows: PreferenceData, config: Run) -> PreferenceBatches:
    """Micro-batches that hold micro_batch pairs of the longest length."""
    return PreferenceBatches(
        rows.pairs,
        batch_size=config.train.batch_size,
        max_tokens=2 * min(config.train.micro_batch, config.train.batch_size) * rows.longest,
        packed=config.objective.packing,
        seed=config.train.seed,
    )
