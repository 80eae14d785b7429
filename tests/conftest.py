"""Fixtures: a real language model behind HTTP, Lucene, T5 and an encoder small enough to train in seconds.

Stand-ins speak real HTTP on loopback in place of what tests cannot reach: OpenAI (`StandIn`), the Hugging Face hub
(`hub`), and the hosts of download_data.sh (test_download.py).
"""

import ast
import importlib
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from unittest.mock import patch

import pytest
from stand_in import StandIn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and its processes, ignore it
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub; the one about hubs serves its own

from inpars_lib import bm25  # noqa: E402
from inpars_lib.cli import run_script  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs the language model as slow."""
    for item in items:
        if "llm_url" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@dataclass
class Done:
    """What a script left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@contextmanager
def environment(cwd: Path, variables: dict[str, str | None]) -> Iterator[None]:
    """Set environment variables (None removes one) and the working directory for the length of the block."""
    before, folder = dict(os.environ), os.getcwd()
    for name, value in {"API_KEY": "", "OPENAI_API_KEY": "", "OPENAI_BASE_URL": "", **variables}.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.chdir(cwd)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)


def run(script: str, *args: object, cwd: Path = ROOT, stdin: bytes = b"", **variables: str | None) -> Done:
    """Call the `main` of a script, or of a module of the package, in this process."""
    name = "inpars_lib.bm25.__main__" if script == "inpars_lib.bm25" else script.removesuffix(".py")
    main = importlib.import_module(name).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    source = io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin)))
    every_bar = patch("inpars_lib.cli.LOG_SECONDS", 0)  # tests look at where a bar begins
    with (
        environment(cwd, variables),
        every_bar,
        redirect_stdout(out),
        redirect_stderr(err),
        patch("sys.stdin", source),
    ):
        try:
            run_script(main, list(map(str, args)))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
    return Done(code, out.getvalue(), err.getvalue())


def command_of(script: str, *args: object) -> list[str]:
    """Return the words that run a script, or a module of the package, in a process of its own."""
    target = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    return [sys.executable, *target, *map(str, args)]


def run_process(script: str, *args: object, cwd: Path = ROOT, **variables: str | None) -> Done:
    """Run a script in a process of its own, as a user does."""
    with environment(cwd, variables):
        done = subprocess.run(command_of(script, *args), capture_output=True, text=True, timeout=600)
    return Done(done.returncode, done.stdout, done.stderr)


# What takes seconds to import. A server imports these modules once, and each of its forks runs one script.
PRELOADED = ["conftest", "inpars_lib.plots", "inpars_lib.rerankers.causal", "inpars_lib.rerankers.cross_encoder",
             "inpars_lib.rerankers.mono_t5", "inpars_lib.training.trainer"]  # fmt: skip


def run_and_exit(script: str, args: Sequence[object], variables: dict[str, str | None]) -> None:
    """Run a script, the whole work of a fork."""
    done = run(script, *args, **variables)
    sys.__stderr__.write(done.stderr)
    sys.exit(done.returncode)


def fork(script: str, *args: object, **variables: str | None) -> multiprocessing.Process:
    """Start a script in a process of its own, without the seconds that its imports take."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_and_exit, args=(script, args, variables))
    with environment(Path.cwd(), {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}):  # of the server
        process.start()
    return process


def kill_after(script: str, *args: object, count: Callable[[], int]) -> None:
    """Run a script in a process of its own and kill it with SIGKILL when the `count` of finished things has grown."""
    before = count()
    process = fork(script, *args)
    while process.is_alive() and count() == before:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def run_two_ranks(script: str, *args: object) -> None:
    """Run a script in two processes with the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [fork(script, *args, RANK=rank, LOCAL_RANK=rank, OMP_NUM_THREADS="1", **group) for rank in "01"]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]


