"""Compressed files: gzip, bzip2, xz and Zstandard. Read by their first bytes, written by the suffix of the name."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from inpars_lib.cli import InputError

SUFFIX = re.compile(r"\.(gz|bz2|xz|zst)$")
FIRST_BYTES = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",  # also the first bytes of a block, because ids may begin with BZh
    "xz": rb"\xfd7zXZ\0",
    "Zstandard": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # pzstd writes a skippable frame first
}
BUFFER_BYTES = 1 << 20


@contextmanager
def decompressed(raw: Any, path: str) -> Iterator[IO[bytes]]:
    """Open the content of a file for reading, decompressed if the file is compressed.

    Args:
        raw: The open file, an `io.BufferedReader`.
        path: Its name, for error messages.

    Raises:
        InputError: The compressed data is damaged.
    """
    head = raw.peek(10)
    name = next((name for name, pattern in FIRST_BYTES.items() if re.match(pattern, head)), None)
    damage: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, lzma.LZMAError)
    file: Any = None
    if name == "gzip":
        file = gzip.GzipFile(fileobj=raw)
    elif name == "bzip2":
        file = bz2.BZ2File(raw)
    elif name == "xz":
        file = lzma.LZMAFile(raw)
    elif name:
        from backports import zstd

        file = zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31})  # of `zstd --long=31`
        damage += (zstd.ZstdError,)
    try:
        yield raw if file is None else io.BufferedReader(file, BUFFER_BYTES)
    except damage as error:
        if isinstance(error, OSError) and error.errno is not None:  # not the data's fault
            raise
        raise InputError(f"{path}: damaged {name} data ({error}). Download the file again.") from None


@contextmanager
def compressed(raw: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """Open a file for compressed writing if the suffix of `path` says so. The same content gives the same bytes."""
    suffix = SUFFIX.search(path)
    file: Any
    if not suffix:
        yield raw
        return
    if suffix[1] == "gz":
        file = gzip.GzipFile("", "wb", 6, raw, mtime=0)  # no name and no time in the header
    elif suffix[1] == "bz2":
        file = bz2.BZ2File(raw, "wb")
    elif suffix[1] == "xz":
        file = lzma.LZMAFile(raw, "wb")
    else:
        from backports import zstd

        file = zstd.ZstdFile(raw, "wb", options={zstd.CompressionParameter.checksum_flag: 1})  # as `zstd` does
    with file:
        yield file
