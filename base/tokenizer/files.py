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
from .definition import ID_BITS, AddedToken, Definition, Pair
from .patterns import GPT2, WHOLE, kind_of, resolve

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
        return _complete(_read_object(path), {}, None, path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder that holds tokenizer.json")
    if (path / "tokenizer.json").exists():
        main = _read_object(path / "tokenizer.json")
        return _complete(main, _read_config(path), _read_template(path), path / "tokenizer.json")
    vocabs, merges = sorted(path.glob("*vocab.json")), sorted(path.glob("*merges.txt"))
    if len(vocabs) != 1 or len(merges) != 1:
        raise FileNotFoundError(f"{path} holds no tokenizer.json (nor one vocab.json with one merges.txt)")
    main = _from_gpt2_pair(_read_object(vocabs[0]), merges[0].read_text(encoding="utf-8"))
    return _complete(main, _read_config(path), _read_template(path), vocabs[0])


def _read_object(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte offset {error.start}); is it a tokenizer.json?") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; a tokenizer file is an object")
    return value


def _read_config(folder: Path) -> Json:
    """tokenizer_config.json over special_tokens_map.json: the names of BOS, EOS and padding."""
    config: Json = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= _read_object(folder / name)
    return config


def _read_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.exists() else None


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
    model = main.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path} has no 'model'; is it a tokenizer.json of the tokenizers library?")
    kind = model.get("type", "BPE" if "merges" in model else "of no stated type")
    if kind != "BPE":
        raise ValueError(f"{path}: the model is {kind}; graft reads byte-level BPE only")
    _refuse_unlike_bpe(model, path)
    added = _added_tokens(main, model)
    splits, prefix_space = _splits(main.get("pre_tokenizer"), path)
    names = {token.content for token in added}
    vocab, merges = _vocab(model, names, path)
    template = template if template is not None else _template_of(config.get("chat_template"))
    eos = _name(config.get("eos_token"), names)
    if eos is None and "eos_token" not in config and "<|endoftext|>" in names:
        eos = "<|endoftext|>"
    bos = _name(config.get("bos_token"), names)
    leading = _leading_token(main.get("post_processor"))
    definition = Definition(
        vocab,
        merges,
        added,
        splits,
        prefix_space=prefix_space,
        normalizer=_normalizer(main.get("normalizer"), path),
        ignore_merges=bool(model.get("ignore_merges")),
        bos=bos or (leading if leading in names else None),
        eos=eos,
        pad=_name(config.get("pad_token"), names),
        add_bos=leading is not None if _is_template(main.get("post_processor")) else bool(config.get("add_bos_token")),
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


def _added_tokens(main: Json, model: Json) -> tuple[AddedToken, ...]:
    options = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return tuple(
        AddedToken(
            entry["content"],
            entry["id"],
            in_vocab=entry["content"] in model["vocab"],
            **{name: bool(entry.get(name, False)) for name in options},
        )
        for entry in main.get("added_tokens") or []
    )


def _vocab(model: Json, added: set[str], path: Path) -> tuple[dict[int, bytes], list[Pair]]:
    """Undo the byte table. Raises ValueError for text that isn't in it, for absent bytes and for merges of unknown tokens."""
    spelt = _spell_all([text for text in model["vocab"] if text not in added], path)
    vocab = {model["vocab"][text]: token for text, token in spelt.items()}
    known = {token for token in vocab.values() if len(token) == 1}
    absent = [byte for byte in range(256) if bytes([byte]) not in known]
    if absent:
        raise ValueError(f"{path}: the vocabulary has no token for byte 0x{absent[0]:02x} ({len(absent)} bytes absent)")
    if max(vocab) >= 1 << ID_BITS:
        raise ValueError(f"{path}: ids go up to {max(vocab):,}; graft's tokenizer has room below {1 << ID_BITS:,}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    try:
        return vocab, [(spelt[left], spelt[right]) for left, right in pairs]
    except (KeyError, ValueError):  # an unknown token, or other than two
        return vocab, _known_merges(model, added, path)


def _known_merges(model: Json, added: set[str], path: Path) -> list[Pair]:
    """The merges without those that join or make an added token; ValueError for any other that the vocabulary lacks."""
    spelt = _spell_all([text for text in model["vocab"] if text not in added], path)
    known = set(spelt.values())
    merges: list[Pair] = []
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise ValueError(f"{path}: merge {rank} is {merge!r}; two tokens are due")
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


def _normalizer(section: Json | None, path: Path) -> str | None:
    if section is None:
        return None
    parts = section["normalizers"] if section["type"] == "Sequence" else [section]
    if not parts:
        return None
    if len(parts) == 1 and parts[0]["type"] in _FORMS:
        return parts[0]["type"]
    kinds = ", ".join(part["type"] for part in parts)
    raise ValueError(f"{path}: normalizer {kinds} is unknown to graft; it knows {', '.join(_FORMS)}")


def _splits(section: Json | None, path: Path) -> tuple[tuple[str, ...], bool]:
    """The patterns in order, and whether a space is put before each text."""
    parts = [] if section is None else section["pretokenizers"] if section["type"] == "Sequence" else [section]
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

    pattern = part["pattern"].get("Regex") or regex.escape(part["pattern"].get("String", ""))
    pattern = resolve(pattern)
    how = (part.get("behavior"), bool(part.get("invert")))
    covers_all = kind_of(pattern) != WHOLE  # then keeping the matches and keeping everything are the same
    if how == ("Isolated", False) or (how == ("Removed", True) and covers_all):
        return pattern
    raise ValueError(f"{path}: Split with behavior {how[0]}, invert {how[1]} is unknown to graft; it knows Isolated")


def _is_template(section: Json | None) -> bool:
    return _template_section(section) is not None


def _template_section(section: Json | None) -> Json | None:
    if section is None:
        return None
    parts = section["processors"] if section["type"] == "Sequence" else [section]
    return next((part for part in parts if part["type"] == "TemplateProcessing"), None)


def _leading_token(section: Json | None) -> str | None:
    """The special token that the post-processor puts before a single text."""
    template = _template_section(section)
    first = template["single"][0] if template and template["single"] else {}
    return first["SpecialToken"]["id"] if "SpecialToken" in first else None


def _name(value: Any, known: set[str]) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if text in known else None


def _template_of(value: Any) -> str | None:
    """The chat template in tokenizer_config.json: a string, or a list of named ones of which `default` counts."""
    if isinstance(value, list):
        return next((entry["template"] for entry in value if entry.get("name") == "default"), None)
    return value


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
