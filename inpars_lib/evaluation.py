"""Measures, significance and tables of runs.

    python -m inpars_lib.evaluation --qrels qrels.txt bm25.txt reranked.txt
    python -m inpars_lib.evaluation --qrels qrels.txt bm25.txt reranked.txt --format latex --per_query values.csv

prints a table of runs and compares each other run with the first. The mean is over all judged queries, as with
trec_eval's `-c`: a query without hits counts as 0. ir-measures computes the measures: https://ir-measur.es
"""

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from inpars_lib.cli import InputError, at_least, report, run_script, script_parser, warn
from inpars_lib.files import atomic_write, check_paths
from inpars_lib.first_stage import add_remove_query_flag
from inpars_lib.formats.qrels import read_qrels
from inpars_lib.formats.records import Qrel
from inpars_lib.formats.runs import Run, read_run, trec_order
from inpars_lib.tables import add_table_flags, format_table, short_names, write_per_query

MEASURES = ("nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000")
SUPPORTED = (
    "nDCG, RR (MRR), AP (MAP), P, R, Success, Rprec, Bpref, infAP, Judged, SetP, SetR, SetF, SetAP and Compat; with a "
    "cutoff, which P, R and Success need, `rel` or `judged_only`, such as nDCG@10 or P(rel=2)@20"
)
MEASURE = re.compile(r"\w+(\((rel=[1-9]\d{0,5})?,?(judged_only=True)?\))?(@[1-9]\d{0,5})?", re.ASCII)
COLUMNS = ("change", "p", "won", "tied", "lost")  # of tables that compare runs
MeasureValues = dict[str, dict[str, float]]  # {measure: {query id: value}}


class Comparison(NamedTuple):
    """How a measure of the second run differs from the first: change of the mean, p, queries won, tied and lost."""

    change: float
    p: float
    won: int
    tied: int
    lost: int


def read_measure(name: str) -> Any:
    """Return the measure of ir-measures with a name, or None for any other name.

    None too if the measure is not a mean over queries, or if only a provider that is not installed computes it.
    """
    from ir_measures import MeanAgg, compat, judged, msmarco, parse_measure, pytrec_eval

    if not MEASURE.fullmatch(name):  # trec_eval ends the process at P@0
        return None
    try:
        measure = parse_measure(name)
        provided = any(provider.supports(measure) for provider in (pytrec_eval, judged, msmarco, compat))
    except (ValueError, NameError, AssertionError):  # what ir-measures raises
        return None
    return measure if provided and isinstance(measure.aggregator(), MeanAgg) else None


def parse_measures(words: str) -> tuple[str, ...]:
    """Return the names of measures, which whitespace separates (an argparse type)."""
    names: dict[Any, str] = {}
    for word in words.split() or [""]:
        measure = read_measure(word)
        if measure is None:
            raise argparse.ArgumentTypeError(f"{word!r} is not a supported measure. Supported: {SUPPORTED}")
        if measure in names:
            raise argparse.ArgumentTypeError(f"{names[measure]} and {word} are the same measure. Keep one")
        names[measure] = word
    return tuple(names.values())


def add_measure_flags(add: Callable[..., Any]) -> None:
    """Add --relevance_threshold and --measures with the `add_argument` of a parser or of a group."""
    text = "measures of ir-measures, separated by spaces; `rel` in a name, as in AP(rel=2), replaces "
    text += "--relevance_threshold (default: %(default)s)"
    add(
        "--relevance_threshold",
        type=at_least(1),
        default=1,
        help="lowest grade that is relevant in binary measures (default: %(default)s)",
    )
    add("--measures", type=parse_measures, default=" ".join(MEASURES), metavar="NAMES", help=text)


def _with_threshold(measures: Iterable[str], relevance_threshold: int) -> dict[str, Any]:
    from ir_measures import parse_measure

    parsed = {name: parse_measure(name) for name in measures}
    binary = [name for name, measure in parsed.items() if "rel" in measure.SUPPORTED_PARAMS.keys() - measure.params]
    return parsed | {name: parsed[name](rel=relevance_threshold) for name in binary}


