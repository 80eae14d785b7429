"""Checkpoints as people have them: everything in a folder counts, or the folder is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import torch
import transformers
from conftest import SUBJECTS
from safetensors.torch import load_file, save_file

from inpars_lib.cli import InputError
from inpars_lib.rerankers.load import load_reranker

PAIRS = [("what are tides", f"{one} explain {two} and their causes") for one in SUBJECTS[:3] for two in SUBJECTS[3:6]]
QUICK = {"device": "cpu", "dtype": "float32", "max_length": 200}


@pytest.fixture
def folders(tmp_path: Path, tiny_t5: Path, tiny_encoder: Path, tiny_qwen3: Path) -> dict[str, Path]:
    """Save a model of each kind in a folder of its own."""
    for name, folder in (("t5", tiny_t5), ("base", tiny_encoder), ("qwen3-reranker", tiny_qwen3)):
        shutil.copytree(folder, tmp_path / name)
    torch.manual_seed(5)
    encoder = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=1)
    encoder.save_pretrained(tmp_path / "encoder")
    transformers.AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "encoder")
    return {name: tmp_path / name for name in ("t5", "base", "encoder", "qwen3-reranker")}


def scores(folder: Path, **others: object) -> numpy.ndarray:
    return load_reranker(str(folder), **{**QUICK, **others}).score(PAIRS)


def refused(folder: Path, **others: object) -> str:
    with pytest.raises(InputError) as error:
        scores(folder, **others)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def change_weights(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rename the weights of a model, or delete those whose new name is None."""
    path = folder / "model.safetensors"
    renamed = {change(name): weight for name, weight in load_file(path).items()}
    renamed.pop(None, None)
    save_file(renamed, path, {"format": "pt"})


