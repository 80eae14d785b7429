"""Rerankers and evaluation on their own: the input of a pair, its score, rankings and measures."""

import random
import re
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import error_line, ok, run, save_t5

from inpars_lib import evaluation
from inpars_lib.cli import InputError
from inpars_lib.formats.records import Qrel, ScoredDoc
from inpars_lib.formats.runs import rerank_hits
from inpars_lib.interpolation import best_weight, interpolate, interpolation_curve
from inpars_lib.rerankers.load import checkpoint_name, load_reranker
from inpars_lib.rerankers.t5_forward import first_token_logits

WORDS = [
    "what",
    "are",
    "tides",
    "and",
    "why",
    "does",
    "bread",
    "rise",
    "in",
    "the",
    "oven",
    "when",
    "bees",
    "make",
    "honey",
]


def test_monot5_reads_the_papers_input(tiny_t5: Path) -> None:
    model = load_reranker(str(tiny_t5))
    ids = model.encode("what are tides", "the study of tides")[0].tolist()
    whole = model.tokenizer("Query: what are tides Document: the study of tides Relevant:", add_special_tokens=False)
    assert ids == [*whole.input_ids, model.tokenizer.eos_token_id]


def test_a_long_document_is_truncated_but_never_the_suffix(tiny_t5: Path) -> None:
    model = load_reranker(str(tiny_t5), max_length=40)
    suffix = [*model.tokenizer(" Relevant:", add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]
    for query, text in (("what are tides", "tides " * 500), ("what are tides " * 500, "tides"), ("tides " * 500, "")):
        ids = model.encode(query, text)[0].tolist()
        assert len(ids) <= 40
        assert ids[-len(suffix) :] == suffix
    ids = model.encode("what are tides", "tides " * 500)[0]
    assert "Query: what are tides Document: tides" in model.tokenizer.decode(ids)


def test_the_monot5_score_equals_generation(tiny_t5: Path) -> None:
    """The score is the log-softmax over both target tokens at the first decoding step, in any batch."""
    model = load_reranker(str(tiny_t5), dtype="float32")
    pairs = [("what are tides", " ".join(WORDS[:n])) for n in (1, 14, 3, 9, 5)]
    model.batch_tokens = 40  # several batches, of several lengths
    scores = model.score(pairs)
    true, false = (model.tokenizer(word, add_special_tokens=False).input_ids for word in ("true", "false"))
    for pair, score in zip(pairs, scores, strict=True):
        ids = torch.tensor(model.encode(*pair)[0][None].astype(int))
        made = model.model.generate(ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        logits = made.logits[0][0]
        assert score == pytest.approx(
            (logits[true[0]] - torch.logsumexp(logits[[true[0], false[0]]], 0)).item(), abs=1e-4
        )


def test_target_words_come_from_the_vocabulary(tmp_path: Path) -> None:
    texts = ["what are tides", "bread and bees"] * 20
    model = load_reranker(str(save_t5(tmp_path / "yes", texts, answers="yes no ")))
    assert model.model.config.answers == ["▁yes", "▁no"]
    model = load_reranker(
        str(save_t5(tmp_path / "both", texts, answers="true false hot cold ")), targets=("hot", "cold")
    )
    assert model.model.config.answers == ["▁hot", "▁cold"]
    model.model.save_pretrained(tmp_path / "both")
    assert load_reranker(str(tmp_path / "both")).model.config.answers == ["▁hot", "▁cold"]
    with pytest.raises(InputError, match="not one token each"):
        load_reranker(str(tmp_path / "both"), targets=("supercalifragilistic", "cold"))


def test_labels_of_a_training_batch(tiny_t5: Path, tiny_encoder: Path) -> None:
    examples = [("tides", "the study of tides", True), ("tides", "buy tides", False)]
    model = load_reranker(str(tiny_t5))
    labels = model.collate(examples)["labels"]
    true, false, eos = *model.target_ids, model.tokenizer.eos_token_id
    assert labels.tolist() == [[true, eos], [false, eos]]
    encoder = load_reranker(str(tiny_encoder), new_head=True)
    assert encoder.collate(examples)["labels"].tolist() == [[1.0], [0.0]]


def test_logits_are_the_scores_with_gradients(tiny_t5: Path, tiny_encoder: Path) -> None:
    pairs = [("tides", "the study of tides and bees in detail"), ("bread", "buy bread")]
    examples = [(*pair, True) for pair in pairs]
    for base, squashed in ((tiny_t5, torch.nn.functional.logsigmoid), (tiny_encoder, lambda logits: logits)):
        reranker = load_reranker(str(base), dtype="float32", new_head=True)
        reranker.model.eval()
        batch = reranker.collate(examples)
        del batch["labels"]
        logits = reranker.relevance_logits(reranker.model, batch)
        assert logits.requires_grad
        # A monoT5's score is the logarithm of a probability of two: the sigmoid of the margin.
        numpy.testing.assert_allclose(squashed(logits).detach().numpy(), reranker.score(pairs), atol=1e-5)


def test_a_cross_encoder_truncates_documents(tiny_encoder: Path) -> None:
    model = load_reranker(str(tiny_encoder), max_length=20, dtype="float32", new_head=True)
    for query, text in (("what are tides", "tides " * 500), ("what are tides " * 500, "bread and bees")):
        ids, second = model.encode(query, text)
        assert 0 < second < len(ids) <= 20
    ids, second = model.encode("what are tides", "tides " * 500)
    assert len(ids) == 20
    kept = model.tokenizer.decode(ids)
    assert kept.startswith("[CLS] what are tides [SEP] tides")
    pairs = [("what are tides", " ".join(WORDS[:n])) for n in (1, 12, 3)]
    batch, padded = (
        model.pad([model.encode(*pair) for pair in pairs]),
        model.tokenizer(*zip(*pairs, strict=True), padding=True, truncation=True, max_length=20),
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == dict(padded)
    apart = [model.score([pair])[0] for pair in pairs]
    numpy.testing.assert_allclose(model.score(pairs), apart, atol=1e-5)


def test_models_that_are_no_rerankers(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never trained to rerank"):
        load_reranker(str(tiny_encoder))
    with pytest.raises(InputError, match="cannot load this model"):
        load_reranker(str(tmp_path))
    with pytest.raises(InputError, match="--device cuda:77: "):
        load_reranker(str(tiny_encoder), device="cuda:77")


def test_the_papers_name_of_t5() -> None:
    assert checkpoint_name("t5_base") == checkpoint_name("t5-base") == "google-t5/t5-base"
    assert checkpoint_name("castorini/monot5-base-msmarco") == "castorini/monot5-base-msmarco"
    assert checkpoint_name("t5_mine") == "t5_mine"


def test_ties_in_a_ranking() -> None:
    hits = [ScoredDoc("q", doc_id, 10.0 - i) for i, doc_id in enumerate("abcde")]
    ranked = rerank_hits(hits, [-0.5, -0.1, -0.5000000001])
    # c and a tie in the digits of a run, and trec_eval puts the greater id first; d and e were not reranked.
    assert [(hit.doc_id, hit.score) for hit in ranked] == [
        ("b", -0.1),
        ("c", -0.5),
        ("a", -0.5),
        ("d", -1.5),
        ("e", -2.5),
    ]


def test_measures() -> None:
    qrels = [Qrel("1", "a", 1), Qrel("1", "b", 2), Qrel("2", "a", 2), Qrel("3", "a", 1)]
    run = {"1": [ScoredDoc("1", "a", 3.0), ScoredDoc("1", "b", 2.0)]}
    run["2"] = [ScoredDoc("2", "x", 1.0), ScoredDoc("2", "a", 0.5)]
    one, two = (evaluation.evaluate_per_query(qrels, run, level) for level in (1, 2))
    assert one["MRR@10"] == {"1": 1.0, "2": 0.5, "3": 0.0}  # 3 has no hits, and counts
    assert two["MRR@10"] == {"1": 0.5, "2": 0.5, "3": 0.0}
    assert one["P@20"]["1"] == pytest.approx(0.1)
    assert two["P@20"]["1"] == pytest.approx(0.05)
    assert one["nDCG@10"] == two["nDCG@10"]
    gain = (1 + 2 / numpy.log2(3)) / (2 + 1 / numpy.log2(3))
    assert one["nDCG@10"]["1"] == pytest.approx(gain)
    assert evaluation.mean_values(one)["MRR@10"] == pytest.approx(0.5)
    assert list(one) == ["nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000"]


def test_ties_are_broken_like_trec_eval_in_every_measure() -> None:
    run = {"1": [ScoredDoc("1", "a", 1.0), ScoredDoc("1", "b", 1.0)]}
    values = evaluation.evaluate_per_query([Qrel("1", "a", 1)], run, 1)
    assert values["MRR@10"]["1"] == values["MAP"]["1"] == 0.5  # b precedes a


def test_a_threshold_that_no_judgement_reaches(capsys: pytest.CaptureFixture) -> None:
    qrels, run = [Qrel("1", "a", 1)], {"1": [ScoredDoc("1", "a", 1.0)]}
    values = evaluation.evaluate_per_query(qrels, run, 2)
    assert values["nDCG@10"]["1"] == 1.0
    table = evaluation.comparison_table(values, values)
    assert [line.split()[1] for line in table.splitlines()[1:]] == ["1.0000", "1.0000", "n/a", "n/a", "n/a", "n/a"]
    evaluation.check_threshold(qrels, 1, "qrels.txt")
    assert capsys.readouterr().err == ""
    evaluation.check_threshold(qrels, 2, "qrels.txt", "nDCG@10")
    assert "--relevance_threshold 2. The highest grade is 1." in capsys.readouterr().err
    with pytest.raises(InputError, match="select by nDCG@10"):
        evaluation.check_threshold(qrels, 2, "qrels.txt", "MRR@10")


TREC_EVAL_MEASURES = (
    "nDCG nDCG@3 nDCG(judged_only=True)@3 RR AP MAP@3 AP(rel=2) P@3 P(rel=2,judged_only=True)@3 R@3 R(rel=2)@3 "
    "Success@2 Rprec Bpref Bpref(rel=2) infAP infAP(rel=3) SetP SetR SetF SetAP SetRelP"
)


def test_every_measure_is_trec_evals_whatever_ties_and_grades() -> None:
    import ir_measures

    names = evaluation.parse_measures(TREC_EVAL_MEASURES)
    assert names == tuple(TREC_EVAL_MEASURES.split())
    chance, docs = random.Random(3), [f"d{i}" for i in range(14)]
    for _ in range(60):
        grades = [-2, -1, 0, 0, 1, 2, 3]
        qrels = [Qrel("1", doc_id, chance.choice(grades)) for doc_id in chance.sample(docs, 8)] + [Qrel("1", "x", 3)]
        hits = [ScoredDoc("1", doc_id, chance.choice([0.0, 0.5, 1.0])) for doc_id in chance.sample(docs, 9)]
        values = evaluation.evaluate_per_query(qrels, {"1": hits}, 1, [*names, "MRR@2", "Judged@2", "Compat"])
        for name in names:  # trec_eval itself breaks the ties
            [metric] = ir_measures.pytrec_eval.iter_calc([ir_measures.parse_measure(name)], qrels, hits)
            assert values[name] == {"1": pytest.approx(metric.value)}, name
        grade = {qrel.doc_id: qrel.relevance for qrel in qrels}
        top = sorted(hits, key=lambda hit: (hit.score, hit.doc_id), reverse=True)[:2]
        assert values["Judged@2"]["1"] == sum(hit.doc_id in grade for hit in top) / 2
        assert values["MRR@2"]["1"] == max(1 / (i + 1) * (grade.get(hit.doc_id, 0) > 0) for i, hit in enumerate(top))
    ties = {"1": [ScoredDoc("1", doc_id, 0.0) for doc_id in "bca"]}  # the ideal ranking prefers c, which is retrieved
    compat = evaluation.evaluate_per_query([Qrel("1", "c", 1), Qrel("1", "x", 1)], ties, 1, ["Compat"])["Compat"]["1"]
    best, found = (sum(0.95**i * n / (i + 1) for i, n in enumerate(overlap)) for overlap in ([1, 2, 2], [1, 1, 1]))
    assert compat == pytest.approx(found / best)


def test_negative_grades_alone() -> None:
    qrels, run = [Qrel("1", "a", -2), Qrel("2", "b", 1)], {"1": [ScoredDoc("1", "a", 1.0)]}  # once a crash in C
    values = evaluation.evaluate_per_query(qrels, run, 1, ["nDCG@10", "AP", "Bpref", "Judged@1"])
    assert {name: value["1"] for name, value in values.items()} == {"nDCG@10": 0, "AP": 0, "Bpref": 0, "Judged@1": 1}


def test_rel_of_a_measure_replaces_the_threshold(capsys: pytest.CaptureFixture) -> None:
    qrels = [Qrel("1", "a", 1), Qrel("1", "b", 2)]
    run = {"1": [ScoredDoc("1", "a", 2.0), ScoredDoc("1", "b", 1.0)]}
    measures = ["RR@10", "RR(rel=1)@10", "RR(rel=2)@10", "SetRelP", "AP(rel=3)"]
    values = evaluation.evaluate_per_query(qrels, run, 2, measures)
    assert [values[name]["1"] for name in measures[:4]] == [0.5, 1.0, 0.5, 1.0]
    assert numpy.isnan(values["AP(rel=3)"]["1"])
    evaluation.check_threshold(qrels, 2, "qrels.txt", None, measures)
    assert "`rel` of AP(rel=3). The highest grade is 2. AP(rel=3) is not available" in capsys.readouterr().err
    for select_by, chosen in (("AP(rel=3)", measures), (None, ["AP(rel=3)"])):
        with pytest.raises(InputError, match=r"no judgement reaches `rel` of AP\(rel=3\)"):
            evaluation.check_threshold(qrels, 2, "qrels.txt", select_by, chosen)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("nDCG@10 ndcg_cut.10", "'ndcg_cut.10' is not a supported measure. Closest: nDCG."),
        ("recall_100", "'recall_100' is not a supported measure. Closest: Recall."),
        ("ERR@10", "'ERR@10' is not a supported measure"),
        ("RBP(rel=1)", "Supported: nDCG, RR, "),
        ("NumRet", "Supported: nDCG, RR, "),
        ("nDCG@10,RR@10", "such as nDCG@10"),
        ("P", "which P, R and Success need"),
        ("P@0", "'P@0'"),
        ("AP(rel=0)", "'AP(rel=0)'"),
        ("AP(rel=1,rel=2)", "'AP(rel=1,rel=2)'"),
        ("RR(judged_only=True)@10", "'RR(judged_only=True)@10'"),
        ("nDCG(gains={1:9})@10", "'nDCG(gains={1:9})@10'"),
        ("wörter", "Closest: none"),
        (" ", "'' is not a supported measure"),
        ("MRR@10 RR@10", "MRR@10 and RR@10 are the same measure"),
    ],
)
def test_refused_measures(names: str, problem: str) -> None:
    assert problem in error_line(run("inpars_lib.evaluation", "--qrels", "q", "r", "--measures", names), 2)


def write_runs(folder: Path, **ranks: list[int]) -> None:
    """Write qrels with one relevant document per query, and runs that rank it so: 0 for a query without hits."""
    (folder / "qrels.txt").write_text("".join(f"{q} 0 d1 1\n" for q in range(len(next(iter(ranks.values()))))))
    for name, places in ranks.items():
        lines = [f"{q}\td{1 if i == place else i + 99}\t{i}\n" for q, place in enumerate(places) if place
                 for i in range(1, 4)]  # fmt: skip
        (folder / name).write_text("".join(lines) + "unjudged\td1\t1\n")


def table(folder: Path, *args: object) -> tuple[list[list[str]], str, str]:
    """Return the words of each row of the table, the lines above it and stderr."""
    done = ok(run("inpars_lib.evaluation", "--qrels", "qrels.txt", *args, cwd=folder))
    notes, rows = done.stdout.split("\n\n")
    return [line.split() for line in rows.splitlines()], notes, done.stderr


def test_a_table_of_any_runs(tmp_path: Path) -> None:
    from scipy.stats import ttest_rel

    ranks = {"a": [2, 2, 2, 3, 2, 0], "b": [1, 1, 2, 2, 2, 2], "c": [1, 1, 1, 1, 1, 3], "d": [2, 3, 2, 3, 2, 0]}
    write_runs(tmp_path, **ranks)
    rows, notes, said = table(tmp_path, *ranks, "--measures", "RR@10 Success@1")
    assert rows[0] == ["mean", "change", "p", "won", "tied", "lost"]
    assert "Holm's correction over the 3 compared runs, for each measure separately" in notes
    assert "judged queries: 6\n" in notes
    assert "a: 1 of 6 queries are not judged and were skipped" in said
    assert "warning: a: 1 of 6 judged queries have no hits. They count as 0." in said
    assert not re.search("warning: [bc]:", said)
    values = {name: [1 / rank if rank else 0 for rank in places] for name, places in ranks.items()}
    p = {name: ttest_rel(values["a"], values[name]).pvalue for name in "bcd"}
    assert p["c"] < p["b"] < p["d"]  # Holm by hand: times 3, 2 and 1, and never below the one before
    second = max(3 * p["c"], 2 * p["b"])
    corrected = {"b": second, "c": 3 * p["c"], "d": max(second, p["d"])}
    assert rows[1] == ["RR@10", "a", f"{sum(values['a']) / 6:.4f}"]
    for name, row in zip("bcd", rows[2:5], strict=True):
        change = (sum(values[name]) - sum(values["a"])) / 6
        assert row[:4] == [name, f"{sum(values[name]) / 6:.4f}", f"{change:+.4f}", f"{corrected[name]:.4f}"]
    assert [row[4:] for row in rows[2:5]] == [["4", "2", "0"], ["6", "0", "0"], ["0", "5", "1"]]
    assert rows[5] == ["Success@1", "a", "0.0000"]
    # Without a difference p is 1. Two runs need no correction.
    rows, notes, _ = table(tmp_path, "a", "b", "--measures", "RR@10")
    assert rows[2][3] == f"{p['b']:.4f}"
    assert "Holm" not in notes
    assert [row[-5:] for row in table(tmp_path, "a", "a")[0][2::2]] == [["+0.0000", "1.0000", "0", "6", "0"]] * 6
    rows, notes, _ = table(tmp_path, "c")
    assert rows[:2] == [["mean"], ["nDCG@10", "c", "0.9167"]]
    assert notes == "judged queries: 6"


def test_holms_correction() -> None:
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([0.4, 0.9, 0.6]) == [1.0, 1.0, 1.0]
    assert evaluation.holm([]) == []


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    write_runs(tmp_path, a=[1], b=[2], c=[3])
    rows, notes, _ = table(tmp_path, "a", "b", "c", "--measures", "RR@10")
    assert rows[2] == ["b", "0.5000", "-0.5000", "n/a", "0", "0", "1"]
    assert "p: n/a, because a test needs two queries" in notes
    rows, _, said = table(tmp_path, "a", "b", "--measures", "nDCG@10 AP", "--relevance_threshold", 3)
    assert rows[3:] == [["AP", "a", "n/a"], ["b", "n/a"]]
    assert "no judgement reaches --relevance_threshold 3. The highest grade is 1. AP is not available." in said
    for name, text, problem in (
        ("empty", "", "empty: no usable line found"),
        ("other", "7 Q0 d1 1 1.0 x\n", "other: none of the 1 queries is judged in qrels.txt"),
    ):
        (tmp_path / name).write_text(text)
        assert problem in error_line(run("inpars_lib.evaluation", "--qrels", "qrels.txt", "a", name, cwd=tmp_path))


# -------------------------------------------------------------------------------------------------------- interpolation


def test_interpolated_scores() -> None:
    hits = [ScoredDoc("q", "a", 30.0), ScoredDoc("q", "b", 20.0), ScoredDoc("q", "c", 10.0), ScoredDoc("q", "d", 5.0)]
    scores = [-3.0, -1.0, -2.0]  # d was not reranked
    assert interpolate(hits, scores, 1.0) == scores
    step = (3 / 2) ** 0.5  # three values at equal distances, z-normalized
    assert interpolate(hits, scores, 0.0) == pytest.approx([step, 0, -step])
    assert interpolate(hits, scores, 0.5) == pytest.approx([0, step / 2, -step / 2])
    assert interpolate(hits[:1], [-3.0], 0.5) == [0.0]  # nothing to compare with


def test_the_weight_is_chosen_where_the_source_documents_come_first() -> None:
    run = {q: [ScoredDoc(q, "a", 3.0), ScoredDoc(q, "b", 2.0), ScoredDoc(q, "c", 1.0)] for q in ("1", "2")}
    against = {q: [-3.0, -2.0, -1.0] for q in run}
    source = [Qrel("1", "a", 1), Qrel("2", "a", 1)]
    assert best_weight(interpolation_curve(run, against, source)) == 0.4  # up to here the first stage's order holds
    assert best_weight(interpolation_curve(run, against, [Qrel("1", "c", 1), Qrel("2", "c", 1)])) == 1.0
    same = {q: [3.0, 2.0, 1.0] for q in run}
    assert best_weight(interpolation_curve(run, same, source)) == 0.0  # no weight matters: the first stage alone


# ---------------------------------------------------------------------------------------------------- model families


def save_seq2seq(folder: Path, tiny_t5: Path, config: transformers.PreTrainedConfig, scale: float = 1.0) -> Path:
    """Save a random model of any sequence-to-sequence type with the vocabulary of `tiny_t5`."""
    torch.manual_seed(1)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.2 if "relative" in name else 0.3)
            if name.endswith("wo.weight"):
                weight.mul_(scale)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(folder)
    return folder


SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
FAMILIES = {
    "t5": transformers.T5Config(**SIZES),
    "t5 1.1": transformers.T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": transformers.MT5Config(**SIZES),
    "umt5": transformers.UMT5Config(**SIZES),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers(tiny_t5: Path, tmp_path: Path, family: str, dtype: str) -> None:
    """Large activations overflow in float16 unless the residual stays in float32."""
    config = FAMILIES[family]
    config.vocab_size = len(transformers.AutoTokenizer.from_pretrained(tiny_t5))
    scale = 3000.0 if dtype == "float16" else 1.0
    folder = str(save_seq2seq(tmp_path / "model", tiny_t5, config, scale))
    reranker = load_reranker(folder, dtype=dtype, device="cpu", targets=("true", "false"))
    assert reranker.is_fast == (family.startswith("t5") and dtype != "float16")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="float32")
    pairs = [("what are tides", "the study of tides"), ("why", "bread rises in the oven when bees make honey")]
    expected = []
    for pair in pairs:
        ids = torch.tensor([reranker.encode(*pair)[0].tolist()])
        logits = model(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]
        expected.append(logits[reranker.target_ids].log_softmax(-1)[0].item())
    tolerance = 1e-4 if dtype == "float32" else 0.05 * max(1.0, *map(abs, expected))
    assert reranker.score(pairs).tolist() == pytest.approx(expected, abs=tolerance)


def test_unsupported_types_are_refused_before_training(tiny_t5: Path, tmp_path: Path) -> None:
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = transformers.BartConfig(**size, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=400)
    folder = save_seq2seq(tmp_path / "bart", tiny_t5, bart)
    with pytest.raises(InputError, match="models of type bart are not supported"):
        load_reranker(str(folder), new_head=True)


def save_classifier(folder: Path, tiny_encoder: Path, labels: list[str]) -> Path:
    """Save an encoder with an output per label."""
    torch.manual_seed(2)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_encoder, **names)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("labels", "relevant", "note"),
    [
        (["LABEL_0", "LABEL_1"], 1, "its outputs have no names, so the second is taken for relevant"),
        (["relevant", "not relevant"], 0, ""),
        (["no", "Yes"], 1, ""),
    ],
)
def test_the_score_of_two_outputs_is_their_difference(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, labels: list[str], relevant: int, note: str
) -> None:
    folder = save_classifier(tmp_path / "two", tiny_encoder, labels)
    reranker = load_reranker(str(folder), dtype="float32", device="cpu")
    said = capsys.readouterr().err
    assert note in said
    assert bool(said) == bool(note)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pairs = [("what are tides", "the study of tides and bees in detail"), ("bread", "buy bread")]
    for pair, score in zip(pairs, reranker.score(pairs), strict=True):
        logits = model(**reranker.tokenizer(*pair, return_tensors="pt")).logits[0]
        assert score == pytest.approx((logits[relevant] - logits[1 - relevant]).item(), abs=1e-5)
    similar = [("what are tides", f"{a} {b}") for a in WORDS for b in WORDS]
    low = torch.from_numpy(load_reranker(str(folder), dtype="bfloat16", device="cpu").score(similar))
    assert not torch.equal(low, low.bfloat16().float())  # the difference is taken in float32


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", "b", "c"], "has 3 outputs"),
        (["entailment", "not_entailment"], "called 'entailment' and 'not_entailment'"),
        (["true", "relevant"], "called 'true' and 'relevant'"),
    ],
)
def test_outputs_without_a_relevant_one_are_refused(
    tiny_encoder: Path, tmp_path: Path, labels: list[str], words: str
) -> None:
    folder = save_classifier(tmp_path / "model", tiny_encoder, labels)
    with pytest.raises(InputError, match=words):
        load_reranker(str(folder))


