"""Stage 5: the trained model reranks the first documents of a run, or of BM25; with judgements, says whether it helped.

Reads   topics, their collection, a run (TREC or MS MARCO) or a BM25 index, a model, perhaps qrels
Writes  the reranked run (TREC); with --index the first stage too, as OUTPUT.bm25.txt; with --qrels a table on stdout

    python rerank.py --model data/msmarco --queries data/msmarco/topics.dl20.txt --corpus data/msmarco/collection.tsv \\
        --index msmarco-passage --qrels data/msmarco/qrels.dl20-passage.txt --relevance_threshold 2 \\
        --output data/msmarco/run.dl20.txt

    torchrun --nproc_per_node=4 -- rerank.py ...        # on 4 GPUs: the same run, the same bytes

Documents after the first --top_k keep their order, below the others. Scores are on disk as soon as they are made, in
OUTPUT.scores.*.jsonl: killed at any moment, the same command goes on where it was.
"""

import argparse
import array
import glob
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import bm25
import ranking
from formats import (
    InputError,
    Journal,
    Qrel,
    ScoredDoc,
    files_of,
    read_collection,
    read_qrels,
    read_run,
    read_topics,
    run_script,
    two_texts,
    warn,
    whole_file,
    write_run,
)

FIRST_STAGE_HITS = 1000  # of BM25, with --index: those beyond --top_k stay below
BLOCK = 256  # pairs scored at a time, of whole queries: enough to batch pairs of like length
TEXTS = 1024  # tokenised at a time
WEIGHTS = [i / 10 for i in range(11)]  # that `--interpolation_weight auto` chooses from


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a trained model, or a name on the Hugging Face hub")
    add("--queries", required=True, help="topics")
    add("--corpus", required=True, help="collection")
    add("--run", help="first-stage run, TREC or MS MARCO")
    add("--index", help="without --run: BM25 index whose hits are reranked, as in generate_triples_train.py")
    add("--output", required=True, help="reranked run, TREC")
    add("--top_k", type=int, default=1000, help="documents a query to rerank (default: %(default)s)")
    add("--qrels", help="judgements: prints the table")
    add("--plot", metavar="PNG", help="with --qrels: what each query gained or lost in nDCG@10")
    add("--relevance_threshold", type=int, default=1, help="lowest relevant grade (default: %(default)s)")
    add(
        "--interpolation_weight",
        default="1",
        metavar="W",
        help="of the reranker's score beside the first stage's, standardised; auto: chosen on --holdout (default: 1)",
    )
    add("--holdout", help="synthetic queries that training did not see, from generate_triples_train.py --holdout")
    add("--dry_run", action="store_true", help="write nothing: count the tokens, estimate the time from three blocks")
    add("--batch_tokens", type=int, help="tokens of a batch (default: what suits the device)")
    add("--max_length", type=int, default=512, help="tokens of query and document (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--token_true", help="T5-like models: word for relevant (default: the model's own)")
    add("--token_false", help="T5-like models: word for not relevant")
    bm25.add_arguments(parser)
    args = parser.parse_args()
    args.searching = bm25.searching(parser, args)
    if min(args.top_k, args.batch_tokens or 1) < 1:
        parser.error("--top_k and --batch_tokens are 1 or more")
    if args.plot and not args.qrels:
        parser.error("--plot needs --qrels")
    if not args.run and not args.index:
        parser.error("one of --run and --index is needed")
    if args.interpolation_weight == "auto":
        if not args.holdout or not args.index:
            parser.error("--interpolation_weight auto needs --holdout, and --index to find their hits")
    else:
        with suppress(ValueError):
            args.interpolation_weight = float(args.interpolation_weight)
        if not isinstance(args.interpolation_weight, float) or not 0 <= args.interpolation_weight <= 1:
            parser.error("--interpolation_weight is a number from 0 to 1, or auto")
    if bool(args.token_true) != bool(args.token_false):
        parser.error("--token_true and --token_false come together")
    return args


