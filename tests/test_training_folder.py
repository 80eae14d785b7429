"""Stage 4: what a training does to its folder. Resuming, starting over, kills, files of other people."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import error_line, kill_after, ok
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_helpers import QUICK, dev, dev_but, forget_the_model, train, train_flags

from inpars_lib.files import exclusive

pytestmark = pytest.mark.usefixtures("simple_curves")

CALLS = ((os, "replace"), (os, "remove"), (os, "rmdir"), (shutil, "rmtree"))
MODEL = ("README.md", "config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.slow
def test_a_kill_and_a_resumed_training(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """A run that is killed and resumed ends with the same weights and figures as one that is not."""
    args = ["--max_steps", 12, "--gradient_accumulation_steps", 1, "--save_every_n_steps", 4, "--logging_steps", 3]
    args += [*dev(separable), "--eval_steps", 2]
    ok(train(separable, tiny_t5, tmp_path / "whole/model", *args))
    state = tmp_path / "killed/model/checkpoint-4/trainer_state.json"
    command = ["train_t5.py", *train_flags(separable, tiny_t5, tmp_path / "killed/model", *args)]
    kill_after(*command, count=lambda: state.exists() and state.read_text().endswith("}\n"))
    # What a kill in the middle of saving leaves: no trainer_state.json yet.
    torn = tmp_path / "killed/model" / "checkpoint-999"
    shutil.copytree(tmp_path / "killed/model/checkpoint-4", torn)
    (torn / "trainer_state.json").unlink()
    said = ok(train(separable, tiny_t5, tmp_path / "killed/model", *args)).stderr
    assert "resumed from" in said
    assert "checkpoint-999" not in said
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("results.csv", "learning_curve.png", "tokenizer.json", "README.md", "training.json"):
        assert (tmp_path / "whole/model" / name).read_bytes() == (tmp_path / "killed/model" / name).read_bytes(), name


def test_two_trainings_on_one_folder_are_refused(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    with exclusive(str(tmp_path / "model/training.json")):
        second = train(separable, tiny_t5, tmp_path / "model", *QUICK)
        assert "training.json: another process is writing" in error_line(second)
    assert not list((tmp_path / "model").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, without checkpoints and the pickle that names the folder."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "training_args.bin"
    }


def test_a_finished_training_stays_as_it_is(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    ok(train(separable, tiny_t5, output, *QUICK))
    before = contents(output)
    done = ok(train(separable, tiny_t5, output, *QUICK, "--resume_from_checkpoint"))
    assert "model: training is finished, model of step 2" in done.stderr
    assert contents(output) == before
    forget_the_model(output)
    ok(train(separable, tiny_t5, output, *QUICK))
    assert contents(output) == before
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2"]


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_restart_starts_over(
    separable: Path, tiny_t5: Path, tmp_path: Path, finished: bool
) -> None:
    output = tmp_path / "model"
    ok(train(separable, tiny_t5, output, *QUICK, *dev(separable), "--save_every_n_steps", 1))
    if not finished:
        forget_the_model(output)
    (output / "notes.txt").write_text("mine")
    before = contents(output)
    triples = tmp_path / "triples.tsv"
    triples.write_text((separable / "triples.tsv").read_text() + "one\tmore\ttriple\n")
    changed = ["--loss", "pairwise", "--learning_rate", 1, "--max_steps", 3, "--optim", "adafactor"]
    changed += ["--triples_train", triples]
    refused = error_line(train(separable, tiny_t5, output, *QUICK, *changed))
    for difference in ('loss "pointwise", now "pairwise"', "learning_rate 0.0003, now 1.0", "max_steps 2, now 3",
                       'optim null, now "adafactor"', "the triples train differs"):  # fmt: skip
        assert difference in refused
    assert refused.count(", now ") == 4
    assert refused.endswith("or add --restart to throw the earlier work away.")
    assert contents(output) == before
    ok(train(separable, tiny_t5, output, *QUICK, *changed, "--restart"))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3"]
    assert not (output / "results.csv").exists()
    ok(train(separable, tiny_t5, tmp_path / "anew/model", *QUICK, *changed))
    assert contents(output) == contents(tmp_path / "anew/model") | {"notes.txt": b"mine"}


def test_a_named_checkpoint(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    args = [*QUICK, "--save_every_n_steps", 1]
    ok(train(separable, tiny_t5, tmp_path / "one", *args))
    checkpoint = tmp_path / "one/checkpoint-1"
    done = ok(train(separable, tiny_t5, tmp_path / "two", *args, "--resume_from_checkpoint", checkpoint))
    assert "training.json: this file is missing, so the settings of the checkpoint cannot be checked" in done.stderr
    assert "resumed from" in done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    both = train(separable, tiny_t5, tmp_path / "two", *args, "--restart", "--resume_from_checkpoint", checkpoint)
    assert "--restart deletes the checkpoints" in error_line(both, 2)


def test_early_stopping_survives_a_kill(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """With inverted judgements training only hurts, so the first evaluation is the best."""
    files = dev_but(separable, tmp_path, "qrels.txt", (separable / "qrels.txt").read_text().replace(" p", " n"))
    args = ["--max_steps", 60, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2, "--eval_steps", 10]
    args += [*files, "--relevance_threshold", 1, "--select_by", "MRR@10", "--early_stopping_patience", 2]
    output = tmp_path / "model"
    ok(train(separable, tiny_t5, output, *args))
    before, checkpoints = contents(output), sorted(output.glob("checkpoint-*"))
    forget_the_model(output)  # stopped early, and killed before the model was saved
    ok(train(separable, tiny_t5, output, *args))
    assert (contents(output), sorted(output.glob("checkpoint-*"))) == (before, checkpoints)
    forget_the_model(output)
    shutil.rmtree(max(checkpoints, key=lambda path: int(path.name.partition("-")[2])))  # killed before the last one
    ok(train(separable, tiny_t5, output, *args))
    assert (contents(output), sorted(output.glob("checkpoint-*"))) == (before, checkpoints)


def test_the_best_checkpoint_must_have_its_weights(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    args = [*QUICK, *dev(separable), "--eval_steps", 1, "--select_by", "MRR@10"]
    output = tmp_path / "model"
    ok(train(separable, tiny_t5, output, *args))
    best = json.loads((output / "training.json").read_text())["finished"]
    forget_the_model(output)
    state = output / "checkpoint-2/trainer_state.json"
    state.write_text(state.read_text().replace(f'"best_global_step": {best}', '"best_global_step": 1'))
    (output / "checkpoint-1/model.safetensors").unlink()
    assert "checkpoint-1: the weights of the best step so far are missing. Restore this checkpoint" in error_line(
        train(separable, tiny_t5, output, *args)
    )
    assert not (output / "config.json").exists()
    shutil.rmtree(output / "checkpoint-2")  # the training goes on, and the best one is gone only at its end
    (output / "checkpoint-1/trainer_state.json").unlink()
    ok(train(separable, tiny_t5, output, *args))


@pytest.mark.parametrize("name", ["training.json", "checkpoint-2/trainer_state.json"])
@pytest.mark.parametrize("content", ["[]", "{}", '{"global_step": "x"}', "[" * 100_000, '{"settings": 1}'])
def test_damaged_state_is_an_error(separable: Path, tiny_t5: Path, tmp_path: Path, name: str, content: str) -> None:
    output = tmp_path / "model"
    for folder in (output, output / "checkpoint-2"):
        folder.mkdir()
        (folder / "training.json").write_text(content)
        (folder / "trainer_state.json").write_text(content)
    more: list[object] = []
    if name != "training.json":
        (output / "training.json").unlink()
        more = ["--resume_from_checkpoint", output / "checkpoint-2"]
    refused = error_line(train(separable, tiny_t5, output, *QUICK, *more))
    assert str((output / name).parent) in refused
    assert Path(name).name in refused


def test_a_record_names_no_files_elsewhere(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """What a record calls published is deleted by --restart, so it must be in its folder."""
    output, mine = tmp_path / "model", tmp_path / "mine.txt"
    ok(train(separable, tiny_t5, output, *QUICK))
    record = json.loads((output / "training.json").read_text())
    mine.write_text("mine")
    for name in (str(mine), "../mine.txt"):
        (output / "training.json").write_text(json.dumps(record | {"published": [name]}))
        refused = error_line(train(separable, tiny_t5, output, *QUICK, "--restart"))
        assert "training.json: damaged, or not a file of this script" in refused
    assert mine.read_text() == "mine"


@pytest.fixture(scope="module")
def two_checkpoints(separable: Path, tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two") / "model"
    ok(train(separable, tiny_t5, output, *QUICK, "--save_every_n_steps", 1))
    return output


@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_damaged_checkpoint_is_an_error(
    separable: Path, tiny_t5: Path, two_checkpoints: Path, tmp_path: Path, name: str, how: str
) -> None:
    output = tmp_path / "model"
    args = [*QUICK, "--save_every_n_steps", 1]
    shutil.copytree(two_checkpoints, output)
    before = contents(output)
    forget_the_model(output)
    shutil.rmtree(output / "checkpoint-2")
    damaged = output / "checkpoint-1" / name
    content = damaged.read_bytes()
    damaged.unlink()
    if how != "missing":
        damaged.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    refused = error_line(train(separable, tiny_t5, output, *args))
    assert "checkpoint-1: " in refused
    assert "missing" in refused or "damaged, or of another model (" in refused or "find a valid checkpoint" in refused
    assert refused.endswith("Delete this checkpoint, and run the same command again to resume from the one before.")
    if how == "cut":
        shutil.rmtree(output / "checkpoint-1")
        ok(train(separable, tiny_t5, output, *args))
        assert contents(output) == before


def test_a_full_disk_is_an_error(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    args = [*QUICK, "--save_every_n_steps", 1]
    for error in (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
                  RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")):  # fmt: skip
        with patch("transformers.Trainer._save_optimizer_and_scheduler", side_effect=error):
            failed = error_line(train(separable, tiny_t5, output, *args))
        assert f"{output}: cannot save the model ({error}). Check the free disk space, and run the same" in failed
    ok(train(separable, tiny_t5, output, *args))


def test_a_model_that_was_deleted_is_published_again(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    ok(train(separable, tiny_t5, output, *QUICK))
    before = contents(output)
    (output / "model.safetensors").unlink()
    ok(train(separable, tiny_t5, output, *QUICK))
    assert contents(output) == before


def test_the_base_model_stays(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_t5, base)
    (tmp_path / "link").symlink_to(base)
    before = contents(base)
    for output in (base, tmp_path / "link", tmp_path):
        refused = train(separable, base, output, *QUICK)
        assert f"{base}: --base_model is in --output_dir (" in error_line(refused)
    ok(train(separable, base, tmp_path / "model", *QUICK, "--save_every_n_steps", 1))
    inside = train(separable, tmp_path / "model/checkpoint-1", tmp_path / "model", *QUICK, "--restart")
    assert "--base_model is in --output_dir" in error_line(inside)
    assert contents(base) == before


def test_inputs_are_not_outputs(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "results.csv").hardlink_to(shutil.copy(separable / "triples.tsv", tmp_path / "triples.tsv"))
    refused = error_line(train(separable, tiny_t5, output, *QUICK, "--triples_train", tmp_path / "triples.tsv"))
    assert "results.csv: --output_dir and --triples_train (" in refused
    (output / "results.csv").unlink()
    shutil.move(tmp_path / "triples.tsv", output / "training.json")
    refused = error_line(train(separable, tiny_t5, output, *QUICK, "--triples_train", output / "training.json"))
    assert "training.json: --output_dir and --triples_train (" in refused


def test_inputs_are_not_deleted(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    ok(train(separable, tiny_t5, tmp_path / "model", *QUICK))
    mine = tmp_path / "model/checkpoint-2/mine/triples.tsv"
    mine.parent.mkdir()
    shutil.copy(separable / "triples.tsv", mine)
    (tmp_path / "link.tsv").symlink_to(mine)
    for path in (mine, tmp_path / "link.tsv"):
        refused = train(separable, tiny_t5, tmp_path / "model", *QUICK, "--triples_train", path, "--restart")
        assert f"{path}: --triples_train is in a folder of checkpoints (" in error_line(refused)
    assert mine.exists()


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "model.safetensors", "results.csv", "checkpoint-7/x", "unfinished/x"]
)
def test_files_of_the_user_stay(separable: Path, tiny_t5: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "model" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for more in ([], ["--restart"]):
        refused = error_line(train(separable, tiny_t5, tmp_path / "model", *QUICK, *more))
        assert f"model: {name.partition('/')[0]} was not written by this script. Choose another" in refused
    assert mine.read_text() == "mine"


def test_a_readme_written_during_the_training_stays(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    ok(train(separable, tiny_t5, output, *QUICK))
    before = contents(output)
    forget_the_model(output)
    (output / "README.md").write_text("mine")
    refused = error_line(train(separable, tiny_t5, output, *QUICK))
    assert "README.md was put here during the training. Move it away and run the same command again" in refused
    assert (output / "README.md").read_text() == "mine"
    assert not (output / "config.json").exists()
    (output / "README.md").unlink()
    ok(train(separable, tiny_t5, output, *QUICK))
    assert contents(output) == before


@pytest.mark.slow
def test_a_kill_never_mixes_two_models(separable: Path, tiny_t5: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Kill a training that replaces another model, before calls that rename or delete something.

    Every second call by default, every call with KILLS=20.
    """
    first, second = tmp_path / "first/model", tmp_path / "second/model"
    ok(train(separable, tiny_t5, first, *QUICK))
    ok(train(separable, tiny_encoder, second, *QUICK))
    old, new = contents(first), contents(second)
    assert "generation_config.json" in old.keys() - new.keys()
    real = {name: getattr(module, name) for module, name in CALLS}
    for kill_at in range(1, 200, 1 if int(os.environ.get("KILLS", 1)) >= 20 else 2):
        output = tmp_path / f"{kill_at}/model"
        shutil.copytree(first, output)
        calls = iter(range(1, kill_at))

        def call(name: str, *args: object, calls: Iterator[int] = calls, **kwargs: object) -> object:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real[name](*args, **kwargs)

        with ExitStack() as stack:
            for module, name in CALLS:
                stack.enter_context(patch.object(module, name, partial(call, name)))
            done = train(separable, tiny_encoder, output, *QUICK, "--restart")
        left = contents(output)
        if "config.json" in left:
            whole = old if left["config.json"] == old["config.json"] else new
            assert [name for name in MODEL if left.get(name) != whole[name]] == [], kill_at
            assert left.get("learning_curve.png") in (None, whole["learning_curve.png"]), kill_at
        if done.returncode == 0:
            break
        assert done.returncode == 130
        ok(train(separable, tiny_encoder, output, *QUICK, "--restart"))
        assert contents(output) == new, kill_at
    assert kill_at > 20
