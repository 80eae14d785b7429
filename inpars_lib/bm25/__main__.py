"""BM25 with Lucene: index a collection, open an index, retrieve the first-stage run of topics.

    python -m inpars_lib.bm25 index --corpus collection.jsonl --index index --language de
    python -m inpars_lib.bm25 search --index index --topics topics.tsv --output run.bm25.txt

`index` reads a collection and writes a folder. `search` reads topics and writes a TREC run. An index stores its
language, k1 and b. No Java has to be installed.
"""

import sys
from collections.abc import Sequence

from inpars_lib.bm25.config import BM25Config, add_search_flags
from inpars_lib.bm25.index import build_index
from inpars_lib.bm25.search import open_index
from inpars_lib.cli import InputError, at_least, counted, run_script, script_parser
from inpars_lib.files import atomic_write, check_paths, claimed, resolve_output
from inpars_lib.first_stage import add_remove_query_flag
from inpars_lib.formats.folders import beir_file, collection_files
from inpars_lib.formats.runs import run_lines
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
    output = "run to write, TREC format, or - for standard output"
    retrieve.add_argument("--output", type=resolve_output, required=True, help=output)
    retrieve.add_argument("--hits", type=at_least(1), default=1000, help="hits per query (default: %(default)s)")
    add_remove_query_flag(retrieve.add_argument)
    add_search_flags(retrieve)
    args = parser.parse_args(argv)
    config = BM25Config(args.threads, args.k1, args.b, args.language)
    if args.command == "index":
        folder = resolve_output(args.index.rstrip("/"))
        check_paths({"--corpus": collection_files(args.corpus)}, {"--index": folder})
        build_index(args.corpus, folder, config)
        print(f"{folder}: index of {args.corpus}", file=sys.stderr)
        return
    inputs = {"--index": args.index, "--topics": beir_file(args.topics, "queries.jsonl")}
    total = without = 0
    with claimed(inputs, {"--output": args.output}):
        topics = read_topics(args.topics)
        searcher = open_index(args.index, None, config)
        search = searcher.search_without_query if args.remove_query else searcher.search
        with atomic_write(args.output) as file:
            for _, hits in search(topics, args.hits):
                file.writelines(run_lines(hits, tag="bm25"))
                total += len(hits)
                without += not hits
            if not total:
                problem = f"no query has a hit in {args.index}"
                raise InputError(f"{args.topics}: {problem}. Pass topics and index of one collection.")
    empty = f"; {counted(without, 'query')} without a hit" if without else ""
    print(f"{args.output}: {counted(total, 'hit')} of {counted(len(topics), 'query')}{empty}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
