"""Topics: TSV, JSON, or TREC's tags, unclosed as in `<num> Number: 301` or XML as in `<topic number="1">`."""

import html
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from inpars_lib.cli import InputError
from inpars_lib.formats.fields import (
    QUERY_ID,
    QUERY_TEXT,
    judge_columns,
    parse_id,
    parse_text,
    single_line,
    tsv_line,
)
from inpars_lib.formats.folders import beir_file
from inpars_lib.formats.ir_dataset import download_errors, ir_dataset
from inpars_lib.formats.lines import Block, Blocks, Form, read_blocks, read_records
from inpars_lib.formats.records import Doc
from inpars_lib.formats.roles import check_role

FORM = "`query_id<TAB>text`, a JSON object with an id (`_id`, ...) and a text (`text`, ...), or a TREC topic"
TURNS = re.compile(r'^\s*\{.*"turns?": *\[')  # of CAsT and iKAT
REFUSED = ("qrels", "run", "ranks", "queries")
# Possessive quantifiers give no characters back, so that a hostile file takes linear time.
TAG = re.compile(r"<(/?)([A-Za-z][\w.-]*+)([^<>]*+)>")
START = re.compile(
    r"\s*+(?:<[?!/]?[A-Za-z][^<>]*+>\s*+)*?<(?:top|topic|query>\s*+<(?:qid|id|num|number))[\s>]", re.IGNORECASE
)
ATTRIBUTE = re.compile(r"""(?<![\w-])(?:number|id|num|qid)\s*+=\s*+["']?+([^"'\s>]++)""", re.IGNORECASE)
LABEL = re.compile(r"\s*+(?:(?:Number|Topic)\s*+:)?+\s*+", re.IGNORECASE)
ENTITY = re.compile(r"&(#\d++|#[xX][\da-fA-F]++|\w++);")
NUMBERS = ("num", "number", "id", "qid", "identifier", "topic_id")
TITLES = ("title", "query", "content", "summary")  # the first that has a text
PARTS = ("disease", "gene", "treatment")  # of Precision Medicine, which has no title
DESCRIPTIONS = ("desc", "description", "narr", "narrative", "question", "note", "type", "url", "docid", "time", "date")
OLD_TAGS = ("top", "topic", "subtopic", "dom", "head", "smry", "con", "fac", "def", "nat")
TAGS = {*NUMBERS, *TITLES, *PARTS, *DESCRIPTIONS, *OLD_TAGS}


class _Tag(NamedTuple):
    name: str
    closes: bool
    attributes: str
    start: int
    end: int
    begins_line: bool


def _find_tags(text: str) -> list[_Tag]:
    tags: list[_Tag] = []
    at = 0
    for tag in TAG.finditer(text):
        _, newline, indent = text[at : tag.start()].rpartition("\n")
        at = tag.end()
        begins_line = (bool(newline) or not tags) and not indent.strip()
        tags.append(_Tag(tag[2].lower(), bool(tag[1]), tag[3], tag.start(), at, begins_line))
    return tags


def _replace(text: str, start: str, end: str, keep: bool) -> str:
    """Return the text without what is between two marks, or with this part escaped. Newlines stay."""
    pieces, at = [], 0
    while (opening := text.find(start, at)) >= 0 and (closing := text.find(end, opening)) >= 0:
        inside = text[opening + len(start) : closing]
        pieces += [text[at:opening], html.escape(inside, quote=False) if keep else "\n" * inside.count("\n")]
        at = closing + len(end)
    return "".join([*pieces, text[at:]])


def _without_comments(text: str) -> str:
    return _replace(text, "<!--", "-->", keep=False)


def _topic_fields(body: str) -> dict[str, str]:
    """Return the texts of a topic by tag: of each tag the first that is not empty.

    A field ends at its closing tag. If there is none, it ends at a tag that topics have, or at a line that begins with
    any tag. Other text may hold `<`.
    """
    tags, found = _find_tags(body), dict[str, str]()
    last_closing = {tag.name: i for i, tag in enumerate(tags) if tag.closes}
    i = 0
    while i < len(tags):
        tag = tags[i]
        i += 1
        if tag.closes or tag.name not in TAGS:
            continue
        is_closed = last_closing.get(tag.name, 0) >= i
        while i < len(tags):
            other = tags[i]
            if is_closed and other.closes and other.name == tag.name:
                break
            if not is_closed and (other.name in TAGS or other.begins_line):
                break
            i += 1
        content = body[tag.end : tags[i].start if i < len(tags) else len(body)]
        text = " ".join(ENTITY.sub(lambda entity: html.unescape(entity[0]), LABEL.sub("", content, 1)).split())
        if text:
            found.setdefault(tag.name, text)
    return found


