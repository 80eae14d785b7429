"""monoT5: a sequence-to-sequence reranker."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inpars_lib.cli import InputError
from inpars_lib.rerankers.base import Reranker, compute_in_float32

if TYPE_CHECKING:
    import numpy
    import torch

# Target words of T5-like rerankers, the usual pair first. T5 and Flan-T5 have "true" and "false" as one token each,
# mT5 has only "yes" and "no".
TARGET_WORDS = [("true", "false"), ("yes", "no")]


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
        if model.dtype == torch.float32 and not self.is_fast:
            self.use_full_forward()
        if getattr(model.config, "decoder_start_token_id", None) is None:  # T5 starts with padding, often implicitly
            model.config.decoder_start_token_id = model.config.pad_token_id
        self.target_ids = self._find_targets(targets or getattr(model.config, "answers", None))
        model.config.answers = tokenizer.convert_ids_to_tokens(self.target_ids)  # saved with the model
        self._separator = numpy.array(self.ids("Document:"), dtype=numpy.int32)
        self._suffix = numpy.array([*self.ids("Relevant:"), tokenizer.eos_token_id], dtype=numpy.int32)
        self._check_max_length(len(self._separator) + len(self._suffix))  # positions are relative: no upper limit

    def use_full_forward(self) -> None:
        """Score a model in float32 with transformers' own forward pass, which knows adapters and other layers."""
        self.is_fast = False
        compute_in_float32(self.model.lm_head)

    def _find_targets(self, targets: Sequence[str] | None) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        pairs = [targets] if targets else TARGET_WORDS
        for pair in pairs:
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
            from inpars_lib.rerankers.t5_forward import first_token_logits

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
