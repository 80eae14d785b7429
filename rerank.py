r"""Stage 5: rerank the first-stage hits with the trained model and, given judgements, measure the gain.

Reads   topics, their collection, a model, a run (TREC or MS MARCO) or a BM25 index, optionally qrels
Writes  OUTPUT, the reranked run (TREC); with --index also the first stage, OUTPUT.bm25.txt; with --qrels a table on
        stdout, and on request a plot of the gains (--plot) and the measures of each query (--per_query)

    python rerank.py --model data/msmarco --queries data/msmarco/topics.dl20.txt --corpus data/msmarco/collection.tsv \
        --index msmarco-passage --qrels data/msmarco/qrels.dl20-passage.txt --relevance_threshold 2 \
        --output data/msmarco/run.dl20.txt

    torchrun --nproc_per_node=4 -- rerank.py ...        # on 4 GPUs: the same run, byte for byte

Hits below the first --top_k keep their order, below the reranked ones. Scores are saved as they are computed, in
OUTPUT.scores.jsonl. After a kill, run the same command again to resume.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain

from inpars_lib import bm25
from inpars_lib.cli import InputError, at_least, between, counted, run_script, script_parser, warn
from inpars_lib.evaluation import (
    MEASURES,
    MeasureValues,
    add_measure_flags,
    check_threshold,
    comparison_table,
    evaluate_per_query,
)
from inpars_lib.files import check_paths, exclusive, is_special, resolve_output, write_together
from inpars_lib.first_stage import add_remove_query_flag, advise_remove_query
from inpars_lib.formats.collection import collection_paths
from inpars_lib.formats.qrels import read_qrels
from inpars_lib.formats.records import Qrel
from inpars_lib.formats.runs import Run, read_run, rerank_hits, run_lines
from inpars_lib.formats.topics import read_topics
from inpars_lib.interpolation import best_weight, interpolate, interpolation_curve
from inpars_lib.plots import plot_gains
from inpars_lib.processes import ProcessGroup
from inpars_lib.rerankers.base import Reranker
from inpars_lib.rerankers.scoring import (
    PairBlock,
    ScoredBlock,
    estimate_cost,
    files_fingerprint,
    make_blocks,
    read_scores,
    score_blocks,
)
from inpars_lib.resume import ResumeLog, add_restart_flag
from inpars_lib.tables import add_table_flags, write_per_query
from inpars_lib.training.dev_set import DevSet, read_held_out_queries

FIRST_STAGE_HITS = 1000  # BM25 hits per query with --index; those below --top_k keep their order


def interpolation_weight(word: str) -> float | None:
    """Return the weight from 0 to 1, or None for `auto` (an argparse type)."""
    return None if word == "auto" else between(0, 1)(word)


def run_tag(word: str) -> str:
    """Return the tag of a run, one word (an argparse type)."""
    if not word or len(word.split()) != 1 or word != word.strip():
        raise argparse.ArgumentTypeError(f"expected one word, found {word!r}")
    return word


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="reranker: a folder, or a name on the Hugging Face hub (T5, cross-encoder, or "
        "Qwen3-Reranker)")  # fmt: skip
    add("--queries", required=True, help="topics: a file, a BEIR folder, or - for standard input")
    add("--corpus", required=True, help="collection of the topics")
    add("--run", help="first-stage run: TREC, MS MARCO or ColBERT format, or - for standard input")
    add("--index", help="BM25 index whose hits are reranked if there is no --run: a folder, or a prebuilt index")
    add("--output", required=True, help="reranked run to write, TREC format")
    add("--run_tag", type=run_tag, default="inpars", metavar="TAG", help="name of the system in the last column of "
        "--output (default: %(default)s)")  # fmt: skip
    add("--top_k", type=at_least(1), default=1000, help="hits per query to rerank (default: %(default)s)")
    add("--qrels", help="judgements: a file or a BEIR folder; prints the table of both rankings")
    add("--judged_only", action="store_true", help="rerank only the queries that --qrels judges")
    add("--plot", metavar="PNG", help="plot of each query's gain in nDCG@10 to write, or in the first of --measures if "
        "nDCG@10 is none of them; needs --qrels")  # fmt: skip
    add_measure_flags(add)
    add_table_flags(add)
    add_remove_query_flag(add)
    add(
        "--interpolation_weight",
        type=interpolation_weight,
        default=1.0,
        metavar="W",
        help="reranker weight when scores are linearly interpolated with the first stage (z-normalized per query), or "
        "`auto`, the best weight on --holdout (default: 1, the reranker alone)",
    )
    add("--holdout", help="held-out synthetic queries, from generate_triples_train.py --holdout")
    add("--holdout_run", metavar="RUN", help="first-stage run of the --holdout queries, instead of BM25 on --index")
    add("--dry_run", action="store_true", help="write nothing; count the tokens and project the time")
    add("--batch_tokens", type=at_least(1), help="tokens per batch (default: what suits the device)")
    add("--max_length", type=at_least(1), help="tokens of the whole input; longer documents are truncated (default: as "
        "in the training of the model, or 512)")  # fmt: skip
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="precision of the model; auto: bfloat16 where the device is fast at it, else float32")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--token_true", help="T5-like and causal models: target word for relevant (default: the model's own)")
    add("--token_false", help="T5-like and causal models: target word for not relevant (default: the model's own)")
    add("--instruction", metavar="TEXT", help="causal models: task that the model reads before the query (default: "
        "Given a web search query, retrieve relevant passages that answer the query)")  # fmt: skip
    add_restart_flag(add)
    bm25.add_search_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check how they combine."""
    parser = build_parser()
    args = parser.parse_args(argv)
    judged_work = args.plot or args.judged_only or args.per_query or args.measures != MEASURES or args.format != "text"
    if judged_work and not args.qrels:
        parser.error("--plot, --judged_only, --per_query, --format and --measures need --qrels")
    if not args.run and not args.index:
        parser.error("--run or --index is required")
    if args.interpolation_weight is None and not (args.holdout and (args.holdout_run or args.index)):
        parser.error("--interpolation_weight auto needs --holdout, and --holdout_run or --index for its hits")
    args.output = resolve_output(args.output)
    if args.output == "-" or is_special(args.output):
        parser.error(f"--output {args.output}: scores are saved beside the run, so name a file")
    if [args.queries, args.run, args.qrels, args.holdout, args.holdout_run].count("-") > 1:
        parser.error("only one input can be `-`, standard input")
    if args.holdout_run and args.interpolation_weight is not None:
        parser.error("--holdout_run needs --interpolation_weight auto")
    if bool(args.token_true) != bool(args.token_false):
        parser.error("--token_true and --token_false need each other")
    return args


