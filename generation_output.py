"""The files that generate_queries_openai.py leaves: queries, errors, settings and tokens."""

import fcntl
import json
import os
import platform
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from engine import NO_TOKENS, Usage
from formats import InputError, json_line, read_synthetic_queries, repair_last_line, warn, whole_file


class Output:
    """What a run leaves: OUTPUT, a row for each answer; OUTPUT.errors.jsonl, a row for each document that has none and
    why; OUTPUT.meta.json, the settings and the tokens. One process at a time holds them.

    With `path` None nothing is written (a dry run).
    """

    def __init__(self, path: str | None, settings: dict[str, Any], force: bool = False) -> None:
        self.path, self.settings = path, settings
        self.request: dict[str, Any] | None = None  # how the engine is asked, as an earlier run found it out
        self.usage = self.usage_now = Usage()
        self.answers = self.failures = 0  # now
        self.done: set[str] = set()  # documents with a row of an earlier run
        self.failed: set[str] = set()  # documents that were given up by one
        self.left: set[str] = set()  # documents to be asked for; what is answered or given up leaves it
        self.saved_at = 0.0
        if path is None:
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self.file = open(path, "ab", buffering=0)  # one write a row: a kill leaves whole rows, but for the last perhaps
        self.errors: Any = None  # opened for the first of them
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing to it; wait for it, or stop it") from None
        repair_last_line(path)
        if os.path.getsize(path):
            self.done = {row.doc_id for row in read_synthetic_queries(path)}
        self.read_errors()
        self.read_meta(force)

    def read_errors(self) -> None:
        """The documents that failed: the last word on each, and none that have a row since."""
        path = f"{self.path}.errors.jsonl"
        if not os.path.exists(path):
            return
        repair_last_line(path)
        try:
            with open(path, encoding="utf-8") as file:
                rows = {json.loads(line)["doc_id"]: line for line in file}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not what this script writes; delete it to try its documents again") from None
        self.failed = set(rows) - self.done
        with whole_file(path) as file:
            file.writelines(line for doc_id, line in rows.items() if doc_id in self.failed)
        if not self.failed:
            os.remove(path)

    def read_meta(self, force: bool) -> None:
        path, begun = f"{self.path}.meta.json", bool(self.done or self.failed)
        if not os.path.exists(path):
            if begun:
                warn(
                    f"{self.path} has rows but no {os.path.basename(path)}: whether its settings were these is unknown"
                )
            return
        try:
            with open(path, encoding="utf-8") as file:
                meta = json.load(file)
            before, self.usage = meta["settings"], Usage(**meta["usage"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not what this script writes; delete it, and nothing but it is lost") from None
        if self.settings["api"] is None:
            self.settings["api"] = before["api"]
        names = [name for name in self.settings if before.get(name) != self.settings[name]]
        if not names:
            self.request = meta.get("request")
        elif begun and not force:
            differ = ", ".join(f"{name} {before.get(name)}, now {self.settings[name]}" for name in names)
            raise InputError(
                f"{self.path} was made with other settings ({differ}); give those, name another --output, or mix the "
                "two with --force"
            )

    def write(self, file: Any, row: dict[str, Any]) -> None:
        line = json_line(row).encode(errors="replace")
        end = os.fstat(file.fileno()).st_size
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:  # a full disk; half a row must not stand before the next one
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise

    def answer(self, row: dict[str, Any], usage: Usage) -> None:
        self.answers += 1
        self.left.discard(row["doc_id"])
        if self.path:
            self.write(self.file, row)
        self.count(usage)

    def failure(self, row: dict[str, Any], usage: Usage = NO_TOKENS) -> None:
        """A document without a query: doc_id, reason, and the answer if there was one."""
        self.failures += 1
        self.left.discard(row["doc_id"])
        if self.path:
            self.errors = self.errors or open(f"{self.path}.errors.jsonl", "ab", buffering=0)
            self.write(self.errors, row)
        self.count(usage)

    def reasons(self) -> Counter[str]:
        """Why documents have no query, and how many for each reason."""
        if self.path is None or not os.path.exists(f"{self.path}.errors.jsonl"):
            return Counter()
        with open(f"{self.path}.errors.jsonl", encoding="utf-8") as file:
            last = {row["doc_id"]: row["reason"][:80] for row in map(json.loads, file)}
        return Counter(last.values())

    def count(self, usage: Usage) -> None:
        self.usage, self.usage_now = self.usage.plus(usage), self.usage_now.plus(usage)
        if time.monotonic() - self.saved_at > 1.0:
            self.save()

    def save(self) -> None:
        if self.path is None:
            return
        import openai

        meta = {
            "settings": self.settings,
            "request": self.request,
            "versions": {"python": platform.python_version(), "openai": openai.__version__},
            "usage": self.usage._asdict(),
        }
        with whole_file(f"{self.path}.meta.json") as file:
            file.write(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        self.saved_at = time.monotonic()
