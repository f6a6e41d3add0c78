"""Tokenizers side by side: training, encoding, decoding. One thread, interleaved rounds, medians with p10 and p90.

    python bench/tokenizer.py [--rounds 7] [--seconds 45] [--only train,encode,...] [--text FILE]

Peers: tokenizers (HF), rustbpe, gigatoken, tiktoken; one that is not installed is left out. Texts: ../shared/data where it
lies beside the repository, and the code of the Python packages installed here. Each measurement runs in a process of its
own per tokenizer, which stays alive through all rounds, so that peak memory is that tokenizer's.

Encoding is measured in three conditions, because all peers but tiktoken keep a cache of pretokens. Each round is a process that
has imported the library, loaded the vocabulary and encoded one short sentence:
  `never-*`   the first half of a text: nothing of its kind was encoded before.
  `kind-*`    the second half, after the first: new text of a known kind.
  `again-*`   the second half once more: the same text again.
`encode-*` repeats one whole text in one process (as `again`).

`first-call` is the first encode in a process that has imported the library and loaded the vocabulary. `fresh-start` is
the wall time of a whole new process, from its start to the ids: interpreter, imports, vocabulary from GPT-2's two files
(for gigatoken from tokenizer.json) and that first encode. Before its rounds each peer starts once, so that all files,
graft's compiled loops among them, lie in memory.
`cpu ms` and `x cpu` are about CPU time, which tells more when the machine does other things too.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SETTINGS = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "TIKTOKEN_CACHE_DIR": "",
}
SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
Round = tuple[float, float, int]  # seconds, seconds of CPU, peak bytes
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = (  # DeepSeek-V3's three splits, one after the other: no named pattern, so the regex package cuts
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # tiktoken's own for GPT-2


# ------------------------------------------------------------------------------------------------------------- texts


def read(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8", "replace")


def english() -> str:
    """About 5 MB of prose: children's tales, Shakespeare, encyclopedia."""
    names = ("childrens_stories/stories.txt.gz", "tiny_shakespeare/input.txt.gz", "wikitext2/valid.txt.gz")
    return "".join(read(SHARED / name) for name in names)


def many_scripts() -> str:
    return "".join(read(file) for file in sorted((SHARED / "multiscript").glob("*.txt*")))


def code(n_bytes: int = 6_000_000) -> str:
    parts, size = [], 0
    for file in sorted(Path(sys.prefix).rglob("*.py")):
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(parts[-1])
        if size > n_bytes:
            break
    return "".join(parts)[:n_bytes]


def mixed(n_bytes: int = 50_000_000) -> str:
    """Text and code, about half each, without repeating either."""
    text = english() + many_scripts() + "".join(read(file) for file in sorted(SHARED.glob("tinystories/*.txt*")))
    return text + code(n_bytes - len(text.encode()))


TEXTS = {"english": english, "scripts": many_scripts, "code": code, "mixed": mixed}


# ------------------------------------------------------------------------------------------------- one peer, one job


def write_vocabulary(folder: Path) -> None:
    """GPT-2's files as tiktoken wants them (its reader drops the first line of the merges), and as tokenizer.json."""
    import graft

    gpt2 = SHARED / "gpt2_bpe"
    merges = (gpt2 / "gpt2_merges.txt").read_text(encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (folder / "vocab.json").write_bytes((gpt2 / "gpt2_vocab.json").read_bytes())
    graft.Tokenizer.load(gpt2).save(folder / "one_file")
    main = json.loads((folder / "one_file/tokenizer.json").read_text())
    main["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    (folder / "llama3").mkdir()
    (folder / "llama3/tokenizer.json").write_text(json.dumps(main))
    byte_level = main["pre_tokenizer"]["pretokenizers"][-1]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in DEEPSEEK
    ]
    main["pre_tokenizer"]["pretokenizers"] = [*splits, byte_level]
    (folder / "deepseek").mkdir()
    (folder / "deepseek/tokenizer.json").write_text(json.dumps(main))


def trainer(peer: str, file: str, vocab_size: int):
    """A function that trains on the file, from its path."""
    if peer == "graft":
        import graft

        return lambda: graft.Tokenizer.train([file], vocab_size=vocab_size, special_tokens=[], workers=1)
    if peer == "tokenizers":
        import tokenizers

        def train():
            tok = tokenizers.Tokenizer(tokenizers.models.BPE())
            tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
            options = {"vocab_size": vocab_size, "initial_alphabet": alphabet, "show_progress": False}
            tok.train([file], tokenizers.trainers.BpeTrainer(**options))

        return train
    if peer == "rustbpe":
        import rustbpe

        def train():
            lines = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)
            rustbpe.Tokenizer().train_from_iterator(iter(lines), vocab_size, pattern=PATTERN)

        return train
    import gigatoken

    return lambda: gigatoken.train_bpe(Path(file), vocab_size, [])


