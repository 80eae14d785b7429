"""Real parts for the tests: a language model behind HTTP, Lucene, T5 and an encoder small enough to train in seconds.

`StandIn` is the one that is not: OpenAI itself cannot be had here, so it speaks its HTTP on loopback.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from stand_in import StandIn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub; the one about hubs serves its own


def run(script: str, *args: object, cwd: Path = ROOT, **environment: str | None) -> subprocess.CompletedProcess:
    """Run a script of ours as a user does. An environment variable set to None is removed."""
    env = {**os.environ, "API_KEY": "", "OPENAI_API_KEY": "", "OPENAI_BASE_URL": "", **environment}
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def ok(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stderr
    return done


def sentence(done: subprocess.CompletedProcess, code: int = 1) -> str:
    """The one sentence of a run that was to fail."""
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
    """An HTTP server on a free port of loopback, for the length of the block; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
    """SmolLM2 behind llama.cpp's server: the demo's own."""
    command = [sys.executable, str(ROOT / "demo/serve_llm.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process.stdout.readline().strip()
        process.kill()


# ----------------------------------------------------------------------------------------------------- collections


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's collection, its first 400 passages, with the topics that these answer."""
    whole = tmp_path_factory.mktemp("demo")
    ok(run("demo/build_collection.py", "--output_dir", whole))
    folder = tmp_path_factory.mktemp("small")
    lines = (whole / "collection.tsv").read_text().splitlines()
    topics = dict(line.split("\t") for line in (whole / "topics.tsv").read_text().splitlines())
    judged = {line.split()[2]: line for line in (whole / "qrels.txt").read_text().splitlines()}
    chosen = [line for line in lines if line.split("\t")[0] in judged][:20]
    chosen += [line for line in lines if line not in chosen][:380]
    qrels = [judged[line.split("\t")[0]] for line in chosen if line.split("\t")[0] in judged]
    (folder / "collection.tsv").write_text("\n".join(chosen) + "\n")
    (folder / "qrels.txt").write_text("\n".join(qrels) + "\n")
    (folder / "topics.tsv").write_text("".join(f"{q.split()[0]}\t{topics[q.split()[0]]}\n" for q in qrels))
    return folder


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Twenty documents, d0 to d19, each of which begins with a word of its own."""
    path = tmp_path / "collection.tsv"
    path.write_text("".join(f"d{i}\tnumber{i}{' word' * (4 + i)}\n" for i in range(20)))
    return path


SUBJECTS = ["tides", "bread", "violins", "glaciers", "bees", "bridges", "tea", "comets", "chess", "maps"]


@pytest.fixture(scope="session")
def separable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that a model of a few thousand weights can learn: relevant texts explain, the others advertise."""
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
    """A vocabulary like that of T5 (words begin with a blank) or of BERT, trained on `texts`."""
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


@pytest.fixture
def hub(tiny_t5: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Hugging Face hub with one model, google-t5/t5-base, which is tiny; gives the environment that leads to it."""

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
