"""TREC topics: `<top>` with `<num>` and `<title>`, whose tags may be unclosed, or XML with `<topic number="1">`.

The query is `<title>`, or `<query>` where there is no title (web tracks, TREC-COVID).
"""

import html
import re
from collections.abc import Iterator
from itertools import chain

from inpars_lib.cli import InputError
from inpars_lib.text_lines import Block

START = re.compile(rb"(?i)(?:\s|<[^<>]*>)*?<top(?:ic)?[\s>]")  # tags only, before the first topic
TOPIC = re.compile(r"(?is)<(top|topic)(?:\s[^>]*)?>.*?(?=</\1\s*>|<\1[\s>]|\Z)")
ATTRIBUTE = re.compile(r"""(?i)<topic\s[^>]*\bnumber\s*=\s*["']?([^"'\s>]+)""")
TAGS = "top|topic|subtopic|num|title|query|question|desc|description|narr|narrative|dom|head|smry|con|fac|def|nat|time"
# A field, without the label of old topics. It ends at a tag that topics have, or at a line that begins with any tag,
# because other text may hold `<`.
FIELD = rf"(?ims)<%s(?:\s[^>]*)?>(?:\s*(?:Number|Topic)\s*:)?\s*([^\s<].*?)(?=</?(?:{TAGS})[\s>]|^\s*<[a-z]|\Z)"
NUM, TITLE, QUERY = (re.compile(FIELD % name) for name in ("num", "title", "query"))
# Comments and closed fields that are not read, which may quote the tags of other fields
IGNORED = re.compile(r"(?is)<!--.*?-->|<(desc|description|narr|narrative)(?:\s[^>]*)?>.*?</\1\s*>")
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
    text = IGNORED.sub(lambda ignored: "\n" * ignored[0].count("\n"), text)
    for topic in TOPIC.finditer(text):
        number += text.count("\n", at, topic.start())
        at = topic.start()
        fields = ATTRIBUTE.match(topic[0]) or NUM.search(topic[0]), TITLE.search(topic[0]) or QUERY.search(topic[0])
        columns = [
            " ".join(ENTITY.sub(lambda entity: html.unescape(entity[0]), field[1]).split()) for field in fields if field
        ]
        if len(columns) < 2:
            missing = "<title> or <query>" if fields[0] else "number"
            raise InputError(f"{path}, line {number}: the topic has no {missing}. Add it or delete the topic.")
        yield path, number, ["\t".join(columns).encode(errors="surrogateescape")]
