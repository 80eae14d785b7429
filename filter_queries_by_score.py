r"""Stage 2: keep the synthetic queries with the highest scores.

Reads   synthetic queries, our own or a published set (JSONL: doc_id, doc_text, question, log_probs)
Writes  the --top_k best of them, best first, each with its `score`

    python filter_queries_by_score.py --input data/msmarco/synthetic_queries.jsonl \
        --output data/msmarco/filtered_synthetic_queries.jsonl --top_k 10000 --scoring_function mean_log_probs

Scoring functions of the log-probabilities of a query's tokens:

    mean_log_probs   their mean, as in the paper: how likely each token is, whatever the query's length
    sum_log_probs    their sum: how likely the whole query is, which favours short queries
    mean_probs       the mean of the probabilities: less strict about a single unlikely token

Two scoring functions need no log-probabilities: `monot5` scores query and document with a trained reranker
(InPars-v2, arXiv 2301.01820), and `consistency` is 1 / the rank at which the first stage retrieves the source
document. With every scoring function, --consistency_k 20 --index INDEX drops queries whose source document is not
among the first 20 BM25 hits (after Promptagator, arXiv 2209.11755); --run RUN is any other first stage. Ties are
broken by mean log-probability, then by a hash of doc_id. Memory grows with --top_k and the run, not with the input.
Scores of a reranker are saved: after a kill, run the same command again.
"""

import argparse
import heapq
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice

from inpars_lib import bm25
from inpars_lib.cli import InputError, at_least, run_script, script_parser, warn
from inpars_lib.files import atomic_write, exclusive, is_special, json_line
from inpars_lib.first_stage import QueryRun
from inpars_lib.formats.fields import json_object
from inpars_lib.formats.queries import LARGEST, SyntheticRow, read_synthetic_queries
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery
from inpars_lib.plots import plot_histogram
from inpars_lib.query_browser import QuerySample
from inpars_lib.resume import ResumeLog, add_restart_flag

LOG_PROB_SCORES: dict[str, Callable[[list[float]], float]] = {
    "mean_log_probs": lambda log_probs: sum(log_probs) / len(log_probs),  # arXiv 2202.05144, section 3
    "sum_log_probs": sum,
    "mean_probs": lambda log_probs: sum(map(math.exp, log_probs)) / len(log_probs),
}
# Scoring functions and the bin widths of their histograms
BIN_WIDTHS = {"mean_log_probs": 0.05, "sum_log_probs": 1.0, "mean_probs": 0.02, "monot5": 0.1, "consistency": 0.05}
NO_LOG_PROBS = "without log-probabilities"
BLOCK = 1024  # rows that BM25 takes at a time


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, help="synthetic queries, JSONL, or - for standard input")
    add("--output", required=True, help="filtered queries to write, JSONL, or - for standard output")
    add("--top_k", type=at_least(1), default=10_000, help="queries to keep (default: %(default)s)")
    add("--scoring_function", choices=list(BIN_WIDTHS), default="mean_log_probs", help="function that scores a query "
        "(default: %(default)s)")  # fmt: skip
    add("--model", help="reranker for monot5: a folder, or a hub name such as castorini/monot5-3b-msmarco-10k")
    add("--instruction", metavar="TEXT", help="causal models: task that the model reads before the query (default: "
        "Given a web search query, retrieve relevant passages that answer the query)")  # fmt: skip
    add("--consistency_k", type=at_least(1), metavar="K", help="drop queries whose source document is not among the "
        "first K hits of --index or --run")  # fmt: skip
    add("--index", help="BM25 index for --consistency_k: a folder, a prebuilt index of Pyserini, or a new path")
    add("--run", help="run for --consistency_k instead of --index; its query ids are the lines of --input, from 0")
    add("--corpus", help="collection to index if --index is a new path")
    add("--min_tokens", type=at_least(1), default=3, help="drop shorter queries, in tokens (default: %(default)s)")
    add("--max_tokens", type=at_least(1), help="drop longer queries, in tokens (default: no limit)")
    add("--skip_questions_copied_from_context", action="store_true", help="drop queries that occur in their document")
    add("--plot", metavar="PNG", help="histogram of the scores to write, with the cutoff")
    add("--sample_html", metavar="HTML", help="page to write: browse a sample of the rows, kept and dropped")
    add_restart_flag(add)
    bm25.add_search_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check how they combine."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.scoring_function == "monot5") != bool(args.model) or (args.instruction and not args.model):
        parser.error("--scoring_function monot5 and --model need each other, and --instruction needs both")
    if args.scoring_function == "consistency" and not args.consistency_k:
        parser.error("--scoring_function consistency needs --consistency_k")
    if bool(args.consistency_k) != bool(args.index or args.run) or (args.index and args.run):
        parser.error("--consistency_k and either --index or --run need each other")
    if "-" in (args.input, args.output) and (args.model or args.run):
        parser.error("--model and --run need files: - cannot be read twice and has no log beside it")
    if [args.output, args.plot, args.sample_html].count("-") > 1:
        parser.error("only one of --output, --plot and --sample_html can be `-`, standard output")
    return args