def _read_topic(start: _Tag, body: str) -> tuple[str | None, str | None]:
    """Return number and query of a topic, None for what the topic does not have."""
    fields = _topic_fields(body)
    attribute = ATTRIBUTE.search(start.attributes)
    number = attribute[1] if attribute else next((fields[name] for name in NUMBERS if name in fields), None)
    query = next((fields[name] for name in TITLES if name in fields), None)
    if query is None:
        text = "" if "<" in body else body  # Clinical Trials has no tags inside
        query = " ".join([*(fields[name] for name in PARTS if name in fields), *text.split()]) or None
    return number, query


def _topic_lines(path: str, text: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, `query_id<TAB>query`) for each topic of a TREC file."""
    text = _replace(_without_comments(text), "<![CDATA[", "]]>", keep=True)
    tags = _find_tags(text)
    names = ("top", "topic") if any(tag.name in ("top", "topic") for tag in tags) else ("query",)
    borders = [tag for tag in tags if tag.name in names]
    line, at = 1, 0
    for start, after in pairwise([*borders, None]):
        if start is None or start.closes:
            continue
        line += text.count("\n", at, start.start)
        at = start.start
        number, query = _read_topic(start, text[start.end : after.start if after else len(text)])
        if number is None or query is None:
            missing = "number" if number is None else "<title> or <query>"
            raise InputError(f"{path}, line {line}: the topic has no {missing}. Add it or delete the topic.")
        yield line, tsv_line(number, query).encode(errors="surrogateescape")


def _topics_as_tsv(blocks: Blocks) -> Blocks:
    """Yield the blocks of a file, those of TREC topics as lines `query_id<TAB>query`."""
    first = next(blocks)
    text = b"\n".join(line for _, line in first.lines).decode(errors="surrogateescape")
    if not text.lstrip().startswith("<") or not START.match(_without_comments(text)):
        yield first
        yield from blocks
        return
    rest = (b"\n".join(line for _, line in block.lines).decode(errors="surrogateescape") for block in blocks)
    lines = _topic_lines(first.path, "\n".join([text, *rest]))
    yield Block(first.path, list(lines), is_first=True)


def _judge(block: Block) -> Form[Doc]:
    """Return how to read a file of topics."""
    lines = block.head()
    check_role(block.path, lines, REFUSED)
    if lines and TURNS.search(lines[0]):
        raise InputError(f"{block.path}: these topics are conversations. Write a line `query_id<TAB>query` per turn.")
    columns, header = judge_columns(lines, QUERY_ID, QUERY_TEXT)
    return Form(partial(parse_text, ids=QUERY_ID, texts=QUERY_TEXT, columns=columns), header)


def _read(path: str) -> Iterator[tuple[str, str, str]]:
    """Yield (place, query id, query) of a file, of a BEIR folder or of `ir_datasets:NAME`."""
    if path.startswith("ir_datasets:"):
        dataset = ir_dataset(path, "queries")
        with download_errors(path):
            queries = [(query.query_id, query.default_text()) for query in dataset.queries_iter()]
        for query_id, text in queries:
            yield path, parse_id(query_id), single_line(text)
        return
    blocks = read_blocks([beir_file(path, "queries.jsonl")])
    for number, (query_id, text) in read_records(_topics_as_tsv(blocks), _judge, FORM, path):
        yield f"{path}, line {number}", query_id, text


def read_topics(path: str) -> dict[str, str]:
    """Return the topics of a file, of a BEIR folder or of `ir_datasets:NAME`, text by query id, in file order.

    Raises:
        InputError: No line is usable, or a query id is on two lines.
    """
    topics: dict[str, str] = {}
    for place, query_id, text in _read(path):
        if query_id in topics:
            raise InputError(f"{place}: the query id {query_id} is repeated. Keep one of its lines.")
        topics[query_id] = text
    return topics
