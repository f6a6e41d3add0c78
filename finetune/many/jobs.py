"""What is asked of many adapters: a jobs.toml or a list of tables, checked as far as that needs no file; a job in training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.precision import LossScaler
from ...base.run import Run
from ...base.runlog import RunFolder
from ...base.settings import check_settings, read_toml
from ...base.training.history import History
from ..adapters.lora import LoraConfig
from ..adapters.stacked import StackRow
from ..data.chat import ChatTemplate, Encoded
from ..data.dataset import DatasetReport
from ..data.packing import SFTBatches
from ..data.records import Record
from ..sft_config import PARTS

OWN_KEYS = ("data", "out", "eval_data", "base", "method")  # of a job, beside the keys of a config
# What the base or the pass over it has only one of.
SHARED_KEYS = (
    "base", "method", "dtype", "checkpointing", "double_quant", "quant_backend", "optimizer", "paged", "calibrate",
)  # fmt: skip
STACKED = ("rank", "alpha", "dropout", "targets", "rank_stabilized")  # of LoraConfig: what the stack carries


@dataclass
class Job:
    """One adapter in training."""

    out: Path
    name: str  # the adapter's in the model, and what messages call the job
    config: Run
    run: RunFolder
    records: list[Record]
    report: DatasetReport
    encoded: list[Encoded]
    batches: SFTBatches
    val: list[dict[str, Tensor]]
    template: ChatTemplate | None
    generator: torch.Generator
    summary: dict[str, Any] = field(default_factory=dict)
    # from the moment that it joins
    row: StackRow | None = None
    scaler: LossScaler | None = None
    history: History | None = None
    began: float = 0.0

    @property
    def step(self) -> int:
        """Updates done."""
        assert self.history is not None
        return self.history.result.steps

    @property
    def longest(self) -> int:
        """Positions of its longest row."""
        return max(len(record.ids) for record in self.encoded) - 1

    @property
    def mean_length(self) -> float:
        """Positions of a row, on average."""
        return sum(len(record.ids) for record in self.encoded) / len(self.encoded) - 1


def read_jobs(path: Path | str) -> list[dict[str, Any]]:
    """A jobs.toml: [defaults] and one [[jobs]] table each -> the jobs' keys. Paths are as on the command line.

    Raises OSError for what is no file, ValueError for what is not such TOML.
    """
    raw = read_toml(path)
    if unknown := sorted(raw.keys() - {"defaults", "jobs"}):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; a jobs file has [defaults] and [[jobs]] tables")
    defaults, jobs = raw.get("defaults", {}), raw.get("jobs", [])
    if not isinstance(defaults, dict):
        raise ValueError(f"{path}: defaults is {defaults!r}; expected a table [defaults]")
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        raise ValueError(f"{path} has no [[jobs]]; write one such table for each adapter, with data and out")
    return [defaults | job for job in jobs]


def check_jobs(base: Path | str, jobs: Sequence[Mapping[str, Any]], method: str) -> list[dict[str, Any]]:
    """The jobs' keys, with those of a config under `settings`. Raises ValueError that names the job."""
    if method not in ("lora", "qlora"):
        raise ValueError(f"method={method!r}: jobs share a frozen base; choose lora or qlora")
    if not jobs:
        raise ValueError("no job to train; give at least one with data and out")
    outs: dict[Path, int] = {}
    checked = []
    for number, job in enumerate(jobs, 1):
        where = f"job {number} ({job['out']})" if "out" in job else f"job {number}"
        _check_paths(base, job, where)
        out = Path(job["out"]).resolve()
        if out in outs:
            raise ValueError(f"jobs {outs[out]} and {number} have one output, {job['out']}; give each its own")
        outs[out] = number
        if job.get("method", method) != method:
            raise ValueError(
                f"{where} has method={job['method']!r}, the run's is {method!r}; jobs that train together share the base "
                "as it is held"
            )
        settings = {key: value for key, value in job.items() if key not in OWN_KEYS}
        try:
            settings = check_settings(settings, *PARTS.values())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        checked.append({key: job[key] for key in ("data", "out", "eval_data") if job.get(key)} | {"settings": settings})
    _check_shared(checked)
    return checked


def _check_paths(base: Path | str, job: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless the job has data and an output of its own, and no other base than the run's."""
    if not isinstance(job.get("out"), str | Path):
        raise ValueError(f"{where} has no out; every job needs data and out")
    if not job.get("data") or not isinstance(job["data"], str | Path | list | tuple):
        raise ValueError(f"{where} has no data; every job needs data and out")
    if Path(job["out"]).resolve() == Path(base).resolve():
        raise ValueError(f"{where}: out is the base itself; choose another folder")
    if "base" in job and Path(job["base"]).resolve() != Path(base).resolve():
        raise ValueError(
            f"{where} is for base {job['base']}, the run's is {base}; jobs that train together share one base"
        )


def _check_shared(checked: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError when jobs differ in what they have in common."""
    for job in checked[1:]:
        for key in SHARED_KEYS:
            first, other = (one["settings"].get(key) for one in (checked[0], job))
            if first != other:
                raise ValueError(
                    f"{key} differs between jobs {checked[0]['out']} ({first}) and {job['out']} ({other}), but jobs that "
                    "train together share it; run them apart"
                )


def check_config(config: Run) -> None:
    """Raise ValueError for what one adapter may do alone and not among others."""
    assert config.lora is not None
    if config.train.optimizer != "adamw":
        raise ValueError(f"optimizer={config.train.optimizer} does not train many adapters at once; use adamw")
    for name in ("ema_decay", "noise_scale_every"):
        if value := getattr(config.train, name):
            raise ValueError(f"{name}={value} is not covered for jobs that train together; train this one alone")
    if "adapter" not in config.train.decayed_roles:
        raise ValueError(
            "decayed_roles without adapter is not covered for jobs that train together; set weight_decay=0"
        )
    if config.data is not None and config.data.streaming:
        raise ValueError(
            "streaming=true is not covered for jobs that train together, whose records are held in memory; train that one alone"
        )
    for name in ("compile", "memory_budget", "recompute_layers"):
        if value := getattr(config.train, name):
            raise ValueError(f"{name}={value} is not covered for jobs that train together; leave it out")
    if config.train.checkpointing and config.lora.dropout:
        raise ValueError(
            f"dropout={config.lora.dropout} with checkpointing=true is not covered for jobs that train together, whose "
            "dropout would be drawn anew; leave one of them out"
        )
    plain = LoraConfig()
    for name in (one.name for one in fields(config.lora)):
        value = getattr(config.lora, name)
        if name not in STACKED and value != getattr(plain, name):
            raise ValueError(
                f"{name}={value!r} is not covered for jobs that train together, which are plain LoRA; "
                "leave it out, or train this one alone"
            )
