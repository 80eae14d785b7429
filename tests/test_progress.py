"""Progress bars where no terminal overwrites them, and --quiet."""

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ok, run, write_rows

from inpars_lib import cli

# What tqdm writes, call by call
BAR = ["\rReading:   0%|  | 0/9", "\rReading:  50%|# | 4/9", "\rReading: 100%|##| 9/9", "\n"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream: io.StringIO, texts: Sequence[str], quiet: bool = False) -> str:
    progress = cli.ProgressStream(stream)
    progress.quiet = quiet
    for text in texts:
        progress.write(text)
    return stream.getvalue()


def test_a_log_has_a_line_for_a_complete_bar() -> None:
    assert written(io.StringIO(), [*BAR, "done\n"]) == "Reading: 100%|##| 9/9\ndone\n"
    assert written(io.StringIO(), [*BAR, "done\n"], quiet=True) == "done\n"


def test_a_log_has_lines_of_a_long_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "LOG_SECONDS", 0)
    assert (
        written(io.StringIO(), [*BAR, "done\n"])
        == "Reading:   0%|  | 0/9\nReading:  50%|# | 4/9\nReading: 100%|##| 9/9\ndone\n"
    )


def test_messages_stand_between_the_lines() -> None:
    cleared = ["\r" + " " * 20, "\r", "warning: odd", "\n"]
    assert written(io.StringIO(), [*BAR[:2], *cleared, *BAR[2:]]) == "warning: odd\nReading: 100%|##| 9/9\n"


def test_a_terminal_shows_bars_unless_they_are_unwanted() -> None:
    assert written(Terminal(), BAR) == "".join(BAR)
    assert written(Terminal(), [*BAR, "done\n"], quiet=True) == "done\n"


def test_scripts_write_logs_without_carriage_returns(tmp_path: Path) -> None:
    row = {"doc_id": "a", "doc_text": "text", "question": "what is it", "log_probs": [-1.0] * 3}
    files = ["--input", write_rows(tmp_path / "in.jsonl", [row]), "--output", tmp_path / "out.jsonl"]
    said = ok(run("filter_queries_by_score.py", *files)).stderr
    assert "\r" not in said
    assert re.match(r"Scoring: +0%.*\nScoring: 100%", said)
    for flag in ("-q", "--quiet"):
        assert ok(run("filter_queries_by_score.py", *files, flag)).stderr == said.splitlines(keepends=True)[-1]


def test_the_stream_is_restored() -> None:
    before = sys.stderr
    inside = []

    def main(_: Sequence[str] | None) -> None:
        inside.append(sys.stderr)
        assert sys.stderr.fileno() == before.fileno()  # other attributes are those of the stream

    cli.run_script(main)
    assert (sys.stderr, isinstance(inside[0], cli.ProgressStream)) == (before, True)


def test_numbers_and_times_in_messages() -> None:
    assert [cli.counted(count, "query") for count in (0, 1, 2000)] == ["0 queries", "1 query", "2,000 queries"]
    assert cli.counted(2, "judged document") == "2 judged documents"
    durations = [cli.duration(seconds) for seconds in (0.5, 45, 600, 7200, 3.7e6)]
    assert durations == ["0.5 s", "45 s", "10 minutes", "2 hours", "1,028 hours"]
