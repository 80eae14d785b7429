"""Files of a training: checkpoints, the record of its settings, results."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inpars_lib.cli import InputError, warn
from inpars_lib.files import atomic_write
from inpars_lib.plots import plot_learning_curve
from inpars_lib.resume import FORMAT_VERSION


def find_checkpoint(output_dir: str, resume: str | None) -> str | None:
    """Return the checkpoint to resume from, or None to start from the base model.

    A checkpoint without trainer_state.json, which is written last, is incomplete.

    Args:
        output_dir: Where checkpoints are.
        resume: A checkpoint's folder, `last`, or None.

    Raises:
        InputError: The named checkpoint is incomplete, or there are checkpoints and `resume` is None.
    """
    if resume not in (None, "last"):
        if not os.path.isfile(os.path.join(resume, "trainer_state.json")):
            raise InputError(f"{resume}: no trainer_state.json, so this is no complete checkpoint. Name another one.")
        return resume
    complete = {}
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            complete[json.loads(state.read_text())["global_step"]] = str(state.parent)
        except ValueError:
            continue
    if resume is None and complete:
        raise InputError(
            f"{output_dir}: has checkpoints of an earlier run. Add --resume_from_checkpoint to resume from the last "
            "one, or choose another --output_dir."
        )
    return complete[max(complete)] if complete else None


class TrainingRecord:
    """OUTPUT_DIR/training.json: the settings that decide the weights, and the step of the finished model.

    Args:
        output_dir: Folder of the training.
        settings: The settings, as JSON values.
    """

    def __init__(self, output_dir: str, settings: Mapping[str, Any]) -> None:
        self.path = os.path.join(output_dir, "training.json")
        self.settings = json.loads(json.dumps(settings, default=str))

    def write(self, finished: int | None = None) -> None:
        """Write the file. `finished` is the step of the saved model."""
        record = {"format_version": FORMAT_VERSION, "settings": self.settings, "finished": finished}
        with atomic_write(self.path) as file:
            json.dump(record, file, indent=2)

    def check(self) -> int | None:
        """Return the step of the finished model, or None if the training is not finished.

        Raises:
            InputError: The file has other settings.
        """
        if not os.path.exists(self.path):
            warn(f"{self.path}: this file is missing, so the settings of the checkpoints cannot be checked.")
            return None
        with open(self.path, encoding="utf-8") as file:
            record = json.load(file)
        before = record["settings"]
        names = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        if names:
            listed = ", ".join(f"{name} {before.get(name)}, now {self.settings.get(name)}" for name in names)
            raise InputError(
                f"{self.path}: trained with other settings ({listed}). Repeat the earlier settings, or choose another "
                "--output_dir."
            )
        return record["finished"]


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


def move_model(source: str, output_dir: str) -> None:
    """Move a saved model's files into the output folder, config.json last: a folder without it is not a model."""
    for name in sorted(os.listdir(source), key=lambda name: name == "config.json"):
        os.replace(os.path.join(source, name), os.path.join(output_dir, name))
    os.rmdir(source)
