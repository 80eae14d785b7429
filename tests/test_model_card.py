"""The card of a trained model, made from a record and a trainer that did not train."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from inpars_lib.training.checkpoints import DataFile, TrainingRecord
from inpars_lib.training.model_card import model_card

SETTINGS = {"base_model": "t5_base", "loss": "pairwise", "select_by": None, "max_eval_docs_per_query": 100, "epochs": 2}


def card(
    settings: dict[str, Any],
    data: list[str],
    log: list[dict[str, float]],
    family: str = "MonoT5",
    query_model: str | None = None,
) -> ModelCard:
    """Return the card of a training of 7 steps."""
    config = SimpleNamespace(is_encoder_decoder=family == "MonoT5", model_type="mt5", answers=["▁yes", "▁no"])
    files = {flag: DataFile(f"{flag}.tsv", "00ff") for flag in data}
    trainer = SimpleNamespace(
        reranker=type(family, (), {"model": SimpleNamespace(config=config)})(),
        args=SimpleNamespace(output_dir="some/where/model-3"),
        state=SimpleNamespace(log_history=log, max_steps=9),
        first_stage={"nDCG@10": 0.25, "P@5": math.nan},
        chosen_step=7,
    )
    return ModelCard(model_card(TrainingRecord(2, SETTINGS | settings, files), trainer, query_model))


def test_a_card_without_an_evaluation() -> None:
    found = card({}, ["triples_train"], [{"step": 7, "loss": 0.5}])
    assert found.data.base_model == "google-t5/t5-base"
    assert found.data.pipeline_tag == "text-ranking"
    assert found.data.tags == ["inpars", "reranker", "monot5"]
    assert found.text.lstrip().startswith("# model-3\n")
    for line in ("| loss | pairwise |", "| epochs | 2 |", "| steps | 9 |", "| family | MonoT5 |",
                 "| triples_train | triples_train.tsv | `00ff` |"):  # fmt: skip
        assert f"\n{line}\n" in found.text
    assert "select_by" not in found.text
    assert 'model_type="t5", token_true="▁yes", token_false="▁no")' in found.text
    assert 'pyterrier_t5.mT5ReRanker(model="MODEL", tok_model="MODEL", batch_size=1)' in found.text
    assert 'ranker.REL, ranker.NREL = ranker.tokenizer.convert_tokens_to_ids(["▁yes", "▁no"])' in found.text
    assert "The weights are from step 7, the last. The model was not evaluated during training." in found.text


@pytest.mark.parametrize(("data", "source"), [
    (["queries", "qrels", "run"], "Evaluated on queries.tsv, reranking"),
    (["holdout"], "Evaluated on holdout.tsv (synthetic queries held out from training; the source"),
])  # fmt: skip
def test_a_card_has_the_measures_of_its_step(data: list[str], source: str) -> None:
    log = [{"step": 3, "eval_nDCG@10": 0.9}, {"step": 7, "eval_nDCG@10": 0.5}, {"step": 9, "eval_nDCG@10": 0.7}]
    found = card({"select_by": "nDCG@10"}, data, log, "CrossEncoder").text
    assert "The weights are from step 7, the best by nDCG@10." in found
    assert source in found
    assert "\n| nDCG@10 | 0.2500 | 0.5000 |\n| P@5 | n/a | n/a |" in found
    assert 'sentence_transformers.CrossEncoder("MODEL")' in found


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    config = tmp_path / "zero2.json"
    config.write_text("{}")
    found = card({"base_model": str(tmp_path), "deepspeed": str(config)}, [], [])
    assert str(tmp_path) not in found.content
    assert f"| base_model | {tmp_path.name} |" in found.text
    assert "| deepspeed | zero2.json |" in found.text
    assert found.data.base_model is None


def test_the_base_model_of_a_folder(tmp_path: Path) -> None:
    cached = tmp_path / "models--google-t5--t5-small" / "snapshots" / "00ff"
    cached.mkdir(parents=True)
    found = card({"base_model": str(cached)}, [], [])
    assert found.data.base_model == "google-t5/t5-small"
    assert "| base_model | google-t5/t5-small |" in found.text
    old = tmp_path / "models--gpt2" / "snapshots" / "00ff"
    old.mkdir(parents=True)
    assert card({"base_model": str(old)}, [], []).data.base_model == "gpt2"
    named = tmp_path / "package" / "model"
    named.mkdir(parents=True)
    (named / "README.md").write_text("---\n# a comment\nlicense: mit\n---\n\n# all-MiniLM-L6-v2\ntext\n")
    found = card({"base_model": str(named)}, [], [])
    assert found.data.base_model is None  # no name that the hub is known to have
    assert "| base_model | all-MiniLM-L6-v2 |" in found.text
    (named / "README.md").write_bytes(b"\xff\n")
    assert "| base_model | model |" in card({"base_model": str(named)}, [], []).text


def test_the_model_that_wrote_the_queries() -> None:
    assert ".\nA language model wrote a query for each" in card({}, [], []).text
    assert ".\ngpt-6-luna wrote a query for each" in card({}, [], [], query_model="gpt-6-luna").text
