r"""Stage 5: rerank the first-stage hits with the trained model and, given judgements, measure the gain.

Reads   topics, their collection, a model, a run (TREC or MS MARCO) or a BM25 index, optionally qrels
Writes  OUTPUT, the reranked run (TREC); with --index also the first stage, OUTPUT.bm25.txt; with --qrels a table on
        stdout

    python rerank.py --model data/msmarco --queries data/msmarco/topics.dl20.txt --corpus data/msmarco/collection.tsv \
        --index msmarco-passage --qrels data/msmarco/qrels.dl20-passage.txt --relevance_threshold 2 \
        --output data/msmarco/run.dl20.txt

    torchrun --nproc_per_node=4 -- rerank.py ...        # on 4 GPUs: the same run, byte for byte

Hits below the first --top_k keep their order, below the reranked ones. Scores are saved as they are computed, in
OUTPUT.scores. After a kill, run the same command again to resume.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice

from inpars_lib import bm25
from inpars_lib.cli import InputError, at_least, between, run_script, script_parser, warn
from inpars_lib.evaluation import MEASURES, add_measure_flags, check_threshold, comparison_table, evaluate_per_query
from inpars_lib.files import atomic_write, exclusive, is_special
from inpars_lib.first_stage import add_remove_query_flag, advise_remove_query
from inpars_lib.formats.qrels import read_qrels
from inpars_lib.formats.records import ScoredDoc
from inpars_lib.formats.runs import read_run, rerank_hits, write_run
from inpars_lib.formats.topics import read_topics
from inpars_lib.interpolation import best_weight, interpolate, interpolation_curve
from inpars_lib.plots import plot_gains
from inpars_lib.processes import ProcessGroup
from inpars_lib.rerankers.scoring import (
    PairBlocks,
    ScoreStore,
    estimate_cost,
    files_fingerprint,
    score_blocks,
    scores_by_query,
)
from inpars_lib.training.dev_set import DevSet, read_held_out_queries

FIRST_STAGE_HITS = 1000  # BM25 hits per query with --index; those below --top_k keep their order


def interpolation_weight(word: str) -> float | None:
    """Return the weight from 0 to 1, or None for `auto` (an argparse type)."""
    return None if word == "auto" else between(0, 1)(word)


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
    add("--top_k", type=at_least(1), default=1000, help="hits per query to rerank (default: %(default)s)")
    add("--qrels", help="judgements: a file or a BEIR folder; prints the table of both rankings")
    add("--judged_only", action="store_true", help="rerank only the queries that --qrels judges")
    add("--plot", metavar="PNG", help="plot of each query's gain in nDCG@10 to write, or in the first of --measures if "
        "nDCG@10 is none of them; needs --qrels")  # fmt: skip
    add_measure_flags(add)
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
    bm25.add_search_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check how they combine."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.plot or args.judged_only or args.measures != MEASURES) and not args.qrels:
        parser.error("--plot, --judged_only and --measures need --qrels")
    if not args.run and not args.index:
        parser.error("--run or --index is required")
    if args.interpolation_weight is None and not (args.holdout and (args.holdout_run or args.index)):
        parser.error("--interpolation_weight auto needs --holdout, and --holdout_run or --index for its hits")
    if is_special(args.output):
        parser.error(f"--output {args.output}: scores are saved beside the run, so name a file")
    if [args.queries, args.run, args.qrels, args.holdout, args.holdout_run].count("-") > 1:
        parser.error("only one input can be `-`, standard input")
    if args.holdout_run and args.interpolation_weight is not None:
        parser.error("--holdout_run needs --interpolation_weight auto")
    if bool(args.token_true) != bool(args.token_false):
        parser.error("--token_true and --token_false need each other")
    return args


def search(args: argparse.Namespace, topics: Mapping[str, str], k: int) -> Iterator[tuple[str, Sequence[ScoredDoc]]]:
    """Yield the BM25 hits of each query that has any."""
    config = bm25.BM25Config(args.threads, args.k1, args.b, args.language)
    searcher = bm25.open_index(args.index, args.corpus, config)
    found = False
    find = searcher.search_without_query if args.remove_query else searcher.search
    for query_id, hits in find(topics, k):
        if hits:
            found = True
            yield query_id, hits
    if not found:
        raise InputError(
            f"{args.index}: none of the {len(topics):,} queries has a hit. Pass the index of the topics' collection."
        )


def first_stage(
    args: argparse.Namespace, topics: Mapping[str, str], group: ProcessGroup
) -> dict[str, Sequence[ScoredDoc]]:
    """Return the hits to rerank by query id, in the order of the topics."""
    if args.run:
        bar = "Reading the run" if group.rank == 0 else None
        run = read_run(args.run, topics, bar, args.remove_query)
        if not run:
            raise InputError(f"{args.run}: no hits for any query of {args.queries}. Pass the run of these topics.")
    elif args.dry_run:
        run = dict(search(args, topics, args.top_k))
    else:
        path = f"{args.output}.bm25.txt"
        if group.rank == 0:
            found = search(args, topics, max(args.top_k, FIRST_STAGE_HITS))
            write_run(path, (hit for _, hits in found for hit in hits), tag="bm25")
        group.barrier()
        run = read_run(path, topics)
    if group.rank == 0:
        if len(run) < len(topics):
            warn(f"{len(topics) - len(run):,} of {len(topics):,} queries have no hits and will have no ranking.")
        advise_remove_query(run, topics, args.corpus)
    return {query_id: run[query_id] for query_id in topics if query_id in run}


def main(argv: Sequence[str] | None = None) -> None:
    """Retrieve, score, interpolate, write the run, evaluate."""
    args = parse_args(argv)
    group = ProcessGroup.from_environment()
    writes = group.rank == 0 and not args.dry_run
    with exclusive(args.output) if writes else nullcontext():
        rerank(args, group)
    group.close()


def rerank(args: argparse.Namespace, group: ProcessGroup) -> None:
    """Do the work of `main` while no other process writes the output."""
    # 1. The topics and their first stage
    topics = read_topics(args.queries)
    qrels = [qrel for qrel in read_qrels(args.qrels) if qrel.query_id in topics] if args.qrels else []
    if args.qrels and not qrels:
        raise InputError(f"{args.qrels}: no query of {args.queries} is judged here. Use files of one collection.")
    judged = {qrel.query_id for qrel in qrels}
    if qrels and group.rank == 0:
        check_threshold(qrels, args.relevance_threshold, args.qrels, measures=args.measures)
    if args.judged_only:
        topics = {query_id: text for query_id, text in topics.items() if query_id in judged}
    elif qrels and len(judged) < len(topics) and group.rank == 0:
        listed = f"{len(judged):,} of {len(topics):,} queries are judged"
        print(f"{args.qrels}: {listed}; --judged_only reranks only these", file=sys.stderr)
    run = first_stage(args, topics, group)
    held_out = DevSet()
    if args.interpolation_weight is None:
        config = bm25.BM25Config(args.threads, args.k1, args.b, args.language)
        files = args.holdout, args.index, args.corpus
        held_out = read_held_out_queries(*files, config, args.top_k, args.holdout_run)

    # 2. The model's scores, of the held-out queries first
    from inpars_lib.rerankers.load import choose_dtype, default_device, load_reranker

    device = default_device(group.local_rank) if args.device in (None, "cuda") else args.device
    reranker = load_reranker(
        args.model,
        max_length=args.max_length,
        device=device,
        dtype=group.broadcast(choose_dtype(args.dtype, device)),  # one precision for the whole run
        targets=(args.token_true, args.token_false) if args.token_true else None,
        instruction=args.instruction,
    )
    reranker.batch_tokens = args.batch_tokens
    blocks = PairBlocks({**held_out.topics, **topics}, {**held_out.run, **run}, args.top_k)
    if args.dry_run:
        print(estimate_cost(reranker, blocks, args.corpus))
        return
    settings = {
        "model": args.model,
        "files": files_fingerprint(args.model, args.corpus),
        "pairs": blocks.fingerprint(),
        "max_length": args.max_length,
        "dtype": str(reranker.model.dtype),
        "batch_tokens": args.batch_tokens,
        "targets": [args.token_true, args.token_false],
        **({"instruction": args.instruction} if args.instruction else {}),
    }
    store = ScoreStore(args.output, settings)
    if group.rank == 0:
        store.open()
    group.barrier()
    score_blocks(reranker, blocks, args.corpus, store, group)
    if group.rank > 0:
        return
    store.check_complete(len(blocks))
    scored = (pair for i in range(len(blocks)) for pair in scores_by_query(blocks[i], store.read(i)))

    # 3. The interpolation weight
    weight = args.interpolation_weight
    held_out_scores = dict(islice(scored, len(held_out.run)))
    if weight is None:
        curve = interpolation_curve(held_out.run, held_out_scores, held_out.qrels)
        weight = best_weight(curve)
        if len(set(curve.values())) == 1:
            warn(f"{args.holdout}: nDCG@10 is equal for all weights. Weight 0, the first stage alone, is used.")
        listed = ", ".join(f"{w:g}: {value:.4f}" for w, value in curve.items())
        print(
            f"nDCG@10 on {len(held_out.qrels):,} held-out synthetic queries by interpolation weight: {listed}",
            file=sys.stderr,
        )

    # 4. The run
    rankings = (rerank_hits(run[q], interpolate(run[q], scores, weight)) for q, scores in scored)
    write_run(args.output, (hit for ranking in rankings for hit in ranking), tag="inpars")
    store.delete()
    pairs = sum(min(len(hits), args.top_k) for hits in run.values())
    interpolated = "" if weight == 1 else f", interpolated with weight {weight:g} (first stage {1 - weight:g})"
    print(f"{args.output}: {len(run):,} queries, {pairs:,} documents reranked{interpolated}", file=sys.stderr)

    # 5. The table
    if args.qrels:
        print(f"{len(judged):,} judged queries, first {args.top_k} hits reranked by {args.model}{interpolated}\n")
        before, after = (
            evaluate_per_query(qrels, ranking, args.relevance_threshold, args.measures)
            for ranking in (run, read_run(args.output, judged))
        )
        print(comparison_table(before, after))
        if args.plot:
            plotted = "nDCG@10" if "nDCG@10" in before else args.measures[0]
            with atomic_write(args.plot, "wb") as file:
                plot_gains(file, before[plotted], after[plotted], plotted)


if __name__ == "__main__":
    run_script(main, interrupted="Scores so far are saved. Run the same command again to resume.")