class Processes:
    """The processes of torchrun, or this one alone."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def wait(self) -> None:
        """For all to have come here."""
        if self.count == 1:
            return
        import torch.distributed as distributed

        if not distributed.is_initialized():  # one process may have much more to do than another
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        distributed.barrier()


def search(args: argparse.Namespace, topics: Mapping[str, str], top_k: int) -> Iterator[tuple[str, list[ScoredDoc]]]:
    """The BM25 hits of each query that has any."""
    searcher = bm25.open_index(args.index, args.corpus, args.searching)
    found = False
    for query_id, hits in bm25.search(searcher, topics, top_k, args.threads):
        if hits:
            found = True
            yield query_id, hits
    if not found:
        raise InputError(f"none of the {len(topics):,} queries has a hit in {args.index}")


def first_stage(
    args: argparse.Namespace, topics: Mapping[str, str], processes: Processes
) -> dict[str, Sequence[ScoredDoc]]:
    if args.run:
        run = read_run(args.run, topics, desc="Reading the run" if processes.rank == 0 else None)
        if not run:
            raise InputError(f"{args.run} has hits for no query of {args.queries}; is it a run of other topics?")
    elif args.dry_run:
        run = dict(search(args, topics, args.top_k))
    else:
        path = f"{args.output}.bm25.txt"
        if processes.rank == 0:
            searched = search(args, topics, max(args.top_k, FIRST_STAGE_HITS))
            write_run(path, (hit for _, hits in searched for hit in hits), tag="bm25")
        processes.wait()
        run = read_run(path, topics)
    if len(run) < len(topics) and processes.rank == 0:
        warn(f"{len(topics) - len(run):,} of {len(topics):,} queries have no hits and will have no ranking")
    return {query_id: run[query_id] for query_id in topics if query_id in run}


class Blocks:
    """The documents to rerank in blocks of whole queries, of BLOCK pairs or more but for the last.

    They are the same whatever the number of processes and wherever a run was stopped: so are the batches, and so is
    each bit of a score.
    """

    def __init__(self, run: Mapping[str, Sequence[ScoredDoc]], top_k: int) -> None:
        self.run = {query_id: hits[:top_k] for query_id, hits in run.items()}
        self.queries: list[list[str]] = []  # of each block
        self.sizes: list[int] = []
        for query_id, hits in self.run.items():
            if not self.sizes or self.sizes[-1] >= BLOCK:
                self.queries.append([])
                self.sizes.append(0)
            self.queries[-1].append(query_id)
            self.sizes[-1] += len(hits)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> list[ScoredDoc]:
        return [hit for query_id in self.queries[i] for hit in self.run[query_id]]


# --------------------------------------------------------------------------------------------------- scores on disk


class Scores:
    """The scores of blocks: a journal for each process, which reads those of all."""

    def __init__(self, output: str, settings: dict[str, Any], rank: int) -> None:
        self.output, self.settings = output, settings
        self.mine = Journal(f"{output}.scores.{rank}.jsonl", settings)

    def read(self) -> dict[int, array.array]:
        """The scores of the blocks that are finished, by block."""
        rows = (row for path in self.files() for row in Journal(str(path), self.settings).rows())
        return {row["block"]: array.array("d", row["scores"]) for row in rows}

    def files(self) -> list[Path]:
        output = Path(self.output)
        return list(output.parent.glob(f"{glob.escape(output.name)}.scores.*.jsonl"))

    def delete(self) -> None:
        for path in self.files():
            path.unlink()


def split(block: list[ScoredDoc], values: Iterable[float]) -> Iterator[tuple[str, dict[str, float]]]:
    """A block's scores by query: (query id, {doc_id: score})."""
    scored = zip(block, values, strict=True)
    for query_id, group in groupby(scored, key=lambda pair: pair[0].query_id):
        yield query_id, {hit.doc_id: value for hit, value in group}