def first_stage_path(args: argparse.Namespace) -> str | None:
    """Return where the first stage is written, None if --run already is one."""
    return None if args.run else f"{args.output}.bm25.txt"


def log_path(args: argparse.Namespace) -> str:
    """Return where scores are saved until the run is complete."""
    return f"{args.output}.scores.jsonl"


def check_files(args: argparse.Namespace) -> None:
    """Check that no output is an input or another output."""
    inputs = {
        "--model": args.model,
        "--queries": args.queries,
        "--corpus": collection_paths(args.corpus),
        "--run": args.run,
        "--index": args.index,
        "--qrels": args.qrels,
        "--holdout": args.holdout,
        "--holdout_run": args.holdout_run,
    }
    outputs = {
        "--output": args.output,
        "first stage": first_stage_path(args),
        "log of scores": log_path(args),
        "lock": f"{args.output}.lock",
        "--plot": args.plot,
        "--per_query": args.per_query,
    }
    check_paths(inputs, outputs)


def search_config(args: argparse.Namespace) -> bm25.BM25Config:
    """Return how to search --index."""
    return bm25.BM25Config(args.threads, args.k1, args.b, args.language)


def judged_topics(args: argparse.Namespace, group: ProcessGroup) -> tuple[dict[str, str], list[Qrel]]:
    """Return the topics to rerank and their judgements, if there are any."""
    topics = read_topics(args.queries)
    if not args.qrels:
        return topics, []
    qrels = [qrel for qrel in read_qrels(args.qrels) if qrel.query_id in topics]
    if not qrels:
        raise InputError(f"{args.qrels}: no query of {args.queries} is judged here. Use files of one collection.")
    judged = {qrel.query_id for qrel in qrels}
    if group.rank == 0:
        check_threshold(qrels, args.relevance_threshold, args.qrels, measures=args.measures)
    if args.judged_only:
        topics = {query_id: text for query_id, text in topics.items() if query_id in judged}
    elif len(judged) < len(topics) and group.rank == 0:
        listed = f"{len(judged):,} of {len(topics):,} queries are judged"
        print(f"{args.qrels}: {listed}; --judged_only reranks only these", file=sys.stderr)
    return topics, qrels


