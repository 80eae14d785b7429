"""Stage 4: a tiny T5 and a tiny encoder learn a data set that can be learned."""

import csv
import hashlib
import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import error_line, ok, run, run_two_ranks
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_helpers import QUICK, dev, dev_but, train

from inpars_lib.rerankers.load import load_reranker
from inpars_lib.training.examples import LengthSortedSampler, TrainingExamples, TripleFile
from inpars_lib.training.losses import softmax_cross_entropy

pytestmark = pytest.mark.usefixtures("simple_curves")


@pytest.fixture(scope="module", params=["t5", "encoder"])
def trained(request, separable: Path, tiny_t5: Path, tiny_encoder: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp(request.param) / "model"
    base = tiny_t5 if request.param == "t5" else tiny_encoder
    args = ["--max_steps", 60, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2, "--eval_steps", 20]
    args += ["--save_every_n_steps", 40, "--logging_steps", 5, "--relevance_threshold", 2]
    ok(train(separable, base, output, *dev(separable), *args))
    return output


def test_it_learns(trained: Path) -> None:
    with (trained / "results.csv").open() as file:
        results = list(csv.DictReader(file))
    assert [int(row["step"]) for row in results] == [20, 40, 60]
    assert list(results[0]) == ["step", "epoch", "loss", "nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000"]
    state = json.loads((trained / "checkpoint-60/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert float(results[-1]["nDCG@10"]) > 0.8  # 0.5 as it came; the grades 1 and 2 look alike
    assert float(results[-1]["P@20"]) == pytest.approx(0.25)  # 5 of the first 20 have grade 2
    assert (trained / "learning_curve.png").exists()
    assert not (trained / "unfinished").exists()


def test_the_model_has_a_card(trained: Path, separable: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "text-ranking"
    assert "inpars" in card.data.tags
    digest = hashlib.sha256((separable / "triples.tsv").read_bytes()).hexdigest()
    assert f"| triples_train | triples.tsv | `{digest}` |" in card.text
    assert "| learning_rate | 0.005 |" in card.text
    with (trained / "results.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert f"are from step {last['step']}, the last" in card.text
    assert f"| MRR@10 | 0.2500 | {float(last['MRR@10']):.4f} |" in card.text
    assert str(separable) not in card.content  # no paths of this machine


@pytest.fixture(scope="module")
def grouped(separable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write triples of groups: each query and positive with 3 negatives, but 1 at the start and 6 at the end."""
    path = tmp_path_factory.mktemp("grouped") / "triples.tsv"
    lines = (separable / "triples.tsv").read_text().splitlines()
    negatives = [line.split("\t")[2] for line in lines]
    sizes = [1] + [3] * (len(lines) - 2) + [6]
    rows = [f"{line.rpartition(chr(9))[0]}\t{negatives[(i + j) % len(lines)]}\n"
            for i, (line, size) in enumerate(zip(lines, sizes, strict=True)) for j in range(size)]  # fmt: skip
    path.write_text("".join(rows))
    return path


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
@pytest.mark.parametrize("base", ["tiny_t5", "tiny_encoder"])
def test_positives_against_negatives(
    separable: Path, grouped: Path, request: pytest.FixtureRequest, tmp_path: Path, loss: str, base: str
) -> None:
    args = ["--max_steps", 30, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2, "--logging_steps", 5]
    args += ["--loss", loss, *dev(separable)]
    if loss == "listwise":
        args += ["--triples_train", grouped]
    done = ok(train(separable, request.getfixturevalue(base), tmp_path / "model", *args))
    with (tmp_path / "model/results.csv").open() as file:
        [row] = csv.DictReader(file)
    assert float(row["loss"]) < (0.3 if loss == "pairwise" else 0.5)  # log 2 and log 4 as it came
    assert float(row["nDCG@10"]) > 0.8
    assert ("301 triples in 101 groups of at most 4 examples, 16 examples per step" in done.stderr) == (
        loss == "listwise"
    )
    assert "| per_device_train_batch_size | 8 |" in (tmp_path / "model/README.md").read_text()


def test_adjacent_triples_form_groups(grouped: Path, tmp_path: Path) -> None:
    triples = TripleFile(str(grouped))
    examples = TrainingExamples(triples, "listwise")
    groups = [examples[i] for i in range(len(examples))]
    assert [len(group) for group in groups] == [2] + [4] * 98 + [4, 4]  # the positive once per group
    assert [relevant for _, _, relevant in groups[1]] == [True, False, False, False]
    rows = [(query, group[0][1], text) for group in groups for query, text, relevant in group if not relevant]
    assert rows == list(triples)  # no triple is lost
    sampler = LengthSortedSampler(examples, examples_per_step=16, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(len(examples)))
    for start in range(0, len(order), 4):
        lengths = [max(len(query + text) for query, text, _ in examples[i]) for i in order[start : start + 4]]
        assert lengths == sorted(lengths, reverse=True)
    pairs = list(LengthSortedSampler(TrainingExamples(triples, "pairwise"), 16, seed=1))
    apart = list(LengthSortedSampler(TrainingExamples(triples), 16, seed=1))
    for start in range(0, len(pairs), 8):
        both = [j for i in pairs[start : start + 8] for j in (2 * i, 2 * i + 1)]
        assert sorted(both) == sorted(apart[2 * start : 2 * start + 16])


def test_losses_of_groups() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0], requires_grad=True)
    padded = torch.stack([logits[:3], torch.cat([logits[3:], torch.tensor([-torch.inf])])])  # a group lacks a negative
    one, two = 1 + math.exp(-1) + math.exp(-2), 1 + math.exp(4)
    softmax_cross_entropy(padded).backward()
    assert softmax_cross_entropy(padded).item() == pytest.approx((math.log(one) + math.log(two)) / 2)
    assert logits.grad.tolist() == pytest.approx(
        [(1 / one - 1) / 2, math.exp(-1) / one / 2, math.exp(-2) / one / 2, (1 / two - 1) / 2, (1 - 1 / two) / 2]
    )
    pairs = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    logistic = -torch.nn.functional.logsigmoid(pairs[:, 0] - pairs[:, 1]).mean()
    torch.testing.assert_close(softmax_cross_entropy(pairs), logistic)


def test_batches_hold_whole_groups(separable: Path, grouped: Path, tiny_t5: Path, tmp_path: Path) -> None:
    args = [*QUICK, "--loss", "listwise", "--triples_train", grouped, "--per_device_train_batch_size"]
    for size, use in ((2, 4), (9, 8)):
        refused = error_line(train(separable, tiny_t5, tmp_path / "model", *args, size))
        assert f"batch_size {size}: not a multiple of 4, the examples of a group (a positive and 3" in refused
        assert refused.endswith(f"Use {use}.")
    assert not list((tmp_path / "model").iterdir())
    hint = "one negative per query, so --loss listwise equals pairwise"
    assert hint not in ok(train(separable, tiny_t5, tmp_path / "model", *args, 4)).stderr
    done = ok(train(separable, tiny_t5, tmp_path / "pairs", *QUICK, "--loss", "listwise"))
    assert hint in done.stderr
    ok(train(separable, tiny_t5, tmp_path / "same", *QUICK, "--loss", "pairwise"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("pairs", "same"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)


def test_the_best_checkpoint_is_kept(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """With inverted judgements training only hurts, so the first evaluation is the best."""
    files = dev_but(separable, tmp_path, "qrels.txt", (separable / "qrels.txt").read_text().replace(" p", " n"))
    args = ["--max_steps", 60, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2, "--eval_steps", 10]
    selecting = ["--select_by", "MRR@10", "--early_stopping_patience", 2, "--relevance_threshold", 1]
    ok(train(separable, tiny_t5, tmp_path / "model", *files, *args, *selecting))
    with (tmp_path / "model/results.csv").open() as file:
        results = [(float(row["MRR@10"]), int(row["step"])) for row in csv.DictReader(file)]
    value, best = max(results, key=lambda row: (row[0], -row[1]))
    assert best + 20 == results[-1][1] < 60  # stopped after two that were no better
    folders = ("", f"checkpoint-{best}", f"checkpoint-{best + 20}")
    kept, same, last = (load_file(tmp_path / "model" / folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(kept[name], same[name]) for name in same)
    assert not all(torch.equal(kept[name], last[name]) for name in last)
    card = (tmp_path / "model/README.md").read_text()
    assert f"are from step {best}, the best by MRR@10" in card
    assert f"| MRR@10 | 1.0000 | {value:.4f} |" in card


def test_other_measures(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    args = [*QUICK, *dev(separable), "--eval_steps", 1, "--save_every_n_steps", 1, "--relevance_threshold", 2]
    measures = ["--measures", "R@3 RR(rel=1)@10 P(rel=9)@3", "--select_by", "RR(rel=1)@10"]
    said = ok(train(separable, tiny_t5, tmp_path / "model", *args, *measures)).stderr
    assert "`rel` of P(rel=9)@3. The highest grade is 2. P(rel=9)@3 is not available." in said
    assert "first stage: R@3 0.0000, RR(rel=1)@10 0.5000, P(rel=9)@3 n/a\n" in said
    with (tmp_path / "model/results.csv").open() as file:
        results = list(csv.DictReader(file))
    assert list(results[0]) == ["step", "epoch", "loss", "R@3", "RR(rel=1)@10", "P(rel=9)@3"]
    assert [row["P(rel=9)@3"] for row in results] == ["", ""]
    best = max(results, key=lambda row: (float(row["RR(rel=1)@10"]), -int(row["step"])))
    card = (tmp_path / "model/README.md").read_text()
    assert f"are from step {best['step']}, the best by RR(rel=1)@10" in card
    assert f"| RR(rel=1)@10 | 0.5000 | {float(best['RR(rel=1)@10']):.4f} |" in card
    assert "| P(rel=9)@3 | n/a | n/a |" in card
    # A resumed run has the same columns.
    others = [*measures[2:], "--measures", "RR(rel=1)@10"]
    resumed = train(separable, tiny_t5, tmp_path / "model", *args, *others)
    assert f'(measures "{measures[1]}", now "RR(rel=1)@10")' in error_line(resumed)
    for flags, problem, code in (
        (["--select_by", "RR@10"], "--select_by RR@10: not one of --measures. Choose from nDCG@10, nDCG@20, MRR@10", 2),
        (["--measures", "P(rel=9)@3"], "no judgement reaches `rel` of P(rel=9)@3", 1),
    ):
        assert problem in error_line(train(separable, tiny_t5, tmp_path / "x", *args, *flags), code)
    unevaluated = train(separable, tiny_t5, tmp_path / "x", "--measures", "RR@10")
    assert "--measures needs --queries" in error_line(unevaluated, 2)


def test_other_flags_are_passed_to_the_trainer(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    more = ["--optim", "adafactor", "--activation_checkpointing", "True", "--save_total_limit=1"]
    more += ["--max-grad-norm", 0.5, "--save_every_n_steps", 1]
    ok(train(separable, tiny_t5, tmp_path / "model", *QUICK, *more))
    [checkpoint] = (tmp_path / "model").glob("checkpoint-*")  # of two, as the flag asks
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert any("exp_avg_sq_row" in values for values in state["state"].values())  # only Adafactor has these
    unknown = train(separable, tiny_t5, tmp_path / "none", *QUICK, "--learning_rat", 1)
    assert "--learning_rat is neither a flag of this script nor of" in error_line(unknown, 2)
    refused = train(separable, tiny_t5, tmp_path / "none", *QUICK, "--fsdp", "nonsense")
    assert "transformers refuses these flags: Unknown `fsdp` option" in error_line(refused)
    assert "(--fsdp nonsense). Correct or omit them." in error_line(refused)


@pytest.mark.parametrize(
    "flag", ["--num_train_epochs=3", "--num-train-epochs=3", "--label_smoothing_factor=0.1", "--save_steps=1",
             "--load_best_model_at_end=True", "--gradient_accumulation_steps=0", "--save_strategy=best",
             "--eval_on_start", "--do_eval", "--data_seed=3", "--auto_find_batch_size=True", "--bf16_full_eval=True",
             "--dataloader-drop-last", "--hub_strategy=end", "--save_only_model=True",
             "--train_sampling_strategy=group_by_length"]
)  # fmt: skip
def test_flags_that_would_be_ignored_are_refused(separable: Path, tiny_t5: Path, tmp_path: Path, flag: str) -> None:
    refused = error_line(train(separable, tiny_t5, tmp_path / "model", *QUICK, flag), 2)
    assert "is not supported: " in refused or "expected a whole number of at least 1" in refused
    assert not (tmp_path / "model").exists()


def test_flags_that_cannot_work_here(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    output = tmp_path / "model"
    ok(train(separable, tiny_t5, output, *QUICK))
    before = (output / "model.safetensors").read_bytes()
    for flags, code, problem in (
        (["--fp16", "True"], 1, "--fp16: needs a GPU. Omit the flag, or use --bf16."),
        (["--deepspeed", tmp_path / "zero2.json"], 1, "refuses these flags: "),
        (
            ["--adam_beta1", 2],
            1,
            "refuses these flags: Invalid beta parameter at index 0: 2.0 (--adam_beta1 2.0)",
        ),
        (["--optim", "adamw_bnb_8bit"], 1, "refuses these flags: You need to install `bitsandbytes`"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], 1, "refuses these flags: One of min_lr or min_lr_rate"),
        (["--lr_scheduler_type", "warmup_stable_decay"], 1, "refuses these flags: get_wsd_schedule() missing"),
        (["--dataloader_num_workers", -1], 1, "refuses these flags: num_workers option should be"),
        (["--use_liger_kernel", "True"], 2, "--use_liger_kernel needs this package: pip install liger_kernel"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], 2, "reduce_lr_on_plateau and greedy need --select_by"),
        (["--lr_scheduler_type", "constant", "--warmup_steps", 1], 2, "this --lr_scheduler_type has no warm-up"),
    ):
        assert problem in error_line(train(separable, tiny_t5, output, *QUICK, *flags, "--restart"), code)
        assert (output / "model.safetensors").read_bytes() == before
    flags = ["--lr_scheduler_type", "reduce_lr_on_plateau", *dev(separable), "--select_by", "MRR@10", "--eval_steps", 1]
    ok(train(separable, tiny_t5, tmp_path / "plateau", *QUICK, *flags))


@pytest.mark.parametrize(
    ("flag", "value"), [("--learning_rate", "nan"), ("--learning_rate", -1), ("--weight_decay", -1), ("--seed", -1),
                        ("--seed", 2**32), ("--max_steps", 0), ("--epochs", 0), ("--output_dir", "-"),
                        ("--output_dir", "/dev/stdout")]
)  # fmt: skip
def test_values_that_cannot_be_meant(separable: Path, tiny_t5: Path, tmp_path: Path, flag: str, value: object) -> None:
    refused = error_line(train(separable, tiny_t5, tmp_path / "model", flag, value), 2)
    assert f"{flag}: expected a " in refused or "--output_dir is a folder, not standard output" in refused


def test_out_of_memory_is_an_error(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB."
    with patch("transformers.Trainer.training_step", side_effect=torch.OutOfMemoryError(message)):
        failed = error_line(train(separable, tiny_t5, tmp_path / "model", *QUICK))
    assert "model: out of memory in step 1. Lower --per_device_train_batch_size and raise" in failed


@pytest.mark.parametrize("base", ["tiny_t5", "tiny_encoder"])
def test_a_diverged_training_is_an_error(
    separable: Path, request: pytest.FixtureRequest, tmp_path: Path, base: str
) -> None:
    args = ["--learning_rate", 1e30, "--max_steps", 6, "--save_every_n_steps", 1, "--no-bf16"]
    diverged = error_line(train(separable, request.getfixturevalue(base), tmp_path / "model", *args))
    assert "the training diverged, the " in diverged
    assert diverged.endswith("is not finite. Lower --learning_rate, raise --warmup_steps, or use --no-bf16, and add "
                             "--restart.")  # fmt: skip
    assert not (tmp_path / "model/config.json").exists()
    for weights in (tmp_path / "model").glob("*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(weights).values())


@pytest.mark.parametrize("loss", ["pointwise", "pairwise"])
def test_all_examples_of_an_epoch_have_the_same_weight(
    separable: Path, tiny_t5: Path, tmp_path: Path, loss: str
) -> None:
    """12 examples are a batch of 8 and one of 4. The step equals that of one batch."""
    triples = tmp_path / "triples.tsv"
    triples.write_text("".join((separable / "triples.tsv").read_text().splitlines(keepends=True)[:6]))
    args = ["--triples_train", triples, "--loss", loss, "--optim", "sgd", "--learning_rate", 0.1, "--no-bf16"]
    for batch, accumulated in ((8, 2), (12, 1), (2, 6)):
        sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulated]
        done = ok(train(separable, tiny_t5, tmp_path / str(batch), *args, *sizes, "--weight_decay", 0))
        assert f"{batch * accumulated} examples per step, 1 step" in done.stderr
    one, *others = (load_file(tmp_path / str(batch) / "model.safetensors") for batch in (12, 8, 2))
    before = load_file(tiny_t5 / "model.safetensors")
    assert any((one[name] - before[name]).abs().max() > 1e-3 for name in one)
    for other in others:
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def test_an_epoch_has_all_examples(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """100 triples are 200 examples, of which a step has 128."""
    args = ["--logging_steps", 1, "--warmup_ratio", 0.5]
    done = ok(train(separable, tiny_t5, tmp_path / "model", *args, "--epochs", 2))
    assert "128 examples per step, 4 steps" in done.stderr
    assert "warning: 4 steps of 128 examples: rerankers learn little" in done.stderr
    state = json.loads((tmp_path / "model/checkpoint-4/trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx([0, 1.5e-4, 3e-4, 3e-4])
    assert state["epoch"] == 2
    done = ok(train(separable, tiny_t5, tmp_path / "half", *args, "--epochs", 0.5, "--warmup_steps", 1))
    assert "128 examples per step, 1 step" in done.stderr
    assert "warning: --warmup_steps 1: the training has 1 step," in done.stderr


def test_flags_that_fail_in_the_first_step(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """The Trainer accepts them until its first step."""
    flags = ["--torch_compile_backend", "nonsense"]
    said = error_line(train(separable, tiny_t5, tmp_path / "model", *QUICK, *flags))
    assert "transformers refuses these flags: " in said
    assert "(--torch_compile_backend nonsense). Correct or omit them." in said
    flags += ["--debug", "underflow_overflow"]
    assert "underflow_overflow" in error_line(train(separable, tiny_t5, tmp_path / "model", *QUICK, *flags))
    said = error_line(train(separable, tiny_t5, tmp_path / "model", *QUICK, "--neftune_noise_alpha", "x"), 2)
    assert "argument --neftune_noise_alpha" in said


def test_an_evaluation_needs_whole_weights(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    for flags in (["--fsdp", "full_shard"], ["--deepspeed", tmp_path / "zero3.json"]):
        refused = train(separable, tiny_t5, tmp_path / "model", *QUICK, *dev(separable), *flags)
        assert "an evaluation needs the whole model on each GPU" in error_line(refused, 2)


def test_publishing_is_one_command_of_the_hub(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    for flag in (["--push_to_hub"], ["--hub_model_id", "me/x"], ["--push_to_hub", "True"]):
        refused = train(separable, tiny_t5, tmp_path / "model", *QUICK, *flag)
        assert "hf upload YOU/NAME MODEL" in error_line(refused, 2)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
def test_two_processes_train_like_one(separable: Path, grouped: Path, tiny_t5: Path, tmp_path: Path, loss: str) -> None:
    """Under torchrun the ranks share a step's batches and the queries of an evaluation."""
    triples = grouped if loss == "listwise" else separable / "triples.tsv"
    args = ["--base_model", tiny_t5, "--triples_train", triples, "--loss", loss, "--max_length", 64, "--max_steps", 4]
    args += ["--gradient_accumulation_steps", 4, "--eval_steps", 4, "--logging_steps", 1, *dev(separable)]
    run_two_ranks("train_t5.py", *args, "--output_dir", tmp_path / "two")
    ok(run("train_t5.py", *args, "--output_dir", tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(tiny_t5 / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)
    assert any((one[name] - before[name]).abs().max() > 1e-3 for name in one)
    with (tmp_path / "two" / "results.csv").open() as file:
        [row] = csv.DictReader(file)
    assert float(row["R@1000"]) == 1.0  # every query was scored by one of the two


def test_accumulated_batches_are_shared_evenly(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    odd = train(separable, tiny_t5, tmp_path / "model", "--gradient_accumulation_steps", 3, WORLD_SIZE="2")
    assert "not divisible by 2 processes" in error_line(odd)


def test_a_step_has_the_examples_of_its_triples_longest_first(tmp_path: Path) -> None:
    triples = [(f"q{i}", "positive " * (i % 7 + 1), "negative " * (i % 5 + 1)) for i in range(20)]
    (tmp_path / "t.tsv").write_text("".join("\t".join(triple) + "\n" for triple in triples))
    examples = TrainingExamples(TripleFile(str(tmp_path / "t.tsv")))
    sampler = LengthSortedSampler(examples, examples_per_step=16, seed=1)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)  # a resumed run needs this
        assert sorted(order) == list(range(40)) == sorted(range(len(sampler)))
        for start in (0, 16, 32):
            step = [example for i in order[start : start + 16] for example in examples[i]]
            assert sum(relevant for *_, relevant in step) == len(step) / 2
            lengths = [len(query + text) for query, text, _ in step]
            assert lengths == sorted(lengths, reverse=True)
            assert all(relevant == text.startswith("positive") for _, text, relevant in step)
        epochs.append(order)
    assert set(epochs[0][:16]) != set(epochs[1][:16])  # other steps in another epoch


@pytest.mark.parametrize("loss", ["pointwise", "pairwise", "listwise"])
def test_causal_models_are_trained(separable: Path, grouped: Path, tiny_qwen3: Path, tmp_path: Path, loss: str) -> None:
    triples = grouped if loss == "listwise" else separable / "triples.tsv"
    args = ["--triples_train", triples, "--loss", loss, "--max_length", 256, "--max_steps", 30, "--learning_rate", 5e-3]
    args += ["--gradient_accumulation_steps", 2, "--logging_steps", 5, *dev(separable)]
    ok(train(separable, tiny_qwen3, tmp_path / "model", *args))
    with (tmp_path / "model/results.csv").open() as file:
        [row] = csv.DictReader(file)
    assert float(row["loss"]) < 0.5  # log 2, and log 4 of the listwise loss, as it came
    assert float(row["nDCG@10"]) > 0.8
    card = ModelCard.load(tmp_path / "model/README.md")
    assert "| family | CausalReranker |" in card.text
    assert 'load_reranker("MODEL").score(' in card.text
    pairs = [line.split("\t")[:2] for line in (separable / "triples.tsv").read_text().splitlines()]
    trained = load_reranker(str(tmp_path / "model"), device="cpu", dtype="float32")
    batch = trained.collate([(*pair, True) for pair in pairs])
    logits = trained.relevance_logits(trained.model, {name: batch[name] for name in ("input_ids", "attention_mask")})
    torch.testing.assert_close(logits.detach(), torch.from_numpy(trained.score(pairs)), atol=1e-4, rtol=0)


def test_usage_errors(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    needs_all = train(separable, tiny_t5, output, "--qrels", separable / "qrels.txt")
    assert "evaluation needs all of" in error_line(needs_all, 2)
    odd = train(separable, tiny_t5, output, "--per_device_train_batch_size", 3)
    assert "must be even" in error_line(odd, 2)
    no_checkpoint = train(separable, tiny_t5, output, "--resume_from_checkpoint", tmp_path)
    assert "trainer_state.json is missing or incomplete" in error_line(no_checkpoint)
    chosen = train(separable, tiny_t5, output, "--select_by", "MRR@10")
    assert "--select_by needs --queries" in error_line(chosen, 2)
    held = train(separable, tiny_t5, output, *dev(separable), "--holdout", "x", "--index", "y")
    assert "--holdout needs --corpus and one of --index and --run, and excludes" in error_line(held, 2)
    two = train(separable, tiny_t5, output, "--holdout", "x", "--index", "y", "--run", "z", "--corpus", "c")
    assert "--holdout needs --corpus and one of --index and --run, and excludes" in error_line(two, 2)
    impatient = train(separable, tiny_t5, output, *dev(separable), "--early_stopping_patience", 2)
    assert "needs --select_by" in error_line(impatient, 2)
    assert "pip install wandb" in error_line(train(separable, tiny_t5, output, "--report_to", "wandb"), 2)
    (tmp_path / "t.tsv").write_text("only one column\n")
    no_triples = run("train_t5.py", "--triples_train", tmp_path / "t.tsv", "--output_dir", output)
    assert "t.tsv: " in error_line(no_triples)
