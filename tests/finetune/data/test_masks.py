"""Masks: no word of the user, the system or a tool carries loss, whatever token a template puts where."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.chat import ChatTemplate, encode_prompt, encode_whole
from graft.finetune.data.ends import end_of_turn_spelling
from graft.finetune.data.records import Message, Record
from graft.finetune.data.templates import TEMPLATES, template_source

ENDS = ("", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
OPENERS = ("", "<|im_start|>", "<start_of_turn>")


def made_up(
    ends: dict[str, str], opener: str, *, system_last: bool, header: str, between: str, end_when: str, tagged: bool
) -> str:
    """A template whose roles end on their own tokens."""
    word = "{{- m['content'] }}"
    parts = []
    for role in ("system", "user", "assistant", "tool"):
        last = {"always": "true", "last": "loop.last", "not last": "not loop.last"}[
            end_when if role == "assistant" else "always"
        ]
        end = f"{{%- if {last} %}}{{{{- '{ends[role]}' }}}}{{%- endif %}}"
        body = f"{word}{end}"
        if role == "assistant" and tagged:
            body = "{%- generation %}" + body + "{%- endgeneration %}"
        parts.append(
            f"{{%- if m['role'] == '{role}' %}}{{{{- '{opener}{role}{header}' }}}}{body}{{{{- '{between}' }}}}{{%- endif %}}"
        )
    turns = "messages|rejectattr('role','equalto','system')" if system_last else "messages"
    tail = ""
    if system_last:
        tail = f"{{%- for m in messages if m['role'] == 'system' %}}{{{{- 'NOTE ' + m['content'] + '{ends['system']}' }}}}{{%- endfor %}}"  # noqa: E501
    return (
        f"{{%- for m in {turns} %}}{''.join(parts)}{{%- endfor %}}"
        f"{{%- if add_generation_prompt %}}{{{{- '{opener}assistant{header}' }}}}{{%- else %}}{tail}{{%- endif %}}"
    )


def words(role: str) -> st.SearchStrategy[str]:
    """Words that tell whose they are: user0 ... user9, with white space around."""
    return st.lists(st.integers(0, 9), min_size=1, max_size=4).map(
        lambda ns: " ".join(f"{role[:2].upper()}{n}" for n in ns)
    )


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=6))
    roles = ["user", *roles, "assistant"]
    if draw(st.booleans()):
        roles.insert(0, "system")
    if draw(st.booleans()):
        roles.append(draw(st.sampled_from(["user", "system", "tool"])))
    return tuple({"role": role, "content": draw(words(role))} for role in roles)


templates = st.builds(
    made_up,
    st.fixed_dictionaries({role: st.sampled_from(ENDS) for role in ("system", "user", "assistant", "tool")}),
    st.sampled_from(OPENERS),
    system_last=st.booleans(),
    header=st.sampled_from([": ", "\\n", "<|end_header_id|>"]),
    between=st.sampled_from(["", "\\n", " "]),
    end_when=st.sampled_from(["always", "last", "not last"]),
    tagged=st.booleans(),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=templates, messages=conversations())
def test_only_the_assistants_words_carry_loss(source: str, messages: tuple[Message, ...], tokenizer: Tokenizer) -> None:
    """Law over made-up templates: what is learned holds the assistant's words, all of them, and nobody else's."""
    record = Record("r", messages=messages)
    try:
        encoded = encode_whole(record, tokenizer, ChatTemplate(source, "<|bos|>", "<|endoftext|>"))
    except ValueError as error:
        assert "can't be told" in str(error) or "alone" in str(error)  # noqa: PT017 (refused with a reason is right too)
        return
    learned = tokenizer.decode(encoded.ids[encoded.loss_mask])
    for other in ("US", "TO", "SY", "NOTE"):
        assert other not in learned
    said = "".join(str(m["content"]) for m in messages if m["role"] == "assistant")
    assert [c for c in learned if c in "AS" or c.isdigit()] == [c for c in said if c in "AS" or c.isdigit()]


def test_most_made_up_templates_are_not_refused(tokenizer: Tokenizer) -> None:
    """Law: refusing everything would pass the test above; here ends after every role, after none and after users only."""
    chat = tuple(
        {"role": r, "content": c}
        for r, c in [("user", "US1"), ("assistant", "AS1"), ("user", "US2"), ("assistant", "AS2")]
    )
    options = {"system_last": False, "header": ": ", "between": "\\n", "tagged": False}
    none = dict.fromkeys(("system", "user", "assistant", "tool"), "")
    cases = {
        "AS1<|im_end|>AS2<|im_end|>": made_up(dict.fromkeys(none, "<|im_end|>"), "", end_when="always", **options),
        "AS1\nAS2\n<|endoftext|>": made_up(none, "", end_when="always", **options),
        "AS1\nAS2\n<|endoftext|> ": made_up(none | {"user": "<|im_end|>"}, "", end_when="always", **options),
        "AS1<|eot_id|>AS2<|eot_id|>": made_up({"system": "<|im_end|>", "user": "<|im_end|>", "tool": "", "assistant": "<|eot_id|>"}, "<|im_start|>", end_when="always", **options),  # noqa: E501
        "AS1AS2<|endoftext|>": made_up(none | {"assistant": "<|endoftext|>"}, "", end_when="last", **options),
    }  # fmt: skip
    for expected, source in cases.items():
        encoded = encode_whole(Record("r", messages=chat), tokenizer, ChatTemplate(source, None, "<|endoftext|>"))
        assert tokenizer.decode(encoded.ids[encoded.loss_mask]) == expected.rstrip(" ")


def test_the_end_after_user_turns_only_was_once_passed_over(tokenizer: Tokenizer) -> None:
    """Worked by hand: the assistant's last turn ends on <|im_end|>, its first on nothing, a user's always.

    The search for the first turn's end found the user's, and the user's words were learned.
    """
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'user' or loop.last %}{{ '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = tuple(
        {"role": r, "content": c}
        for r, c in [("user", "a"), ("assistant", "b"), ("user", "secret"), ("assistant", "d")]
    )
    encoded = encode_whole(Record("r", messages=chat), tokenizer, ChatTemplate(source))
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]) == "bd<|im_end|>"


def test_tags_around_the_users_words_are_refused(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endfor %}"
    chat = ({"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"})
    with pytest.raises(ValueError, match=r"generation tags enclose words of message 0 \(user\)"):
        encode_whole(Record("r", messages=chat), tokenizer, ChatTemplate(source))


def test_a_template_that_drops_the_answer_is_refused(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    chat = ({"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"})
    with pytest.raises(ValueError, match="r: the chat template drops the assistant's words of message 1"):
        encode_whole(Record("r", messages=chat), tokenizer, ChatTemplate(source))


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_a_generation_prompt_that_opens_a_thought(tokenizer: Tokenizer) -> None:
    """Worked by hand: the turn starts after its header; the thought that inference opens is not in the row."""
    chat = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."})
    encoded = encode_whole(Record("r", messages=chat), tokenizer, ChatTemplate(THINKING))
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]) == "It is 4.<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "gemma", "plain", "mistral"])
def test_assistant_first_and_two_in_a_row(name: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate.of(tokenizer, TEMPLATES[name])
    end = end_of_turn_spelling(tokenizer, template)
    a, b, u = ({"role": r, "content": c} for r, c in [("assistant", "hello"), ("assistant", "again"), ("user", "who?")])
    for chat, said in (((a, u, b), ["hello", "again"]), ((u, a, b), ["hello", "again"]), ((a,), ["hello"])):
        encoded = encode_whole(Record("r", messages=chat), tokenizer, template)
        learned = tokenizer.decode(encoded.ids[encoded.loss_mask])
        assert [part.strip().removeprefix("<think>\n\n</think>").strip() for part in learned.split(str(end))] == [
            *said,
            "",
        ]


# --- named templates: parity with transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_named_templates_mask_as_in_transformers(
    name: str, tokenizer: Tokenizer, theirs: PreTrainedTokenizerBase
) -> None:
    chat = tuple(
        {"role": r, "content": c}
        for r, c in [("system", "be brief"), ("user", "Who are you?"), ("assistant", "a small model"), ("user", "2 + 2?"), ("assistant", "4")]  # noqa: E501
    )  # fmt: skip
    options = {"chat_template": template_source(name)}
    expected = theirs.apply_chat_template(list(chat), return_dict=True, return_assistant_tokens_mask=True, **options)
    template = ChatTemplate.of(tokenizer, template_source(name))
    encoded = encode_whole(Record("r", messages=chat), tokenizer, template)
    assert encoded.ids.tolist() == expected["input_ids"]
    assert encoded.loss_mask.astype(int).tolist() == expected["assistant_masks"]
    prompt = theirs.apply_chat_template(list(chat[:2]), add_generation_prompt=True, return_dict=False, **options)
    assert encode_prompt(chat[:2], tokenizer, template).tolist() == prompt
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]).count(str(end_of_turn_spelling(tokenizer, template))) == 2


def test_template_arguments_reach_the_template(tokenizer: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    """A row's own arguments win over the run's, and equal transformers' keyword arguments."""
    source = template_source("qwen3")
    chat = ({"role": "user", "content": "hi"},)
    for thinking in (True, False):
        expected = theirs.apply_chat_template(
            list(chat), chat_template=source, add_generation_prompt=True, return_dict=False, enable_thinking=thinking
        )
        template = ChatTemplate.of(tokenizer, source, args={"enable_thinking": thinking})
        assert encode_prompt(chat, tokenizer, template).tolist() == expected
        other = ChatTemplate.of(tokenizer, source, args={"enable_thinking": not thinking})
        assert encode_prompt(chat, tokenizer, other, args={"enable_thinking": thinking}).tolist() == expected
    with pytest.raises(ValueError, match="template argument 'messages' is set by graft itself"):
        ChatTemplate(source, args={"messages": []})


