"""Damaged inputs of every kind of file that graft reads, from a seed, and the reader of each. Run as a script in a process
with limits: `python inputs.py FAMILY SEED COUNT BASE FOLDER` prints one line of JSON for each broken law."""

import copy
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 10  # of processor time an input may take
MEMORY = 2 << 30  # bytes that may be mapped beyond what the process has after its imports
DEEP = "[" * 100_000


class TooLong(BaseException):
    """An input took more than SECONDS."""


# --- damage --------------------------------------------------------------------------------------------------------


def any_value(rng: random.Random) -> Any:
    """A JSON value of any kind, with a taste for the ends of ranges."""
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**400, -(2**63), 0.5, -0.0, 1e308, 1e-320, float("nan"),
            float("inf"), "", "x", "[/b]", "\ud800", "\x1b[31m", "9" * 50, "auto", "../..", "a" * 70_000, [], {}, [[]],
            [None], [1, "2"], {"a": None}, {"": {}}, [0] * 5000, ["x"] * 50, {"type": "x"}, {"content": 3},
        ]
    )  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def damaged_value(whole: Any, rng: random.Random) -> Any:
    """One to three places changed: another value, gone, doubled, or another place's value."""
    value = copy.deepcopy(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = [*places(value)]
        if not found:
            return any_value(rng)
        # Half of the time near the root: the leaves are mostly the vocabulary's.
        container, key = rng.choice(found[:40] if rng.random() < 0.5 else found)
        kind = rng.randrange(5)
        if kind <= 2:
            container[key] = any_value(rng)
        elif kind == 3:
            del container[key]
        else:
            other, other_key = rng.choice(found)
            if isinstance(other, dict) and other_key in other:
                container[key] = copy.deepcopy(other[other_key])
    return value


def damaged_bytes(whole: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, doubled or inserted bytes."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        else:
            data[at:at] = rng.choice((b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"{", b"]", b"1e999", b"\x1b"))
    return bytes(data)


def damaged_json(whole: bytes, rng: random.Random) -> bytes:
    """A JSON file with damage to its structure, or to its bytes, or nested deeply."""
    kind = rng.randrange(10)
    if kind == 0:
        return damaged_bytes(whole, rng)
    if kind == 1 and rng.random() < 0.3:
        return rng.choice((DEEP.encode(), b'{"a":' * 50_000, b"", b"[]", b"null", b"{}", b"9" * 5000))
    return json.dumps(damaged_value(json.loads(whole), rng)).encode()


def damaged_safetensors(whole: bytes, rng: random.Random) -> bytes:
    """Damage to the header's JSON, to its length, or to the bytes."""
    if rng.random() < 0.3:
        return damaged_bytes(whole, rng)
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    kind = rng.randrange(4)
    if kind == 0:
        length = rng.choice((0, 1, n - 1, n + 1, 2**31, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + whole[8:]
    if kind == 1:  # a valid file whose tensors have other types, shapes or names
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        dtype, width = rng.choice((("I64", 8), ("U8", 1), ("F16", 2), ("BOOL", 1), ("F64", 8), ("F8_E4M3", 1)))
        if size % width == 0:
            header[name] = entry | {"dtype": dtype, "shape": rng.choice(([size // width], [1, size // width]))}
        if rng.random() < 0.3:
            header[rng.choice(("x", "lm_head.weight", "a..b", "", "model.layers.9.x"))] = header.pop(name)
    elif kind == 2:
        header = damaged_value(header, rng)
    else:  # NaN and infinity in the data
        data = bytearray(whole)
        at = 8 + n + rng.randrange(0, (len(whole) - 8 - n) // 4) * 4
        data[at : at + 4] = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff"))
        return bytes(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + n :]


SNIPPETS = (
    "{{ 1 / 0 }}",
    "{% for i in range(10 ** 10) %}x{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{% break %}",
    "{{ x.y.z }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.__class__ }}",
    "{% set messages = 3 %}",
    "{{ [[]] * 10 ** 9 }}",
    "{% generation %}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ messages[99].content }}",
    "{% if %}",
    "{{ raise_exception('[/b]') }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ range(10 ** 12) | list }}",
    "{% include 'x' %}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{",
    "%}",
    "{#",
    "{{ cycler() }}",
    "{{ lipsum(n=10 ** 8) }}",
    "{{ ''.join(messages) }}",
    "{{ messages | sum }}",
    "{{ messages | map(attribute='x') | first }}",
    "{{ -messages }}",
    "{{ dict(a=1)[[]] }}",
    "{{ 'a'.encode() }}",
    "{{ strftime_now('%Q' * 10 ** 6) }}",
    "{{ ('(' * 50000) }}",
    "{{ " + "(" * 5000 + " }}",
)


def damaged_template(whole: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damaged_bytes(whole, rng)
    text = whole.decode()
    at = rng.randrange(len(text) + 1)
    return (text[:at] + rng.choice(SNIPPETS) + text[at:]).encode()


TOML_LINES = (
    "steps = 10000000000000000000000",
    "steps = true",
    "learning_rate = nan",
    "rank = [1]",
    "[train]",
    "[[train]]",
    "targets = 3",
    "x = " + DEEP,
    "betas = [1, 2, 3]",
    "beta1 = inf",
    "targets = [[]]",
    "method = 1",
    "model = 3",
    "[model.rope_scaling]",
    "rope_scaling = {rope_type = 1}",
    "d_model = 1979-05-27",
    "n_layers = -1",
    "n_heads = 0",
    "max_seq_len = 1e400",
    "a.b.c = 1",
    "\x00",
    "'' = 1",
    "eos_token_id = ['x']",
    "sliding_layers = [true]",
    "dtype = 'int8'",
    "schedule = ''",
    "d_head = 3",
    "n_layers = 9223372036854775808",
)


def damaged_toml(whole: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return damaged_bytes(whole, rng)
    lines = whole.decode().splitlines()
    for _ in range(rng.choice((1, 2, 3))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(TOML_LINES))
    return "\n".join(lines).encode()


# --- readers -------------------------------------------------------------------------------------------------------

TOML = b'[model]\nd_model = 64\nn_heads = 4\n[train]\nsteps = 3\nlearning_rate = 1e-3\ndtype = "float32"\n'
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
    },
]
PLAIN = [{"prompt": "the cat", "completion": " sat", "id": 1}, {"prompt": "the sea", "completion": " is wide", "id": 2}]


class Readers:
    """Each family: the files of a whole input, and what reads them from a folder."""

    def __init__(self, base: Path) -> None:
        from graft.base.tokenizer.tokenizer import Tokenizer

        self.base = base
        self.tokenizer = Tokenizer.load(base)

    def tokenizer_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        for name in (
            "tokenizer.json",
            "tokenizer.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
        ):
            yield name, (self.base / name).read_bytes(), damaged_json

    def read_tokenizer(self, folder: Path) -> None:
        from graft.base.tokenizer.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode("the cat <|im_start|> sat\n\u00e9\U0001f600")
        tokenizer.decode(ids)

    def config_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        for name in ("config.json", "config.json", "config.json", "generation_config.json"):
            yield name, (self.base / name).read_bytes(), damaged_json
        weights = dict.fromkeys(["model.norm.weight", "model.embed_tokens.weight"], "model.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": weights}
        yield "model.safetensors.index.json", json.dumps(index).encode(), damaged_json

    def read_config(self, folder: Path) -> None:
        import torch

        import graft

        model = graft.load_model(folder)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))

    def safetensors_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        yield "model.safetensors", (self.base / "model.safetensors").read_bytes(), damaged_safetensors

    read_safetensors = read_config

    def adapter_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        from graft.finetune.adapters.files import save_adapter
        from graft.finetune.adapters.lora import LoraConfig, attach_lora
        from graft.finetune.loading import load_model

        model, config = load_model(self.base), LoraConfig(rank=2, targets=("q_proj", "v_proj"))
        attach_lora(model, config)
        folder = self.base.parent / "fuzzed-adapter"
        save_adapter(
            model, folder, config, base=str(self.base), graft={"base_fingerprint": "x", "prompt_format": "chat"}
        )
        self.model = load_model(self.base)
        for name in ("adapter_config.json", "adapter_config.json", "graft.json"):
            yield name, (folder / name).read_bytes(), damaged_json
        yield "adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes(), damaged_safetensors

    def read_adapter(self, folder: Path) -> None:
        from graft.finetune.adapters.files import check_fits, read_adapter

        check_fits(read_adapter(folder), self.model)

    def records_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        import io

        import pyarrow
        import pyarrow.parquet

        for rows in (ROWS, PLAIN):
            yield "rows.json", json.dumps(rows).encode(), damaged_json
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
        yield "rows.jsonl", lines, lambda whole, rng: damaged_json(whole.splitlines()[0], rng) + b"\n" + whole
        yield "rows.jsonl", lines, damaged_bytes
        yield "rows.csv", b'prompt,completion\n"the, cat",sat\nthe sea,"is ""wide"""\n', damaged_bytes
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PLAIN), stream)
        yield "rows.parquet", stream.getvalue(), damaged_bytes

    def read_records(self, folder: Path) -> None:
        from graft.finetune.data.dataset import encode_dataset
        from graft.finetune.data.records import read_records

        [path] = [path for path in folder.iterdir() if path.name.startswith("rows.")]
        encode_dataset(read_records(path), self.tokenizer, None, 97)

    def templates_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        from graft.finetune.data.templates import template_source

        for name in ("chatml", "llama3"):
            yield "chat_template.jinja", template_source(name).encode(), damaged_template

    def read_templates(self, folder: Path) -> None:
        from graft.finetune.data.chat import encode_prompt, encode_record
        from graft.finetune.data.records import to_record
        from graft.finetune.data.render import ChatTemplate

        source = (folder / "chat_template.jinja").read_bytes().decode()
        self.tokenizer.chat_template = source
        template = ChatTemplate.of(self.tokenizer)
        encode_prompt(ROWS[0]["messages"][:1], self.tokenizer, template)
        encode_record(to_record(ROWS[1], "row 1"), self.tokenizer, template, 97)

    def toml_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        yield "c.toml", TOML, damaged_toml

    def read_toml(self, folder: Path) -> None:
        from graft.base.pretrain import check_size, resolve
        from graft.base.settings import combine

        run = resolve(combine(folder / "c.toml", [], {}), preset_name="nano", vocab_size=300)
        assert run.model is not None
        check_size(run.model, "cpu")

    def runs_files(self) -> Iterator[tuple[str, bytes, Callable[[bytes, random.Random], bytes]]]:
        run = {
            "stage": "pretrain",
            "status": "stopped",
            "config": {"train": {"steps": 3}, "model": {}},
            "files": ["x"],
            "seed": 0,
        }
        for _ in range(4):
            yield "run.json", json.dumps(run).encode(), damaged_json
        lines = [json.dumps({"step": i, "loss": 1.0 / i, "lr": 1e-3, "grad_norm": 1.0}) for i in (1, 2, 3)]
        yield (
            "metrics.jsonl",
            "\n".join(lines).encode(),
            lambda whole, rng: damaged_json(whole.splitlines()[0], rng) + b"\n" + whole,
        )

    def read_runs(self, folder: Path) -> None:
        from graft.base.plots import plot_run
        from graft.base.runlog import RunFolder

        if (folder / "metrics.jsonl").exists():
            plot_run(folder)
            return
        with RunFolder(folder, stage="pretrain", resume=True) as run:
            previous = run.previous
        assert previous is not None


FAMILIES = ("tokenizer", "config", "safetensors", "adapter", "records", "templates", "toml", "runs")


def main(family: str, seed: int, count: int, base: Path, folder: Path) -> None:
    """Read `count` damaged inputs; anything but ValueError and OSError, and anything slow or large, is a broken law."""
    rng = random.Random(f"{family} {seed}")
    readers = Readers(base)
    files = list(getattr(readers, f"{family}_files")())
    read = getattr(readers, f"read_{family}")
    for name, whole, _ in files[:1]:  # the whole input is read, so that the damage is what is refused
        write_input(folder, base, family, name, whole, {n: w for n, w, _ in files})
        read(folder)
    mapped = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {SECONDS} s")

    signal.signal(signal.SIGPROF, too_long)
    n_refused = 0
    for i in range(count):
        name, whole, damage = files[i % len(files)]
        data = damage(whole, rng)
        write_input(folder, base, family, name, data, {n: w for n, w, _ in files})
        (folder / "NUMBER").write_text(f"{family} {seed} {i} {name}")  # to be found when the process dies
        (folder / "NUMBER").replace(folder.parent / f"{family}.number")
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read(folder)
        except (ValueError, OSError) as error:
            n_refused += 1
            if not str(error).strip():
                print(json.dumps({"input": i, "file": name, "error": "an empty message: " + repr(error)}), flush=True)
        except BaseException:
            kept = folder.parent / f"{family}-{i}-{name}"
            kept.write_bytes(data)
            print(json.dumps({"input": i, "file": str(kept), "error": traceback.format_exc()[-1500:]}), flush=True)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if (seconds := time.process_time() - start) > SECONDS:
            print(json.dumps({"input": i, "file": name, "error": f"{seconds:.1f} s"}), flush=True)
    print(json.dumps({"done": count, "refused": n_refused}), flush=True)


def write_input(folder: Path, base: Path, family: str, name: str, data: bytes, others: dict[str, bytes]) -> None:
    """The folder holds the damaged file, and whole ones beside it."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    beside: dict[str, bytes] = {}
    if family in ("config", "safetensors"):
        beside = {n: (base / n).read_bytes() for n in ("config.json", "generation_config.json", "model.safetensors")}
    elif family in ("tokenizer", "adapter"):
        beside = others
    for other, content in (beside | {name: data}).items():
        (folder / other).write_bytes(content)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
