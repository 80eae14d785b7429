"""Text files line by line: gzip, byte-order marks, progress bars, malformed lines reported with their number."""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TypeVar, cast

from inpars_lib.cli import InputError, warn
from inpars_lib.storage import is_special

QUOTED_PROBLEMS = 3  # malformed lines that are quoted one by one; later ones are only counted

T = TypeVar("T")


def read_lines(paths: Sequence[str], desc: str | None = None) -> Iterator[tuple[str, int, bytes]]:
    """Yield (path, line number from 1, line without its newline) of files, gzipped or not.

    Args:
        paths: The files, read in this order.
        desc: Label of a progress bar over the bytes of all files, or None for no bar.

    Raises:
        InputError: A path is no regular file, its gzip data is damaged, or its text is UTF-16.
    """
    from tqdm import tqdm

    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{path}: this is a folder. Name a file.")
        if is_special(path):
            raise InputError(f"{path}: this is a pipe or a device. Write its data to a file first.")
    sizes = list(map(os.path.getsize, paths))
    with tqdm(desc=desc, total=sum(sizes), unit="B", unit_scale=True, disable=desc is None) as bar:
        for i, path in enumerate(paths):
            before = sum(sizes[:i])
            with open(path, "rb") as raw:
                zipped = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                lines = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else raw
                try:
                    for number, line in enumerate(lines, 1):
                        if number == 1:
                            if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line[:4]:
                                raise InputError(f"{path}: UTF-16 text. Save the file as UTF-8.")
                            line = line.removeprefix(b"\xef\xbb\xbf")
                        elif number % 4096 == 0:
                            bar.update(before + raw.tell() - bar.n)
                        yield path, number, line.rstrip(b"\r\n")
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise InputError(f"{path}: damaged gzip data ({error}). Download the file again.") from None
                bar.update(before + raw.tell() - bar.n)


def read_records(
    paths: Sequence[str], parse: Callable[[str], T | None], form: str, name: str, desc: str | None = None
) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, parse(line)) of every usable line. Empty lines are skipped.

    Args:
        paths: The files, read in this order.
        parse: Parser of one line. A ValueError marks the line as malformed, None skips it without a warning.
        form: What a line should look like, for error messages.
        name: The file or folder as the user named it, for error messages.
        desc: Label of a progress bar, or None for no bar.

    Raises:
        InputError: No line is usable.
    """
    usable = malformed = 0
    for path, number, line in read_lines(paths, desc):
        if not line.strip():
            continue
        try:
            record = parse(line.decode())
        except ValueError as error:
            malformed += 1
            if malformed <= QUOTED_PROBLEMS:
                problem = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else error
                warn(f"{path}, line {number}: {problem}. The line is skipped.")
            continue
        if record is not None:
            usable += 1
            yield number, record
    if malformed > QUOTED_PROBLEMS:
        warn(
            f"{name}: {malformed:,} of {usable + malformed:,} lines are malformed and were skipped. "
            f"The first {QUOTED_PROBLEMS} are quoted above."
        )
    if not usable:
        raise InputError(f"{name}: no usable line found. Each line must be {form}.")
