"""Every file format of the pipeline, read and written in one place.

    collection         TSV `doc_id<TAB>text`; JSONL `id`/`contents` (Anserini), `_id`/`title`/`text` (BEIR) or
                       `doc_id`/`text`; a folder of such files, or of BEIR's
    topics             TSV `query_id<TAB>text`, JSONL `_id`/`text` (BEIR)
    qrels              TREC, four columns; BEIR, three columns under a header line
    run                TREC, six columns; MS MARCO, `query_id<TAB>doc_id<TAB>rank`
    synthetic queries  JSONL `doc_id`, `doc_text`, `question`, `log_probs`, as in the published InPars sets
    triples            TSV `query<TAB>positive<TAB>negative`

Any of them but triples may be gzipped. Collection, topics and qrels may also be `ir_datasets:NAME`, with that package
installed. Ids are strings and stay as they are written: "007" is not "7". Readers are
generators of named tuples. A line that cannot be used is reported with its number and skipped; a file without one
usable line, and whatever would change a result in silence, raises `InputError`.
"""

import array
import gzip
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

SHOWN_PROBLEMS = 3  # malformed lines quoted before they are only counted

T = TypeVar("T")


class InputError(Exception):
    """What the user gave cannot be used. Its text is the sentence they read: file, line, what is wrong, what to do."""


class Doc(NamedTuple):
    doc_id: str
    text: str  # one line: tabs and line breaks have become blanks


class Topic(NamedTuple):
    query_id: str
    text: str


class Qrel(NamedTuple):
    query_id: str
    doc_id: str
    relevance: int


class ScoredDoc(NamedTuple):
    query_id: str
    doc_id: str
    score: float


