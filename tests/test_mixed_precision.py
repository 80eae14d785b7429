"""Stage 4 in bfloat16: its default, its losses, the scores of an evaluation."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ok
from training_helpers import train

from inpars_lib.rerankers.load import has_fast_bfloat16, load_reranker
from inpars_lib.rerankers.mono_t5 import MonoT5


def test_mixed_precision_on_a_cpu(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """The default depends on the CPU, is recorded, and changes the losses by rounding only."""
    losses, used = {}, {}
    for name, flags in (("default", []), ("on", ["--bf16"]), ("off", ["--no-bf16"])):
        args = ["--max_steps", 3, "--gradient_accumulation_steps", 1, "--logging_steps", 1, "--save_every_n_steps", 3]
        ok(train(separable, tiny_t5, tmp_path / name, *args, *flags))
        state = json.loads((tmp_path / name / "checkpoint-3/trainer_state.json").read_text())
        losses[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        used[name] = json.loads((tmp_path / name / "training.json").read_text())["settings"]["bf16"]
    assert used == {"default": has_fast_bfloat16("cpu"), "on": True, "off": False}
    assert losses["default"] == losses["on" if used["default"] else "off"]
    assert losses["on"] == pytest.approx(losses["off"], rel=0.02)
    assert losses["on"] != losses["off"]


@pytest.mark.parametrize("base", ["tiny_t5", "tiny_encoder", "tiny_qwen3", "an mT5"])
def test_scores_in_mixed_precision_have_no_ties(
    separable: Path, request: pytest.FixtureRequest, tmp_path: Path, base: str
) -> None:
    """An evaluation during training in bfloat16 tells the documents apart that rerank.py tells apart."""
    folder = request.getfixturevalue("tiny_t5" if base == "an mT5" else base)
    reranker = load_reranker(str(folder), dtype="float32", device="cpu", new_head=base == "tiny_encoder")
    if base == "an mT5":
        reranker.model.config.model_type = "mt5"
        reranker = MonoT5(reranker.model, reranker.tokenizer, 64)
        assert not reranker.is_fast
    pairs = [line.split("\t")[:2] for line in (separable / "triples.tsv").read_text().splitlines()]
    exact = reranker.score(pairs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = reranker.score(pairs)
    assert rounded == pytest.approx(exact, abs=float(0.1 * (exact.max() - exact.min()) + 0.02))
    in_bfloat16 = torch.from_numpy(rounded).bfloat16().float().numpy()
    assert (in_bfloat16 != rounded).mean() > 0.9
    assert len(set(rounded.tolist())) > 0.9 * len(set(exact.tolist()))
