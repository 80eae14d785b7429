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
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inpars_lib import bm25
from inpars_lib.cli import InputError, at_least, counted, run_script, script_parser, warn
from inpars_lib.files import claimed, is_special, json_line, resolve_output, write_together
from inpars_lib.first_stage import FirstStage, QueryRun, search_in_blocks, source_rank
from inpars_lib.formats.collection import collection_paths
from inpars_lib.formats.fields import json_object
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.formats.records import SyntheticQuery
from inpars_lib.plots import plot_histogram
from inpars_lib.query_browser import QuerySample, prompt_lines
from inpars_lib.resume import ResumeLog, add_restart_flag

if TYPE_CHECKING:
    from inpars_lib.rerankers.scoring import QueryScorer

PROMPTS = [str(path) for path in sorted(Path(__file__).with_name("prompts").glob("*.txt"))]
LOG_PROB_SCORES: dict[str, Callable[[list[float]], float]] = {
    "mean_log_probs": lambda log_probs: sum(log_probs) / len(log_probs),  # arXiv 2202.05144, section 3
    "sum_log_probs": sum,
    "mean_probs": lambda log_probs: sum(map(math.exp, log_probs)) / len(log_probs),
}
# Scoring functions and the bin widths of their histograms
BIN_WIDTHS = {"mean_log_probs": 0.05, "sum_log_probs": 1.0, "mean_probs": 0.02, "monot5": 0.1, "consistency": 0.05}
BLOCK = 1024  # rows in memory at a time
ROUNDING = 0.01  # by which a log-probability may exceed 0
NO_LOG_PROBS = "without log-probabilities"
ADVICE = "Rows without log-probabilities can be scored with --scoring_function monot5 --model NAME."


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, help="synthetic queries, JSONL, or - for standard input")
    add(
        "--output",
        type=resolve_output,
        required=True,
        help="filtered queries to write, JSONL, or - for standard output",
    )
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
    add("--plot", type=resolve_output, metavar="PNG", help="histogram of the scores to write, with the cutoff")
    add(
        "--sample_html",
        type=resolve_output,
        metavar="HTML",
        help="page to write: browse a sample of the rows, kept and dropped",
    )
    add("--prompt_template", default=PROMPTS, nargs="+", metavar="PROMPT", help="prompt of stage 1, to mark copies of "
        "its example queries in --sample_html (default: all of prompts/)")  # fmt: skip
    add_restart_flag(add)
    bm25.add_search_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check how they combine."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.scoring_function == "monot5") != bool(args.model):
        parser.error("--scoring_function monot5 and --model need each other")
    if args.instruction and not args.model:
        parser.error("--instruction needs --model")
    if args.scoring_function == "consistency" and not args.consistency_k:
        parser.error("--scoring_function consistency needs --consistency_k")
    if args.index and args.run:
        parser.error("--index and --run exclude each other")
    if bool(args.consistency_k) != bool(args.index or args.run):
        parser.error("--consistency_k and either --index or --run need each other")
    if [args.output, args.plot, args.sample_html].count("-") > 1:
        parser.error("only one of --output, --plot and --sample_html can be `-`, standard output")
    streamed = "-" in (args.input, args.output) or is_special(args.input)
    if streamed and (args.model or args.run):
        parser.error("--model and --run need files: - or a pipe cannot be read twice and has no log beside it")
    if args.model and is_special(args.output):
        parser.error(f"--output {args.output}: scores are saved beside the output, so name a file")
    return args


class Candidate(NamedTuple):
    """A scored row. The best row is the largest tuple: ties are broken by mean log-probability, then by a hash.

    Attributes:
        score: The score.
        mean_log_prob: Mean of the log-probabilities, -inf without any.
        doc_hash: Hash of the doc_id, which favours no ids.
        minus_line: Minus the line of the input, from 0.
        line_text: The line as it is in the file.
    """

    score: float
    mean_log_prob: float
    doc_hash: int
    minus_line: int
    line_text: str


