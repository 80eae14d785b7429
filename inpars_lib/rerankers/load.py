"""Pointwise rerankers: `MonoT5`, `CrossEncoder`, `CausalReranker`, loaded from a checkpoint and called the same way.

    reranker = load_reranker("castorini/monot5-base-msmarco-10k", device="cuda")
    scores = reranker.score([("how long do cats sleep", "Cats sleep sixteen hours a day."), ...])

A higher score means more relevant. benchmarks/NOTES.md has the measurements behind what makes scoring fast.
"""

from typing import Any

from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.rerankers.base import Reranker
from inpars_lib.rerankers.causal import CausalReranker, find_template
from inpars_lib.rerankers.checkpoint import Checkpoint, checkpoint_name, load_weights, read_checkpoint
from inpars_lib.rerankers.cross_encoder import CrossEncoder, relevant_output
from inpars_lib.rerankers.mono_t5 import MonoT5

T5_TYPES = ("t5", "mt5", "umt5")  # sequence-to-sequence models whose tokens never cross a space


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
        new_head: Load a base model to be trained. An encoder without a trained output gets a random one.
        instruction: Task that a causal model reads before the query; by default that of the training, or web search.

    Raises:
        InputError: There is no such checkpoint or device, the checkpoint is not a reranker, or it is damaged.
    """
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()  # hides reports of what is checked here
    logging.disable_progress_bar()
    device = device or default_device()
    check_device(device)
    dtype = choose_dtype(dtype, device)
    found = read_checkpoint(checkpoint_name(checkpoint))
    config, name = found.config, found.name
    trained_with = getattr(config, "inpars", {})  # settings of train_t5.py
    if not new_head:
        answers = [token.lstrip("▁") for token in getattr(config, "answers", [])]
        _check_flag(name, "--max_length", max_length, trained_with.get("max_length"))
        _check_flag(name, "--instruction", instruction, trained_with.get("instruction"))
        _check_flag(name, "--token_true and --token_false", " ".join(targets or ()), " ".join(answers))
    max_length = max_length or trained_with.get("max_length", 512)
    instruction = instruction or trained_with.get("instruction")
    if not config.is_encoder_decoder and found.kind.endswith("ForCausalLM"):
        chosen = targets or found.tokens
        any_model = new_head or bool(targets and instruction)
        return load_causal(found, dtype, device, max_length, chosen, instruction, any_model)
    if instruction:
        raise InputError(f"--instruction: {name} reads no instruction; only causal models do. Omit the flag.")
    # T5EncoderModel is no encoder-decoder by its config. load_mono_t5 refuses T5EncoderModel by name.
    if config.is_encoder_decoder or config.model_type in T5_TYPES:
        return load_mono_t5(found, dtype, device, max_length, targets)
    if targets:
        raise InputError(
            f"--token_true, --token_false: {name} is a cross-encoder, which has no target words. Omit them."
        )
    return load_cross_encoder(found, dtype, device, max_length, new_head)


def load_causal(
    found: Checkpoint,
    dtype: str,
    device: str,
    max_length: int,
    targets: tuple[str, str] | None,
    instruction: str | None,
    any_model: bool,
) -> CausalReranker:
    """Load a causal language model.

    Args:
        found: The checkpoint.
        dtype: Precision of the model.
        device: Where the model runs.
        max_length: Tokens per pair.
        targets: The two tokens whose logits are compared, or None for those of the model's family.
        instruction: What the prompt says about relevance, or None for the sentence of the model's family.
        any_model: Accept a model that is not known as a reranker: a new one is trained, or the user has given the
            tokens and the instruction.
    """
    template = find_template(found.name, found.config, found.tokenizer, any_model)
    model = load_weights(found, "AutoModelForCausalLM", dtype)
    return CausalReranker(model.to(device), found.tokenizer, max_length, template, targets, instruction)


def load_mono_t5(
    found: Checkpoint, dtype: str, device: str, max_length: int, targets: tuple[str, str] | None
) -> MonoT5:
    """Load a T5-like model with its decoder."""
    name, model_type = found.name, found.config.model_type
    if model_type not in T5_TYPES:
        known = ", ".join(T5_TYPES)
        raise InputError(f"{name}: models of type {model_type} are not supported. Use one of {known}.")
    if not (found.kind or "ForConditionalGeneration").endswith("ForConditionalGeneration"):
        raise InputError(f"{name}: {found.kind} has no decoder that answers. Name a T5ForConditionalGeneration.")
    model = load_weights(found, "AutoModelForSeq2SeqLM", dtype)
    return MonoT5(model.to(device), found.tokenizer, max_length, targets)


def load_cross_encoder(found: Checkpoint, dtype: str, device: str, max_length: int, new_head: bool) -> CrossEncoder:
    """Load an encoder with its output, or with a new one to be trained."""
    name, config, tokenizer = found.name, found.config, found.tokenizer
    trained = "ForSequenceClassification" in found.kind
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
    if not found.kind and not new_head:
        raise InputError(f'{name}: config.json does not name the class of this model. Add it as "architectures".')
    if not trained and not new_head:
        raise InputError(f"{name}: this encoder was never trained to rerank. Train it first with train_t5.py.")
    if trained and getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{name}: this cross-encoder reads its inputs in a chat template, which is not supported here."
        )
    if config.pad_token_id is None:  # some say it in the tokenizer's files only
        config.pad_token_id = tokenizer.pad_token_id
    if relevant is None:
        config.num_labels = 1
        config.problem_type = "multi_label_classification"  # transformers' name for binary cross-entropy per output
    model = load_weights(found, "AutoModelForSequenceClassification", dtype, new_head=new_head)
    return CrossEncoder(model.to(device), tokenizer, max_length, relevant)


# ------------------------------------------------------------------------------------------------ devices and precision


def _check_flag(name: str, flag: str, given: object, trained: object) -> None:
    """Warn of a flag that contradicts the training of a model."""
    if given and trained and given != trained:
        warn(f"{name}: trained with {flag} {trained}, but {given} is given. Omit the flag to score as in training.")


def check_device(device: str) -> None:
    """Check that a device exists."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = shorten(str(error).splitlines()[0])
        raise InputError(f"--device {device}: {problem}. Choose cpu, or cuda:N with a GPU that exists.") from None


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