def drop_reason(query: SyntheticQuery | SyntheticRow, args: argparse.Namespace) -> str | None:
    """Return why a query is dropped before it is scored, or None."""
    if not query.question:
        return "without a question"
    if query.log_probs is None and args.scoring_function in LOG_PROB_SCORES:
        return NO_LOG_PROBS
    # Without log-probabilities the model's tokens are unknown, so words are counted.
    length = len(query.question.split() if query.log_probs is None else query.log_probs)
    if length < args.min_tokens:
        return f"with fewer than {args.min_tokens} tokens"
    if args.max_tokens is not None and length > args.max_tokens:
        return f"with more than {args.max_tokens} tokens"
    if args.skip_questions_copied_from_context and query.question.lower() in query.doc_text.lower():
        return "copied from the document"
    return None


def first_stage_hits(
    queries: Iterator[SyntheticQuery], args: argparse.Namespace
) -> Iterator[tuple[SyntheticQuery, Sequence[ScoredDoc]]]:
    """Yield each query with its first --consistency_k hits."""
    searcher: QueryRun | bm25.BM25Searcher
    if args.run:
        searcher = QueryRun(args.run, args.input)
        if searcher.depth < args.consistency_k:
            warn(f"{args.run}: at most {searcher.depth} hits per query, so --consistency_k {searcher.depth} is used.")
    else:
        config = bm25.BM25Config(args.threads, args.k1, args.b, args.language)
        searcher = bm25.open_index(args.index, args.corpus, config)
    while block := list(islice(queries, BLOCK)):
        questions = {str(query.line): query.question for query in block}
        found = searcher.search(questions, args.consistency_k, bar=False)
        yield from zip(block, (hits for _, hits in found), strict=True)


def score_queries(
    ranked: Iterator[tuple[SyntheticQuery, int | None]], args: argparse.Namespace, log_path: str
) -> Iterator[tuple[SyntheticQuery, float]]:
    """Yield each query with its score."""
    if args.scoring_function == "consistency":
        yield from ((query, 1 / rank) for query, rank in ranked if rank)
    elif args.scoring_function in LOG_PROB_SCORES:
        score = LOG_PROB_SCORES[args.scoring_function]
        yield from ((query, score(query.log_probs or [])) for query, _ in ranked)
    else:
        from inpars_lib.rerankers import scoring
        from inpars_lib.rerankers.load import load_reranker

        reranker = load_reranker(args.model, instruction=args.instruction)
        settings = {"model": args.model, "instruction": args.instruction, "dtype": str(reranker.model.dtype)}
        settings |= {"files": scoring.files_fingerprint(args.model)}
        queries = (query for query, _ in ranked)
        log = ResumeLog(log_path, settings, scoring.ScoredBlock)
        log.prepare(args.restart)
        yield from scoring.score_queries(reranker, queries, args.input, log)


def tie_break(query: SyntheticQuery) -> tuple[float, int, int]:
    """Return what decides between equal scores, higher is better. The hash favours no ids."""
    mean = sum(query.log_probs) / len(query.log_probs) if query.log_probs else -math.inf
    return mean, -zlib.crc32(query.doc_id.encode(errors="replace")), -query.line


class BestQueries:
    """The `k` queries with the highest scores so far, in a heap.

    Attributes:
        cutoff: Score below which a query is not kept, -inf until there are `k` queries.
    """

    def __init__(self, k: int) -> None:
        self.k, self.cutoff = k, -math.inf
        self._heap: list[tuple[float, tuple[float, int, int], str]] = []

    def add(self, query: SyntheticQuery, score: float) -> None:
        """Keep a query if its score is among the best."""
        if len(self._heap) < self.k:
            heapq.heappush(self._heap, (score, tie_break(query), query.line_text))
        elif score >= self.cutoff:
            heapq.heappushpop(self._heap, (score, tie_break(query), query.line_text))
        if len(self._heap) == self.k:
            self.cutoff = self._heap[0][0]

    def ranked(self) -> list[tuple[int, str, float]]:
        """Return (line number from 0, line, score) of the queries, best first."""
        return [(-tie[-1], line, score) for score, tie, line in sorted(self._heap, reverse=True)]