def change_json(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize(
    ("kind", "lost"),
    [("t5", "decoder.block.1"), ("encoder", "bert.encoder.layer.1."), ("qwen3-reranker", "model.layers.0.mlp")],
)
def test_a_layer_that_is_missing(folders: dict[str, Path], kind: str, lost: str, new_head: bool) -> None:
    change_weights(folders[kind], lambda name: None if name.startswith(lost) else name)
    assert f"are missing or have another shape, such as {lost}" in refused(folders[kind], new_head=new_head)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("kind", ["t5", "encoder", "qwen3-reranker"])
def test_weights_under_other_names(folders: dict[str, Path], kind: str, prefix: str) -> None:
    change_weights(folders[kind], lambda name: prefix + name)
    said = refused(folders[kind])
    assert f"other weights, such as {prefix}" in said


def test_only_a_training_makes_a_new_output(folders: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    for lost in ("classifier.weight", "bert.pooler.dense.weight"):
        change_weights(folders["encoder"], lambda name, lost=lost: None if name == lost else name)
        assert lost in refused(folders["encoder"])
    assert numpy.isfinite(scores(folders["encoder"], new_head=True)).all()
    change_weights(folders["t5"], lambda name: name)
    weights = load_file(folders["t5"] / "model.safetensors")
    save_file({**weights, "extra.weight": torch.ones(2)}, folders["t5"] / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    scores(folders["t5"])
    assert "1 weights have no place in this model and are not used, such as extra.weight" in capsys.readouterr().err


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForSequenceClassification"])
def test_a_t5_without_answers(folders: dict[str, Path], kind: str, decoder: bool) -> None:
    change_json(folders["t5"] / "config.json", architectures=[kind], is_encoder_decoder=decoder)
    assert f"{kind} has no decoder that answers" in refused(folders["t5"])
    assert kind in refused(folders["t5"], new_head=True)


@pytest.mark.parametrize("kind", ["t5", "encoder", "qwen3-reranker"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["half", b"", b"\0" * 99, b"[" * 5000, b"[]", b'{"model": 3}'])
def test_damaged_files(folders: dict[str, Path], kind: str, file: str, content: bytes | str) -> None:
    path = folders[kind] / file
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2] if isinstance(content, str) else content)
    refused(folders[kind])


def test_pickled_weights_that_run_code(folders: dict[str, Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "pwned"),)

    (folders["t5"] / "model.safetensors").unlink()
    torch.save({"shared.weight": Evil()}, folders["t5"] / "pytorch_model.bin")
    refused(folders["t5"])
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------------------------------- tokenizers, code of a folder


@pytest.mark.parametrize("kind", ["t5", "encoder", "qwen3-reranker"])
def test_a_folder_without_tokenizer_files(folders: dict[str, Path], kind: str) -> None:
    for file in folders[kind].glob("*token*"):
        file.unlink()
    said = refused(folders[kind])
    assert "tokenizer" in said


@pytest.mark.parametrize("kind", ["t5", "encoder", "qwen3-reranker"])
@pytest.mark.parametrize("factor", [0.8, 10])
def test_a_tokenizer_of_another_size(folders: dict[str, Path], kind: str, factor: float) -> None:
    size = len(transformers.AutoTokenizer.from_pretrained(folders[kind]))
    change_json(folders[kind] / "config.json", vocab_size=int(factor * size))
    assert f"its tokenizer has {size} tokens, the model" in refused(folders[kind])


@pytest.mark.parametrize("kind", ["t5", "encoder", "qwen3-reranker"])
def test_a_token_without_an_embedding(folders: dict[str, Path], kind: str) -> None:
    """A token that was added to the tokenizer only is an error in the text that has it, and in no other text."""
    before = scores(folders[kind])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    while len(tokenizer) <= load_reranker(str(folders[kind]), device="cpu").model.config.vocab_size:
        tokenizer.add_tokens([f"zyzzyva{len(tokenizer)}"])
    tokenizer.save_pretrained(folders[kind])
    assert (scores(folders[kind]) == before).all()
    reranker = load_reranker(str(folders[kind]), device="cpu", max_length=256)
    with pytest.raises(InputError, match=r"token 'zyzzyva\d+' has no embedding in this model"):
        reranker.score([("what are beetles", f"a zyzzyva{len(tokenizer) - 1} is a beetle")])


def test_quantized_weights_are_refused(folders: dict[str, Path]) -> None:
    for method in ("fp8", "gptq", "bitsandbytes", "unheard-of"):
        change_json(folders["encoder"] / "config.json", quantization_config={"quant_method": method})
        assert "quantized weights are not supported" in refused(folders["encoder"])


def test_a_config_without_a_class(folders: dict[str, Path]) -> None:
    """Old checkpoints have another name or none. The weights tell whether a T5 has its decoder."""
    before = scores(folders["t5"])
    for names in (["T5WithLMHeadModel"], None):
        change_json(folders["t5"] / "config.json", architectures=names)
        assert (scores(folders["t5"]) == before).all()
    change_json(folders["encoder"] / "config.json", architectures=None)
    assert "does not name the class of this model" in refused(folders["encoder"])


@pytest.mark.parametrize("model_type", ["bert", "unheard_of"])
def test_code_of_a_folder_is_never_run(folders: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    folder = folders["encoder"]
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\nclass Evil: pass\n")
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForSequenceClassification")}
    change_json(folder / "config.json", auto_map=auto_map, model_type=model_type)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with patch("builtins.input", side_effect=AssertionError("asked on standard input")):
        if model_type == "bert":
            scores(folder)
        else:
            assert "it needs Python code of its own, which is never run" in refused(folder)
    assert not (tmp_path / "pwned").exists()


def test_padding_that_only_the_tokenizer_knows(folders: dict[str, Path]) -> None:
    before = scores(folders["encoder"])
    config = json.loads((folders["encoder"] / "config.json").read_text())
    config["pad_token_id"] = None
    (folders["encoder"] / "config.json").write_text(json.dumps(config))
    numpy.testing.assert_allclose(scores(folders["encoder"]), before, atol=1e-6)


def test_the_positions_of_roberta(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["base"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=34,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        **sizes,
    )
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    model = load_reranker(str(tmp_path / "roberta"), **QUICK)
    assert model.max_length == 33 - tokenizer.pad_token_id
    model.score([("tides", "tides " * 100)])
    assert f"reads at most {model.max_length} tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("kind", "task", "layers"),
    [
        ("t5", "SEQ_2_SEQ_LM", ["q", "v"]),
        ("encoder", "SEQ_CLS", ["value", "dense"]),
        ("qwen3-reranker", "CAUSAL_LM", ["q_proj"]),
    ],
)
def test_adapters_are_merged(
    folders: dict[str, Path], tmp_path: Path, kind: str, task: str, layers: list[str], beside: bool
) -> None:
    peft = pytest.importorskip("peft")
    plain = scores(folders[kind])
    base = load_reranker(str(folders[kind]), **QUICK)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=layers, lora_alpha=400, task_type=task, init_lora_weights=False)
    adapted = peft.get_peft_model(base.model, config)
    if kind == "t5":
        base.use_full_forward()
    expected = base.score(PAIRS)
    folder = tmp_path / f"adapters-{kind}"
    if beside:
        shutil.copytree(folders[kind], folder)
    adapted.save_pretrained(folder)
    numpy.testing.assert_allclose(scores(folder), expected, atol=1e-4)
    assert numpy.abs(expected - plain).max() > 1e-3
    with patch("inpars_lib.rerankers.checkpoint.find_spec", return_value=None):
        assert "holds adapters (LoRA) of" in refused(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(key for key in sorted(weights) if "lora_A" in key))
    save_file(weights, folder / "adapter_model.safetensors")
    assert "missing adapter keys" in refused(folder)


# ------------------------------------------------------------------------------------------------ sentence-transformers


def save_modules(folder: Path, *kinds: str) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def test_modules_of_sentence_transformers(folders: dict[str, Path]) -> None:
    before = scores(folders["encoder"])
    save_modules(folders["encoder"], "Transformer")
    numpy.testing.assert_array_equal(scores(folders["encoder"]), before)
    for kinds in (["Transformer", "Pooling", "Dense"], ["Transformer", "Dense"], ["Transformer", "Pooling"]):
        save_modules(folders["encoder"], *kinds)
        assert f"sentence-transformers' modules {kinds[-1]}" in refused(folders["encoder"])
    save_modules(folders["base"], "Transformer", "Pooling", "Normalize")
    assert "never trained to rerank" in refused(folders["base"])
    scores(folders["base"], new_head=True)
    save_modules(folders["base"], "Transformer", "Pooling", "Dense")
    assert "modules Dense" in refused(folders["base"], new_head=True)


def test_a_default_prompt_or_a_chat_template_is_refused(folders: dict[str, Path]) -> None:
    change_json(folders["encoder"] / "config_sentence_transformers.json", prompts={"query": "search: "})
    scores(folders["encoder"])  # not the default
    change_json(folders["encoder"] / "config_sentence_transformers.json", default_prompt_name="query")
    assert "its default prompt (search:) is not supported" in refused(folders["encoder"])
    (folders["encoder"] / "config_sentence_transformers.json").unlink()
    (folders["encoder"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "in a chat template" in refused(folders["encoder"])


def test_the_tokens_of_a_logit_score(folders: dict[str, Path]) -> None:
    folder = folders["qwen3-reranker"]
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    plain = scores(folder)
    save_modules(folder, "Transformer", "LogitScore")
    (folder / "1_LogitScore").mkdir()
    ids = {"true_token_id": vocabulary["no"], "false_token_id": vocabulary["yes"]}
    change_json(folder / "1_LogitScore/config.json", **ids)
    numpy.testing.assert_allclose(scores(folder), -plain, atol=1e-5)
    change_json(folder / "1_LogitScore/config.json", false_token_id=None)
    assert "not the difference of two tokens' logits" in refused(folder)


# -------------------------------------------------------------------------------------------------------- causal models


def test_an_unknown_causal_model_needs_words_of_the_user(folders: dict[str, Path], tmp_path: Path) -> None:
    before = scores(folders["qwen3-reranker"])
    shutil.copytree(folders["qwen3-reranker"], tmp_path / "other")
    said = refused(tmp_path / "other")
    assert "not known as a reranker. Known: qwen3-reranker, mxbai-rerank." in said
    words = {"targets": ("yes", "no"), "instruction": "Find."}
    assert not numpy.allclose(scores(tmp_path / "other", **words), before)
    with pytest.raises(InputError, match="is a cross-encoder, which has no target words"):
        scores(folders["encoder"], targets=("yes", "no"))


def test_the_prompt_of_mxbai(folders: dict[str, Path], tmp_path: Path) -> None:
    """Against the prompt of its authors' package, tokenized in one piece up to query, document and task."""
    folder = tmp_path / "mxbai-rerank-base-v2"
    shutil.copytree(folders["qwen3-reranker"], folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    prefix = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    task = "You are a search relevance expert who evaluates how well documents match search queries. For each "
    task += "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
    task += "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    for instruction, before in ((None, ""), ("Find tides.", "instruction: Find tides.\n")):
        expected = []
        for query, text in PAIRS:
            parts = [f"{prefix}<|im_start|>user\n", f"{before}query: {query}", "\n", f"document: {text}", "\n", task]
            parts.append("<|im_end|>\n<|im_start|>assistant\n")
            ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False).input_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            expected.append(float(logits[vocabulary["1"]] - logits[vocabulary["0"]]))
        found = scores(folder, instruction=instruction, max_length=1000)
        numpy.testing.assert_allclose(found, expected, atol=1e-4)