def search(args: argparse.Namespace, topics: Mapping[str, str]) -> Run:
    """Return the BM25 hits of each query that has any."""
    searcher = bm25.open_index(args.index, args.corpus, search_config(args))
    find = searcher.search_without_query if args.remove_query else searcher.search
    found = find(topics, max(args.top_k, FIRST_STAGE_HITS))
    run = {query_id: hits for query_id, hits in found if hits}
    if not run:
        raise InputError(
            f"{args.index}: none of the {len(topics):,} queries has a hit. Pass the index of the topics' collection."
        )
    return run


def first_stage(args: argparse.Namespace, topics: Mapping[str, str], group: ProcessGroup) -> Run:
    """Return the hits to rerank by query id, in the order of the topics."""
    run: Run = {}
    if args.run:
        bar = "Reading the run" if group.rank == 0 else None
        run = read_run(args.run, topics, bar, args.remove_query)
        if not run:
            raise InputError(f"{args.run}: no hits for any query of {args.queries}. Pass the run of these topics.")
    else:
        if group.rank == 0:
            run = search(args, topics)
        run = group.broadcast(run)
    if group.rank == 0:
        if len(run) < len(topics):
            warn(f"{len(topics) - len(run):,} of {len(topics):,} queries have no hits and will have no ranking.")
        advise_remove_query(run, topics, args.corpus)
    return {query_id: run[query_id] for query_id in topics if query_id in run}


def load(args: argparse.Namespace, group: ProcessGroup) -> Reranker:
    """Return the model, in one precision for all processes."""
    from inpars_lib.rerankers.load import choose_dtype, default_device, load_reranker

    device = default_device(group.local_rank) if args.device in (None, "cuda") else args.device
    reranker = load_reranker(
        args.model,
        max_length=args.max_length,
        device=device,
        dtype=group.broadcast(choose_dtype(args.dtype, device)),
        targets=(args.token_true, args.token_false) if args.token_true else None,
        instruction=args.instruction,
    )
    reranker.batch_tokens = args.batch_tokens
    return reranker


def score_settings(args: argparse.Namespace, reranker: Reranker, blocks: Sequence[PairBlock]) -> dict[str, object]:
    """Return everything that the scores of the topics' pairs depend on."""
    pairs = hashlib.sha256(" ".join(block.fingerprint() for block in blocks).encode())
    return {
        "model": args.model,
        "state of the files of model and collection": files_fingerprint(args.model, args.corpus),
        "set of queries and hits": pairs.hexdigest(),
        "max_length": reranker.max_length,
        "dtype": str(reranker.model.dtype),
        "batch_tokens": args.batch_tokens,
        "token_true": args.token_true,
        "token_false": args.token_false,
        "instruction": reranker.instruction,
    }


def choose_weight(held_out: DevSet, scores: Mapping[str, Sequence[float]], source: str) -> float:
    """Return the interpolation weight that is best for the held-out queries, and print the curve."""
    curve = interpolation_curve(held_out.run, scores, held_out.qrels)
    if len(set(curve.values())) == 1:
        warn(f"{source}: nDCG@10 is equal for all weights. Weight 0, the first stage alone, is used.")
    listed = ", ".join(f"{weight:g}: {value:.4f}" for weight, value in curve.items())
    queries = f"{len(held_out.qrels):,} held-out synthetic queries"
    print(f"nDCG@10 on {queries} by interpolation weight: {listed}", file=sys.stderr)
    return best_weight(curve)


