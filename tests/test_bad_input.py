"""Malformed input files: each gets one error with file and line, and no half-written output."""

import gzip
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done, command_of, error_line, ok, run, write_rows

GOOD = "d1\tthe study of tides explains the sea\nd2\tbread is baked at dawn\nd3\tbees make honey of flowers\n"
LONG = 20_000_000


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write one small file of each kind, all of one collection."""
    texts = {
        "collection": GOOD,
        "topics": "1\twhat are tides\n2\twhy bees\n",
        "qrels": "1 0 d1 1\n2 0 d3 1\n",
        "run": "1 Q0 d1 1 2.0 x\n1 Q0 d2 2 1.0 x\n2 Q0 d3 1 2.0 x\n",
        "triples": "tides\tthe sea\tbread\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    query = {"doc_id": "d1", "doc_text": "the study of tides", "question": "what are tides", "log_probs": [-0.1] * 4}
    write_rows(tmp_path / "queries", [query])
    return {name: tmp_path / name for name in (*texts, "queries")}


def index(files: dict[str, Path], folder: Path) -> list[object]:
    return ["inpars_lib.bm25", "index", "--corpus", files["collection"], "--index", folder / "out"]


def rerank(files: dict[str, Path], folder: Path) -> list[object]:
    return [
        "rerank.py",
        *("--model", folder / "model", "--queries", files["topics"], "--corpus", files["collection"]),
        *("--run", files["run"], "--qrels", files["qrels"], "--output", folder / "out"),
    ]


def keep(files: dict[str, Path], folder: Path) -> list[object]:
    return ["filter_queries_by_score.py", "--input", files["queries"], "--output", folder / "out"]


def mine(files: dict[str, Path], folder: Path) -> list[object]:
    return [
        "generate_triples_train.py",
        *("--input", files["queries"], "--corpus", files["collection"], "--index", folder / "index"),
        *("--output", folder / "out", "--output_ids", folder / "out.ids"),
    ]


def train(files: dict[str, Path], folder: Path) -> list[object]:
    return ["train_t5.py", "--triples_train", files["triples"], "--output_dir", folder / "out"]


def cut_gzip(data: bytes) -> bytes:
    return gzip.compress(data * 1000)[:-20]


QUERY = b'{"doc_id": "d1", "doc_text": "t", "question": "q", "log_probs": [-1, -1, -1]}\n'
REFUSED = [  # name, command, replaced file, its content, part of the error
    ("an empty collection", index, "collection", b"", "collection: no usable line found"),
    ("only empty lines", index, "collection", b"\n\r\n  \n", "collection: no usable line found"),
    ("an id that occurs twice", index, "collection", GOOD.encode() + b"d2\tother\n", "the id d2 is on two lines"),
    ("a truncated gzip", index, "collection", cut_gzip(GOOD.encode()), "collection: damaged gzip data"),
    ("nothing but invalid UTF-8", index, "collection", b"d1\t\xff\n", "collection: no usable line found"),
    ("an empty file of queries", keep, "queries", b"", "queries: no usable line found"),
    ("a truncated gzip of queries", keep, "queries", cut_gzip(QUERY), "queries: damaged gzip data"),
    ("a topic that occurs twice", rerank, "topics", b"1\ta\n1\tb\n", "topics, line 2: the query id 1 is repeated"),
    ("qrels for unknown ids", rerank, "qrels", b"7 0 d1 1\n", "qrels: no query of"),
    ("two judgements", rerank, "qrels", b"1 0 d1 1\n1 0 d1 0\n", "qrels, line 2: query 1 and document d1 have"),
    ("a run of other topics", rerank, "run", b"9 Q0 d1 1 1.0 x\n", "run: no hits for any query of"),
    ("an empty run", rerank, "run", b"", "run: no usable line found"),
    (
        "a document twice in a run",
        rerank,
        "run",
        b"1 Q0 d1 1 2 x\n1 Q0 d1 2 1 x\n",
        "query 1 lists a document twice",
    ),
    ("a truncated gzip of triples", train, "triples", cut_gzip(b"a\tb\tc\n"), "triples: damaged gzip data"),
    (
        "half of a surrogate pair in an id",
        index,
        "collection",
        b'{"id": "a\\ud800", "contents": "x"}\n',
        "no usable line",
    ),
    ("deeply nested JSON", index, "collection", b'{"id": "a", "x":' + b"[" * 10**5 + b"\n", "no usable line"),
    ("a huge number", keep, "queries", QUERY.replace(b"[-1,", b"[-1" + b"0" * 400 + b","), "no usable line"),
    (
        "a number of 5,000 digits",
        keep,
        "queries",
        QUERY.replace(b"[-1,", b"[-1" + b"0" * 5000 + b","),
        "no usable line",
    ),
    ("triples of two columns", train, "triples", b"a\tb\n", "triples: this file seems to hold lines `id<tab>text`"),
]


@pytest.mark.parametrize("row", REFUSED, ids=[row[0] for row in REFUSED])
def test_malformed_files_are_refused(files: dict[str, Path], tmp_path: Path, row: tuple) -> None:
    _, command, name, data, words = row
    files[name].write_bytes(data)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert words.lower() in error_line(run(*command(files, tmp_path))).lower()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


# Valid lines are read, others are skipped with a warning: name, content of a collection, texts, part of the warning
TAKEN = [
    ("Windows line ends", GOOD.replace("\n", "\r\n").encode(), None, None),
    ("a byte-order mark", b"\xef\xbb\xbf" + GOOD.encode(), None, None),
    (
        "a tab and a newline inside a text",
        b'{"id": "d1", "contents": "the study\\tof\\ntides"}\n{"id": "d2", "contents": "bread"}\n',
        ["the study of tides", "bread"],
        None,
    ),
    ("invalid UTF-8 in a line", GOOD.encode() + b"d4\t\xc3\x28\n", None, "collection, line 4: not valid UTF-8"),
    ("NUL bytes", GOOD.replace(" ", " \0").encode(), None, None),
    ("a line without a tab", b"no tab\n" + GOOD.encode(), None, "collection, line 1: no tab between id and text"),
    ("a line of 20 MB", GOOD.encode() + b"d4\t" + b"word " * (LONG // 5) + b"\n", None, None),
]


@pytest.mark.parametrize("row", TAKEN, ids=[row[0] for row in TAKEN])
def test_odd_but_valid_files_are_read(files: dict[str, Path], tmp_path: Path, row: tuple) -> None:
    _, data, texts, warning = row
    files["collection"].write_bytes(data)
    query = {"doc_id": "d2", "doc_text": "dough", "question": "tides bread bees", "log_probs": [-1]}
    write_rows(files["queries"], [query])
    done = ok(run(*mine(files, tmp_path)))
    texts = texts or [line.split("\t")[1] for line in GOOD.splitlines()]
    [(_, positive, negative)] = [line.split("\t") for line in (tmp_path / "out").read_text().splitlines()]
    assert positive == "dough"
    assert negative in [*texts, " ".join(["word"] * (LONG // 5))]
    assert (warning or "") in done.stderr
    assert ("is skipped" in done.stderr) == bool(warning)


def test_an_index_of_another_lucene(files: dict[str, Path], tmp_path: Path) -> None:
    ok(run(*index(files, tmp_path)))
    shutil.move(tmp_path / "out", tmp_path / "index")
    [segments] = (tmp_path / "index").glob("segments_*")
    data = bytearray(segments.read_bytes())
    at = 4 + 1 + len("segments")  # after a magic number and the codec's name comes its version
    assert data[5:at] == b"segments"
    data[at : at + 4] = struct.pack(">i", 2)
    segments.write_bytes(data)
    said = error_line(run(*mine(files, tmp_path)))
    assert f"{tmp_path / 'index'}: the index is damaged or from another version of Lucene" in said
    assert not (tmp_path / "out").exists()


def run_on_full_disk(command: list[object], size: int) -> Done:
    """Run a script on a disk that is full after `size` bytes of a file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(command_of(*command), preexec_fn=limit, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_full_disk(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.loads(QUERY) | {"doc_id": f"d{i}", "doc_text": "word " * 50} for i in range(200)]
    write_rows(files["queries"], rows)
    (tmp_path / "out").write_text("old")
    done = run_on_full_disk(keep(files, tmp_path), 10_000)
    assert error_line(done).startswith(f"error: {tmp_path / 'out'}: File too large. Check the path")
    assert (tmp_path / "out").read_text() == "old"
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "full"), [(5_000, ""), (150_000, "out.negatives.jsonl"), (300_000, "out")])
def test_a_full_disk_while_triples_are_made(files: dict[str, Path], tmp_path: Path, size: int, full: str) -> None:
    """The folder holds the queries, then the log grows, then the triples."""
    other = "d" * 100
    write_rows(files["queries"], [{"doc_id": "d1", "question": "what is it"} for i in range(1200)])
    files["collection"].write_text(f"d1\t{'word ' * 20}\n{other}\t{'other ' * 40}\n")
    files["run"].write_text("".join(f"{i} Q0 {other} 1 1.0 x\n" for i in range(1200)))
    words = ["--input", files["queries"], "--corpus", files["collection"], "--run", files["run"]]
    command = ["generate_triples_train.py", *words, "--output", tmp_path / "out", "--output_ids", tmp_path / "ids"]
    done = run_on_full_disk(command, size)
    assert error_line(done).startswith(f"error: {tmp_path / full}: File too large. Check the path")
    assert not {"out", "ids"} & {path.name for path in tmp_path.iterdir()}
    ok(run(*command))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in files) == ["ids", "out"]


