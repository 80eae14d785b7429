"""--help of every script: the text at its top, at once."""

import subprocess
import sys

import pytest
from conftest import ROOT, ok, run

SCRIPTS = [
    "generate_queries_openai.py",
    "filter_queries_by_score.py",
    "generate_triples_train.py",
    "train_t5.py",
    "rerank.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_reads_and_writes(script: str) -> None:
    said = ok(run(script, "--help")).stdout
    for word in ("Reads", "Writes", f"python {script}"):
        assert word in said
    assert "\n  --output" in said


def test_help_of_bm25_names_its_commands() -> None:
    said = ok(run("bm25.py", "--help")).stdout
    assert "python bm25.py index --corpus" in said
    assert "python bm25.py search --index" in said
    assert "--store_texts" in ok(run("bm25.py", "index", "--help")).stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "bm25.py"])
def test_help_loads_no_heavy_library(script: str) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:] + ['--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pyserini', 'openai', 'numpy', 'matplotlib', 'ftfy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, ROOT / script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
