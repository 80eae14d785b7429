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
transformers.TrainingArguments: --lr_scheduler_type linear, --gradient_checkpointing True, --optim adafactor, ...
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inpars_lib.bm25.config import BM25Config
from inpars_lib.cli import InputError, at_least, run_script, script_parser, warn
from inpars_lib.evaluation import MEASURES, add_measure_flags, check_threshold, format_value
from inpars_lib.files import exclusive, file_sha256, resolve_output
from inpars_lib.first_stage import add_remove_query_flag, advise_remove_query
from inpars_lib.processes import ProcessGroup
from inpars_lib.resume import add_restart_flag
from inpars_lib.training.checkpoints import RECORD, UNFINISHED, DataFile, TrainingFolder, check_inputs
from inpars_lib.training.dev_set import DevSet, read_held_out_queries, read_judged_queries
from inpars_lib.training.examples import TrainingExamples, TripleFile
from inpars_lib.training.losses import LOSSES

if TYPE_CHECKING:
    from inpars_lib.training.trainer import RerankerTrainer

DATA = ("triples_train", "holdout", "queries", "qrels", "run")  # flags of the files that a resumed training must repeat
# Flags that a resumed training need not repeat. Collection and index belong to the files of DATA.
FREE = {*DATA, "corpus", "index", "output_dir", "save_every_n_steps", "logging_steps", "report_to", "restart",
        "resume_from_checkpoint"}  # fmt: skip

