"""Parsers of one line or field: ids, texts, JSON objects, columns, numbers. A ValueError says what is wrong."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from inpars_lib.formats.records import Doc

Number = TypeVar("Number", int, float)
TEXT_FORM = "`id<TAB>text`, or a JSON object with an id (`id`, ...) and a text (`contents`, ...)"
# The first of these that a JSON object has. In MS MARCO v2, `docid` is the document of the passage `pid`.
ID_FIELDS = ("_id", "id", "doc_id", "pid", "docid", "query_id", "qid")
_ID_FIELD_SET = frozenset(ID_FIELDS)
TEXT_FIELDS = ("contents", "text", "body", "passage", "segment", "query")
_NEWLINES = re.compile("[\t\n\r\v\f\x00\x1c-\x1e\x85\u2028\u2029]+")


def single_line(text: str) -> str:
    """Return `text` with each run of tabs, newlines and NUL bytes replaced by one space, to fit a TSV column."""
    if "\t" in text or "\0" in text or len(text.splitlines()) > 1:  # much faster than the search of the expression
        text = _NEWLINES.sub(" ", text)
    return text.strip()


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can hold the text. JSON can spell half of a surrogate pair, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_id(value: Any) -> str:
    """Return an id as a string, or raise ValueError if a TREC run could not hold the id."""
    if type(value) is str and value.isalnum() and value.isascii():  # the usual id, which needs no further check
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"the id {value!r} is neither a string nor a whole number")
    record_id = str(value)
    if not is_unicode(record_id):
        raise ValueError(f"the id {record_id!a} is not valid Unicode")
    if not record_id:
        raise ValueError("the id is empty")
    if record_id.split() != [record_id]:
        raise ValueError(f"the id {record_id!r} contains whitespace, which a TREC run cannot hold")
    return record_id


def json_object(line: str) -> dict[str, Any]:
    """Return the JSON object of a line."""
    try:
        row = msgspec.json.decode(line)
    except (msgspec.MsgspecError, RecursionError):  # json also reads NaN and halves of surrogate pairs
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def string_field(row: Mapping[str, Any], field: str) -> str:
    """Return a field of a row, empty if absent. Halves of surrogate pairs become question marks."""
    value = row.get(field, "")
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is not a string")
    return value if is_unicode(value) else value.encode(errors="replace").decode()


def parse_text(line: str, id_fields: Sequence[str] = ID_FIELDS, text_fields: Sequence[str] = TEXT_FIELDS) -> Doc:
    """Return id and text of a line of a collection or of topics, in any spelling that `formats.py` lists.

    The id is the first of `id_fields` that a JSON object has, the text the first of `text_fields`.
    """
    if not line.startswith("{"):
        record_id, tab, text = line.partition("\t")
        if not tab:
            raise ValueError("no tab between id and text")
        if record_id.lower() in _ID_FIELD_SET and text.strip().lower() in TEXT_FIELDS:
            raise ValueError("a header line")
        return Doc(parse_id(record_id), single_line(text))
    row = json_object(line)
    id_field = next((name for name in id_fields if name in row), None)
    text_field = next((name for name in text_fields if name in row), None)
    if id_field is None or text_field is None:
        missing = id_fields if id_field is None else text_fields
        raise ValueError(f"none of the fields {', '.join(missing)}")
    text = string_field(row, text_field)
    if text_field == "text":
        text = f"{string_field(row, 'title')} {text}"
    return Doc(parse_id(row[id_field]), single_line(text))


def parse_topic(line: str) -> Doc:
    """Return id and text of a line of topics, which may also name a document."""
    return parse_text(line, ("query_id", "qid", *ID_FIELDS), ("query", *TEXT_FIELDS))


def split_columns(line: str, counts: tuple[int, ...]) -> list[str]:
    """Return the columns of a line between whitespace, of which there must be as many as one of `counts`."""
    columns = line.split()
    if len(columns) not in counts:
        raise ValueError(f"expected {' or '.join(map(str, counts))} columns, found {len(columns)}")
    return columns


def parse_number(word: str, kind: type[Number]) -> Number:
    """Return a finite number."""
    try:
        value = kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a {'whole ' if kind is int else ''}number") from None
    if not math.isfinite(value):
        raise ValueError(f"{word!r} is not a finite number")
    return value
