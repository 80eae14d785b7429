"""A checkpoint: what its files say about the model, its weights, its adapters.

A folder may come from transformers, sentence-transformers or PEFT. What is missing, damaged or not supported is an
error here.
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
    """Return a checkpoint's name on the hub, or its folder: the paper's `t5_base` is `google-t5/t5-base`."""
    if os.path.isdir(name):
        return name
    size = name.removeprefix("t5_").removeprefix("t5-")
    return f"google-t5/t5-{size}" if name != size and size in ("small", "base", "large", "3b", "11b") else name


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
