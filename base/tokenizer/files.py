"""tokenizer.json and its companions: the byte-level BPE files of GPT-2, Llama 3, Qwen 2/3 and their like, both ways.

Byte-level means that the file spells each byte as one printable character (GPT-2's table below). Files of another kind
(WordPiece, Unigram, SentencePiece-like BPE) are refused, never guessed at.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.numba_jit import collector_paused
from ..json_fields import check, field, read_json
from .definition import ID_BITS, AddedToken, Definition, Pair
from .patterns import GPT2, covers_all_text, resolve

Json = dict[str, Any]
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def byte_characters() -> list[str]:
    """GPT-2's table: the character that stands for each byte; printable ones stand for themselves."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


# ---------------------------------------------------------------------------------------------------------- reading


@collector_paused()
def read(path: Path) -> Definition:
    """Read a folder (or a tokenizer.json). A folder may instead hold GPT-2's older pair vocab.json and merges.txt.

    Raises FileNotFoundError, or ValueError naming the file and what it isn't.
    """
    path = Path(path)
    if path.is_file():
        return _complete(read_json(path), {}, None, path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder that holds tokenizer.json")
    if (path / "tokenizer.json").exists():
        main = read_json(path / "tokenizer.json")
        return _complete(main, _read_config(path), _read_template(path), path / "tokenizer.json")
    vocabs, merges = sorted(path.glob("*vocab.json")), sorted(path.glob("*merges.txt"))
    if len(vocabs) != 1 or len(merges) != 1:
        raise FileNotFoundError(f"{path} holds no tokenizer.json (nor one vocab.json with one merges.txt)")
    main = _from_gpt2_pair(read_json(vocabs[0]), _read_text(merges[0]) or "")
    return _complete(main, _read_config(path), _read_template(path), vocabs[0])


def _read_config(folder: Path) -> Json:
    """tokenizer_config.json over special_tokens_map.json: the names of BOS, EOS and padding."""
    config: Json = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= read_json(folder / name)
    return config


def _read_template(folder: Path) -> str | None:
    return _read_text(folder / "chat_template.jinja")


def _read_text(file: Path) -> str | None:
    if not file.exists():
        return None
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file; give a text file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte offset {error.start}); write it again as UTF-8") from None


def _from_gpt2_pair(vocab: dict[str, int], merges: str) -> Json:
    """The tokenizer.json that GPT-2's vocab.json and merges.txt amount to."""
    end = vocab.get("<|endoftext|>")
    return {
        "added_tokens": [] if end is None else [{"id": end, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [line for line in merges.split("\n") if line and not line.startswith("#version")],
        },
    }


def _complete(main: Json, config: Json, template: str | None, path: Path) -> Definition:
    """Check that the file is byte-level BPE and take out of it what graft runs on."""
    model = field(main, "model", dict, path, default={})
    if not model:
        raise ValueError(f"{path} has no 'model'; is it a tokenizer.json of the tokenizers library?")
    kind = model.get("type", "BPE" if "merges" in model else "of no stated type")
    if kind != "BPE":
        raise ValueError(f"{path}: the model is {kind}; graft reads byte-level BPE only")
    _refuse_unlike_bpe(model, path)
    _check_ids(field(model, "vocab", dict, path), path)
    added = _added_tokens(main, model, path)
    splits, prefix_space = _splits(field(main, "pre_tokenizer", dict, path, default=None), path)
    names = {token.content for token in added}
    vocab, merges = _vocab(model, names, path)
    template = template if template is not None else _template_of(config.get("chat_template"), path)
    post_processor = field(main, "post_processor", dict, path, default=None)
    eos = _name(config.get("eos_token"), names)
    if eos is None and "eos_token" not in config and "<|endoftext|>" in names:
        eos = "<|endoftext|>"
    bos = _name(config.get("bos_token"), names)
    leading = _leading_token(post_processor, path)
    definition = Definition(
        vocab,
        merges,
        added,
        splits,
        prefix_space=prefix_space,
        normalizer=_normalizer(field(main, "normalizer", dict, path, default=None), path),
        ignore_merges=bool(model.get("ignore_merges")),
        bos=bos or (leading if leading in names else None),
        eos=eos,
        pad=_name(config.get("pad_token"), names),
        add_bos=leading is not None
        if _template_section(post_processor, path) is not None
        else bool(config.get("add_bos_token")),
        chat_template=template,
        raw={"config": config} | {name: main[name] for name in _SECTIONS if main.get(name) is not None},
    )
    try:
        _ = definition.merge_ids  # encoding needs them anyway
    except KeyError:  # a merge makes a token that isn't there
        return replace(definition, merges=_known_merges(model, names, path))
    return definition


def _refuse_unlike_bpe(model: Json, path: Path) -> None:
    if model.get("byte_fallback"):
        raise ValueError(f"{path}: BPE with byte_fallback (SentencePiece style); graft reads byte-level BPE only")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"{path}: {key}={model[key]!r} is not byte-level BPE as graft runs it")


