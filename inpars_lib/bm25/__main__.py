"""BM25 with Lucene: index a collection, open an index, retrieve the first-stage run of topics.

    python -m inpars_lib.bm25 index --corpus collection.jsonl --index index --language de
    python -m inpars_lib.bm25 search --index index --topics topics.tsv --output run.bm25.txt

`index` reads a collection and writes a folder. `search` reads topics and writes a TREC run. An index stores its
language, k1 and b. No Java has to be installed.
"""

import array
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from inpars_lib.bm25.config import BM25Config, add_search_flags
from inpars_lib.bm25.index import build_index
from inpars_lib.bm25.search import open_index
from inpars_lib.cli import InputError, at_least, run_script, script_parser
from inpars_lib.files import exclusive
from inpars_lib.formats.records import ScoredDoc
from inpars_lib.formats.runs import write_run
from inpars_lib.formats.topics import read_topics


def main(argv: Sequence[str] | None = None) -> None:
    """Run `index` or `search`."""
    parser = script_parser(__doc__, prog="python -m inpars_lib.bm25")
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="index a collection")
    index.add_argument("--corpus", required=True, help="collection to index")
    index.add_argument("--index", required=True, help="folder to create")
    add_search_flags(index)
    retrieve = commands.add_parser("search", help="write the first-stage run of topics")
    retrieve.add_argument("--index", required=True, help="folder of an index, or a prebuilt index of Pyserini")
    retrieve.add_argument("--topics", required=True, help="topics: a file, a BEIR folder, or - for standard input")
    retrieve.add_argument("--output", required=True, help="run to write, TREC format, or - for standard output")
    retrieve.add_argument("--hits", type=at_least(1), default=1000, help="hits per query (default: %(default)s)")
    add_search_flags(retrieve)
    args = parser.parse_args(argv)
    if args.command == "index":
        build_index(args.corpus, args.index, BM25Config(args.threads, args.k1, args.b, args.language))
        print(f"{args.index}: index of {args.corpus}", file=sys.stderr)
        return
    topics = read_topics(args.topics)
    searcher = open_index(args.index, None, BM25Config(args.threads, args.k1, args.b, args.language))
    counts = array.array("q")

    def hits() -> Iterator[ScoredDoc]:
        for _, found in searcher.search(topics, args.hits):
            counts.append(len(found))
            yield from found
        if not any(counts):
            raise InputError(
                f"{args.topics}: no query has a hit in {args.index}. Pass topics and index of one collection."
            )

    with exclusive(args.output) if args.output != "-" else nullcontext():
        write_run(args.output, hits(), tag="bm25")
    empty = f"; {counts.count(0):,} queries without a hit" if counts.count(0) else ""
    print(f"{args.output}: {sum(counts):,} hits of {len(counts):,} queries{empty}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
