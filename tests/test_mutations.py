"""Mutated files of every format: each reader ends with records or with an InputError, never with another exception.

python tests/test_mutations.py 10000        # so many files of each format
"""

import contextlib
import io
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from inpars_lib.cli import InputError
from inpars_lib.formats.collection import read_collection
from inpars_lib.formats.qrels import read_qrels
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.formats.runs import read_run
from inpars_lib.formats.topics import read_topics
from inpars_lib.training.examples import TripleFile

Reader = Callable[[str], Iterable[object]]
FORMATS: dict[str, tuple[Reader, str]] = {
    "collection.tsv": (read_collection, "".join(f"d{i}\tsome text number {i}\n" for i in range(9))),
    "collection.jsonl": (
        read_collection,
        "".join(f'{{"_id": "{i}", "title": "t", "text": "text {i}"}}\n' for i in range(9)),
    ),
    "array.json": (read_collection, '[{"id": "1", "contents": "a"},\n{"id": "2", "contents": "b"}]\n'),
    "quoted.tsv": (read_collection, 'id\ttext\ttitle\n1\t"he said ""hi"""\tT\n2\t"other"\tU\n'),
    "topics.tsv": (read_topics, "".join(f"{i}\twhat is number {i}\n" for i in range(9))),
    "topics.trec": (read_topics, "<top>\n<num> Number: 301\n<title> a crime\n\n<desc> Description:\nx\n</top>\n" * 2),
    "topics.xml": (read_topics, '<topics>\n<topic number="7"><query>a b</query></topic>\n</topics>\n'),
    "qrels.txt": (read_qrels, "".join(f"q{i} 0 d{i} {i % 3}\n" for i in range(9))),
    "qrels.tsv": (read_qrels, "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(9))),
    "run.txt": (read_run, "".join(f"q1 Q0 d{i} {i + 1} {9.5 - i} tag\n" for i in range(9))),
    "run.tsv": (read_run, "".join(f"q1\td{i}\t{i + 1}\n" for i in range(9))),
    "queries.jsonl": (
        read_synthetic_queries,
        '{"doc_id": "d1", "doc_text": "text", "question": "what is it", "log_probs": [-1.5, -0.5]}\n' * 3,
    ),
    "triples.tsv": (TripleFile, "".join(f"what is {i}\tpositive {i}\tnegative {i}\n" for i in range(9))),
}
PIECES = [
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b" ", b'"', b"[", b"]", b"{", b"}", b"<", b">", b","),
    *(b"\\", b"\\ud800", b"NaN", b"1e999", b"-1", b"null", b"true", b"9" * 400, b"[" * 2000, b"<!--", b"<top>"),
    *(b"\x1f\x8b\x08", b"PK\x03\x04", b"PAR1", "\u2028".encode(), "\u3000".encode(), b"\x1b]0;x\x07", b"#"),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the data after one to four changes."""
    for _ in range(rng.randint(1, 4)):
        start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        piece = rng.choice(PIECES)
        data = rng.choice(
            [
                data[:start] + piece + data[start:],
                data[:start] + piece + data[start + 1 :],
                data[:start] + data[end:],
                data[:start] + data[start:end] * 2 + data[end:],
                data[:start],
                piece + data,
            ]
        )
    return data


def read_mutations(name: str, count: int, folder: Path) -> int:
    """Read mutated files of a format. Return how many ended with an InputError."""
    reader, text = FORMATS[name]
    rng = random.Random(name)
    path = folder / name
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(text.encode(), rng))
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                list(reader(str(path)))
            except InputError:
                refused += 1
    return refused


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    assert 0 < read_mutations(name, 60, tmp_path) < 60


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        for format_name in FORMATS:
            number = int(sys.argv[1])
            print(format_name, number, "files,", read_mutations(format_name, number, Path(temporary)), "refused")
