"""Command-line helpers of the scripts: input errors, warnings, progress in logs, exit codes, argparse types."""

import argparse
import difflib
import gc
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, suppress
from typing import Any, NoReturn, TextIO

# Characters that control a terminal: C0 without tab and newline, C1, the direction of writing
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
BAR_OR_TEXT = re.compile(r"\r[^\r\n]*|[^\r]+")
CURSOR_UP = "\x1b[A"
NO_BARS = "show no progress bars; a log has one line of a bar every 30 seconds"
LOG_SECONDS = 30  # between two lines of a progress bar in a log
SECRETS: list[str] = []  # what no message and no file may contain, longest first


class InputError(Exception):
    """Input that cannot be used, with a message of the form `FILE[, line N]: problem. Action.` for the user."""


def hide_secrets(secrets: Iterable[str]) -> None:
    """Set the secrets that `redact` removes, in place of earlier ones."""
    SECRETS[:] = sorted(secrets, key=len, reverse=True)


def redact(text: str) -> str:
    """Return a text without the secrets of this run."""
    for secret in SECRETS:
        text = text.replace(secret, "<key>")
    return text


def printable(message: object) -> str:
    """Return a message without secrets and without characters that control a terminal."""
    return CONTROL.sub("", redact(str(message)))


def report(message: str) -> None:
    """Print a message to stderr, above a running progress bar."""
    from tqdm import tqdm

    with suppress(OSError):  # the terminal may be gone, and the work goes on
        tqdm.write(printable(message), file=sys.stderr)


def warn(message: str) -> None:
    """Print a warning to stderr, above a running progress bar."""
    report(f"warning: {message}")


def shorten(message: object) -> str:
    """Return another program's error message on one line of at most 300 characters, without a final period."""
    return " ".join(redact(str(message)).split())[:300].rstrip(".")  # redacted first: half a key is a secret too


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: 1 query, 2 queries."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun.removesuffix('y')}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """Return a time in the unit that people would use."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.0f} {unit}" if seconds >= 100 * length else f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


class ProgressStream:
    """Standard error whose progress bars become lines of a log: one every 30 seconds, and one for a complete bar.

    A bar is what follows a carriage return, whichever library prints it. A terminal shows bars as they are.

    Attributes:
        quiet: Drop all bars, on a terminal too.
    """

    def __init__(self, stream: TextIO) -> None:
        self.quiet = False
        self._stream, self._bar, self._printed = stream, "", time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        if self._stream.isatty() and not self.quiet:
            return self._stream.write(text)
        for piece in BAR_OR_TEXT.findall(text.replace(CURSOR_UP, "")):
            if piece.startswith("\r"):
                self._bar = "\r" + piece.strip()
                if time.monotonic() - self._printed >= LOG_SECONDS:
                    self._print_bar()
            elif self._bar:  # newlines end the bar, or lead to a bar below it
                if "100%" in self._bar:
                    self._print_bar()
                self._bar = ""
                self._stream.write(piece.lstrip("\n"))
            else:
                self._stream.write(piece)
        return len(text)

    def _print_bar(self) -> None:
        if self._bar.strip() and not self.quiet:
            self._stream.write(self._bar.strip() + "\n")
            self._printed = time.monotonic()
        self._bar = "\r"  # it is printed, and its newline is still to come


class Quiet(argparse.Action):
    """The action of --quiet, which leaves no attribute."""

    def __call__(self, *_: object) -> None:
        """Drop progress bars from now on."""
        if isinstance(sys.stderr, ProgressStream):
            sys.stderr.quiet = True


def run_script(
    main: Callable[[Sequence[str] | None], None],
    argv: Sequence[str] | None = None,
    interrupted: str = "Nothing was written. The same command starts over.",
) -> None:
    """Call a script's `main` and turn errors of the user's input into one line and an exit code.

    Args:
        main: The script's entry point, which takes the command-line arguments.
        argv: The arguments, or None for those of the process.
        interrupted: What Ctrl-C leaves behind and what the same command does next.

    Raises:
        SystemExit: Code 1 after bad input, 2 after bad flags, 130 after Ctrl-C.
    """
    gc.set_threshold(100_000)  # with Python's 700, millions of records in memory double the time to read them
    stderr: Any = ProgressStream(sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a table can name a file that the terminal cannot show
    try:
        with redirect_stderr(stderr):
            main(argv)
    except InputError as error:
        sys.exit(f"error: {printable(error)}")
    except KeyboardInterrupt:
        print(f"\nInterrupted. {interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout, `head` for example, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.strerror is None:  # a library's own OSError: its message may not concern the user's files
            raise
        name = "" if error.filename is None else f"{error.filename}: "
        sys.exit(f"error: {printable(name)}{error.strerror}. Check the path, its permissions and the free disk space.")


class ScriptParser(argparse.ArgumentParser):
    """Parser whose errors are one line, with the closest flag to an unknown one, instead of the usage of all flags."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        suppressed = argparse.SUPPRESS
        self.add_argument("-q", "--quiet", action=Quiet, nargs=0, dest=suppressed, default=suppressed, help=NO_BARS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of the command line, and remember them for `error`."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def _misspelt(self, required: str) -> str | None:
        """Return the word of the command line that was meant to be a required flag, if there is one."""
        flags = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        unknown = [flag for flag in flags if flag not in self._option_string_actions]
        return next(iter(difflib.get_close_matches(required, unknown, 1)), None)

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        if message.startswith("the following arguments are required"):
            missing = re.findall(r"--\w+", message)
            misspelt = next(filter(None, map(self._misspelt, missing)), None)
            if misspelt:
                message = f"unrecognized arguments: {misspelt}"
        hint = ""
        if unknown := re.search(r"(?<!\S)--\w[\w-]*", message):
            closest = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            if closest and closest != [unknown[0]]:
                hint = f". Did you mean {closest[0]}?"
        self.exit(2, f"{self.prog}: error: {printable(message)}{hint}\n")


def script_parser(doc: str | None, prog: str | None = None, allow_abbrev: bool = True) -> ScriptParser:
    """Return a parser whose help opens with the script's docstring, line breaks kept."""
    formatter = argparse.RawDescriptionHelpFormatter
    return ScriptParser(prog=prog, description=doc, formatter_class=formatter, allow_abbrev=allow_abbrev)


def parse_header(word: str) -> tuple[str, str]:
    """Return name and value of an HTTP header NAME=VALUE. Errors do not quote the value, which may be a secret."""
    name, _, value = word.partition("=")
    if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
        raise argparse.ArgumentTypeError("expected NAME=VALUE, with a name that HTTP allows")
    if not (value.strip() and value.strip().isascii() and value.strip().isprintable()):
        raise argparse.ArgumentTypeError(f"the value of {name} is empty or has characters that HTTP does not allow")
    return name, value.strip()


def at_least(minimum: float, kind: type = int) -> Callable[[str], float]:
    """Return an argparse type: a finite number of type `kind`, not below `minimum`."""
    return between(minimum, math.inf, kind)


def between(minimum: float, maximum: float, kind: type = float) -> Callable[[str], float]:
    """Return an argparse type: a finite number of type `kind` from `minimum` to `maximum`."""
    noun = "a whole number" if kind is int else "a number"
    bounds = f"of at least {minimum:g}" if maximum == math.inf else f"from {minimum:g} to {maximum:g}"

    def parse(word: str) -> float:
        try:
            value: float = kind(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and minimum <= value <= maximum):
            raise argparse.ArgumentTypeError(f"expected {noun} {bounds}, found {word!r}")
        return value

    return parse
