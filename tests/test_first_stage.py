"""What a first stage is: an index and a run behind one Protocol, asked block by block."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from conftest import write_rows

from inpars_lib import bm25
from inpars_lib.cli import InputError
from inpars_lib.first_stage import BLOCK, FirstStage, QueryRun, search_in_blocks
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery


def synthetic(line: int) -> SyntheticQuery:
    return SyntheticQuery(line, f"d{line}", "a text", f"question {line}", None, "{}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "q.jsonl", [{"doc_id": "a", "question": f"question {i}"} for i in range(3)])


class Recorded:
    """First stage that knows one document per query and records how many queries it is asked at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def settings(self) -> dict[str, object]:
        return {}

    def search(self, queries: Mapping[str, str], k: int, bar: bool = True) -> Iterator[tuple[str, Sequence[ScoredDoc]]]:
        self.sizes.append(len(queries))
        for query_id, text in queries.items():
            yield query_id, [ScoredDoc(query_id, text, 1.0)][:k]


def test_queries_are_searched_in_blocks() -> None:
    stage = Recorded()
    queries = [synthetic(line) for line in range(5, 3 * BLOCK)]
    found = list(search_in_blocks(stage, iter(queries), 1))
    assert [query for query, _ in found] == queries
    assert all([hit.doc_id for hit in hits] == [query.question] for query, hits in found)
    assert stage.sizes == [BLOCK, BLOCK, BLOCK - 5]
    assert list(search_in_blocks(stage, iter([]), 1)) == []


def test_blocks_are_read_when_they_are_needed() -> None:
    read = []

    def queries() -> Iterator[SyntheticQuery]:
        for line in range(10 * BLOCK):
            read.append(line)
            yield synthetic(line)

    found = search_in_blocks(Recorded(), queries(), 1)
    next(found)
    assert len(read) == BLOCK


def test_a_run_is_searched_like_an_index(tmp_path: Path, source: Path) -> None:
    (tmp_path / "run.txt").write_text("2 Q0 low 2 1.5 x\n2 Q0 high 1 2.5 x\n0 Q0 other 1 9 x\n")
    stage: FirstStage = QueryRun(str(tmp_path / "run.txt"), str(source))
    asked = {"1": "question 1", "2": "question 2"}  # the text of a query plays no role
    found = {query_id: [(hit.doc_id, hit.score) for hit in hits] for query_id, hits in stage.search(asked, 5)}
    assert list(found.items()) == [("1", []), ("2", [("high", 2.5), ("low", 1.5)])]
    [(_, hits)] = stage.search({"2": ""}, 1)
    assert [hit.doc_id for hit in hits] == ["high"]
    assert QueryRun(str(tmp_path / "run.txt"), str(source)).depth == 2


def test_settings_change_with_the_hits(tmp_path: Path, source: Path, demo_index: Path) -> None:
    """The settings decide whether a log can be resumed."""
    run = tmp_path / "run.txt"
    run.write_text("0 Q0 a 1 1.0 x\n")
    before = QueryRun(str(run), str(source)).settings()
    run.rename(tmp_path / "moved.txt")
    assert QueryRun(str(tmp_path / "moved.txt"), str(source)).settings() == before
    run.write_text("0 Q0 b 1 1.0 x\n")
    assert QueryRun(str(run), str(source)).settings() != before
    default = bm25.open_index(str(demo_index), None, bm25.BM25Config()).settings()
    assert default == bm25.open_index(str(demo_index), None, bm25.BM25Config(threads=2)).settings()
    assert default != bm25.open_index(str(demo_index), None, bm25.BM25Config(k1=2.0)).settings()


@pytest.mark.parametrize("paths", [("-", "q.jsonl"), ("run.txt", "-")])
def test_a_run_and_its_queries_are_files(tmp_path: Path, source: Path, paths: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="synthetic queries and their run are read twice"):
        QueryRun(*paths)