def settings_of(args: argparse.Namespace, dtype: str, topics: Mapping[str, str], blocks: Blocks) -> dict[str, Any]:
    """What scores depend on."""
    pairs = hashlib.sha256()
    for query_id, hits in blocks.run.items():
        ids = " ".join(hit.doc_id for hit in hits)
        pairs.update(f"{topics[query_id]}\t{query_id}\t{ids}\n".encode(errors="replace"))
    files = [] if args.corpus.startswith("ir_datasets:") else [Path(path) for path in files_of(args.corpus)]
    if os.path.isdir(args.model):
        files += sorted(path for path in Path(args.model).iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "model": args.model,
        "files": hashlib.sha256(repr(stamps).encode()).hexdigest(),
        "pairs": pairs.hexdigest(),
        "max_length": args.max_length,
        "dtype": dtype,
        "batch_tokens": args.batch_tokens,
        "answers": [args.token_true, args.token_false],
    }


class Tokens:
    """The token ids of documents by doc_id, in a file without a name: in memory 8 bytes a document beside its id."""

    def __init__(self, folder: str, doc_ids: Iterable[str]) -> None:
        self.file = tempfile.TemporaryFile(dir=folder if os.path.isdir(folder) else None)
        self.number: dict[str, int] = dict.fromkeys(doc_ids, -1)
        self.starts = array.array("q", [0])

    def add(self, doc_id: str, ids: Any) -> bool:
        """False if other tokens of this document are there already."""
        if self.number[doc_id] >= 0:
            return self[doc_id].tolist() == ids.tolist()
        self.number[doc_id] = len(self.starts) - 1
        self.starts.append(self.starts[-1] + ids.nbytes)
        self.file.write(ids.tobytes())
        return True

    def __getitem__(self, doc_id: str) -> Any:
        import numpy

        start, end = self.starts[self.number[doc_id] : self.number[doc_id] + 2]
        self.file.flush()
        return numpy.frombuffer(os.pread(self.file.fileno(), end - start, start), dtype=numpy.int32)

    def count(self, doc_id: str) -> int:
        """Of a document's tokens."""
        start, end = self.starts[self.number[doc_id] : self.number[doc_id] + 2]
        return (end - start) // 4


def read_tokens(args: argparse.Namespace, model: Any, wanted: Iterable[str]) -> Tokens:
    """The token ids of the wanted documents: each is tokenised once, however many queries it is a hit of."""
    tokens = Tokens(os.path.dirname(args.output) or ".", wanted)
    docs = (doc for doc in read_collection(args.corpus, desc="Reading texts") if doc.doc_id in tokens.number)
    while chunk := list(islice(docs, TEXTS)):
        for doc, ids in zip(chunk, model.tokenize([doc.text for doc in chunk]), strict=True):
            if not tokens.add(doc.doc_id, ids):
                raise two_texts(args.corpus, doc.doc_id)
    if absent := [doc_id for doc_id, number in tokens.number.items() if number < 0]:
        raise InputError(
            f"{len(absent):,} of the {len(tokens.number):,} documents of {args.run or args.index} are not in "
            f"{args.corpus} (one is {min(absent)}); the two must be of one collection"
        )
    return tokens


def project(model: Any, blocks: Blocks, queries: Mapping[str, Any], documents: Tokens) -> str:
    """What scoring all blocks would take, from the tokens of all and the time of three."""
    import time

    def pairs_of(block: list[ScoredDoc]) -> list[tuple[Any, Any]]:
        return [(queries[hit.query_id], documents[hit.doc_id]) for hit in block]

    empty = (*model.tokenize_queries([""]), *model.tokenize([""]))
    around = len(model.join(*empty)[0]) - sum(map(len, empty))  # tokens that the model adds to a pair

    def tokens_of(block: list[ScoredDoc]) -> int:
        lengths = (len(queries[hit.query_id]) + documents.count(hit.doc_id) for hit in block)
        return sum(min(model.max_length, around + length) for length in lengths)

    model.score_tokens(pairs_of(blocks[0][:8]))  # what the first call sets up is not counted
    sample = [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    started = time.monotonic()
    for block in sample:
        model.score_tokens(pairs_of(block))
    seconds = time.monotonic() - started
    tokens, pairs = sum(map(tokens_of, blocks)), sum(blocks.sizes)
    hours = seconds * tokens / sum(map(tokens_of, sample)) / 3600
    return (
        f"{len(queries):,} queries, {pairs:,} pairs, {tokens:,} tokens ({tokens / pairs:.0f} a pair); about "
        f"{hours:.2f} hours on one {model.model.device.type}, {pairs / hours / 3600:,.1f} pairs a second"
    )


# ---------------------------------------------------------------------------------------------------- interpolation


def standardise(values: Sequence[float]) -> list[float]:
    """With mean 0 and standard deviation 1; all 0 where they do not differ."""
    from statistics import fmean, pstdev

    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]


