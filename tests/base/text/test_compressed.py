"""Law: what is compressed reads as what it was, whatever its name and parts; damage is told with the byte. In bounded memory."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from graft.base.text.compressed import opened
from graft.base.text.documents import read_documents

TEXT = b"".join(b"the cat number %d sat on the mat.\n" % n for n in range(4000))


def read(path: Path) -> bytes:
    return b"".join(piece.data for piece in read_documents([path]))


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


SKIPPABLE = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
WHOLE = {
    "a.txt": gzip.compress(TEXT),  # told by content
    "a.txt.gz": gzip.compress(TEXT),
    "several members.gz": gzip.compress(TEXT[:900]) + gzip.compress(b"") + gzip.compress(TEXT[900:]) + b"\0" * 600,
    "a.txt.zst": zst(TEXT),
    "b.txt": zst(TEXT),
    "zstd under another name.gz": zst(TEXT),
    "several frames.zst": SKIPPABLE + zst(TEXT[:700]) + SKIPPABLE + zst(TEXT[700:]),
    "plain.txt": TEXT,
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WHOLE[name])
    assert read(tmp_path / name) == TEXT
    with opened(tmp_path / name) as (stream, position):
        assert stream.read(10) == TEXT[:10]
        assert 0 < position() <= len(WHOLE[name])
        stream.read()
        assert position() == len(WHOLE[name])


def test_a_parquet_file_in_zstd(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    packed = tmp_path / "b.parquet.zst"
    packed.write_bytes(zst((tmp_path / "a.parquet").read_bytes()))
    assert [piece.data for piece in read_documents([packed])] == [b"one", b"two"]


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_damage_is_told_with_the_byte(tmp_path: Path, kind: str) -> None:
    """Cut at any place it says where it ends; a flipped bit is found, by the checksum at the latest; what follows is refused."""
    compress = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor(write_checksum=True).compress}[kind]
    whole = compress(TEXT)
    file = tmp_path / "a.txt"
    for n in (11, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(
            ValueError, match=rf"a\.txt is not a whole {kind} file \(it ends at byte {n:,}, in the middle"
        ):
            read(file)
    at = len(whole) // 2
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=rf"not a whole {kind} file \(damaged between bytes [\d,]+ and [\d,]+: "):
        read(file)
    file.write_bytes(whole + b"trailing text")
    with pytest.raises(ValueError, match=rf"damaged between bytes {len(whole):,} and {len(whole) + 13:,}: "):
        read(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"PK\x03\x04rest", "is a zip archive, which graft doesn't read; unpack it"),
        ("a.txt.xz", b"\xfd7zXZ\x00rest", "is an xz file"),
        ("a.txt.bz2", b"BZh91AY&SYrest", "is a bzip2 file"),
        ("a.txt.zst", b"plain text", r"is not a whole zstd file \(it begins with b'plai'\)"),
        ("a.txt.gz", b"plain text", r"is not a whole gzip file \(it begins with b'plai'\)"),
    ],
)
def test_what_is_not_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_zstd_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zst").write_bytes(zst(TEXT))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a\.zst: reading zstd needs zstandard; run pip install 'graftlm\[zstd\]'"):
        read(tmp_path / "a.zst")


MEASURE = """
import sys
from pathlib import Path
from graft.base.text.compressed import opened
n = 0
with opened(Path(sys.argv[1])) as (stream, position):
    while chunk := stream.read(1 << 16):
        n += len(chunk)
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # of this process alone
print(n, int(peak) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """200 MB of zeros, the densest that there is, are read with less than 120 MB."""
    n, block = 200, b"\0" * (1 << 20)
    if kind == "gzip":
        with gzip.open(tmp_path / "a", "wb", compresslevel=1) as file:
            for _ in range(n):
                file.write(block)
    else:
        with zstandard.open(tmp_path / "a", "wb") as file:
            for _ in range(n):
                file.write(block)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a")]
    size, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert size == n << 20
    assert peak < 120e6
