r"""Stage 3: pair each synthetic query with its source document and a hard negative from BM25 or another first stage.

Reads   filtered synthetic queries, the collection, a BM25 index of the collection or a run of the queries
Writes  OUTPUT, triples as TSV: query, positive document, negative document (texts)
        OUTPUT_IDS, TSV: line of the input (counted from 0), positive id, negative id
        OUTPUT.holdout.jsonl with --holdout: synthetic queries that are in no triple
        OUTPUT.holdout.run.txt with --holdout and --run: their hits

    python generate_triples_train.py --input data/msmarco/filtered_synthetic_queries.jsonl \
        --output data/msmarco/synthetic.triples.train.tsv --output_ids data/msmarco/synthetic.triples.train.ids.tsv \
        --corpus data/msmarco/collection.tsv --index msmarco-passage

--index is a folder with a Lucene index, a prebuilt index of Pyserini, or a path that does not exist yet, at which the
corpus is then indexed. No Java has to be installed. --run replaces the index by a run of any first stage, whose query
ids are lines of the input, counted from 0 (docs/first-stage.md). Negatives are sampled from the hits at ranks
--min_rank to --max_hits. A document with the positive's text is never a negative. After a kill, run the same command
again to resume.
"""

import argparse
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence

from inpars_lib import bm25
from inpars_lib.cli import InputError, at_least, run_script, script_parser, warn
from inpars_lib.files import atomic_write, exclusive, is_special
from inpars_lib.first_stage import QueryRun
from inpars_lib.formats.collection import read_texts
from inpars_lib.formats.lines import tsv_line
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.formats.records import SyntheticQuery
from inpars_lib.formats.runs import write_run
from inpars_lib.negatives import sample_negatives
from inpars_lib.resume import add_restart_flag

EXPECTED_RECALL = 0.1  # a first stage that retrieves fewer source documents is suspicious


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, help="filtered synthetic queries, JSONL, or - for standard input")
    add("--output", required=True, help="triples of texts to write, TSV")
    add("--output_ids", required=True, help="triples of ids to write, TSV")
    add("--corpus", required=True, help="collection that the queries were written for")
    first_stage = parser.add_mutually_exclusive_group().add_argument
    first_stage("--index", default="msmarco-passage", help="BM25 index of the corpus (default: %(default)s)")
    first_stage("--run", help="run to sample negatives from instead of BM25's hits, TREC, MS MARCO or ColBERT "
        "format; its query ids are lines of the input, counted from 0")  # fmt: skip
    add("--max_hits", type=at_least(1), default=1000, help="hits to sample negatives from (default: %(default)s)")
    add("--min_rank", type=at_least(1), default=1, help="first rank to sample negatives from (default: %(default)s)")
    add("--n_samples", type=at_least(1), default=1, help="negatives per query (default: %(default)s, as in the paper)")
    add(
        "--holdout",
        type=at_least(0),
        default=0,
        metavar="N",
        help="queries to hold out from training; more if a document has several (default: 0)",
    )
    add("--seed", type=int, default=1, help="seed of negatives and held-out queries (default: %(default)s)")
    add_restart_flag(add)
    bm25.add_search_flags(parser)
    return parser


def clean_text(text: str) -> str:
    """Repair broken encodings, and replace each run of whitespace by one space.

    Quotes, ligatures and full-width characters stay, because rerank.py reads them from the collection too.
    """
    import ftfy

    return " ".join(ftfy.fix_encoding(text).split())


def read_queries(path: str) -> list[SyntheticQuery]:
    """Return the rows that have a query and a document text, both cleaned."""
    rows = list(read_synthetic_queries(path))
    queries = [row._replace(question=clean_text(row.question), doc_text=clean_text(row.doc_text)) for row in rows]
    queries = [query for query in queries if query.question and query.doc_text]
    if not queries:
        raise InputError(f"{path}: no row has both a question and a document text. Pass the output of stage 1 or 2.")
    if len(queries) < len(rows):
        warn(f"{path}: dropped {len(rows) - len(queries):,} rows without a question or a document text.")
    return queries


def choose_held_out(args: argparse.Namespace, queries: list[SyntheticQuery]) -> set[str]:
    """Return the source documents of random queries to hold out.

    With several queries per document, those of a held-out document are held out together, which may exceed --holdout.
    """
    n = args.holdout
    if n >= len(queries):
        raise InputError(f"{args.input}: {len(queries):,} usable rows, so --holdout {n} leaves none. Lower --holdout.")
    document = {query.line: query.doc_id for query in queries}
    lines = random.Random(f"{args.seed} holdout").sample(list(document), n)
    sizes, chosen, size = Counter(document.values()), set(), 0
    for line in lines:
        if size < n and document[line] not in chosen:
            chosen.add(document[line])
            size += sizes[document[line]]
    if size == len(queries):
        raise InputError(f"{args.input}: no document is left with --holdout {n}. Lower --holdout.")
    return chosen