def test_cross_encoders_with_two_outputs_are_base_models(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_classifier(tmp_path / "two", tiny_encoder, ["LABEL_0", "LABEL_1"])
    reranker = load_reranker(str(tmp_path / "two"), new_head=True)
    assert reranker.model.config.num_labels == 1
    assert reranker.score([("what", "tides")]).shape == (1,)
    assert "A new one with one output is trained" in capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="has no padding token"):
        load_reranker(str(tmp_path / "two"), new_head=True)


QWEN_PROMPT = """<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {instruction}
<Query>: {query}
<Document>: {text}<|im_end|>
<|im_start|>assistant
<think>

</think>

"""  # https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
QWEN_PAIRS = [
    ("what are tides?", "the study of tides and bees in detail."),
    ("why", "(bread) rises: 3 ovens, 's honey"),
    ("tea...", ""),
    ("7 bees", "\u00e9clairs \u4e2d\u6587 <|im_end|> " + "honey " * 30),
]


@pytest.mark.parametrize("instruction", [None, "Given a claim, retrieve documents that refute it"])
def test_causal_scores_equal_transformers(tiny_qwen3: Path, instruction: str | None) -> None:
    """Padded batches give the scores of single prompts, read by the tokenizer and by the model as a whole."""
    reranker = load_reranker(str(tiny_qwen3), dtype="float32", device="cpu", instruction=instruction)
    reranker.batch_tokens = 400  # several batches, of several lengths
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3).eval()
    yes, no = reranker.tokenizer.convert_tokens_to_ids(["yes", "no"])
    default = "Given a web search query, retrieve relevant passages that answer the query"
    expected = []
    for query, text in QWEN_PAIRS:
        prompt = QWEN_PROMPT.format(instruction=instruction or default, query=query, text=text)
        ids = reranker.tokenizer(prompt, return_tensors="pt").input_ids
        assert reranker.encode(query, text)[0].tolist() == ids[0].tolist()
        logits = model(ids).logits[0, -1]
        expected.append((logits[yes] - logits[no]).item())
    assert len(set(expected)) == len(expected)
    scores = reranker.score(QWEN_PAIRS)
    numpy.testing.assert_allclose(scores, expected, atol=1e-4)
    assert scores.tobytes() == reranker.score(QWEN_PAIRS).tobytes()
    low = load_reranker(str(tiny_qwen3), dtype="bfloat16", device="cpu", instruction=instruction)
    numpy.testing.assert_allclose(low.score(QWEN_PAIRS), expected, rtol=0.1, atol=0.5)
    similar = torch.from_numpy(low.score([("what are tides", f"{a} {b}") for a in WORDS for b in WORDS]))
    assert not torch.equal(similar, similar.bfloat16().float())


