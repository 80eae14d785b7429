"""Folders of files: which file of a collection, of topics or of qrels is meant."""

import os
import re

from inpars_lib.cli import InputError
from inpars_lib.files import SUFFIX
from inpars_lib.formats.lines import require_file

# Words in the names of files that hold no documents
OTHER_FILES = re.compile(r"(?i)(?<![a-z])(topics?|quer(y|ies)|questions?|qas?|qrels?|runs?|triples|metadata)(?![a-z])")


def collection_files(path: str) -> list[str]:
    """Return the files of a collection: the path itself, or of a folder BEIR's corpus.jsonl, else all by suffix."""
    require_file(path, "a collection is read more than once")
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    plain = {name: SUFFIX.sub("", name) for name in names}
    chosen = [name for name in names if plain[name] == "corpus.jsonl"]
    chosen = chosen or [name for name in names if plain[name].endswith((".tsv", ".jsonl", ".json"))]
    if other := next((name for name in chosen if OTHER_FILES.search(name)), None):
        raise InputError(f"{path}: this folder also has {other}. Name the file of the collection.")
    if other := next((name for name in chosen if name != plain[name] in chosen), None):
        raise InputError(f"{path}: this folder has both {plain[other]} and {other}. Delete one of them.")
    tsv = [name for name in chosen if plain[name].endswith(".tsv")]
    if tsv and len(tsv) < len(chosen):
        other = next(name for name in chosen if name not in tsv)
        raise InputError(f"{path}: this folder has both {tsv[0]} and {other}. Name the file of the collection.")
    if not chosen:
        raise InputError(f"{path}: no .tsv, .jsonl or .json file in this folder, compressed or not. Name a file.")
    return [os.path.join(path, name) for name in chosen]


def beir_file(path: str, *names: str) -> str:
    """Return the path itself, or of a BEIR folder the only file that has one of these names, the likeliest first."""
    if not os.path.isdir(path):
        return path
    found = sorted(name for name in os.listdir(path) if SUFFIX.sub("", name) in names)
    if not found:
        raise InputError(f"{path}: this folder has no {' or '.join(names)}. Name a file.")
    if len(found) > 1:
        likeliest = min(found, key=lambda name: names.index(SUFFIX.sub("", name)))
        example = os.path.join(path, likeliest)
        raise InputError(f"{path}: this folder has {', '.join(found)}. Name a file, for example {example}.")
    return os.path.join(path, found[0])
