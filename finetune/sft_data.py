"""What fine-tuning reads: files known by their content, records encoded in memory or to disk, batches of them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.hub import model_folder
from ..base.model.config import ModelConfig
from ..base.model.huggingface import weight_files
from ..base.pretrain import TOKENIZER_FILES
from ..base.run import Input, Run
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.files import CONFIG, WEIGHTS, Adapter
from .data.chat import ChatTemplate, Encoded
from .data.dataset import DatasetReport, encode_dataset, encode_to_disk
from .data.packing import SFTBatches, collate_padded
from .data.record import Record
from .data.records import iterate_all, named_files, read_all
from .data.row_store import RowStore, row_lengths
from .data.rows import FREE_BYTES, is_one_list
from .data.templates import template_source
from .data.traits import Overlap, Traits, observed
from .sft_config import DataOptions

Specs = (
    Path | str | Sequence[Path | str]
)  # files, folders, globs and Hugging Face ids of records; each may end in =WEIGHT


def as_list(given: Specs) -> list[str]:
    """One spec or several as a list."""
    return [str(given)] if isinstance(given, Path | str) else [str(one) for one in given]


# --- content -------------------------------------------------------------------------------------------------------


def run_inputs(
    base: Path | str, data: Specs, eval_data: Specs | None = None, adapter: Adapter | None = None
) -> dict[str, Input]:
    """What a run reads, known by content: the base's config and weights, its tokenizer, all files of records."""
    base = model_folder(base)
    tokenizer = [path for name in TOKENIZER_FILES if (path := base / name).exists()]
    inputs = {
        "base": Input.of(base, [base / "config.json", *weight_files(base)]),
        "tokenizer": Input.of(base, tokenizer),
        "data": data_input(as_list(data)),
    }
    if eval_data is not None:
        inputs["eval_data"] = data_input(as_list(eval_data))
    if adapter is not None:
        folder = Path(adapter.where)
        inputs["adapter"] = Input.of(folder, [folder / CONFIG, folder / WEIGHTS])
    return inputs


def data_input(specs: Sequence[str]) -> Input:
    """The bytes of every file that the specs name, in their order, and their weights if they have any."""
    named = named_files(specs)
    found = Input.of(", ".join(specs), [file for files, _ in named for file in files])
    weights = [(len(files), weight) for files, weight in named if weight is not None]
    if not weights:
        return found
    return Input(found.path, hashlib.sha256(f"{found.sha256} {weights}".encode()).hexdigest())


# --- rows ----------------------------------------------------------------------------------------------------------


def template_for(options: DataOptions, tokenizer: Tokenizer, former: Adapter | None) -> ChatTemplate:
    """The template asked for, else that of the adapter to go on from, else the base's."""
    source = template_source(options.chat_template) if options.chat_template else former and former.chat_template
    args = options.template_args if options.template_args is not None else former and former.template_args
    return ChatTemplate.of(tokenizer, source, args=args)


def row_limit(asked: int | None, model: ModelConfig) -> int:
    """The longest record in tokens; one more than the model's positions, since the last token is only a target."""
    if asked is not None and not 2 <= asked <= model.max_seq_len + 1:
        raise ValueError(f"max_seq_len={asked} must lie in [2, {model.max_seq_len + 1}], the base's limit")
    return asked or model.max_seq_len + 1


@dataclass(frozen=True)
class Rows:
    """A run's records as the model reads them, and what became of them."""

    train: Sequence[Encoded]  # a list, or on disk
    held_out: list[Encoded]
    held_out_records: list[Record]
    traits: Traits  # of the training records
    figures: dict[str, int]  # counts, for the summary
    notes: list[str]  # what the user should know, a sentence each

    def close(self) -> None:
        """Remove what lies on disk."""
        if isinstance(self.train, RowStore):
            self.train.close()

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return int(row_lengths(self.train).max())


def encode_rows(
    data: Sequence[str],
    eval_data: Sequence[str] | None,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    limit: int,  # tokens a row may have
    draft: Run,
    *,
    folder: Path,  # where streamed rows lie
) -> Rows:
    """Read and encode the records, those for training one by one if they stream. Raises as encode_dataset and read_all."""
    options: DataOptions = draft.data
    held_out = read_all(eval_data, options.fields) if eval_data else []
    traits, overlap = Traits(), Overlap(held_out)
    if options.streaming:
        _check_streams(data)
        records = observed(iterate_all(data, options.fields), traits, overlap)
        train, report = encode_to_disk(records, tokenizer, template, limit, draft.records, folder=folder)
    else:
        records = list(observed(read_all(data, options.fields), traits, overlap))
        train, report = encode_dataset(records, tokenizer, template, limit, draft.records)
    figures, notes = report.figures(), [*report.lines(limit, draft.records), *traits.lines()]
    encoded_eval: list[Encoded] = []
    if held_out:
        encoded_eval, eval_report = encode_dataset(held_out, tokenizer, template, limit, draft.records)
        figures |= _eval_figures(eval_report, len(overlap))
        notes += [f"eval data: {line}" for line in eval_report.lines(limit, draft.records)]
        if len(overlap):
            notes.append(
                f"eval data: {len(overlap):,} distinct records are among the training records as well, so the validation "
                "loss is too good"
            )
    return Rows(train, encoded_eval, held_out, traits, figures, notes)


def _eval_figures(report: DatasetReport, n_in_training: int) -> dict[str, int]:
    figures = {f"eval_{name}": count for name, count in report.figures().items() if count}
    return figures | ({"eval_n_in_training": n_in_training} if n_in_training else {})


def _check_streams(specs: Sequence[str]) -> None:
    """Raise ValueError for a large file that can't be read row by row."""
    for file in (file for files, _ in named_files(specs) for file in files):
        if file.exists() and file.stat().st_size > FREE_BYTES and is_one_list(file):
            raise ValueError(
                f"{file} is one JSON list of {file.stat().st_size:,} bytes, which has to be held in memory as a whole; for "
                f"streaming write a row a line: jq -c '.[]' {file.name} > {file.stem}.jsonl"
            )


# --- batches -------------------------------------------------------------------------------------------------------


def make_batches(
    config: Run, encoded: Sequence[Encoded], held_out: Sequence[Encoded]
) -> tuple[SFTBatches, list[dict[str, Tensor]]]:
    """The batches to train on, and those to validate on."""
    loop = config.train
    batches = SFTBatches(
        encoded,
        batch_size=loop.batch_size,
        max_tokens=loop.micro_batch * int(row_lengths(encoded).max()),
        packed=config.data.packing,
        seed=loop.seed,
    )
    val = [collate_padded(held_out[i : i + loop.micro_batch]) for i in range(0, len(held_out), loop.micro_batch)]
    return batches, val


def made_with(
    records: Traits | Iterable[Record], fingerprint: str, method: str, template: ChatTemplate | None = None
) -> dict[str, Any]:
    """graft.json: how the records spoke to the model, and which base it was."""
    traits = records if isinstance(records, Traits) else Traits.of(records)
    args: Mapping[str, Any] = template.args if template is not None else {}
    shape = traits.shape.result()
    return {
        "prompt_format": "chat" if traits.is_chat else "text",
        "base_fingerprint": fingerprint,
        "method": method,
        **({"template_args": dict(args)} if args else {}),
        **({"prompt_shape": shape} if shape else {}),
    }
