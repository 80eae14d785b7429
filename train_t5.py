r"""Stage 4: fine-tune a reranker on the triples and evaluate it on a dev set during training.

Reads   triples; for an evaluation every --eval_steps also topics, qrels, a first-stage run and the collection
Writes  into --output_dir: the model, its card (README.md), checkpoint-N folders, results.csv, learning_curve.png

    python train_t5.py --base_model t5_base --triples_train data/msmarco/synthetic.triples.train.tsv \
        --corpus data/msmarco/collection.tsv --queries data/msmarco/topics.msmarco-passage.dev-subset.txt \
        --qrels data/msmarco/qrels.msmarco-passage.dev-subset.txt --run data/msmarco/run.bm25.dev.small.tsv \
        --output_dir data/msmarco --save_every_n_steps 156 --eval_steps 156
    torchrun --nproc_per_node=2 -- train_t5.py ...           # two GPUs, the same 128 examples per step

After a kill, the same command resumes from the last complete checkpoint. Other settings are refused; --restart deletes
the earlier training. Without judgements, --holdout replaces topics and qrels: synthetic queries from
generate_triples_train.py --holdout, whose source documents are relevant. BM25 retrieves their hits from --index, or
--run has them.

The config of the base model decides what is trained: T5, mT5 and Flan-T5 become monoT5, an encoder becomes a
cross-encoder, and a causal model with Qwen3's tokens learns to answer yes or no as Qwen3-Reranker does. The defaults
are the paper's (arXiv 2202.05144), with the learning rate of its released scripts. Any other flag is passed to
transformers.TrainingArguments: --lr_scheduler_type linear, --activation_checkpointing True, --optim adafactor, ...
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inpars_lib.bm25.config import BM25Config
from inpars_lib.cli import InputError, at_least, between, counted, report, run_script, script_parser, shorten, warn
from inpars_lib.evaluation import MEASURES, add_measure_flags, check_threshold, format_value
from inpars_lib.files import exclusive, file_sha256, resolve_output
from inpars_lib.first_stage import add_remove_query_flag, advise_remove_query
from inpars_lib.processes import ProcessGroup
from inpars_lib.resume import add_restart_flag
from inpars_lib.training.checkpoints import RECORD, DataFile, TrainingFolder, check_inputs
from inpars_lib.training.dev_set import DevSet, read_held_out_queries, read_judged_queries
from inpars_lib.training.examples import TrainingExamples, TripleFile
from inpars_lib.training.losses import LOSSES, LOSSES_OF_TRIPLES

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from inpars_lib.rerankers.base import Reranker
    from inpars_lib.training.trainer import RerankerTrainer

DATA = ("triples_train", "holdout", "queries", "qrels", "run")  # flags of the files that a resumed training must repeat
# Flags that a resumed training need not repeat. A change of collection or index shows in the files of DATA.
FREE = {*DATA, "corpus", "index", "output_dir", "save_every_n_steps", "logging_steps", "report_to", "restart",
        "resume_from_checkpoint", "query_model"}  # fmt: skip
TRAINER_DEFAULTS = {"lr_scheduler_type": "constant_with_warmup"}  # of transformers.TrainingArguments, where ours differ

FEW_STEPS = 50  # a training with fewer steps gets a warning
BY_MEASURE = ("reduce_lr_on_plateau", "greedy")  # schedulers that need a measure to follow


def one_line(word: str) -> str:
    """Return a text on one line (an argparse type)."""
    return " ".join(word.split())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--base_model", default="t5_base", help="folder, hub name, or t5_SIZE (default: %(default)s)")
    add("--triples_train", required=True, help="training triples, TSV")
    add("--output_dir", required=True, help="folder for the model, its checkpoints and results")
    add("--loss", choices=list(LOSSES), default="pointwise", help="pointwise: each example alone, as in the paper; "
        "pairwise: positive against negative; listwise: softmax over a positive and its n negatives in adjacent "
        "triples, as in RankT5 (default: %(default)s)")  # fmt: skip
    add("--epochs", type=at_least(0.001, float), default=1, help="passes over the triples (default: %(default)s)")
    add("--learning_rate", type=at_least(0, float), default=3e-4, help="peak; constant unless --lr_scheduler_type "
        "(default: 3e-4)")  # fmt: skip
    add("--per_device_train_batch_size", type=at_least(2), default=8, help="examples per batch; with --loss listwise a "
        "multiple of 1 + n, for n negatives per query (default: %(default)s)")  # fmt: skip
    add("--gradient_accumulation_steps", type=at_least(1), default=16, help="batches per step, shared by the processes "
        "of torchrun (default: %(default)s)")  # fmt: skip
    add("--max_length", type=at_least(1), default=512, help="tokens of the input; longer ones lose text (default: 512)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision in bfloat16 (default: on a CPU that is "
        "fast at it, with AVX512-BF16 or AMX)")  # fmt: skip
    add_restart_flag(add)
    add_optimization_flags(parser.add_argument_group("optimization").add_argument)
    add_checkpoint_flags(parser.add_argument_group("checkpoints, logs and card").add_argument)
    add_evaluation_flags(parser.add_argument_group("evaluation during training").add_argument)
    return parser


def add_optimization_flags(add: Callable[..., Any]) -> None:
    """Add the flags of the optimizer and of what the model learns to answer."""
    number = at_least(0, float)
    add("--max_steps", type=at_least(1), help="steps in all, instead of --epochs")
    add("--warmup_steps", "--warmup_ratio", type=number, default=0, help="steps of linear warm-up, or "
        "their share of all steps if below 1 (default: %(default)s)")  # fmt: skip
    add("--weight_decay", type=number, default=5e-5, help="AdamW's, not for biases and norms (default: %(default)s)")
    add("--lora_rank", type=at_least(1), metavar="R", help="rank of LoRA's adapters, which are trained instead "
        "of all weights and merged at the end (needs the package peft)")  # fmt: skip
    add("--seed", type=between(0, 2**32 - 1, int), default=2, help="seed of order, dropout and new weights "
        "(default: %(default)s)")  # fmt: skip
    add("--token_true", help="T5-like models: target word for relevant (default: true, or yes for mT5)")
    add("--token_false", help="T5-like models: target word for not relevant (default: false, or no for mT5)")
    add("--instruction", metavar="TEXT", help="causal models: task that the model reads before the query (default: the "
        "base model's own, or web search)")  # fmt: skip


def add_checkpoint_flags(add: Callable[..., Any]) -> None:
    """Add the flags of what a training writes beside the model."""
    add("--save_every_n_steps", type=at_least(1), default=100, help="steps per checkpoint (default: %(default)s)")
    add("--resume_from_checkpoint", nargs="?", metavar="CHECKPOINT", help="resume from this checkpoint (default: the "
        "last complete one in --output_dir, if any)")  # fmt: skip
    add("--logging_steps", type=at_least(1), default=10, help="steps per logged loss (default: %(default)s)")
    add("--report_to", choices=("none", "tensorboard", "wandb"), default="none", help="where else to log losses and "
        "measures, beside results.csv (default: %(default)s)")  # fmt: skip
    add(
        "--query_model",
        type=one_line,
        metavar="NAME",
        help="language model that wrote the queries, for the card of the model",
    )


def add_evaluation_flags(add: Callable[..., Any]) -> None:
    """Add the flags of the dev set and of what follows from its measures."""
    add("--queries", help="topics of the dev set: a file or a BEIR folder")
    add("--qrels", help="relevance judgements of the dev set: a file or a BEIR folder")
    add("--run", help="first-stage run of the dev topics or of --holdout: TREC, MS MARCO or ColBERT format")
    add("--corpus", help="collection of the run or of the index")
    add("--holdout", help="held-out synthetic queries instead of --queries and --qrels")
    add("--index", help="BM25 index to retrieve hits for --holdout, if there is no --run")
    add_measure_flags(add)
    add_remove_query_flag(add)
    add("--max_eval_queries", type=int, default=-1, help="use the first judged queries only (default: all)")
    add("--max_eval_docs_per_query", type=at_least(1), default=100, help="hits per query to rerank "
        "(default: %(default)s)")  # fmt: skip
    add("--eval_steps", type=at_least(1), default=100, help="steps per evaluation (default: %(default)s)")
    add("--select_by", metavar="MEASURE", help="keep the checkpoint that is best by this one of --measures, not the "
        "last")  # fmt: skip
    add("--early_stopping_patience", type=at_least(1), metavar="N", help="stop after N evaluations without a better "
        "one; needs --select_by")  # fmt: skip


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the flags, check how they combine, and return them with those of transformers.TrainingArguments."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    args.output_dir = resolve_output(args.output_dir)
    trainer_flags: dict[str, Any] = dict(TRAINER_DEFAULTS)
    if others:
        from inpars_lib.training.trainer import parse_trainer_flags

        try:
            trainer_flags |= parse_trainer_flags(others)
        except ValueError as error:
            parser.error(str(error))
    for problem in find_problems(args, trainer_flags):
        parser.error(problem)
    return args, trainer_flags


def is_sharded(flags: dict[str, Any]) -> bool:
    """Return whether flags of `TrainingArguments` shard the weights over GPUs: FSDP, or DeepSpeed's ZeRO stage 3."""
    config = flags.get("deepspeed") or ""  # a file, or JSON
    text = Path(config).read_text(encoding="utf-8") if os.path.isfile(config) else config
    return bool(flags.get("fsdp") or re.search(r'"stage":\s*3', text))


