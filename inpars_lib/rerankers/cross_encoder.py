"""Cross-encoder: an encoder that reads query and document together."""

import math
from typing import TYPE_CHECKING, Any

from inpars_lib.cli import InputError, warn
from inpars_lib.rerankers.base import Reranker, compute_in_float32

if TYPE_CHECKING:
    import numpy
    import torch

RELEVANT_LABELS = ("relevant", "true", "yes")  # names of the relevant one of an encoder's two outputs, in id2label
OUTPUT_LAYERS = ("pooler", "pre_classifier", "classifier", "score")  # of encoders, after the last hidden states


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
        first = [i for i, segment in enumerate(segments) if segment == 0]
        second = [i for i, segment in enumerate(segments) if segment == 1]
        ids = numpy.array(pair.input_ids, dtype=numpy.int32)
        self._prefix, self._separator = ids[: first[0]], ids[first[-1] + 1 : second[0]]
        self._suffix = ids[second[-1] + 1 :]
        positions = getattr(model.config, "max_position_embeddings", None) or math.inf
        padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
        if padding is not None:  # RoBERTa counts positions from there
            positions -= padding + 1
        # The tokenizer of a model that was trained here has the length of the training, which is no limit.
        limit = positions if hasattr(model.config, "inpars") else min(tokenizer.model_max_length, positions)
        self._check_max_length(len(self._prefix) + len(self._separator) + len(self._suffix), limit)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in OUTPUT_LAYERS and name.count(".") < 2:
                compute_in_float32(module)

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


def relevant_output(name: str, config: Any) -> int:
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