def evaluate_per_query(
    qrels: Iterable[Qrel], run: Run, relevance_threshold: int, measures: Iterable[str] = MEASURES
) -> MeasureValues:
    """Return each measure's value for each judged query, 0 for a query without hits.

    Ties are broken as in trec_eval. A measure whose lowest relevant grade no judgement reaches is NaN.

    Args:
        qrels: Judgements.
        run: Hits by query id.
        relevance_threshold: Lowest grade that counts as relevant in binary measures without a `rel` of their own, as
            with trec_eval's `-l`. nDCG uses the grades as they are.
        measures: Names of measures that `parse_measures` accepts.
    """
    from ir_measures import iter_calc

    judged: dict[str, list[Qrel]] = {}
    for qrel in qrels:
        judged.setdefault(qrel.query_id, []).append(qrel)
    named = _with_threshold(measures, relevance_threshold)
    highest = highest_grade(judged.values())
    reached = {measure for measure in named.values() if measure.params.get("rel", highest) <= highest}
    values = {measure: dict.fromkeys(judged, 0.0 if measure in reached else math.nan) for measure in named.values()}
    found = judged.keys() & run.keys() if reached else set()
    for query_id in found:  # one query at a time keeps memory flat
        # The providers of ir-measures break ties differently, so the run gets scores without ties. They are positive,
        # because Compat takes the score of a document that is not in the run to be 0.
        hits = sorted(run[query_id], key=trec_order, reverse=True)
        hits = [hit._replace(score=float(len(hits) - rank)) for rank, hit in enumerate(hits)]
        grades = judged[query_id]
        if highest_grade([grades]) < 0:  # pytrec_eval crashes; 0 gives the same values
            grades = [qrel._replace(relevance=0) for qrel in grades]
        for metric in iter_calc(reached, grades, hits):
            values[metric.measure][query_id] = metric.value
    return {name: values[measure] for name, measure in named.items()}


def highest_grade(judged: Iterable[Iterable[Qrel]]) -> int:
    """Return the highest relevance grade, 0 without judgements."""
    return max((qrel.relevance for qrels in judged for qrel in qrels), default=0)


def check_threshold(
    qrels: Sequence[Qrel],
    relevance_threshold: int,
    source: str,
    select_by: str | None = None,
    measures: Sequence[str] = MEASURES,
) -> None:
    """Warn of the measures whose lowest relevant grade no judgement reaches.

    Raises:
        InputError: `select_by` is one of these measures, or all are.
    """
    highest = highest_grade([qrels])
    named = _with_threshold(measures, relevance_threshold)
    lost = [name for name, measure in named.items() if measure.params.get("rel", highest) > highest]
    if not lost:
        return
    grade = f"--relevance_threshold {relevance_threshold}" if highest < relevance_threshold else f"`rel` of {lost[0]}"
    problem = f"{source}: no judgement reaches {grade}. The highest grade is {highest}."
    if select_by in lost or len(lost) == len(measures):
        raise InputError(f"{problem} Lower the threshold, or {'select by' if select_by else 'add'} nDCG@10.")
    warn(f"{problem} {', '.join(lost)} {'is' if len(lost) == 1 else 'are'} not available.")


def format_value(value: float) -> str:
    """Return a measure's value with four decimals, or `n/a` for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.4f}"


def mean_values(values: MeasureValues) -> dict[str, float]:
    """Return each measure's mean over the queries."""
    return {name: sum(per_query.values()) / len(per_query) for name, per_query in values.items()}


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> Comparison:
    """Return how the values of a second run, by query id, differ.

    p is of the paired t-test: 1 without any difference, NaN for a single query.
    """
    from scipy.stats import ttest_rel

    pairs = [(value, second[query_id]) for query_id, value in first.items()]
    won, lost = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    p = 1.0 if len(pairs) > 1 else math.nan
    if won + lost and len(pairs) > 1:
        with warnings.catch_warnings():  # that all differences are equal, or nearly
            warnings.simplefilter("ignore", RuntimeWarning)
            p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    change = sum(b for _, b in pairs) / len(pairs) - sum(a for a, _ in pairs) / len(pairs)
    return Comparison(change, p, won, len(pairs) - won - lost, lost)


def format_comparison(found: Comparison) -> list[str]:
    """Return the cells of `COLUMNS`."""
    return [f"{found.change:+.4f}", format_value(found.p), str(found.won), str(found.tied), str(found.lost)]


