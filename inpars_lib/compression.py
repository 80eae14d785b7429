"""Compressed files: gzip, bzip2, xz and Zstandard. Read by their first bytes, written by the suffix of the name."""

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from inpars_lib.cli import InputError


def _zstd(raw: Any, mode: Any) -> Any:
    from backports.zstd import CompressionParameter, DecompressionParameter, ZstdFile

    reading: Any = {DecompressionParameter.window_log_max: 31}  # for files of `zstd --long=31`
    return ZstdFile(raw, mode, options=reading if mode == "rb" else {CompressionParameter.checksum_flag: 1})


# Name, suffix, first bytes, function of an open file and a mode. Because a TSV file may begin with BZh, the first bytes
# of bzip2 include those of a block. pzstd writes a skippable frame first. gzip's header gets no name and no time.
FORMATS = (
    ("gzip", ".gz", rb"\x1f\x8b", lambda raw, mode: gzip.GzipFile("", mode, 6, raw, 0)),
    ("bzip2", ".bz2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2File),
    ("xz", ".xz", rb"\xfd7zXZ\0", lzma.LZMAFile),
    ("Zstandard", ".zst", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstd),
)
SUFFIX = re.compile(r"\.(gz|bz2|xz|zst)$")


@contextmanager
def decompressed(raw: Any, path: str) -> Iterator[IO[bytes]]:
    """Open the content of a file for reading. `raw` is the open file. Damaged data raises `InputError`."""
    head = raw.peek(10)
    name, wrap = next(((name, wrap) for name, _, start, wrap in FORMATS if re.match(start, head)), (None, None))
    try:
        yield io.BufferedReader(wrap(raw, "rb"), 1 << 20) if wrap else raw
    except Exception as error:  # each format has exceptions of its own
        if not wrap or isinstance(error, InputError) or getattr(error, "errno", None) is not None:
            raise
        raise InputError(f"{path}: damaged {name} data ({error}). Download the file again.") from None


@contextmanager
def open_output(target: str, path: str, mode: str) -> Iterator[IO[Any]]:
    """Open `target` for writing, or standard output if `path` is `-`. The suffix of `path` compresses reproducibly."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(open(1 if path == "-" else target, "wb", closefd=path != "-"))
        for _, suffix, _, wrap in FORMATS:
            if path.endswith(suffix):
                file = stack.enter_context(wrap(file, "wb"))
        if "b" not in mode:
            file = stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n"))
        yield file
