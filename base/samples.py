"""Texts that a model writes while it trains: samples.jsonl, and a line of the terminal each."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import write_file
from .generate.engine import evaluating, generate_ids
from .generate.sampling import Sampling
from .model.transformer import Transformer
from .text.printable import printable
from .tokenizer.tokenizer import Tokenizer

SAMPLES_FILE = "samples.jsonl"


class Samples:
    """A callback (callbacks.py) that continues each prompt every so many steps. A resumed run drops the lines after its
    checkpoint, whose texts come again: they depend on the weights, the seed and the step alone.

    Raises ValueError for a prompt that leaves no room, or an empty one where the tokenizer has no token to start from.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        every: int,  # steps
        prompts: Sequence[str],
        n_tokens: int,
        seed: int,
        shown: bool = True,  # on standard error too
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.every, self.prompts, self.n_tokens, self.seed, self.shown = every, list(prompts), n_tokens, seed, shown
        self._ids = [tokenizer.encode(prompt).tolist() or self._start() for prompt in prompts]
        for prompt, ids in zip(prompts, self._ids, strict=True):
            if len(ids) + n_tokens > model.config.max_seq_len:
                raise ValueError(
                    f"sample_prompts: {prompt[:40]!r} has {len(ids)} tokens and sample_tokens={n_tokens}, more than "
                    f"max_seq_len={model.config.max_seq_len}; shorten one of them"
                )

    def _start(self) -> list[int]:
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        if start is None:
            raise ValueError("sample_prompts: an empty prompt needs a bos or eos token, the tokenizer has neither")
        return [start]

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Keep the lines up to the checkpoint that the run goes on from."""
        del config
        self._file = folder / SAMPLES_FILE
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True) if self._file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_file(self._file, "".join(kept).encode("utf-8"))

    def on_step(self, line: Mapping[str, Any]) -> None:
        """Write the samples that are due after this step."""
        step = line["step"]
        if step % self.every:
            return
        stop = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        sampling = Sampling(max_new_tokens=self.n_tokens, temperature=0.8, seed=self.seed + step, stop_ids=stop)
        with evaluating(self.model):
            produced = generate_ids(self.model, self._ids, sampling)
        with self._file.open("a", encoding="utf-8") as file:
            for prompt, ids in zip(self.prompts, produced, strict=True):
                text = self.tokenizer.decode(ids)
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
                if self.shown:
                    print(printable(f"step {step}: {prompt}|{text}"), file=sys.stderr)