def interpolate(hits: Sequence[ScoredDoc], scores: Mapping[str, float], weight: float) -> dict[str, float]:
    """The reranker's and the first stage's scores of a query's documents, mixed.

    A `weight` of 1 is the reranker alone, with its scores as they are.
    """
    if weight == 1.0:
        return dict(scores)
    both = [hit for hit in hits if hit.doc_id in scores]
    new, old = standardise([scores[hit.doc_id] for hit in both]), standardise([hit.score for hit in both])
    return {hit.doc_id: weight * a + (1 - weight) * b for hit, a, b in zip(both, new, old, strict=True)}


def choose_weight(
    run: Mapping[str, Sequence[ScoredDoc]], scores: Mapping[str, Mapping[str, float]], qrels: list[Qrel]
) -> float:
    """The weight with the best nDCG@10 on the synthetic queries held out; of equals the one nearest to the reranker."""
    values = {}
    for weight in WEIGHTS:
        mixed = {q: ranking.rank(hits, interpolate(hits, scores[q], weight)) for q, hits in run.items()}
        values[weight] = round(ranking.means(ranking.per_query(qrels, mixed, 1))["nDCG@10"], 4)
    best = max(WEIGHTS, key=lambda weight: (values[weight], weight))
    curve = ", ".join(f"{weight:g}: {value:.4f}" for weight, value in values.items())
    print(f"nDCG@10 of {len(qrels):,} held-out synthetic queries by weight: {curve}", file=sys.stderr)
    return best


def compare(first: dict[str, dict[str, float]], second: dict[str, dict[str, float]]) -> str:
    """The table: both rankings, given by `ranking.per_query`, under each measure, tested over the queries."""
    from scipy.stats import ttest_rel

    lines = [f"{'':10}{'first stage':>12}{'reranked':>10}{'change':>9}{'p':>8}{'won':>6}{'tied':>6}{'lost':>6}"]
    for name, old in ranking.means(first).items():
        pairs = [(value, second[name][query_id]) for query_id, value in first[name].items()]
        new = sum(b for _, b in pairs) / len(pairs)
        won, lost = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
        p = ttest_rel(*zip(*pairs, strict=True)).pvalue if won + lost and len(pairs) > 1 else 1.0
        lines.append(
            f"{name:10}{old:12.4f}{new:10.4f}{new - old:+9.4f}{p:8.4f}{won:6}{len(pairs) - won - lost:6}{lost:6}"
        )
    return "\n".join(lines)