OUTPUTS: list[Callable] = [keep, mine, index]


@pytest.mark.parametrize("command", OUTPUTS, ids=lambda command: command.__name__)
def test_a_folder_that_cannot_be_written(files: dict[str, Path], tmp_path: Path, command: Callable) -> None:
    (tmp_path / "file").write_text("in the way")
    words = [tmp_path / "file" / "out" if word == tmp_path / "out" else word for word in command(files, tmp_path)]
    assert error_line(run(*words)).startswith(f"error: {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "in the way"
    if os.geteuid():  # permissions bind all but root
        (tmp_path / "closed").mkdir(mode=0o555)
        words = [tmp_path / "closed" / "out" if w == tmp_path / "out" else w for w in command(files, tmp_path)]
        assert "Permission denied" in error_line(run(*words))


@pytest.mark.parametrize(("command", "name"), [(index, "collection"), (train, "triples")])
def test_a_pipe_that_is_read_twice_is_refused(
    files: dict[str, Path], tmp_path: Path, command: Callable, name: str
) -> None:
    files[name].unlink()
    os.mkfifo(files[name])
    assert f"{name}: " in (said := error_line(run(*command(files, tmp_path))))
    assert "read more than once, and standard input or a pipe cannot be" in said


def test_a_pipe_that_is_read_once_is_input(files: dict[str, Path], tmp_path: Path) -> None:
    """The shell's <(zcat queries.jsonl.gz) is a pipe."""
    data = files["queries"].read_bytes()
    files["queries"].unlink()
    os.mkfifo(files["queries"])
    writer = threading.Thread(target=files["queries"].write_bytes, args=[gzip.compress(data)])
    writer.start()
    ok(run(*keep(files, tmp_path)))
    writer.join()
    assert json.loads((tmp_path / "out").read_text())["doc_id"] == "d1"
    run_of_queries = ["--scoring_function", "consistency", "--consistency_k", 1, "--run", files["run"]]
    assert "cannot be read twice" in error_line(run(*keep(files, tmp_path), *run_of_queries), 2)


def test_standard_input_and_output(files: dict[str, Path], tmp_path: Path, capfdbinary: pytest.CaptureFixture) -> None:
    ok(run(*keep(files, tmp_path)))
    kept = (tmp_path / "out").read_text()
    for pack in (bytes, gzip.compress):
        words = ["filter_queries_by_score.py", "--input", "-", "--output", "-"]
        done = ok(run(*words, stdin=pack(files["queries"].read_bytes())))
        assert capfdbinary.readouterr().out.decode() == kept
        assert "-: kept 1 of 1 rows" in done.stderr
    assert "error: -: no usable line found" in error_line(run(*words))
    words += ["--plot", "-"]
    assert "only one of --output, --plot and --sample_html can be `-`" in error_line(run(*words), 2)
    (tmp_path / "out").unlink()
    ok(run(*index(files, tmp_path)))
    words = ["inpars_lib.bm25", "search", "--index", tmp_path / "out", "--topics", "-", "--output"]
    ok(run(*words, tmp_path / "run.txt", stdin=files["topics"].read_bytes()))
    ok(run(*words, "-", stdin=files["topics"].read_bytes()))
    assert capfdbinary.readouterr().out == (tmp_path / "run.txt").read_bytes()


DASHES = [  # command, flag whose value becomes `-`, part of the error
    (index, "--corpus", "a collection is read more than once"),
    (rerank, "--output", "scores are saved beside the run, so name a file"),
    (train, "--triples_train", "triples are read more than once"),
]


@pytest.mark.parametrize("row", DASHES, ids=lambda row: row[0].__name__)
def test_no_dash_for_files_that_are_used_twice(files: dict[str, Path], tmp_path: Path, row: tuple) -> None:
    command, flag, words = row
    args = command(files, tmp_path)
    args[args.index(flag) + 1] = "-"
    done = run(*args, cwd=tmp_path)
    assert re.search(rf"error: (--output )?-: {words}", error_line(done, done.returncode))
    assert not list(tmp_path.glob("-*"))


def test_several_processes_do_not_share_standard_input(files: dict[str, Path], tmp_path: Path) -> None:
    words = rerank(files, tmp_path)
    words[words.index("--queries") + 1] = "-"
    said = error_line(run(*words, WORLD_SIZE="2"))
    assert "-: standard input and pipes are not shared by several processes" in said


def test_a_log_of_answers_is_not_compressed(files: dict[str, Path], tmp_path: Path) -> None:
    words = ["--collection", files["collection"], "--base_url", "http://127.0.0.1:9/v1", "--output"]
    said = error_line(run("generate_queries_openai.py", *words, tmp_path / "queries.jsonl.zst"))
    assert "queries.jsonl.zst: answers are appended to a file without compression. Omit .zst" in said
    assert not (tmp_path / "queries.jsonl.zst").exists()
    assert "-: this is a pipe or a device" in error_line(run("generate_queries_openai.py", *words, "-"))


def test_links_and_devices_as_output(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    files["queries"].write_bytes(QUERY)
    ok(run(*keep(files, tmp_path)))
    assert (tmp_path / "out").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["doc_id"] == "d1"
    # A device is written in place and never replaced by a file.
    words = [Path("/dev/null") if word == tmp_path / "out" else word for word in keep(files, tmp_path)]
    ok(run(*words))
    assert Path("/dev/null").is_char_device()
    assert not Path("/dev/null.lock").exists()
    mining = ["generate_triples_train.py", "--input", files["queries"], "--corpus", files["collection"]]
    for special in ("/dev/null", "-"):
        words = [*mining, "--output", special, "--output_ids", tmp_path / "ids"]
        assert "so name a file" in error_line(run(*words), 2)
    words = ["rerank.py", "--model", "m", "--queries", files["topics"], "--corpus", files["collection"], "--run", "r"]
    assert "so name a file" in error_line(run(*words, "--output", "/dev/null"), 2)
    assert not list(Path("/dev").glob("null.*"))


def test_two_outputs_with_one_name(files: dict[str, Path], tmp_path: Path) -> None:
    same = ["--output", tmp_path / "out", "--output_ids", tmp_path / "x" / ".." / "out"]
    words = ["generate_triples_train.py", "--input", files["queries"], "--corpus", files["collection"], *same]
    assert "--output_ids and --output (" in error_line(run(*words))
