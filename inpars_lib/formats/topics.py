"""TREC topics: `<top>` with `<num>` and `<title>`, whose tags may be unclosed, or XML with `<topic number="1">`.

The query is `<title>`, or `<query>` where there is no title (web tracks, TREC-COVID).
"""

import html
import re
from collections.abc import Iterator
from itertools import chain

from inpars_lib.cli import InputError
from inpars_lib.formats.fields import TEXT_FORM, parse_id, parse_topic, single_line
from inpars_lib.formats.folders import beir_file
from inpars_lib.formats.ir_dataset import download_errors, ir_dataset
from inpars_lib.formats.lines import Block, read_blocks, read_records

START = re.compile(rb"(?is)(?:\s|<!--.*?-->|<[^<>]*>)*?<top(?:ic)?[\s>]")  # tags only, before the first topic
TOPIC = re.compile(r"(?is)<(top|topic)(?:\s[^>]*)?>.*?(?=</\1\s*>|<\1[\s>]|\Z)")
ATTRIBUTE = re.compile(r"""(?i)<topic\s(?:[^>]*?\s)?number\s*=\s*["']?([^"'\s>]+)""")
TAGS = "top|topic|subtopic|num|title|query|question|desc|description|narr|narrative|dom|head|smry|con|fac|def|nat|time"
# A field, without the label of old topics. If it is not closed, it ends at a tag that topics have, or at a line that
# begins with any tag. Other text may hold `<`.
FIELD = (
    r"(?ims)<{0}(?:\s[^>]*)?>(?:\s*(?:Number|Topic)\s*:)?\s*(?=[^\s<])"
    r"(?:(.*?)</{0}\s*>|(.*?)(?=</?(?:{1})[\s>]|^\s*<[a-z]|\Z))"
)
NUM, TITLE, QUERY = (re.compile(FIELD.format(name, TAGS)) for name in ("num", "title", "query"))
COMMENT, CDATA = re.compile("(?s)<!--.*?-->"), re.compile(r"(?s)<!\[CDATA\[(.*?)\]\]>")
IGNORED = re.compile(r"(?is)<(desc|description|narr|narrative)(?:\s[^>]*)?>.*?</\1\s*>")  # may quote other tags
ENTITY = re.compile(r"&(#\d+|#[xX][\da-fA-F]+|\w+);")


def topics_as_tsv(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield a line `query_id<TAB>query` for each topic of a TREC file, or the blocks of another file as they are."""
    first = next(blocks, ("", 1, []))
    blocks = chain([first], blocks)
    if not START.match(b"".join(first[2])):
        yield from blocks
        return
    path, number, _ = first
    text, at = b"".join(line for block in blocks for line in block[2]).decode(errors="surrogateescape"), 0
    text = COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
    text = CDATA.sub(lambda data: html.escape(data[1], quote=False), text)
    for topic in TOPIC.finditer(text):
        number += text.count("\n", at, topic.start())
        at, body = topic.start(), IGNORED.sub("", topic[0])
        fields = ATTRIBUTE.match(body) or NUM.search(body), TITLE.search(body) or QUERY.search(body)
        texts = (
            ENTITY.sub(lambda entity: html.unescape(entity[0]), field[field.lastindex or 1])
            for field in fields
            if field
        )
        columns = [" ".join(text.split()) for text in texts]
        if len(columns) < 2:
            missing = "<title> or <query>" if fields[0] else "number"
            raise InputError(f"{path}, line {number}: the topic has no {missing}. Add it or delete the topic.")
        yield path, number, ["\t".join(columns).encode(errors="surrogateescape")]


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
    blocks = topics_as_tsv(read_blocks([beir_file(path, "queries.jsonl")]))
    for number, (query_id, text) in read_records(blocks, parse_topic, f"{TEXT_FORM}, or a TREC topic", path):
        if query_id in topics:
            raise InputError(f"{path}, line {number}: the query id {query_id} is repeated. Keep one of its lines.")
        topics[query_id] = text
    return topics