def coder(peer: str, vocabulary: Path, split: str = "gpt2"):
    """Functions text -> array of ids and ids -> text, and how decode takes its ids.

    The vocabulary is GPT-2's; split: gpt2, llama3 or deepseek (which tiktoken, having one pattern, can't do).
    """
    one_file = str(vocabulary / ("one_file" if split == "gpt2" else split) / "tokenizer.json")
    if peer == "graft":
        import graft

        tok = graft.Tokenizer.load(vocabulary if split == "gpt2" else vocabulary / split)
        return tok.encode, tok.decode, lambda ids: ids
    if peer == "tiktoken":
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        ranks = data_gym_to_mergeable_bpe_ranks(str(vocabulary / "merges.txt"), str(vocabulary / "vocab.json"))
        pattern = LLAMA3 if split == "llama3" else PATTERN
        enc = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return enc.encode_to_numpy, enc.decode, lambda ids: ids.tolist()
    if peer == "tokenizers":
        import tokenizers

        tok = tokenizers.Tokenizer.from_file(one_file)
        return lambda text: tok.encode(text, add_special_tokens=False).ids, tok.decode, lambda ids: ids
    import gigatoken

    tok = gigatoken.Tokenizer(one_file)
    return tok.encode, tok.decode, lambda ids: ids


# The same as whole programs, which import nothing else; arguments: the text file and the vocabulary's folder.
FRESH = {
    "graft": """
import sys
import graft
tok = graft.Tokenizer.load(sys.argv[2])
ids = tok.encode(open(sys.argv[1], "rb").read().decode())
""",
    "tiktoken": f"""
import sys
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
ranks = data_gym_to_mergeable_bpe_ranks(sys.argv[2] + "/merges.txt", sys.argv[2] + "/vocab.json")
enc = tiktoken.Encoding("gpt2", pat_str={PATTERN!r}, mergeable_ranks=ranks, special_tokens={{}})
ids = enc.encode_to_numpy(open(sys.argv[1], "rb").read().decode())
""",
    "gigatoken": """
import sys
import gigatoken
tok = gigatoken.Tokenizer(sys.argv[2] + "/one_file/tokenizer.json")
ids = tok.encode(open(sys.argv[1], "rb").read().decode())
""",
}
SAY_COST = """
import time
print(time.process_time(), open("/proc/self/status").read().split("VmHWM:")[1].split()[0], flush=True)
"""


def start_fresh(peer: str, file: Path, vocabulary: Path) -> Round:
    """From the start of a new process to its ids."""
    command = [sys.executable, "-c", FRESH[peer] + SAY_COST, str(file), str(vocabulary)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | SETTINGS) as process:
        cost = process.stdout.readline().split()
        took = time.perf_counter() - start
    if not cost:
        raise RuntimeError(f"{peer} could not start")
    return took, float(cost[0]), int(cost[1]) * 1024


