"""Pointwise rerankers: `MonoT5`, `CrossEncoder`, `CausalReranker`, loaded from a checkpoint and called the same way.

    reranker = load_reranker("castorini/monot5-base-msmarco-10k", device="cuda")
    scores = reranker.score([("how long do cats sleep", "Cats sleep sixteen hours a day."), ...])

A higher score means more relevant. benchmarks/NOTES.md has the measurements behind what makes scoring fast.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.rerankers.base import Reranker
from inpars_lib.rerankers.causal import CausalReranker, find_template
from inpars_lib.rerankers.cross_encoder import CrossEncoder, relevant_output
from inpars_lib.rerankers.mono_t5 import MonoT5

T5_TYPES = ("t5", "mt5", "umt5")  # sequence-to-sequence models whose tokens never cross a space
PEFT = "peft==0.21.2"
TASKS = {"SEQ_CLS": "ForSequenceClassification", "CAUSAL_LM": "ForCausalLM", "SEQ_2_SEQ_LM": "ForConditionalGeneration"}
ENCODER_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers: an encoder without an output
OLD_NAMES = {"T5WithLMHeadModel": "T5ForConditionalGeneration", "GPT2LMHeadModel": "GPT2ForCausalLM"}  # of classes
SHOWN_WEIGHTS = 3


class Checkpoint(NamedTuple):
    """What the files of a checkpoint say, weights aside.

    Attributes:
        name: Folder, or name on the hub.
        config: Config of the model.
        tokenizer: Its tokenizer.
        kind: Class of the saved model, `BertForSequenceClassification` for example.
        adapters: adapter_config.json of PEFT, or None.
        modules: Types of sentence-transformers' modules, none in other folders.
        tokens: Tokens for relevant and not relevant that sentence-transformers compares, or None.
    """

    name: str
    config: Any
    tokenizer: Any
    kind: str
    adapters: Mapping[str, Any] | None
    modules: Sequence[str]
    tokens: tuple[str, str] | None

    @property
    def base(self) -> str:
        """Return where the weights are: `name`, or the adapted model if there are adapters only."""
        return self.adapters["base"] if self.adapters else self.name


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
    found = read_checkpoint(checkpoint if os.path.isdir(checkpoint) else checkpoint_name(checkpoint))
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


# ------------------------------------------------------------------------------------------------ files of a checkpoint


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a checkpoint into one error of the user's input."""
    try:
        yield
    except Exception as error:  # each library that reads a file of a checkpoint has exceptions of its own
        said = shorten(error) or type(error).__name__
        if "trust_remote_code" in str(error):
            said = "it needs Python code of its own, which is never run"
        action = "Name the folder of a checkpoint or a model on the Hugging Face hub"
        raise InputError(f"{name}: cannot load this model: {said}. {action}.") from None


