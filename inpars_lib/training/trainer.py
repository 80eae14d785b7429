"""The Trainer that evaluates by reranking, and its flags."""

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainerState, TrainingArguments

from inpars_lib.cli import InputError, shorten
from inpars_lib.evaluation import MEASURES, evaluate_per_query, mean_values
from inpars_lib.formats.runs import Run, rerank_hits
from inpars_lib.rerankers.base import OUT_OF_MEMORY, Reranker
from inpars_lib.rerankers.scoring import scores_by_query
from inpars_lib.training.checkpoints import check_weights, checkpoint_folder, stopped_early, write_results
from inpars_lib.training.dev_set import DevSet
from inpars_lib.training.examples import LengthSortedSampler, TrainingExamples
from inpars_lib.training.lora import add_adapters
from inpars_lib.training.losses import LOSSES

OTHER_CHECKPOINT = "Delete this checkpoint, and run the same command again to resume from the one before."
# Flags of transformers.TrainingArguments that something else replaces, or that would do nothing or harm
REFUSED_FLAGS = {
    "use --epochs": "num_train_epochs",
    "use --save_every_n_steps or --select_by": "save_strategy save_steps",
    "use --select_by": "load_best_model_at_end metric_for_best_model greater_is_better",
    "use --seed": "data_seed",
    "use --loss": "label_smoothing_factor",
    "use --per_device_train_batch_size": "auto_find_batch_size",
    "start the processes with torchrun": "local_rank",
    "use --report_to": "trackio_space_id trackio_bucket_id trackio_static_space_id",
    "this script trains, and evaluates with --queries or --holdout": "do_train do_eval do_predict eval_strategy",
    "the first stage is measured at the start": "eval_on_start",
    "an evaluation reranks, in batches of similar lengths": "per_device_eval_batch_size prediction_loss_only "
    "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics "
    "bf16_full_eval fp16_full_eval",
    "a training cannot be resumed without its optimizer": "save_only_model",
    "a resumed training goes on with the examples that it has not seen": "ignore_data_skip",
    "the examples of each step are sorted by length": "train_sampling_strategy group_by_length length_column_name",
    "all examples of an epoch are used": "dataloader_drop_last",
    "examples have no columns": "remove_unused_columns label_names",
    "publish the model after training: hf upload YOU/NAME MODEL --exclude 'checkpoint-*/*'": "push_to_hub hub_model_id "
    "hub_token hub_strategy hub_private_repo hub_always_push hub_revision",
}