class Outcome:
    """Running result of the filter: the best rows, counts of dropped ones by reason, and a sample for the page.

    Attributes:
        best: Heap of the best rows.
        scored: Number of rows with a score.
        dropped: Number of rows without one by reason.
        bins: Number of scored rows by bin of the histogram.
        sample: Sample of all rows.
    """

    def __init__(self, top_k: int, bin_width: float) -> None:
        self.top_k, self.bin_width, self.scored = top_k, bin_width, 0
        self.best: list[Candidate] = []
        self.dropped: Counter[str] = Counter()
        self.bins: Counter[int] = Counter()
        self.sample = QuerySample()

    def add_dropped(self, query: SyntheticQuery, reason: str) -> None:
        """Count a row that gets no score."""
        self.dropped[reason] += 1
        self.sample.add(query, None, reason)

    def add_scored(self, query: SyntheticQuery, score: float) -> None:
        """Count a row with a score, and keep it if it is one of the best so far."""
        self.scored += 1
        self.bins[self.bin_of(score)] += 1
        self.sample.add(query, score, None)
        mean = sum(query.log_probs) / len(query.log_probs) if query.log_probs else -math.inf
        doc_hash = -zlib.crc32(query.doc_id.encode(errors="replace"))
        candidate = Candidate(score, mean, doc_hash, -query.line, query.line_text)
        if len(self.best) < self.top_k:
            heapq.heappush(self.best, candidate)
        else:
            heapq.heappushpop(self.best, candidate)

    def bin_of(self, score: float) -> int:
        """Return the bin of a score in the histogram."""
        return math.floor(score / self.bin_width)


def drop_reason(query: SyntheticQuery, args: argparse.Namespace) -> str | None:
    """Return why a query is dropped before it is scored, or None."""
    if not query.question:
        return "without a question"
    if query.log_probs is None and args.scoring_function in LOG_PROB_SCORES:
        return NO_LOG_PROBS
    if query.log_probs and max(query.log_probs) > ROUNDING:
        return "with log-probabilities above 0"
    if args.model and not query.doc_text:
        return "without a document text"
    # Without log-probabilities the model's tokens are unknown, so words are counted.
    length = len(query.question.split() if query.log_probs is None else query.log_probs)
    if length < args.min_tokens:
        return f"with fewer than {args.min_tokens} tokens"
    if args.max_tokens is not None and length > args.max_tokens:
        return f"with more than {args.max_tokens} tokens"
    if args.skip_questions_copied_from_context and query.question.lower() in query.doc_text.lower():
        return "copied from the document"
    return None


def drop_unusable(block: Sequence[SyntheticQuery], args: argparse.Namespace, outcome: Outcome) -> list[SyntheticQuery]:
    """Return the rows of a block that can be scored, and count the others."""
    usable = []
    for query in block:
        reason = drop_reason(query, args)
        if reason:
            outcome.add_dropped(query, reason)
        else:
            usable.append(query)
    return usable


def open_first_stage(args: argparse.Namespace) -> FirstStage:
    """Return the run or the index for --consistency_k."""
    if not args.run:
        config = bm25.BM25Config(args.threads, args.k1, args.b, args.language)
        advice = "Name the folder of an index, or add --corpus COLLECTION to build an index there."
        return bm25.open_index(args.index, args.corpus, config, advice)
    run = QueryRun(args.run, args.input)
    if run.depth < args.consistency_k:
        warn(f"{args.run}: at most {run.depth} hits per query, so --consistency_k {run.depth} is used.")
    return run


def source_ranks(
    queries: Sequence[SyntheticQuery], first_stage: FirstStage, args: argparse.Namespace, outcome: Outcome
) -> dict[int, int]:
    """Return the rank of the source document by line of the query. Count the queries whose first hits lack it."""
    ranks = {}
    for query, hits in search_in_blocks(first_stage, queries, args.consistency_k):
        rank = source_rank(query, hits)
        if rank:
            ranks[query.line] = rank
        elif args.run and not hits:
            outcome.add_dropped(query, f"without hits in {args.run}")
        else:
            reason = f"whose source document is not among the first {args.consistency_k} hits"
            outcome.add_dropped(query, reason)
    return ranks


def open_scorer(args: argparse.Namespace, log_path: str) -> "QueryScorer":
    """Return the reranker of --model, with the scores of an earlier run."""
    from inpars_lib.rerankers.load import load_reranker
    from inpars_lib.rerankers.scoring import QueryScorer, ScoredBlock, files_fingerprint

    reranker = load_reranker(args.model, instruction=args.instruction)
    settings = {
        "model": args.model,
        "instruction": args.instruction,
        "dtype": str(reranker.model.dtype),
        "state of the model's files": files_fingerprint(args.model),
    }
    log = ResumeLog(log_path, settings, ScoredBlock)
    log.prepare(args.restart)
    return QueryScorer(reranker, args.input, log)


