"""Training: the Trainer that evaluates by reranking, checkpoints, results."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from inpars_lib.cli import InputError, warn
from inpars_lib.dev_set import DevSet
from inpars_lib.evaluation import MEASURES, evaluate_per_query, mean_values, rerank_hits
from inpars_lib.losses import LOSSES
from inpars_lib.reranker_base import Reranker
from inpars_lib.storage import FORMAT_VERSION, atomic_write
from inpars_lib.triples import LengthSortedSampler, TrainingExamples

PUBLISH = "publish the model after training: hf upload YOU/NAME MODEL --exclude 'checkpoint-*/*'"
REFUSED_FLAGS = {  # of transformers.TrainingArguments
    "num_train_epochs": "use --epochs",
    "save_steps": "use --save_every_n_steps",
    "label_smoothing_factor": "the loss is --loss",
    "load_best_model_at_end": "use --select_by",
    "metric_for_best_model": "use --select_by",
    "greater_is_better": "use --select_by",
    "eval_strategy": "evaluation is on with --queries or --holdout",
    "remove_unused_columns": "examples have no columns",
    "push_to_hub": PUBLISH,
    "hub_model_id": PUBLISH,
    "hub_token": PUBLISH,
}
PLOTTED = ("nDCG@10", "MRR@10")  # in learning_curve.png, or the first two measures if one of these is missing


# ----------------------------------------------------------------------------------------------------------- trainer


@dataclass(frozen=True)
class TrainingConfig:
    """What the Trainer needs beside `transformers.TrainingArguments`.

    Attributes:
        loss: A name in `LOSSES`.
        examples_per_step: Examples of an optimizer step, over all processes and accumulated batches.
        seed: Seed of the order of examples.
        relevance_threshold: Lowest relevant grade of the evaluation.
        measures: Names of the measures.
    """

    loss: str = "pointwise"
    examples_per_step: int = 128
    seed: int = 2
    relevance_threshold: int = 1
    measures: tuple[str, ...] = MEASURES


class RerankerTrainer(Trainer):
    """A Trainer that evaluates by reranking the dev set, whose queries the processes share.

    Args:
        reranker: The model to train.
        examples: The training examples.
        config: Loss, step size, evaluation.
        arguments: Everything else.
        dev: The dev set, or None for no evaluation.
    """

    def __init__(
        self,
        reranker: Reranker,
        examples: TrainingExamples,
        config: TrainingConfig,
        arguments: TrainingArguments,
        dev: DevSet | None = None,
    ) -> None:
        self.reranker, self.examples, self.config, self.dev = reranker, examples, config, dev
        # T5's and BERT's losses are means over a batch, although their signatures make the Trainer assume sums over a
        # step. Without this flag, accumulated gradients would be too large by the number of batches.
        reranker.model.accepts_loss_kwargs = False
        super().__init__(
            model=reranker.model,
            processing_class=reranker.tokenizer,  # saved beside the model
            args=arguments,
            train_dataset=examples,
            eval_dataset=list(dev.run) if dev else None,
            data_collator=self.collate,
            callbacks=[EvaluateAtEnd(dev is not None)],
        )
        self.first_stage: dict[str, float] = {}  # the measures of the dev set's run
        if dev:
            values = evaluate_per_query(dev.qrels, dev.run, config.relevance_threshold, config.measures)
            self.first_stage = mean_values(values)

    def _get_train_sampler(self, *_: object, **__: object) -> Any:
        config = self.config
        return LengthSortedSampler(self.examples, config.examples_per_step, config.seed)

    def collate(self, items: Sequence[list[tuple[str, str, bool]]]) -> dict[str, Any]:
        """Return a batch of the items' examples. For losses of groups, the groups' sizes replace the labels."""
        batch = self.reranker.collate(list(chain.from_iterable(items)))
        if LOSSES[self.config.loss]:
            del batch["labels"]
            batch["group_sizes"] = torch.tensor([len(item) for item in items])
        return batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch: the model's own, or that of `LOSSES`."""
        loss = LOSSES[self.config.loss]
        if not loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        sizes = inputs.pop("group_sizes").tolist()
        logits = list(torch.split(self.reranker.relevance_logits(model, inputs), sizes))
        return loss(torch.nn.utils.rnn.pad_sequence(logits, batch_first=True, padding_value=-math.inf))

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Rerank the dev set and return its measures, with the prefix `eval_`."""
        dev = self.dev
        assert dev is not None
        mine = list(dev.run)[self.args.process_index :: self.args.world_size]
        hits = [hit for query_id in mine for hit in dev.run[query_id]]
        pairs = [(dev.topics[hit.query_id], dev.texts[hit.doc_id]) for hit in hits]
        with self.accelerator.autocast():
            values = self.reranker.score(pairs).tolist()
        scores: dict[str, dict[str, float]] = {}
        scored = [(hit.query_id, hit.doc_id, value) for hit, value in zip(hits, values, strict=True)]
        for query_id, doc_id, value in gather_object(scored):
            scores.setdefault(query_id, {})[doc_id] = value
        run = {query_id: rerank_hits(hits, scores[query_id]) for query_id, hits in dev.run.items()}
        per_query = evaluate_per_query(dev.qrels, run, self.config.relevance_threshold, self.config.measures)
        means = mean_values(per_query)
        metrics = {f"eval_{name}": value for name, value in means.items() if not math.isnan(value)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.write_results()
        return metrics

    def write_results(self) -> None:
        """Write results.csv and learning_curve.png into the output folder, in the main process only."""
        if self.is_world_process_zero():
            write_results(str(self.args.output_dir), self.state.log_history, self.first_stage)


class EvaluateAtEnd(TrainerCallback):
    """Evaluate after the last step, and log the loss at each checkpoint so that a resumed run has it."""

    def __init__(self, evaluates: bool) -> None:
        self.evaluates = evaluates

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the Trainer's flags."""
        control.should_evaluate |= self.evaluates and state.global_step >= state.max_steps
        control.should_log |= control.should_save


