"""download_data.sh, with its hosts on loopback."""

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, QuietHandler, serve

COLLECTION = "".join(f"{i}\tpassage number {i}\n" for i in range(1000)).encode()


class Host:
    """A server of `files` by path, with byte ranges, that records the requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.refuse_ranges = 0  # status of the answer to a request for a range
        self.etags = True
        self.length = True  # tell the length, so that curl notices a cut
        self.cut: int | None = None  # bytes of a body before the connection closes
        outer = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                outer.asked.append((self.path, wanted))
                data = outer.files.get(self.path)
                if data is None:
                    return self.send_error(404)
                if wanted and outer.refuse_ranges:
                    return self.send_error(outer.refuse_ranges)
                etag = f'"{hashlib.md5(data).hexdigest()}"'
                if self.headers.get("If-Range", etag) != etag:
                    wanted = None  # the file has changed: all of it is sent
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
                if start >= len(data) > 0:
                    return self.send_error(416)
                self.send_response(206 if wanted else 200)
                if outer.etags:
                    self.send_header("ETag", etag)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                if outer.length:
                    self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start : outer.cut])

        self.handler = Handler
        self.url = ""  # set by the fixture


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    with serve(host.handler) as host.url:
        yield host


def download(host: Host, cwd: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    hosts = dict.fromkeys(("MSMARCO_HOST", "GITHUB_HOST", "GOOGLE_HOST", "INPARS_HOST"), host.url)
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", **hosts, **environment}
    return subprocess.run(
        ["bash", str(ROOT / "download_data.sh"), *args], cwd=cwd, env=env, capture_output=True, text=True
    )


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("collection.tsv")
        info.size = len(COLLECTION)
        tar.addfile(info, io.BytesIO(COLLECTION))
    return buffer.getvalue()


FIQA = "/inpars/fiqa_synthetic_queries_100k.jsonl"
ROWS = b"".join(b'{"doc_id": "%d"}\n' % i for i in range(5000))


def fiqa(folder: Path) -> Path:
    return folder / "data/synthetic/fiqa_synthetic_queries_100k.jsonl"


def test_a_published_set_and_a_resumed_download(host: Host, tmp_path: Path) -> None:
    host.files[FIQA] = ROWS
    host.cut = 700
    file = fiqa(tmp_path)
    part = file.with_name(file.name + ".part")
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert done.returncode == 1
    assert "Run the same command again to resume" in done.stderr
    assert part.read_bytes() == ROWS[:700]
    host.cut = None
    host.asked.clear()
    assert download(host, tmp_path, "synthetic", "fiqa").returncode == 0
    assert file.read_bytes() == ROWS
    assert host.asked == [(FIQA, "bytes=700-")]
    assert list(file.parent.iterdir()) == [file]
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert "exists: skipped" in done.stdout
    assert len(host.asked) == 1


@pytest.mark.parametrize("etags", [True, False])
def test_a_part_of_another_version_is_not_continued(host: Host, tmp_path: Path, etags: bool) -> None:
    host.files[FIQA], host.cut, host.etags = ROWS.replace(b"doc", b"old"), 700, etags
    assert download(host, tmp_path, "synthetic", "fiqa").returncode == 1
    host.files[FIQA], host.cut = ROWS, None
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert done.returncode == 0, done.stderr
    assert fiqa(tmp_path).read_bytes() == ROWS


def test_a_cut_that_curl_cannot_notice_is_refused(host: Host, tmp_path: Path) -> None:
    """An answer without a length ends where the connection does."""
    host.files[FIQA], host.cut, host.length = ROWS, 699, False
    run = host.files["/duobert_git/run.bm25.dev.small.tsv"] = b"1\t2\t1\n" * 200
    host.files["/msmarcoranking/collection.tar.gz"] = archive()
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert done.returncode == 1
    assert "sent a part of the file, an HTML page or nothing. Nothing was kept" in done.stderr
    assert list(fiqa(tmp_path).parent.iterdir()) == []
    host.cut = 700  # inside the last line of the run
    folder = tmp_path / "data/msmarco"
    folder.mkdir(parents=True)
    for name in ("topics", "qrels"):
        (folder / f"{name}.msmarco-passage.dev-subset.txt").write_text("here")
    assert run[:700].endswith(b"1\t2\t")
    assert "run.bm25.dev.small.tsv: the server sent a part" in download(host, tmp_path).stderr
    host.cut = 701
    assert "run.bm25.dev.small.tsv: the server sent a part" in download(host, tmp_path).stderr
    assert not (folder / "run.bm25.dev.small.tsv").exists()


@pytest.mark.parametrize(
    "body", [b"", b"<!DOCTYPE html><p>Sorry</p>", b"\n<html>Sorry</html>\n", b"Too many requests\n"]
)
def test_another_answer_is_no_data_set(host: Host, tmp_path: Path, body: bytes) -> None:
    host.files[FIQA] = body
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert done.returncode == 1
    assert "an HTML page or nothing" in done.stderr
    assert list(fiqa(tmp_path).parent.iterdir()) == []


def test_changed_prompts_are_refused(host: Host, tmp_path: Path) -> None:
    base = "/zetaalphavector/InPars/master/legacy/inpars-v1/prompts/"
    host.files = {base + "vanilla_prompt.txt": b"vanilla", base + "gbq_prompt.txt": b"gbq"}
    done = download(host, tmp_path, "prompts")
    assert done.returncode == 1
    assert "vanilla_prompt.txt: the file has changed, its sha256 is not 46b3f06c" in done.stderr


def test_a_changed_file_is_refused(host: Host, tmp_path: Path) -> None:
    host.files["/castorini/anserini-tools/master/topics/topics.dl20.txt"] = b"1\tchanged\n"
    done = download(host, tmp_path, "dl20")
    assert done.returncode == 1
    assert "the file has changed, its sha256 is not 726cb401" in done.stderr
    assert list((tmp_path / "data/msmarco").iterdir()) == []


def test_msmarco_is_unpacked(host: Host, tmp_path: Path) -> None:
    folder = tmp_path / "data/msmarco"
    folder.mkdir(parents=True)
    for name in ("topics", "qrels"):  # existing files are skipped
        (folder / f"{name}.msmarco-passage.dev-subset.txt").write_text("here")
    host.files["/duobert_git/run.bm25.dev.small.tsv"] = b"1\t2\t1\n"
    packed = host.files["/msmarcoranking/collection.tar.gz"] = archive()
    done = download(host, tmp_path, COLLECTION_MD5=hashlib.md5(packed).hexdigest())
    assert done.returncode == 0, done.stderr
    assert "4.1 GB of disk" in done.stdout.splitlines()[0]
    assert (folder / "collection.tsv").read_bytes() == COLLECTION
    assert sorted(path.name for path in folder.iterdir()) == [
        "collection.tsv",
        "qrels.msmarco-passage.dev-subset.txt",
        "run.bm25.dev.small.tsv",
        "topics.msmarco-passage.dev-subset.txt",
    ]
    host.asked.clear()
    assert download(host, tmp_path, "msmarco").returncode == 0
    assert host.asked == []


def test_the_collection_does_not_need_the_optional_run(host: Host, tmp_path: Path) -> None:
    folder = tmp_path / "data/msmarco"
    folder.mkdir(parents=True)
    for name in ("topics", "qrels"):
        (folder / f"{name}.msmarco-passage.dev-subset.txt").write_text("here")
    packed = host.files["/msmarcoranking/collection.tar.gz"] = archive()
    done = download(host, tmp_path, COLLECTION_MD5=hashlib.md5(packed).hexdigest())
    assert done.returncode == 0, done.stderr
    assert "run.bm25.dev.small.tsv: not found (404). The file may have moved" in done.stderr
    assert (folder / "collection.tsv").read_bytes() == COLLECTION


def test_a_refused_resumption_keeps_the_part(host: Host, tmp_path: Path) -> None:
    host.files[FIQA], host.cut = ROWS, 1000
    assert download(host, tmp_path, "synthetic", "fiqa").returncode == 1
    host.refuse_ranges = 403
    assert download(host, tmp_path, "synthetic", "fiqa").returncode == 1
    assert fiqa(tmp_path).with_name(fiqa(tmp_path).name + ".part").stat().st_size == 1000


def test_failed_downloads_and_usage_errors(host: Host, tmp_path: Path) -> None:
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert done.returncode == 1
    assert "not found (404)" in done.stderr.splitlines()[-1]
    for args in (["nonsense"], ["synthetic"], ["synthetic", "nonsense"], ["dl20", "msmarco"]):
        done = download(host, tmp_path, *args)
        assert done.returncode == 2
        assert "bash download_data.sh synthetic NAME" in done.stderr