def score_queries(
    queries: Sequence[SyntheticQuery], ranks: Mapping[int, int], scorer: "QueryScorer | None", scoring_function: str
) -> Sequence[float]:
    """Return the score of each query.

    Args:
        queries: The queries.
        ranks: Rank of the source document by line of the query, for `consistency`.
        scorer: The reranker, for `monot5`.
        scoring_function: Name of the scoring function.
    """
    if scoring_function == "consistency":
        return [1 / ranks[query.line] for query in queries]
    if scorer:
        return scorer.score(queries)
    function = LOG_PROB_SCORES[scoring_function]
    return [function(query.log_probs or []) for query in queries]


def with_score(line: str, score: float) -> str:
    """Return a line of JSONL with the score as its last field, newline included."""
    if '"score"' in line:  # of an earlier filter, perhaps
        return json_line({**json_object(line), "score": score})
    return f'{line.rstrip().removesuffix("}")}, "score": {score!r}}}\n'


def main(argv: Sequence[str] | None = None) -> None:
    """Score every query, keep the best, say what was dropped."""
    args = parse_args(argv)
    log_path = f"{args.output}.scores.jsonl" if args.model else None
    inputs = {
        "--input": args.input,
        "--run": args.run,
        "--index": args.index,
        "--corpus": collection_paths(args.corpus),
        "--model": args.model,
        "--prompt_template": args.prompt_template,
    }
    outputs = {"--output": args.output, "--plot": args.plot, "--sample_html": args.sample_html}
    with claimed(inputs, outputs, {"log of scores": log_path}):
        filter_queries(args, log_path)


def filter_queries(args: argparse.Namespace, log_path: str | None) -> None:
    """Filter the queries and write the outputs, which the caller has locked."""
    examples = prompt_lines(args.prompt_template) if args.sample_html else ()
    first_stage = open_first_stage(args) if args.consistency_k else None
    scorer = open_scorer(args, log_path) if log_path else None
    outcome = Outcome(args.top_k, BIN_WIDTHS[args.scoring_function])
    rows = read_synthetic_queries(args.input, None if scorer else "Scoring")  # a scorer has a bar of its own

    while block := list(islice(rows, BLOCK)):
        # 1. Drop the rows that cannot be scored
        usable = drop_unusable(block, args, outcome)

        # 2. Drop the queries whose source document the first stage does not retrieve
        if first_stage:
            ranks = source_ranks(usable, first_stage, args, outcome)
            queries = [query for query in usable if query.line in ranks]
        else:
            ranks, queries = {}, usable

        # 3. Score the queries, of which the outcome keeps the best
        scores = score_queries(queries, ranks, scorer, args.scoring_function)
        for query, score in zip(queries, scores, strict=True):
            outcome.add_scored(query, score)
    if scorer:
        scorer.close()
    kept = sorted(outcome.best, reverse=True)
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in outcome.dropped.items())
        action = ADVICE if outcome.dropped[NO_LOG_PROBS] else "Relax the filters."
        raise InputError(f"{args.input}: every row was dropped ({reasons}). {action}")

    # 4. Write the outputs, which appear together
    outputs = (args.output, "w"), (args.plot, "wb"), (args.sample_html, "w")
    with write_together(*outputs) as [output, plot, page]:
        output.writelines(with_score(row.line_text, row.score) for row in kept)
        if plot:
            bins = Counter(outcome.bin_of(row.score) for row in kept)
            plot_histogram(plot, outcome.bins, bins, outcome.bin_width, kept[-1].score, args.scoring_function)
        if page:
            summary = f"{len(kept):,} rows of {args.input} were kept. The score is {args.scoring_function}."
            outcome.sample.write(page, {-row.minus_line for row in kept}, summary, examples)
    if log_path and os.path.exists(log_path):
        os.remove(log_path)

    # 5. Say what became of the rows
    for reason, count in outcome.dropped.most_common():
        advice = f" {ADVICE}" if reason == NO_LOG_PROBS else ""
        print(f"dropped {counted(count, 'row')} {reason}.{advice}", file=sys.stderr)
    total = outcome.scored + outcome.dropped.total()
    scores = f"{args.scoring_function} from {kept[0].score:.4f} to {kept[-1].score:.4f}"
    print(f"{args.output}: kept {len(kept):,} of {total:,} rows; {scores}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, interrupted="Scores of a reranker are saved. Run the same command again.")