def write_held_out(queries_path: str, run_path: str, held_out: list[SyntheticQuery], run: QueryRun | None) -> None:
    """Write the held-out queries, if any, and their hits, if there is a run."""
    if held_out:
        with atomic_write(queries_path) as file:
            file.writelines(query.line_text + "\n" for query in held_out)
    if held_out and run:
        by_query = (run.hits.get(str(query.line), ()) for query in held_out)
        hits = (hit._replace(query_id=str(i)) for i, found in enumerate(by_query) for hit in found)
        write_run(run_path, hits, tag="first-stage")


def main(argv: Sequence[str] | None = None) -> None:
    """Hold out some queries, sample negatives for the others, write the triples."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if os.path.realpath(args.output) == os.path.realpath(args.output_ids):
        parser.error("--output and --output_ids name the same file")
    if is_special(args.output):
        parser.error(f"--output {args.output}: a log is kept beside the triples, so name a file")
    if args.min_rank > args.max_hits:
        parser.error("--min_rank must not be above --max_hits")
    if args.run and (args.k1, args.b, args.language) != (None, None, None):
        parser.error("--k1, --b and --language are for BM25 on --index, not for --run")

    with exclusive(args.output), exclusive(args.output_ids):
        write_triples(args)


def write_triples(args: argparse.Namespace) -> None:
    """Do the work of `main` while no other process writes the output."""
    # 1. The queries
    queries = read_queries(args.input)
    run = QueryRun(args.run, args.input) if args.run else None
    first_stage, kind = (args.run, "run") if args.run else (args.index, "index")
    held_out_docs = choose_held_out(args, queries) if args.holdout else set()
    held_out = [query for query in queries if query.doc_id in held_out_docs]
    queries = [query for query in queries if query.doc_id not in held_out_docs]

    # 2. Their negatives
    config = bm25.BM25Config(args.threads, args.k1, args.b, args.language)
    sampled = sample_negatives(
        queries,
        run or bm25.open_index(args.index, args.corpus, config),
        log_path := f"{args.output}.negatives.jsonl",
        max_hits=args.max_hits,
        min_rank=args.min_rank,
        n_samples=args.n_samples,
        seed=args.seed,
        restart=args.restart,
    )
    mrr = sum(1 / hits.source_rank for hits in sampled if hits.source_rank) / len(queries)
    recall = sum(hits.source_found for hits in sampled) / len(queries)
    print(
        f"{args.run or 'BM25'} retrieves the source documents with MRR@10 {mrr:.4f} and R@{args.max_hits} {recall:.4f}",
        file=sys.stderr,
    )
    if run:
        if missing := sum(str(query.line) not in run.hits for query in queries):
            warn(f"{args.run}: {missing:,} of {len(queries):,} queries have no hits.")
        if recall < EXPECTED_RECALL:
            warn(f"{args.run}: few source documents are among the hits of their query. Is it the run of {args.input}?")

    # 3. The texts of the negatives
    wanted = {doc_id for hits in sampled for doc_id in hits.doc_ids}
    texts = read_texts(args.corpus, wanted, desc="Reading texts")
    texts = {doc_id: clean_text(text) for doc_id, text in texts.items()}
    absent = sorted(doc_id for doc_id in wanted if not texts.get(doc_id))
    if len(absent) == len(wanted) > 0:
        action = "Set --index to a path that does not exist yet, and the corpus is indexed there."
        raise InputError(
            f"{first_stage}: none of the {len(wanted):,} sampled documents has a text in {args.corpus} ({absent[0]} "
            f"for example), so the {kind} is of another collection. {'Pass its run.' if args.run else action}"
        )

    # 4. The triples
    triples = unserved = 0
    held_out_paths = f"{args.output}.holdout.jsonl", f"{args.output}.holdout.run.txt"
    with atomic_write(args.output) as output, atomic_write(args.output_ids) as output_ids:
        for query, hits in zip(queries, sampled, strict=True):
            usable = [doc_id for doc_id in hits.doc_ids if texts.get(doc_id) not in (None, "", query.doc_text)]
            for doc_id in usable:
                output.write(tsv_line(query.question, query.doc_text, texts[doc_id]))
                output_ids.write(tsv_line(str(query.line), query.doc_id, doc_id))
            triples += len(usable)
            unserved += not usable
        if not triples:
            ranks = f" at ranks {args.min_rank} to {args.max_hits}" if args.min_rank > 1 else ""
            raise InputError(
                f"{first_stage}: no query has a hit{ranks} other than its source document. Pass the {kind} of "
                f"{args.corpus}{', or lower --min_rank' if ranks else ''}."
            )
        # Before the triples are replaced, so that a kill never leaves triples beside other held-out queries
        replaced = [path for path in held_out_paths if os.path.exists(path)]
        for path in replaced:
            os.remove(path)
    if absent:
        warn(f"{args.corpus}: no text for {len(absent):,} documents of the {kind}, the first is {absent[0]}.")
    write_held_out(*held_out_paths, held_out, run)
    for path in replaced:
        if not os.path.exists(path):
            print(f"{path}: deleted, because it belonged to the triples that this run has replaced", file=sys.stderr)
    os.remove(log_path)
    print(f"{args.output}: {triples:,} triples; {unserved:,} queries without a usable hit", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, interrupted="Run the same command again to resume.")
