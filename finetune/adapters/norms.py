"""How large an adapter's updates are, for `graft adapter show`."""

import math
import re
from typing import TYPE_CHECKING

from torch import Tensor

from ...base.text.printable import markup
from .files import Adapter

if TYPE_CHECKING:
    from rich.table import Table

ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)\.(?:.*\.)?([^.]+)$")


def update_norm(a: Tensor, b: Tensor, scale: float) -> float:
    """|scale| times the Frobenius norm of B A, from the (R, R) products: |B A|^2 = tr((B^T B)(A A^T))."""
    a, b = a.double(), b.double()
    return abs(scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def norms_by_layer(adapter: Adapter) -> dict[str, dict[str, float]]:
    """Layer number, or the path of what is in no layer -> kind of linear, such as q_proj -> norm of its update."""
    found: dict[str, dict[str, float]] = {}
    for path, (a, b, scale) in adapter.layers.items():
        match = LAYER.match(path)
        layer, kind = (match[1], match[2]) if match else (path, path.rpartition(".")[2])
        squared = found.setdefault(layer, {}).get(kind, 0.0) ** 2  # experts share a name
        found[layer][kind] = math.sqrt(squared + update_norm(a, b, scale) ** 2)
    return found


def summary(adapter: Adapter) -> "Table":
    """A line for each layer of the model: the norm of its updates, by kind of linear and together."""
    from rich.table import Table

    norms = norms_by_layer(adapter)
    known = [kind for kind in ORDER if any(kind in one for one in norms.values())]
    kinds = list(dict.fromkeys([*known, *(kind for one in norms.values() for kind in one)]))
    table = Table(title="norm of scale * B A" + (", before DoRA's magnitudes" if adapter.magnitudes else ""))
    for column in ("layer", *(kind.removesuffix("_proj") for kind in kinds), "together"):
        table.add_column(markup(column), justify="right")
    for layer, one in sorted(norms.items(), key=lambda item: (not item[0].isdecimal(), item[0].zfill(6))):
        cells = [f"{one[kind]:.3g}" if kind in one else "" for kind in kinds]
        table.add_row(markup(layer), *cells, f"{math.hypot(*one.values()):.3g}")
    columns = [math.hypot(*(one.get(kind, 0.0) for one in norms.values())) for kind in kinds]
    table.add_section()
    table.add_row("all", *(f"{norm:.3g}" for norm in columns), f"{math.hypot(*columns):.3g}")
    return table


def beside_pairs(adapter: Adapter) -> list[str]:
    """What an adapter has beside pairs of A and B, a line for each kind with its size; [] for plain LoRA."""
    found = []
    if adapter.magnitudes:
        found.append(f"magnitudes (DoRA) of {len(adapter.magnitudes)} linears")
    found += [
        f"{path} in its own copy: {sum(tensor.numel() for tensor in tensors.values()):,} numbers"
        for path, tensors in adapter.modules.items()
    ]
    found += [f"{path}: own rows for {len(ids)} tokens" for path, (ids, _) in adapter.token_rows.items()]
    if adapter.prefix is not None:
        found.append(f"prefix of {adapter.prefix.shape[0]} positions, {adapter.prefix.numel():,} numbers")
    found += [
        f"bottleneck of {tensors['down_weight'].shape[0]} after {path}" for path, tensors in adapter.bottlenecks.items()
    ]
    return found


def every_linear(adapter: Adapter) -> "Table":
    """A line for each linear: shapes, scale and norm."""
    from rich.table import Table

    table = Table()
    for column in ("layer", "A", "B", "scale", "norm of scale * B A"):
        table.add_column(column, overflow="fold")
    for path, (a, b, scale) in adapter.layers.items():
        shapes = [f"{matrix.shape[0]} x {matrix.shape[1]}" for matrix in (a, b)]
        table.add_row(markup(path), *shapes, f"{scale:g}", f"{update_norm(a, b, scale):.4f}")
    return table
