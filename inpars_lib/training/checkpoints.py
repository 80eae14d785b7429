"""Files of a training: the record of its settings, its checkpoints, the published model, results."""

import csv
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.files import atomic_write, check_paths
from inpars_lib.plots import plot_learning_curve
from inpars_lib.resume import FORMAT_VERSION, check_settings, read_state

RECORD = "training.json"
RESULTS = ("results.csv", "learning_curve.png")
FileName = Annotated[str, msgspec.Meta(pattern="^[^/]+$")]  # without a folder: these files are deleted
# What a training may write into its folder. In a folder without a record, such files belong to somebody else.
OWN_FILES = re.compile(
    r"checkpoint-\d+|unfinished|README\.md|results\.csv|learning_curve\.png|(generation_|adapter_)?config\.json|training_args\.bin"
    r"|.+\.safetensors(\.index\.json)?|(tokenizer|special_tokens_map|added_tokens|vocab).*\.(json|txt)|chat_template\..+"
)
UNFINISHED = "unfinished"  # folder of a saved model until it is published
DELETED = re.compile(rf"checkpoint-\d+|{UNFINISHED}")  # folders that --restart deletes
OTHER_FOLDER = "Choose another --output_dir."


class CheckpointState(msgspec.Struct):
    """What trainer_state.json, written last into a checkpoint, says about a training.

    Attributes:
        global_step: The step of the checkpoint.
        max_steps: Steps of the whole training.
        log_history: The Trainer's log.
        best_global_step: The step of the best evaluation so far, with --select_by.
    """

    global_step: int
    max_steps: int
    log_history: list[dict[str, float | None]]
    best_global_step: int | None = None


class DataFile(msgspec.Struct):
    """A file that a training reads: its name without folders, and its hash, empty for a folder."""

    name: str
    sha256: str


class TrainingRecord(msgspec.Struct):
    """Content of training.json.

    Attributes:
        format_version: Version of this file.
        settings: Settings that a resumed training must repeat, by flag, as JSON values.
        data: Files that a resumed training must repeat, by flag.
        published: Names of the model's files in the folder.
        finished: Step of the published model, None until it is complete.
    """

    format_version: int
    settings: dict[str, Any]
    data: dict[str, DataFile]
    published: list[FileName] = []
    finished: int | None = None

    def decisive(self) -> dict[str, Any]:
        """Return everything that a resumed training must repeat, hashes included."""
        files = {flag: file.sha256 or file.name for flag, file in self.data.items()}
        return {"format_version": self.format_version, **self.settings, **files}


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
        checkpoint: Checkpoint to resume from, or None for the base model.
        trained: Checkpoint whose weights are published, if the training is complete but its model is not.
        finished: Step of the published model, if there is nothing to do.
    """

    checkpoint: str | None = None
    trained: str | None = None
    finished: int | None = None


def check_inputs(output_dir: str, base_model: str, data: Mapping[str, str | None]) -> None:
    """Check that a training does not replace or delete what it reads.

    Args:
        output_dir: Folder of the training.
        base_model: Folder or hub name of the base model, which must not be inside `output_dir`.
        data: Paths of other inputs by flag.

    Raises:
        InputError: It would.
    """
    for name in (RECORD, "config.json", "model.safetensors", "README.md", *RESULTS):
        check_paths(data, {"--output_dir": os.path.join(output_dir, name)})
    folder, base = Path(output_dir).resolve(), Path(base_model).resolve()
    if base.exists() and folder in (base, *base.parents):
        raise InputError(f"{base_model}: --base_model is in --output_dir ({output_dir}). {OTHER_FOLDER}")
    for flag, path in data.items():
        for parent in Path(path or "/").resolve().parents:
            if parent.parent == folder and DELETED.fullmatch(parent.name):
                raise InputError(f"{path}: {flag} is in a folder of checkpoints ({parent}). Move the file.")


def checkpoint_folder(output_dir: str, step: int) -> str:
    """Return the folder of a step's checkpoint."""
    return os.path.join(output_dir, f"checkpoint-{step}")


def read_checkpoint(folder: str) -> CheckpointState | None:
    """Return the state of a checkpoint, or None if a kill left the checkpoint incomplete.

    Raises:
        InputError: The state is damaged.
    """
    path = os.path.join(folder, "trainer_state.json")
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    try:
        return msgspec.convert(content, CheckpointState)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: damaged ({shorten(error)}). Delete this checkpoint, or restore the file.") from None


