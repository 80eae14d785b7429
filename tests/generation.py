"""Helpers to run generate_queries_openai.py and to read what it wrote."""

import json
import subprocess
from collections import Counter
from pathlib import Path

from conftest import ROOT, Done, command_of, rows, run
from stand_in import document_of

SCRIPT = "generate_queries_openai.py"


def flags(collection: Path, url: str) -> list[object]:
    output = collection.parent / "queries.jsonl"
    server = ["--base_url", url, "--engine", "m"]
    return ["--collection", collection, "--output", output, *server, "--min_doc_chars", 0]


def generate(collection: Path, url: str, *args: object, **environment: str) -> Done:
    return run(SCRIPT, *flags(collection, url), *args, **environment)


def start(collection: Path, url: str, *args: object) -> subprocess.Popen:
    command = command_of(SCRIPT, *flags(collection, url), *args)
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def written(collection: Path) -> dict[str, dict]:
    """Return the rows of the output by doc_id, and check that each is there once."""
    found = rows(collection.parent / "queries.jsonl")
    assert max(Counter(row["doc_id"] for row in found).values(), default=0) <= 1
    return {row["doc_id"]: row for row in found}


def queries(collection: Path) -> dict[str, list[str]]:
    """Return the questions of the output by doc_id, for several queries per document."""
    found: dict[str, list[str]] = {}
    for row in rows(collection.parent / "queries.jsonl"):
        found.setdefault(row["doc_id"], []).append(row["question"])
    return found


def errors(collection: Path) -> dict[str, str]:
    path = collection.parent / "queries.jsonl.errors.jsonl"
    return {row.get("request", row["doc_id"]): row["reason"] for row in rows(path)} if path.exists() else {}


def meta(collection: Path) -> dict:
    return json.loads((collection.parent / "queries.jsonl.meta.json").read_text())


def fails_for(number: int, fault: str, times: int = 10**9) -> object:
    """Return a `fault` of the stand-in that the document of this number meets, the first so many times."""
    left = [times]

    def fault_of(request: dict) -> str | None:
        if document_of(request) != f"number{number}" or not left[0]:
            return None
        left[0] -= 1
        return fault

    return fault_of


EVERY = {f"d{i}" for i in range(20)}
