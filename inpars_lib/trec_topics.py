"""TREC topics: `<top>` with `<num>` and `<title>`, whose tags may be unclosed, or XML with `<topic number="1">`.

The query is `<title>`, or `<query>` where there is no title (web tracks, TREC-COVID).
"""

import html
import re
from collections.abc import Iterator
from itertools import chain

from inpars_lib.line_parsers import parse_id, parse_text
from inpars_lib.records import Doc
from inpars_lib.text_lines import Block

START = re.compile(rb"(?:\s|<[^<>]*>)*?<top(?:ic)?[\s>]", re.IGNORECASE)  # tags only, before the first topic
TOPIC = re.compile(rb"<(top|topic)(?:\s[^>]*)?>.*?(?=</\1\s*>|<\1[\s>]|\Z)", re.DOTALL | re.IGNORECASE)


def join_topics(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield each topic of a TREC file as one line. The lines of other files stay as they are."""
    first = next(blocks, None)
    if first is None:
        return
    (path, number, lines), blocks = first, chain([first], blocks)
    if not START.match(b"".join(lines)):
        yield from blocks
        return
    text, at = b"".join(line for block in blocks for line in block[2]), 0
    for topic in TOPIC.finditer(text):
        number += text.count(b"\n", at, topic.start())
        at = topic.start()
        yield path, number, [topic[0]]


def _field(topic: str, name: str) -> str | None:
    """Return the text of a field up to the next tag, on one line, without the label of old topics."""
    found = re.search(rf"<{name}(?:\s[^>]*)?>(?:\s*(?:Number|Topic)\s*:)?(.*?)(?=</?[a-z]|\Z)", topic, re.I | re.S)
    return " ".join(html.unescape(found[1]).split()) if found else None


def parse_topic(line: str) -> Doc:
    """Return id and text of a topic: a line, or a TREC topic as `join_topics` yields them."""
    if not TOPIC.match(line.encode()):
        return parse_text(line)
    number = re.match(r"""<topic\s[^>]*\bnumber\s*=\s*["']?([^"'\s>]+)""", line, re.IGNORECASE)
    query_id = number[1] if number else _field(line, "num")
    text = _field(line, "title") or _field(line, "query")
    if not query_id:
        raise ValueError("a topic without <num> or an attribute `number`")
    if not text:
        raise ValueError("a topic without <title> or <query>")
    return Doc(parse_id(query_id), text)