def checkpoint_folders(output_dir: str) -> list[str]:
    """Return the folders of checkpoints, complete or not, the last step first."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    return [checkpoint_folder(output_dir, step) for step in sorted(steps, reverse=True)]


def check_weights(folder: str) -> None:
    """Check that a checkpoint chosen by --select_by still has weights.

    Raises:
        InputError: It has none.
    """
    if not any(Path(folder).glob("*.safetensors")) and not any(Path(folder).glob("pytorch_model*.bin")):
        action = "Restore this checkpoint, or add --restart to train again."
        raise InputError(f"{folder}: the weights of the best step so far are missing. {action}")


def stopped_early(history: Sequence[Mapping[str, Any]], measure: str | None, patience: int | None) -> bool:
    """Return whether as many evaluations as `patience` have passed without a better one.

    Args:
        history: The Trainer's log.
        measure: The measure of --select_by.
        patience: Number of evaluations, or None for no early stopping.
    """
    values = [entry[f"eval_{measure}"] for entry in history if f"eval_{measure}" in entry]
    return patience is not None and bool(values) and len(values) - 1 - values.index(max(values)) >= patience


class TrainingFolder:
    """The files of a training in --output_dir.

    Args:
        path: The folder.
        settings: Settings that a resumed training must repeat, by flag, as JSON values.
        data: Files that a resumed training must repeat, by flag.
    """

    def __init__(self, path: str, settings: Mapping[str, Any], data: Mapping[str, DataFile]) -> None:
        self.path, self.record_path = path, os.path.join(path, RECORD)
        self.unfinished = os.path.join(path, UNFINISHED)
        self.record = TrainingRecord(FORMAT_VERSION, json.loads(json.dumps(settings, default=str)), dict(data))

    def _write(self, record: TrainingRecord) -> None:
        with atomic_write(self.record_path, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record)) + b"\n")

    def _read(self) -> TrainingRecord | None:
        if not os.path.exists(self.record_path):
            return None
        return read_state(self.record_path, TrainingRecord, OTHER_FOLDER)

    def find_start(self, restart: bool, checkpoint: str | None) -> Start:
        """Return where this run starts. Nothing is written.

        Args:
            restart: Start from the base model, whatever an earlier training left.
            checkpoint: The checkpoint to resume from, or None for the last complete one.

        Raises:
            InputError: There is a training with other settings, a model of other origin, or no such checkpoint.
        """
        before = self._read()
        if before is None and checkpoint is None:
            self._check_no_other_model()
            return Start()
        if restart:
            return Start()
        if before is None:
            warn(f"{self.record_path}: this file is missing, so the settings of the checkpoint cannot be checked.")
        else:
            check_settings(self.record_path, before.decisive(), self.record.decisive())
            self.record.published = before.published
            complete = all(os.path.exists(os.path.join(self.path, name)) for name in before.published)
            if before.finished is not None and complete:
                return Start(finished=before.finished)
        folders = [checkpoint] if checkpoint else checkpoint_folders(self.path)
        for folder in folders:
            if state := read_checkpoint(folder):
                return self._start_from(folder, state)
        if checkpoint:
            raise InputError(f"{checkpoint}: trainer_state.json is missing or incomplete. Name a complete checkpoint.")
        return Start()

    def _check_no_other_model(self) -> None:
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        for name in sorted(names):
            if OWN_FILES.fullmatch(name):
                raise InputError(f"{self.path}: {name} was not written by this script. {OTHER_FOLDER}")

    def _start_from(self, checkpoint: str, state: CheckpointState) -> Start:
        select_by = self.record.settings.get("select_by")
        patience = self.record.settings.get("early_stopping_patience")
        chosen = checkpoint
        if select_by and state.best_global_step is not None:
            chosen = checkpoint_folder(self.path, state.best_global_step)
            check_weights(chosen)
        complete = state.global_step >= state.max_steps or stopped_early(state.log_history, select_by, patience)
        return Start(checkpoint, chosen if complete else None)

    def begin(self) -> None:
        """Delete what an earlier training left, its model's config.json first, and write the record of this one."""
        if before := self._read():
            before.finished = None  # a kill from here on must not leave a finished training
            self._write(before)
            for name in ("config.json", *before.published, *RESULTS):
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(self.path, name))
            for folder in (*checkpoint_folders(self.path), self.unfinished):
                shutil.rmtree(folder, ignore_errors=True)
        self.record.published = []
        self._write(self.record)

    def publish(self, step: int, card: str) -> None:
        """Move the saved model into the folder with its card, config.json last: without it there is no model.

        Args:
            step: Step of the model.
            card: Text of README.md.

        Raises:
            InputError: A file of somebody else has the name of a file of the model.
        """
        Path(self.unfinished, "README.md").write_text(card, encoding="utf-8")
        names = sorted(os.listdir(self.unfinished), key=lambda name: name == "config.json")
        present = [name for name in names if os.path.exists(os.path.join(self.path, name))]
        if foreign := [name for name in present if name not in self.record.published]:
            raise InputError(
                f"{self.path}: {foreign[0]} was put here during the training. Move it away and run the same command "
                "again to get the model."
            )
        if "config.json" in present:
            os.remove(os.path.join(self.path, "config.json"))
        self.record.published = names
        self._write(self.record)
        for name in names:
            os.replace(os.path.join(self.unfinished, name), os.path.join(self.path, name))
        os.rmdir(self.unfinished)
        self.record.finished = step
        self._write(self.record)


def write_results(output_dir: str, history: Sequence[Mapping[str, Any]], first_stage: Mapping[str, float]) -> None:
    """Write results.csv and learning_curve.png from the log that checkpoints carry.

    Args:
        output_dir: Folder to write to.
        history: The Trainer's log.
        first_stage: Measures of the dev set's run, drawn as lines. Their names are the columns of results.csv.
    """
    rows: list[dict[str, Any]] = []
    loss = None
    for entry in history:
        loss = entry.get("loss", loss)
        if any(f"eval_{name}" in entry for name in first_stage):
            values = {name: entry.get(f"eval_{name}") for name in first_stage}
            rows.append({"step": entry["step"], "epoch": round(entry["epoch"], 3), "loss": loss, **values})
    if rows:
        with atomic_write(os.path.join(output_dir, "results.csv")) as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if losses:
        with atomic_write(os.path.join(output_dir, "learning_curve.png"), "wb") as file:
            plot_learning_curve(file, losses, rows, first_stage)