def test_a_causal_prompt_loses_tokens_of_the_document_only(tiny_qwen3: Path, capsys: pytest.CaptureFixture) -> None:
    whole = load_reranker(str(tiny_qwen3), max_length=1000)
    prompt = len(whole.encode("what are tides", "")[0])  # with the space before the document
    model = load_reranker(str(tiny_qwen3), max_length=prompt + 5)
    ids = model.encode("what are tides", "tides " * 500)[0].tolist()
    start, end = QWEN_PROMPT.partition("{text}")[::2]
    kept = model.tokenizer.decode(ids)
    assert len(ids) == prompt + 5
    assert kept.endswith("<Query>: what are tides\n<Document>:" + " tides" * 6 + end)
    assert kept.startswith(start[:150])
    assert len(model.encode("what are tides " * 500, "tides")[0]) == prompt + 5
    assert model.score([("", ""), ("what are tides " * 500, "tides")]).shape == (2,)
    capsys.readouterr()
    with pytest.raises(InputError, match="--max_length 40: too short"):
        load_reranker(str(tiny_qwen3), max_length=40)
    assert load_reranker(str(tiny_qwen3), max_length=10**6).max_length == 32768
    assert "reads at most 32768 tokens" in capsys.readouterr().err


def test_causal_models_that_are_refused(tiny_qwen3: Path, tiny_t5: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no token 'perhaps'"):
        load_reranker(str(tiny_qwen3), targets=("yes", "perhaps"))
    with pytest.raises(InputError, match="reads no instruction"):
        load_reranker(str(tiny_t5), instruction="Find.")
    transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no token '<\|im_start\|>'"):
        load_reranker(str(tmp_path), targets=("true", "false"), instruction="Find.")


def test_large_margins_are_no_ties() -> None:
    """In float32 the log softmax of 9.0001 to 9.001 rounds to a few values; the log sigmoid does not."""
    margins = 9 + torch.arange(1, 11) / 10_000
    logits = torch.stack([margins + 20, torch.full_like(margins, 20.0)], dim=1)
    assert len(set(logits.log_softmax(-1)[:, 0].tolist())) < 10
    scores = torch.nn.functional.logsigmoid(logits[:, 0] - logits[:, 1]).tolist()
    hits = [ScoredDoc("q", str(i), 1.0) for i in range(10)]
    ranked = rerank_hits(hits, scores)
    assert [hit.doc_id for hit in ranked] == [str(i) for i in range(9, -1, -1)]
    assert len({f"{hit.score:.9g}" for hit in ranked}) == 10


def test_bfloat16_makes_no_ties(tiny_t5: Path, tiny_encoder: Path) -> None:
    """The output layer computes in float32: bfloat16 has 8 bits, so similar documents would share a score."""
    encoder = load_reranker(str(tiny_encoder), dtype="bfloat16", device="cpu", new_head=True)
    words = ("bees", "make", "honey", "the", "oven", "tides")
    scores = torch.from_numpy(encoder.score([("what are tides", f"{a} {b}") for a in words for b in words]))
    assert not torch.equal(scores, scores.bfloat16().float())
    t5 = load_reranker(str(tiny_t5), dtype="bfloat16", device="cpu")
    batch = t5.pad([t5.encode("what are tides", "the study of tides")])
    mask = batch["attention_mask"].bool()
    with torch.inference_mode():
        assert first_token_logits(t5.model, batch["input_ids"], mask, t5.target_ids).dtype == torch.float32


def test_scores_that_are_not_numbers_are_refused(tiny_t5: Path) -> None:
    reranker = load_reranker(str(tiny_t5), dtype="float32", device="cpu")
    reranker.model.shared.weight.data[reranker.tokenizer("bees").input_ids[0]] = float("nan")
    reranker.score([("what are tides", "the study of tides")])
    with pytest.raises(InputError, match=r"the score of 'Query: what.*Document: bees.*is not a finite number"):
        reranker.score([("what are tides", "the study of tides"), ("what", "bees")])


def test_lengths_that_a_model_cannot_read(tiny_t5: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match="--max_length 3: too short"):
        load_reranker(str(tiny_t5), max_length=3)
    encoder = load_reranker(str(tiny_encoder), max_length=1024, new_head=True)
    assert encoder.max_length == 512
    assert "reads at most 512 tokens, so inputs are truncated to 512 and not 1024" in capsys.readouterr().err
    assert load_reranker(str(tiny_t5), max_length=1024).max_length == 1024  # relative positions
