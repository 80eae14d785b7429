"""Files on disk: the paths of a command, atomic writes, locks, compression."""

import bz2
import errno
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from inpars_lib.cli import InputError

STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST_NAME = 255  # bytes that Linux and macOS allow
FOLDERS = ("--index",)  # outputs that are folders
OPEN_FILES = ("/dev/fd/", "/proc/self/fd/")  # names of files that this process has open already

# ------------------------------------------------------------------------------------------------ paths of a command


def is_special(path: str) -> bool:
    """Return whether the path exists and is neither a regular file nor a folder: a device, a pipe or an open file."""
    if path.startswith(OPEN_FILES):
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def resolve_output(path: str) -> str:
    """Return the name under which an output is written: of a symbolic link its target, `-` for standard output.

    Locks, logs and other files beside the output take this name, so that two names of one output share them.
    """
    if path in STANDARD_OUTPUT:
        return "-"
    return os.path.realpath(path) if os.path.islink(path) and not is_special(path) else path


def _identities(path: str) -> set[object]:
    """Return what two names of one file share: the real path and, if the file exists, its device and inode."""
    found: set[object] = {os.path.realpath(path)}
    with suppress(OSError):
        status = os.stat(path)
        found.add((status.st_dev, status.st_ino))
    return found


def check_paths(inputs: Mapping[str, str | Iterable[str] | None], outputs: Mapping[str, str | None]) -> None:
    """Check that no output of a command is one of its inputs or another of its outputs.

    Args:
        inputs: Paths by flag, or several paths of one flag; None, `-` and special files are skipped. A folder, such as
            an index or a model, stands for the files in it too.
        outputs: Paths by flag or by the name of a file beside an output, likewise.

    Raises:
        InputError: Two flags name one file, an output is a folder or inside another output, or a name is too long for a
            file system.
    """
    named: list[tuple[str, str, set[object]]] = []
    written: dict[str, str] = {}  # flag by real path
    for flag, paths in inputs.items():
        several = [paths] if isinstance(paths, str) else paths or ()
        for path in several:
            if path != "-" and not is_special(path):
                inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
                found = [path, *(os.path.join(path, name) for name in inside)]
                named.extend((flag, name, _identities(name)) for name in found)
    for flag, output in outputs.items():
        if output is None or resolve_output(output) == "-" or is_special(output):
            continue
        if len(os.fsencode(os.path.basename(output))) > LONGEST_NAME:
            problem = f"the name of this file ({flag}) has more than {LONGEST_NAME} bytes"
            raise InputError(f"{output}: {problem}. Shorten the name of the output.")
        identities = _identities(output)
        for other, path, known in named:
            if identities & known:
                raise InputError(f"{output}: {flag} and {other} ({path}) are one file. Name another {flag}.")
        named.append((flag, output, identities))
        real = os.path.realpath(output)
        is_folder = os.path.isdir(output) or output.endswith(os.sep)
        if is_folder and flag not in FOLDERS:
            raise InputError(f"{output}: {flag} is a file, and this is a folder. Name another {flag}.")
        for parent, other in written.items():
            if real.startswith(parent + os.sep):
                raise InputError(f"{output}: {flag} is inside {other}, which is a file. Name another {flag}.")
        written[real] = flag


# ---------------------------------------------------------------------------------------------------- atomic writes


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Add a path to errors of a full disk, which the operating system reports without one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            error.filename = path
        raise


class OutputFile(io.FileIO):
    """A file for writing whose errors of a full disk name `path`."""

    def __init__(self, file: str | int, path: str, closefd: bool = True) -> None:
        super().__init__(file, "w", closefd)
        self.path = path

    def write(self, data: Any) -> int:
        """Write bytes."""
        with named_errors(self.path):
            return super().write(data)


