"""Pointwise rerankers: `MonoT5`, `CrossEncoder`, `CausalReranker`, loaded from a checkpoint and called the same way.

    reranker = load_reranker("castorini/monot5-base-msmarco-10k", device="cuda")
    scores = reranker.score([("how long do cats sleep", "Cats sleep sixteen hours a day."), ...])

A higher score means more relevant. benchmarks/NOTES.md has the measurements behind what makes scoring fast.
"""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inpars_lib.causal_reranker import CausalReranker
from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.devices import choose_dtype, default_device
from inpars_lib.reranker_base import Reranker

if TYPE_CHECKING:
    import numpy
    import torch

# Target words of T5-like rerankers, the usual pair first. T5 and Flan-T5 have "true" and "false" as one token each,
# mT5 has only "yes" and "no".
TARGET_WORDS = [("true", "false"), ("yes", "no")]
T5_TYPES = ("t5", "mt5", "umt5")  # sequence-to-sequence models whose tokens never cross a space
RELEVANT_LABELS = ("relevant", "true", "yes")  # names of the relevant one of an encoder's two outputs, in id2label
OUTPUT_LAYERS = ("pooler", "pre_classifier", "classifier", "score")  # of encoders, after the last hidden states


class MonoT5(Reranker):
    """Sequence-to-sequence reranker that answers `true` or `false` (Nogueira et al., 2020, arXiv 2003.06713).

    The input is `Query: {query} Document: {document} Relevant:`. The score is the log softmax of `true` over both
    target words at the first decoding step.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, targets: tuple[str, str] | None = None) -> None:
        import numpy
        import torch

        super().__init__(model, tokenizer, max_length)
        # mT5 and UMT5 scale and bias differently, and float16 needs transformers' mixed precision: the fast forward
        # pass is for T5 in float32 and bfloat16 only.
        self.is_fast = model.config.model_type == "t5" and model.dtype != torch.float16
        if getattr(model.config, "decoder_start_token_id", None) is None:  # T5 starts with padding, often implicitly
            model.config.decoder_start_token_id = model.config.pad_token_id
        self.target_ids = self._find_targets(targets or getattr(model.config, "answers", None))
        model.config.answers = tokenizer.convert_ids_to_tokens(self.target_ids)  # saved with the model
        self._separator = numpy.array(self.ids("Document:"), dtype=numpy.int32)
        self._suffix = numpy.array([*self.ids("Relevant:"), tokenizer.eos_token_id], dtype=numpy.int32)
        self._check_max_length(len(self._separator) + len(self._suffix))  # positions are relative: no upper limit

    def _find_targets(self, targets: Sequence[str] | None) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        for pair in [targets] if targets else TARGET_WORDS:
            pieces = [self.ids(word) for word in pair]
            # A saved target is spelt as a token, with its word boundary mark: "▁true".
            pieces = [ids if len(ids) == 1 else [vocabulary.get(w, -1)] for w, ids in zip(pair, pieces, strict=True)]
            known = all(ids[0] not in (-1, self.tokenizer.unk_token_id) for ids in pieces)
            if known and pieces[0] != pieces[1]:
                return [ids[0] for ids in pieces]
        named = " and ".join(targets or ["true/yes", "false/no"])
        raise InputError(
            f"{self.model.config.name_or_path}: {named} are not one token each in this model's vocabulary. Name two "
            "words that are (--token_true and --token_false of train_t5.py and rerank.py)."
        )

    def tokenize_queries(self, queries: Sequence[str]) -> list["numpy.ndarray"]:
        """Return the token ids of `Query: {query}`."""
        return self.tokenize([f"Query: {query}" for query in queries])

    def build_input(self, query: "numpy.ndarray", text: "numpy.ndarray") -> tuple["numpy.ndarray", int]:
        """Return the tokens of the whole input. T5's tokens never cross a space, so its parts can be joined."""
        import numpy

        space = self.max_length - len(self._suffix)
        query = query[: space - len(self._separator)]
        space -= len(query) + len(self._separator)
        return numpy.concatenate((query, self._separator, text[:space], self._suffix)), len(query)

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the log softmax of the first target word."""
        import torch

        if self.is_fast:
            from inpars_lib.t5_forward import first_token_logits

            mask = batch["attention_mask"].bool()
            logits = first_token_logits(self.model, batch["input_ids"], mask, self.target_ids)
            margins = logits[:, 0] - logits[:, 1]
        else:
            margins = self.relevance_logits(self.model, batch)
        # Equal to log_softmax(...)[:, 0], but precise for large margins, where log_softmax rounds to ties.
        return torch.nn.functional.logsigmoid(margins.float())

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        """Return the target word and the end of the sequence, shape (pairs, 2)."""
        import torch

        eos = self.tokenizer.eos_token_id
        return torch.tensor([[self.target_ids[0 if r else 1], eos] for r in relevant])

    def relevance_logits(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the logit of the first target word minus that of the second."""
        ids = batch["input_ids"]
        start = ids.new_full((len(ids), 1), self.model.config.decoder_start_token_id)
        logits = model(**batch, decoder_input_ids=start).logits[:, 0, self.target_ids].float()
        return logits[:, 0] - logits[:, 1]


