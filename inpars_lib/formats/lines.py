"""Text files line by line: compression, byte-order marks, progress bars, malformed lines reported with their number."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from inpars_lib.cli import InputError, warn
from inpars_lib.files import decompressed, is_special
from inpars_lib.formats.fields import single_line

QUOTED_PROBLEMS = 3  # malformed lines that are quoted one by one; later ones are only counted
BLOCK_BYTES = 1 << 20  # lines are read in blocks, because a Python generator per line would take most of the time
T = TypeVar("T")
Block = tuple[str, int, list[bytes]]  # path, number of the first line from 1, lines with their newlines


def read_blocks(paths: Sequence[str], desc: str | None = None) -> Iterator[Block]:
    """Yield blocks of about 1 MiB of lines of files, compressed or not.

    Args:
        paths: The files, read in this order; `-` for standard input.
        desc: Label of a progress bar over the bytes of all files, or None for no bar.

    Raises:
        InputError: A path is no regular file, its compressed data is damaged, or its text is UTF-16.
    """
    from tqdm import tqdm

    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{path}: this is a folder. Name a file.")
        if path == "-" and (sys.stdin is None or int(os.environ.get("WORLD_SIZE", 1)) > 1):  # set by torchrun
            raise InputError("-: standard input is closed, or shared by several processes. Name a file.")
        if is_special(path):
            raise InputError(f"{path}: this is a pipe or a device. Write its data to a file first.")
    sizes = [0 if path == "-" else os.path.getsize(path) for path in paths]
    total = None if "-" in paths else sum(sizes)
    with tqdm(desc=desc, total=total, unit="B", unit_scale=True, disable=desc is None) as bar:
        for i, path in enumerate(paths):
            before = sum(sizes[:i])
            source = nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")
            with source as raw, decompressed(raw, path) as file:
                number = 1
                while lines := file.readlines(BLOCK_BYTES):
                    if number == 1:
                        if lines[0].startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in lines[0][:4]:
                            raise InputError(f"{path}: UTF-16 text. Save the file as UTF-8.")
                        lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
                    yield path, number, lines
                    number += len(lines)
                    bar.update(sum(map(len, lines)) if path == "-" else before + raw.tell() - bar.n)


def count_lines(path: str) -> int:
    """Return the number of lines of a file, empty lines included."""
    return sum(len(lines) for *_, lines in read_blocks([path]))


def read_records(
    blocks: Iterable[Block],
    parse: Callable[[str], T | None],
    form: str,
    name: str,
    select: Callable[[list[bytes]], list[tuple[int, bytes]]] | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, parse(line)) of every usable line. Empty lines are skipped.

    Args:
        blocks: The lines.
        parse: Parser of one line. A ValueError marks the line as malformed, None skips it without a warning.
        form: What a line should look like, for error messages.
        name: The file or folder as the user named it, for error messages.
        select: Function of a block of lines. Returns (position in the block, line) of those to parse; the others count
            as usable.

    Raises:
        InputError: No line is usable.
    """
    usable = malformed = 0
    for path, first, lines in blocks:
        selected: Iterable[tuple[int, bytes]] = enumerate(lines)
        if select:
            selected = wanted = select(lines)
            usable += len(lines) - len(wanted)
        for position, line in selected:
            number = first + position
            try:
                text = line.decode().rstrip("\r\n")
                if not text or text.isspace():
                    continue
                record = parse(text)
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


def tsv_line(*columns: str) -> str:
    """Return a line of a TSV file, newline included. Tabs and newlines inside a column become spaces."""
    return "\t".join(map(single_line, columns)) + "\n"