def _check_ids(vocab: Json, path: Path) -> None:
    """Ids are whole numbers below 2^21, each of one text. Raises ValueError naming the text."""
    texts: dict[int, str] = {}
    for text, index in vocab.items():
        _check_id(text, index, path)
        if index in texts:
            raise ValueError(f"{path}: {texts[index]!r} and {text!r} both have id {index}; each token needs its own")
        texts[index] = text


def _check_id(text: str, index: Any, path: Path) -> int:
    if type(index) is not int:
        raise ValueError(f"{path}: the id of {text!r} is {index!r}; expected a whole number")
    if not 0 <= index < 1 << ID_BITS:
        raise ValueError(
            f"{path}: the id of {text!r} is {index:,}; graft's tokenizer has room for 0 to {(1 << ID_BITS) - 1:,}"
        )
    return index


def _added_tokens(main: Json, model: Json, path: Path) -> tuple[AddedToken, ...]:
    """The added tokens, checked. Raises ValueError for one without text, for one text or one id given twice."""
    options = ("special", "lstrip", "rstrip", "single_word", "normalized")
    vocab: dict[str, int] = model["vocab"]
    text_of = {index: text for text, index in vocab.items()}
    found: dict[str, AddedToken] = {}
    for place, entry in enumerate(field(main, "added_tokens", list, path, default=[])):
        where = f"{path}: added token {place}"
        entry = check(entry, dict, where)
        content = field(entry, "content", str, where)
        index = _check_id(content, field(entry, "id", int, where), path)
        if not content:
            raise ValueError(f"{where} has the empty text; remove it")
        if content in found:
            if found[content].id == index:
                continue
            raise ValueError(
                f"{path}: the added token {content!r} has two ids, {found[content].id} and {index}; keep one"
            )
        if text_of.get(index, content) != content:
            raise ValueError(
                f"{path}: {text_of[index]!r} and {content!r} both have id {index}; each token needs its own"
            )
        if vocab.get(content, index) != index:
            raise ValueError(
                f"{path}: {content!r} has id {vocab[content]} in the vocabulary and {index} as an added token"
            )
        text_of[index] = content
        flags = {name: field(entry, name, bool, where, default=False) for name in options}
        found[content] = AddedToken(content, index, in_vocab=content in vocab, **flags)
    return tuple(found.values())


def _vocab(model: Json, added: set[str], path: Path) -> tuple[dict[int, bytes], list[Pair]]:
    """Undo the byte table. Raises ValueError for text that isn't in it and for merges of unknown tokens.

    Bytes may be absent: SmolLM2 lacks 21 of them. They are dropped from text before merging, as the tokenizers library does
    where the file names no unk_token.
    """
    spelt = _spell_all([text for text in model["vocab"] if text not in added], path)
    if not spelt:
        raise ValueError(f"{path}: the vocabulary has no token but the added ones; is the file whole?")
    vocab = {model["vocab"][text]: token for text, token in spelt.items()}
    absent = 256 - len({token for token in vocab.values() if len(token) == 1})
    if absent and model.get("unk_token") is not None:
        raise ValueError(
            f"{path}: the vocabulary lacks {absent} of 256 bytes and puts unk_token {model['unk_token']!r} in their place; "
            "graft reads files without unk_token"
        )
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in field(model, "merges", list, path)]
    try:
        return vocab, [(spelt[left], spelt[right]) for left, right in pairs]
    except (KeyError, ValueError, TypeError):  # an unknown token, other than two, no list
        return vocab, _known_merges(model, added, path)