class Hits(Sequence[ScoredDoc]):
    """The hits of a query, best first: 16 bytes each beside their ids, where tuples would take 200."""

    def __init__(self, query_id: str, doc_ids: list[str], scores: Iterable[float]) -> None:
        self.query_id, self.doc_ids, self.scores = query_id, doc_ids, array.array("d", scores)

    def __len__(self) -> int:
        return len(self.doc_ids)

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Hits(self.query_id, self.doc_ids[at], self.scores[at])
        return ScoredDoc(self.query_id, self.doc_ids[at], self.scores[at])

    def __iter__(self) -> Iterator[ScoredDoc]:
        return (ScoredDoc(self.query_id, *hit) for hit in zip(self.doc_ids, self.scores, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class SyntheticQuery(NamedTuple):
    line: int  # of the file, counted from 0 as in upstream's files of ids
    doc_id: str
    doc_text: str
    question: str  # one line; empty where the language model gave no question
    log_probs: list[float] | None  # natural logarithms, one a token of the question; None where the row has none
    row: dict[str, Any]  # the whole JSON object


class Triple(NamedTuple):
    query: str
    positive: str
    negative: str


# ------------------------------------------------------------------------------------------------ words for the user


def warn(message: str) -> None:
    """Say something on stderr, above a running progress bar and not through it."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def in_short(message: object) -> str:
    """What somebody else's error says, without its line ends, not at length."""
    return " ".join(str(message).split())[:300]


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. What a user can mend ends in one sentence and exit code 1, never in a traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; what was written stays, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.strerror is None:  # a library's own error under this name: not a word that would help is in it
            raise
        sys.exit(f"error: {error.filename or 'a file of this run'}: {error.strerror}")


# ----------------------------------------------------------------------------------------------------- reading lines


def files_of(path: str) -> list[str]:
    """The files of a collection: itself, or of a folder BEIR's corpus.jsonl, or all that look like one, by name."""
    if not os.path.isdir(path):
        return [path]
    names = sorted(os.listdir(path))
    chosen = [name for name in names if name in ("corpus.jsonl", "corpus.jsonl.gz")][:1]
    chosen = chosen or [name for name in names if name.removesuffix(".gz").endswith((".tsv", ".jsonl", ".json"))]
    if not chosen:
        raise InputError(f"{path} is a folder without a .tsv, .jsonl or .json file, gzipped or not; name one with them")
    return [os.path.join(path, name) for name in chosen]


def _lines(paths: list[str], desc: str | None = None) -> Iterator[tuple[str, int, bytes]]:
    """Yield (path, line number from 1, line without its end). `desc` shows a progress bar over the bytes of all."""
    from tqdm import tqdm

    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder; name a file")
    sizes = list(map(os.path.getsize, paths))
    with tqdm(desc=desc, total=sum(sizes), unit="B", unit_scale=True, disable=desc is None) as bar:
        for i, path in enumerate(paths):
            before = sum(sizes[:i])
            with open(path, "rb") as raw:
                zipped = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                try:
                    for number, line in enumerate(gzip.GzipFile(fileobj=raw) if zipped else raw, 1):
                        if number == 1:
                            line = line.removeprefix(b"\xef\xbb\xbf")
                        elif number % 4096 == 0:
                            bar.update(before + raw.tell() - bar.n)
                        yield path, number, line.rstrip(b"\r\n")
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise InputError(f"{path}: the gzip data is broken ({error}); get the file again") from None
                bar.update(before + raw.tell() - bar.n)


def _records(
    path: str, parse: Callable[[str], T | None], form: str, desc: str | None = None, paths: list[str] | None = None
) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, parse(line)) for each line that `parse` does not refuse with a ValueError.

    Blank lines and lines for which `parse` gives None are passed over. `form` says in an error what a line should be.
    `paths` are the files if `path` is a folder.
    """
    usable = refused = 0
    for file, number, line in _lines(paths or [path], desc):
        if not line.strip():
            continue
        try:
            record = parse(line.decode())
        except ValueError as error:
            refused += 1
            if refused <= SHOWN_PROBLEMS:
                reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else error
                warn(f"{file}, line {number}: {reason}; the line is left out")
            continue
        if record is not None:
            usable += 1
            yield number, record
    if refused > SHOWN_PROBLEMS:
        warn(f"{path}: {refused:,} of {usable + refused:,} lines left out, the first {SHOWN_PROBLEMS} shown above")
    if not usable:
        raise InputError(f"{path}: not one usable line in it; expected {form}")


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"the id {value!r} is neither a string nor a whole number")
    value = str(value)
    if not value:
        raise ValueError("the id is empty")
    if value.split() != [value]:
        raise ValueError(f"the id {value!r} has a blank in it, which a TREC run cannot hold")
    return value


def _string(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field, "")
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is not a string")
    return value


_BREAKS = re.compile("[\t\n\r\v\f\x00\x1c-\x1e\x85\u2028\u2029]+")


def one_line(text: str) -> str:
    """`text` with every run of tabs, line breaks and NUL bytes made one blank, so that it can stand in a TSV column."""
    return _BREAKS.sub(" ", text).strip()


def _joined(row: Mapping[str, Any]) -> str:
    """The text of a document that is a JSON object: its contents, or its title and its text."""
    return one_line(
        _string(row, "contents") if "contents" in row else f"{_string(row, 'title')} {_string(row, 'text')}"
    )


def text_of(stored: str) -> str:
    """The text of a document as an index stores it: as it is, or as a JSON object."""
    return _joined(_json_object(stored)) if stored.startswith("{") else one_line(stored)


def _id_and_text(line: str) -> tuple[str, str]:
    """A line of a collection or of topics, in any of the spellings that the top of this file lists."""
    if not line.startswith("{"):
        record_id, tab, text = line.partition("\t")
        if not tab:
            raise ValueError("no tab between id and text")
        return _id(record_id), one_line(text)
    row = _json_object(line)
    for name in ("_id", "id", "doc_id", "query_id"):
        if name in row:
            return _id(row[name]), _joined(row)
    raise ValueError("none of the fields _id, id, doc_id, query_id")


def _columns(line: str, *counts: int) -> list[str]:
    columns = line.split()
    if len(columns) not in counts:
        raise ValueError(f"{len(columns)} columns where {' or '.join(map(str, counts))} belong")
    return columns


def _number(word: str, kind: type[T]) -> T:
    try:
        value = kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a {'whole ' if kind is int else ''}number") from None
    if not math.isfinite(value):
        raise ValueError(f"{word!r} is not a finite number")
    return value


# ------------------------------------------------------------------------------------------------------- ir_datasets


def _ir_dataset(name: str, part: str) -> Any:
    """A data set of the package ir_datasets, which downloads it when it is read.

    Raises:
        InputError: the package is not installed, it knows no such set, or the set has no such part.
    """
    try:
        import ir_datasets
    except ImportError:
        raise InputError(f"ir_datasets:{name} needs a package that is not here: pip install ir_datasets") from None
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise InputError(f"ir_datasets knows no {name}; its names are listed at https://ir-datasets.com") from None
    if not getattr(dataset, f"has_{part}")():
        raise InputError(f"ir_datasets:{name} has no {part}; choose one that has, as listed at https://ir-datasets.com")
    return dataset


def _texts(path: str, desc: str | None = None) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield (line number, (id, text)) of a collection."""
    scheme, _, name = path.partition(":")
    if scheme != "ir_datasets":
        yield from _records(path, _id_and_text, _TEXTS, desc, files_of(path))
        return
    from tqdm import tqdm

    dataset = _ir_dataset(name, "docs")
    bar = tqdm(dataset.docs_iter(), desc=desc, total=dataset.docs_count(), unit=" docs", disable=desc is None)
    for number, doc in enumerate(bar, 1):
        try:
            yield number, (_id(doc.doc_id), one_line(doc.default_text()))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None


# ----------------------------------------------------------------------------------------------------------- readers

_TEXTS = "`id<TAB>text`, or JSON objects with `id` and `contents`, `_id` and `text`, or `doc_id` and `text`"


def two_texts(path: str, doc_id: str) -> InputError:
    return InputError(f"{path}: the id {doc_id} stands on two lines with different texts; keep one of them")


def read_collection(path: str, wanted: Collection[str] | None = None, desc: str | None = None) -> Iterator[Doc]:
    """Yield the documents of a collection in the order of the file: all, or those with an id in `wanted`, each once.

    Raises:
        InputError: no usable line, or an id of `wanted` on two lines with different texts.
    """
    seen: dict[str, int] = {}
    for _, (doc_id, text) in _texts(path, desc):
        if wanted is None:
            yield Doc(doc_id, text)
        elif doc_id in wanted:
            if doc_id not in seen:  # a line that is there twice is one document
                seen[doc_id] = hash(text)
                yield Doc(doc_id, text)
            elif seen[doc_id] != hash(text):
                raise two_texts(path, doc_id)


def read_texts(path: str, wanted: Collection[str], desc: str | None = None) -> dict[str, str]:
    """The texts of the wanted documents that the collection has, by id, in one pass and without holding the rest."""
    return dict(read_collection(path, wanted, desc))


def read_topics(path: str) -> dict[str, str]:
    """The topics of a file: text by query id, in the order of the file.

    Raises:
        InputError: no usable line, or a query id on two lines.
    """
    topics: dict[str, str] = {}
    scheme, _, name = path.partition(":")
    if scheme == "ir_datasets":
        queries = _ir_dataset(name, "queries").queries_iter()
        return {_id(query.query_id): one_line(query.default_text()) for query in queries}
    for number, (query_id, text) in _records(path, _id_and_text, _TEXTS):
        if query_id in topics:
            raise InputError(f"{path}, line {number}: the query id {query_id} was there before; keep one of the two")
        topics[query_id] = text
    return topics


def read_qrels(path: str) -> Iterator[Qrel]:
    """Yield the judgements of a qrels file.

    Raises:
        InputError: no usable line, or a document judged twice for a query, and differently.
    """

    scheme, _, name = path.partition(":")
    if scheme == "ir_datasets":
        for qrel in _ir_dataset(name, "qrels").qrels_iter():
            yield Qrel(qrel.query_id, qrel.doc_id, qrel.relevance)
        return

    def parse(line: str) -> Qrel | None:
        columns = _columns(line, 3, 4)
        if columns == ["query-id", "corpus-id", "score"]:  # the header line of BEIR
            return None
        return Qrel(columns[0], columns[-2], _number(columns[-1], int))

    seen: dict[tuple[str, str], int] = {}
    for number, qrel in _records(path, parse, "`query_id 0 doc_id relevance`, or BEIR's three columns"):
        if seen.setdefault(qrel[:2], qrel.relevance) != qrel.relevance:
            raise InputError(
                f"{path}, line {number}: query {qrel.query_id} and document {qrel.doc_id} were judged differently "
                "before; keep one of the two judgements"
            )
        yield qrel


def read_run(path: str, query_ids: Collection[str] | None = None, desc: str | None = None) -> dict[str, Hits]:
    """The hits of a run by query, best first: by score, ties by the rank that the file gives.

    The kind of run is found from its columns. MS MARCO's has no scores: minus the rank stands in for them.

    Args:
        query_ids: only these queries are kept.

    Raises:
        InputError: no usable line, or a document twice among the hits of a query.
    """

    def parse(line: str) -> tuple[str, str, float, int]:
        columns = _columns(line, 3, 6)
        if len(columns) == 3:
            rank = _number(columns[2], int)
            return columns[0], columns[1], -float(rank), rank
        return columns[0], columns[2], _number(columns[4], float), _number(columns[3], int)

    found: dict[str, tuple[list[str], array.array, array.array]] = {}
    shared: dict[str, str] = {}  # a document that many queries have found is one string
    form = "TREC's six columns `query_id Q0 doc_id rank score tag`, or `query_id<TAB>doc_id<TAB>rank`"
    for _, (query_id, doc_id, score, rank) in _records(path, parse, form, desc):
        if query_ids is None or query_id in query_ids:
            if query_id not in found:
                found[query_id] = [], array.array("d"), array.array("q")
            doc_ids, scores, ranks = found[query_id]
            doc_ids.append(shared.setdefault(doc_id, doc_id))
            scores.append(score)
            ranks.append(rank)
    run: dict[str, Hits] = {}
    for query_id in list(found):
        doc_ids, scores, ranks = found.pop(query_id)
        if len(set(doc_ids)) < len(doc_ids):
            raise InputError(
                f"{path}: query {query_id} has a document twice among its hits; a run holds each only once"
            )
        order = sorted(range(len(doc_ids)), key=lambda i: (-scores[i], ranks[i]))
        run[query_id] = Hits(query_id, [doc_ids[i] for i in order], (scores[i] for i in order))
    return run


def read_synthetic_queries(path: str, desc: str | None = None) -> Iterator[SyntheticQuery]:
    """Yield the rows of a file of synthetic queries, our own or a published one.

    Raises:
        InputError: no usable line.
    """

    def parse(line: str) -> tuple[str, str, str, list[float] | None, dict[str, Any]]:
        row = _json_object(line)
        if "doc_id" not in row or "question" not in row:
            raise ValueError("no field 'doc_id' or no field 'question'")
        log_probs = row.get("log_probs")
        if log_probs is not None:
            if not isinstance(log_probs, list):
                raise ValueError("'log_probs' is not a list")
            if not all(type(x) in (int, float) and math.isfinite(x) for x in log_probs):
                raise ValueError("'log_probs' holds something that is not a finite number")
        question = " ".join(_string(row, "question").split())
        return _id(row["doc_id"]), one_line(_string(row, "doc_text")), question, log_probs, row

    for number, fields in _records(
        path, parse, "JSON objects with `doc_id`, `doc_text`, `question`, `log_probs`", desc
    ):
        yield SyntheticQuery(number - 1, *fields)


class Triples:
    """The triples of a file as a sequence that stays on disk: 16 bytes of memory each, whatever their length.

    Raises:
        InputError: no usable line.
    """

    def __init__(self, path: str) -> None:
        usable = [number for number, _ in _records(path, self._parse, "`query<TAB>positive<TAB>negative`")]
        self._file = open(path, "rb")
        ends = array.array("q", [0])
        for line in self._file:
            ends.append(ends[-1] + len(line))
        self._spans = array.array("q", (ends[i] for number in usable for i in (number - 1, number)))

    @staticmethod
    def _parse(line: str) -> Triple:
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 3 or not all(columns):
            raise ValueError("not three texts with a tab between them")
        return Triple(*columns)

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, i: int) -> Triple:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self._spans[2 * i : 2 * i + 2]
        return self._parse(os.pread(self._file.fileno(), end - start, start).decode().removeprefix("\ufeff"))


