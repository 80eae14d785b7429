"""Synthetic queries: JSONL `doc_id`, `doc_text`, `question`, `log_probs`, as in the published InPars sets."""

from collections.abc import Callable, Iterator

import msgspec

from inpars_lib.formats.fields import json_object, parse_id, single_line, string_field
from inpars_lib.formats.lines import read_blocks, read_records
from inpars_lib.formats.records import SyntheticQuery

LARGEST = 1e300  # bound of log-probabilities, whose sum must be finite
NOT_FINITE = "'log_probs' contains something other than finite numbers"


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
