"""Hugging Face ids through the libraries' own code: a cache in their layout, and a server on this machine that answers as theirs.

No network: the endpoint is 127.0.0.1, or the libraries are told to be offline.
"""

import json
import shutil
from collections.abc import Iterator
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import huggingface_hub
import pytest

from graft.base.hub import _explained, dataset_files, is_hub_name, model_folder, name_of
from graft.base.model.huggingface import fingerprint
from graft.base.text.documents import read_documents
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.records import data_files, read_all
from graft.finetune.loading import load_model

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the site's interface that snapshot_download uses, over `repos`: name -> {file: bytes}."""

    repos: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    refused: dict[str, tuple[int, str]] = {}  # noqa: RUF012  name -> (status, X-Error-Code)
    asked: list[str] = []  # noqa: RUF012  files that were fetched

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        if name in self.refused or name not in self.repos:
            status, code = self.refused.get(name, (404, "RepoNotFound"))
            return self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"}, body)
        files = self.repos[name]
        if is_api and "missing" in parts:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if is_api and "tree" in parts:
            return self.send(200, json.dumps([entry(path, data) for path, data in files.items()]).encode(), {}, body)
        if is_api:
            about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            return self.send(200, json.dumps(about).encode(), {}, body)
        path = "/".join(parts[4:])  # org/name/resolve/REVISION/path
        if body:
            self.asked.append(path)
        etag = entry(path, files[path])["oid"]
        return self.send(200, files[path], {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of both libraries, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def online(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A server for the ids, without repositories yet."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    Hub.repos, Hub.refused, Hub.asked = {}, {}, []
    yield Hub
    server.shutdown()
    server.server_close()


def cached(cache: Path, name: str, source: Path) -> Path:
    """Put a folder into the cache in the library's layout, as branch main."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    shutil.copytree(source, snapshot)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(COMMIT)
    return snapshot


# --- which names are ids -------------------------------------------------------------------------------------------


def test_which_names_are_ids(cache: Path) -> None:
    """A path that exists, and one under a folder that lies here, is a path; hf:// always means the site."""
    for name in (
        "org/name",
        "org/name@main",
        "org/name:train",
        "org/name:main/train@v1",
        "hf://org/name",
        Path("hf:/a/b"),
    ):
        assert is_hub_name(name), name
    for name in ("name", "a/b/c", "/org/name", "./org/name", "org/", "org/na me", "org/*.jsonl", "C:/x"):
        assert not is_hub_name(name), name
    Path("org").mkdir()
    assert not is_hub_name("org/name")
    assert is_hub_name("hf://org/name")
    with pytest.raises(
        FileNotFoundError, match=r"org/name does not exist; org/ is a folder here, .* write hf://org/name"
    ):
        load_model("org/name")


def test_a_folder_of_that_name_wins(cache: Path, base_dir: Path) -> None:
    shutil.copytree(base_dir, "org/name")
    assert model_folder("org/name") == Path("org/name")
    assert fingerprint(load_model("org/name")) == fingerprint(load_model(base_dir))


# --- models --------------------------------------------------------------------------------------------------------


def test_a_cached_model_needs_no_network(cache: Path, base_dir: Path) -> None:
    """Law: an id in the library's cache is the same model and tokenizer as the folder, by branch and by commit."""
    snapshot = cached(cache, "org/tiny", base_dir)
    assert model_folder("org/tiny") == snapshot == model_folder(f"hf://org/tiny@{COMMIT}")
    assert fingerprint(load_model("org/tiny")) == fingerprint(load_model(base_dir))
    assert Tokenizer.load("org/tiny").vocab == Tokenizer.load(base_dir).vocab
    assert (name_of(snapshot), name_of(base_dir)) == ("org/tiny", None)


def test_offline_and_not_cached_is_one_line(cache: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"runs/bse is neither a file or folder here nor in .* can't be reached"
    ):
        model_folder("runs/bse")
    with pytest.raises(FileNotFoundError, match=r"org/rows:test is neither .* can't be reached"):
        dataset_files("org/rows:test")


def test_a_model_is_fetched_once_without_pickle(online: type[Hub], base_dir: Path) -> None:
    """Parity: what arrives is what the server has; neither pickles nor subfolders nor a second copy are asked for."""
    files = {path.name: path.read_bytes() for path in base_dir.iterdir() if path.is_file()}
    extra = {"pytorch_model.bin": b"x", "original/model.safetensors": b"x", "consolidated.safetensors": b"x"}
    online.repos["org/tiny"] = files | extra | {"README.md": b"#"}
    folder = model_folder("org/tiny")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert sha256((folder / name).read_bytes()).digest() == sha256(files[name]).digest()
    assert not set(online.asked) & {*extra, "README.md"}
    n_asked = len(online.asked)
    assert model_folder("org/tiny") == folder
    assert len(online.asked) == n_asked


def test_without_weights_only_configs_are_fetched(online: type[Hub], base_dir: Path) -> None:
    online.repos["org/big"] = {path.name: path.read_bytes() for path in base_dir.iterdir() if path.is_file()}
    folder = model_folder("org/big", weights=False)
    assert "model.safetensors" not in online.asked
    assert (folder / "config.json").exists()


@pytest.mark.parametrize(
    ("answer", "name", "message"),
    [
        ((404, "RepoNotFound"), "org/none", r"org/none is neither a file or folder here nor at https://huggingface.co/org/none"),
        ((403, "GatedRepo"), "org/gated", r"org/gated needs its licence accepted: .* accept it at https://huggingface.co/org/gated"),
        ((500, ""), "org/down", r"org/down is neither .* can't be reached"),
    ],
)  # fmt: skip
def test_what_the_site_refuses(answer: tuple[int, str], name: str, message: str, online: type[Hub]) -> None:
    online.refused[name] = answer
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model_folder(name)


def test_no_such_revision_and_pickle_only(online: type[Hub]) -> None:
    online.repos["org/old"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(
        ValueError, match=r"org/old has its weights as pickle only \(pytorch_model.bin\).*save_pretrained"
    ):
        model_folder("org/old")
    assert "pytorch_model.bin" not in online.asked
    with pytest.raises(
        ValueError, match=r"org/old@missing: no such revision; https://huggingface.co/org/old/tree/main"
    ):
        model_folder("org/old@missing")
    online.repos["org/empty"] = {"config.json": b"{}"}
    with pytest.raises(FileNotFoundError, match="org/empty has no safetensors weights"):
        model_folder("org/empty")


def test_a_model_has_no_split() -> None:
    with pytest.raises(ValueError, match=r"a model has no split; leave :train out"):
        model_folder("org/name:train")


# --- data ----------------------------------------------------------------------------------------------------------


def test_a_split_of_a_data_set(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity with `datasets`: the rows of a split are its rows, by split and as =WEIGHT, from Arrow files in its cache.

    A folder of Parquet files stands for the repository, since the library reads both by the same builder.
    """
    repository = tmp_path / "there"
    repository.mkdir()
    for split, n in (("train", 3), ("test", 2)):
        rows = {"prompt": [f"{split} {i}" for i in range(n)], "completion": [f" {i}" for i in range(n)]}
        datasets.Dataset.from_dict(rows).to_parquet(repository / f"{split}.parquet")
    whole = datasets.load_dataset

    def load(path: str, *args: object, **options: object) -> object:
        assert path == "org/rows"
        return whole(str(repository), *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.utils.logging, "_get_default_logging_level", lambda: 50)
    datasets.disable_progress_bars()
    for name, split in (("org/rows", "train"), ("org/rows:test", "test")):
        expected = whole(str(repository), split=split)
        assert [(r.prompt, r.completion) for r in read_all([name])] == [
            (row["prompt"], row["completion"]) for row in expected
        ]
    assert data_files("org/rows:test")[0].suffix == ".arrow"
    from_text = [piece.data.decode() for piece in read_documents(["org/rows:test"], field="prompt")]
    assert from_text == list(whole(str(repository), split="test")["prompt"])
    with pytest.raises(ValueError, match=r"no column 'text'; it has 'prompt', 'completion'; name one with --field"):
        list(read_documents(["org/rows:test"]))
    assert len(read_all(["org/rows:train=0.5", "org/rows:test=0.5"])) == 6
    with pytest.raises(ValueError, match=r"org/rows:dev: .*Unknown split.*train.*test"):
        dataset_files("org/rows:dev")


def test_a_bug_is_not_blamed_on_the_repository() -> None:
    """Law: what the libraries raise becomes advice; a programming error stays what it is."""
    for error in (TypeError("missing 1 argument"), AttributeError("no such method"), NameError("x"), AssertionError()):
        with pytest.raises(type(error)), _explained("org/name", "org/name", ""):
            raise error
    with pytest.raises(ValueError, match="org/name: the disk is on fire"), _explained("org/name", "org/name", ""):
        raise OSError("the disk is on fire")