def find_problems(args: argparse.Namespace, trainer_flags: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with flags that do not fit each other or this machine."""
    judged, held_out = args.queries or args.qrels, args.holdout or args.index
    judged_complete = args.queries and args.qrels and args.run and args.corpus
    held_out_complete = args.holdout and args.corpus and bool(args.index) != bool(args.run)
    scheduler = trainer_flags["lr_scheduler_type"]
    if held_out and (judged or not held_out_complete):
        yield "--holdout needs --corpus and one of --index and --run, and excludes --queries and --qrels"
    if not held_out and (judged or args.run) and not judged_complete:
        yield "an evaluation needs all of --queries, --qrels, --run and --corpus"
    for flag, given in (("--select_by", args.select_by), ("--measures", args.measures != MEASURES)):
        if given and not (judged or held_out):
            yield f"{flag} needs --queries, --qrels, --run and --corpus, or --holdout with its own flags"
    if args.select_by and args.select_by not in args.measures:
        yield f"--select_by {args.select_by}: not one of --measures. Choose from {', '.join(args.measures)}"
    if args.early_stopping_patience and not args.select_by:
        yield "--early_stopping_patience needs --select_by"
    if (judged or held_out) and is_sharded(trainer_flags):
        yield "an evaluation needs the whole model on each GPU: omit --fsdp, and use ZeRO stage 1 or 2"
    if scheduler in BY_MEASURE and not args.select_by:
        yield f"--lr_scheduler_type {' and '.join(BY_MEASURE)} need --select_by"
    if scheduler in ("constant", *BY_MEASURE) and args.warmup_steps:
        yield "this --lr_scheduler_type has no warm-up: omit --warmup_steps, or use constant_with_warmup"
    for flag, given, package in (
        ("--lora_rank", args.lora_rank, "peft==0.21.2"),
        ("--use_liger_kernel", trainer_flags.get("use_liger_kernel"), "liger_kernel"),
        (f"--report_to {args.report_to}", args.report_to != "none", args.report_to),
    ):
        if given and not find_spec(package.partition("=")[0]):
            yield f"{flag} needs this package: pip install {package}"
    if args.lora_rank and trainer_flags.keys() & {"fsdp", "deepspeed"}:
        yield "--lora_rank excludes --fsdp and --deepspeed: adapters are merged on one GPU"
    if args.loss in LOSSES_OF_TRIPLES and args.per_device_train_batch_size % 2:
        yield "--per_device_train_batch_size must be even: a triple is a positive and a negative example"
    if bool(args.token_true) != bool(args.token_false):
        yield "--token_true and --token_false need each other"
    if args.remove_query and not args.queries:
        yield "--remove_query needs --queries"
    if args.restart and args.resume_from_checkpoint:
        yield "--restart deletes the checkpoints, so it excludes --resume_from_checkpoint CHECKPOINT"
    if args.output_dir == "-":
        yield "--output_dir is a folder, not standard output"


def read_dev(args: argparse.Namespace, threshold: int) -> DevSet | None:
    """Return the dev set that the flags name, or None."""
    n, k = args.max_eval_queries, args.max_eval_docs_per_query
    if args.holdout:
        dev = read_held_out_queries(args.holdout, args.index, None, BM25Config(), k, args.run).first(n)
    elif args.queries:
        dev = read_judged_queries(args.queries, args.qrels, args.run, n, k, args.remove_query)
        advise_remove_query(dev.run, dev.topics, args.corpus)
    else:
        return None
    check_threshold(dev.qrels, threshold, args.holdout or args.qrels, args.select_by, args.measures)
    return dev.with_texts(args.corpus)


def data_files(args: argparse.Namespace) -> dict[str, DataFile]:
    """Return name and hash of each file of DATA by flag."""
    paths = {flag: getattr(args, flag) for flag in DATA if getattr(args, flag)}
    return {
        flag: DataFile(Path(path).name, file_sha256(path) if os.path.isfile(path) else "")
        for flag, path in paths.items()
    }


def use_bfloat16(wanted: bool | None, fp16: bool) -> bool:
    """Return whether to train in bfloat16: as wanted, by default on a CPU that is fast at it.

    Raises:
        InputError: float16 is wanted on a CPU.
    """
    import torch

    from inpars_lib.rerankers.load import has_fast_bfloat16

    on_cpu = not torch.cuda.is_available()
    if fp16 and on_cpu:
        raise InputError("--fp16: needs a GPU. Omit the flag, or use --bf16.")
    if wanted is not None:
        return wanted
    return on_cpu and has_fast_bfloat16("cpu")


def training_arguments(
    args: argparse.Namespace, trainer_flags: dict[str, Any], examples: TrainingExamples, bf16: bool, processes: int
) -> "TrainingArguments":
    """Return the hyperparameters as transformers takes them."""
    import torch
    from transformers import TrainingArguments

    items_per_batch = examples.items_per_batch(args.per_device_train_batch_size)
    steps_per_epoch = math.ceil(len(examples) / (items_per_batch * args.gradient_accumulation_steps))
    hyperparameters = {
        "output_dir": args.output_dir,
        "max_steps": args.max_steps or math.ceil(round(args.epochs * steps_per_epoch, 6)),
        "per_device_train_batch_size": items_per_batch,
        "gradient_accumulation_steps": args.gradient_accumulation_steps // processes,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "steps" if args.queries or args.holdout else "no",
        "eval_steps": args.eval_steps,
        # Any evaluated step may turn out to be the best, so all of them are saved.
        "save_steps": args.eval_steps if args.select_by else args.save_every_n_steps,
        "load_best_model_at_end": bool(args.select_by),
        "metric_for_best_model": args.select_by,
        "greater_is_better": True if args.select_by else None,
        "logging_steps": args.logging_steps,
        "seed": args.seed,
        "remove_unused_columns": False,
        "report_to": args.report_to,
        "disable_tqdm": False,  # transformers would derive True from our log level
    }
    return TrainingArguments(**hyperparameters | trainer_flags)


def load_base_model(args: argparse.Namespace, bf16: bool) -> "Reranker":
    """Return the model to train, in float32 on the CPU."""
    import torch
    from transformers import set_seed

    from inpars_lib.rerankers.load import load_reranker

    set_seed(args.seed)  # before a new output layer is initialized
    reranker = load_reranker(
        args.base_model,
        max_length=args.max_length,
        device="cpu",
        dtype="float32",
        targets=(args.token_true, args.token_false) if args.token_true else None,
        new_head=True,
        instruction=args.instruction,
    )
    if bf16 and not torch.cuda.is_available():  # PyTorch's fused attention computes in float32 there
        reranker.model.set_attn_implementation("eager")
    return reranker


def report_start(args: argparse.Namespace, trainer: "RerankerTrainer", checkpoint: str | None) -> None:
    """Print what is trained on what, and the measures of the first stage."""
    examples, steps, per_step = trainer.examples, trainer.args.max_steps, trainer.config.examples_per_step
    family = type(trainer.reranker).__name__
    grouped = args.loss not in LOSSES_OF_TRIPLES
    groups = f" in {len(examples):,} groups of at most {examples.group_size} examples" if grouped else ""
    resumed = f", resumed from {checkpoint}" if checkpoint else ""
    report(
        f"Training {family} from {args.base_model}: {counted(len(examples.triples), 'triple')}{groups}, {per_step} "
        f"examples per step, {counted(steps, 'step')}{resumed}"
    )
    if args.loss == "listwise" and examples.group_size == 2:
        warn(f"{args.triples_train}: one negative per query, so --loss {args.loss} equals pairwise. Sample more with "
             "generate_triples_train.py --n_samples, and keep the triples of a query adjacent.")  # fmt: skip
    if steps < FEW_STEPS:
        warn(f"{counted(steps, 'step')} of {per_step} examples: rerankers learn little before {FEW_STEPS} steps. Lower "
             "--gradient_accumulation_steps, or raise --epochs.")  # fmt: skip
    if args.warmup_steps >= steps:
        warn(f"--warmup_steps {args.warmup_steps:g}: the training has {counted(steps, 'step')}, so the learning rate "
             "does not reach --learning_rate.")  # fmt: skip
    if trainer.args.fp16 and family == "MonoT5":
        warn("--fp16: activations of T5 can exceed the range of float16. Use --bf16.")
    if trainer.dev:
        measures = ", ".join(f"{name} {format_value(value)}" for name, value in trainer.first_stage.items())
        report(f"first stage: {measures}")


def refused_flags(trainer_flags: dict[str, Any], error: Exception) -> InputError:
    """Return the error for flags of `TrainingArguments` that transformers does not accept."""
    given = [f"--{name} {value}" for name, value in trainer_flags.items() if TRAINER_DEFAULTS.get(name) != value]
    named = f" ({shorten(' '.join(given))})" if given else ""
    return InputError(f"transformers refuses these flags: {shorten(error)}{named}. Correct or omit them.")


def run_training(trainer: "RerankerTrainer", checkpoint: str | None, trainer_flags: dict[str, Any]) -> None:
    """Train the model.

    Raises:
        InputError: The training failed before its first step, probably because of a flag of `TrainingArguments`.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        if checkpoint or trainer.state.global_step > 0 or trainer_flags == TRAINER_DEFAULTS:
            raise
        raise refused_flags(trainer_flags, error) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, then train while no other process writes to --output_dir."""
    group = ProcessGroup.from_environment()
    if group.size == 1:  # without torchrun the Trainer would use all GPUs that it sees, with larger batches
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    args, trainer_flags = parse_args(argv)
    if args.gradient_accumulation_steps % group.size:
        raise InputError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: not divisible by {group.size} "
            f"processes. Choose a multiple of {group.size}."
        )
    paths = {f"--{flag}": getattr(args, flag) for flag in (*DATA, "corpus", "index")}
    check_inputs(args.output_dir, args.base_model, paths)
    group.check_inputs(*paths.values())
    with exclusive(os.path.join(args.output_dir, RECORD)) if group.rank == 0 else nullcontext():
        train(args, trainer_flags, group)
    group.close()


def train(args: argparse.Namespace, trainer_flags: dict[str, Any], group: ProcessGroup) -> None:
    """Read the data, train, save the model with its card."""
    from inpars_lib.training.model_card import model_card
    from inpars_lib.training.trainer import RerankerTrainer, TrainingConfig

    # 1. Where this run starts: base model, checkpoint or nowhere
    bf16 = use_bfloat16(args.bf16, bool(trainer_flags.get("fp16")))
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {"measures": " ".join(args.measures), "bf16": bf16, **trainer_flags}
    folder = TrainingFolder(args.output_dir, settings, data_files(args))
    start = folder.find_start(args.restart, args.resume_from_checkpoint)
    if start.finished is not None:
        if group.rank == 0:
            report(f"{args.output_dir}: training is finished, model of step {start.finished:,}")
        return

    # 2. The data
    threshold = 1 if args.holdout else args.relevance_threshold  # source documents of held-out queries have grade 1
    dev = read_dev(args, threshold)
    examples = TrainingExamples(TripleFile(args.triples_train), args.loss)

    # 3. The model
    reranker = load_base_model(args, bf16)

    # 4. The recipe
    examples_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    evaluation = threshold, args.measures, args.select_by, args.early_stopping_patience
    config = TrainingConfig(args.loss, examples_per_step, args.seed, *evaluation, args.lora_rank)
    try:
        arguments = training_arguments(args, trainer_flags, examples, bf16, group.size)
        trainer = RerankerTrainer(reranker, examples, config, arguments, dev)
        trainer.check_flags()
    except (ImportError, TypeError, ValueError) as error:
        raise refused_flags(trainer_flags, error) from None

    # 5. Training
    if group.rank == 0:
        if start.checkpoint is None:
            folder.begin()
        report_start(args, trainer, start.checkpoint)
    if start.trained:
        trainer.load_trained(str(start.checkpoint), start.trained)
    else:
        run_training(trainer, start.checkpoint, trainer_flags)

    # 6. The model and its card
    trainer.save_reranker(folder.unfinished)
    if group.rank == 0:
        trainer.write_results()
        folder.publish(trainer.chosen_step, model_card(folder.record, trainer, args.query_model))
        report(f"{args.output_dir}: model of step {trainer.chosen_step:,}")


if __name__ == "__main__":
    run_script(main, interrupted="Run the same command again to resume from the last checkpoint.")
