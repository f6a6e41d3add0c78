"""A base, or one with an adapter, as a model of EleutherAI's lm-evaluation-harness (the extra `lm-eval`).

On the command line, with every option of `lm_eval`; the tasks are the harness's own:

    python -m graft.finetune.evaluation.lm_eval_model --model graft --model_args base=DIR,adapter=DIR --tasks arc_easy

In Python, importing this module registers the name `graft`:

    import graft.finetune.evaluation.lm_eval_model
    lm_eval.simple_evaluate(model="graft", model_args={"base": "DIR"}, tasks=["arc_easy"])
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.device import resolve_device
from ...base.extras import needs
from ...base.generate.sampling import Sampling
from ..data.chat import ChatTemplate, encode_prompt
from ..data.records import Message
from ..generate import generate_answers, start_ids
from .likelihood import Row, cut_to, score_groups, start_token
from .run import load_bank

with needs("lm-eval", "the harness's model class"):
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

MAX_NEW_TOKENS = 256  # where a task doesn't say, as in the harness's own models
MAX_CHOICES = 32  # rows that are read as one group


@register_model("graft")
class GraftLM(TemplateLM):
    """Requests of the harness, answered by the scoring and the engine of `graft eval` and `graft generate`.

    Contexts longer than the model lose their beginning, as in the harness's own models; how many did is in `n_cut`.
    """

    def __init__(
        self,
        base: str,
        adapter: str | None = None,
        *,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,  # the harness hands it over; prompts are batched by their tokens here
    ) -> None:
        super().__init__()
        del max_batch_size
        self._device = resolve_device(device or "auto")
        folders = {} if adapter is None else {"evaluated": adapter}
        bank, self._tokenizer = load_bank(base, folders, dtype=dtype, device=self._device)
        bank.use("evaluated" if folders else None)
        self.model, self._base, self.n_cut = bank.model, str(base), 0
        adapted = bank.adapters["evaluated"] if folders else None
        source, args = (adapted.chat_template, adapted.template_args) if adapted is not None else (None, None)
        self._template = ChatTemplate.of(self._tokenizer, source, args=args)
        self.batch_size = (
            batch_size if isinstance(batch_size, int) else int(batch_size) if batch_size.isdecimal() else 16
        )

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        eos = self._tokenizer.eos_token_id
        return start_token(self._tokenizer) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return start_token(self._tokenizer)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self._base.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, with BOS before them where the tokenizer asks for it and `add_special_tokens` isn't False."""
        del kwargs
        ids = self._tokenizer.encode(string).tolist()
        bos = self._tokenizer.bos_token_id
        return [bos, *ids] if bos is not None and self._tokenizer.add_bos and add_special_tokens is not False else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness notes beside the results."""
        return self._template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text."""
        turns: list[Message] = [{**turn} for turn in chat_history]
        return self._template.render(turns, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log p, greedy) of each (context, continuation); the choices after one context, which follow each other, are a
        group."""
        del disable_tqdm, kwargs
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        groups: list[list[Row]] = []
        last = ""
        for ((context, _), *_), row in zip(requests, rows, strict=True):
            if context and context == last and len(groups[-1]) < MAX_CHOICES:
                groups[-1].append(row)
            else:
                groups.append([row])
            last = context
        return [(one.log_p, one.greedy) for group in score_groups(self.model, groups) for one in group]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> Row:
        row = Row((*context, *continuation), len(context))
        if not context or not continuation:
            raise ValueError(
                f"a request has {len(context)} context and {len(continuation)} continuation tokens; needs both"
            )
        cut = cut_to(row, self.max_length)
        self.n_cut += cut is not row
        return cut

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in disjoint windows, each token predicted once, the first from the prefix token."""
        del disable_tqdm
        windows: list[list[Row]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                context, predicted = make_disjoint_window(window)
                windows.append([self._row(context, predicted)])
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, [one] in zip(owners, score_groups(self.model, windows), strict=True):
            totals[owner] += one.log_p
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to its first stop string. Raises ValueError for a setting that graft has not."""
        del disable_tqdm
        answers = [""] * len(requests)
        asked = [(*request.args, i) for i, request in enumerate(requests)]
        by_settings: dict[str, list[tuple[str, dict[str, Any], int]]] = {}
        for context, settings, i in asked:
            by_settings.setdefault(repr(sorted(settings.items(), key=str)), []).append((context, settings, i))
        for group in by_settings.values():
            sampling, stops = _sampling(group[0][1])
            ids = {i: self._context(context, sampling.max_new_tokens) for context, _, i in group}
            order = sorted(ids, key=lambda i: len(ids[i]))
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                given = [ids[i] for i in rows]
                found = generate_answers(
                    self.model, self._tokenizer, given, sampling, template=self._template, stop=stops
                )
                for i, answer in zip(rows, found, strict=True):
                    answers[i] = answer.text
        return answers

    def _context(self, text: str, n_new: int) -> list[int]:
        """The context's ids, the beginning cut off where the new tokens would find no room."""
        if n_new >= self.max_length:
            raise ValueError(f"max_gen_toks={n_new} leaves no context; the model reads {self.max_length} tokens")
        special = text.startswith(tuple(self._tokenizer.special_tokens))  # the chat template rendered it
        ids = encode_prompt(text, self._tokenizer, special_tokens="tokens" if special else "text").tolist()
        ids = start_ids(ids, self._tokenizer)
        self.n_cut += len(ids) + n_new > self.max_length
        return ids[-(self.max_length - n_new) :]


def _sampling(settings: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
    """The harness's generation settings as graft's, and the stop strings."""
    known: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS))
    stops = [stop for stop in known.pop("until", None) or [] if stop]
    sampled = known.pop("do_sample", False)
    sampling = Sampling(
        known.pop("temperature", 0.0) if sampled else 0.0,
        known.pop("top_k", None) or None,
        known.pop("top_p", None),
        known.pop("min_p", None),
        known.pop("max_gen_toks"),
        seed=known.pop("seed", 0),
        repetition_penalty=known.pop("repetition_penalty", 1.0),
    )
    if known:
        raise ValueError(f"the generation setting {', '.join(known)} is not known; graft has those of Sampling")
    return sampling, stops


def main() -> None:
    """The harness's own command line, with the model `graft`."""
    from lm_eval.__main__ import cli_evaluate

    if "--model" not in sys.argv and not any(word.startswith("--model=") for word in sys.argv):
        sys.argv += ["--model", "graft"]
    cli_evaluate()


if __name__ == "__main__":
    main()
