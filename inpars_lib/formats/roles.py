"""What a file seems to be, so that a file of another role is refused and not read as a few odd records."""

import re
from collections.abc import Collection, Sequence

from inpars_lib.cli import InputError
from inpars_lib.formats.fields import DOC_ID, GRADE, QUERY_ID, is_header, json_object

# What a file seems to be, and where it belongs
ROLES = {
    "qrels": "relevance judgements, which --qrels takes",
    "run": "a run, which --run takes",
    "ranks": "a run of MS MARCO's three columns, which --run takes",
    "topics": "topics, which --queries takes (`bm25 search`: --topics)",
    "texts": "lines `id<TAB>text`: --queries takes topics, --corpus a collection",
    "queries": "synthetic queries, which --input takes (--holdout if they are held out)",
    "ids": "ids of triples. --triples_train takes the triples of texts, --output of generate_triples_train.py",
    "pairs": "pairs of a query and a document with a label. Join them to lines `query<TAB>positive<TAB>negative`",
}
LABELS = ("0", "1", "0.0", "1.0", "true", "false")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
TOPICS = re.compile(r"(?i)\s*<(\?xml|topics?|top)\b")


def _role_of_object(line: str) -> str | None:
    try:
        names = json_object(line).keys()
    except ValueError:
        return None
    has_query_id, has_doc_id = bool(names & {"query-id", "query_id", "qid"}), bool(names & set(DOC_ID))
    if has_query_id and has_doc_id and names & set(GRADE):
        return "qrels"
    if names & {"query", "question"}:
        return "queries" if "doc_id" in names and not has_query_id else "topics"
    return None


def guess_role(lines: Sequence[str]) -> str | None:
    """Return the role in `ROLES` that all of these lines have, or None."""
    if lines[0].startswith("{"):
        return _role_of_object(lines[0])
    if TOPICS.match(lines[0]):
        return "topics"
    cells = [line.split("\t") for line in lines]
    if all(len(row) == 3 and " " in row[0].strip() and row[2].strip().lower() in LABELS for row in cells):
        return "pairs"
    rows = [line.split() for line in lines]
    width, last = len(rows[0]), [row[-1] for row in rows]
    if width == 3 and is_header(rows[0], QUERY_ID) and last[0].lower() in GRADE:
        return "qrels"
    if {line.count("\t") for line in lines} == {1} and any(len(row) != 3 for row in rows):
        return "texts"
    if any(len(row) != width for row in rows):
        return None
    if width == 6 and all(NUMBER.fullmatch(row[4]) for row in rows) and len({row[1] for row in rows}) == 1:
        return "run"
    if width == 4 and all(row[1] in ("0", "Q0") and NUMBER.fullmatch(row[3]) for row in rows):
        return "qrels"
    if width == 3 and all(word.isdecimal() for word in last) and min(map(int, last)) <= 1:
        return "ranks"
    return "ids" if width == 3 and all(row[0].isdecimal() for row in rows) else None


def check_role(path: str, lines: Sequence[str], refused: Collection[str]) -> None:
    """Check that the first lines of a file do not have a role that its reader refuses.

    Args:
        path: The file.
        lines: Its first lines.
        refused: Roles in `ROLES`.

    Raises:
        InputError: They have. The error names the flag to which the file belongs.
    """
    written = [line for line in lines if line and not line.isspace()]
    role = guess_role(written) if written else None
    if role in refused:
        raise InputError(f"{path}: this file seems to hold {ROLES[role or '']}.")
