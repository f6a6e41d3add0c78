"""Jobs made ready to train: their folders opened, their data read, the same data once."""

import dataclasses
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ...base.json_fields import read_json
from ...base.model.config import ModelConfig
from ...base.model.huggingface import empty_model
from ...base.run import Input, Run, check_same_inputs, resumed_settings
from ...base.runlog import SUMMARY_FILE, RunFolder
from ...base.tokenizer.tokenizer import Tokenizer
from ...base.training.checkpoints import checkpoints_in
from ...base.training.history import check_evaluation
from ..adapters.lora import linears, matching, width
from ..data.chat import Encoded
from ..data.dataset import DatasetReport, encode_dataset
from ..data.record import Record
from ..data.records import read_all
from ..sft_config import resolve
from ..sft_data import Specs, data_input, make_batches, row_limit, run_inputs, template_for
from ..sft_model import stored_in_4_bits
from .jobs import Job, check_config


class Preparer:
    """Makes jobs out of what was asked for. A job whose data is at fault is left out, with the reason in its summary."""

    def __init__(
        self,
        base: Path,
        model: ModelConfig,
        tokenizer: Tokenizer,
        method: str,
        *,
        resume: bool,
        force: bool,
        stack: ExitStack,  # closes the jobs' folders
        device: str,
        skip_left_out: bool = False,  # resume: jobs that a sweep took out stay out
        scratch: Path
        | None = None,  # where their runs would start, for a prediction that leaves the jobs' folders alone
    ) -> None:
        self.base, self.model, self.tokenizer, self.method = base, model, tokenizer, method
        self.resume, self.force, self.stack, self.device = resume, force, stack, device
        self.skip_left_out, self.scratch = skip_left_out, scratch
        self.base_inputs: dict[str, Input] | None = None
        self.sides = {
            path: min(width(linear, "in_features"), width(linear, "out_features"))
            for path, linear in linears(empty_model(model))
        }
        self._records: dict[Any, list[Record]] = {}
        self._encoded: dict[Any, tuple[list[Encoded], DatasetReport]] = {}

    def job(self, asked: Mapping[str, Any], summary: dict[str, Any]) -> Job | None:
        """A job ready to train, or None: with `error` in its summary when its data is at fault, without when it ended before.

        Raises ValueError or OSError, naming the job, for settings or a folder that can't work: nothing has been trained yet.
        """
        out = Path(asked["out"])
        run = None
        try:
            resume = self.resume and out.exists()  # the signal may have come before the job's first step
            folder = out if self.scratch is None else tempfile.mkdtemp(dir=self.scratch)
            run = RunFolder(folder, stage=f"sft {self.method}", resume=resume, force=self.force)
            self.stack.enter_context(run)
            job = self._prepare(asked, run, summary)
        except (ValueError, OSError) as error:
            if run is not None:
                run.close()
            raise type(error)(f"job {out}: {error}") from None
        if job is None:
            run.close()
            if "error" in summary:
                print(f"job {out} is left out: {summary['error']}", file=sys.stderr)
        return job

    def _prepare(self, asked: Mapping[str, Any], run: RunFolder, summary: dict[str, Any]) -> Job | None:
        data, eval_data = _specs(asked["data"]), _specs(asked["eval_data"]) if "eval_data" in asked else None
        requested: Mapping[str, Any] = asked["settings"]
        draft = self._checked(requested)
        try:
            records = self._read(data, draft.data.fields)
            held_out = self._read(eval_data, draft.data.fields) if eval_data else []
        except (ValueError, OSError) as error:
            summary["error"] = str(error)
            return None
        inputs = self._inputs(data, eval_data)
        if run.previous:
            saved = run.previous["config"]
            check_same_inputs(saved, inputs)
            requested = resumed_settings(requested, saved)
            draft = resolve(requested, method=self.method, n_rows=len(records))
        limit = row_limit(draft.data.max_seq_len, self.model)
        try:
            encoded, report = self._encode(data, records, limit, draft)
            encoded_eval = self._encode(eval_data, held_out, limit, draft)[0] if eval_data else []
        except ValueError as error:
            summary["error"] = str(error)
            return None
        for line in report.lines(limit, draft.records):
            print(f"note: {asked['out']}: {line}", file=sys.stderr)
        config = dataclasses.replace(resolve(requested, method=self.method, n_rows=len(encoded)), inputs=inputs)
        stored_in_4_bits(config)
        check_evaluation(config.train, has_evaluation=bool(encoded_eval))
        if self._has_ended(run, config, summary):
            return None
        batches, val = make_batches(config, encoded, encoded_eval)
        return Job(
            out=Path(asked["out"]),
            name=str(asked["out"]),
            config=config,
            run=run,
            records=records,
            report=report,
            encoded=encoded,
            batches=batches,
            val=val,
            template=template_for(draft.data, self.tokenizer, None),
            generator=torch.Generator(self.device).manual_seed(config.train.seed),
            summary=summary,
        )

    def _checked(self, requested: Mapping[str, Any]) -> Run:
        """The config but for what the data decides. Raises ValueError for one that doesn't fit the base or other jobs."""
        draft = resolve(requested, method=self.method, n_rows=1)
        check_config(draft)
        assert draft.lora is not None
        smallest = min(self.sides[path] for path in matching(list(self.sides), draft.lora.targets))
        if draft.lora.rank > smallest:
            raise ValueError(
                f"rank={draft.lora.rank} is more than a layer's smaller side {smallest}; use rank <= {smallest}"
            )
        return draft

    def _has_ended(self, run: RunFolder, config: Run, summary: dict[str, Any]) -> bool:
        """Whether a resumed job has nothing left to do; its summary is then the one that it left."""
        previous, file = run.previous, run.folder / SUMMARY_FILE
        if previous is None or not file.exists():
            return False
        saved = read_json(file)
        if previous["status"] == "stopped":
            left_out = self.skip_left_out and "stopped" in saved
            summary |= saved if left_out else {}
            return left_out
        written = [run.folder / str(name) for name in previous.get("files", [])]
        if previous["status"] != "finished" or not written or not all(path.is_file() for path in written):
            return False
        newest = checkpoints_in(run.checkpoints)[-1:]
        if not newest or int(newest[0].name.removeprefix("step-")) < config.train.steps:
            return False
        summary |= saved
        return True

    def _inputs(self, data: list[str], eval_data: list[str] | None) -> dict[str, Input]:
        """What the job reads, by content; the base, which takes the longest, once."""
        if self.base_inputs is None:
            inputs = run_inputs(self.base, data, eval_data)
            self.base_inputs = {name: inputs[name] for name in ("base", "tokenizer")}
            return inputs
        own = {"data": data_input(data)} | ({"eval_data": data_input(eval_data)} if eval_data else {})
        return self.base_inputs | own

    def _read(self, specs: list[str], fields: Mapping[str, str] | None) -> list[Record]:
        key = (tuple(specs), repr(fields))
        if key not in self._records:
            self._records[key] = read_all(specs, fields)
        return self._records[key]

    def _encode(
        self, specs: list[str] | None, records: list[Record], limit: int, draft: Run
    ) -> tuple[list[Encoded], DatasetReport]:
        assert specs is not None
        how = draft.data.fields, draft.data.chat_template, draft.data.template_args
        key = (tuple(specs), limit, draft.records, repr(how))
        if key not in self._encoded:
            template = template_for(draft.data, self.tokenizer, None)
            self._encoded[key] = encode_dataset(records, self.tokenizer, template, limit, draft.records)
        return self._encoded[key]


def _specs(given: Specs) -> list[str]:
    return [str(given)] if isinstance(given, Path | str) else [str(one) for one in given]
