"""Relevance judgements: TREC, four columns; BEIR, three columns below a header line; MTEB, JSONL."""

import os
from collections.abc import Iterator
from functools import partial
from itertools import product

from inpars_lib.cli import InputError
from inpars_lib.formats.fields import (
    DOC_ID,
    GRADE,
    QUERY_ID,
    first_field,
    is_header,
    json_object,
    parse_id,
    parse_number,
    split_columns,
)
from inpars_lib.formats.folders import beir_file
from inpars_lib.formats.ir_dataset import download_errors, ir_dataset
from inpars_lib.formats.lines import Block, Form, LineError, read_blocks, read_records
from inpars_lib.formats.records import Qrel
from inpars_lib.formats.roles import check_role

FORM = "`query_id 0 doc_id grade`, or BEIR's three columns"
SPLITS = [f"{split}{suffix}" for split, suffix in product(("test", "dev", "train"), (".tsv", ".jsonl"))]
REFUSED = ("run", "topics", "texts", "queries")
LARGEST_GRADE = 10**6  # trec_eval counts the documents of each grade up to the highest
QRELS_DOC_ID = ("corpus-id", "corpus_id", *DOC_ID)


def _parse_grade(value: object) -> int:
    """Return a grade. To skip the line of an odd grade would change the measures."""
    try:
        grade = parse_number(str(value), float)
    except ValueError as error:
        raise LineError(f"the grade {error}. Use whole grades") from None
    if not grade.is_integer():
        raise LineError(f"the grade {grade} is not a whole number. Use whole grades")
    if abs(grade) > LARGEST_GRADE:
        raise LineError(f"the grade {grade:g} is beyond {LARGEST_GRADE:,}. Use smaller grades")
    return int(grade)


def _parse_object(line: str) -> Qrel:
    row = json_object(line)
    query_id, doc_id, grade = (row[first_field(row, names)] for names in (QUERY_ID, QRELS_DOC_ID, GRADE))
    return Qrel(parse_id(query_id), parse_id(doc_id), _parse_grade(grade))


def _parse_columns(line: str, width: int) -> Qrel:
    columns = split_columns(line, (width,))
    return Qrel(columns[0], columns[-2], _parse_grade(columns[-1]))


def _judge(block: Block) -> Form[Qrel]:
    """Return how to read a file of judgements, whose lines have as many columns as the first line of three or four."""
    lines = block.head()
    check_role(block.path, lines, REFUSED)
    if lines and lines[0].startswith("{"):
        return Form(_parse_object)
    rows = [line.split() for line in lines if not line.startswith("#")]
    width = next((len(row) for row in rows if len(row) in (3, 4)), 4)
    header = int(bool(rows) and is_header(rows[0], QUERY_ID) and not rows[0][-1].isdecimal())
    return Form(partial(_parse_columns, width=width), header)


def _judgements(path: str) -> Iterator[tuple[str, Qrel]]:
    """Yield (place, judgement) of a file, of a BEIR folder or of `ir_datasets:NAME`."""
    if path.startswith("ir_datasets:"):
        dataset = ir_dataset(path, "qrels")
        with download_errors(path):
            qrels = [Qrel(qrel.query_id, qrel.doc_id, qrel.relevance) for qrel in dataset.qrels_iter()]
        for qrel in qrels:
            yield path, qrel
        return
    folder = os.path.join(path, "qrels")
    file = beir_file(folder if os.path.isdir(folder) else path, *SPLITS)
    for number, qrel in read_records(read_blocks([file]), _judge, FORM, file):
        yield f"{file}, line {number}", qrel


def read_qrels(path: str) -> Iterator[Qrel]:
    """Yield the judgements of a qrels file, of a BEIR folder with one, or of `ir_datasets:NAME`.

    Raises:
        InputError: No line is usable, a grade is not whole, or a document has two different grades for a query.
    """
    seen: dict[tuple[str, str], int] = {}
    for place, qrel in _judgements(path):
        if seen.setdefault(qrel[:2], qrel.relevance) != qrel.relevance:
            problem = f"query {qrel.query_id} and document {qrel.doc_id} have another grade on an earlier line"
            raise InputError(f"{place}: {problem}. Keep one of the two judgements.")
        yield qrel
