"""What a file is (text, archive, JSON array, binary), and its lines, with malformed ones reported by number."""

import codecs
import os
import re
import sys
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import IO, Any, Generic, NamedTuple, TypeVar

from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.files import FORMATS, decompressed, is_special

QUOTED_PROBLEMS = 3  # malformed lines that are quoted one by one; later ones are only counted
JUDGED_LINES = 1000  # if more than half of so many lines are malformed, the file is of another format
ROLE_LINES = 100  # lines that tell the role and the columns of a file
BLOCK_BYTES = 1 << 20  # lines are read in blocks, because a Python generator per line would take most of the time
LONGEST_LINE = 1 << 27  # bytes
# First bytes of files that hold no text, what they are, what to do
PARQUET = "python -c \"import pandas as p; p.read_parquet('{0}').to_json('{0}.jsonl', orient='records', lines=True)\""
COMMAS = rb"(?i)(\xef\xbb\xbf)?\"?(q|query|doc|document|p|passage|cord)?[_-]?(id|uid|no)\"?,[\w \",-]*\r?\n"  # header
CSV = "python -c \"import pandas as p; p.read_csv('{0}', dtype=str).to_csv('{0}.tsv', sep='\\t', index=False)\""
NO_TEXT = (
    (rb"PAR1", "a Parquet file", f"Run {PARQUET}"),
    (rb"ARROW1|\xff\xff\xff\xff", "an Arrow file", "Export the data as JSONL"),
    (rb"PK\x03\x04", "a zip archive", "Unpack it with `unzip {0}`, and name the file inside"),
    (rb"7z\xbc\xaf|Rar!|\x1f\x9d|\x04\x22\x4d\x18", "an archive", "Unpack it, and name the file inside"),
    (b"|".join(start for _, _, start, _ in FORMATS), "compressed twice", "Decompress it once"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the data", "Run git lfs pull"),
    (rb"(?i)\s*+<(!doctype html|html)\b", "a web page, not the data", "Download the file again"),
    (rb"\s*+<DOC>", "TREC's SGML, not one document a line", "Convert it to lines doc_id<TAB>text"),
    (COMMAS, "separated by commas (CSV)", f"Run {CSV}"),
    (rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]", "UTF-16 text", "Save the file as UTF-8"),
)
ARRAY = re.compile(rb"\s*+\[(?![^\n]*\t)\s*+[{\]]")  # with a tab, the line is TSV
LONG_OBJECT = re.compile(rb"\s*+\{([^\n\t]*[{\[,])?[ \r]*\n\s*+[\"\]}]")  # an object of several lines
JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)
T = TypeVar("T")


class Block(NamedTuple):
    """Some lines of a file.

    Attributes:
        path: The file.
        lines: Number, from 1, and bytes of each line, without its newline.
        is_first: Whether the file begins with these lines.
        noun: What a line is: `line`, or `object` of a JSON array.
        omitted: Usable lines that a filter has removed.
    """

    path: str
    lines: list[tuple[int, bytes]]
    is_first: bool
    noun: str = "line"
    omitted: int = 0

    def head(self) -> list[str]:
        """Return the first lines that are not empty, to judge the file."""
        lines = (line.decode(errors="replace").rstrip("\r") for _, line in self.lines[:ROLE_LINES])
        return [line for line in lines if line and not line.isspace()]


Blocks = Generator[Block, None, None]  # a progress bar ends when the generator is closed


class LineError(ValueError):
    """A problem of a line that must not be skipped, because measures would change. The message ends in an action."""


class Form(NamedTuple, Generic[T]):
    """How to read the lines of one file.

    Attributes:
        parse: Parser of one line. A ValueError marks the line as malformed.
        header: Number of lines at the beginning that hold no data.
    """

    parse: Callable[[str], T]
    header: int = 0


def require_file(path: str, reason: str) -> None:
    """Check that an input can be read more than once. `reason` says why it is."""
    if path == "-" or is_special(path):
        raise InputError(f"{path}: {reason}, and standard input or a pipe cannot be. Write the data to a file first.")


# ---------------------------------------------------------------------------------------------------------- what it is