def peak_memory() -> int:
    """Bytes. Not getrusage's: that counts what the parent of the process held when it started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def serve(peer: str, job: str, file: str, vocab_size: int, vocabulary: Path) -> None:
    """The child: prepare, then time one round for each line on standard input; `first` has no round to warm up."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some peers print
    if job == "train":
        action = trainer(peer, file, vocab_size)
    else:
        text = Path(file).read_bytes().decode()
        encode, decode, form = coder(
            peer, vocabulary, job.removeprefix("encode-") if job.startswith("encode-") else "gpt2"
        )
        if job == "decode":
            ids = form(encode(text))
            action = lambda: decode(ids)  # noqa: E731
        else:
            action = lambda: encode(text)  # noqa: E731
    if job in ("never", "kind", "again"):
        half = text.find("\n", len(text) // 2)
        first, second = text[:half], text[half:]
        encode("One short sentence, so that all is loaded.")
        if job != "never":
            encode(first)
        if job == "again":
            encode(second)
        action = (lambda: encode(first)) if job == "never" else (lambda: encode(second))
    elif job != "first":
        action()
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        action()
        took, took_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        print(json.dumps([took, took_cpu, peak_memory()]), file=out, flush=True)


# ------------------------------------------------------------------------------------------------------------ rounds


class Child:
    """A peer in its own process."""

    def __init__(self, peer: str, job: str, file: Path, vocab_size: int, vocabulary: Path):
        command = [sys.executable, __file__, "--serve", peer, job, str(file), str(vocab_size), str(vocabulary)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | SETTINGS)
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{peer} could not do {job}")

    def round(self) -> Round:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(
    peers: list[str], job: str, file: Path, vocabulary: Path, options: argparse.Namespace
) -> dict[str, list[Round]]:
    """Peer -> its rounds, one peer after the other in each round; 3 rounds or more."""
    results: dict[str, list[Round]] = {peer: [] for peer in peers}
    start = time.perf_counter()
    children = {}
    if job == "fresh":
        for peer in peers:
            start_fresh(peer, file, vocabulary)
    elif job not in ONCE:
        children = {peer: Child(peer, job, file, options.vocab_size, vocabulary) for peer in peers}
    for done in range(options.rounds):
        if done >= 3 and time.perf_counter() - start > options.seconds:
            break
        for peer in peers:
            if job == "fresh":
                results[peer].append(start_fresh(peer, file, vocabulary))
                continue
            child = children.get(peer) or Child(peer, job, file, options.vocab_size, vocabulary)
            results[peer].append(child.round())
            if job in ONCE:
                child.close()
    for child in children.values():
        child.close()
    return results


def installed(peers: tuple[str, ...]) -> list[str]:
    found = []
    for peer in peers:
        try:
            version("graftlm" if peer == "graft" else peer)
            found.append(peer)
        except PackageNotFoundError:
            print(f"({peer} is not installed and left out)")
    return found


TRAINERS = ("graft", "tokenizers", "rustbpe", "gigatoken")
CODERS = ("graft", "tiktoken", "gigatoken")
ALL_CODERS = (*CODERS, "tokenizers")
ONCE = ("first", "never", "kind", "again")  # each round in a process of its own
HALVED = ("never", "kind", "again")  # the text's first half, or its second
JOBS = {  # row -> what is done, with which text, by whom
    "train-5MB": ("train", english, TRAINERS),
    "train-50MB": ("train", mixed, ("graft", "gigatoken")),
    **{
        f"{job}-{text.__name__.removeprefix('many_')}": (job, text, ALL_CODERS)
        for text in (english, many_scripts, code)
        for job in ("never", "kind", "again")
    },
    "encode-english": ("encode", english, CODERS),
    "encode-scripts": ("encode", many_scripts, CODERS),
    "encode-code": ("encode", code, CODERS),
    "encode-llama3": ("encode-llama3", english, CODERS),  # the other patterns are cut word by word
    "deepseek-english": ("encode-deepseek", english, ("graft", "tokenizers")),
    "deepseek-scripts": ("encode-deepseek", many_scripts, ("graft", "tokenizers")),
    "deepseek-code": ("encode-deepseek", lambda: code(2_000_000), ("graft", "tokenizers")),
    "first-call": ("first", english, CODERS),
    "fresh-start": ("fresh", english, CODERS),
    "decode": ("decode", english, CODERS),
    "million-a": ("encode", lambda: "a" * 1_000_000, CODERS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=45, help="no new round of a row after this time, 3 apart")
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--only", default="", help=f"rows by the starts of their names: {', '.join(JOBS)}")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        peer, job, file, vocab_size, vocabulary = options.serve
        serve(peer, job, file, int(vocab_size), Path(vocabulary))
        return
    rows = [row for row in JOBS if any(row.startswith(name) for name in options.only.split(","))]
    if not rows:
        parser.error(f"--only {options.only} names no row; the rows are {', '.join(JOBS)}")
    names = ("graftlm", "numba", "tokenizers", "tiktoken", "rustbpe", "gigatoken")
    versions = [f"{name} {version(name)}" for name in names if name == "graftlm" or name in installed(names[1:])]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; one thread"
    )
    print(", ".join(versions))
    print(
        f"{'':16}{'peer':12}{'median ms':>10}{'p10':>9}{'p90':>9}{'MB/s':>8}{'x graft':>9}{'cpu ms':>9}{'x cpu':>7}{'peak MB':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder))
        for row in rows:
            job, text, peers = JOBS[row]
            file = Path(folder) / "text.txt"
            file.write_bytes(text().encode())
            show(
                row,
                measure(installed(peers), job, file, Path(folder), options),
                file.stat().st_size // (2 if job in HALVED else 1),
            )


def show(row: str, results: dict[str, list[Round]], size: int) -> None:
    """One line a peer."""
    own, own_cpu = (statistics.median(one[clock] for one in results["graft"]) for clock in (0, 1))
    for peer, rounds in results.items():
        times = sorted(took * 1e3 for took, _, _ in rounds)
        middle = statistics.median(times)
        cpu = statistics.median(took * 1e3 for _, took, _ in rounds)
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        print(
            f"{row:16}{peer:12}{middle:10.1f}{low:9.1f}{high:9.1f}{size / middle / 1e3:8.1f}{middle / 1e3 / own:9.2f}"
            f"{cpu:9.1f}{cpu / 1e3 / own_cpu:7.2f}{max(peak for _, _, peak in rounds) / 1e6:9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
