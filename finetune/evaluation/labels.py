"""Classification by likelihood: which of the answers that stand in the records is the most probable one."""

from collections.abc import Sequence

from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import ChatTemplate, split_answer
from ..data.records import Record, join_errors
from .likelihood import Progress, Row, score_groups
from .options import MAX_LABELS, EvalOptions
from .prompts import prompt_ids


def most_likely(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    *,
    options: EvalOptions | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """For each record the answer, of all that stand in the records, whose tokens are most probable after its prompt.

    log p(answer | prompt) is the sum over the answer's tokens, without an end token, as lm-evaluation-harness's `acc` has
    it: a base that never saw the format is asked what it knows, not whether it stops in time. Raises ValueError for more
    than MAX_LABELS answers, and for two that have the same tokens.
    """
    options = options or EvalOptions(score="likelihood")
    labels = sorted({split_answer(record)[1] for record in records})
    if len(labels) > MAX_LABELS:
        raise ValueError(
            f"--score likelihood compares few answers, the records have {len(labels):,} distinct ones (at most {MAX_LABELS}); "
            "use --score exact"
        )
    encoded = [tokenizer.encode(label).tolist() for label in labels]
    if len({tuple(ids) for ids in encoded}) < len(labels):
        raise ValueError(
            f"the tokenizer can't tell the answers {', '.join(map(repr, labels))} apart; rename the labels"
        )
    prompts, bad = prompt_ids(tokenizer, records, template, options)
    if bad:
        raise ValueError(join_errors(bad))
    groups = [[Row((*prompt, *label), len(prompt)) for label in encoded] for prompt in prompts if prompt is not None]
    scored = score_groups(model, groups, progress=progress)
    return [labels[max(range(len(labels)), key=lambda k, row=row: row[k].log_p)].strip() for row in scored]