def _check_text(path: str, head: bytes) -> None:
    """Check that a file holds text, from its first bytes."""
    for start, kind, action in NO_TEXT:
        if re.match(start, head):
            raise InputError(f"{path}: this is {kind}. {action.format(path)}.")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        if re.search(rb"[\0-\x08\x0e-\x1a]", head):
            raise InputError(f"{path}: this is a binary file, not text. Name a text file.") from None


@contextmanager
def _only_member(file: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """Open the only file of a tar archive."""
    action = f"Unpack it with `tar -xf {path}`, and name one file"
    try:
        archive = tarfile.open(fileobj=file, mode="r|")
        members = (
            member for member in archive if member.isfile() and not os.path.basename(member.name).startswith(".")
        )
        member = next(members, None)
        content = archive.extractfile(member) if member else None
        if content is None or member is None:
            raise InputError(f"{path}: this tar archive has no file. Name another one.")
        yield content
        if other := next(members, None):
            raise InputError(f"{path}: this tar archive has several files ({member.name}, {other.name}). {action}.")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: damaged tar archive ({error}). Download the file again.") from None


@contextmanager
def open_text(path: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a text file, compressed or not, or the only file of a tar archive.

    Args:
        path: The file; `-` for standard input.

    Yields:
        The open file, and its text. Both are one object if the file is plain text.

    Raises:
        InputError: The path is a folder, its compressed data is damaged, or it holds no text.
    """
    if os.path.isdir(path):
        raise InputError(f"{path}: this is a folder. Name a file.")
    if path == "-" and sys.stdin is None:
        raise InputError("-: standard input is closed. Name a file.")
    source: Any = nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")
    with source as raw, decompressed(raw, path) as file:
        packed: Any = file
        is_tar = packed.peek(512)[257:262] == b"ustar"
        with _only_member(file, path) if is_tar else nullcontext(file) as text:
            content: Any = text
            _check_text(path, content.peek(512)[:4096])
            yield raw, content


# ------------------------------------------------------------------------------------------------------------ its lines


def _too_long(path: str, position: str) -> InputError:
    size = f"{LONGEST_LINE >> 20} MiB"
    return InputError(f"{path}, {position}: longer than {size}. Check that this file has one record per line.")


def _line_blocks(path: str, file: IO[bytes], data: bytes) -> Blocks:
    number = 1
    if not data:
        yield Block(path, [], is_first=True)
    while data:
        if not data.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE)
            if len(rest) == LONGEST_LINE:
                position = number + data.count(b"\n")
                raise _too_long(path, f"line {position:,}")
            data += rest
        lines = data.removesuffix(b"\n").split(b"\n")
        yield Block(path, list(enumerate(lines, number)), number == 1)
        number += len(lines)
        data = file.read(BLOCK_BYTES)


def _json_objects(path: str, file: IO[bytes], data: bytes) -> Iterator[bytes]:
    """Yield the objects of a JSON array, or JSON objects of several lines each.

    Raises:
        InputError: The last one is cut off.
    """
    outer = 1 if ARRAY.match(data) else 0
    depth = start = at = 0  # nesting; where the current object and the next token begin
    while True:
        for token in JSON_TOKEN.finditer(data, at):
            mark = token[0]
            if mark == b'"':  # the string ends beyond these data
                break
            at = token.end()
            if mark in b"{[":
                start = token.start() if depth == outer else start
                depth += 1
            elif mark in b"}]":
                depth -= 1
                if depth == outer:
                    yield data[start:at]
        kept = start if depth > outer else at
        more = file.read(max(BLOCK_BYTES, len(data) - kept))
        if not more:
            break
        data, start, at = data[kept:] + more, 0, at - kept
        if len(data) > 2 * LONGEST_LINE:
            raise _too_long(path, "a JSON object")
    if depth:
        raise InputError(f"{path}: the JSON ends in the middle of an object or array. Download the file again.")


def _object_blocks(path: str, file: IO[bytes], data: bytes) -> Blocks:
    lines: list[tuple[int, bytes]] = []
    size, is_first = 0, True
    for number, row in enumerate(_json_objects(path, file, data), 1):
        lines.append((number, row))
        size += len(row)
        if size > BLOCK_BYTES:
            yield Block(path, lines, is_first, "object")
            lines, size, is_first = [], 0, False
    yield Block(path, lines, is_first, "object")


def read_blocks(paths: Sequence[str], desc: str | None = None) -> Blocks:
    """Yield blocks of about 1 MiB of lines of text files, or of objects of JSON arrays.

    Args:
        paths: The files, read in this order; `-` for standard input.
        desc: Label of a progress bar over the bytes of all files, or None for no bar.

    Raises:
        InputError: A path is no text file, or a line is too long.
    """
    from tqdm import tqdm

    streams = [path == "-" or is_special(path) for path in paths]
    sizes = [0 if stream else os.path.getsize(path) for path, stream in zip(paths, streams, strict=True)]
    total = None if any(streams) else sum(sizes)
    with tqdm(desc=desc, total=total, unit="B", unit_scale=True, disable=desc is None) as bar:
        for i, path in enumerate(paths):
            before = sum(sizes[:i])
            with open_text(path) as (raw, file):
                data = file.read(BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")
                is_json = ARRAY.match(data) or LONG_OBJECT.match(data)
                for block in (_object_blocks if is_json else _line_blocks)(path, file, data):
                    yield block
                    size = sum(len(line) for _, line in block.lines) if streams[i] else before + raw.tell() - bar.n
                    bar.update(size)


def count_lines(path: str) -> int:
    """Return the number of lines of a file, empty lines included, or of objects of a JSON array."""
    return sum(len(block.lines) for block in read_blocks([path]))


# ---------------------------------------------------------------------------------------------------------- its records


class _MalformedLines:
    """Malformed lines of a file: the first are quoted in warnings, the others counted, too many are an error."""

    def __init__(self, name: str, form: str) -> None:
        self.name, self.form, self.count, self.example = name, form, 0, ""

    def add(self, block: Block, number: int, line: bytes, error: ValueError, usable: int) -> None:
        """Report a line. `usable` is the number of usable lines before it."""
        self.count += 1
        place = f"{block.path}, {block.noun} {number}"
        problem = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else error
        if not self.example:
            self.example = f" {place} is `{shorten(line[:100].decode(errors='replace'))}`."
        if self.count <= QUOTED_PROBLEMS:
            warn(f"{place}: {problem}. The {block.noun} is skipped.")
        if self.count > JUDGED_LINES / 2 and self.count + usable <= JUDGED_LINES:
            raise self._error(usable)

    def check(self, usable: int) -> None:
        """Judge the whole file."""
        if self.count >= usable + (usable > 0):
            raise self._error(usable)
        if self.count > QUOTED_PROBLEMS:
            warn(
                f"{self.name}: {self.count:,} of {usable + self.count:,} lines are malformed and were skipped. "
                f"The first {QUOTED_PROBLEMS} are quoted above."
            )

    def _error(self, usable: int) -> InputError:
        lines = (
            f"{self.count:,} of the first {usable + self.count:,} lines are malformed"
            if usable
            else "no usable line found"
        )
        return InputError(f"{self.name}: {lines}.{self.example} Each line must be {self.form}.")


def read_records(blocks: Blocks, judge: Callable[[Block], Form[T]], form: str, name: str) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, record) of every usable line. Empty lines are skipped.

    Args:
        blocks: The lines.
        judge: Function of the first block of a file that returns how to read the file.
        form: What a line should look like, for error messages.
        name: The file or folder as the user named it, for error messages.

    Raises:
        InputError: No line is usable, or more than half of the first lines or of all are malformed.
    """
    usable, malformed = 0, _MalformedLines(name, form)
    with closing(blocks):
        for block in blocks:
            lines = block.lines
            if block.is_first:
                try:
                    parse, header = judge(block)
                except ValueError as error:
                    raise InputError(f"{block.path}, {block.noun} 1: {error}. Each line must be {form}.") from None
                lines = lines[header:]
            usable += block.omitted
            for number, line in lines:
                try:
                    text = line.decode().rstrip("\r")
                    if not text or text.isspace():
                        continue
                    record = parse(text)
                except ValueError as error:
                    if isinstance(error, LineError) and not line.startswith(b"#"):  # a comment
                        raise InputError(f"{block.path}, {block.noun} {number}: {error}.") from None
                    malformed.add(block, number, line, error, usable)
                    continue
                usable += 1
                yield number, record
    malformed.check(usable)
