"""Resuming: logs of unfinished work and the check of their settings."""

import os
from pathlib import Path

import msgspec
import pytest

from inpars_lib import files, resume
from inpars_lib.cli import InputError
from inpars_lib.resume import DISCARD, ResumeLog


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_repaired(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "q.jsonl"
    first, second = (files.json_line({"doc_id": str(i), "question": "é" * 5}) for i in (1, 2))
    data = (first + second).encode()
    path.write_bytes(data[:-cut])
    resume.repair_last_line(str(path))
    expected = data if cut == 1 else first.encode()  # only the line's end was missing: the answer stays
    if cut > len(second.encode()):
        expected = b""
    assert path.read_bytes() == expected


class Done(msgspec.Struct):
    number: int


def log(path: Path | None, rank: int = 0, **settings: object) -> ResumeLog[Done]:
    return ResumeLog(str(path) if path else None, {"depth": 10, **settings}, Done, rank)


def finished(path: Path) -> list[int]:
    return [row.number for row in log(path).rows()]


def test_every_rank_reads_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for rank in (0, 1):
        written = log(path, rank)
        written.prepare()
        written.write(Done(rank))
    (tmp_path / "out.jsonl.txt").write_text("a file of the user\n")
    assert finished(path) == [0, 1]
    log(path).delete()
    assert os.listdir(tmp_path) == ["out.jsonl.txt"]


@pytest.mark.parametrize("left", range(2, 60, 3))
def test_a_log_torn_anywhere_goes_on(tmp_path: Path, left: int) -> None:
    path = tmp_path / "log"
    for number in range(3):
        log(path).write(Done(number))
    path.write_bytes(path.read_bytes()[:left])
    log(path).prepare()
    kept = finished(path)
    log(path).write(Done(7))
    assert kept == list(range(len(kept)))
    assert finished(path) == [*kept, 7]


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log(path, prompt="a" * 40, model="t5", seed=None).write(Done(1))
    log(path, prompt="a" * 40, model="t5").prepare()
    with pytest.raises(InputError) as error:
        log(path, prompt="b" * 40, model="t6", batch=2).prepare()
    named = '(the prompt differs; model "t5", now "t6"; batch null, now 2)'
    assert str(error.value) == f"{path}: made with other settings {named}. {DISCARD}"
    assert finished(path) == [1]
    log(path, model="t6").prepare(restart=True)
    assert not path.exists()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("content", ["d1\tnotes of the user\n", '{"format_version": [\n', '{"depth": 10}'])
def test_a_file_of_the_user_stays(tmp_path: Path, content: str, restart: bool) -> None:
    path = tmp_path / "log"
    path.write_text(content)
    with pytest.raises(InputError, match="not a log of this script"):
        log(path).prepare(restart)
    assert path.read_text() == content


def test_a_damaged_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log(path).write(Done(1))
    with path.open("a") as file:
        file.write('{"number": "x"}\n')
    with pytest.raises(InputError, match=r"log, line 3: damaged .*--restart"):
        finished(path)


def test_no_log_without_a_path() -> None:
    nothing = log(None)
    nothing.prepare()
    nothing.write(Done(1))
    assert list(nothing.rows()) == []
    nothing.delete()


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"number": "x"}', "[" * 100_000])
def test_a_damaged_state_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(content, "latin-1")
    with pytest.raises(InputError, match=r"state.json: damaged, or not a file of this script \(.*\)\. Delete it\.$"):
        resume.read_state(str(path), Done, "Delete it.")
