"""What a trained folder says about its training, and what stage 5 makes of it."""

from pathlib import Path

import numpy
import pytest
from conftest import ok, run
from training_helpers import DEV_FILES, QUICK, train
from transformers import AutoTokenizer

from inpars_lib.formats.runs import read_run
from inpars_lib.rerankers.load import load_reranker

pytestmark = pytest.mark.usefixtures("simple_curves")


@pytest.mark.parametrize(
    ("base", "flags", "contradicting"),
    [
        ("tiny_t5", ["--token_true", "they", "--token_false", "now", "--max_length", 20],
         ["--token_true", "true", "--token_false", "false", "--max_length", 30]),
        ("tiny_encoder", ["--max_length", 14], ["--max_length", 30]),
        ("tiny_qwen3", ["--max_length", 190, "--instruction", "Find an explanation"],
         ["--max_length", 200, "--instruction", "Find an advertisement"]),
    ],
)  # fmt: skip
def test_it_is_scored_as_it_was_trained(
    separable: Path, request: pytest.FixtureRequest, tmp_path: Path, base: str, flags: list, contradicting: list
) -> None:
    model = tmp_path / "model"
    ok(train(separable, request.getfixturevalue(base), model, *QUICK, *flags))
    files = [word for flag, name in DEV_FILES.items() for word in (flag, separable / name)]
    command = ["rerank.py", "--model", model, *files, "--top_k", 5, "--dtype", "float32"]
    silent = ok(run(*command, "--output", tmp_path / "own.txt"))
    assert "trained with" not in silent.stderr
    assert AutoTokenizer.from_pretrained(model).model_max_length == flags[flags.index("--max_length") + 1]
    same = ok(run(*command, *flags, "--output", tmp_path / "same.txt"))
    assert "trained with" not in same.stderr
    assert (tmp_path / "own.txt").read_bytes() == (tmp_path / "same.txt").read_bytes()
    other = ok(run(*command, *contradicting, "--output", tmp_path / "other.txt"))
    warnings = [line for line in other.stderr.splitlines() if "trained with" in line]
    assert len(warnings) == sum(str(flag).startswith("--") and flag != "--token_false" for flag in contradicting)
    assert warnings[0].endswith(f"trained with --max_length {flags[flags.index('--max_length') + 1]}, but "
                                f"{contradicting[contradicting.index('--max_length') + 1]} is given. Omit the flag to "
                                "score as in training.")  # fmt: skip
    assert (tmp_path / "own.txt").read_bytes() != (tmp_path / "other.txt").read_bytes()
    hits = read_run(str(tmp_path / "own.txt"), ["3"])["3"][:5]
    texts = dict(line.split("\t") for line in (separable / "collection.tsv").read_text().splitlines())
    reranker = load_reranker(str(model), device="cpu", dtype="float32")
    scores = reranker.score([("what are glaciers", texts[hit.doc_id]) for hit in hits])
    numpy.testing.assert_allclose(scores, [hit.score for hit in hits], atol=1e-5)
