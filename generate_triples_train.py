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
--min_rank to --max_hits. The source document is never a negative, nor is a document with its text, so --remove_query
of other commands is not needed here. After a kill, run the same command again to resume.
"""

import argparse
import hashlib
import heapq
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO

from inpars_lib import bm25
from inpars_lib.cli import InputError, at_least, counted, run_script, script_parser, warn
from inpars_lib.files import claimed, is_special, resolve_output, write_together
from inpars_lib.first_stage import QueryRun
from inpars_lib.formats.collection import collection_paths, conflicting_texts, read_collection
from inpars_lib.formats.fields import tsv_line
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.formats.runs import run_lines
from inpars_lib.negatives import SampledHits, Sampling, sample_negatives
from inpars_lib.resume import ResumeLog, add_restart_flag
from inpars_lib.spool import ABSENT, SpooledQueries, SpooledTexts

# Suffixes of files beside --output
LOG, HELD_OUT, HELD_OUT_RUN = ".negatives.jsonl", ".holdout.jsonl", ".holdout.run.txt"
MRR_DEPTH = 10
EXPECTED_RECALL = 0.1  # a first stage that retrieves fewer source documents is suspicious


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, help="filtered synthetic queries, JSONL, or - for standard input")
    add("--output", type=resolve_output, required=True, help="triples of texts to write, TSV")
    add("--output_ids", type=resolve_output, required=True, help="triples of ids to write, TSV")
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


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check how they combine."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.output == "-" or is_special(args.output):
        parser.error(f"--output {args.output}: a log is kept beside the triples, so name a file")
    if args.min_rank > args.max_hits:
        parser.error("--min_rank must not be above --max_hits")
    if args.run and (args.k1, args.b, args.language) != (None, None, None):
        parser.error("--k1, --b and --language are for BM25 on --index, not for --run")
    return args


def clean_text(text: str) -> str:
    """Repair broken encodings, and replace each run of whitespace by one space.

    Quotes, ligatures and full-width characters stay, because rerank.py reads them from the collection too.
    """
    import ftfy

    return " ".join(ftfy.fix_encoding(text).split())


def read_queries(path: str, folder: str) -> SpooledQueries:
    """Return the rows that have a query, cleaned."""
    queries, dropped = SpooledQueries(folder), 0
    for row in read_synthetic_queries(path):
        query = row._replace(question=clean_text(row.question), doc_text=clean_text(row.doc_text))
        if query.question:
            queries.append(query)
        else:
            dropped += 1
    if not queries:
        raise InputError(f"{path}: no row has a question. Pass the output of stage 1 or 2.")
    if dropped:
        warn(f"{path}: dropped {counted(dropped, 'row')} without a question.")
    return queries


def hold_out(queries: SpooledQueries, n: int, seed: int, folder: str) -> tuple[SpooledQueries, SpooledQueries]:
    """Split the queries into those to train on and `n` held-out ones, at random.

    Queries of one document are held out together, which may exceed `n`.
    """
    keys = ((hashlib.sha256(f"{seed} {query.doc_id}".encode()).digest(), query.doc_id) for query in queries)
    documents = {doc_id for _, doc_id in heapq.nsmallest(n, keys)}
    training, held_out = SpooledQueries(folder), SpooledQueries(folder)
    for query in queries:
        if query.doc_id in documents:
            held_out.append(query)
        else:
            training.append(query)
    return training, held_out


def report_first_stage(
    args: argparse.Namespace, queries: SpooledQueries, log: ResumeLog[SampledHits], run: QueryRun | None
) -> None:
    """Print how often the first stage retrieves the source documents, and warn of a run that rarely does."""
    ranks = [hits.source_rank for hits in log.rows() if hits.source_rank]
    mrr = sum(1 / rank for rank in ranks if rank <= MRR_DEPTH) / len(queries)
    recall = len(ranks) / len(queries)
    name = args.run or "BM25"
    measures = f"MRR@10 {mrr:.4f} and R@{args.max_hits} {recall:.4f}"
    print(f"{name} retrieves the source documents with {measures}", file=sys.stderr)
    if run:
        missing = sum(str(query.line) not in run.hits for query in queries)
        if missing:
            warn(f"{args.run}: {missing:,} of {len(queries):,} queries have no hits.")
        if recall < EXPECTED_RECALL:
            warn(f"{args.run}: few source documents are among the hits of their query. Is it the run of {args.input}?")


def read_wanted_texts(
    args: argparse.Namespace, queries: SpooledQueries, log: ResumeLog[SampledHits], folder: str
) -> SpooledTexts:
    """Return the texts of the negatives, and of source documents whose rows have no text, from the collection."""
    texts = SpooledTexts((doc_id for hits in log.rows() for doc_id in hits.doc_ids), folder)
    sampled = len(texts.starts)
    texts.starts.update((query.doc_id, ABSENT) for query in queries if not query.doc_text)
    for doc_id, text in read_collection(args.corpus, texts.starts, desc="Reading texts", repeats=True):
        cleaned = clean_text(text)
        if texts.text(doc_id) not in ("", cleaned):
            raise conflicting_texts(args.corpus, doc_id)
        texts.add(doc_id, cleaned)
    absent = sorted({doc_id for hits in log.rows() for doc_id in hits.doc_ids if texts.starts[doc_id] == ABSENT})
    source = args.run or args.index
    if len(absent) == sampled > 0:
        problem = f"none of the {sampled:,} sampled documents has a text in {args.corpus} ({absent[0]} for example)"
        raise InputError(f"{source}: {problem}. Pass the run, the index or a new index of this collection.")
    if absent:
        warn(f"{args.corpus}: no text for {counted(len(absent), 'document')} of {source}, the first is {absent[0]}.")
    return texts


def write_rows(
    args: argparse.Namespace,
    queries: SpooledQueries,
    log: ResumeLog[SampledHits],
    texts: SpooledTexts,
    output: IO[str],
    output_ids: IO[str],
) -> str:
    """Write a triple and its ids for each negative that has a text other than the positive's. Return a summary."""
    triples = without_negative = without_text = 0
    for query, hits in zip(queries, log.rows(), strict=True):
        positive = query.doc_text or texts.text(query.doc_id)
        if not positive:
            without_text += 1
            continue
        negatives = [(doc_id, texts.text(doc_id)) for doc_id in hits.doc_ids]
        usable = [(doc_id, text) for doc_id, text in negatives if text not in ("", positive)]
        for doc_id, text in usable:
            output.write(tsv_line(query.question, positive, text))
            output_ids.write(tsv_line(str(query.line), query.doc_id, doc_id))
        triples += len(usable)
        if not usable:
            without_negative += 1
    if without_text == len(queries):
        problem = f"no row has a document text (`doc_text` or `text`), and no source document is in {args.corpus}"
        raise InputError(f"{args.input}: {problem}. Pass the collection of the queries.")
    if not triples:
        problem = f"no query has a hit at ranks {args.min_rank} to {args.max_hits} other than its source document"
        action = f"Pass the run or the index of {args.corpus}, or other ranks."
        raise InputError(f"{args.run or args.index}: {problem}. {action}")
    if without_text:
        dropped = counted(without_text, "row")
        warn(f"{args.input}: dropped {dropped} whose document has no text, not in {args.corpus} either.")
    return f"{counted(triples, 'triple')}; {counted(without_negative, 'query')} without a usable hit"


