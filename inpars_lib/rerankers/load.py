"""Pointwise rerankers: `MonoT5`, `CrossEncoder`, `CausalReranker`, loaded from a checkpoint and called the same way.

    reranker = load_reranker("castorini/monot5-base-msmarco-10k", device="cuda")
    scores = reranker.score([("how long do cats sleep", "Cats sleep sixteen hours a day."), ...])

A higher score means more relevant. benchmarks/NOTES.md has the measurements behind what makes scoring fast.
"""

import os
from typing import Any

from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.rerankers.base import Reranker
from inpars_lib.rerankers.causal import CausalReranker
from inpars_lib.rerankers.cross_encoder import CrossEncoder, relevant_output
from inpars_lib.rerankers.mono_t5 import MonoT5

T5_TYPES = ("t5", "mt5", "umt5")  # sequence-to-sequence models whose tokens never cross a space


def checkpoint_name(name: str) -> str:
    """Return a checkpoint's name on the hub: the paper's `t5_base` is `google-t5/t5-base`."""
    size = name.removeprefix("t5_").removeprefix("t5-")
    return f"google-t5/t5-{size}" if name != size and size in ("small", "base", "large", "3b", "11b") else name


def load_reranker(
    checkpoint: str,
    *,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    targets: tuple[str, str] | None = None,
    new_head: bool = False,
    instruction: str | None = None,
) -> Reranker:
    """Load a reranker from a folder or from the Hugging Face hub. Its config tells the family.

    Args:
        checkpoint: Folder, hub name, or `t5_SIZE`.
        max_length: Tokens per pair; by default as many as in the training by train_t5.py, or 512.
        device: `cpu`, `cuda`, `cuda:1`, ...; by default the first GPU, if there is one.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where it is fast, otherwise float32.
        targets: Words for relevant and not relevant of a T5-like or causal model; by default the model's own.
        new_head: Give an encoder without a trained output a randomly initialized one, to be trained.
        instruction: Task that a causal model reads before the query; by default that of the training, or web search.

    Raises:
        InputError: There is no such checkpoint or device, or the checkpoint is not a reranker.
    """
    import torch
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()  # hides the report on a randomly initialized output
    logging.disable_progress_bar()
    device = device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = shorten(str(error).splitlines()[0])
        raise InputError(f"--device {device}: {problem}. Choose cpu, or cuda:N with a GPU that exists.") from None
    dtype = choose_dtype(dtype, device)
    name = checkpoint if os.path.isdir(checkpoint) else checkpoint_name(checkpoint)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        trained_with = getattr(config, "inpars", {})  # settings of train_t5.py
        if not new_head:
            answers = [token.lstrip("▁") for token in getattr(config, "answers", [])]
            _check_flag(name, "--max_length", max_length, trained_with.get("max_length"))
            _check_flag(name, "--instruction", instruction, trained_with.get("instruction"))
            _check_flag(name, "--token_true and --token_false", " ".join(targets or ()), " ".join(answers))
        max_length = max_length or trained_with.get("max_length", 512)
        instruction = instruction or trained_with.get("instruction")
        architectures = config.architectures or []
        causal = not config.is_encoder_decoder and any(kind.endswith("ForCausalLM") for kind in architectures)
        if instruction and not causal:
            raise InputError(f"--instruction: {name} reads no instruction; only causal models do. Omit the flag.")
        if causal:
            language_model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
            return CausalReranker(language_model.to(device), tokenizer, max_length, targets, instruction)
        if config.is_encoder_decoder:
            if config.model_type not in T5_TYPES:
                known = ", ".join(T5_TYPES)
                raise InputError(f"{name}: models of type {config.model_type} are not supported. Use one of {known}.")
            model = transformers.AutoModelForSeq2SeqLM.from_pretrained(name, dtype=getattr(torch, dtype))
            return MonoT5(model.to(device), tokenizer, max_length, targets)
        trained = any("ForSequenceClassification" in architecture for architecture in architectures)
        relevant = None
        if trained and config.num_labels != 1:
            if new_head:
                warn(f"{name}: the output layer has {config.num_labels} outputs. A new one with one output is trained.")
            else:
                relevant = relevant_output(name, config)
        if not tokenizer.is_fast:
            raise InputError(f"{name}: its tokenizer has no fast version (tokenizer.json). Name another model.")
        if tokenizer.pad_token_id is None:
            raise InputError(f"{name}: its tokenizer has no padding token. Name another model.")
        if not trained and not new_head:
            raise InputError(f"{name}: this encoder was never trained to rerank. Train it first with train_t5.py.")
        head: dict[str, Any] = {"num_labels": 1, "ignore_mismatched_sizes": new_head}
        head["problem_type"] = "multi_label_classification"  # transformers' name for binary cross-entropy per output
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, dtype), **(head if relevant is None else {})
        )
        return CrossEncoder(model.to(device), tokenizer, max_length, relevant)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: cannot load this model: {shorten(error)}. Name the folder of a checkpoint or a model on the "
            "Hugging Face hub."
        ) from None


def _check_flag(name: str, flag: str, given: object, trained: object) -> None:
    """Warn of a flag that contradicts the training of a model."""
    if given and trained and given != trained:
        warn(f"{name}: trained with {flag} {trained}, but {given} is given. Omit the flag to score as in training.")


def has_fast_bfloat16(device: str) -> bool:
    """Return whether bfloat16 beats float32 on this device: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def choose_dtype(dtype: str, device: str) -> str:
    """Return `dtype`, or for `auto` bfloat16 where this device is fast at it and float32 elsewhere."""
    if dtype == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return dtype


def default_device(local_rank: int = 0) -> str:
    """Return the GPU of this process, or `cpu` if there is none."""
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
