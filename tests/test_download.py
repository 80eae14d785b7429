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
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
                if start >= len(data) > 0:
                    return self.send_error(416)
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:])

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


def test_a_published_set_and_a_resumed_download(host: Host, tmp_path: Path) -> None:
    path = "/inpars/scifacts_synthetic_queries_100k.jsonl"
    host.files[path] = b'{"doc_id": "1"}\n' * 100
    file = tmp_path / "data/synthetic/scifacts_synthetic_queries_100k.jsonl"
    file.parent.mkdir(parents=True)
    part = file.with_name(file.name + ".part")
    part.write_bytes(host.files[path][:700])
    assert download(host, tmp_path, "synthetic", "scifacts").returncode == 0
    assert file.read_bytes() == host.files[path]
    assert host.asked == [(path, "bytes=700-")]
    assert not part.exists()
    done = download(host, tmp_path, "synthetic", "scifacts")
    assert "exists: skipped" in done.stdout
    assert len(host.asked) == 1
    # The part is complete and only has to be renamed.
    file.rename(part)
    assert download(host, tmp_path, "synthetic", "scifacts").returncode == 0
    assert file.read_bytes() == host.files[path]


def test_prompts(host: Host, tmp_path: Path) -> None:
    base = "/zetaalphavector/InPars/master/legacy/inpars-v1/prompts/"
    host.files = {base + "vanilla_prompt.txt": b"vanilla", base + "gbq_prompt.txt": b"gbq"}
    assert download(host, tmp_path, "prompts").returncode == 0
    assert (tmp_path / "data/prompts/gbq_prompt.txt").read_bytes() == b"gbq"


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


def test_an_html_page_is_no_data_set(host: Host, tmp_path: Path) -> None:
    host.files["/inpars/fiqa_synthetic_queries_100k.jsonl"] = b"<!DOCTYPE html><p>Sorry</p>"
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert done.returncode == 1
    assert "sent an HTML page" in done.stderr
    assert list((tmp_path / "data/synthetic").iterdir()) == []


def test_a_refused_resumption_keeps_the_part(host: Host, tmp_path: Path) -> None:
    part = tmp_path / "data/synthetic/fiqa_synthetic_queries_100k.jsonl.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"{" * 1000)
    host.files["/inpars/fiqa_synthetic_queries_100k.jsonl"] = b"{" * 5000
    host.refuse_ranges = 403
    assert download(host, tmp_path, "synthetic", "fiqa").returncode == 1
    assert part.stat().st_size == 1000


def test_failed_downloads_and_usage_errors(host: Host, tmp_path: Path) -> None:
    done = download(host, tmp_path, "synthetic", "fiqa")
    assert done.returncode == 1
    assert "not found (404)" in done.stderr.splitlines()[-1]
    for args in (["nonsense"], ["synthetic"], ["synthetic", "nonsense"], ["dl20", "msmarco"]):
        done = download(host, tmp_path, *args)
        assert done.returncode == 2
        assert "bash download_data.sh synthetic NAME" in done.stderr