FEW_STEPS = 50  # below, a warning


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--base_model", default="t5_base", help="folder, hub name, or t5_SIZE (default: %(default)s)")
    add("--triples_train", required=True, help="training triples, TSV")
    add("--output_dir", required=True, help="folder for the model, its checkpoints and results")
    add("--per_device_train_batch_size", type=at_least(2), default=8, help="examples per batch; with --loss listwise a "
        "multiple of 1 + n, for n negatives per query (default: %(default)s)")  # fmt: skip
    add("--gradient_accumulation_steps", type=at_least(1), default=16, help="batches per step, shared by the processes "
        "of torchrun (default: %(default)s)")  # fmt: skip
    add("--loss", choices=list(LOSSES), default="pointwise", help="pointwise: each example alone, as in the paper; "
        "pairwise: positive against negative; listwise: softmax over a positive and its n negatives in adjacent "
        "triples, as in RankT5 (default: %(default)s)")  # fmt: skip
    add("--learning_rate", type=float, default=3e-4, help="peak; constant unless --lr_scheduler_type (default: 3e-4)")
    add("--warmup_steps", "--warmup_ratio", type=at_least(0, float), default=0, help="steps of linear warm-up, or "
        "their share of all steps if below 1 (default: %(default)s)")  # fmt: skip
    add("--weight_decay", type=float, default=5e-5, help="AdamW's, not for biases and norms (default: %(default)s)")
    add("--epochs", type=at_least(0, float), default=1, help="passes over the triples (default: %(default)s)")
    add("--max_steps", type=int, default=-1, help="steps in all, instead of --epochs")
    add("--max_length", type=at_least(1), default=512, help="tokens of the input; longer ones lose text (default: 512)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision in bfloat16 (default: on a CPU that is "
        "fast at it, with AVX512-BF16 or AMX)")  # fmt: skip
    add("--seed", type=int, default=2, help="seed of order, dropout and new weights (default: %(default)s)")
    add("--lora_rank", type=at_least(1), metavar="R", help="rank of LoRA's adapters, which are trained instead "
        "of all weights and merged at the end (needs the package peft)")  # fmt: skip
    add("--token_true", help="T5-like models: target word for relevant (default: true, or yes for mT5)")
    add("--token_false", help="T5-like models: target word for not relevant (default: false, or no for mT5)")
    add("--instruction", metavar="TEXT", help="causal models: task that the model reads before the query (default: the "
        "base model's own, or web search)")  # fmt: skip
    add("--save_every_n_steps", type=at_least(1), default=100, help="steps per checkpoint (default: %(default)s)")
    add("--logging_steps", type=at_least(1), default=10, help="steps per logged loss (default: %(default)s)")
    add("--report_to", choices=("none", "tensorboard", "wandb"), default="none", help="where else to log losses and "
        "measures, beside results.csv (default: %(default)s)")  # fmt: skip
    add("--resume_from_checkpoint", nargs="?", metavar="CHECKPOINT", help="resume from this checkpoint (default: the "
        "last complete one in --output_dir, if any)")  # fmt: skip
    add_restart_flag(add)

    add = parser.add_argument_group("evaluation during training").add_argument
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
    return parser


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the flags, check how they combine, and return them with those of transformers.TrainingArguments."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    trainer_flags: dict[str, Any] = {}
    if others:
        from inpars_lib.training.trainer import parse_trainer_flags

        try:
            trainer_flags = parse_trainer_flags(others)
        except ValueError as error:
            parser.error(str(error))
    judged, held_out = [args.queries, args.qrels], [args.holdout, args.index]
    if any(held_out):
        if any(judged) or not (args.holdout and args.corpus and bool(args.index) != bool(args.run)):
            parser.error("--holdout needs --corpus and one of --index and --run, and excludes --queries and --qrels")
    elif any([*judged, args.run]) and not (all([*judged, args.run]) and args.corpus):
        parser.error("an evaluation needs all of --queries, --qrels, --run and --corpus")
    for flag, given in (("--select_by", args.select_by), ("--measures", args.measures != MEASURES)):
        if given and not any(judged + held_out):
            parser.error(f"{flag} needs --queries, --qrels, --run and --corpus, or --holdout with its own flags")
    if args.select_by and args.select_by not in args.measures:
        parser.error(f"--select_by {args.select_by}: not one of --measures. Choose from {', '.join(args.measures)}")
    if args.early_stopping_patience and not args.select_by:
        parser.error("--early_stopping_patience needs --select_by")
    if any(judged + held_out) and trainer_flags:
        from inpars_lib.training.trainer import is_sharded

        if is_sharded(trainer_flags):
            parser.error("an evaluation needs the whole model on each GPU: omit --fsdp, and use ZeRO stage 1 or 2")
    if trainer_flags.get("lr_scheduler_type") == "reduce_lr_on_plateau" and not args.select_by:
        parser.error("--lr_scheduler_type reduce_lr_on_plateau needs --select_by")
    if args.lora_rank and not find_spec("peft"):
        parser.error("--lora_rank needs this package: pip install peft==0.21.2")
    if args.lora_rank and trainer_flags.keys() & {"fsdp", "deepspeed"}:
        parser.error("--lora_rank excludes --fsdp and --deepspeed: adapters are merged on one GPU")
    if args.report_to != "none" and not find_spec(args.report_to):
        parser.error(f"--report_to {args.report_to} needs this package: pip install {args.report_to}")
    if args.loss != "listwise" and args.per_device_train_batch_size % 2:
        parser.error("--per_device_train_batch_size must be even: a triple is a positive and a negative example")
    if bool(args.token_true) != bool(args.token_false):
        parser.error("--token_true and --token_false need each other")
    if args.remove_query and not args.queries:
        parser.error("--remove_query needs --queries")
    if args.restart and args.resume_from_checkpoint:
        parser.error("--restart deletes the checkpoints, so it excludes --resume_from_checkpoint CHECKPOINT")
    args.output_dir = resolve_output(args.output_dir)
    return args, {"lr_scheduler_type": "constant_with_warmup", **trainer_flags}


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


def hyperparameters(
    args: argparse.Namespace,
    trainer_flags: dict[str, Any],
    *,
    bf16: bool,
    steps: int,
    items_per_batch: int,
    processes: int,
) -> dict[str, Any]:
    """Return the arguments of transformers.TrainingArguments."""
    import torch

    return {
        "output_dir": args.output_dir,
        "max_steps": steps,
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
        **trainer_flags,
    }


