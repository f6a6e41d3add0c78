"""What ends a turn, in one place: generation, chat and evaluation stop there, and written folders name it."""

from dataclasses import replace

from ...base.model.config import ModelConfig
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from .ends import end_of_turn_spelling
from .messages import Message
from .render import ChatTemplate


def stop_ids(config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> frozenset[int]:
    """The ids that end a text or a turn: those that the model's files name, EOS, and the template's end of turn.

    `config.eos_token_id` holds what config.json and generation_config.json name. The template is the adapter's or the
    tokenizer's (None: ChatTemplate.of(tokenizer)): its end of turn is the one that fine-tuning teaches.
    """
    eos = config.eos_token_id
    named = [*eos] if isinstance(eos, tuple) else [eos]
    found = end_of_turn_spelling(tokenizer, template or ChatTemplate.of(tokenizer))
    taught = tokenizer.special_tokens[found] if found else None
    return frozenset(stop for stop in (*named, tokenizer.eos_token_id, taught) if stop is not None)


def write_endings(model: Transformer, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    """Before a fully fine-tuned model and its tokenizer are saved: name what ends a turn in everything that is written.

    Changes model.config.eos_token_id (a list: the end of turn first, then what ended a text before), which goes to
    config.json and generation_config.json. The tokenizer's eos becomes the end of turn, where that changes nothing that
    the template writes; so other readers stop there too. `template` is None for a model that saw no conversation: then
    only EOS ends a text, as trained.
    """
    found = end_of_turn_spelling(tokenizer, template) if template is not None else None
    taught = tokenizer.special_tokens[found] if found else tokenizer.eos_token_id
    eos = model.config.eos_token_id
    before = [*eos] if isinstance(eos, tuple) else [eos]
    ends = [stop for stop in dict.fromkeys((taught, *before, tokenizer.eos_token_id)) if stop is not None]
    model.config = replace(model.config, eos_token_id=tuple(ends) if len(ends) > 1 else next(iter(ends), None))
    if template is None or not found or tokenizer.definition.eos == found:
        return
    turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    renamed = ChatTemplate(template.source, template.bos_token, found, args=template.args)
    if renamed.render(turns) == template.render(turns):
        tokenizer.definition = replace(tokenizer.definition, eos=found)
        tokenizer.eos_token_id = taught
