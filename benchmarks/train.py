"""Measure training throughput of train_t5.py and of a plain transformers.Trainer with the original script's settings.

    python benchmarks/train.py --base_model t5-small --triples_train triples.tsv --steps 4

The plain Trainer shuffles all examples and pads each batch of 8 to its longest example. Both train on the same triples
with 128 examples per step. They run in turn, --rounds times, and the best round counts. The final loss is the mean over
the last half of the steps.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BATCH, ACCUMULATION = 8, 16


def plain(args: argparse.Namespace, folder: str) -> list[dict]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    set_seed(2)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.base_model)
    model.accepts_loss_kwargs = False  # otherwise accumulated gradients are too large
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    examples = []
    for line in open(args.triples_train, encoding="utf-8"):
        query, *texts = line.rstrip("\n").split("\t")
        examples += [(f"Query: {query} Document: {t} Relevant:", a) for t, a in zip(texts, ("true", "false"))]  # noqa: B905

    def collate(batch: list[tuple[str, str]]) -> dict:
        texts, answers = map(list, zip(*batch, strict=True))
        inputs = tokenizer(texts, truncation=True, padding=True, max_length=512, return_tensors="pt")
        return {**inputs, "labels": tokenizer(answers, return_tensors="pt").input_ids}

    settings = TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        weight_decay=5e-5,
        bf16=args.bf16,
        use_cpu=args.cpu,
        logging_steps=1,
        save_strategy="no",
        seed=2,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = Trainer(model=model, args=settings, train_dataset=examples, data_collator=collate)
    trainer.train()
    return trainer.state.log_history


def ours(args: argparse.Namespace, folder: str) -> list[dict]:
    command = [sys.executable, ROOT / "train_t5.py", "--base_model", args.base_model, "--output_dir", folder]
    command += ["--triples_train", args.triples_train, "--max_steps", args.steps, "--logging_steps", 1]
    command += ["--save_every_n_steps", args.steps, *["--bf16"][: args.bf16], *["--use_cpu", "True"][: 2 * args.cpu]]
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    [state] = Path(folder).glob("checkpoint-*/trainer_state.json")
    seconds = float(re.search(r"'train_runtime': '?([0-9.]+)", done.stdout)[1])  # printed after the last checkpoint
    return [*json.loads(state.read_text())["log_history"], {"train_runtime": seconds}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="T5: a folder or a name on the hub")
    parser.add_argument("--triples_train", required=True, help="training triples, TSV")
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="mixed precision for both")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args()
    found: dict[str, tuple[float, float]] = {}
    for _ in range(args.rounds):
        for name, train in (("plain Trainer", plain), ("train_t5.py", ours)):
            with tempfile.TemporaryDirectory() as folder:
                history = train(args, folder)
            losses = [entry["loss"] for entry in history if "loss" in entry][-(args.steps // 2) :]
            seconds = history[-1]["train_runtime"]
            rate = args.steps * BATCH * ACCUMULATION / seconds
            found[name] = max(found.get(name, (0.0, 0.0)), (rate, sum(losses) / len(losses)))
    title = f"{args.steps} steps of {BATCH * ACCUMULATION} examples"
    print(f"\n| {title} | examples/s | relative to the plain Trainer | final loss |")
    print("|---|---:|---:|---:|")
    for name, (rate, loss) in found.items():
        print(f"| {name} | {rate:.1f} | {rate / found['plain Trainer'][0]:.2f} x | {loss:.4f} |")


if __name__ == "__main__":
    main()
