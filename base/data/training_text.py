"""What a pretraining run reads: one or several folders of token shards, how they become batches, what to say about them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..run import Input, TrainConfig
from .batches import WindowBatches
from .bounds import shared_documents
from .mixture import Mixture, Source, parse_sources
from .ramp import BatchRamp
from .shards import open_tokens
from .windows import WindowKind, make_windows

Specs = Path | str | Sequence[Path | str]  # folders of token shards; each may end in =WEIGHT[,WEIGHT@SHARE...]
MANY_EPOCHS = 4  # as good as new tokens up to about here (Muennighoff et al. 2023, arXiv:2305.16264, section 6)


@dataclass(frozen=True)
class WindowOptions:
    """How documents become windows. Raises ValueError for an unknown choice."""

    windows: str = "stream"  # stream (documents end to end), aligned (each begins at a document) or best_fit (packed)
    document_mask: bool = False  # attention stays inside a document, whose positions begin at 0

    def __post_init__(self) -> None:
        if self.windows not in get_args(WindowKind):
            raise ValueError(f"unknown windows {self.windows!r}; choose {', '.join(get_args(WindowKind))}")


class TrainingText:
    """The token shards of a run. Raises what open_tokens and parse_sources do, and for those of another tokenizer."""

    def __init__(self, specs: Specs, tokenizer: str, where: Path | str) -> None:
        self.specs = [specs] if isinstance(specs, Path | str) else list(specs)
        self.sources: list[Source] = parse_sources(self.specs)
        self.train = [open_tokens(source.folder, "train") for source in self.sources]
        self.val = [open_tokens(source.folder, "val") for source in self.sources]
        for source, tokens in zip(self.sources, self.train, strict=True):
            if tokens.meta["tokenizer"] != tokenizer:
                raise ValueError(
                    f"{source.folder} was prepared with another tokenizer than {where}; run graft data prepare again"
                )

    @property
    def n_tokens(self) -> int:
        """Of all that train."""
        return sum(len(tokens) for tokens in self.train)

    @property
    def names(self) -> list[str]:
        """A short name for each source: its folder's, with a number where two are alike."""
        plain = [source.folder.resolve().name for source in self.sources]
        return [name if plain.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(plain, 1)]

    def input(self) -> Input:
        """The files by content, and the weights."""
        files = [file for pair in zip(self.train, self.val, strict=True) for tokens in pair for file in tokens.files]
        found = Input.of(", ".join(map(str, self.specs)), files)
        weights = [source.weights for source in self.sources]
        if len(self.sources) == 1 or not any(weights):
            return found
        return Input(found.path, hashlib.sha256(f"{found.sha256} {weights}".encode()).hexdigest())

    def batches(
        self,
        options: WindowOptions,
        loop: TrainConfig,
        *,
        seq_len: int,
        n_readers: int = 1,
        ramp: BatchRamp | None = None,  # of the batch size; None: always loop.batch_size
    ) -> WindowBatches:
        """Raises ValueError when a source has less than its share of one batch."""
        windows = [make_windows(options.windows, one, seq_len=seq_len, seed=loop.seed) for one in self.train]
        mixture = None
        if len(self.sources) > 1:
            by_size = [((0.0, float(one.n_windows)),) for one in windows]
            weights = [source.weights or size for source, size in zip(self.sources, by_size, strict=True)]
            mixture = Mixture(weights, batch_size=ramp or loop.batch_size, steps=loop.steps, seed=loop.seed)
        return WindowBatches(
            windows,
            batch_size=ramp or loop.batch_size,
            micro_batch=loop.micro_batch,
            n_readers=n_readers,
            mixture=mixture,
            document_mask=options.document_mask,
        )

    def figures(self, batches: WindowBatches, steps: int) -> dict[str, Any]:
        """What `steps` steps read: epochs, and what the windows do to the documents; for each source if there are several."""
        mixture = batches.mixture
        counts = [batches.ramp.before(steps)] if mixture is None else mixture.counts_before(steps).tolist()
        found: dict[str, Any] = {}
        for name, windows, n in zip(self.names, batches.sources, counts, strict=True):
            shares = windows.shares()
            end = f"_{name}" if len(self.sources) > 1 else ""
            found |= {
                f"epochs{end}": round(n / windows.n_windows, 3),
                f"cut_documents_share{end}": round(shares.cut, 4),
                f"padding_share{end}": round(shares.padding, 4),
                f"left_out_share{end}": round(shares.left_out, 4),
            }
        return found

    def notes(self, figures: dict[str, Any]) -> list[str]:
        """What the user should know, a sentence each."""
        said = []
        for name, source in zip(self.names, self.sources, strict=True):
            end = f"_{name}" if len(self.sources) > 1 else ""
            epochs = figures[f"epochs{end}"]
            said.append(
                f"{source.folder}: {epochs:.2f} epochs; {figures[f'cut_documents_share{end}']:.1%} of the documents are cut, "
                f"{figures[f'padding_share{end}']:.1%} of the positions are padding, "
                f"{figures[f'left_out_share{end}']:.1%} of the tokens are left out of an epoch"
            )
            if epochs > MANY_EPOCHS:
                said.append(
                    f"warning: {source.folder} is read {epochs:.1f} times; beyond about {MANY_EPOCHS} times repeated tokens teach "
                    "ever less (arXiv:2305.16264): fewer steps, or more text"
                )
        return [*said, *self._overlaps()]

    def _overlaps(self) -> list[str]:
        said = []
        for i, (source, val) in enumerate(zip(self.sources, self.val, strict=True)):
            for j, (other, train) in enumerate(zip(self.sources, self.train, strict=True)):
                known = train.meta.get("n_val_in_train") if i == j else None
                n = known if isinstance(known, int) else len(shared_documents(train, val))
                if n:
                    said.append(
                        f"warning: {n:,} of the {val.n_documents:,} documents of {source.folder} that validate are among the "
                        f"training documents of {other.folder} as well, word for word: the validation loss is too good"
                    )
        return said