def _create(path: str, mode: int) -> None:
    """Create an empty file with these permissions, in place of one that a killed run left."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    os.close(file)


def unfinished_name(target: str) -> str:
    """Return the name of a file or folder until it is complete. Its length does not depend on the target's."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".inpars-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.unfinished")


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an error.

    Until then an existing file stays as it is, and its permissions are kept. Parent folders are created. Symbolic links
    are followed. `-` (standard output) and paths that are no regular file, a pipe for example, are written in place. A
    suffix such as .gz compresses the file.

    Args:
        path: The file to create or replace.
        mode: `w` for UTF-8 text, `wb` for bytes.

    Yields:
        The open file.
    """
    with write_together((path, mode)) as [file]:
        yield file


@contextmanager
def write_together(*outputs: tuple[str | None, str], stale: Sequence[str] = ()) -> Iterator[list[Any]]:
    """Open several files of one result, which appear when the block ends without an error.

    A kill leaves the old files, the new ones, or some missing, but never old and new ones side by side.

    Args:
        outputs: Path and mode of each file, as `atomic_write` takes them. The first is the last to appear. A path that
            is None stands for a file that is not wanted.
        stale: Files that belong to the old ones and are deleted with them.

    Yields:
        The open files, in the order of `outputs`, None for each that is not wanted.
    """
    moves: dict[str, str] = {}  # target by unfinished file
    try:
        with ExitStack() as stack:
            files: list[IO[Any] | None] = []
            for path, mode in outputs:
                if path is None:
                    files.append(None)
                    continue
                if resolve_output(path) == "-" or is_special(path):
                    files.append(stack.enter_context(open_output(path, path, mode)))
                    continue
                target = os.path.realpath(path)
                unfinished = unfinished_name(target)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                _create(unfinished, stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else 0o666)
                moves[unfinished] = target
                files.append(stack.enter_context(open_output(unfinished, path, mode)))
            yield files
        if len(moves) + len(stale) > 1:
            for path in [*moves.values(), *stale]:
                with suppress(FileNotFoundError):
                    os.remove(path)
        for unfinished in reversed(list(moves)):
            os.replace(unfinished, moves[unfinished])
    except BaseException:
        for unfinished in moves:
            with suppress(FileNotFoundError):
                os.remove(unfinished)
        raise


# ---------------------------------------------------------------------------------------------------------- locks


def lock(file: IO[Any], path: str) -> None:
    """Lock an open output file for this process, until the file is closed.

    Raises:
        InputError: Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing to this file. Wait for it or stop it.") from None


@contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Let one process at a time write the output `path`, with a lock on PATH.lock.

    Raises:
        InputError: Another process holds the lock, or the output is `-`.
    """
    if path == "-":
        raise InputError("-: this output needs a lock or a resume log beside it. Name a file.")
    if is_special(path):
        yield
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    lock_path = f"{path}.lock"
    while True:
        file = open(lock_path, "ab")
        lock(file, path)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                break
        file.close()  # the process that held the lock has just deleted this file
    try:
        yield
    finally:
        os.remove(lock_path)
        file.close()


@contextmanager
def claimed(
    inputs: Mapping[str, str | Iterable[str] | None],
    outputs: Mapping[str, str | None],
    beside: Mapping[str, str | None] | None = None,
) -> Iterator[None]:
    """Check the paths of a command, and let no other process write its outputs until the block ends.

    Args:
        inputs: As in `check_paths`.
        outputs: As in `check_paths`. `-` is not locked.
        beside: Further files that the command writes beside its outputs, by name.

    Raises:
        InputError: As in `check_paths`, or another process writes an output.
    """
    written = {flag: path for flag, path in outputs.items() if path and path != "-"}
    locks = {f"lock of {flag}": f"{path}.lock" for flag, path in written.items()}
    check_paths(inputs, {**written, **locks, **(beside or {})})
    with ExitStack() as stack:
        for path in written.values():
            stack.enter_context(exclusive(path))
        yield


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSONL, newline included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------------ compression


def _zstd(raw: Any, mode: Any) -> Any:
    from backports.zstd import CompressionParameter, DecompressionParameter, ZstdFile

    reading: Any = {DecompressionParameter.window_log_max: 31}  # for files of `zstd --long=31`
    return ZstdFile(raw, mode, options=reading if mode == "rb" else {CompressionParameter.checksum_flag: 1})


# Name, suffix, first bytes, function of an open file and a mode.
# bzip2: the first bytes include those of a block, because a TSV file may begin with BZh.
# gzip: its header gets no name and no time, so that equal content gives equal files.
# Zstandard: pzstd writes a skippable frame first.
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
    is_standard = resolve_output(path) == "-"
    with ExitStack() as stack:
        raw = OutputFile(1, "standard output", closefd=False) if is_standard else OutputFile(target, path)
        file: Any = stack.enter_context(io.BufferedWriter(raw))
        for _, suffix, _, wrap in FORMATS:
            if path.endswith(suffix):
                file = stack.enter_context(wrap(file, "wb"))
        if "b" not in mode:
            file = stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n"))
        yield file
