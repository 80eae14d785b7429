"""Relevance judgements: TREC, four columns; BEIR, three columns below a header line."""

import os
from collections.abc import Iterator

from inpars_lib.cli import InputError
from inpars_lib.formats.fields import parse_number, split_columns
from inpars_lib.formats.folders import beir_file
from inpars_lib.formats.ir_dataset import download_errors, ir_dataset
from inpars_lib.formats.lines import read_blocks, read_records
from inpars_lib.formats.records import Qrel


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
    path = beir_file(folder if os.path.isdir(folder) else path, "dev.tsv", "test.tsv", "train.tsv")
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
