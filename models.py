"""The pointwise relevance models: `MonoT5` and `CrossEncoder`, made from a checkpoint and asked the same way.

    model = load_model("castorini/monot5-base-msmarco-10k", device="cuda")
    scores = model.score([("how long do cats sleep", "Cats sleep sixteen hours a day."), ...])

Higher is more relevant. This file knows nothing of files other than checkpoints.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from formats import InputError, Triple

if TYPE_CHECKING:
    import numpy
    import torch

# Pairs of answers that T5-like rerankers were trained to give, the usual one first. A vocabulary decides: the T5 and
# Flan-T5 ones have "true" and "false" as one piece each, that of mT5 has "yes" and "no" alone.
ANSWERS = [("true", "false"), ("yes", "no")]


class Reranker:
    """What the two families share: batches, and a loop over them. `model` may be on any device."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)

    def encode(self, query: str, text: str) -> dict[str, list[int]]:
        """The token ids of a pair, at most `max_length`. What is too long loses tokens of the document."""
        raise NotImplementedError

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """The scores, shape (pairs,), of a padded batch with `input_ids` and `attention_mask` of (pairs, tokens)."""
        raise NotImplementedError

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        """The targets of pairs, as the checkpoint's own loss wants them."""
        raise NotImplementedError

    def pad(self, encoded: list[dict[str, list[int]]]) -> dict[str, "torch.Tensor"]:
        return dict(self.tokenizer.pad(encoded, return_tensors="pt"))

    def collate(self, triples: list[Triple]) -> dict[str, "torch.Tensor"]:
        """A training batch: each triple is a positive and a negative pair, so that every batch has as many of both."""
        pairs = [(triple.query, text) for triple in triples for text in (triple.positive, triple.negative)]
        batch = self.pad([self.encode(*pair) for pair in pairs])
        return {**batch, "labels": self.labels([True, False] * len(triples))}

    def score(self, pairs: Sequence[tuple[str, str]], batch_size: int = 32) -> "numpy.ndarray":
        """The scores of (query, document text) pairs, shape (pairs,), float32, in the order given.

        Batches hold pairs of like length, so that little is padded.
        """
        import numpy
        import torch

        encoded = [self.encode(*pair) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda i: len(encoded[i]["input_ids"]))
        scores = numpy.empty(len(pairs), dtype=numpy.float32)
        training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = self.pad([encoded[i] for i in chosen])
                scores[chosen] = self.forward({k: v.to(self.model.device) for k, v in batch.items()}).float().cpu()
        self.model.train(training)
        return scores


