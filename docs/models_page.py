"""The page of the architectures, from the table that decides what is read and written, and of the sizes known by name."""

from graft.base.model.families import FAMILIES
from graft.base.model.presets import PRESETS


def page() -> str:
    """Markdown."""
    lines = [
        "# Models",
        "",
        "## Architectures",
        "",
        "A model folder in Hugging Face's layout (`config.json`, safetensors, `tokenizer.json`) is a `--base` if its `config.json` "
        "names one of these. Any other is refused with its name, and so is an option in the file that would change the result.",
        "",
        "| architecture | model_type | experts | windows |",
        "| --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        windows = {None: "", "all": "on all layers or none", "some": "on layers that the file chooses"}[family.windows]
        lines.append(f"| `{name}` | `{family.model_type}` | {'yes' if family.experts else ''} | {windows} |")
    lines += [
        "",
        "A model that none of them describes, such as the decoder of 2017 (`--preset transformer-2017`) or switches that no "
        "architecture has together, trains and is stored in graft's own layout (`model_type` graft), which only graft opens; "
        "`graft pretrain` says so before it starts. Quantized GPT-2 models can't be saved.",
        "",
        "## Sizes by name",
        "",
        "`graft plan`, `graft vram estimate` and `graft pretrain --preset` know these. The small ones take their vocabulary from "
        "the tokenizer.",
        "",
        "| name | d_model | layers | heads (key/value) | d_ff | longest sequence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, c in PRESETS.items():
        heads = f"{c.n_heads} ({c.n_kv_heads})"
        lines.append(f"| `{name}` | {c.d_model:,} | {c.n_layers} | {heads} | {c.d_ff:,} | {c.max_seq_len:,} |")
    return "\n".join([*lines, ""])