def with_score(line: str, score: float) -> str:
    """Return a line of JSONL with the score as its last field, newline included."""
    if '"score"' in line:  # of an earlier filter, perhaps
        return json_line({**json_object(line), "score": score})
    return f'{line.rstrip().removesuffix("}")}, "score": {score!r}}}\n'


def main(argv: Sequence[str] | None = None) -> None:
    """Score every query, keep the best, say what was dropped."""
    args = parse_args(argv)
    with exclusive(args.output) if args.output != "-" else nullcontext():
        filter_queries(args)


def filter_queries(args: argparse.Namespace) -> None:
    """Do the work of `main` while no other process writes the output."""
    log_path = os.devnull if is_special(args.output) else f"{args.output}.scores.jsonl"  # of a reranker
    width = BIN_WIDTHS[args.scoring_function]
    dropped: Counter[str] = Counter()
    bins: Counter[int] = Counter()  # with --plot, all scored queries by score
    sample, best = QuerySample(), BestQueries(args.top_k)
    scored = 0
    # Most rows need one look at their log-probabilities, unless an option needs more.
    others = args.consistency_k or args.skip_questions_copied_from_context or args.sample_html
    log_prob_score = LOG_PROB_SCORES.get(args.scoring_function)
    bar = None if args.model else "Scoring"  # a reranker has a bar of its own
    simple = log_prob_score and not others

    def count(score: float) -> None:
        nonlocal scored
        scored += 1
        if args.plot:
            bins[math.floor(score / width)] += 1

    def drop(query: SyntheticQuery, reason: str) -> None:
        dropped[reason] += 1
        if args.sample_html:
            sample.add(query, None, reason)

    def below_cutoff(row: SyntheticRow) -> bool:
        """Count a row and return True if its log-probabilities tell at once that the row is not kept."""
        if not row.log_probs or not row.question.strip() or drop_reason(row, args):
            return False
        score = log_prob_score(row.log_probs)
        if not -LARGEST < score < best.cutoff:
            return False
        count(score)
        return True

    def usable() -> Iterator[SyntheticQuery]:
        for query in read_synthetic_queries(args.input, bar, below_cutoff if simple else None):
            if reason := drop_reason(query, args):
                drop(query, reason)
            else:
                yield query

    def ranked() -> Iterator[tuple[SyntheticQuery, int | None]]:
        if not args.consistency_k:
            yield from ((query, None) for query in usable())
            return
        missed = f"whose source document is not among the first {args.consistency_k} hits"
        for query, hits in first_stage_hits(usable(), args):
            rank = next((rank for rank, hit in enumerate(hits, 1) if hit.doc_id == query.doc_id), None)
            if rank:
                yield query, rank
            else:
                drop(query, missed if hits or args.index else f"without hits in {args.run}")

    # 1. The best queries
    for query, score in score_queries(ranked(), args, log_path):
        count(score)
        if args.sample_html:
            sample.add(query, score, None)
        best.add(query, score)
    kept = best.ranked()
    hint = " Rows without log-probabilities can be scored with --scoring_function monot5 --model NAME."
    hint = hint if dropped[NO_LOG_PROBS] else ""
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        raise InputError(f"{args.input}: every row was dropped ({reasons}). Relax the filters.{hint}")

    # 2. The output
    with atomic_write(args.output) as file:
        for _, line, score in kept:
            file.write(with_score(line, score))
    cutoff = kept[-1][-1]
    if args.plot:
        kept_bins = Counter(math.floor(score / width) for *_, score in kept)
        plot_histogram(args.plot, bins, kept_bins, width, cutoff, args.scoring_function)
    if args.sample_html:
        summary = f"{len(kept):,} rows of {args.input} were kept. The score is {args.scoring_function}."
        sample.write(args.sample_html, {number for number, *_ in kept}, summary)
    if args.model and log_path != os.devnull:
        os.remove(log_path)

    # 3. What was dropped
    for reason, count in dropped.most_common():
        if count:
            print(f"dropped {count:,} rows {reason}.{hint if reason == NO_LOG_PROBS else ''}", file=sys.stderr)
    print(
        f"{args.output}: kept {len(kept):,} of {scored + dropped.total():,} rows; {args.scoring_function} from "
        f"{kept[0][-1]:.4f} to {cutoff:.4f}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_script(main, interrupted="Scores of a reranker are saved. Run the same command again.")
