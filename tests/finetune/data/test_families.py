"""Masks of the model families whose chat templates TRL ships, beside transformers' `return_assistant_tokens_mask`.

TRL has each family's own template and, for most, a copy with `{% generation %}` tags. On the tagged copy graft's ids and mask
equal transformers', token for token. On the family's own template, where graft has to find the assistant's part, it learns what
the tags enclose less what is named below. The tokenizer has a token a byte, so that a border inside a word would show.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.chat import ChatTemplate, encode_whole
from graft.finetune.data.records import Message, Record

LINE = frozenset({"\n"})  # the line break after the end of a turn: a model has stopped by then
OPENS = frozenset({"<think>\n", "<think>\n\n</think>\n\n"})  # what the generation prompt itself opens at inference
OPENAI = frozenset({"<|start|>assistant"})  # the header, which inference writes too
DEEPSEEK = frozenset({"<｜Assistant｜>", "<｜tool▁outputs▁end｜>"})


@dataclass(frozen=True)
class Family:
    """A template's name in TRL's package, its special tokens, and what graft leaves out of TRL's mask on its own template."""

    name: str
    bos: str | None
    eos: str
    left_out: frozenset[str] = frozenset()


FAMILIES = [
    Family("cohere", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    Family("cohere2", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    Family("deepseek_r1_distill", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", DEEPSEEK),
    Family("deepseekv3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", DEEPSEEK),
    Family("diffusion_gemma", "<bos>", "<eos>", LINE),
    Family("gemma", "<bos>", "<eos>", LINE),
    Family("gemma3", "<bos>", "<eos>", LINE),
    Family(
        "glm4moe", None, "<|endoftext|>", frozenset({"<|user|>", "<|observation|>"})
    ),  # its end is the next turn's opening
    Family("gptoss", "<|startoftext|>", "<|return|>", OPENAI),
    Family("idefics3", "<|begin_of_text|>", "<end_of_utterance>", LINE),
    Family("lfm2", "<|startoftext|>", "<|im_end|>", LINE),
    Family("lfm2_v2", "<|startoftext|>", "<|im_end|>", LINE),
    Family("lfm2_2_5", "<|startoftext|>", "<|im_end|>"),  # the family's own templates have tags
    Family("lfm2_2_5_v2", "<|startoftext|>", "<|im_end|>"),
    Family("lfm2_2_5_vl", "<|startoftext|>", "<|im_end|>"),
    Family("llama3", "<|begin_of_text|>", "<|eot_id|>"),
    Family("llava_next", "<s>", "</s>"),
    Family("muse_glimmer", "<|begin_of_text|>", "<|eot|>", OPENAI),
    Family("nemotron_3_nano", "<s>", "<|im_end|>", LINE | OPENS),
    Family("nemotron_3_super", "<s>", "<|im_end|>", LINE | OPENS),
    Family("nemotron_3_ultra", "<s>", "<|im_end|>", LINE | OPENS),
    Family("nemotron_3_5_lightning", "<s>", "<|im_end|>", LINE | OPENS),
    Family("phi3", "<s>", "<|endoftext|>", LINE | {"\n<|endoftext|>"}),  # written once, after the last turn's own end
    Family("phi3_5", "<s>", "<|endoftext|>", LINE | {"\n<|endoftext|>"}),
    Family("qwen2_5", None, "<|im_end|>", LINE),
    Family("qwen2_5_vl", None, "<|im_end|>", LINE),
    Family("qwen3", None, "<|im_end|>", LINE),
    Family("qwen3_vl", None, "<|im_end|>", LINE),
    Family("qwen3_5_think", None, "<|im_end|>", LINE | OPENS),
    Family("qwen3_5_nothink", None, "<|im_end|>", LINE | OPENS),
    Family("qwen3_6", None, "<|im_end|>", LINE | OPENS),
    Family("qwen3_8", None, "<|im_end|>", LINE | OPENS),
    Family("qwen3_instruct_2507", None, "<|im_end|>", LINE),
    Family("smolvlm", "<|im_start|>", "<end_of_utterance>", LINE),
]
UNTAGGED = [  # TRL has no tagged copy of these: their ids alone can be compared
    *(Family(f"gemma4{version}", "<bos>", "<eos>") for version in ("", "_v2", "_v3", "_v4", "_v5")),
    Family("llama3_1", "<|begin_of_text|>", "<|eot_id|>"),
    Family("llama3_2", "<|begin_of_text|>", "<|eot_id|>"),
]
SPECIAL = (
    r"<\|[^|<>\s']+\|>|<｜[^｜]+｜>|<\|?turn\|?>|<\|?channel\|?>|<\|?tool(?:_call|_response)?\|>|<\|tool(?:_call|_response)?>|"
    r"<(?:start|end)_of_(?:turn|utterance|image)>|</?think>|</?tool_call>|</?tool_response>|\[/?INST\]|<sop>|\[gMASK\]"
)


def turn(role: str, content: str, **more: object) -> Message:
    return {"role": role, "content": content, **more}  # pyright: ignore[reportReturnType]


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]
NUMBER = {"type": "integer", "description": "a number"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add", "description": "adds",
        "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
    },
}  # fmt: skip
WHO, SUM = turn("user", "Who are you?"), turn("user", "2 + 2?")
CHATS: dict[str, tuple[list[Message], list[dict] | None]] = {
    "one turn": ([WHO, turn("assistant", "I am a small model.")], None),
    "system, turns": (
        [
            turn("system", "Be brief."), turn("user", "Hi\n\nthere "), turn("assistant", "Hello!\n\n1. one\n2. two"),
            turn("user", "Übung?"), turn("assistant", "Schön, ja."),
        ],
        None,
    ),
    "turns": ([WHO, turn("assistant", "I am a small model."), SUM, turn("assistant", "It is 4.")], None),
    "tools": (
        [
            turn("user", "Add 2 and 3."), turn("assistant", "", tool_calls=CALL), turn("tool", "sum: five", name="add"),
            turn("assistant", "It is 5."),
        ],
        [TOOL],
    ),
    "tools and words": (
        [
            turn("system", "Be brief."), turn("user", "Add 2 and 3."), turn("assistant", "Let me add.", tool_calls=CALL),
            turn("tool", "sum: five", name="add"), turn("assistant", "It is 5."), turn("user", "Sure?"), turn("assistant", "Yes."),
        ],
        [TOOL],
    ),
    "thoughts": (
        [
            SUM, turn("assistant", "It is 4.", reasoning_content="Two and two."),
            turn("user", "3 + 3?"), turn("assistant", "It is 6.", reasoning_content="Three and three."),
        ],
        None,
    ),
    "thought in the content": ([SUM, turn("assistant", "<think>\nTwo and two.\n</think>\n\nIt is 4.")], None),
}  # fmt: skip
# What a template can't say, by its own words; transformers is stopped by the same.
REFUSED = r"must alternate|System role not supported|Only user and assistant roles|can only concatenate str|unsupported operand"


@pytest.fixture(scope="module")
def templates() -> Path:
    trl = pytest.importorskip("trl", reason="TRL's package holds the templates")
    return Path(trl.__file__).parent / "chat_templates"


@pytest.fixture(scope="module")
def pair(templates: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    """A tokenizer with a token a byte and one for every special token of any family, and its twin in transformers."""
    sources = "".join(file.read_text(encoding="utf-8") for file in templates.glob("*.jinja"))
    ends = {token for family in [*FAMILIES, *UNTAGGED] for token in (family.bos, family.eos) if token}
    names = sorted({*re.findall(SPECIAL, sources), *ends})
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "a.txt").write_text("hello", encoding="utf-8")
    made = Tokenizer.train([folder / "a.txt"], vocab_size=256 + len(names), special_tokens=names)
    added = tuple(replace(token, special=not re.search("think|tool", token.content)) for token in made.definition.added)
    Tokenizer(replace(made.definition, added=added)).save(folder)
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


class Both:
    """One family in graft and in transformers."""

    def __init__(self, family: Family, templates: Path, pair: tuple[Tokenizer, PreTrainedTokenizerBase]) -> None:
        own, self.theirs = pair
        self.tokenizer = Tokenizer(replace(own.definition, bos=family.bos, eos=family.eos))
        self.theirs.bos_token, self.theirs.eos_token = family.bos, family.eos
        self.family = family
        self.own = (templates / f"{family.name}.jinja").read_text(encoding="utf-8")
        tagged = templates / f"{family.name}_training.jinja"
        self.tagged = tagged.read_text(encoding="utf-8") if tagged.exists() else self.own
        self.made = {source: ChatTemplate(source, family.bos, family.eos) for source in {self.own, self.tagged}}

    def expected(self, source: str, chat: str, *, masks: bool = True) -> tuple[list[int], list[int]]:
        """transformers' ids and mask; raises whatever the template raises."""
        messages, tools = CHATS[chat]
        given: Any = tools
        if self.made[source].wants_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]  # pyright: ignore
        found: Any = self.theirs.apply_chat_template(
            messages, tools=given, chat_template=source, return_dict=True, return_assistant_tokens_mask=masks
        )
        return found["input_ids"], found.get("assistant_masks", [])

    def ours(self, source: str, chat: str) -> tuple[list[int], list[int]]:
        messages, tools = CHATS[chat]
        encoded = encode_whole(Record("r", messages=tuple(messages), tools=tools), self.tokenizer, self.made[source])
        return encoded.ids.tolist(), encoded.loss_mask.astype(int).tolist()

    def pieces(self, ids: Sequence[int], chosen: Sequence[bool]) -> list[str]:
        """The text of each run of chosen tokens."""
        runs: list[list[int]] = [[]]
        for token, is_chosen in zip(ids, chosen, strict=True):
            if is_chosen:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        return [self.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_tagged_template(family: Family, templates: Path, pair: tuple[Tokenizer, PreTrainedTokenizerBase]) -> None:
    """Parity with transformers: equal ids and masks, or both are refused for the same reason."""
    both = Both(family, templates, pair)
    for chat in CHATS:
        expected, reason = None, ""
        try:
            expected = both.expected(both.tagged, chat)
        except Exception as error:  # a template may raise anything
            reason = str(error)[:60]
        if expected is None:
            with pytest.raises(ValueError, match=REFUSED) as refused:
                both.ours(both.tagged, chat)
            assert reason in str(refused.value), chat
        else:
            assert both.ours(both.tagged, chat) == expected, chat


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if "2_5" not in family.name or "qwen" in family.name], ids=lambda f: f.name
)
def test_the_familys_own_template(
    family: Family, templates: Path, pair: tuple[Tokenizer, PreTrainedTokenizerBase]
) -> None:
    """Parity with transformers' ids, and with TRL's tags where its copy writes the same text."""
    both = Both(family, templates, pair)
    compared = 0
    for chat in CHATS:
        try:
            ids, _ = both.expected(both.own, chat, masks=False)
            tagged_ids, mask = both.expected(both.tagged, chat)
        except Exception:  # a template may raise anything; that graft does too is held above
            with pytest.raises(ValueError, match=REFUSED):
                both.ours(both.own, chat)
            continue
        if (family.name, chat) == ("gptoss", "tools and words"):  # drops "Let me add." once an answer follows
            with pytest.raises(ValueError, match="writes message 2 differently once others follow"):
                both.ours(both.own, chat)
            continue
        our_ids, our_mask = both.ours(both.own, chat)
        if family.name == "glm4moe":  # no end of its own: EOS stands where the tagged copy writes <|user|>
            assert our_ids == [*ids, both.tokenizer.eos_token_id]
            our_ids, our_mask, tagged_ids, mask = our_ids[:-1], our_mask[:-1], tagged_ids[:-1], mask[:-1]
        else:
            assert our_ids == ids, chat
        learned, text = " ".join(both.pieces(our_ids, [bool(m) for m in our_mask])), both.tokenizer.decode(our_ids)
        for message in CHATS[chat][0]:
            said = message["content"].rpartition("</think>")[2].strip()
            if said and said in text:  # Muse Glimmer writes no words beside a tool call
                assert (said in learned) == (message["role"] == "assistant"), (chat, said)
        if our_ids != tagged_ids:
            continue  # the copy keeps thoughts that the family's own template drops
        compared += 1
        over = [bool(a) and not b for a, b in zip(our_mask, mask, strict=True)]
        under = [bool(b) and not a for a, b in zip(our_mask, mask, strict=True)]
        assert set(both.pieces(tagged_ids, under)) <= family.left_out, chat
        extra = {"<|tool_response>", "<|turn>model\n"} if (family.name, chat) == ("diffusion_gemma", "tools") else set()
        assert set(both.pieces(tagged_ids, over)) == extra, chat  # what render(turns up to i) says that turn i writes
    assert compared >= 2


@pytest.mark.parametrize("family", UNTAGGED, ids=lambda family: family.name)
def test_templates_without_a_tagged_copy(
    family: Family, templates: Path, pair: tuple[Tokenizer, PreTrainedTokenizerBase]
) -> None:
    """Parity with transformers' ids; the assistant's words are learned and nobody else's."""
    both = Both(family, templates, pair)
    for chat in ("one turn", "system, turns", "turns"):
        ids, mask = both.ours(both.own, chat)
        assert ids == both.expected(both.own, chat, masks=False)[0], chat
        learned = " ".join(both.pieces(ids, [bool(m) for m in mask]))
        for message in CHATS[chat][0]:
            assert (message["content"].strip() in learned) == (message["role"] == "assistant"), (chat, message)