def report_start(args: argparse.Namespace, trainer: "RerankerTrainer", checkpoint: str | None) -> None:
    """Print what is trained on what, and the measures of the first stage."""
    examples, family = trainer.examples, type(trainer.reranker).__name__
    data = f"{len(examples.triples):,} triples"
    if args.loss == "listwise":
        data += f" in {len(examples):,} groups of at most {examples.group_size} examples"
    length = f"{trainer.config.examples_per_step} examples per step, {trainer.args.max_steps:,} steps"
    if checkpoint:
        length += f", resumed from {checkpoint}"
    print(f"Training {family} from {args.base_model}: {data}, {length}", file=sys.stderr)
    if args.loss == "listwise" and examples.group_size == 2:
        warn(f"{args.triples_train}: one negative per query, so --loss listwise equals pairwise. Sample more with "
             "generate_triples_train.py --n_samples, and keep the triples of a query adjacent.")  # fmt: skip
    steps = trainer.args.max_steps
    if steps < FEW_STEPS:
        warn(f"{steps} steps of {trainer.config.examples_per_step} examples are few: rerankers learn little before "
             f"{FEW_STEPS} steps. Lower --gradient_accumulation_steps, or raise --epochs.")  # fmt: skip
    if args.warmup_steps >= steps:
        warn(f"--warmup_steps {args.warmup_steps:g}: the training has {steps:,} steps, so the learning rate does not "
             "reach --learning_rate.")  # fmt: skip
    if trainer.args.fp16 and family == "MonoT5":
        warn("--fp16: activations of T5 can exceed the range of float16. Use --bf16.")
    if trainer.dev:
        measures = ", ".join(f"{name} {format_value(value)}" for name, value in trainer.first_stage.items())
        print(f"first stage: {measures}", file=sys.stderr)


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
    with exclusive(os.path.join(args.output_dir, RECORD)) if group.rank == 0 else nullcontext():
        train(args, trainer_flags, group)
    group.close()


def train(args: argparse.Namespace, trainer_flags: dict[str, Any], group: ProcessGroup) -> None:
    """Read the data, train, save the model with its card."""
    import torch
    from transformers import TrainingArguments, set_seed

    from inpars_lib.rerankers.load import has_fast_bfloat16, load_reranker
    from inpars_lib.training.model_card import model_card
    from inpars_lib.training.trainer import RerankerTrainer, TrainingConfig

    # 1. Where this run starts: base model, checkpoint or nowhere
    on_cpu, fp16 = not torch.cuda.is_available(), bool(trainer_flags.get("fp16"))
    if fp16 and on_cpu:
        raise InputError("--fp16: needs a GPU. Omit the flag, or use --bf16.")
    bf16 = on_cpu and has_fast_bfloat16("cpu") if args.bf16 is None else args.bf16
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {"measures": " ".join(args.measures), "bf16": bf16, **trainer_flags}
    folder = TrainingFolder(args.output_dir, settings, data_files(args))
    start = folder.find_start(args.restart, args.resume_from_checkpoint)
    if start.finished is not None:
        if group.rank == 0:
            print(f"{args.output_dir}: training is finished, model of step {start.finished:,}", file=sys.stderr)
        return

    # 2. The data
    threshold = 1 if args.holdout else args.relevance_threshold  # source documents of held-out queries have grade 1
    dev = read_dev(args, threshold)
    examples = TrainingExamples(TripleFile(args.triples_train), args.loss)
    items_per_batch = examples.items_per_batch(args.per_device_train_batch_size)
    steps_per_epoch = math.ceil(len(examples) / (items_per_batch * args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else max(1, math.ceil(round(args.epochs * steps_per_epoch, 6)))

    # 3. The model
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
    if bf16 and on_cpu:  # PyTorch's fused attention computes in float32 there
        reranker.model.set_attn_implementation("eager")

    # 4. The recipe
    recipe = hyperparameters(
        args, trainer_flags, bf16=bf16, steps=steps, items_per_batch=items_per_batch, processes=group.size
    )
    try:
        arguments = TrainingArguments(**recipe)
    except (ValueError, ImportError) as error:
        raise InputError(f"transformers.TrainingArguments refuses these flags: {error}") from None
    examples_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    evaluation = threshold, args.measures, args.select_by, args.early_stopping_patience
    config = TrainingConfig(args.loss, examples_per_step, args.seed, *evaluation, args.lora_rank)
    trainer = RerankerTrainer(reranker, examples, config, arguments, dev)

    # 5. Training
    if group.rank == 0:
        if start.checkpoint is None:
            folder.begin()
        report_start(args, trainer, start.checkpoint)
    if start.trained:
        trainer.load_trained(str(start.checkpoint), start.trained)
    else:
        trainer.train(resume_from_checkpoint=start.checkpoint)

    # 6. The model and its card
    unfinished = os.path.join(args.output_dir, UNFINISHED)
    trainer.save_reranker(unfinished)
    if group.rank == 0:
        trainer.write_results()
        Path(unfinished, "README.md").write_text(model_card(folder.record, trainer), encoding="utf-8")
        folder.publish(trainer.chosen_step)
        print(f"{args.output_dir}: model of step {trainer.chosen_step:,}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, interrupted="Run the same command again to resume from the last checkpoint.")
