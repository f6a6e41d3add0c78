"""How far predictions are from those that are meant, on held-out text: what every export of an adapter measures and records.

What is compared is what was written, read back from its folder, with the base and the adapters as they act unmerged; both in
float32 arithmetic, so that the figure is the export's and not the arithmetic's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.model.config import ModelConfig
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import encode_prompt
from ..data.dataset import DatasetOptions, encode_dataset
from ..data.records import SUFFIXES, read_records
from ..data.render import ChatTemplate
from ..generate import start_ids
from .files import Adapter

PROMPTS = (
    "The river runs to the sea, and the sea is wide.",
    "Write a function that returns the sum of a list of numbers.",
    "Is this message spam? You have won a prize, call now!",
    "Write a short letter to a friend about the last summer.",
    "2 + 2 = 4, 3 + 5 =",
)
MOST_BYTES = 2**28  # of the unmerged model's log-probabilities, which are kept meanwhile
ROW = 512  # tokens of a text that are read at once


@dataclass(frozen=True)
class Drift:
    """The difference on some text."""

    kl: float  # mean over positions of KL(written || meant), in nats
    equal_tokens: float  # share of positions where both give the same token the most probability
    n_tokens: int  # positions compared

    def figures(self, text: Path | str | None) -> dict[str, Any]:
        """For the report: the three, and on what they were measured."""
        return asdict(self) | {"measured_on": "built-in prompts" if text is None else str(text)}

    def sentence(self) -> str:
        """For the screen."""
        return (
            f"against base + adapter on {self.n_tokens} tokens: KL {self.kl:.2e} nats a token, "
            f"{self.equal_tokens:.1%} of greedy tokens equal"
        )


def held_out_rows(
    tokenizer: Tokenizer, config: ModelConfig, text: Path | str | None, adapter: Adapter | None = None
) -> list[Tensor]:  # each (T,) int64
    """What predictions are compared on: a text or a file of records, or a few prompts in the form that the adapter learned.

    As many tokens as MOST_BYTES hold. Raises ValueError for a file without text, OSError for none.
    """
    if text is None:
        rows = _prompts(tokenizer, adapter)
    elif Path(text).suffix in SUFFIXES:
        template = ChatTemplate.of(tokenizer, adapter.chat_template if adapter else None)
        limit = config.max_seq_len
        encoded, _ = encode_dataset(
            read_records(text), tokenizer, template, limit, DatasetOptions(on_too_long="cut", on_empty="drop")
        )
        rows = [torch.as_tensor(record.ids, dtype=torch.int64) for record in encoded]
    else:
        rows = [torch.as_tensor(tokenizer.encode(_read_text(Path(text))).tolist(), dtype=torch.int64)]
    most = max(ROW, MOST_BYTES // (4 * config.vocab_size))
    parts = [part for row in rows for part in row.split(min(config.max_seq_len, ROW)) if len(part)]
    kept: list[Tensor] = []
    for part in parts:
        if most > 0:
            kept.append(part[:most])
            most -= len(part)
    if not kept:
        raise ValueError(f"{text} holds no text to compare predictions on")
    return kept


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; give plain text or records") from None


def _prompts(tokenizer: Tokenizer, adapter: Adapter | None) -> list[Tensor]:
    """PROMPTS as a chat's turns where the adapter learned those, else as plain text."""
    is_chat = adapter is not None and adapter.graft.get("prompt_format", "text") == "chat"
    if not is_chat:
        return [torch.as_tensor(start_ids(encode_prompt(text, tokenizer).tolist(), tokenizer)) for text in PROMPTS]
    assert adapter is not None
    template = ChatTemplate.of(tokenizer, adapter.chat_template)
    return [
        torch.as_tensor(encode_prompt([{"role": "user", "content": text}], tokenizer, template).tolist())
        for text in PROMPTS
    ]


@torch.no_grad()
def next_token_logp(model: Transformer, rows: Sequence[Tensor]) -> list[Tensor]:  # each (T, V) float32
    """Log-probabilities of each row's next tokens."""
    device = model.model.embed_tokens.weight.device
    return [model(ids[None].to(device))[0].cpu().double().log_softmax(-1).float() for ids in rows]


def drift_of(written: Sequence[Tensor], meant: Sequence[Tensor]) -> Drift:
    """Two models' log-probabilities of the same rows, each (T, V) -> how far apart they are.

    KL(p || q) = sum of p (log p - log q): 0 where the two agree.
    """
    kl, equal, n_tokens = 0.0, 0, 0
    for p, q in zip(written, meant, strict=True):
        p, q = p.double(), q.double()
        kl += float((p.exp() * (p - q)).sum())
        equal += int((p.argmax(-1) == q.argmax(-1)).sum())
        n_tokens += len(p)
    kl /= n_tokens
    return Drift(kl if not kl < 0 else 0.0, equal / n_tokens, n_tokens)  # rounding may leave -1e-9


def drift_from(meant: Sequence[Tensor], model: Transformer, rows: Sequence[Tensor]) -> Drift:
    """`drift_of` a model's predictions, a row at a time in memory."""
    parts = [drift_of(next_token_logp(model, [ids]), [q]) for ids, q in zip(rows, meant, strict=True)]
    n_tokens = sum(part.n_tokens for part in parts)
    kl, equal = (
        sum(getattr(part, name) * part.n_tokens for part in parts) / n_tokens for name in ("kl", "equal_tokens")
    )
    return Drift(kl, equal, n_tokens)


def check_drift(drift: Drift, largest: float, *, what: str, way_out: str, allow: bool) -> None:
    """Raise ValueError when predictions moved further than `largest` nats a token, unless that is allowed."""
    if not drift.kl <= largest and not allow:
        raise ValueError(
            f"{what} by {drift.kl:.4f} nats a token (at most {largest} is accepted; {drift.equal_tokens:.1%} of greedy tokens "
            f"are equal): {way_out}, or pass --allow-drift"
        )


def check_out(out: Path, sources: Mapping[str, Path | str], *, force: bool) -> None:
    """Raise ValueError when `out` is one of the named sources, OSError when it is a file, or not empty without `force`."""
    for name, source in sources.items():
        if out.resolve() == Path(source).resolve():
            raise ValueError(f"--out {out} is {name} itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; choose another folder or --force")
