"""Synthetic queries: JSONL `doc_id`, `doc_text`, `question`, `log_probs`, as in the published InPars sets.

The InPars toolkit and InPars-v2 call the question `query`, and the document's text `text`.
"""

from collections.abc import Iterator

import msgspec

from inpars_lib.files import json_line
from inpars_lib.formats.fields import (
    DOC_ID,
    QUESTION,
    SOURCE_TEXT,
    first_field,
    json_object,
    parse_id,
    single_line,
    text_field,
)
from inpars_lib.formats.lines import Block, Form, read_blocks, read_records
from inpars_lib.formats.records import SyntheticQuery
from inpars_lib.formats.roles import check_role

FORM = "a JSON object with `doc_id`, `doc_text`, `question`, `log_probs`"
REFUSED = ("qrels", "run", "topics", "texts", "ids", "ranks")
LARGEST = 1e300  # bound of log-probabilities, whose sum must be finite
NOT_FINITE = "'log_probs' contains something other than finite numbers"
Fields = tuple[str, str, str, list[float] | None, str, str | None]  # of a `SyntheticQuery`, without its line


class SyntheticRow(msgspec.Struct):
    """The fields of a well-formed row of synthetic queries. Decoding ignores other fields."""

    doc_id: str | int
    question: str
    doc_text: str = ""
    log_probs: list[float] | None = None
    request: str | None = None


decode_row = msgspec.json.Decoder(SyntheticRow).decode


def _decode_any_row(line: str) -> SyntheticRow:
    """Return a row that is not in our own spelling, or raise a ValueError that says what is wrong."""
    row = json_object(line)
    doc_id, question = row[first_field(row, DOC_ID)], text_field(row, first_field(row, QUESTION))
    doc_text = next((text_field(row, name) for name in SOURCE_TEXT if name in row), "")
    log_probs = row.get("log_probs")
    if log_probs is not None:
        if not isinstance(log_probs, list):
            raise ValueError("'log_probs' is not a list")
        if not all(type(x) in (int, float) and abs(x) < LARGEST for x in log_probs):  # False for NaN
            raise ValueError(NOT_FINITE)
    request = row.get("request")
    return SyntheticRow(doc_id, question, doc_text, log_probs, request if isinstance(request, str) else None)


def _parse(line: str) -> Fields:
    try:
        row = decode_row(line)
        if not row.doc_text and '"text"' in line:
            row = _decode_any_row(line)
    except (msgspec.MsgspecError, RecursionError):
        row = _decode_any_row(line)
    if row.log_probs and not -LARGEST < min(row.log_probs) <= max(row.log_probs) < LARGEST:
        raise ValueError(NOT_FINITE)
    clean = str.strip if line.isascii() and "\\" not in line else single_line  # JSON escapes tabs and newlines
    row_text = json_line(json_object(line)).rstrip("\n") if "\n" in line else line
    question = " ".join(row.question.split())
    return parse_id(row.doc_id), clean(row.doc_text), question, row.log_probs, row_text, row.request


def _judge(block: Block) -> Form[Fields]:
    check_role(block.path, block.head(), REFUSED)
    return Form(_parse)


def read_synthetic_queries(path: str, desc: str | None = None) -> Iterator[SyntheticQuery]:
    """Yield the rows of synthetic queries: our own, of a published set or of the InPars toolkit.

    Args:
        path: The file.
        desc: Label of a progress bar, or None for no bar.

    Raises:
        InputError: No line is usable.
    """
    for number, fields in read_records(read_blocks([path], desc), _judge, FORM, path):
        yield SyntheticQuery(number - 1, *fields)
