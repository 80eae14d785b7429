"""Rerankers on their own: the input of a pair and its score."""

from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import save_t5

from inpars_lib.cli import InputError
from inpars_lib.formats.records import ScoredDoc
from inpars_lib.formats.runs import rerank_hits
from inpars_lib.rerankers.checkpoint import checkpoint_name
from inpars_lib.rerankers.load import load_reranker
from inpars_lib.rerankers.t5_forward import first_token_logits

SENTENCE = "what are tides and why does bread rise in the oven when bees make honey"
WORDS = SENTENCE.split()


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