def _read_json(name: str, file: str) -> Any:
    """Return the content of a JSON file of a checkpoint, None if there is none."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, file)
    except OSError:
        return None
    if path is None:
        return None
    with loading_errors(f"{name}, {file}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_checkpoint(name: str) -> Checkpoint:
    """Read what a checkpoint says about itself.

    Raises:
        InputError: There is no such checkpoint, its files are damaged or missing, or they ask for more than is
            supported.
    """
    import transformers

    adapters = _read_json(name, "adapter_config.json")
    base = name
    if adapters:
        if not _read_json(name, "config.json"):
            base = adapters.get("base_model_name_or_path") or name
        adapters["base"] = base
        if not find_spec("peft"):
            problem = f"{name}: holds adapters (LoRA) of {base}, which need a package"
            raise InputError(f"{problem}. Run pip install {PEFT}, or merge them with peft's merge_and_unload.")
    with loading_errors(base):
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    tokenizer = _load_tokenizer(name if _read_json(name, "tokenizer_config.json") else base, config)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{base}: quantized weights are not supported. Name the model that was quantized.")
    kind = next(iter(config.architectures or []), "")
    kind = OLD_NAMES.get(kind, kind)
    if adapters and adapters.get("task_type") in TASKS:
        kind = TASKS[adapters["task_type"]]
    modules = [str(module["type"]).rpartition(".")[2] for module in _read_json(name, "modules.json") or []]
    return Checkpoint(name, config, tokenizer, kind, adapters, modules, _check_modules(name, tokenizer, kind, modules))


def _load_tokenizer(name: str, config: Any) -> Any:
    """Return a model's tokenizer. transformers makes an empty one if its files are missing."""
    import transformers

    with loading_errors(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    size = getattr(config.get_text_config(), "vocab_size", None) or 0
    if os.path.isdir(name) and not files & {*os.listdir(name)}:
        problem = "no tokenizer in this folder"
    elif len(tokenizer) < size / 4 or tokenizer.vocab_size > size > 0:  # added tokens may be unused; `pad` checks them
        problem = f"its tokenizer has {len(tokenizer):,} tokens, the model {size:,}"
    else:
        return tokenizer
    raise InputError(f"{name}: {problem}. Put the files of the model's own tokenizer (tokenizer.json) into its folder.")


def _check_modules(name: str, tokenizer: Any, kind: str, modules: Sequence[str]) -> tuple[str, str] | None:
    """Return the tokens that sentence-transformers compares, after a check that nothing it does is left out."""
    scored = "LogitScore" in modules
    other = [module for module in modules if module not in (*ENCODER_MODULES, "LogitScore")]
    if "ForSequenceClassification" in kind or scored:
        other += [module for module in modules if module in ENCODER_MODULES[1:]]
    if other:
        problem = f"sentence-transformers' modules {', '.join(other)} of this model are not supported"
        raise InputError(f"{name}: {problem}. Name a model without them.")
    settings = _read_json(name, "config_sentence_transformers.json") or {}
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name") or "")
    if prompt and ("ForSequenceClassification" in kind or scored):
        raise InputError(f"{name}: its default prompt ({shorten(prompt)}) is not supported. Name a model without one.")
    if not scored:
        return None
    ids = _read_json(name, f"{modules.index('LogitScore')}_LogitScore/config.json") or {}
    pair = [ids.get("true_token_id"), ids.get("false_token_id")]
    if not all(isinstance(token_id, int) for token_id in pair):
        raise InputError(f"{name}: its score is not the difference of two tokens' logits. Name another model.")
    first, second = tokenizer.convert_ids_to_tokens(pair)
    return first, second


def load_weights(found: Checkpoint, auto_class: str, dtype: str, new_head: bool = False) -> Any:
    """Return a model with all its weights, adapters merged.

    Args:
        found: The checkpoint.
        auto_class: Class of transformers that makes the model from the config.
        dtype: Precision of the model.
        new_head: Layers after the encoder may be missing.

    Raises:
        InputError: A weight is missing or has another shape, so that a random one would take its place.
    """
    import torch
    import transformers

    adapted = found.adapters is not None
    model_class = getattr(transformers, auto_class)
    with tempfile.TemporaryDirectory() as links, loading_errors(found.name):
        # transformers would load adapters by itself, without merging them.
        base = _without_adapters(found.base, links) if adapted and found.base == found.name else found.base
        model, info = model_class.from_pretrained(
            base,
            config=found.config,
            dtype=torch.float32 if adapted else getattr(torch, dtype),
            trust_remote_code=False,
            ignore_mismatched_sizes=new_head or adapted,
            output_loading_info=True,
        )
    model.config.name_or_path = found.name
    _check_weights(found.name, model.base_model_prefix, info, new_head or adapted)
    return _merge(found.name, model, new_head).to(getattr(torch, dtype)) if adapted else model


def _check_weights(name: str, prefix: str, info: Mapping[str, Any], new_head: bool) -> None:
    """Check that a checkpoint has every weight of the model. Warn of what the model has no place for."""
    wrong = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    if new_head:  # all layers outside the encoder, and its pooler, are trained
        wrong = {key for key in wrong if key.startswith(f"{prefix}.") and ".pooler." not in key}
    unexpected = sorted(info["unexpected_keys"])
    shown = ", ".join(unexpected[:SHOWN_WEIGHTS])
    if wrong:
        weights = ", ".join(sorted(wrong)[:SHOWN_WEIGHTS])
        others = f" The file has {len(unexpected):,} other weights, such as {shown}." if unexpected else ""
        raise InputError(
            f"{name}: {len(wrong):,} weights of the model are missing or have another shape, such as {weights}."
            f"{others} Save the model again as a whole, with save_pretrained."
        )
    if unexpected and not new_head:
        warn(f"{name}: {len(unexpected):,} weights have no place in this model and are not used, such as {shown}.")


def _without_adapters(name: str, folder: str) -> str:
    """Return a folder of links to the files of a checkpoint but those of adapters."""
    import huggingface_hub

    source = name if os.path.isdir(name) else huggingface_hub.snapshot_download(name)
    for file in os.listdir(source):
        if not file.startswith("adapter_"):
            os.symlink(os.path.abspath(os.path.join(source, file)), os.path.join(folder, file))
    return folder


def _merge(name: str, model: Any, new_head: bool) -> Any:
    """Return a model with the adapters of a checkpoint merged into its weights."""
    from peft import PeftModel

    with loading_errors(name), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, name)
    if missing := [warning for warning in caught if "missing adapter keys" in str(warning.message)]:
        raise InputError(f"{name}: {shorten(missing[0].message)}. Save the adapters again.")
    saved_layers = getattr(adapted.peft_config["default"], "modules_to_save", None)
    if not (new_head or saved_layers) and type(model).__name__.endswith("ForSequenceClassification"):
        raise InputError(f"{name}: the adapters come without a trained output layer. Save the output layer with them.")
    return adapted.merge_and_unload()


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