def write_outputs(
    args: argparse.Namespace, run: Run, reranked: Run, before: MeasureValues, after: MeasureValues
) -> None:
    """Write the reranked run, the first stage of --index, the plot and the values per query, which belong together."""
    outputs = [(args.output, "w"), (first_stage_path(args), "w"), (args.plot, "wb"), (args.per_query, "w")]
    with write_together(*outputs) as [output, first_stage, plot, per_query]:
        output.writelines(run_lines(chain.from_iterable(reranked.values()), args.run_tag))
        if first_stage:
            first_stage.writelines(run_lines(chain.from_iterable(run.values()), tag="bm25"))
        if plot:
            plotted = "nDCG@10" if "nDCG@10" in before else args.measures[0]
            plot_gains(plot, before[plotted], after[plotted], plotted)
        if per_query:
            write_per_query(per_query, [("first stage", before), ("reranked", after)])


def main(argv: Sequence[str] | None = None) -> None:
    """Retrieve, score, interpolate, evaluate, write."""
    args = parse_args(argv)
    check_files(args)
    group = ProcessGroup.from_environment()
    group.check_inputs(args.queries, args.run, args.qrels, args.holdout, args.holdout_run)
    writes = group.rank == 0 and not args.dry_run
    with exclusive(args.output) if writes else nullcontext():
        rerank(args, group)
        group.close()


def rerank(args: argparse.Namespace, group: ProcessGroup) -> None:
    """Rerank the hits of the topics and write the outputs, which the caller has locked."""
    # 1. The topics, the model and the first stage; held-out queries for the interpolation weight
    topics, qrels = judged_topics(args, group)
    run: Run = {}
    if args.run:
        run = first_stage(args, topics, group)
    reranker = load(args, group)  # before the search: a model that cannot be loaded is known in seconds
    if not args.run:
        run = first_stage(args, topics, group)
    held_out = DevSet()
    if args.interpolation_weight is None:
        held_out = read_held_out_queries(
            args.holdout, args.index, args.corpus, search_config(args), args.top_k, args.holdout_run
        )

    # 2. The model's scores
    blocks = make_blocks(topics, run, args.top_k)
    all_blocks = make_blocks(held_out.topics, held_out.run, args.top_k) + blocks
    if args.dry_run:
        print(estimate_cost(reranker, all_blocks, args.corpus))
        return
    log = ResumeLog(log_path(args), score_settings(args, reranker, blocks), ScoredBlock, group.rank)
    if group.rank == 0:
        log.prepare(args.restart)
    group.barrier()
    score_blocks(reranker, all_blocks, args.corpus, log, group)
    if group.rank > 0:
        return
    scores = read_scores(all_blocks, log)

    # 3. The reranked hits, interpolated with the first stage
    weight = args.interpolation_weight
    if weight is None:
        weight = choose_weight(held_out, scores, args.holdout)
    reranked = {q: rerank_hits(hits, interpolate(hits, scores[q], weight)) for q, hits in run.items()}

    # 4. The measures of both rankings
    before = evaluate_per_query(qrels, run, args.relevance_threshold, args.measures)
    after = evaluate_per_query(qrels, reranked, args.relevance_threshold, args.measures)

    # 5. The run, its first stage and the plot; the table
    write_outputs(args, run, reranked, before, after)
    pairs = sum(min(len(hits), args.top_k) for hits in run.values())
    interpolated = "" if weight == 1 else f", interpolated with weight {weight:g} (first stage {1 - weight:g})"
    size = f"{counted(len(run), 'query')}, {counted(pairs, 'document')} reranked"
    print(f"{args.output}: {size}{interpolated}", file=sys.stderr)
    if qrels:
        judged = len({qrel.query_id for qrel in qrels})
        heading = f"{counted(judged, 'judged query')}, first {args.top_k} hits reranked by {args.model}{interpolated}\n"
        print(heading, file=sys.stdout if args.format == "text" else sys.stderr)
        print(comparison_table(before, after, args.format), flush=True)
    log.delete()  # last, so that a full disk costs no scores


if __name__ == "__main__":
    run_script(main, interrupted="Scores so far are saved. Run the same command again to resume.")
