"""--help of every script, the flag reference, and one run of each script in a process of its own."""

import subprocess
import sys

import pytest
from conftest import ROOT, error_line, ok, run, run_process

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
    said = ok(run("inpars_lib.bm25", "--help")).stdout
    assert "python -m inpars_lib.bm25 index --corpus" in said
    assert "python -m inpars_lib.bm25 search --index" in said
    assert "--language" in ok(run("inpars_lib.bm25", "index", "--help")).stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS, "inpars_lib.bm25", "inpars_lib.evaluation"])
def test_each_script_is_a_program(script: str) -> None:
    done = ok(run_process(script, "--help"))
    assert done.stdout.startswith(f"usage: {'python -m ' if '/' not in script and '_lib' in script else ''}{script}")
    assert done.stderr == ""
    wrong = run_process(script, "--no_such_flag")
    assert (wrong.returncode, wrong.stdout) == (2, "")


@pytest.mark.parametrize("script", [*SCRIPTS, "inpars_lib.evaluation"])
def test_an_error_of_a_flag_is_one_line_with_the_closest_flag(script: str) -> None:
    files = {
        "generate_queries_openai.py": ["--collection", "c", "--output", "o"],
        "filter_queries_by_score.py": ["--input", "i", "--output", "o"],
        "generate_triples_train.py": [
            "--input",
            "i",
            "--output",
            "o",
            "--output_ids",
            "d",
            "--corpus",
            "c",
            "--run",
            "r",
        ],
        "train_t5.py": ["--triples_train", "t", "--output_dir", "o"],
        "rerank.py": ["--model", "m", "--queries", "q", "--corpus", "c", "--run", "r", "--output", "o"],
        "inpars_lib.evaluation": ["--qrels", "q", "r"],
    }[script]
    flag = files[0]
    done = run(script, *files, f"{flag}x", "1")
    assert error_line(done, 2).endswith(f"Did you mean {flag}?")
    assert done.stderr.count("\n") == 1
    assert "Did you mean" not in error_line(run(script, *files, "--zzzzzz"), 2)


def test_a_misspelt_flag_that_is_required_is_named() -> None:
    files = ("--queries", "q.tsv", "--corpus", "c.tsv", "--output", "o.txt", "--run", "r.txt")
    done = run("rerank.py", "--modle", "model", *files)
    assert error_line(done, 2).endswith("unrecognized arguments: --modle. Did you mean --model?")
    assert "required: --model" in error_line(run("rerank.py", *files, "--qrels=x"), 2)


def test_help_loads_no_heavy_library() -> None:
    modules = [script.removesuffix(".py") for script in SCRIPTS] + ["inpars_lib.bm25.__main__", "inpars_lib.evaluation"]
    heavy = {"torch", "transformers", "pyserini", "openai", "numpy", "matplotlib", "ftfy", "jnius", "tqdm"}
    heavy |= {"ir_measures", "scipy"}
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_flag_reference_is_up_to_date() -> None:
    command = [sys.executable, ROOT / "docs" / "make_flags.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "flags.md").read_text() == printed
    for script in SCRIPTS:
        assert f"## {script}\n" in printed
    assert "| `--scoring_function {mean_log_probs,sum_log_probs,mean_probs," in printed