def held_out_run(held_out: SpooledQueries, run: QueryRun) -> Iterator[str]:
    """Yield the lines of the run of the held-out queries. The query id is the line in the new file."""
    for line, query in enumerate(held_out):
        hits = run.hits.get(str(query.line), ())
        yield from run_lines((hit._replace(query_id=str(line)) for hit in hits), tag="first-stage")


def main(argv: Sequence[str] | None = None) -> None:
    """Hold out some queries, sample negatives for the others, write the triples."""
    args = parse_args(argv)
    inputs = {
        "--input": args.input,
        "--corpus": collection_paths(args.corpus),
        "--run": args.run,
        "--index": args.index,
    }
    outputs = {"--output": args.output, "--output_ids": args.output_ids}
    sidecars = {f"the {suffix} file": args.output + suffix for suffix in (LOG, HELD_OUT, HELD_OUT_RUN)}
    with claimed(inputs, outputs, sidecars):
        write_triples(args)


def write_triples(args: argparse.Namespace) -> None:
    """Sample negatives and write the triples. The caller has locked the outputs."""
    folder = os.path.dirname(args.output) or "."  # of temporary files

    # 1. The queries, some of them held out
    usable = read_queries(args.input, folder)
    queries, held_out = hold_out(usable, args.holdout, args.seed, folder)
    if not queries:
        problem = f"{len(held_out):,} usable rows, so --holdout {args.holdout} leaves none"
        raise InputError(f"{args.input}: {problem}. Lower --holdout.")

    # 2. Negatives, sampled from the first-stage hits of each query
    run = QueryRun(args.run, args.input) if args.run else None
    config = bm25.BM25Config(args.threads, args.k1, args.b, args.language)
    first_stage = run or bm25.open_index(args.index, args.corpus, config)
    sampling = Sampling(args.max_hits, args.min_rank, args.n_samples, args.seed)
    log = sample_negatives(queries, first_stage, sampling, args.output + LOG, args.restart)
    report_first_stage(args, queries, log, run)

    # 3. The texts of the negatives
    texts = read_wanted_texts(args, queries, log, folder)

    # 4. The triples, and the held-out queries that belong to them
    held_out_path = args.output + HELD_OUT if held_out else None
    held_out_run_path = args.output + HELD_OUT_RUN if held_out and run else None
    earlier = {args.output + HELD_OUT, args.output + HELD_OUT_RUN} - {held_out_path, held_out_run_path}
    stale = sorted(filter(os.path.exists, earlier))
    outputs = (args.output, "w"), (args.output_ids, "w"), (held_out_path, "w"), (held_out_run_path, "w")
    with write_together(*outputs, stale=stale) as [output, output_ids, queries_file, run_file]:
        summary = write_rows(args, queries, log, texts, output, output_ids)
        if queries_file:
            queries_file.writelines(query.line_text + "\n" for query in held_out)
        if run_file:
            run_file.writelines(held_out_run(held_out, run))
    log.delete()
    for path in stale:
        print(f"{path}: deleted, because it belonged to the triples that this run has replaced", file=sys.stderr)
    print(f"{args.output}: {summary}", file=sys.stderr)
    if held_out:
        next_flags = f"--run {held_out_run_path}" if run else f"--index {args.index}"
        use = f"For train_t5.py: --holdout {held_out_path} {next_flags} --corpus {args.corpus}"
        print(f"{held_out_path}: {counted(len(held_out), 'query')} held out. {use}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, interrupted="Run the same command again to resume.")
