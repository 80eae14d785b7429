"""The files that generate_queries_openai.py writes: queries, errors, settings and token counts."""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import IO, Any

from inpars_lib.cli import InputError, warn
from inpars_lib.formats import SyntheticRow, read_synthetic_queries
from inpars_lib.llm.tokens import NO_TOKENS, Usage
from inpars_lib.storage import FORMAT_VERSION, atomic_write, is_special, json_line, lock, repair_last_line

META_INTERVAL = 1.0  # seconds between two writes of OUTPUT.meta.json


class QueryStore:
    """Output of generation: OUTPUT (answers), OUTPUT.errors.jsonl (failures), OUTPUT.meta.json (settings, tokens).

    One process at a time may hold an output. With `path` None nothing is written (a dry run).

    Args:
        path: OUTPUT, or None.
        settings: Everything that decides the queries. Other settings than before are refused.
        force: Accept other settings than before.

    Attributes:
        done: Ids of documents with a row.
        failed: Ids of documents that were given up.
        request: State of `ModelApi` that an earlier run found out, or None.
        usage: Tokens of all runs on this output.

    Raises:
        InputError: Another process holds the output, or its settings differ.
    """

    def __init__(self, path: str | None, settings: Mapping[str, Any], force: bool = False) -> None:
        self.path, self.settings = path, dict(settings)
        self.request: dict[str, Any] | None = None
        self.usage = NO_TOKENS
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self._errors: IO[bytes] | None = None  # opened for the first failure
        self._saved_at = 0.0
        if path is not None:
            if is_special(path):
                raise InputError(f"{path}: this is a pipe or a device. Answers are appended to a file: name one.")
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # one write a row: a kill leaves at most the last row torn
            lock(self._file, path)
            repair_last_line(path)
            if os.path.getsize(path):
                self.done = self._read_done(path)
            self._read_errors()
            self._read_meta(force)
        self._done_before, self._usage_before = len(self.done), self.usage

    @property
    def answered(self) -> int:
        """Number of documents answered in this run."""
        return len(self.done) - self._done_before

    @property
    def usage_now(self) -> Usage:
        """Tokens of this run."""
        return Usage(*(a - b for a, b in zip(self.usage, self._usage_before, strict=True)))

    @staticmethod
    def _read_done(path: str) -> set[str]:
        done: set[str] = set()

        def note(row: SyntheticRow) -> bool:
            done.add(str(row.doc_id))
            return True

        for query in read_synthetic_queries(path, "Reading earlier answers", skip=note):
            done.add(query.doc_id)
        return done

    def _read_errors(self) -> None:
        """Read the failures, keep the last row of each document, and drop documents that have a row since."""
        path = f"{self.path}.errors.jsonl"
        if not os.path.exists(path):
            return
        repair_last_line(path)
        try:
            with open(path, encoding="utf-8") as file:
                rows = {json.loads(line)["doc_id"]: line for line in file}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not a file of this script. Delete it to try its documents again.") from None
        self.failed = set(rows) - self.done
        with atomic_write(path) as file:
            file.writelines(line for doc_id, line in rows.items() if doc_id in self.failed)
        if not self.failed:
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
            raise InputError(f"{path}: not a file of this script. Delete it; no query is lost.") from None
        if self.settings["api"] is None:
            self.settings["api"] = before["api"]
        # Earlier versions recorded fewer settings.
        names = [name for name in self.settings if name in before and before[name] != self.settings[name]]
        if not names:
            self.request = meta.get("request")
        elif begun and not force:
            differences = ", ".join(f"{name} {before[name]}, now {self.settings[name]}" for name in names)
            raise InputError(
                f"{self.path}: made with other settings ({differences}). Use those settings, name another --output, or "
                "mix both with --force."
            )

    def add_answer(self, row: dict[str, Any], usage: Usage) -> None:
        """Write the row of an answered document."""
        self.done.add(row["doc_id"])
        self.failed.discard(row["doc_id"])
        if self.path:
            self._append(self._file, row)
        self.add_usage(usage)

    def add_failure(self, row: dict[str, Any], usage: Usage = NO_TOKENS) -> None:
        """Write why a document has no query: doc_id, reason, and the answer if there was one."""
        self.failed.add(row["doc_id"])
        if self.path:
            self._errors = self._errors or open(f"{self.path}.errors.jsonl", "ab", buffering=0)
            self._append(self._errors, row)
        self.add_usage(usage)

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
        """Return the number of failed documents by reason."""
        if self.path is None or not os.path.exists(f"{self.path}.errors.jsonl"):
            return Counter()
        with open(f"{self.path}.errors.jsonl", encoding="utf-8") as file:
            last = {row["doc_id"]: row["reason"][:80] for row in map(json.loads, file)}
        return Counter(last.values())

    def close(self) -> None:
        """Release the output for other processes."""
        if self.path:
            self._file.close()
            if self._errors:
                self._errors.close()


def summarize_queries(path: str) -> str:
    """Return a line on all queries of an output: lengths, duplicates, copies, mean log-probability."""
    lengths: Counter[int] = Counter()
    distinct: set[int] = set()
    copied = scored = 0
    log_probs = 0.0
    for row in read_synthetic_queries(path):
        lengths[len(row.question.split())] += 1
        distinct.add(hash(row.question.lower()))
        copied += row.question.lower() in row.doc_text.lower()
        if row.log_probs:
            scored += 1
            log_probs += sum(row.log_probs) / len(row.log_probs)
    in_order = (length for length in sorted(lengths) for _ in range(lengths[length]))
    median = next(islice(in_order, lengths.total() // 2, None))
    mean = f"; mean log-probability {log_probs / scored:.3f}" if scored else ""
    return (
        f"questions: {min(lengths)} to {max(lengths)} words, median {median}; "
        f"{lengths.total() - len(distinct):,} duplicates, {copied:,} copied from the document{mean}"
    )