def draw_gains(path: str, before: Mapping[str, float], after: Mapping[str, float], name: str) -> None:
    """What each query gained, the greatest first."""
    from matplotlib.figure import Figure

    gains = sorted((after[query_id] - value for query_id, value in before.items()), reverse=True)
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(gains)), gains, width=1.0, color=["tab:green" if gain > 0 else "tab:red" for gain in gains])
    axes.axhline(0, color="0.3", linewidth=0.8)
    mean = sum(gains) / len(gains)
    axes.axhline(mean, color="tab:blue", linestyle=":", label=f"mean {mean:+.4f}")
    axes.set(xlabel=f"queries: {won:,} won, {len(gains) - won - lost:,} tied, {lost:,} lost")
    axes.set(ylabel=f"{name}, gain over the first stage", ylim=(-1.05, 1.05))
    axes.legend()
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    args = parse_args()
    processes = Processes()
    topics = read_topics(args.queries)
    qrels = [qrel for qrel in read_qrels(args.qrels) if qrel.query_id in topics] if args.qrels else []
    if args.qrels and not qrels:
        raise InputError(f"{args.qrels} judges no query of {args.queries}; are they of another collection?")
    run = first_stage(args, topics, processes)
    held_topics, held_run, held_qrels = {}, {}, []
    if args.interpolation_weight == "auto":
        held = bm25.read_holdout(args.holdout, args.index, args.corpus, args.searching, args.top_k)
        held_topics, held_run, held_qrels = held

    from tqdm import tqdm

    import models

    answers = (args.token_true, args.token_false) if args.token_true else None
    device = args.device or models.default_device(processes.local_rank)
    model = models.load_model(args.model, max_length=args.max_length, device=device, dtype=args.dtype, answers=answers)
    model.batch_tokens = args.batch_tokens

    texts_of = {**held_topics, **topics}
    blocks = Blocks({**held_run, **run}, args.top_k)
    if args.dry_run:
        queries = dict(zip(texts_of, model.tokenize_queries(list(texts_of.values())), strict=True))
        documents = read_tokens(args, model, (hit.doc_id for hits in blocks.run.values() for hit in hits))
        print(project(model, blocks, queries, documents))
        return
    scores = Scores(args.output, settings_of(args, str(model.model.dtype), texts_of, blocks), processes.rank)
    done = scores.read()
    processes.wait()
    scores.mine.open()
    mine = [i for i in range(len(blocks)) if i % processes.count == processes.rank]
    todo = [i for i in mine if i not in done]
    del done
    documents = read_tokens(args, model, (hit.doc_id for i in todo for hit in blocks[i])) if todo else {}
    total, left = (sum(blocks.sizes[i] for i in chosen) for chosen in (mine, todo))
    with tqdm(desc="Reranking", total=total, initial=total - left, unit=" pairs", disable=processes.rank > 0) as bar:
        for i in todo:
            ids = blocks.queries[i]
            queries = dict(zip(ids, model.tokenize_queries([texts_of[query_id] for query_id in ids]), strict=True))
            scored = model.score_tokens([(queries[hit.query_id], documents[hit.doc_id]) for hit in blocks[i]])
            scores.mine.write({"block": i, "scores": scored.tolist()})
            bar.update(blocks.sizes[i])
    processes.wait()
    if processes.rank > 0:
        return

    by_query = (pair for i, values in sorted(scores.read().items()) for pair in split(blocks[i], values))
    held_scores = dict(islice(by_query, len(held_run)))
    weight = choose_weight(held_run, held_scores, held_qrels) if held_run else args.interpolation_weight
    mixed_scores = ((q, interpolate(run[q], scores_of_q, weight)) for q, scores_of_q in by_query)
    write_run(args.output, (hit for q, mixed in mixed_scores for hit in ranking.rank(run[q], mixed)), tag="inpars")
    scores.delete()
    pairs = sum(min(len(hits), args.top_k) for hits in run.values())
    mixed = "" if weight == 1 else f", weight {weight:g} beside the first stage's {1 - weight:g}"
    print(f"{args.output}: {len(run):,} queries, {pairs:,} documents reranked{mixed}", file=sys.stderr)

    if args.qrels:
        judged = len({qrel.query_id for qrel in qrels})
        print(f"{judged:,} judged queries, first {args.top_k} documents reranked by {args.model}{mixed}\n")
        reranked = read_run(args.output, {qrel.query_id for qrel in qrels})
        first, second = (ranking.per_query(qrels, each, args.relevance_threshold) for each in (run, reranked))
        print(compare(first, second))
        if args.plot:
            draw_gains(args.plot, first["nDCG@10"], second["nDCG@10"], "nDCG@10")


if __name__ == "__main__":
    run_script(main)
