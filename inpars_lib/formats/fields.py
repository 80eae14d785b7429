"""Names of fields and columns, and parsers of their values. A ValueError says what is wrong."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from inpars_lib.formats.records import Doc

Number = TypeVar("Number", int, float)

# Names of fields, by what they hold. A reader takes the first name that a row has.
DOC_ID = ("_id", "id", "doc_id", "docno", "pid", "docid", "passage_id", "corpus-id", "corpus_id")
QUERY_ID = ("query_id", "qid", "query-id", "_id", "id", "topic_id", "number")
DOC_TEXT = ("contents", "content", "text", "body", "passage", "segment")
QUERY_TEXT = ("query", "question", "text", "title", "contents", "content", "body")
BEFORE_TEXT = ("title", "headings")  # put before the text, except before `contents`, which Anserini has put together
QUESTION, SOURCE_TEXT = ("question", "query"), ("doc_text", "text")  # of synthetic queries
GRADE = ("score", "relevance", "rel", "label", "grade")
TRIPLE = ("query", "positive", "negative")
KNOWN = {*DOC_ID, *QUERY_ID, *DOC_TEXT, *QUERY_TEXT, *BEFORE_TEXT, *GRADE, *TRIPLE}
KNOWN |= {"pos", "neg", "q0", "iter", "iteration", "rank", "tag", "run", "url", "metadata"}

_NEWLINES = re.compile("[\t\n\r\v\f\x00\x1c-\x1e\x85\u2028\u2029]+")
_QUOTED_CELL = re.compile(r'(?<![^\t])"((?:[^"]++|"")*+)"(?![^\t])')


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


def parse_number(word: str, kind: type[Number]) -> Number:
    """Return a finite number."""
    try:
        value = kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a {'whole ' if kind is int else ''}number") from None
    if not math.isfinite(value):
        raise ValueError(f"{word!r} is not a finite number")
    return value


# -------------------------------------------------------------------------------------------------------- JSON objects


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


def first_field(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the first of `names` that a row has."""
    for name in names:
        if name in row:
            return name
    raise ValueError(f"none of the fields {', '.join(names)}; the row has {', '.join(map(repr, row)) or 'no field'}")


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Return a text. A number is its digits; null, NaN and an absent field are empty.

    Halves of surrogate pairs become question marks.
    """
    value = row.get(name)
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name!r} is not a string")
    text = str(value)
    return text if is_unicode(text) else text.encode(errors="replace").decode()


def parse_object(line: str, ids: Sequence[str], texts: Sequence[str]) -> Doc:
    """Return id and text of a JSON object."""
    row = json_object(line)
    record_id, name = row[first_field(row, ids)], first_field(row, texts)
    text = text_field(row, name)
    if name not in ("contents", "query", "question"):
        parts = [*(text_field(row, before) for before in BEFORE_TEXT if before != name), text]
        text = " ".join(filter(None, parts))
    return Doc(parse_id(record_id), single_line(text))


# --------------------------------------------------------------------------------------------------------- TSV columns


class Columns(NamedTuple):
    """What the columns of a TSV file of texts are.

    Attributes:
        text: Numbers of the columns of the text, in their order in the text. Empty if the text is all after the id.
        width: Number of columns, 0 for any.
        quoted: Whether the cells of a column are in quotation marks.
    """

    text: tuple[int, ...] = ()
    width: int = 0
    quoted: bool = False


def unquote(line: str, all_cells: bool) -> str:
    """Return a TSV line without CSV's quoting of cells.

    A cell in quotation marks is CSV if quotation marks inside are doubled, if it has a tab, or if all cells of a column
    have them. Otherwise they belong to the text.
    """

    def undo(cell: re.Match[str]) -> str:
        text: str = cell[1]
        if not all_cells and '""' not in text and "\t" not in text:
            return cell[0]
        return text.replace('""', '"').replace("\t", " ")

    return _QUOTED_CELL.sub(undo, line) if '"' in line else line


def tsv_line(*columns: str) -> str:
    """Return a line of a TSV file, newline included. Tabs and newlines inside a column become spaces.

    A text that reads as a cell of CSV is quoted as one, so that `unquote` gives it back.
    """
    texts = [single_line(column) for column in columns]
    cells = [_quote(text) if _QUOTED_CELL.fullmatch(text) else text for text in texts]
    if unquote("\t".join(cells), all_cells=False) != "\t".join(texts):  # quotation marks of two cells make a pair
        cells = [_quote(text) if text.startswith('"') else text for text in texts]
    return "\t".join(cells) + "\n"


def _quote(text: str) -> str:
    """Return a text as a cell of CSV in quotation marks."""
    return '"' + text.replace('"', '""') + '"'


def is_header(cells: Sequence[str], first: Iterable[str]) -> bool:
    """Return whether the cells of a first line are names of columns, the first one of `first`."""
    return len(cells) > 1 and cells[0].lower() in first and all(cell.lower() in KNOWN for cell in cells)


def has_quoted_column(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the cells of some column are all in quotation marks."""
    width = min(map(len, rows), default=0)
    return any(all(len(row[i]) > 1 and row[i][0] == row[i][-1] == '"' for row in rows) for i in range(width))


def judge_columns(lines: Sequence[str], ids: Sequence[str], texts: Sequence[str]) -> tuple[Columns, int]:
    """Return what the columns of a TSV file are, and the number of header lines, from the first lines.

    Three columns in all lines are id, text and title.
    """
    rows = [line.split("\t") for line in lines]
    header = [name.strip().lower() for name in unquote(lines[0], all_cells=True).split("\t")] if lines else []
    if is_header(header, ids):
        places = {name: i for i, name in enumerate(header)}
        parts = [places[name] for name in BEFORE_TEXT if name in places]
        parts.append(places[first_field(places, texts)])
        order = tuple(dict.fromkeys(parts)) if "contents" not in places else (places["contents"],)
        return Columns(order, len(header), has_quoted_column(rows[1:])), 1
    quoted = has_quoted_column(rows)
    if rows and texts is DOC_TEXT and all(len(row) == 3 for row in rows):
        return Columns((2, 1), 3, quoted), 0
    return Columns(quoted=quoted), 0


def parse_text(line: str, ids: Sequence[str], texts: Sequence[str], columns: Columns) -> Doc:
    """Return id and text of a line: a JSON object or TSV."""
    if line.startswith("{"):
        return parse_object(line, ids, texts)
    if '"' in line:
        line = unquote(line, columns.quoted)
    record_id, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("no tab between id and text")
    if columns.text:
        cells = [record_id, *text.split("\t")]
        if len(cells) > columns.width:
            raise ValueError(f"expected {columns.width} columns, found {len(cells)}")
        text = " ".join(cells[i] for i in columns.text if i < len(cells))
    return Doc(parse_id(record_id), single_line(text))


def split_columns(line: str, counts: tuple[int, ...]) -> list[str]:
    """Return the columns of a line between whitespace, of which there must be as many as one of `counts`."""
    columns = line.split()
    if len(columns) not in counts:
        raise ValueError(f"expected {' or '.join(map(str, counts))} columns, found {len(columns)}")
    return columns