def test_a_template_from_a_file_or_an_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert template_source(str(tmp_path / "own.jinja")) == "{{ messages }}"
    with pytest.raises(
        FileNotFoundError, match="chat template 'chatlm' is no file and none of the known names; choose chatml"
    ):
        template_source("chatlm")


def test_templates_that_want_lists_of_parts(tokenizer: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    """Vision models' templates write no content that is a string: it is handed over as parts."""
    source = (
        "{% for m in messages %}{{ m.role + ':' }}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    encoded = encode_whole(Record("r", messages=chat), tokenizer, ChatTemplate(source))
    assert encoded.ids.tolist() == theirs.apply_chat_template(parts, chat_template=source, return_dict=False)
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]) == "hello<|im_end|>"


@pytest.mark.parametrize("user", ["<|im_start|>user ", "<|start_header_id|>user "])
def test_a_token_that_opens_the_next_turn_ends_none(user: str, tokenizer: Tokenizer) -> None:
    """Worked by hand: only the last turn has an end token; what follows the others opens the user's or anybody's turn."""
    source = (
        "{% for m in messages %}{{ '" + user + "' if m.role == 'user' else '<|im_start|>assistant ' }}{{ m.content }}"
        "{% if loop.last %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    said = [("user", "who?"), ("assistant", "hello"), ("user", "again"), ("assistant", "thank you")]
    chat = tuple({"role": role, "content": content} for role, content in said)
    encoded = encode_whole(Record("r", messages=chat), tokenizer, ChatTemplate(source))
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]) == "hellothank you<|im_end|>"
