"""BM25 with Lucene: index a collection, open an index, retrieve the first-stage run of topics.

    python -m inpars_lib.bm25 index --corpus collection.jsonl --index index --language de
    python -m inpars_lib.bm25 search --index index --topics topics.tsv --output run.bm25.txt

`index` reads a collection and writes a folder. `search` reads topics and writes a TREC run. An index stores its
language, k1 and b. No Java has to be installed.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain

from inpars_lib.bm25.config import BM25Config, add_search_flags
from inpars_lib.bm25.index import build_index
from inpars_lib.bm25.search import open_index
from inpars_lib.cli import InputError, at_least, run_script, script_parser
from inpars_lib.files import check_paths, exclusive, resolve_output, with_files
from inpars_lib.formats.folders import beir_file, collection_files
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
    config = BM25Config(args.threads, args.k1, args.b, args.language)
    if args.command == "index":
        folder = resolve_output(args.index.rstrip("/"))
        check_paths({"--corpus": collection_files(args.corpus)}, {"--index": folder})
        build_index(args.corpus, folder, config)
        print(f"{folder}: index of {args.corpus}", file=sys.stderr)
        return
    output = resolve_output(args.output)
    check_paths(
        {"--index": with_files(args.index), "--topics": beir_file(args.topics, "queries.jsonl")}, {"--output": output}
    )
    topics = read_topics(args.topics)
    counts: Counter[str] = Counter()
    with exclusive(output) if output != "-" else nullcontext():
        found = open_index(args.index, None, config).search(topics, args.hits)
        hits = _counted_hits(found, counts)
        first = next(hits, None)
        if first is None:
            problem = f"no query has a hit in {args.index}"
            raise InputError(f"{args.topics}: {problem}. Pass topics and index of one collection.")
        write_run(output, chain([first], hits), tag="bm25")
    without = list(counts.values()).count(0)
    empty = f"; {without:,} queries without a hit" if without else ""
    print(f"{output}: {counts.total():,} hits of {len(counts):,} queries{empty}", file=sys.stderr)


def _counted_hits(found: Iterable[tuple[str, Sequence[ScoredDoc]]], counts: Counter[str]) -> Iterator[ScoredDoc]:
    """Yield the hits of all queries, and count those of each."""
    for query_id, hits in found:
        counts[query_id] = len(hits)
        yield from hits


if __name__ == "__main__":
    run_script(main)
