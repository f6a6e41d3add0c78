"""Which source each window of a run comes from: weights that may change at shares of the run, counted exactly.

--data web=0.9,0.5@0.8 --data code=0.1,0.5@0.8      nine to one, and half to half in the last fifth
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .ramp import BatchRamp, as_ramp

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it fill the circle evenly (Knuth, TAOCP 3, section 6.4)
AT_ONCE = 1 << 22  # windows that are counted together


@dataclass(frozen=True)
class Source:
    """One --data: a folder of token shards and its weights."""

    folder: Path
    weights: tuple[tuple[float, float], ...] = ()  # (share of the run from which it holds, weight); none: by its size


def parse_source(spec: str | Path) -> Source:
    """FOLDER, FOLDER=WEIGHT or FOLDER=WEIGHT,WEIGHT@SHARE,... Raises ValueError for weights that can't be."""
    text = str(spec)
    name, equals, numbers = text.rpartition("=")
    if isinstance(spec, Path) or not equals or Path(text).exists():
        return Source(Path(text))
    weights = []
    for i, part in enumerate(numbers.split(",")):
        weight, _, share = part.partition("@")
        try:
            weights.append((float(share) if i or share else 0.0, float(weight)))
        except ValueError:
            raise ValueError(
                f"--data {text}: {part!r} is no weight; write {name}=0.7, or {name}=0.7,0.2@0.8 for 0.2 from 80% of the run on"
            ) from None
    shares = [share for share, _ in weights]
    if shares[0] != 0 or sorted(set(shares)) != shares or not all(0 <= share < 1 for share in shares):
        raise ValueError(f"--data {text}: the shares of the run must begin at 0 and rise, all below 1; got {shares}")
    if not all(math.isfinite(weight) and weight >= 0 for _, weight in weights):
        raise ValueError(f"--data {text}: weights must be 0 or more and finite")
    return Source(Path(name), tuple(weights))


def parse_sources(specs: Sequence[str | Path]) -> list[Source]:
    """All --data of a run. Raises ValueError where some have weights and others don't, and for a folder given twice."""
    sources = [parse_source(spec) for spec in specs]
    if not sources:
        raise ValueError("no data given; name at least one folder of token shards, from graft data prepare")
    without = [source for source in sources if not source.weights]
    if 0 < len(without) < len(sources):
        raise ValueError(f"--data {without[0].folder} has no weight while others have; give all of them one, or none")
    folders = [source.folder.resolve() for source in sources]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ValueError(f"--data {sources[i].folder} is given twice; give it once, with a larger weight")
    return sources


class Mixture:
    """The source of each window: a sequence that fills the unit interval evenly, cut at the summed weights of its step.

    So after n windows a source has had its share of n to within a few, in whatever order the steps are asked for.
    Raises ValueError when all weights are 0 at some part of the run.
    """

    def __init__(
        self, weights: Sequence[Sequence[tuple[float, float]]], *, batch_size: int | BatchRamp, steps: int, seed: int
    ) -> None:
        self.ramp, self.steps = as_ramp(batch_size), steps
        shares = sorted({share for one in weights for share, _ in one})
        self._from = np.array([math.ceil(share * steps) for share in shares])  # first step of each part
        table = np.array([[_at(one, share) for one in weights] for share in shares])  # (parts, sources)
        for share, row in zip(shares, table, strict=True):
            if not row.sum() > 0:
                raise ValueError(f"all weights are 0 from {share:.0%} of the run on; give one of --data more")
        self._shares = table / table.sum(1, keepdims=True)
        self._edges = np.cumsum(self._shares, axis=1)
        self._edges[:, -1] = 1.0
        self._offset = int(np.random.default_rng((seed, 0x6D6978)).integers(1 << 63))
        self._seen = (0, np.zeros(len(weights), np.int64))  # counts before a step, to go on from

    @property
    def largest(self) -> list[float]:
        """Each source's largest share at any time."""
        return self._shares.max(0).tolist()

    def sources_at(self, step: int) -> np.ndarray:
        """The source of each of the step's windows, (batch size,) int64."""
        return self._sources(np.arange(self.ramp.before(step), self.ramp.before(step + 1)))

    def counts_before(self, step: int) -> np.ndarray:
        """How many windows of each source all earlier steps took, (n_sources,) int64."""
        known, counts = self._seen if self._seen[0] <= step else (0, np.zeros_like(self._seen[1]))
        end = self.ramp.before(step)
        for first in range(self.ramp.before(known), end, AT_ONCE):
            index = np.arange(first, min(first + AT_ONCE, end))
            counts = counts + np.bincount(self._sources(index), minlength=len(counts))
        self._seen = (step, counts)
        return counts

    def _sources(self, index: np.ndarray) -> np.ndarray:
        at = index.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(self._offset)  # modulo 2^64
        where = (at >> np.uint64(11)).astype(np.float64) / 2.0**53  # below 1, exactly
        part = np.searchsorted(self._from, self.ramp.step_of(index), side="right") - 1
        return (where[:, None] >= self._edges[part][:, :-1]).sum(1)


def _at(weights: Sequence[tuple[float, float]], share: float) -> float:
    """The weight that holds at that share of the run."""
    return next(weight for since, weight in reversed(weights) if since <= share)
