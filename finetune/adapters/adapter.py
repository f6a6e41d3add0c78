"""An adapter in memory, of whatever kind: what its two files say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

GRAFT = "graft.json"  # beside PEFT's files: how the records spoke to the model, and which base it was
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: for each adapted linear its A (R, in), B (out, R) and scale, and what other kinds have beside them."""

    layers: dict[str, tuple[Tensor, Tensor, float]]
    config: dict[str, Any]  # adapter_config.json
    graft: dict[str, Any] = field(default_factory=dict)  # graft.json: base_fingerprint, prompt_format, ...
    chat_template: str | None = None
    where: str = ""
    copies: dict[str, Tensor] = field(default_factory=dict)  # the base's own head or embedding, if PEFT saved them too
    magnitudes: dict[str, Tensor] = field(default_factory=dict)  # DoRA: (out,) of each of `layers`
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # modules_to_save: path -> weight, bias
    token_rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)  # path -> ids, rows (n, D)
    prefix: Tensor | None = None  # (P, n_layers * 2 * K * Dh), PEFT's prompt_embeddings
    bottlenecks: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> the four tensors of a Bottleneck

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is used, by a name of its own."""
        found = {}
        for path, (a, b, _) in self.layers.items():
            found |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
        found |= {f"{path}.magnitude": tensor for path, tensor in self.magnitudes.items()}
        for parts in (self.modules, self.bottlenecks):
            found |= {f"{path}.{name}": t for path, named in parts.items() for name, t in named.items()}
        found |= {f"{path}.rows {ids}": rows for path, (ids, rows) in self.token_rows.items()}
        return found | ({} if self.prefix is None else {"prefix": self.prefix})

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def n_values(self) -> int:
        """Numbers that it holds."""
        return sum(t.numel() for t in self.tensors().values())

    @property
    def ranks(self) -> list[int]:
        return sorted({a.shape[0] for a, _, _ in self.layers.values()})

    @property
    def beyond_lora(self) -> str | None:
        """All that it has beside pairs of A and B, in adapter_config.json's words; None for nothing."""
        if self.prefix is not None or self.bottlenecks:
            return f"peft_type={self.config.get('peft_type')}"
        parts = (
            ("use_dora=true", self.magnitudes),
            ("modules_to_save", self.modules),
            ("trainable_token_indices", self.token_rows),
        )
        return ", ".join(name for name, part in parts if part) or None

    def check_plain(self, what: str) -> None:
        """Raise ValueError for an adapter that is more than pairs of A and B; `what` says what can't be done with it."""
        if self.beyond_lora is not None:
            raise ValueError(
                f"adapter {self.where} has {self.beyond_lora} and can't be {what}; that is for plain LoRA alone"
            )

    def shares_head(self, tied: bool) -> bool:
        """Whether its own embedding is its head as well (ensure_weight_tying, on a tied base)."""
        is_own = EMBEDDING in self.modules and HEAD not in self.modules
        return tied and is_own and bool(self.config.get("ensure_weight_tying"))

    @property
    def template_args(self) -> dict[str, Any]:
        """What the chat template got in training beside the messages. Raises ValueError for a damaged graft.json."""
        return template_args_of(self.graft, self.where)

    @property
    def prompt_shape(self) -> dict[str, str] | None:
        """What stood before and after the part of a prompt that differs, {"before", "after"}; None where it isn't known."""
        shape = self.graft.get("prompt_shape")
        if shape is None:
            return None
        if not (isinstance(shape, dict) and all(isinstance(shape.get(side), str) for side in ("before", "after"))):
            raise ValueError(
                f"{self.where}/{GRAFT}: prompt_shape is {shape!r:.60}; expected an object with before and after"
            )
        return shape


def template_args_of(metadata: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """graft.json's template_args, {} without them. Raises ValueError for what is no object."""
    args = metadata.get("template_args") or {}
    if not isinstance(args, dict):
        raise ValueError(f"{where}/{GRAFT}: template_args is {args!r:.60}; expected an object")
    return args