class MonoT5(Reranker):
    """A sequence-to-sequence model that answers `true` or `false` (Nogueira et al., 2020, arXiv 2003.06713).

    The input is `Query: {query} Document: {text} Relevant:`, the score the logarithm of the probability of `true`
    against `false` at the first step of decoding.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, answers: tuple[str, str] | None = None) -> None:
        super().__init__(model, tokenizer, max_length)
        if getattr(model.config, "decoder_start_token_id", None) is None:  # T5 starts with the padding, mostly unsaid
            model.config.decoder_start_token_id = model.config.pad_token_id
        self.answer_ids = self._find_answers(answers or getattr(model.config, "answers", None))
        model.config.answers = tokenizer.convert_ids_to_tokens(self.answer_ids)  # saved, so that reranking finds them
        self._suffix = [*self._tokens("Relevant:"), tokenizer.eos_token_id]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _find_answers(self, answers: Sequence[str] | None) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        for pair in [answers] if answers else ANSWERS:
            pieces = [self._tokens(word) for word in pair]
            # What is no piece as a word may be one as it is written, with its mark of a blank: "▁true".
            pieces = [ids if len(ids) == 1 else [vocabulary.get(w, -1)] for w, ids in zip(pair, pieces, strict=True)]
            known = all(ids[0] not in (-1, self.tokenizer.unk_token_id) for ids in pieces)
            if known and pieces[0] != pieces[1]:
                return [ids[0] for ids in pieces]
        asked = " and ".join(answers or ["true/yes", "false/no"])
        raise InputError(
            f"{asked} are not one token each in the vocabulary of this model; name two that are with --token_true and "
            "--token_false"
        )

    def encode(self, query: str, text: str) -> dict[str, list[int]]:
        # T5's pieces never reach across a blank, so that the parts give the tokens of the whole.
        room = self.max_length - len(self._suffix)
        prefix, label = self._tokens(f"Query: {query}"), self._tokens("Document:")
        prefix = prefix[: room - len(label)] + label
        return {"input_ids": prefix + self._tokens(text)[: room - len(prefix)] + self._suffix}

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        start = batch["input_ids"].new_full((len(batch["input_ids"]), 1), self.model.config.decoder_start_token_id)
        logits = self.model(**batch, decoder_input_ids=start).logits[:, 0, self.answer_ids]
        return logits.float().log_softmax(dim=-1)[:, 0]

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        import torch

        eos = self.tokenizer.eos_token_id
        return torch.tensor([[self.answer_ids[0 if r else 1], eos] for r in relevant])


class CrossEncoder(Reranker):
    """An encoder that reads query and document together and has one output, the score (arXiv 1901.04085).

    As in InPars-light (arXiv 2301.02998); the loss is the binary cross-entropy of each pair.
    """

    def encode(self, query: str, text: str) -> dict[str, list[int]]:
        room = self.max_length // 2  # for the query, which is cut only when nothing would be left of the document
        spans = self.tokenizer(query, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if len(spans.input_ids) > room:
            query = query[: spans.offset_mapping[room - 1][1]]
        return dict(self.tokenizer(query, text, truncation="only_second", max_length=self.max_length))

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        return self.model(**batch).logits[:, 0]

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        import torch

        return torch.tensor([[float(r)] for r in relevant])


def checkpoint_name(name: str) -> str:
    """A checkpoint as users write it: the paper's `t5_base` is the hub's `google-t5/t5-base`."""
    size = name.removeprefix("t5_").removeprefix("t5-")
    return f"google-t5/t5-{size}" if name != size and size in ("small", "base", "large", "3b", "11b") else name


def load_model(
    checkpoint: str,
    *,
    max_length: int = 512,
    device: str | None = None,
    dtype: str = "auto",
    answers: tuple[str, str] | None = None,
    new_head: bool = False,
) -> Reranker:
    """Load a reranker from a folder or the Hugging Face hub; its config says of which family it is.

    Args:
        max_length: tokens of a pair at most.
        device: `cpu`, `cuda`, `cuda:1`, ...; the first GPU by default, if there is one.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on a GPU that has it, float32 elsewhere.
        answers: the words for relevant and not relevant of a T5-like model; its own by default.
        new_head: an encoder without a trained output gets a random one, to be trained.

    Raises:
        InputError: there is no such checkpoint, or it is no reranker.
    """
    import os

    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # it would report the new head at length
    transformers.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    name = checkpoint if os.path.isdir(checkpoint) else checkpoint_name(checkpoint)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if config.is_encoder_decoder:
            model = transformers.AutoModelForSeq2SeqLM.from_pretrained(name, dtype=getattr(torch, dtype))
            return MonoT5(model.to(device), tokenizer, max_length, answers)
        trained = any("ForSequenceClassification" in architecture for architecture in config.architectures or [])
        if trained and config.num_labels != 1:
            raise InputError(f"{name} has {config.num_labels} outputs; a cross-encoder for reranking has one")
        if not trained and not new_head:
            raise InputError(
                f"{name} has no trained output to rerank with; train it first with train_t5.py --base_model"
            )
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            problem_type="multi_label_classification",  # transformers' name for the binary cross-entropy of each output
            dtype=getattr(torch, dtype),
        )
        return CrossEncoder(model.to(device), tokenizer, max_length)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the model {name}: it is no folder with a checkpoint, and as a name on the Hugging Face hub "
            f"it gave: {' '.join(str(error).split())[:300]}"
        ) from None
