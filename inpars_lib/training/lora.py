"""LoRA (arXiv 2106.09685): train low-rank adapters of a reranker's linear layers, and merge them at the end."""

from typing import Any

import torch

from inpars_lib.rerankers.base import Reranker
from inpars_lib.rerankers.cross_encoder import OUTPUT_LAYERS
from inpars_lib.rerankers.mono_t5 import MonoT5


def add_adapters(reranker: Reranker, rank: int) -> Any:
    """Add an adapter to each linear layer of a reranker, and freeze everything else but an encoder's output layers.

    Args:
        reranker: The reranker, which has the adapters afterwards.
        rank: Rank of the adapters. Their scale is 2, as of an alpha of twice the rank.

    Returns:
        The model to train, a `peft.PeftModel` whose checkpoints have the adapters only.
    """
    from peft import LoraConfig, get_peft_model

    model = reranker.model
    if isinstance(reranker, MonoT5):
        reranker.use_full_forward()
    # Output layers are trained as they are: those of an encoder may be new, and those of others are tied to embeddings.
    heads = [
        name for name, _ in model.named_modules() if name.rpartition(".")[2] in OUTPUT_LAYERS and name.count(".") < 2
    ]
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not model.get_output_embeddings()
        and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=heads or None)
    return get_peft_model(model, config)
