"""Files opened for reading, gzip and zstd decompressed: told by their first bytes, in bounded memory, errors with the byte."""

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..extras import needs

COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
GZIP, ZSTD = "gzip", "zstd"
# Compressed bytes given to the decoder at once. zstd's has no limit on what it returns, and 4 bytes may stand for 128 KiB.
_FEED = {GZIP: 1 << 12, ZSTD: 1 << 10}
_MOST_OUT = 1 << 20
_OTHERS = {b"PK\x03\x04": "a zip archive", b"\xfd7zXZ\x00": "an xz file", b"7z\xbc\xaf\x27\x1c": "a 7z archive"}


def compression_of(file: Path) -> str | None:
    """gzip, zstd or None, by the file's first bytes.

    Raises ValueError for other archives, and for a file that is named like a compressed one and is none.
    """
    with file.open("rb") as raw:
        head = raw.read(10)
    if head.startswith(b"\x1f\x8b"):
        return GZIP
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[:1] and head[0] >> 4 == 5):
        return ZSTD  # the second is a skippable frame (RFC 8878, section 3.1.2)
    is_bzip2 = head.startswith(b"BZh") and head[4:] == b"1AY&SY"
    for magic, what in {**_OTHERS, head if is_bzip2 else b"\0": "a bzip2 file"}.items():
        if head.startswith(magic) and magic != b"\0":
            raise ValueError(f"{file} is {what}, which graft doesn't read; unpack it, or compress with gzip or zstd")
    if file.suffix.lower() in COMPRESSED_SUFFIXES:
        kind = GZIP if file.suffix.lower() == ".gz" else ZSTD
        raise ValueError(f"{file} is not a whole {kind} file (it begins with {head[:4]!r}); fetch or rename it")
    return None


@contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The file's bytes, decompressed, and a function that returns how many bytes of the file itself have been read.

    What is compressed can't seek. Reading raises ValueError with the place where the compressed data are damaged or end.
    """
    kind = compression_of(file)
    with file.open("rb") as raw:
        if kind is None:
            yield raw, raw.tell
        else:
            stream = _Decompressed(raw, file, kind)
            yield io.BufferedReader(stream, 1 << 16), lambda: stream.position  # pyright: ignore[reportReturnType]


class _Decompressed(io.RawIOBase):
    """The members (gzip) or frames (zstd) of a file, one after the other, as one stream."""

    def __init__(self, raw: IO[bytes], file: Path, kind: str) -> None:
        self._raw, self._file, self._kind = raw, file, kind
        self._decoder: Any = None  # of the member that is open
        self._pending = b""  # read, not decoded yet
        self._out = memoryview(b"")  # decoded, not given out yet
        if kind == ZSTD:
            with needs("zstd", f"{file}: reading zstd"):
                import zstandard
            self._error: type[Exception] = zstandard.ZstdError
            self._new: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj
        else:
            self._error, self._new = zlib.error, lambda: zlib.decompressobj(wbits=31)

    @property
    def position(self) -> int:
        """How many of the file's bytes are decoded."""
        return self._raw.tell() - len(self._pending)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer as far as one call of the decoder does; 0 at the end. Raises ValueError for damaged data."""
        while not self._out:
            self._pending = self._pending or self._raw.read(_FEED[self._kind])
            if not self._pending:
                if self._decoder is not None:
                    raise ValueError(self._damage(f"it ends at byte {self._raw.tell():,}, in the middle of its data"))
                return 0
            if self._decoder is None:
                self._pending = (
                    self._pending.lstrip(b"\0") if self._kind == GZIP else self._pending
                )  # padding, as gzip(1)
                if not self._pending:
                    continue
                self._decoder = self._new()
            self._decode()
        n = min(len(buffer), len(self._out))
        buffer[:n] = self._out[:n]
        self._out = self._out[n:]
        return n

    def _decode(self) -> None:
        first, last = self.position, self._raw.tell()
        limit = () if self._kind == ZSTD else (_MOST_OUT,)
        try:
            self._out = memoryview(self._decoder.decompress(self._pending, *limit))
        except self._error as error:
            raise ValueError(self._damage(f"damaged between bytes {first:,} and {last:,}: {error}")) from None
        if self._decoder.eof:
            self._pending, self._decoder = self._decoder.unused_data, None
        else:
            self._pending = b"" if self._kind == ZSTD else self._decoder.unconsumed_tail

    def _damage(self, what: str) -> str:
        return f"{self._file} is not a whole {self._kind} file ({what}); fetch it again"
