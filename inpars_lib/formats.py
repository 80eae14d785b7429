"""Every file format of the pipeline: readers and writers.

    collection         TSV `doc_id<TAB>text`; JSONL `id`/`contents` (Anserini), `_id`/`title`/`text` (BEIR) or
                       `doc_id`/`text`; a folder of such files, or of a BEIR data set
    topics             TSV `query_id<TAB>text`; JSONL `_id`/`text` (BEIR); TREC, see `trec_topics.py`
    qrels              TREC, four columns; BEIR, three columns below a header line
    run                TREC, six columns; MS MARCO, `query_id<TAB>doc_id<TAB>rank`; ColBERT, the same and the score
    synthetic queries  JSONL `doc_id`, `doc_text`, `question`, `log_probs`, as in the published InPars sets
    triples            TSV `query<TAB>positive<TAB>negative` (read by `triples.py`)

Every file may be compressed, see `compression.py`. `-` is standard input, except for collection and triples.
Collection, topics and qrels may also be `ir_datasets:NAME`, if that package is installed. Ids are strings and stay as
written: "007" is not "7". Readers yield the named tuples of `records.py`. A malformed line is reported with its number
and skipped. A file without a usable line raises `InputError`.
"""

import array
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain

import msgspec

from inpars_lib.cli import InputError
from inpars_lib.compression import SUFFIX
from inpars_lib.ir_dataset import download_errors, ir_dataset
from inpars_lib.line_parsers import (
    TEXT_FORM,
    json_object,
    parse_id,
    parse_number,
    parse_text,
    parse_topic,
    single_line,
    split_columns,
    string_field,
)
from inpars_lib.records import Doc, Qrel, RankedList, ScoredDoc, SyntheticQuery, Topic
from inpars_lib.storage import atomic_write
from inpars_lib.text_lines import read_blocks, read_records
from inpars_lib.trec_topics import topics_as_tsv

LARGEST = 1e300  # bound of log-probabilities, whose sum must be finite
NOT_FINITE = "'log_probs' contains something other than finite numbers"
OBJECT = ord("{")
OTHER_FILES = re.compile(r"(?i)(dev|train|test|synthetic|filtered)?[._-]?(topics|quer(y|ies)|qrels|runs?|triples)\b")
RUN_SCORE = ".9g"  # of the scores in a run: enough digits for every float32

# -------------------------------------------------------------------------------------- collection, topics, qrels


def collection_files(path: str) -> list[str]:
    """Return the files of a collection: the path itself, or of a folder BEIR's corpus.jsonl, else all by suffix."""
    if path == "-":
        raise InputError("-: a collection is read more than once. Write it to a file first.")
    if not os.path.isdir(path):
        return [path]
    names = sorted(os.listdir(path))
    plain = {name: SUFFIX.sub("", name) for name in names}
    chosen = [name for name in names if plain[name] == "corpus.jsonl"]
    chosen = chosen or [name for name in names if plain[name].endswith((".tsv", ".jsonl", ".json"))]
    if other := next((name for name in chosen if OTHER_FILES.match(name)), None):
        raise InputError(f"{path}: this folder also has {other}. Name the file of the collection.")
    if other := next((name for name in chosen if name != plain[name] in chosen), None):
        raise InputError(f"{path}: this folder has both {plain[other]} and {other}. Delete one of them.")
    if not chosen:
        raise InputError(f"{path}: no .tsv, .jsonl or .json file in this folder, compressed or not. Name a file.")
    return [os.path.join(path, name) for name in chosen]


