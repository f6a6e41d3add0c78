"""Law: ends and shared documents are those that Python finds by splitting lists, whatever the blocks."""

import json
from pathlib import Path

import numpy as np
import pytest

from graft.base.data.bounds import document_ends, shared_documents
from graft.base.data.shards import TokenShards, open_tokens

EOS = 9


def shards(folder: Path, documents: list[list[int]], *, bos: int | None = None, eos: int = EOS) -> TokenShards:
    """Documents (without BOS and EOS) as one split in two files."""
    ids = [t for one in documents for t in ([] if bos is None else [bos]) + one + [eos]]
    folder.mkdir()
    entry = {"files": ["train-00000.bin", "train-00001.bin"], "n_tokens": len(ids), "n_bytes": 0, "n_documents": 0}
    meta = {"dtype": "uint16", "tokenizer": "", "bos_token_id": bos, "eos_token_id": eos, "splits": {"train": entry}}
    for name, part in zip(entry["files"], (ids[: len(ids) // 3], ids[len(ids) // 3 :]), strict=True):
        np.array(part, np.uint16).tofile(folder / name)
    (folder / "meta.json").write_text(json.dumps(meta))
    return open_tokens(folder)


@pytest.mark.parametrize("bos", [None, 8, EOS])
def test_ends_and_shared_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bos: int | None) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 8, size=rng.integers(1, 12)).tolist() for _ in range(300)]
    train, val = texts[:250], texts[200:]
    a, b = shards(tmp_path / "a", train, bos=bos), shards(tmp_path / "b", val, bos=bos)
    extra = 1 if bos is None else 2
    assert document_ends(a).tolist() == np.cumsum([len(one) + extra for one in train]).tolist()
    expected = [i for i, one in enumerate(val) if one in train]
    assert 50 <= len(expected) < 100
    blocks = TokenShards.blocks
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(TokenShards, "blocks", lambda self, size=size: blocks(self, size))
        assert shared_documents(a, b).tolist() == expected


def test_a_cut_document_ends_with_the_tokens(tmp_path: Path) -> None:
    tokens = shards(tmp_path / "a", [[1, 2], [3]])
    tokens.meta["eos_token_id"] = 3  # as if the last token, 9, had lost its EOS
    assert document_ends(tokens).tolist() == [4, 5]


def test_documents_that_differ_in_their_last_ids_alone(tmp_path: Path) -> None:
    """Law: the hash knows the length: id 0 weighs nothing, and with 0 as EOS a cut document is not the whole one."""
    whole, cut = shards(tmp_path / "a", [[1, 2]], eos=0), shards(tmp_path / "b", [[4], [1, 2]], eos=0)
    assert shared_documents(whole, cut).tolist() == [1]
    entry = cut.meta["splits"]["train"] | {"n_tokens": 4}
    ids = np.fromfile(tmp_path / "b/train-00001.bin", np.uint16)[:-1]
    ids.tofile(tmp_path / "b/train-00001.bin")
    assert (
        shared_documents(whole, TokenShards(tmp_path / "b", "train", cut.meta | {"splits": {"train": entry}})).size == 0
    )


def test_without_documents(tmp_path: Path) -> None:
    full, empty = shards(tmp_path / "a", [[1]]), shards(tmp_path / "b", [])
    assert document_ends(empty).tolist() == []
    assert len(shared_documents(full, empty)) == len(shared_documents(empty, full)) == 0
