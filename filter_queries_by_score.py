"""Stage 2: keep the synthetic queries that the language model was surest of.

Reads   synthetic queries, our own or a published set (JSONL: doc_id, doc_text, question, log_probs)
Writes  the best --top_k of them, best first, each with its `score`

    python filter_queries_by_score.py --input data/msmarco/synthetic_queries.jsonl \\
        --output data/msmarco/filtered_synthetic_queries.jsonl --top_k 10000 --scoring_function mean_log_probs

Two scoring functions need no log-probabilities: `monot5`, by which a trained reranker judges how well question and
document fit (InPars-v2, arXiv 2301.01820), and `consistency`, 1 / the rank at which BM25 finds the document by its
question. With any of them, --consistency_k 20 --index INDEX drops the questions whose own document is not among the
first 20 hits (after Promptagator, arXiv 2209.11755). Memory grows with --top_k alone, not with the input. Ties are
broken by doc_id.
"""

import argparse
import heapq
import math
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import bm25
from formats import InputError, SyntheticQuery, json_line, read_synthetic_queries, run_script, whole_file
from sample_page import Sample

SCORING = {
    "mean_log_probs": lambda log_probs: sum(log_probs) / len(log_probs),  # the paper's (arXiv 2202.05144, section 3)
    "sum_log_probs": sum,
    "mean_probs": lambda log_probs: sum(map(math.exp, log_probs)) / len(log_probs),
}
# Of a bar when plotted:
BIN = {"mean_log_probs": 0.05, "sum_log_probs": 1.0, "mean_probs": 0.02, "monot5": 0.1, "consistency": 0.05}
NO_LOG_PROBS = "without log-probabilities"
BLOCK = 1024  # rows that a reranker scores at a time


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, help="synthetic queries")
    add("--output", required=True, help="the best of them")
    add("--top_k", type=int, default=10_000, help="how many are kept (default: %(default)s)")
    add("--scoring_function", choices=list(BIN), default="mean_log_probs", help="default: %(default)s")
    add("--model", help="reranker of monot5: a folder, or a name on the hub like castorini/monot5-3b-msmarco-10k")
    add("--consistency_k", type=int, help="keep what BM25 finds its document by among the first so many hits")
    add("--index", help="BM25 index for it, as in generate_triples_train.py")
    add("--corpus", help="collection, if that index is yet to be made")
    add("--min_tokens", type=int, default=3, help="questions of fewer tokens are dropped (default: %(default)s)")
    add("--max_tokens", type=int, help="questions of more tokens are dropped (default: no bound)")
    add("--skip_questions_copied_from_context", action="store_true", help="drop questions that stand in their document")
    add("--plot", metavar="PNG", help="draw the histogram of the scores, with the cut")
    add("--sample_html", metavar="HTML", help="a page on which to browse rows with their scores, kept and dropped")
    add("--sample_size", type=int, default=500, help="rows of it, at random (default: %(default)s)")
    bm25.add_arguments(parser)
    args = parser.parse_args()
    args.searching = bm25.searching(parser, args)
    if min(args.top_k, args.min_tokens, args.sample_size) < 1:
        parser.error("--top_k, --min_tokens and --sample_size are 1 or more")
    if (args.scoring_function == "monot5") != bool(args.model):
        parser.error("--scoring_function monot5 and --model go together")
    if args.scoring_function == "consistency" and not args.consistency_k:
        parser.error("--scoring_function consistency needs --consistency_k")
    if bool(args.consistency_k) != bool(args.index) or (args.consistency_k or 1) < 1:
        parser.error("--consistency_k, 1 or more, and --index go together")
    return args


def reason_to_drop(query: SyntheticQuery, args: argparse.Namespace) -> str | None:
    if not query.question:
        return "without a question"
    if query.log_probs is None and args.scoring_function in SCORING:
        return NO_LOG_PROBS
    # Without log-probabilities it is not known how the language model cut the question: its words are counted.
    length = len(query.question.split() if query.log_probs is None else query.log_probs)
    if length < args.min_tokens:
        return f"of fewer than {args.min_tokens} tokens"
    if args.max_tokens is not None and length > args.max_tokens:
        return f"of more than {args.max_tokens} tokens"
    if args.skip_questions_copied_from_context and query.question.lower() in query.doc_text.lower():
        return "copied from the document"
    return None


