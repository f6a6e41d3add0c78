"""Tokenizers side by side: training, encoding, decoding. One thread, interleaved rounds, medians with p10 and p90.

    python bench/tokenizer.py [--rounds 7] [--only train,encode,...] [--text FILE]

Peers: tokenizers (HF), rustbpe, gigatoken, tiktoken; one that is not installed is left out. Texts: ../shared/data where it
lies beside the repository, and the code of the Python packages installed here. Each measurement runs in a process of its
own per tokenizer, which stays alive through all rounds, so that peak memory is that tokenizer's.
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

THREADS = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
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


def gpt2_ranks() -> dict[bytes, int]:
    import graft

    return {token: index for index, token in graft.Tokenizer.load(SHARED / "gpt2_bpe").definition.vocab.items()}


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


def coder(peer: str):
    """Functions text -> array of ids and ids -> text, with GPT-2's vocabulary; and how decode takes its ids."""
    if peer == "graft":
        import graft

        tok = graft.Tokenizer.load(SHARED / "gpt2_bpe")
        return tok.encode, tok.decode, lambda ids: ids
    if peer == "tiktoken":
        import tiktoken

        enc = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=gpt2_ranks(), special_tokens={})
        return enc.encode_to_numpy, enc.decode, lambda ids: ids.tolist()
    import gigatoken

    import graft

    with tempfile.TemporaryDirectory() as folder:
        graft.Tokenizer.load(SHARED / "gpt2_bpe").save(folder)
        tok = gigatoken.Tokenizer(str(Path(folder) / "tokenizer.json"))
    return tok.encode, tok.decode, lambda ids: ids


def serve(peer: str, job: str, file: str, vocab_size: int) -> None:
    """The child: prepare, then time one round for each line on standard input; `first` has no round to warm up."""
    import resource

    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some peers print
    if job == "train":
        action = trainer(peer, file, vocab_size)
    else:
        text = Path(file).read_bytes().decode()
        encode, decode, form = coder(peer)
        if job == "decode":
            ids = form(encode(text))
            action = lambda: decode(ids)  # noqa: E731
        else:
            action = lambda: encode(text)  # noqa: E731
    if job != "first":
        action()
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        action()
        took = time.perf_counter() - start
        print(json.dumps([took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]), file=out, flush=True)


# ------------------------------------------------------------------------------------------------------------ rounds


class Child:
    """A peer in its own process."""

    def __init__(self, peer: str, job: str, file: Path, vocab_size: int):
        command = [sys.executable, __file__, "--serve", peer, job, str(file), str(vocab_size)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | THREADS)
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{peer} could not do {job}")

    def round(self) -> tuple[float, int]:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(peers: list[str], job: str, file: Path, rounds: int, vocab_size: int) -> dict[str, list[tuple[float, int]]]:
    """Peer -> (seconds, peak bytes) of each round, one peer after the other in each round."""
    results: dict[str, list[tuple[float, int]]] = {peer: [] for peer in peers}
    if job == "first":
        for _ in range(rounds):
            for peer in peers:
                child = Child(peer, job, file, vocab_size)
                results[peer].append(child.round())
                child.close()
        return results
    children = {peer: Child(peer, job, file, vocab_size) for peer in peers}
    for _ in range(rounds):
        for peer, child in children.items():
            results[peer].append(child.round())
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
JOBS = {  # row -> what is done, with which text, by whom
    "train-5MB": ("train", english, TRAINERS),
    "train-50MB": ("train", mixed, ("graft", "gigatoken")),
    "encode-english": ("encode", english, CODERS),
    "encode-scripts": ("encode", many_scripts, CODERS),
    "encode-code": ("encode", code, CODERS),
    "first-call": ("first", english, CODERS),
    "decode": ("decode", english, CODERS),
    "million-a": ("encode", lambda: "a" * 1_000_000, CODERS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--only", help=f"some of {', '.join(JOBS)}")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        peer, job, file, vocab_size = options.serve
        serve(peer, job, file, int(vocab_size))
        return
    names = ("graftlm", "numba", "tokenizers", "tiktoken", "rustbpe", "gigatoken")
    versions = [f"{name} {version(name)}" for name in names if name == "graftlm" or name in installed(names[1:])]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; one thread"
    )
    print(", ".join(versions))
    print(f"{'':16}{'peer':12}{'median ms':>10}{'p10':>9}{'p90':>9}{'MB/s':>8}{'x graft':>9}{'peak MB':>9}")
    for row in options.only.split(",") if options.only else JOBS:
        job, text, peers = JOBS[row]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "text.txt"
            file.write_bytes(text().encode())
            results = measure(installed(peers), job, file, options.rounds, options.vocab_size)
            size = file.stat().st_size
        own = statistics.median(took for took, _ in results["graft"])
        for peer, rounds in results.items():
            times = sorted(took * 1e3 for took, _ in rounds)
            middle = statistics.median(times)
            low, high = times[len(times) // 10], times[-1 - len(times) // 10]
            print(
                f"{row:16}{peer:12}{middle:10.1f}{low:9.1f}{high:9.1f}{size / middle / 1e3:8.1f}"
                f"{middle / 1e3 / own:9.2f}{max(peak for _, peak in rounds) / 1e6:9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
