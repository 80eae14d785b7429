"""Stage 4: fine-tune a reranker on the triples, and watch it on a development run as it learns.

Reads   triples; optionally topics, qrels, a first-stage run and the collection, to rerank that run every --eval_steps
Writes  into --output_dir the model and its card, checkpoint-N folders, results.csv (a row an evaluation) and
        learning_curve.png

    python train_t5.py --base_model t5_base --triples_train data/msmarco/synthetic.triples.train.tsv \\
        --corpus data/msmarco/collection.tsv --queries data/msmarco/topics.dl20.txt \\
        --qrels data/msmarco/qrels.dl20-passage.txt --run data/msmarco/run.dl20.bm25.txt --relevance_threshold 2 \\
        --output_dir data/msmarco --save_every_n_steps 156 --eval_steps 156

On two GPUs, with the same 128 examples a step:  torchrun --nproc_per_node=2 -- train_t5.py ...
After a kill, the same command with --resume_from_checkpoint goes on from the last whole checkpoint.

Without labels, --holdout takes the place of topics, qrels and run: synthetic queries that generate_triples_train.py
--holdout kept from training, to which BM25 on --index finds hits and whose own documents count as relevant.
--select_by nDCG@10 keeps the checkpoint that was best at it, instead of the last one.

The base model's config decides what is trained: T5, mT5, Flan-T5 become monoT5, an encoder becomes a cross-encoder.
The settings are the paper's (arXiv 2202.05144, with the learning rate of its released scripts). Any further flag is one
of transformers.TrainingArguments: --lr_scheduler_type linear, --gradient_checkpointing True, --optim adafactor,
--deepspeed zero2.json, ...
"""

import argparse
import csv
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import bm25
import ranking
from formats import (
    Hits,
    InputError,
    Qrel,
    ScoredDoc,
    Triples,
    read_qrels,
    read_run,
    read_texts,
    read_topics,
    run_script,
    warn,
    whole_file,
)


