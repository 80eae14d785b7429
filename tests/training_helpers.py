"""Helpers for stages 4 and 5: the flags of the `separable` data set, and one call of train_t5.py."""

import functools
import gc
import json
from pathlib import Path

from conftest import Done, run

DEV_FILES = {"--queries": "topics.tsv", "--qrels": "qrels.txt", "--run": "run.txt", "--corpus": "collection.tsv"}
QUICK = ["--max_steps", 2, "--gradient_accumulation_steps", 1]


def dev(separable: Path) -> list[object]:
    """Return the flags of the dev set."""
    return [word for flag, name in DEV_FILES.items() for word in (flag, separable / name)]


def dev_but(separable: Path, tmp_path: Path, name: str, text: str) -> list[object]:
    """Return the flags of the dev set, one of its files replaced by a new file with this text."""
    (tmp_path / name).write_text(text)
    return [tmp_path / name if isinstance(word, Path) and word.name == name else word for word in dev(separable)]


def train_flags(separable: Path, base: Path, output: Path, *args: object) -> list[object]:
    required = ["--base_model", base, "--triples_train", separable / "triples.tsv", "--output_dir", output]
    return [*required, "--max_length", 64, *args]


@functools.cache
def freeze_imports() -> None:
    """Hide the objects of torch and transformers from the garbage collector, which each training calls."""
    import inpars_lib.training.trainer  # noqa: F401

    gc.freeze()


def train(separable: Path, base: Path, output: Path, *args: object, **environment: str) -> Done:
    freeze_imports()
    return run("train_t5.py", *train_flags(separable, base, output, *args), **environment)


def forget_the_model(output: Path) -> None:
    """Leave what a kill leaves after the last step and before the model is published."""
    record = json.loads((output / "training.json").read_text())
    for name in record["published"]:
        (output / name).unlink()
    (output / "training.json").write_text(json.dumps(record | {"finished": None, "published": []}))
