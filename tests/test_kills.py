"""Kills of stages 2 and 3 before changes of files: they leave the old files, the new ones, or some missing, no mixture.

Every third change by default, every change with KILLS=20.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ok, run, write_rows

KILLED = """
import importlib, os, signal, sys
sys.path.insert(0, sys.argv[1])
folder, left = sys.argv[2], int(sys.argv[3])

def count(event, args):
    global left
    changes = event in ("os.rename", "os.remove", "os.truncate") or (event == "open" and args[2] & os.O_ACCMODE)
    if changes and str(args[0]).startswith(folder):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

main = importlib.import_module(sys.argv[4]).main
sys.addaudithook(count)
main(sys.argv[5:])
"""


STEP = 1 if int(os.environ.get("KILLS", 1)) >= 20 else 3


def kill_before_change(n: int, folder: Path, script: str, args: list[object]) -> bool:
    """Run a stage and kill it before its n-th change of a file in `folder`. Return whether it was killed."""
    words = [ROOT, folder, n, script.removesuffix(".py"), *args]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode != 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_every_kill(tmp_path: Path, script: str, old: list[object], new: list[object]) -> int:
    """Kill `new` over the files of `old` before each change. `OUT` in the flags is the folder of the outputs.

    Each time the same command follows, which has to leave what a run without a kill leaves.

    Returns:
        The number of changes.
    """

    def fresh(name: str, flags: list[object]) -> tuple[Path, list[object]]:
        folder = tmp_path / name
        folder.mkdir()
        return folder, [str(flag).replace("OUT", str(folder)) for flag in flags]

    folder, args = fresh("old", old)
    ok(run(script, *args))
    before = contents(folder)
    folder, args = fresh("new", new)
    ok(run(script, *args))
    after = contents(folder)
    assert all(before[name] != after[name] for name in before.keys() & after.keys())
    change, killed = 0, True
    while killed:
        folder, args = fresh(f"kill{change}", new)
        for name, content in before.items():
            (folder / name).write_bytes(content)
        killed = kill_before_change(change, folder, script, args)
        left = contents(folder)
        is_old = [name for name, content in before.items() if left.get(name) == content]
        is_new = [name for name, content in after.items() if left.get(name) == content]
        assert not (is_old and is_new), (change, is_old, is_new)
        torn = left.keys() & (before.keys() | after.keys()) - {*is_old, *is_new}
        assert not torn, (change, torn)
        ok(run(script, *args))
        assert contents(folder) == after
        change += STEP
    return change


@pytest.mark.slow
def test_every_kill_of_the_filter(tmp_path: Path) -> None:
    rows = [
        {"doc_id": f"d{i}", "doc_text": f"text {i}", "question": "what is it", "log_probs": [-i / 9] * 3}
        for i in range(9)
    ]
    path = write_rows(tmp_path / "q.jsonl", rows)
    flags = [
        "--input",
        path,
        "--output",
        "OUT/f.jsonl",
        "--plot",
        "OUT/f.png",
        "--sample_html",
        "OUT/f.html",
        "--top_k",
    ]
    assert check_every_kill(tmp_path, "filter_queries_by_score.py", [*flags, 3], [*flags, 5]) >= 12


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3)], ids=["holdout", "stale", "other"])
def test_every_kill_of_the_triples(tmp_path: Path, before: int, after: int) -> None:
    rows = [{"doc_id": f"d{i}", "doc_text": f"text {i}", "question": f"what is {i}"} for i in range(8)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    (tmp_path / "c.tsv").write_text("".join(f"d{i}\ttext {i}\n" for i in range(8)))
    hits = [(i, j) for i in range(8) for j in range(8)]
    (tmp_path / "run.txt").write_text("".join(f"{i} Q0 d{j} {j + 1} {9 - j} x\n" for i, j in hits))
    flags = ["--input", path, "--corpus", tmp_path / "c.tsv", "--run", tmp_path / "run.txt", "--output", "OUT/t.tsv"]
    flags += ["--output_ids", "OUT/t.ids"]
    old, new = [*flags, "--holdout", before, "--seed", 1], [*flags, "--holdout", after, "--seed", 2]
    assert check_every_kill(tmp_path, "generate_triples_train.py", old, new) >= 12