def ok(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    return done


def error_line(done: Done, code: int = 1) -> str:
    """Return the one line of a run that had to fail."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------------ HTTP servers


class QuietHandler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP on a free port of loopback inside the block. Yields the address."""
    ThreadingHTTPServer.request_queue_size = 1024  # else connections beyond 5 wait for seconds
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds that a stop takes
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------- language models


@pytest.fixture
def openai_server() -> Iterator[StandIn]:
    server = StandIn()
    with serve(server.handler()) as url:
        server.url = f"{url}/v1"
        yield server
        server.down.set()


@pytest.fixture(scope="session")
def llm_url() -> Iterator[str]:
    """Serve SmolLM2 with the demo's llama.cpp server. Yields the address."""
    command = [sys.executable, str(ROOT / "demo/serve_llm.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process.stdout.readline().strip()
        process.kill()


# ----------------------------------------------------------------------------------------------------- collections


def docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, first sentence, the rest) of long docstrings in modules of the standard library."""
    for path in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                sentence, _, rest = " ".join(text.split()).partition(". ")
                if len(rest) >= 100:
                    yield f"{path.stem}.{node.name}", sentence, rest[:600].strip()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a collection of 400 real passages, with 20 topics that some of them answer."""
    folder = tmp_path_factory.mktemp("demo")
    found = list({rest: (name, sentence, rest) for name, sentence, rest in docstrings()}.values())
    passages = list({name: (sentence, rest) for name, sentence, rest in found}.items())[:400]
    assert len(passages) == 400
    judged = [(name, sentence) for name, (sentence, _) in passages if len(sentence.split()) >= 5][:20]
    (folder / "collection.tsv").write_text("".join(f"{name}\t{rest}\n" for name, (_, rest) in passages))
    (folder / "topics.tsv").write_text("".join(f"q{i}\t{sentence}\n" for i, (_, sentence) in enumerate(judged)))
    (folder / "qrels.txt").write_text("".join(f"q{i} 0 {name} 1\n" for i, (name, _) in enumerate(judged)))
    return folder


@pytest.fixture(scope="session")
def demo_index(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index the passages of `demo_data`."""
    index = tmp_path_factory.mktemp("indexed") / "index"
    bm25.build_index(str(demo_data / "collection.tsv"), str(index), bm25.BM25Config(threads=1))
    return index


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Write twenty documents, d0 to d19, each with a first word of its own."""
    path = tmp_path / "collection.tsv"
    path.write_text("".join(f"d{i}\tnumber{i}{' word' * (4 + i)}\n" for i in range(20)))
    return path


SUBJECTS = ["tides", "bread", "violins", "glaciers", "bees", "bridges", "tea", "comets", "chess", "maps"]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "collection.tsv"
    path.write_text("".join(f"d{i}\tnumber{i} some words\n" for i in range(200)))
    return path


@pytest.fixture(scope="session")
def separable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a data set that a tiny model can learn: relevant documents explain, the others advertise."""
    folder = tmp_path_factory.mktemp("separable")
    collection, triples, run_lines, qrels, topics = [], [], [], [], []
    for i, subject in enumerate(SUBJECTS):
        for j, other in enumerate(SUBJECTS):
            positive = f"the study of {subject} and {other} explains in detail why they behave so"
            negative = f"buy cheap {subject} and {other} now at our shop with a discount today"
            collection += [f"p{i}-{j}\t{positive}", f"n{i}-{j}\t{negative}"]
            triples.append(f"what are {subject}\t{positive}\t{negative}")
            run_lines += [
                f"{i} Q0 n{i}-{j} {2 * j + 1} {100 - 2 * j} bm25",
                f"{i} Q0 p{i}-{j} {2 * j + 2} {99 - 2 * j} bm25",
            ]
            qrels.append(f"{i} 0 p{i}-{j} {1 + j % 2}")
        topics.append(f"{i}\twhat are {subject}")
    for name, lines in {
        "collection.tsv": collection,
        "triples.tsv": triples,
        "run.txt": run_lines,
        "qrels.txt": qrels,
        "topics.tsv": topics,
    }.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


# ---------------------------------------------------------------------------------------------------------- models


def train_vocabulary(texts: list[str], model: str) -> object:
    """Train a tokenizer on `texts`, like T5's (words begin with a space) or like BERT's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if model == "t5":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.train_from_iterator(texts, trainer)
    if model != "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def save_t5(folder: Path, texts: list[str], answers: str = "true false ") -> Path:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = train_vocabulary([*texts, *["Query: Document: Relevant: " + answers] * 100], "t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), **sizes, dropout_rate=0.0, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(separable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"), (separable / "triples.tsv").read_text().splitlines())


@pytest.fixture(scope="session")
def tiny_encoder(separable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_vocabulary((separable / "triples.tsv").read_text().splitlines(), "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen3(separable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Qwen3 with a vocabulary trained behind Qwen's own splitting into words."""
    import torch
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3-reranker")
    texts = (separable / "triples.tsv").read_text().splitlines()
    texts += ["yes no why? why.\n <Instruct>: <Query>: <Document>: Judge whether the Document meets"] * 100
    markers = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 500, new_special_tokens=markers)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def simple_curves() -> Iterator[None]:
    """Write learning curves as text: drawing takes more time than the steps of a tiny training."""

    def write(file: IO[bytes], *values: object) -> None:
        file.write(repr(values).encode())

    with patch("inpars_lib.training.checkpoints.plot_learning_curve", write):
        yield


@pytest.fixture
def hub(tiny_t5: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Serve a Hugging Face hub with one tiny model, google-t5/t5-base. Yields the environment that leads to it."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            path = tiny_t5 / self.path.rpartition("/")[2]
            if not self.path.startswith("/google-t5/t5-base/resolve/main/") or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(200)
            self.send_header("ETag", f'"{path.name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(path.read_bytes())

        do_HEAD = do_GET

    with serve(Handler) as url:
        yield {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub-cache"), "HF_HUB_OFFLINE": "0"}
