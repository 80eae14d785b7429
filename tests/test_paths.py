"""The paths of stages 2 and 3: no output may be an input or another output, by whatever name."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import error_line, ok, run, write_rows

STAGES = {
    "filter_queries_by_score.py": {
        "inputs": ["--input", "--run", "--index", "--corpus", "--model"],
        "outputs": ["--output", "--plot", "--sample_html"],
        "sidecars": {"--output": [".lock", ".scores.jsonl"], "--plot": [".lock"], "--sample_html": [".lock"]},
    },
    "generate_triples_train.py": {
        "inputs": ["--input", "--run", "--index", "--corpus"],
        "outputs": ["--output", "--output_ids"],
        "sidecars": {
            "--output": [".lock", ".negatives.jsonl", ".holdout.jsonl", ".holdout.run.txt"],
            "--output_ids": [".lock"],
        },
    },
}
WAYS: dict[str, Callable[[Path, Path], object]] = {
    "the same name": lambda new, old: old,
    "a symbolic link": lambda new, old: new.symlink_to(old) or new,
    "a hard link": lambda new, old: new.hardlink_to(old) or new,
    "another spelling": lambda new, old: old.parent / "." / ".." / old.parent.name / old.name,
}


def combine(script: str, inputs: dict[str, Path], paths: dict[str, object]) -> list[object]:
    """Return flags of a stage that use all inputs that may stand together, and these outputs."""
    given = dict(inputs)
    for flag in STAGES[script]["outputs"]:
        given[flag] = paths.get(flag, inputs["--input"].parent / f"new{flag}")
    needed = paths.get("needs", "--run")
    if needed in ("--index", "--corpus", "--model"):
        del given["--run"]
    else:
        del given["--index"]
    if script.startswith("filter"):
        if needed == "--model":
            given["--scoring_function"] = "monot5"
        else:
            del given["--model"]
        given["--consistency_k"] = 5
    return [word for pair in given.items() for word in pair]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Write one file for each input flag. Index and model are folders with a file."""
    rows = [
        {"doc_id": f"d{i}", "doc_text": f"text {i}", "question": "what is it", "log_probs": [-1.0] * 3} for i in (0, 1)
    ]
    (tmp_path / "run").write_text("0 Q0 d0 1 2.0 x\n0 Q0 d1 2 1.0 x\n1 Q0 d0 1 1.0 x\n")
    (tmp_path / "corpus").write_text("d0\ttext 0\nd1\ttext 1\n")
    for name in ("index", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
    write_rows(tmp_path / "input", rows)
    return {f"--{name}": tmp_path / name for name in ("input", "run", "index", "corpus", "model")}


def state(folder: Path) -> dict[str, object]:
    """Return every path below a folder with the content of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuse(script: str, folder: Path, args: list[object]) -> None:
    before = state(folder)
    assert " are one file. Name another " in error_line(run(script, *args))
    assert state(folder) == before


def given_inputs(script: str, inputs: dict[str, Path]) -> dict[str, Path]:
    return {flag: inputs[flag] for flag in STAGES[script]["inputs"]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", STAGES)
def test_no_output_is_an_input(inputs: dict[str, Path], tmp_path: Path, script: str, way: str) -> None:
    stage = STAGES[script]
    for i, output in enumerate(stage["outputs"]):
        for flag in stage["inputs"]:
            old = inputs[flag] / "file" if inputs[flag].is_dir() else inputs[flag]
            path = WAYS[way](tmp_path / f"link{i}{flag}", old)
            refuse(script, tmp_path, combine(script, given_inputs(script, inputs), {output: path, "needs": flag}))


@pytest.mark.parametrize("script", STAGES)
def test_nothing_beside_an_output_is_an_input(inputs: dict[str, Path], tmp_path: Path, script: str) -> None:
    for output, suffixes in STAGES[script]["sidecars"].items():
        for suffix in suffixes:
            for flag in ("--input", "--corpus"):
                moved = tmp_path / f"data{flag}{output}{suffix}"
                moved.hardlink_to(inputs[flag])
                given = {**given_inputs(script, inputs), flag: moved}
                needs = "--model" if suffix == ".scores.jsonl" else flag
                paths = {output: str(moved).removesuffix(suffix), "needs": needs}
                refuse(script, tmp_path, combine(script, given, paths))


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("script", STAGES)
def test_no_output_is_another_output(inputs: dict[str, Path], tmp_path: Path, script: str, exists: bool) -> None:
    stage = STAGES[script]
    for first in stage["outputs"]:
        for second in stage["outputs"]:
            for suffix in ["", *stage["sidecars"][first]]:
                if first == second or suffix == ".scores.jsonl":
                    continue
                path = tmp_path / f"out{first}{second}"
                if exists:
                    Path(f"{path}{suffix}").write_text("old")
                paths = {first: path, second: f"{path}{suffix}"}
                refuse(script, tmp_path, combine(script, given_inputs(script, inputs), paths))


@pytest.mark.parametrize("script", STAGES)
def test_an_output_through_a_link_replaces_its_target(inputs: dict[str, Path], tmp_path: Path, script: str) -> None:
    """Locks and logs follow the data, links stay links, and a file keeps its permissions."""
    data, links = tmp_path / "data", tmp_path / "links"
    data.mkdir()
    links.mkdir()
    outputs = {flag: flag.strip("-") for flag in STAGES[script]["outputs"]}
    for name in outputs.values():
        (data / name).write_text("old")
        (data / name).chmod(0o600)
        (links / name).symlink_to(data / name)
    ok(
        run(
            script,
            *combine(script, given_inputs(script, inputs), {flag: links / name for flag, name in outputs.items()}),
        )
    )
    for name in outputs.values():
        assert (links / name).is_symlink()
        assert (data / name).read_bytes() not in (b"old", b"")
        assert os.stat(data / name).st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent in (data, links)) == sorted(
        [*outputs.values()] * 2
    )


@pytest.mark.parametrize("script", STAGES)
def test_names_up_to_the_limit_of_a_file_system(inputs: dict[str, Path], tmp_path: Path, script: str) -> None:
    """The longest names work. A longer one, of a file beside the output too, is refused before any work."""
    longest = max(map(len, STAGES[script]["sidecars"]["--output"])) if script.startswith("generate") else len(".lock")
    given = given_inputs(script, inputs)
    for size in (255 - longest, 256 - longest, 251):
        output = tmp_path / "f" / ("n" * (size - 2) + "\u00e4")  # two bytes
        done = run(script, *combine(script, given, {"--output": output}))
        if size == 255 - longest:
            assert output in {path for path in ok(done) and output.parent.iterdir()}
        else:
            assert "has more than 255 bytes. Shorten the name of the output." in error_line(done)
            assert not output.exists()
