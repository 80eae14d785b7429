"""Stage 2: keep the synthetic queries that the language model was surest of.

Reads   synthetic queries, our own or a published set (JSONL: doc_id, doc_text, question, log_probs)
Writes  the best --top_k of them, best first, each with its `score`

    python filter_queries_by_score.py --input data/msmarco/synthetic_queries.jsonl \\
        --output data/msmarco/filtered_synthetic_queries.jsonl --top_k 10000 --scoring_function mean_log_probs

Memory grows with --top_k alone, not with the input. Ties are broken by doc_id.
"""

import argparse
import heapq
import math
import sys
from collections import Counter
from collections.abc import Iterator

from formats import InputError, SyntheticQuery, json_line, read_synthetic_queries, run_script, whole_file

SCORING = {
    "mean_log_probs": lambda log_probs: sum(log_probs) / len(log_probs),  # the paper's (arXiv 2202.05144, section 3)
    "sum_log_probs": sum,
    "mean_probs": lambda log_probs: sum(map(math.exp, log_probs)) / len(log_probs),
}
BIN = {"mean_log_probs": 0.05, "sum_log_probs": 1.0, "mean_probs": 0.02}  # width of a bar of the histogram


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, help="synthetic queries")
    add("--output", required=True, help="the best of them")
    add("--top_k", type=int, default=10_000, help="how many are kept (default: %(default)s)")
    add("--scoring_function", choices=SCORING, default="mean_log_probs", help="default: %(default)s")
    add("--min_tokens", type=int, default=3, help="questions of fewer tokens are dropped (default: %(default)s)")
    add("--max_tokens", type=int, help="questions of more tokens are dropped (default: no bound)")
    add("--skip_questions_copied_from_context", action="store_true", help="drop questions that stand in their document")
    add("--plot", metavar="PNG", help="draw the histogram of the scores, with the cut")
    args = parser.parse_args()
    if args.top_k < 1 or args.min_tokens < 1:
        parser.error("--top_k and --min_tokens are 1 or more")
    return args


def reason_to_drop(query: SyntheticQuery, args: argparse.Namespace) -> str | None:
    if not query.question:
        return "without a question"
    if query.log_probs is None:
        return "without log-probabilities"
    if len(query.log_probs) < args.min_tokens:
        return f"of fewer than {args.min_tokens} tokens"
    if args.max_tokens is not None and len(query.log_probs) > args.max_tokens:
        return f"of more than {args.max_tokens} tokens"
    if args.skip_questions_copied_from_context and query.question.lower() in query.doc_text.lower():
        return "copied from the document"
    return None


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
    score = SCORING[args.scoring_function]
    width = BIN[args.scoring_function]
    dropped: Counter[str] = Counter()
    bins: Counter[int] = Counter()

    def scored() -> Iterator[tuple[float, SyntheticQuery]]:
        for query in read_synthetic_queries(args.input, desc="Scoring"):
            if reason := reason_to_drop(query, args):
                dropped[reason] += 1
                continue
            value = score(query.log_probs)
            bins[math.floor(value / width)] += 1
            yield value, query

    # A bounded heap: it never holds more than top_k rows.
    best = heapq.nsmallest(args.top_k, scored(), key=lambda pair: (-pair[0], pair[1].doc_id))
    if not best:
        raise InputError(
            f"{args.input}: no row is left, {', '.join(f'{n:,} {reason}' for reason, n in dropped.items())}"
        )
    with whole_file(args.output) as file:
        for value, query in best:
            file.write(json_line({**query.row, "score": value}))
    if args.plot:
        kept = Counter(math.floor(value / width) for value, _ in best)
        draw_histogram(args.plot, bins, kept, width, best[-1][0], args.scoring_function)

    total = bins.total() + dropped.total()
    for reason, count in dropped.most_common():
        print(f"{count:,} rows {reason} dropped", file=sys.stderr)
    print(
        f"{args.output}: {len(best):,} of {total:,} rows kept; {args.scoring_function} from {best[0][0]:.4f} "
        f"to {best[-1][0]:.4f}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_script(main)