# ----------------------------------------------------------------------------------------------------------- writers


@contextmanager
def whole_file(path: str, mode: str = "w") -> Iterator[Any]:
    """A file to write that appears under its name only when the block has ended well; the old one stays till then."""
    beside = f"{path}.unfinished"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(
            beside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n", "errors": "replace"})
        ) as file:
            yield file
        os.replace(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(beside)
        raise


def tsv_line(*columns: str) -> str:
    """A line of a TSV file, its end included: a triple, say. No column can break it in two."""
    return "\t".join(map(one_line, columns)) + "\n"


def write_texts(path: str, texts: Iterable[Doc | Topic]) -> None:
    """Write a collection or topics as TSV."""
    with whole_file(path) as file:
        file.writelines(tsv_line(*text) for text in texts)


def write_qrels(path: str, qrels: Iterable[Qrel]) -> None:
    """Write judgements in TREC's four columns."""
    with whole_file(path) as file:
        file.writelines(f"{query_id} 0 {doc_id} {relevance}\n" for query_id, doc_id, relevance in qrels)


def write_run(path: str, hits: Iterable[ScoredDoc], tag: str) -> None:
    """Write a TREC run. Hits come best first within their query; ranks count from 1."""
    ranks: dict[str, int] = {}
    with whole_file(path) as file:
        for query_id, doc_id, score in hits:
            ranks[query_id] = ranks.get(query_id, 0) + 1
            file.write(f"{query_id} Q0 {doc_id} {ranks[query_id]} {score:.6f} {tag}\n")


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSONL, its end included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def repair_last_line(path: str) -> None:
    """Make an append-only JSONL file end with a whole line, as it may not after a kill in the middle of a write."""
    with open(path, "rb+") as file:
        whole, line = 0, b"\n"
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        if not line.endswith(b"\n"):
            try:
                json.loads(line)
                file.write(b"\n")  # only the line's end was missing
            except ValueError:
                file.truncate(whole)


class Journal:
    """What a long run has finished, on disk as soon as it is made: JSONL, whose first line says what it is of.

    A journal of other settings is begun anew. A last line that a kill tore is passed over.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self._file: Any = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield what was finished before."""
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8", errors="replace") as file, suppress(ValueError):
                if json.loads(file.readline() or "null") == self.settings:
                    yield from map(json.loads, file)

    def open(self) -> None:
        """Begin to write, after what was there if its settings are these."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self._file = open(self.path, "ab+")
        repair_last_line(self.path)
        self._file.seek(0)
        with suppress(ValueError):
            if json.loads(self._file.readline() or b"null") == self.settings:
                return
        self._file.truncate(0)
        self.write(self.settings)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json_line(row).encode(errors="replace"))
        self._file.flush()
