"""How a model and its batch are laid out over GPUs: the axes of the mesh, the ZeRO stage, micro-batches, recomputation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..model.config import ModelConfig

GPUS_A_NODE = 8  # that NVLink joins
MOST_CHUNKS = 4  # parts of a stage in an interleaved pipeline that are tried
LONGEST_SPLIT = 16  # ranks that share a sequence, at most
LEAST_SHARE = 2048  # tokens of a sequence on a rank, at least
MOST_ROWS = 64  # sequences of a micro-batch


@dataclass(frozen=True)
class Layout:
    """A mesh and what else decides a step's time and memory. The axes multiply to the number of GPUs."""

    dp: int = 1  # ranks that read other sequences
    tp: int = 1  # ranks that share each matrix
    pp: int = 1  # stages of layers
    cp: int = 1  # ranks that share a sequence
    ep: int = 1  # ranks that share a mixture's experts; they read other sequences too
    zero: int = 0  # 1: optimizer state is divided over dp, cp and ep; 2: gradients too; 3: weights too
    micro_batch: int = 1  # sequences at once on a rank
    recompute: bool = False  # each layer's activations in the backward pass
    chunks: int = 1  # parts of a stage that take turns (interleaved 1F1B); 1: plain 1F1B

    @property
    def n_gpus(self) -> int:
        return self.dp * self.tp * self.pp * self.cp * self.ep

    @property
    def readers(self) -> int:
        """Ranks that read different sequences."""
        return self.dp * self.ep

    @property
    def copies(self) -> int:
        """Ranks that hold the same dense weights: what ZeRO divides over."""
        return self.dp * self.cp * self.ep

    def micro_batches(self, batch: int) -> int:
        """Of a step, on each rank. Raises ValueError unless they divide it."""
        each = self.readers * self.micro_batch
        if batch % each:
            raise ValueError(
                f"batch={batch} is not divisible by {self.readers} readers x micro_batch={self.micro_batch}"
            )
        return batch // each

    @property
    def mesh(self) -> str:
        """As `--set mesh=...` takes it."""
        axes = {"pp": self.pp, "dp": self.dp, "ep": self.ep, "cp": self.cp, "tp": self.tp}
        return ",".join(f"{axis}:{size}" for axis, size in axes.items() if size > 1) or "dp:1"


def divisors(n: int, *, most: int | None = None) -> list[int]:
    """The divisors of n up to `most`, ascending."""
    return [d for d in range(1, min(n, most or n) + 1) if n % d == 0]


def layouts(config: ModelConfig, n_gpus: int, *, batch: int, seq_len: int, node: int = GPUS_A_NODE) -> Iterator[Layout]:
    """Every layout that divides the GPUs, heads, columns, layers, experts, the sequence and the batch without a rest.

    Tensor parallel stays within a node: it talks four times a layer and waits each time.
    """
    tps = [t for t in divisors(n_gpus, most=node) if _divides(config, t)]
    for tp, pp in product(tps, divisors(config.n_layers)):
        if n_gpus % (tp * pp):
            continue
        rest = n_gpus // (tp * pp)
        for cp in [c for c in divisors(rest, most=LONGEST_SPLIT) if c == 1 or _splits(seq_len, c)]:
            eps = divisors(rest // cp) if config.n_experts else [1]
            for ep in [e for e in eps if not config.n_experts or config.n_experts % e == 0]:
                yield from _settings(Layout(rest // cp // ep, tp, pp, cp, ep), config, batch)


def _splits(seq_len: int, cp: int) -> bool:
    """Whether the ranks of a sequence get two equal parts each, an early and a late one, and enough to be worth it."""
    return seq_len % (2 * cp) == 0 and seq_len // cp >= LEAST_SHARE


def _divides(config: ModelConfig, tp: int) -> bool:
    widths = [config.n_heads, config.n_kv_heads, config.expert_width if config.n_experts else config.d_ff]
    return all(width % tp == 0 for width in (*widths, config.vocab_size))


def _settings(mesh: Layout, config: ModelConfig, batch: int) -> Iterator[Layout]:
    """The mesh with every ZeRO stage, micro-batch and schedule that goes with it."""
    if batch % mesh.readers:
        return
    stages = (0, 1, 2, 3) if mesh.copies > 1 else (0,)
    share = batch // mesh.readers
    per_stage = config.n_layers // mesh.pp
    most = MOST_ROWS if mesh.cp == 1 else 1  # ranks that share a sequence while they have several could read one each
    for micro in [m for m in divisors(share, most=most) if m & (m - 1) == 0]:
        several = mesh.pp > 1 and (share // micro) % mesh.pp == 0  # the interleaved schedule goes round in stages
        for chunks in divisors(per_stage, most=MOST_CHUNKS) if several else [1]:
            for zero, recompute in product(stages, (False, True)):
                yield Layout(
                    *(mesh.dp, mesh.tp, mesh.pp, mesh.cp, mesh.ep),
                    zero=zero,
                    micro_batch=micro,
                    recompute=recompute,
                    chunks=chunks,
                )