class CrossEncoder(Reranker):
    """Encoder that reads query and document together (arXiv 1901.04085), as in InPars-light (arXiv 2301.02998).

    One output is the score; of two, the score is the relevant one minus the other. The training loss is the binary
    cross-entropy of each pair.

    Attributes:
        relevant: Number of the relevant output of two, None of one.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, relevant: int | None = None) -> None:
        import numpy

        super().__init__(model, tokenizer, max_length)
        self.relevant = relevant
        # Special tokens before, between and after the two segments: [CLS], [SEP], [SEP] or this tokenizer's own.
        pair = tokenizer("a", "a")
        segments = pair.sequence_ids()
        first, second = ([i for i, segment in enumerate(segments) if segment == n] for n in (0, 1))
        ids = numpy.array(pair.input_ids, dtype=numpy.int32)
        self._prefix, self._separator = ids[: first[0]], ids[first[-1] + 1 : second[0]]
        self._suffix = ids[second[-1] + 1 :]
        limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)
        self._check_max_length(len(self._prefix) + len(self._separator) + len(self._suffix), limit)
        if model.dtype.itemsize < 4:  # the output layers stay in float32: with fewer bits, similar documents would tie
            for name, module in model.named_modules():
                if name.rpartition(".")[2] in OUTPUT_LAYERS and name.count(".") < 2:
                    module.float().register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))

    def build_input(self, query: "numpy.ndarray", text: "numpy.ndarray") -> tuple["numpy.ndarray", int]:
        """Return the tokens of both segments with this tokenizer's special tokens."""
        import numpy

        query = query[: self.max_length // 2]  # only a query of half the input is truncated
        space = self.max_length - len(query) - len(self._prefix) - len(self._separator) - len(self._suffix)
        joined = numpy.concatenate((self._prefix, query, self._separator, text[:space], self._suffix))
        return joined, len(self._prefix) + len(query) + len(self._separator)

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        """Return 1.0 or 0.0 per pair, shape (pairs, 1)."""
        import torch

        return torch.tensor([[float(r)] for r in relevant])

    def relevance_logits(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the model's output, or the difference of its two outputs."""
        logits: torch.Tensor = model(**batch).logits
        return logits[:, 0] if self.relevant is None else logits[:, self.relevant] - logits[:, 1 - self.relevant]


# ----------------------------------------------------------------------------------------------------------- loading


def checkpoint_name(name: str) -> str:
    """Return a checkpoint's name on the hub: the paper's `t5_base` is `google-t5/t5-base`."""
    size = name.removeprefix("t5_").removeprefix("t5-")
    return f"google-t5/t5-{size}" if name != size and size in ("small", "base", "large", "3b", "11b") else name


def _relevant_output(name: str, config: Any) -> int:
    """Return which output of a cross-encoder with two says that a document is relevant."""
    labels: list[str] = [str(config.id2label.get(i)) for i in range(config.num_labels)]
    if len(labels) != 2:
        raise InputError(f"{name}: this cross-encoder has {len(labels)} outputs. Name one with one or two outputs.")
    if labels == ["LABEL_0", "LABEL_1"]:  # transformers' names if a config has none
        warn(f"{name}: its outputs have no names, so the second is taken for relevant, the usual order.")
        return 1
    named = [i for i, label in enumerate(labels) if label.lower() in RELEVANT_LABELS]
    if len(named) != 1:
        raise InputError(
            f"{name}: its two outputs are called {labels[0]!r} and {labels[1]!r}. If this is a reranker, call the "
            'relevant one "relevant" in "id2label" of its config.json.'
        )
    return named[0]


def load_reranker(
    checkpoint: str,
    *,
    max_length: int = 512,
    device: str | None = None,
    dtype: str = "auto",
    targets: tuple[str, str] | None = None,
    new_head: bool = False,
    instruction: str | None = None,
) -> Reranker:
    """Load a reranker from a folder or from the Hugging Face hub. Its config tells the family.

    Args:
        checkpoint: Folder, hub name, or `t5_SIZE`.
        max_length: Tokens per pair.
        device: `cpu`, `cuda`, `cuda:1`, ...; by default the first GPU, if there is one.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where it is fast, otherwise float32.
        targets: Words for relevant and not relevant of a T5-like or causal model; by default the model's own.
        new_head: Give an encoder without a trained output a randomly initialized one, to be trained.
        instruction: Task that a causal model reads before the query; by default web search.

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
        architectures = config.architectures or []
        causal = not config.is_encoder_decoder and any(kind.endswith("ForCausalLM") for kind in architectures)
        if instruction and not causal:
            raise InputError(f"--instruction: {name} reads no instruction; only causal models do. Omit the flag.")
        if causal:
            if new_head:
                raise InputError(f"{name}: causal models rerank, but cannot be trained here. Name a T5 or an encoder.")
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
                relevant = _relevant_output(name, config)
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
