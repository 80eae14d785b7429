"""Compare the scores of a reranker with those of other packages that load it.

    pip install ...                                      # the packages listed in benchmarks/rerank.py
    D=demo/work; python benchmarks/elsewhere.py --model $D/model --topics $D/topics.tsv --corpus $D/collection.tsv

--model is a model that train_t5.py made, or a folder that another package saved: ours there, or theirs here. rerankers
and PyTerrier-T5 load a monoT5, rerankers and sentence-transformers a cross-encoder, and the latter a causal model whose
tokenizer has the prompt as a chat template. The exit code is 1 if a score differs by more than 0.0001, or if no package
is installed.
"""

import argparse
import math
import sys
from itertools import islice
from pathlib import Path

from scipy.stats import kendalltau

sys.path.insert(0, str(Path(__file__).parent.parent))
from inpars_lib.formats.collection import read_collection
from inpars_lib.formats.topics import read_topics
from inpars_lib.rerankers.base import Reranker
from inpars_lib.rerankers.load import load_reranker

TOLERANCE = 1e-4


def score_with_rerankers(model: str, query: str, texts: list[str], reranker: Reranker) -> list[float]:
    """Return the scores of the package rerankers, of a monoT5 the logarithms of its probabilities."""
    import rerankers

    kind = {"model_type": "cross-encoder"}
    if type(reranker).__name__ == "MonoT5":
        true, false = reranker.model.config.answers
        kind = {"model_type": "t5", "token_true": true, "token_false": false}
    ranker = rerankers.Reranker(model, **kind, device="cpu", dtype="float32", verbose=0)
    results = ranker.rank(query=query, docs=texts, doc_ids=list(range(len(texts)))).results
    scores = [result.score for result in sorted(results, key=lambda result: result.doc_id)]
    return [math.log(score) for score in scores] if kind["model_type"] == "t5" else scores


def score_with_pyterrier(model: str, query: str, texts: list[str], reranker: Reranker) -> list[float]:
    """Return the scores of PyTerrier-T5, one document per batch: it puts `Relevant:` after the padding of a batch."""
    import pandas
    from pyterrier_t5 import MonoT5ReRanker, mT5ReRanker

    ids = [str(i) for i in range(len(texts))]
    frame = pandas.DataFrame({"qid": "1", "query": query, "docno": ids, "text": texts})
    config = reranker.model.config
    ranker_class = MonoT5ReRanker if config.model_type == "t5" else mT5ReRanker
    ranker = ranker_class(model, model, batch_size=1, verbose=False)
    ranker.REL, ranker.NREL = ranker.tokenizer.convert_tokens_to_ids(config.answers)
    ranked = ranker.transform(frame)
    scores = dict(zip(ranked.docno, ranked.score, strict=True))
    return [scores[i] for i in ids]


def score_with_sentence_transformers(model: str, query: str, texts: list[str], reranker: Reranker) -> list[float]:
    """Return the logits of sentence-transformers."""
    from sentence_transformers import CrossEncoder
    from torch.nn import Identity

    pairs = [(query, text) for text in texts]
    return CrossEncoder(model, device="cpu").predict(pairs, activation_fn=Identity()).tolist()


PACKAGES = {
    "rerankers": (score_with_rerankers, ("MonoT5", "CrossEncoder")),
    "PyTerrier-T5": (score_with_pyterrier, ("MonoT5",)),
    "sentence-transformers": (score_with_sentence_transformers, ("CrossEncoder", "CausalReranker")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--topics", required=True, help="topics; the first is used")
    parser.add_argument("--corpus", required=True, help="collection; the first eight documents are scored")
    args = parser.parse_args()
    query = next(iter(read_topics(args.topics).values()))
    texts = [doc.text[:200] for doc in islice(read_collection(args.corpus), 8)]  # packages truncate differently
    reranker = load_reranker(args.model, dtype="float32")
    family = type(reranker).__name__
    ours = reranker.score([(query, text) for text in texts]).tolist()
    show("ours", ours)
    agree = []
    for name, (score, families) in PACKAGES.items():
        if family not in families:
            continue
        if family == "CausalReranker" and not reranker.tokenizer.chat_template:
            print(f"{name:22} scores without the prompt: the tokenizer has no chat template")
            continue
        try:
            theirs = score(args.model, query, texts, reranker)
        except ImportError as error:
            print(f"{name:22} not installed ({error}): see benchmarks/rerank.py")
            continue
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        tau = kendalltau(ours, theirs).statistic
        show(name, theirs)
        print(f"{'':22} largest difference {difference:.1e}, Kendall's tau {tau:.4f}")
        agree.append(difference <= TOLERANCE)
    if not (agree and all(agree)):
        sys.exit("the packages score the documents differently, or none could")


def show(name: str, scores: list[float]) -> None:
    """Print scores."""
    print(f"{name:22}" + " ".join(f"{value:9.4f}" for value in scores))


if __name__ == "__main__":
    main()