def _known_merges(model: Json, added: set[str], path: Path) -> list[Pair]:
    """The merges without those that join or make an added token; ValueError for any other that the vocabulary lacks."""
    spelt = _spell_all([text for text in model["vocab"] if text not in added], path)
    known = set(spelt.values())
    merges: list[Pair] = []
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise ValueError(f"{path}: merge {rank} is {merge!r}; two tokens are expected")
        left, right = spelt.get(pair[0]), spelt.get(pair[1])
        if left is not None and right is not None and left + right in known:
            merges.append((left, right))
        elif added.isdisjoint((*pair, pair[0] + pair[1])):
            raise ValueError(f"{path}: merge {rank} {merge!r} joins or makes a token that is not in the vocabulary")
        # else plain text would merge into an added token; other libraries never let it come to that
    return merges


def _spell_all(texts: list[str], path: Path) -> dict[str, bytes]:
    """Each text -> the bytes that its characters stand for, all texts at once."""
    byte_of = np.full(0x110000, -1, np.int16)
    byte_of[[ord(character) for character in byte_characters()]] = range(256)
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    found = byte_of[np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")]
    if len(found) and found.min() < 0:
        text = texts[int(np.searchsorted(ends, found.argmin(), side="right"))]
        raise ValueError(f"{path}: {text!r} isn't spelt in bytes; graft reads byte-level BPE only")
    spelling = found.astype(np.uint8).tobytes()
    places = [0, *ends.tolist()]
    return {text: spelling[start:end] for text, start, end in zip(texts, places[:-1], places[1:], strict=True)}


def _parts(section: Json | None, key: str, where: str) -> list[Json]:
    """A section's steps: itself, or those of a Sequence; each an object with a type. [] for none."""
    if section is None:
        return []
    parts = [section]
    if field(section, "type", str, where) == "Sequence":
        parts = field(section, key, list, where)
    for part in parts:
        field(check(part, dict, f"{where}: a step"), "type", str, where)
    return parts


def _normalizer(section: Json | None, path: Path) -> str | None:
    parts = _parts(section, "normalizers", f"{path}: normalizer")
    if not parts:
        return None
    if len(parts) == 1 and parts[0]["type"] in _FORMS:
        return parts[0]["type"]
    kinds = ", ".join(part["type"] for part in parts)
    raise ValueError(f"{path}: normalizer {kinds} is unknown to graft; it knows {', '.join(_FORMS)}")


def _splits(section: Json | None, path: Path) -> tuple[tuple[str, ...], bool]:
    """The patterns in order, and whether a space is put before each text."""
    parts = _parts(section, "pretokenizers", f"{path}: pre_tokenizer")
    splits: list[str] = []
    prefix_space = byte_level = False
    for part in parts:
        if part["type"] == "ByteLevel" and not byte_level:
            byte_level = True
            prefix_space = bool(part.get("add_prefix_space", True))
            if prefix_space and splits:
                raise ValueError(f"{path}: add_prefix_space after a split is not supported; set it to false")
            if part.get("use_regex", True):
                splits.append(GPT2)
        elif part["type"] == "Split" and not byte_level:
            splits.append(_split_pattern(part, path))
        elif part["type"] == "Digits" and not byte_level:
            splits.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        else:
            raise ValueError(
                f"{path}: pre-tokenizer {part['type']} is unknown to graft; it knows Split, Digits, ByteLevel"
            )
    if not byte_level:
        raise ValueError(f"{path}: no ByteLevel pre-tokenizer; graft reads byte-level BPE only")
    return tuple(splits), prefix_space


def _split_pattern(part: Json, path: Path) -> str:
    import regex

    where = f"{path}: pre_tokenizer: Split"
    source = field(part, "pattern", dict, where)
    pattern = field(source, "Regex", str, where, default=None)
    if pattern is None:
        pattern = regex.escape(field(source, "String", str, where))
    try:
        pattern = resolve(pattern)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    how = (part.get("behavior"), bool(part.get("invert")))
    # Removing what lies between matches is the same as isolating the matches where a pattern matches all text.
    if how == ("Isolated", False) or (how == ("Removed", True) and covers_all_text(pattern)):
        return pattern
    raise ValueError(f"{path}: Split with behavior {how[0]}, invert {how[1]} is unknown to graft; it knows Isolated")


def _template_section(section: Json | None, path: Path) -> Json | None:
    parts = _parts(section, "processors", f"{path}: post_processor")
    return next((part for part in parts if part["type"] == "TemplateProcessing"), None)


def _leading_token(section: Json | None, path: Path) -> str | None:
    """The special token that the post-processor puts before a single text."""
    template = _template_section(section, path)
    where = f"{path}: post_processor"
    steps = [] if template is None else field(template, "single", list, where, default=[])
    first = check(steps[0], dict, f"{where}: single") if steps else {}
    token = field(first, "SpecialToken", dict, where, default=None)
    return None if token is None else field(token, "id", str, where)


def _name(value: Any, known: set[str]) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text in known else None


def _template_of(value: Any, path: Path) -> str | None:
    """The chat template in tokenizer_config.json: a string, or a list of named ones of which `default` counts."""
    if isinstance(value, list):
        named = [check(entry, dict, f"{path}: chat_template") for entry in value]
        return next(
            (field(e, "template", str, f"{path}: chat_template") for e in named if e.get("name") == "default"), None
        )
    return None if value is None else check(value, str, f"{path}: chat_template")


# ---------------------------------------------------------------------------------------------------------- writing


def write(definition: Definition, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, chat_template.jinja."""
    from ..checkpoint import write_file, write_json

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder for the tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.json", json.dumps(_main_object(definition), ensure_ascii=False, indent=1))
    write_json(folder / "tokenizer_config.json", _config_object(definition))
    names = {"bos_token": definition.bos, "eos_token": definition.eos, "pad_token": definition.pad}
    write_json(folder / "special_tokens_map.json", {key: name for key, name in names.items() if name is not None})
    if definition.chat_template is not None:
        write_file(folder / "chat_template.jinja", definition.chat_template)
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)


def _main_object(definition: Definition) -> Json:
    character = byte_characters()

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    vocab = {spell(token): index for index, token in definition.vocab.items()}
    vocab |= {token.content: token.id for token in definition.added if token.in_vocab}
    raw = definition.raw
    pre_tokenizer = raw.get("pre_tokenizer") or _pre_tokenizer(definition)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token.id,
                "content": token.content,
                "single_word": token.single_word,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": token.normalized,
                "special": token.special,
            }
            for token in sorted(definition.added, key=lambda token: token.id)
        ],
        "normalizer": raw.get("normalizer"),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": raw.get("post_processor"),
        "decoder": raw.get("decoder") or _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": definition.ignore_merges,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[spell(left), spell(right)] for left, right in definition.merges],
        },
    }


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _pre_tokenizer(definition: Definition) -> Json:
    if definition.splits == (GPT2,):
        return _byte_level(True)
    parts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in definition.splits
    ]
    return {"type": "Sequence", "pretokenizers": [*parts, _byte_level(False)]}


def _config_object(definition: Definition) -> Json:
    """tokenizer_config.json: what was read, under the class name that every version of transformers opens as it is."""
    config = dict(definition.raw.get("config", {}))
    for key in ("chat_template", "bos_token", "eos_token", "pad_token"):
        config.pop(key, None)
    config.setdefault("model_max_length", int(1e30))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"bos_token": definition.bos, "eos_token": definition.eos}
    if definition.pad is not None:
        config["pad_token"] = definition.pad
    if definition.chat_template is not None:
        config["chat_template"] = definition.chat_template
    return config
