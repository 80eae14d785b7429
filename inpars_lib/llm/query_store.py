"""The files that generate_queries_openai.py writes: queries, errors, settings and token counts."""

import array
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from statistics import fmean, median_high
from typing import IO, Any, NamedTuple

from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.files import SUFFIX, atomic_write, is_special, json_line, lock
from inpars_lib.formats.queries import SyntheticRow, read_synthetic_queries
from inpars_lib.llm.usage import NO_TOKENS, Usage
from inpars_lib.resume import FORMAT_VERSION, repair_last_line

META_INTERVAL = 1.0  # seconds between two writes of OUTPUT.meta.json
DUPLICATE = "duplicate of another query of this document"
OPTIONAL = ("sampling_seed", "truncate_doc_chars", "system_prompt", "extra_body")  # settings recorded only if set


class RequestKey(NamedTuple):
    """A request for a query: the document and the number of the request among those of the document, from 1."""

    doc_id: str
    number: int = 1


def request_key(doc_id: str, name: str | None = None) -> RequestKey:
    """Return the key of a request from its name in a file, `doc_id#number`, or None for the first request."""
    number = name.rpartition("#")[2] if name else ""
    return RequestKey(doc_id, int(number) if number.isdecimal() else 1)


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
        usage: Tokens of all runs on this output.
        written: Number of queries written in this run.

    Raises:
        InputError: Another process holds the output, or its settings differ.
    """

    def __init__(
        self, path: str | None, settings: Mapping[str, Any], force: bool = False, queries_per_doc: int = 1
    ) -> None:
        self.path, self.queries_per_doc = path, queries_per_doc
        self.settings = {n: v for n, v in settings.items() if n not in OPTIONAL or v not in (None, "", {})}
        self.unit = "documents" if queries_per_doc == 1 else "requests"  # what is counted in messages
        self.request: dict[str, Any] | None = None
        self.usage, self.written = NO_TOKENS, 0
        self.done: set[RequestKey] = set()
        self.duplicates: set[RequestKey] = set()
        self.failed: set[RequestKey] = set()
        self._queries: set[int] = set()  # hashes of document and query, with several queries per document
        self._errors: IO[bytes] | None = None  # opened for the first failure
        self._saved_at = 0.0
        if path is not None:
            if path == "-" or is_special(path):
                raise InputError(f"{path}: this is a pipe or a device. Answers are appended to a file: name one.")
            if suffix := SUFFIX.search(path):
                raise InputError(f"{path}: answers are appended to a file without compression. Omit {suffix[0]}.")
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # one write a row: a kill leaves at most the last row torn
            lock(self._file, path)
            repair_last_line(path)
            if os.path.getsize(path):
                self._read_done(path)
            self._read_errors()
            self._read_meta(force)
        self._done_before, self._usage_before = len(self.done), self.usage

    @property
    def answered(self) -> int:
        """Number of requests answered in this run."""
        return len(self.done) - self._done_before

    @property
    def usage_now(self) -> Usage:
        """Tokens of this run."""
        return Usage(*(a - b for a, b in zip(self.usage, self._usage_before, strict=True)))

    def name(self, key: RequestKey) -> str:
        """Return the name of a request in files and messages."""
        return key.doc_id if self.queries_per_doc == key.number == 1 else f"{key.doc_id}#{key.number}"

    def _named(self, key: RequestKey) -> dict[str, str]:
        """Return the field that tells the requests of a document apart, if there are several."""
        return {} if self.name(key) == key.doc_id else {"request": self.name(key)}

    def _read_done(self, path: str) -> None:
        def note(row: SyntheticRow) -> bool:
            key = request_key(str(row.doc_id), row.request)
            self.done.add(key)
            self._is_duplicate(key, row.question)
            return True

        for query in read_synthetic_queries(path, "Reading earlier answers", skip=note):
            note(SyntheticRow(query.doc_id, query.question))

    def _is_duplicate(self, key: RequestKey, question: str) -> bool:
        """Return whether another request of the document had this query, and remember the query."""
        if self.queries_per_doc == key.number == 1:
            return False
        query = hash((key.doc_id, " ".join(question.lower().split())))
        known = query in self._queries
        self._queries.add(query)
        return known

    def _read_errors(self) -> None:
        """Read failures and duplicates, keep the last row of each request, and drop requests that have a row since."""
        path = f"{self.path}.errors.jsonl"
        if not os.path.exists(path):
            return
        repair_last_line(path)
        try:
            with open(path, encoding="utf-8") as file:
                rows = {request_key(row["doc_id"], row.get("request")): row for row in map(json.loads, file)}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: not a file of this script. Delete it to try its documents again.") from None
        rows = {key: row for key, row in rows.items() if key not in self.done}
        self.duplicates = {key for key, row in rows.items() if row.get("reason") == DUPLICATE}
        self.failed = rows.keys() - self.duplicates
        self.done |= self.duplicates
        with atomic_write(path) as file:
            file.writelines(map(json_line, rows.values()))
        if not rows:
            os.remove(path)

    def _read_meta(self, force: bool) -> None:
        path, begun = f"{self.path}.meta.json", bool(self.done or self.failed)
        if not os.path.exists(path):
            if begun:
                warn(f"{self.path}: has rows but no meta.json, so its settings cannot be checked.")
            return
        try:
            with open(path, encoding="utf-8") as file:
                meta = json.load(file)
            before, self.usage = meta["settings"], Usage(**meta["usage"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}: not a file of this script. Delete the file: queries stay, token counts restart."
            ) from None
        if self.settings["api"] is None:
            self.settings["api"] = before["api"]
        # Earlier versions recorded fewer settings.
        names = [name for name in self.settings if name in before and name not in OPTIONAL]
        names = [name for name in (*names, *OPTIONAL) if before.get(name) != self.settings.get(name)]
        if not names:
            self.request = meta.get("request")
        elif begun and not force:
            now = self.settings
            differences = ", ".join(f"{n} {shorten(before.get(n))}, now {shorten(now.get(n))}" for n in names)
            raise InputError(
                f"{self.path}: made with other settings ({differences}). Repeat the earlier settings, name another "
                "--output, or mix both with --force."
            )

    def add_answer(self, key: RequestKey, row: dict[str, Any], usage: Usage) -> None:
        """Write the row of an answered request, or record that its query is a duplicate."""
        self.done.add(key)
        self.failed.discard(key)
        if self._is_duplicate(key, row["question"]):
            self.duplicates.add(key)
            self._append_error(key, DUPLICATE, row["question"])
        elif self.path:
            self.written += 1
            self._append(self._file, row | self._named(key))
        self.add_usage(usage)

    def add_failure(self, key: RequestKey, reason: str, answer: str | None = None, usage: Usage = NO_TOKENS) -> None:
        """Write why a request has no query, and the answer if there was one."""
        self.failed.add(key)
        self._append_error(key, reason, answer)
        self.add_usage(usage)

    def _append_error(self, key: RequestKey, reason: str, answer: str | None) -> None:
        if self.path:
            row = {"doc_id": key.doc_id} | self._named(key)
            row |= {"reason": reason} | ({} if answer is None else {"answer": answer})
            self._errors = self._errors or open(f"{self.path}.errors.jsonl", "ab", buffering=0)
            self._append(self._errors, row)

    def discard_failures(self) -> None:
        """Delete the failures of an output without answers: the setup was wrong, not the documents."""
        self.failed.clear()
        if self._errors:
            self._errors.close()
            os.remove(self._errors.name)
            self._errors = None

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
        """Count tokens."""
        self.usage = self.usage.plus(usage)
        if time.monotonic() - self._saved_at > META_INTERVAL:
            self.save_meta()

    def save_meta(self) -> None:
        """Write OUTPUT.meta.json."""
        if self.path is None:
            return
        import openai

        meta = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "request": self.request,
            "versions": {"python": platform.python_version(), "openai": openai.__version__},
            "usage": self.usage._asdict(),
        }
        with atomic_write(f"{self.path}.meta.json") as file:
            file.write(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        self._saved_at = time.monotonic()

    def failure_reasons(self) -> Counter[str]:
        """Return the number of failed requests by reason."""
        if self.path is None or not os.path.exists(f"{self.path}.errors.jsonl"):
            return Counter()
        with open(f"{self.path}.errors.jsonl", encoding="utf-8") as file:
            last = {request_key(row["doc_id"], row.get("request")): row["reason"][:80] for row in map(json.loads, file)}
        return Counter(reason for reason in last.values() if reason != DUPLICATE)

    def close(self) -> None:
        """Release the output for other processes."""
        if self.path:
            self._file.close()
            if self._errors:
                self._errors.close()


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
        f"{len(lengths) - len(distinct):,} duplicates, {copied:,} copied from the document{mean}"
    )