@dataclass(frozen=True)
class TrainingConfig:
    """What the Trainer needs beside `transformers.TrainingArguments`.

    Attributes:
        loss: A name in `LOSSES`.
        examples_per_step: Examples of an optimizer step, over all processes and accumulated batches.
        seed: Seed of the order of examples.
        relevance_threshold: Lowest relevant grade of the evaluation.
        measures: Names of the measures.
        select_by: The measure whose best step is published, or None for the last step.
        early_stopping_patience: Evaluations without a better one that end the training, or None.
        lora_rank: Rank of the adapters to train, or None to train all weights.
    """

    loss: str = "pointwise"
    examples_per_step: int = 128
    seed: int = 2
    relevance_threshold: int = 1
    measures: tuple[str, ...] = MEASURES
    select_by: str | None = None
    early_stopping_patience: int | None = None
    lora_rank: int | None = None


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
        reranker.model.config.inpars = {"max_length": reranker.max_length, "instruction": reranker.instruction}
        reranker.tokenizer.model_max_length = reranker.max_length  # other packages truncate to this length
        if reranker.model.config.model_type == "t5":
            reranker.model.config.n_positions = reranker.max_length  # PyTerrier-T5 truncates to this length
        super().__init__(
            model=add_adapters(reranker, config.lora_rank) if config.lora_rank else reranker.model,
            processing_class=reranker.tokenizer,  # saved beside the model
            args=arguments,
            train_dataset=examples,
            eval_dataset=list(dev.run) if dev else None,
            data_collator=self.collate,
            callbacks=[TrainingFlow(config, dev is not None)],
        )
        self.first_stage = self._measure(dev.run) if dev else {}

    def _measure(self, run: Run) -> dict[str, float]:
        """Return the mean of each measure over the dev set's queries."""
        assert self.dev is not None
        config = self.config
        return mean_values(evaluate_per_query(self.dev.qrels, run, config.relevance_threshold, config.measures))

    def check_flags(self) -> None:
        """Create optimizer, scheduler and data loader once, so that a wrong flag fails before the training starts.

        Raises:
            ValueError, TypeError, ImportError: A flag has a wrong value or needs a package.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # their optimizers need the wrapped model
            self.create_optimizer_and_scheduler(self.args.max_steps)
            self.optimizer = self.lr_scheduler = None
        self.get_train_dataloader()

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of the next step, and remember how many items they have."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._items_in_step = sum(map(count_items, batches))
        return batches, count

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch: the model's own, or that of `LOSSES`.

        The Trainer divides the sum of a step's losses by the number of batches. The loss is multiplied by a factor, so
        that each item of the step has the same weight although the last batch of an epoch can be smaller.
        """
        loss_function = LOSSES[self.config.loss]
        factor = count_items(inputs) * self.current_gradient_accumulation_steps / self._items_in_step
        if not loss_function:
            return self.reranker.loss(model, inputs) * factor
        sizes = inputs.pop("group_sizes").tolist()
        logits = list(torch.split(self.reranker.relevance_logits(model, inputs), sizes))
        groups = torch.nn.utils.rnn.pad_sequence(logits, batch_first=True, padding_value=-math.inf)
        return loss_function(groups) * factor

    def _check_finite(self, name: str, value: torch.Tensor) -> None:
        if not bool(value.isfinite().all()):
            raise InputError(
                f"{self.args.output_dir}: the training diverged, {name} of step {self.state.global_step + 1:,} is not "
                "finite. Lower --learning_rate, raise --warmup_steps, or use --no-bf16, and add --restart."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the gradients of a batch and return its loss, which must be finite."""
        try:
            loss = super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            raise InputError(
                f"{self.args.output_dir}: out of memory in step {self.state.global_step + 1:,}. Lower "
                "--per_device_train_batch_size and raise --gradient_accumulation_steps by the same factor, or add "
                "--activation_checkpointing True; and add --restart."
            ) from None
        self._check_finite("the loss", loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm: Any = super()._get_grad_norm(*args, **kwargs)  # type: ignore[no-untyped-call]
        if not self.args.fp16:  # whose gradient scaler skips steps with infinite gradients
            self._check_finite("the gradient", torch.as_tensor(norm))
        return norm

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Rerank the dev set and return its measures, with the prefix `eval_`."""
        dev = self.dev
        assert dev is not None
        mine = list(dev.run)[self.args.process_index :: self.args.world_size]
        shard = {query_id: dev.run[query_id] for query_id in mine}
        pairs = [(dev.topics[query_id], dev.texts[hit.doc_id]) for query_id, hits in shard.items() for hit in hits]
        with self.accelerator.autocast():
            values = self.reranker.score(pairs)
        scores = dict(gather_object(list(scores_by_query(shard, values).items())))
        run = {query_id: rerank_hits(hits, scores[query_id]) for query_id, hits in dev.run.items()}
        metrics = {f"eval_{name}": value for name, value in self._measure(run).items() if not math.isnan(value)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.write_results()
        return metrics

    @property
    def chosen_step(self) -> int:
        """The step whose weights the model has after the training."""
        best = self.state.best_global_step if self.config.select_by else None
        return best or self.state.global_step

    def _load_best_model(self) -> None:
        check_weights(str(self.state.best_model_checkpoint))  # transformers would only log that they are gone
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer, the latter without the truncation of the last text that it has read."""
        with suppress(FileNotFoundError):  # a checkpoint that is written again is incomplete until its end
            os.remove(os.path.join(str(output_dir), "trainer_state.json"))
        for name, weight in self.reranker.model.named_parameters():
            self._check_finite(name, weight)
        tokenizer = self.reranker.tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(str(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # they have other files
            for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):  # transformers would start them anew
                if not any(Path(checkpoint).glob(pattern)):
                    raise InputError(f"{checkpoint}: {pattern} is missing. {OTHER_CHECKPOINT}")
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json, which follows, says that a checkpoint is complete

    def load_trained(self, checkpoint: str, weights: str) -> None:
        """Take a complete training's state from its last checkpoint and the weights from the chosen one."""
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        self._load_from_checkpoint(weights)

    def save_reranker(self, folder: str) -> None:
        """Save the trained model as other tools load it, adapters merged."""
        if self.config.lora_rank:
            self.model = self.model.merge_and_unload()  # type: ignore[union-attr, operator]
        with saving(folder):
            self.save_model(folder)

    def write_results(self) -> None:
        """Write results.csv and learning_curve.png into the output folder, in the main process only."""
        if self.is_world_process_zero():
            write_results(str(self.args.output_dir), self.state.log_history, self.first_stage)


@contextmanager
def loading(checkpoint: str | None) -> Iterator[None]:
    """Turn any error of a checkpoint's files into one for the user."""
    try:
        yield
    except Exception as error:  # each library has exceptions of its own
        problem = f"damaged, or of another model ({shorten(error) or type(error).__name__})"
        raise InputError(f"{checkpoint}: {problem}. {OTHER_CHECKPOINT}") from None


@contextmanager
def saving(folder: str) -> Iterator[None]:
    """Turn errors of a full disk, which torch and safetensors report in their own way, into one for the user."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        action = "Check the free disk space, and run the same command again to resume."
        raise InputError(f"{folder}: cannot save the model ({shorten(error)}). {action}") from None


def count_items(batch: Mapping[str, Any]) -> int:
    """Return the items of a batch: its examples, or its groups for the losses of groups."""
    return len(batch["group_sizes"] if "group_sizes" in batch else batch["labels"])


class TrainingFlow(TrainerCallback):
    """What the Trainer does after a step: log, evaluate, stop. All of it depends on what checkpoints carry only."""

    def __init__(self, config: TrainingConfig, evaluates: bool) -> None:
        self.config, self.evaluates = config, evaluates

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the best checkpoint as it is called now: its folder may have another path than before a resume."""
        if self.config.select_by and state.best_global_step:
            state.best_model_checkpoint = checkpoint_folder(str(args.output_dir), state.best_global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate after the last step, and log the loss at each checkpoint so that a resumed run has it."""
        control.should_evaluate |= self.evaluates and state.global_step >= state.max_steps
        control.should_log |= control.should_save

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop early."""
        if stopped_early(state.log_history, self.config.select_by, self.config.early_stopping_patience):
            control.should_training_stop = True


def parse_trainer_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Return the values of flags of `transformers.TrainingArguments` by name.

    Args:
        flags: Command-line words such as `--optim adafactor`.

    Raises:
        ValueError: A flag is unknown, or is replaced by a flag of train_t5.py.
    """
    names = [flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    for reason, refused in REFUSED_FLAGS.items():
        for name in {*names} & {*refused.split()}:
            raise ValueError(f"--{name} is not supported: {reason}")
    arguments: Any = TrainingArguments
    # Making TrainingArguments here would set up DeepSpeed and other state of the process.
    parser: Any = HfArgumentParser(arguments, allow_abbrev=False, exit_on_error=False)
    try:
        known, unknown = parser.parse_known_args(["--output_dir", "unused", *flags])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if unknown:
        raise ValueError(f"{unknown[0]} is neither a flag of this script nor of transformers.TrainingArguments")
    return {name: getattr(known, name) for name in names}