def collection_fingerprint(path: str) -> str:
    """Return a hash of the sizes and of the first and last 64 KiB of a collection's files."""
    digest = hashlib.sha256()
    if path.startswith("ir_datasets:"):
        digest.update(path.encode())
        return digest.hexdigest()
    for name in collection_files(path):
        with open(name, "rb") as file:
            size = os.path.getsize(name)
            digest.update(f"{size}\n".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()


def _read_docs(path: str, wanted: Collection[str] | None, desc: str | None) -> Iterator[Doc]:
    """Yield the documents of a collection. Some that are not wanted are skipped early, before they are decoded."""
    scheme, _, name = path.partition(":")
    if scheme != "ir_datasets":

        def select(lines: list[bytes]) -> list[tuple[int, bytes]]:
            return [
                (i, line)
                for i, line in enumerate(lines)
                if (columns := line.partition(b"\t"))[0].decode(errors="replace") in ids
                or not columns[1]
                or line[0] == OBJECT
            ]

        ids = wanted or ()
        blocks = read_blocks(collection_files(path), desc)
        for _, doc in read_records(blocks, parse_text, TEXT_FORM, path, None if wanted is None else select):
            yield doc
        return
    from tqdm import tqdm

    dataset = ir_dataset(name, "docs")
    with download_errors(path):
        docs, total = iter(dataset.docs_iter()), dataset.docs_count()
        first = next(docs, None)  # downloads the data set
    for doc in tqdm(chain([first] if first else [], docs), desc=desc, total=total, unit=" docs", disable=desc is None):
        try:
            yield Doc(parse_id(doc.doc_id), single_line(doc.default_text()))
        except ValueError as error:
            raise InputError(f"{path}: {error}. Choose another data set.") from None


def conflicting_texts(path: str, doc_id: str) -> InputError:
    """Return the error for an id that two lines give different texts."""
    return InputError(f"{path}: the id {doc_id} is on two lines with different texts. Delete one of them.")


def missing_documents(corpus: str, absent: int, total: int, example: str) -> InputError:
    """Return the error for hits whose documents are not in the collection."""
    return InputError(
        f"{corpus}: {absent:,} of the {total:,} documents to score are not in this collection ({example} for example). "
        "Pass the collection of the run or of the index with --corpus."
    )


def read_collection(
    path: str, wanted: Collection[str] | None = None, desc: str | None = None, repeats: bool = False
) -> Iterator[Doc]:
    """Yield the documents of a collection in file order.

    Args:
        path: File, folder or `ir_datasets:NAME`.
        wanted: Ids of the documents to yield, each once; None for every line.
        desc: Label of a progress bar, or None for no bar.
        repeats: Yield every line of a wanted id, however often it is repeated.

    Raises:
        InputError: No line is usable, or a wanted id is on two lines with different texts.
    """
    seen: dict[str, int] = {}
    for doc in _read_docs(path, wanted, desc):
        if wanted is None or (repeats and doc.doc_id in wanted):
            yield doc
        elif doc.doc_id in wanted:
            if doc.doc_id not in seen:  # a repeated line is one document
                seen[doc.doc_id] = hash(doc.text)
                yield doc
            elif seen[doc.doc_id] != hash(doc.text):
                raise conflicting_texts(path, doc.doc_id)


def read_texts(path: str, wanted: Collection[str], desc: str | None = None) -> dict[str, str]:
    """Return the texts of the wanted documents by id, in one pass that keeps no other text in memory."""
    return {doc.doc_id: doc.text for doc in read_collection(path, wanted, desc)}


def _beir_file(path: str, *names: str) -> str:
    """Return the path itself, or of a BEIR folder the only file that has one of these names."""
    if not os.path.isdir(path):
        return path
    found = sorted(name for name in os.listdir(path) if SUFFIX.sub("", name) in names)
    if len(found) != 1:
        raise InputError(f"{path}: this folder has {', '.join(found) or 'no ' + ' or '.join(names)}. Name a file.")
    return os.path.join(path, found[0])


def read_topics(path: str) -> dict[str, str]:
    """Return the topics of a file or of a BEIR folder, text by query id, in file order.

    Raises:
        InputError: No line is usable, or a query id is on two lines.
    """
    topics: dict[str, str] = {}
    scheme, _, name = path.partition(":")
    if scheme == "ir_datasets":
        dataset = ir_dataset(name, "queries")
        with download_errors(path):
            return {parse_id(query.query_id): single_line(query.default_text()) for query in dataset.queries_iter()}
    blocks = topics_as_tsv(read_blocks([_beir_file(path, "queries.jsonl")]))
    for number, (query_id, text) in read_records(blocks, parse_topic, f"{TEXT_FORM}, or a TREC topic", path):
        if query_id in topics:
            raise InputError(f"{path}, line {number}: the query id {query_id} is repeated. Keep one of its lines.")
        topics[query_id] = text
    return topics


def read_qrels(path: str) -> Iterator[Qrel]:
    """Yield the judgements of a qrels file, or of a BEIR folder with one.

    Raises:
        InputError: No line is usable, a grade is not whole, or a document has two different grades for a query.
    """
    scheme, _, name = path.partition(":")
    if scheme == "ir_datasets":
        dataset = ir_dataset(name, "qrels")
        with download_errors(path):
            qrels = [Qrel(qrel.query_id, qrel.doc_id, qrel.relevance) for qrel in dataset.qrels_iter()]
        yield from qrels
        return

    widths: tuple[int, ...] = 3, 4  # columns that a line may have: as many as the first

    def parse(line: str) -> tuple[str, str, float] | None:
        nonlocal widths
        columns = split_columns(line, widths)
        is_header = columns == ["query-id", "corpus-id", "score"]  # BEIR's
        qrel = None if is_header else (columns[0], columns[-2], parse_number(columns[-1], float))
        widths = (len(columns),)
        return qrel

    seen: dict[tuple[str, str], int] = {}
    folder = os.path.join(path, "qrels")
    path = _beir_file(folder if os.path.isdir(folder) else path, "dev.tsv", "test.tsv", "train.tsv")
    form = "`query_id 0 doc_id grade`, or BEIR's three columns"
    for number, (query_id, doc_id, grade) in read_records(read_blocks([path]), parse, form, path):
        if not grade.is_integer():  # to skip the line would change the measures
            raise InputError(f"{path}, line {number}: the grade {grade} is not a whole number. Use whole grades.")
        qrel = Qrel(query_id, doc_id, int(grade))
        if seen.setdefault(qrel[:2], qrel.relevance) != qrel.relevance:
            raise InputError(
                f"{path}, line {number}: query {qrel.query_id} and document {qrel.doc_id} have another grade on an "
                "earlier line. Keep one of the two judgements."
            )
        yield qrel


# ------------------------------------------------------------------------------------ runs, queries, triples


def read_run(
    path: str, query_ids: Collection[str] | None = None, desc: str | None = None
) -> dict[str, Sequence[ScoredDoc]]:
    """Return the hits of a run by query, best first: by score, ties by the rank in the file.

    The number of columns tells TREC's, ColBERT's and MS MARCO's formats apart. MS MARCO's has no scores: minus the
    rank replaces them.

    Args:
        path: The run.
        query_ids: Queries to keep, or None for all.
        desc: Label of a progress bar, or None for no bar.

    Raises:
        InputError: No line is usable, a query lists a document twice, or the meaning of a column is ambiguous.
    """
    widths: tuple[int, ...] = 3, 4, 6  # columns that a line may have: as many as the first

    def parse(line: str) -> tuple[str, str, float, int]:
        nonlocal widths
        columns = split_columns(line, widths)
        after_q0 = len(columns) == 6  # TREC's Q0 shifts the other columns by one
        rank = parse_number(columns[2 + after_q0], int)
        score = -float(rank) if len(columns) == 3 else parse_number(columns[3 + after_q0], float)
        widths = (len(columns),)
        return columns[0], columns[1 + after_q0], score, rank

    found: dict[str, tuple[list[str], array.array[float], array.array[int]]] = {}
    interned: dict[str, str] = {}  # one string object per document, however many queries retrieve the document
    form = "TREC's `query_id Q0 doc_id rank score tag`, `query_id doc_id rank score` or `query_id doc_id rank`"
    for _, (query_id, doc_id, score, rank) in read_records(read_blocks([path], desc), parse, form, path):
        if query_ids is None or query_id in query_ids:
            if query_id not in found:
                found[query_id] = [], array.array("d"), array.array("q")
            doc_ids, scores, ranks = found[query_id]
            doc_ids.append(interned.setdefault(doc_id, doc_id))
            scores.append(score)
            ranks.append(rank)
    run: dict[str, Sequence[ScoredDoc]] = {}
    for query_id in list(found):
        doc_ids, scores, ranks = found.pop(query_id)
        if widths == (4,):
            falling = [score for _, score in sorted(zip(ranks, scores, strict=True))] == sorted(scores, reverse=True)
            ambiguous = interned.keys() <= {"0", "Q0"} or (len(scores) > 1 and _could_be_ranks(scores))
            if ambiguous or not (falling and _could_be_ranks(ranks)):
                raise InputError(
                    f"{path}: the four columns of query {query_id} are not clearly `query_id doc_id rank score`. "
                    "Convert the run to TREC format."
                )
        elif all(score == -rank for score, rank in zip(scores, ranks, strict=True)) and (
            min(ranks) < 1 or len(set(ranks)) < len(ranks) or (len(ranks) > 1 and list(ranks) == sorted(ranks)[::-1])
        ):
            # A third column that falls or repeats holds scores, as Tevatron writes them.
            raise InputError(
                f"{path}: the third column of query {query_id} is not a rank. Convert the run to TREC format."
            )
        if len(set(doc_ids)) < len(doc_ids):
            raise InputError(f"{path}: query {query_id} lists a document twice. Keep one line per query and document.")
        order = sorted(range(len(doc_ids)), key=lambda i: (-scores[i], ranks[i]))
        run[query_id] = RankedList(query_id, [doc_ids[i] for i in order], (scores[i] for i in order))
    return run


def _could_be_ranks(values: Sequence[float]) -> bool:
    """Return whether the values are distinct whole numbers from 0 or 1 on."""
    return min(values) in (0, 1) and len(set(values)) == len(values) and all(value % 1 == 0 for value in values)


class SyntheticRow(msgspec.Struct):
    """The fields of a well-formed row of synthetic queries. Decoding ignores other fields."""

    doc_id: str | int
    question: str
    doc_text: str = ""
    log_probs: list[float] | None = None
    request: str | None = None


def _decode_any_row(line: str) -> SyntheticRow:
    """Return a row that msgspec refuses, or raise a ValueError that says what is wrong."""
    row = json_object(line)
    if "doc_id" not in row or "question" not in row:
        raise ValueError("no field 'doc_id' or no field 'question'")
    log_probs = row.get("log_probs")
    if log_probs is not None:
        if not isinstance(log_probs, list):
            raise ValueError("'log_probs' is not a list")
        if not all(type(x) in (int, float) and abs(x) < LARGEST for x in log_probs):  # False for NaN
            raise ValueError(NOT_FINITE)
    return SyntheticRow(row["doc_id"], string_field(row, "question"), string_field(row, "doc_text"), log_probs)


def read_synthetic_queries(
    path: str, desc: str | None = None, skip: Callable[[SyntheticRow], bool] | None = None
) -> Iterator[SyntheticQuery]:
    """Yield the rows of synthetic queries, our own or a published set.

    Args:
        path: The file.
        desc: Label of a progress bar, or None for no bar.
        skip: Quick test for well-formed rows that are not wanted.

    Raises:
        InputError: No line is usable.
    """

    def parse(line: str) -> tuple[str, str, str, list[float] | None, str]:
        try:
            row = decode(line)
        except (msgspec.MsgspecError, RecursionError):
            row = _decode_any_row(line)
        if row.log_probs and not -LARGEST < min(row.log_probs) <= max(row.log_probs) < LARGEST:
            raise ValueError(NOT_FINITE)
        clean = str.strip if line.isascii() and "\\" not in line else single_line  # JSON escapes tabs and newlines
        return parse_id(row.doc_id), clean(row.doc_text), " ".join(row.question.split()), row.log_probs, line

    def select(lines: list[bytes]) -> list[tuple[int, bytes]]:
        assert skip
        selected = []
        for i, line in enumerate(lines):
            try:
                if skip(decode(line)):
                    continue
            except (msgspec.MsgspecError, RecursionError):
                pass
            selected.append((i, line))
        return selected

    decode = msgspec.json.Decoder(SyntheticRow).decode
    form = "a JSON object with `doc_id`, `doc_text`, `question`, `log_probs`"
    for number, fields in read_records(read_blocks([path], desc), parse, form, path, select if skip else None):
        yield SyntheticQuery(number - 1, *fields)


# --------------------------------------------------------------------------------------------------------- writers


def tsv_line(*columns: str) -> str:
    """Return a line of a TSV file, newline included. Tabs and newlines inside a column become spaces."""
    return "\t".join(map(single_line, columns)) + "\n"


def write_texts(path: str, texts: Iterable[Doc | Topic]) -> None:
    """Write a collection or topics as TSV."""
    with atomic_write(path) as file:
        file.writelines(tsv_line(*text) for text in texts)


def write_run(path: str, hits: Iterable[ScoredDoc], tag: str) -> None:
    """Write a TREC run. The hits of a query must come best first; ranks start at 1."""
    ranks: dict[str, int] = {}
    with atomic_write(path) as file:
        for query_id, doc_id, score in hits:
            ranks[query_id] = ranks.get(query_id, 0) + 1
            file.write(f"{query_id} Q0 {doc_id} {ranks[query_id]} {score:{RUN_SCORE}} {tag}\n")
