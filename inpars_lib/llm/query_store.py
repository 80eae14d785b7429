"""The files that generate_queries_openai.py writes: queries, errors, settings and token counts."""

import array
import io
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from statistics import fmean, median_high
from typing import IO, Any, NamedTuple, TypeVar

import msgspec

from inpars_lib.cli import InputError, counted, redact, shorten, warn
from inpars_lib.files import SUFFIX, atomic_write, is_special, json_line, lock
from inpars_lib.formats.lines import Form, read_blocks, read_records
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.llm.protocol import ApiState
from inpars_lib.llm.usage import NO_TOKENS, Usage
from inpars_lib.resume import FORMAT_VERSION, check_settings, read_state, repair_last_line

CHECK_INTERVAL = 1.0  # seconds between two checks that OUTPUT is still the open file
LONGEST_ROW = 1 << 24  # bytes; a file that begins with a longer line is not ours
START = b'{"doc_id":'  # of every row
DUPLICATE = "duplicate of another query of this document"


class RequestKey(NamedTuple):
    """A request for a query: the document and the number of the request among those of the document, from 1."""

    doc_id: str
    number: int = 1


class AnswerRow(msgspec.Struct):
    """The fields of a row of OUTPUT that tell which request is answered."""

    doc_id: str | int
    question: str
    request: str | None = None


class FailureRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A row of OUTPUT.errors.jsonl."""

    doc_id: str | int
    request: str | None = None
    reason: str
    answer: str | None = None


class Meta(msgspec.Struct):
    """OUTPUT.meta.json. It also holds the format version and versions of software, which nobody reads."""

    settings: dict[str, Any]
    usage: Usage
    request: ApiState | None = None
    models: list[str] = []


Row = TypeVar("Row", AnswerRow, FailureRow)


def request_key(doc_id: str | int, name: str | None = None) -> RequestKey:
    """Return the key of a request from its name in a file, `doc_id#number`, or None for the first request."""
    number = name.rpartition("#")[2] if name else ""
    return RequestKey(str(doc_id), int(number) if number.isdecimal() else 1)


def repair_rows(path: str, kind: type[Row]) -> None:
    """Repair the torn last line of a file of rows, after a check that the file is ours.

    Raises:
        InputError: The first line is no row.
    """
    with open(path, "rb") as file:
        line = file.readline(LONGEST_ROW)
    if not line:
        return
    try:
        msgspec.json.decode(line.decode(errors="replace"), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        torn = not line.endswith(b"\n") and line.startswith(START[: len(line)])
        if isinstance(error, msgspec.ValidationError) or not torn:
            raise InputError(f"{path}: not a file of this script. Name another --output.") from None
    repair_last_line(path)


def read_rows(path: str, kind: type[Row], desc: str | None = None) -> Iterator[tuple[RequestKey, Row]]:
    """Yield the rows of a file of ours with their requests. Malformed lines are skipped with a warning."""
    decode = msgspec.json.Decoder(kind).decode

    def parse(line: str) -> Row:
        try:
            return decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(shorten(error)) from None

    if os.path.exists(path) and os.path.getsize(path):
        for _, row in read_records(read_blocks([path], desc), lambda _: Form(parse), "a row of this script", path):
            yield request_key(row.doc_id, row.request), row


class QueryStore:
    """Output of generation: OUTPUT (answers), OUTPUT.errors.jsonl (failures), OUTPUT.meta.json (settings, tokens).

    One process at a time may hold an output. With `path` None nothing is written (a dry run).

    Args:
        path: OUTPUT, or None.
        settings: Everything that decides the queries. Other settings than before are refused.
        force: Accept other settings than before.
        queries_per_doc: Requests per document. If there are several, files name a request `doc_id#number`.

    Attributes:
        done: Requests with an answer: a row, or a duplicate that was dropped.
        duplicates: Requests whose answer was dropped, because another request of the document had the same one.
        failed: Requests that were given up.
        request: State of `ModelApi` that an earlier run found out, or None.
        models: Names of the models that answered, as the server gives them.
        usage_now: Tokens of this run.
        written: Number of queries written in this run.
        equal_pairs: Number of answers of this run whose bad question equals the good one.

    Raises:
        InputError: Another process holds the output, its settings differ, or it is not ours.
    """

    def __init__(
        self, path: str | None, settings: Mapping[str, Any], force: bool = False, queries_per_doc: int = 1
    ) -> None:
        self.path, self.settings, self.queries_per_doc = path, dict(settings), queries_per_doc
        self.unit = "documents" if queries_per_doc == 1 else "requests"  # what is counted in messages
        self.request: ApiState | None = None
        self.models: list[str] = []
        self.usage_now = self._usage_before = NO_TOKENS
        self.written = self.equal_pairs = 0
        self.done: set[RequestKey] = set()
        self.duplicates: set[RequestKey] = set()
        self.failed: set[RequestKey] = set()
        self._queries: set[int] = set()  # hashes of document and query
        self._errors: IO[bytes] | None = None  # opened for the first failure
        self._meta: IO[bytes] | None = None
        self._checked_at = 0.0
        if path is not None:
            self._open(path)
            self._read_answers(path)
            self._read_failures(f"{path}.errors.jsonl")
            self._read_meta(f"{path}.meta.json", force)
        self._done_before = len(self.done)

    def _open(self, path: str) -> None:
        """Open and lock the output, and repair its last line if the output is ours."""
        if path == "-" or is_special(path):
            raise InputError(f"{path}: this is a pipe or a device. Answers are appended to a file: name one.")
        if suffix := SUFFIX.search(path):
            raise InputError(f"{path}: answers are appended to a file without compression. Omit {suffix[0]}.")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # one write a row: a kill leaves at most the last row torn
        lock(self._file, path)
        repair_rows(path, AnswerRow)
        self._size_before = os.path.getsize(path)

    def _read_answers(self, path: str) -> None:
        for key, row in read_rows(path, AnswerRow, "Reading earlier answers"):
            self.done.add(key)
            self._queries.add(self._hash(key, row.question))

    def _read_failures(self, path: str) -> None:
        """Read failures and duplicates, keep the last row of each request, and drop requests that have a row since."""
        if not os.path.exists(path):
            return
        repair_rows(path, FailureRow)
        rows = {key: row for key, row in read_rows(path, FailureRow) if key not in self.done}
        self.duplicates = {key for key, row in rows.items() if row.reason == DUPLICATE}
        self.failed = rows.keys() - self.duplicates
        self.done |= self.duplicates
        self._rewrite_failures(path, rows.values())

    @staticmethod
    def _rewrite_failures(path: str, rows: Collection[FailureRow]) -> None:
        with atomic_write(path, "wb") as file:
            file.writelines(msgspec.json.encode(row) + b"\n" for row in rows)
        if not rows:
            os.remove(path)

    def _read_meta(self, path: str, force: bool) -> None:
        if not os.path.exists(path):
            if self.done or self.failed:
                warn(f"{self.path}: has rows but no meta.json, so its settings cannot be checked.")
            return
        meta = read_state(path, Meta, "Delete the file: queries stay, token counts restart.")
        before, self._usage_before, self.models = meta.settings, meta.usage, meta.models
        if "prompt_sha256" in before:  # its name in format version 1
            before["prompt"] = before.pop("prompt_sha256")
        if before.get("api"):
            self.settings.setdefault("api", before["api"])
        try:
            action = "Repeat the earlier settings, name another --output, or mix both with --force."
            if self.models:
                action += f" Models that answered so far: {', '.join(self.models)}."
            check_settings(str(self.path), before, self.settings, action)
            self.request = meta.request
        except InputError:
            if self.done and not force:
                raise
            self.failed.clear()  # by other settings
            if not self.done:
                self.models.clear()

    @property
    def answered(self) -> int:
        """Number of requests answered in this run."""
        return len(self.done) - self._done_before

    @property
    def usage(self) -> Usage:
        """Tokens of all runs on this output."""
        return self._usage_before.plus(self.usage_now)

    def name(self, key: RequestKey) -> str:
        """Return the name of a request in files and messages."""
        return key.doc_id if self.queries_per_doc == key.number == 1 else f"{key.doc_id}#{key.number}"

    def _named(self, key: RequestKey) -> dict[str, str]:
        """Return the field that tells the requests of a document apart, if there are several."""
        return {} if self.name(key) == key.doc_id else {"request": self.name(key)}

    def note_model(self, answer: Any) -> None:
        """Record which model answered, as the server says. Warn of another one than --engine."""
        name = answer.get("model") if isinstance(answer, dict) else None
        if not isinstance(name, str) or not name or name in self.models:
            return
        self.models.append(name)
        engine = str(self.settings["engine"])
        asked = engine.rpartition("/")[2].lower()
        answered = name.rpartition("/")[2].lower()
        if not (answered.startswith(asked) or asked.startswith(answered)):  # with a date, without a vendor
            warn(f"--engine {engine}: the answers come from a model that the server calls {shorten(name)}.")
        self.save_meta()

    @staticmethod
    def _hash(key: RequestKey, question: str) -> int:
        return hash((key.doc_id, " ".join(question.lower().split())))

    def add_answer(self, key: RequestKey, row: dict[str, Any], usage: Usage) -> None:
        """Write the row of an answered request, or record that its query is a duplicate."""
        self.add_usage(usage)
        self.done.add(key)
        self.failed.discard(key)
        query = self._hash(key, row["question"])
        if "bad_question" in row and self._hash(key, row["bad_question"]) == query:
            self.equal_pairs += 1
        if query in self._queries:
            self.duplicates.add(key)
            self._append_error(key, DUPLICATE, row["question"])
        elif self.path:
            self.written += 1
            self._append(self._file, row | self._named(key))
        self._queries.add(query)
        self._check_output()

    def add_failure(self, key: RequestKey, reason: str, answer: str | None = None, usage: Usage = NO_TOKENS) -> None:
        """Write why a request has no query, and the answer if there was one."""
        self.add_usage(usage)
        self.failed.add(key)
        self._append_error(key, reason, answer)

    def _append_error(self, key: RequestKey, reason: str, answer: str | None) -> None:
        if self.path:
            row = {"doc_id": key.doc_id} | self._named(key)
            row |= {"reason": redact(reason)} | ({} if answer is None else {"answer": redact(answer)})
            self._errors = self._errors or open(f"{self.path}.errors.jsonl", "ab", buffering=0)
            self._append(self._errors, row)

    def discard_failures(self) -> None:
        """Delete the failures of an output without queries: the setup was wrong, not the documents.

        Failures with an answer stay, which was paid for.
        """
        self.failed.clear()
        if self._errors:
            path = str(self._errors.name)
            self._errors.close()
            self._errors = None
            rows = {key: row for key, row in read_rows(path, FailureRow) if row.answer}
            self.failed |= rows.keys()
            self._rewrite_failures(path, rows.values())

    def _append(self, file: IO[bytes], row: dict[str, Any]) -> None:
        line = json_line(row).encode(errors="replace")
        end = os.fstat(file.fileno()).st_size
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:  # disk full: half a row must not precede the next one
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise

    def add_usage(self, usage: Usage) -> None:
        """Count tokens, before their answer is written: no answer is on disk whose tokens are not."""
        self.usage_now = self.usage_now.plus(usage)
        if self._meta:
            os.pwrite(self._meta.fileno(), self._counts(), self._usage_at)

    def _counts(self) -> bytes:
        """Return the end of OUTPUT.meta.json, whose length is always the same, so that it is written in place."""
        counts = [f'"{name}": {count:15d}' for name, count in msgspec.structs.asdict(self.usage).items()]
        return f"{{{', '.join(counts)}}}\n}}\n".encode()

    def save_meta(self) -> None:
        """Write OUTPUT.meta.json."""
        if self.path is None:
            return
        import openai

        meta = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "request": self.request and msgspec.to_builtins(self.request),
            "models": self.models,
            "versions": {"python": platform.python_version(), "openai": openai.__version__},
        }
        text = json.dumps(meta, indent=2, ensure_ascii=False).removesuffix("\n}") + ',\n  "usage": '
        head = text.encode(errors="replace")
        with atomic_write(f"{self.path}.meta.json", "wb") as file:
            file.write(head + self._counts())
        if self._meta:
            self._meta.close()
        self._meta, self._usage_at = open(f"{self.path}.meta.json", "rb+", buffering=0), len(head)

    def _check_output(self) -> None:
        """Check now and then that the open file still is OUTPUT.

        Raises:
            InputError: OUTPUT was deleted or replaced. What this run has paid for is in it again.
        """
        if self.path is None or time.monotonic() - self._checked_at < CHECK_INTERVAL:
            return
        self._checked_at = time.monotonic()
        exists = os.path.exists(self.path)
        if exists and os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
            return
        lost = self._file
        begin = self._size_before if exists else 0  # who replaced the file had a choice about the earlier rows
        self._open(self.path)
        there = {key for key, _ in read_rows(self.path, AnswerRow)}
        lost.seek(begin)
        restored = 0
        for line in io.BufferedReader(lost):
            row = msgspec.json.decode(line, type=AnswerRow)
            if request_key(row.doc_id, row.request) not in there:
                self._file.write(line)
                restored += 1
        saved = counted(restored, "answer")
        problem = f"the file was deleted or replaced during the run. {saved} went to the new one"
        raise InputError(f"{self.path}: {problem}. Run the same command again to resume.")

    def failure_reasons(self) -> Counter[str]:
        """Return the number of failed requests by reason."""
        last = {key: row.reason[:80] for key, row in read_rows(f"{self.path}.errors.jsonl", FailureRow)}
        return Counter(reason for reason in last.values() if reason != DUPLICATE)

    def close(self) -> None:
        """Release the output for other processes."""
        if self.path:
            self._file.close()
        for file in (self._errors, self._meta):
            if file:
                file.close()


def summarize_queries(path: str) -> str:
    """Return a line on all queries of an output: lengths, duplicates, copies, mean log-probability."""
    lengths, means = array.array("H"), array.array("d")
    distinct: set[int] = set()
    copied = 0
    for row in read_synthetic_queries(path):
        lengths.append(min(len(row.question.split()), 65_535))
        distinct.add(hash(row.question.lower()))
        copied += row.question.lower() in row.doc_text.lower()
        if row.log_probs:
            means.append(fmean(row.log_probs))
    mean = f"; mean log-probability {fmean(means):.3f}" if means else ""
    return (
        f"questions: {min(lengths)} to {max(lengths)} words, median {median_high(lengths)}; "
        f"{counted(len(lengths) - len(distinct), 'duplicate')}, {copied:,} copied from the document{mean}"
    )