def parse_trainer_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Return the values of flags of `transformers.TrainingArguments` by name.

    Args:
        flags: Command-line words such as `--optim adafactor`.

    Raises:
        ValueError: A flag is unknown, or is replaced by a flag of train_t5.py.
    """
    names = [flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    for name in names:
        if name in REFUSED_FLAGS:
            raise ValueError(f"--{name} is not supported: {REFUSED_FLAGS[name]}")
    arguments: Any = TrainingArguments
    # Making TrainingArguments here would set up DeepSpeed and other state of the process.
    known, unknown = HfArgumentParser(arguments, allow_abbrev=False).parse_known_args(
        ["--output_dir", "unused", *flags]
    )
    if unknown:
        raise ValueError(f"{unknown[0]} is neither a flag of this script nor of transformers.TrainingArguments")
    return {name: getattr(known, name) for name in names}


def is_sharded(flags: Mapping[str, Any]) -> bool:
    """Return whether flags of `TrainingArguments` shard the weights over GPUs: FSDP, or DeepSpeed's ZeRO stage 3."""
    if flags.get("fsdp"):
        return True
    config = flags.get("deepspeed")
    if isinstance(config, str) and os.path.isfile(config):
        with open(config, encoding="utf-8") as file:
            config = json.load(file)
    return isinstance(config, dict) and config.get("zero_optimization", {}).get("stage") == 3


# ------------------------------------------------------------------------------------------------------------- files


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
    from matplotlib.figure import Figure

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
    if not losses:
        return
    figure = Figure(figsize=(10 if rows else 5, 4), layout="constrained")
    panels = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
    panels[0].plot(*zip(*losses, strict=True))
    panels[0].set(xlabel="step", ylabel="training loss")
    plotted = PLOTTED if first_stage.keys() >= set(PLOTTED) else list(first_stage)[:2]
    for name, color in zip(plotted, ("tab:blue", "tab:orange"), strict=False) if rows else ():
        if rows[-1][name] is None:
            continue
        panels[1].plot([row["step"] for row in rows], [row[name] for row in rows], "o-", color=color, label=name)
        panels[1].axhline(first_stage[name], linestyle=":", color=color, label=f"{name}, first stage")
        panels[1].set(xlabel="step")
        panels[1].legend()
    with atomic_write(os.path.join(output_dir, "learning_curve.png"), "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def move_model(source: str, output_dir: str) -> None:
    """Move a saved model's files into the output folder, config.json last: a folder without it is not a model."""
    for name in sorted(os.listdir(source), key=lambda name: name == "config.json"):
        os.replace(os.path.join(source, name), os.path.join(output_dir, name))
    os.rmdir(source)