def comparison_table(first_stage: MeasureValues, reranked: MeasureValues, form: str = "text") -> str:
    """Return a table of both rankings: means, paired t-test over the queries, queries won, tied and lost."""
    after = mean_values(reranked)
    rows = [["measure", "first stage", "reranked", *COLUMNS]]
    for name, before in mean_values(first_stage).items():
        cells = [""] * len(COLUMNS)
        if not math.isnan(before):
            cells = format_comparison(compare(first_stage[name], reranked[name]))
        rows.append([name, format_value(before), format_value(after[name]), *cells])
    return format_table(rows, form)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction (Scandinavian Journal of Statistics, 1979), in the same order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        adjusted[i] = highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def run_notes(names: Sequence[str], queries: int) -> str:
    """Return what a reader of the table of named runs has to know: its number of queries and its test."""
    notes = [f"judged queries: {queries:,}"]
    if len(names) > 1:
        notes.append(f"change, p (paired t-test), won, tied, lost: against {names[0]}")
    if len(names) > 1 and queries == 1:
        notes.append("p: n/a, because a test needs two queries")
    elif len(names) > 2:
        notes.append(f"p: Holm's correction over the {len(names) - 1} compared runs, for each measure separately")
    return "\n".join(notes)


def run_table(names: Sequence[str], runs: Sequence[MeasureValues], form: str = "text") -> str:
    """Return a table of the measures of named runs, in which the other runs are compared with the first."""
    first = runs[0]
    columns = COLUMNS if len(runs) > 1 else ()
    rows = [["measure", "run", "mean", *columns]]
    for measure, values in first.items():
        compared = [compare(values, other[measure]) for other in runs[1:]]
        p_values = [found.p for found in compared]
        adjusted = holm(p_values) if len(values) > 1 else p_values
        for i, (name, other) in enumerate(zip(names, runs, strict=True)):
            mean = mean_values(other)[measure]
            cells = [""] * len(columns)
            if i > 0 and not math.isnan(mean):
                cells = format_comparison(compared[i - 1]._replace(p=adjusted[i - 1]))
            shown = measure if i == 0 or form == "csv" else ""
            rows.append([shown, name, format_value(mean), *cells])
    return format_table(rows, form, names=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of runs."""
    parser = script_parser(__doc__, prog="python -m inpars_lib.evaluation")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs: TREC, MS MARCO or ColBERT format")
    parser.add_argument("--qrels", required=True, help="judgements")
    add_measure_flags(parser.add_argument)
    add_table_flags(parser.add_argument)
    add_remove_query_flag(parser.add_argument)
    args = parser.parse_args(argv)
    files = list(map(os.path.realpath, args.runs))
    if len(set(files)) < len(files):
        parser.error("two of the runs are the same file. Name each run once")
    check_paths({"--qrels": args.qrels, "RUN": args.runs}, {"--per_query": args.per_query})
    qrels = list(read_qrels(args.qrels))
    check_threshold(qrels, args.relevance_threshold, args.qrels, measures=args.measures)
    judged = {qrel.query_id for qrel in qrels}
    evaluated: list[MeasureValues] = []
    for path in args.runs:
        run = read_run(path, remove_query=args.remove_query)
        found = len(run.keys() & judged)
        if not found:
            raise InputError(f"{path}: none of the {len(run):,} queries is judged in {args.qrels}. Pass another run.")
        if found < len(run):
            report(f"{path}: {len(run) - found:,} of {len(run):,} queries are not judged and were skipped")
        if found < len(judged):
            warn(f"{path}: {len(judged) - found:,} of {len(judged):,} judged queries have no hits. They count as 0.")
        evaluated.append(evaluate_per_query(qrels, run, args.relevance_threshold, args.measures))
    names = short_names(args.runs)
    if args.per_query:
        with atomic_write(args.per_query) as file:
            write_per_query(file, list(zip(names, evaluated, strict=True)))
    notes = run_notes(names, len(judged))
    if args.format == "text":
        print(f"{notes}\n")
    else:
        print(notes, file=sys.stderr)
    print(run_table(names, evaluated, args.format))


if __name__ == "__main__":
    run_script(main)