def read_trainer_flags(parser: argparse.ArgumentParser, flags: list[str]) -> dict[str, Any]:
    """Any further flag is one of transformers.TrainingArguments, and passes through to it."""
    if not flags:
        return {}
    from transformers import HfArgumentParser, TrainingArguments

    known, unknown = HfArgumentParser(TrainingArguments, allow_abbrev=False).parse_args_into_dataclasses(
        ["--output_dir", "unused", *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"{unknown[0]} is neither a flag of this script nor one of transformers.TrainingArguments")
    names = [flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")]
    return {name: getattr(known, name) for name in names}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--base_model", default="t5_base", help="folder, hub name, or t5_SIZE (default: %(default)s)")
    add("--triples_train", required=True, help="training triples")
    add("--output_dir", required=True, help="folder for the model, its checkpoints and figures")
    add("--queries", help="development topics")
    add("--qrels", help="development judgements")
    add("--run", help="first-stage run to rerank, TREC or MS MARCO")
    add("--corpus", help="collection of that run, or of --index")
    add("--holdout", help="instead of these three: synthetic queries kept from training")
    add("--index", help="BM25 index that finds their hits")
    add("--relevance_threshold", type=int, default=1, help="lowest relevant grade (default: %(default)s)")
    add("--max_eval_queries", type=int, default=-1, help="the first N judged queries only (default: all)")
    add("--max_eval_docs_per_query", type=int, default=100, help="documents a query to rerank (default: %(default)s)")
    add("--eval_steps", type=int, default=100, help="evaluate every N steps (default: %(default)s)")
    add("--select_by", choices=list(ranking.MEASURES), help="keep the checkpoint of the best evaluation, not the last")
    add("--early_stopping_patience", type=int, metavar="N", help="stop after N evaluations without a better one")
    add("--save_every_n_steps", type=int, default=100, help="keep a checkpoint every N steps (default: %(default)s)")
    add("--logging_steps", type=int, default=10, help="log the loss every N steps (default: %(default)s)")
    add("--per_device_train_batch_size", type=int, default=8, help="examples, half positive (default: %(default)s)")
    add(
        "--gradient_accumulation_steps",
        type=int,
        default=16,
        help="batches a step, shared among the processes of torchrun (default: %(default)s)",
    )
    add(
        "--loss",
        choices=("pointwise", "pairwise"),
        default="pointwise",
        help="each example on its own, as in the paper, or the positive of a triple against its negative",
    )
    add(
        "--learning_rate",
        type=float,
        default=3e-4,
        help="constant, or as --lr_scheduler_type says (default: %(default)s)",
    )
    add("--warmup_steps", type=int, default=0, help="steps of linear rise to it (default: %(default)s)")
    add("--weight_decay", type=float, default=5e-5, help="not on biases and norms (default: %(default)s)")
    add("--epochs", type=float, default=1, help="default: %(default)s")
    add("--max_steps", type=int, default=-1, help="steps in all, instead of --epochs")
    add("--max_length", type=int, default=512, help="tokens of query and document (default: %(default)s)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16")
    add("--report_to", choices=("none", "tensorboard", "wandb"), default="none", help="where figures go as well")
    add("--seed", type=int, default=2, help="order of the examples, dropout, new weights (default: %(default)s)")
    add("--token_true", help="T5-like models: word for relevant (default: true, or yes as with mT5)")
    add("--token_false", help="T5-like models: word for not relevant")
    add(
        "--resume_from_checkpoint",
        nargs="?",
        const="last",
        help="go on from this checkpoint; without a value, from the last whole one in --output_dir",
    )
    args, more = parser.parse_known_args()
    args.trainer = read_trainer_flags(parser, more)
    if {"hub_strategy", "hub_always_push"} & args.trainer.keys():
        parser.error("--push_to_hub publishes the finished model alone: leave --hub_strategy and --hub_always_push out")
    dev, held = [args.queries, args.qrels, args.run], [args.holdout, args.index]
    if any(dev) and not (all(dev) and args.corpus):
        parser.error("evaluation needs all of --queries, --qrels, --run and --corpus")
    if any(held) and (any(dev) or not (all(held) and args.corpus)):
        parser.error("--holdout needs --index and --corpus, and no other topics, qrels or run")
    args.evaluate = all(dev) or all(held)
    if args.select_by and not args.evaluate:
        parser.error(
            "--select_by needs an evaluation: --queries, --qrels, --run, --corpus; or --holdout, --index, --corpus"
        )
    if args.early_stopping_patience is not None and (not args.select_by or args.early_stopping_patience < 1):
        parser.error("--early_stopping_patience is 1 or more, and needs --select_by")
    if args.report_to != "none" and not find_spec(args.report_to):
        parser.error(f"--report_to {args.report_to} needs a package that is not here: pip install {args.report_to}")
    if args.per_device_train_batch_size < 2 or args.per_device_train_batch_size % 2:
        parser.error("--per_device_train_batch_size is even: each triple is a positive and a negative example")
    if bool(args.token_true) != bool(args.token_false):
        parser.error("--token_true and --token_false come together")
    return args


class Dev(NamedTuple):
    """A development set, read and checked before anything slow begins."""

    topics: dict[str, str]
    qrels: list[Qrel]
    run: dict[str, Hits]
    texts: dict[str, str]


def read_held_out(args: argparse.Namespace) -> Dev:
    how = bm25.Searching()
    topics, run, qrels = bm25.read_holdout(args.holdout, args.index, None, how, args.max_eval_docs_per_query)
    if args.max_eval_queries >= 0:
        topics = dict(islice(topics.items(), args.max_eval_queries))
    run = {query_id: hits for query_id, hits in run.items() if query_id in topics}
    texts = read_dev_texts(args, run)
    return Dev(topics, [qrel for qrel in qrels if qrel.query_id in topics], run, texts)


def read_dev_texts(args: argparse.Namespace, run: Mapping[str, Sequence[ScoredDoc]]) -> dict[str, str]:
    wanted = {hit.doc_id for hits in run.values() for hit in hits}
    texts = read_texts(args.corpus, wanted, desc="Reading texts")
    if absent := wanted - texts.keys():
        raise InputError(
            f"{len(absent):,} of the {len(wanted):,} documents that {args.run or args.index} has for these queries are "
            f"not in {args.corpus} (one is {min(absent)}); it is of another collection: name the one of this"
        )
    return texts


def read_dev(args: argparse.Namespace) -> Dev:
    topics = read_topics(args.queries)
    judged = list(read_qrels(args.qrels))
    judged_ids = {qrel.query_id for qrel in judged}
    chosen = [query_id for query_id in topics if query_id in judged_ids]
    if not chosen:
        raise InputError(f"{args.qrels} judges no query of {args.queries}; are they of another collection?")
    if args.max_eval_queries >= 0:
        chosen = chosen[: args.max_eval_queries]
    topics = {query_id: topics[query_id] for query_id in chosen}
    run = {q: hits[: args.max_eval_docs_per_query] for q, hits in read_run(args.run, topics).items()}
    if not run:
        raise InputError(
            f"{args.run} has hits for none of the {len(topics):,} judged queries of {args.queries}; "
            "it is a run of other topics: name the run of these"
        )
    texts = read_dev_texts(args, run)
    if len(run) < len(topics):
        warn(f"{args.run} has no hits for {len(topics) - len(run):,} of {len(topics):,} queries, which count as 0")
    return Dev(topics, [qrel for qrel in judged if qrel.query_id in topics], run, texts)


class Examples:
    """Each triple is a positive and a negative example: (query, text, whether it is relevant)."""

    def __init__(self, triples: Triples) -> None:
        self.triples = triples

    def __len__(self) -> int:
        return 2 * len(self.triples)

    def __getitem__(self, i: int) -> tuple[str, str, bool]:
        triple = self.triples[i // 2]
        return triple.query, triple.negative if i % 2 else triple.positive, i % 2 == 0


class StepsByLength:
    """A sampler: triples in random order, the examples of each optimiser step longest first.

    A step has the same examples as without that, as many positive as negative, and so the same mean gradient; but its
    batches hold examples of like length, and little is padded.
    """

    def __init__(self, examples: Examples, examples_a_step: int, seed: int, in_pairs: bool = False) -> None:
        self.examples, self.examples_a_step, self.seed, self.epoch = examples, examples_a_step, seed, 0
        self.in_pairs = in_pairs

    def set_epoch(self, epoch: int) -> None:  # called by the Trainer
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.examples) // 2))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        triples_a_step = self.examples_a_step // 2
        for start in range(0, len(order), triples_a_step):
            lengths = {}
            for i in order[start : start + triples_a_step]:
                triple = self.examples.triples[i]
                lengths |= {2 * i: len(triple.query + triple.positive), 2 * i + 1: len(triple.query + triple.negative)}
            if self.in_pairs:  # the two examples of a triple side by side
                longest = {i: max(lengths[i], lengths[i + 1]) for i in lengths if i % 2 == 0}
                yield from (j for i in sorted(longest, key=lambda i: -longest[i]) for j in (i, i + 1))
            else:
                yield from sorted(lengths, key=lambda i: -lengths[i])


def find_checkpoint(args: argparse.Namespace) -> str | None:
    """The checkpoint to go on from. One without trainer_state.json, written last, was cut off by a kill."""
    if args.resume_from_checkpoint not in (None, "last"):
        if not os.path.isfile(os.path.join(args.resume_from_checkpoint, "trainer_state.json")):
            raise InputError(f"{args.resume_from_checkpoint} is no whole checkpoint: no trainer_state.json in it")
        return args.resume_from_checkpoint
    whole = {}
    for state in Path(args.output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            whole[json.loads(state.read_text())["global_step"]] = str(state.parent)
        except ValueError:
            continue
    if args.resume_from_checkpoint is None and whole:
        raise InputError(
            f"{args.output_dir} has checkpoints of an earlier run; add --resume_from_checkpoint to go on from the "
            "last, or choose another --output_dir"
        )
    return whole[max(whole)] if whole else None


def write_figures(args: argparse.Namespace, history: list[dict], first_stage: dict[str, float]) -> None:
    """results.csv and learning_curve.png, from the log that checkpoints carry along."""
    from matplotlib.figure import Figure

    rows, loss = [], None
    for entry in history:
        loss = entry.get("loss", loss)
        if "eval_nDCG@10" in entry:
            values = {name: entry[f"eval_{name}"] for name in ranking.MEASURES}
            rows.append({"step": entry["step"], "epoch": round(entry["epoch"], 3), "loss": loss, **values})
    if rows:
        with whole_file(os.path.join(args.output_dir, "results.csv")) as file:
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
    for name, colour in (("nDCG@10", "tab:blue"), ("MRR@10", "tab:orange")) if rows else ():
        panels[1].plot([row["step"] for row in rows], [row[name] for row in rows], "o-", color=colour, label=name)
        panels[1].axhline(first_stage[name], linestyle=":", color=colour, label=f"{name}, first stage")
        panels[1].set(xlabel="step")
        panels[1].legend()
    with whole_file(os.path.join(args.output_dir, "learning_curve.png"), "wb") as file:
        figure.savefig(file, format="png", dpi=150)


SHOWN = {  # in the model's card, of the Trainer's settings, beside further flags
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "bf16",
    "seed",
}


def main() -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if world == 1:  # without torchrun the Trainer would split batches over all GPUs it sees, and make them larger
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    args = parse_args()
    checkpoint = find_checkpoint(args)
    dev = (read_held_out if args.holdout else read_dev)(args) if args.evaluate else None
    examples = Examples(Triples(args.triples_train))
    if args.gradient_accumulation_steps % world:
        raise InputError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps} cannot be shared among {world} "
            f"processes; choose a multiple of {world}"
        )

    import torch
    from accelerate.utils import gather_object
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    import models
    from publishing import Repository, model_card

    class RerankerTrainer(Trainer):
        """A Trainer that evaluates by reranking the development run, its queries shared among the processes."""

        def _get_train_sampler(self, *_: object, **__: object) -> StepsByLength:
            return StepsByLength(examples, examples_a_step, args.seed, in_pairs=args.loss == "pairwise")

        def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
            if args.loss == "pointwise":
                return super().compute_loss(model, inputs, *more, **options)
            inputs.pop("labels")
            margins = reranker.margins(model, inputs).view(-1, 2)  # of each triple: positive, negative
            return -torch.nn.functional.logsigmoid(margins[:, 0] - margins[:, 1]).mean()

        def evaluate(self, *_: object, **__: object) -> dict[str, float]:
            mine = list(dev.run)[self.args.process_index :: self.args.world_size]
            hits = [hit for query_id in mine for hit in dev.run[query_id]]
            pairs = [(dev.topics[hit.query_id], dev.texts[hit.doc_id]) for hit in hits]
            with self.accelerator.autocast():
                values = reranker.score(pairs).tolist()
            scores: dict[str, dict[str, float]] = {}
            scored = [(hit.query_id, hit.doc_id, value) for hit, value in zip(hits, values, strict=True)]
            for query_id, doc_id, value in gather_object(scored):
                scores.setdefault(query_id, {})[doc_id] = value
            run = {query_id: ranking.rank(hits, scores[query_id]) for query_id, hits in dev.run.items()}
            means = ranking.means(ranking.per_query(dev.qrels, run, args.relevance_threshold))
            metrics = {f"eval_{name}": value for name, value in means.items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            if self.is_world_process_zero():
                write_figures(args, self.state.log_history, first_stage)
            return metrics

    class AtStepsEnd(TrainerCallback):
        def on_step_end(self, _: object, state: Any, control: Any, **__: object) -> None:
            control.should_evaluate |= dev is not None and state.global_step >= state.max_steps
            control.should_log |= control.should_save  # a checkpoint does not carry the losses since the last log

    set_seed(args.seed)  # before a new head is drawn
    answers = (args.token_true, args.token_false) if args.token_true else None
    reranker = models.load_model(
        args.base_model, max_length=args.max_length, device="cpu", dtype="float32", answers=answers, new_head=True
    )
    # The losses of T5 and BERT are means over a batch, although their signatures let the Trainer think that they are
    # sums over a step: without this, accumulated gradients would be too great by the number of batches.
    reranker.model.accepts_loss_kwargs = False
    examples_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = max(1, int(args.epochs * len(examples) / examples_a_step)) if args.max_steps < 1 else args.max_steps
    settings = {
        "output_dir": args.output_dir,
        "max_steps": steps,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps // world,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "steps" if dev else "no",
        "eval_steps": args.eval_steps,
        # What may turn out to have been the best has to be kept.
        "save_steps": args.eval_steps if args.select_by else args.save_every_n_steps,
        "load_best_model_at_end": bool(args.select_by),
        "metric_for_best_model": args.select_by,
        "greater_is_better": True if args.select_by else None,
        "logging_steps": args.logging_steps,
        "seed": args.seed,
        "remove_unused_columns": False,
        "report_to": args.report_to,
        "disable_tqdm": False,  # which transformers would take our quieter log level to mean
        **args.trainer,
    }
    # Not the Trainer's: it would write the token into training_args.bin.
    hub = {name: settings.pop(name) for name in list(settings) if name.startswith(("hub_", "push_to_hub"))}
    try:
        training_arguments = TrainingArguments(**settings)
    except ValueError as error:
        raise InputError(f"transformers.TrainingArguments refuses these flags together: {error}") from None
    trainer = RerankerTrainer(
        model=reranker.model,
        processing_class=reranker.tokenizer,  # saved beside the model
        args=training_arguments,
        train_dataset=examples,
        eval_dataset=list(dev.run) if dev else None,
        data_collator=reranker.collate,
        callbacks=[AtStepsEnd()],
    )
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    first_stage = {}
    if dev:
        first_stage = ranking.means(ranking.per_query(dev.qrels, dev.run, args.relevance_threshold))
    main_process = trainer.is_world_process_zero()
    repository = Repository(args.output_dir, hub) if hub.get("push_to_hub") and main_process else None
    if main_process:
        print(
            f"Training {type(reranker).__name__} from {args.base_model}: {len(examples.triples):,} triples, "
            f"{examples_a_step} examples a step, {steps:,} steps"
            + (f", going on from {checkpoint}" if checkpoint else ""),
            file=sys.stderr,
        )
        if dev:
            print("first stage: " + ", ".join(f"{k} {v:.4f}" for k, v in first_stage.items()), file=sys.stderr)
    trainer.train(resume_from_checkpoint=checkpoint)

    beside = os.path.join(args.output_dir, "unfinished")
    trainer.save_model(beside)
    if main_process:
        write_figures(args, trainer.state.log_history, first_stage)
        kept = trainer.state.best_global_step if args.select_by else trainer.state.global_step
        shown = {k: v for k, v in settings.items() if k in {*SHOWN, *args.trainer}}
        shown["gradient_accumulation_steps"] = args.gradient_accumulation_steps  # of all processes together
        history = trainer.state.log_history
        card = model_card(args, type(reranker).__name__, shown, history, first_stage, kept)
        Path(beside, "README.md").write_text(card, encoding="utf-8")
        # config.json last: a folder without one is no model
        names = sorted(os.listdir(beside), key=lambda name: name == "config.json")
        for name in names:
            os.replace(os.path.join(beside, name), os.path.join(args.output_dir, name))
        os.rmdir(beside)
        print(f"{args.output_dir}: the model of step {kept:,}", file=sys.stderr)
        if repository:
            print(
                repository.push([*names, "results.csv", "learning_curve.png"], f"The model of step {kept:,}"),
                file=sys.stderr,
            )


if __name__ == "__main__":
    run_script(main)