def find_ranks(queries: Iterator[SyntheticQuery], args: argparse.Namespace) -> Iterator[tuple[int, SyntheticQuery]]:
    """Each question and the rank at which BM25 finds its document, 0 beyond the first --consistency_k."""
    searcher = bm25.open_index(args.index, args.corpus, args.searching)
    while block := list(islice(queries, BLOCK)):
        questions = {str(query.line): query.question for query in block}
        found = bm25.search(searcher, questions, args.consistency_k, args.threads, bar=False)
        for query, (_, hits) in zip(block, found, strict=True):
            yield next((rank for rank, hit in enumerate(hits, 1) if hit.doc_id == query.doc_id), 0), query


def score_rows(
    ranked: Iterator[tuple[int, SyntheticQuery]], args: argparse.Namespace
) -> Iterator[tuple[float, SyntheticQuery]]:
    if args.scoring_function == "consistency":
        yield from ((1 / rank, query) for rank, query in ranked)
        return
    queries = (query for _, query in ranked)
    if args.scoring_function in SCORING:
        score = SCORING[args.scoring_function]
        yield from ((score(query.log_probs), query) for query in queries)
        return
    from models import load_model

    model = load_model(args.model)
    while block := list(islice(queries, BLOCK)):
        scores = model.score([(query.question, query.doc_text) for query in block])
        yield from zip(map(float, scores), block, strict=True)


def draw_histogram(path: str, every: Counter[int], kept: Counter[int], width: float, cut: float, name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for bins, colour, label in ((every, "0.75", "dropped"), (kept, "tab:blue", "kept")):
        axes.bar([i * width for i in bins], list(bins.values()), width, align="edge", color=colour, label=label)
    axes.axvline(cut, color="tab:red", label=f"cut at {cut:.3f}")
    axes.set(xlabel=name, ylabel="synthetic queries")
    axes.legend()
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    args = parse_args()
    width = BIN[args.scoring_function]
    dropped: Counter[str] = Counter()
    bins: Counter[int] = Counter()
    sample = Sample(args.sample_size)

    def drop(query: SyntheticQuery, why: str) -> None:
        dropped[why] += 1
        if args.sample_html:
            sample.add(query, None, why)

    def usable() -> Iterator[SyntheticQuery]:
        for query in read_synthetic_queries(args.input, desc="Scoring"):
            if reason := reason_to_drop(query, args):
                drop(query, reason)
            else:
                yield query

    def consistent() -> Iterator[tuple[int, SyntheticQuery]]:
        for rank, query in find_ranks(usable(), args) if args.index else ((0, query) for query in usable()):
            if args.index and not rank:
                drop(query, f"whose document is not among the first {args.consistency_k} hits")
            else:
                yield rank, query

    def scored() -> Iterator[tuple[float, SyntheticQuery]]:
        for value, query in score_rows(consistent(), args):
            bins[math.floor(value / width)] += 1
            if args.sample_html:
                sample.add(query, value, None)
            yield value, query

    # A bounded heap: it never holds more than top_k rows.
    best = heapq.nsmallest(args.top_k, scored(), key=lambda pair: (-pair[0], pair[1].doc_id))
    hint = "; --scoring_function monot5 --model NAME scores rows without them" if dropped[NO_LOG_PROBS] else ""
    if not best:
        raise InputError(
            f"{args.input}: no row is left, {', '.join(f'{n:,} {why}' for why, n in dropped.items() if n)}{hint}"
        )
    with whole_file(args.output) as file:
        for value, query in best:
            file.write(json_line({**query.row, "score": value}))
    if args.plot:
        kept = Counter(math.floor(value / width) for value, _ in best)
        draw_histogram(args.plot, bins, kept, width, best[-1][0], args.scoring_function)

    if args.sample_html:
        about = f"{len(best):,} rows of {args.input} were kept; the score is {args.scoring_function}."
        sample.write(args.sample_html, {query.line for _, query in best}, about)

    total = bins.total() + dropped.total()
    for reason, count in dropped.most_common():
        if count:
            print(f"{count:,} rows {reason} dropped{hint if reason == NO_LOG_PROBS else ''}", file=sys.stderr)
    print(
        f"{args.output}: {len(best):,} of {total:,} rows kept; {args.scoring_function} from {best[0][0]:.4f} "
        f"to {best[-1][0]:.4f}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_script(main)
