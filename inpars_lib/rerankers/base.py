"""Base class of the rerankers: tokenization, batches, scoring."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from inpars_lib.cli import InputError, warn

if TYPE_CHECKING:
    import numpy
    import torch

CPU_BATCH_TOKENS = 2048  # tokens per batch on a CPU; larger batches no longer fit its caches
GPU_BATCH_TOKENS = 65536  # upper bound of tokens per batch on a GPU
OUT_OF_MEMORY = re.compile("(?i)out of memory|can't allocate memory")


def compute_in_float32(module: Any) -> None:
    """Make a module of a model compute in float32, inside `torch.autocast` too.

    Output layers need this: with fewer bits, similar documents would tie.
    """
    import torch

    contexts: list[Any] = []

    def enter(_: Any, inputs: tuple["torch.Tensor", ...]) -> tuple["torch.Tensor", ...]:
        contexts.append(torch.autocast(inputs[0].device.type, enabled=False))
        contexts[-1].__enter__()
        return tuple(x.float() for x in inputs)

    def leave(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    module.float().register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


class Reranker:
    """Base class of the rerankers: tokenization, batches, scoring.

    Attributes:
        model: The transformers model, on any device.
        tokenizer: Its tokenizer.
        max_length: Tokens per pair.
        batch_tokens: Tokens per batch. None until the device decides.
        instruction: Task that a causal model reads before the query. None for other models.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens: int | None = None
        self.instruction: str | None = None
        self._n_embeddings: int = model.get_input_embeddings().num_embeddings

    def _check_max_length(self, added_tokens: int, limit: float = math.inf) -> None:
        if self.max_length > limit:
            name = self.model.config.name_or_path
            warn(f"{name}: reads at most {limit} tokens, so inputs are truncated to {limit} and not {self.max_length}.")
            self.max_length = int(limit)
        if self.max_length < added_tokens + 2:
            raise InputError(
                f"--max_length {self.max_length}: too short for {added_tokens} special tokens and a token of query "
                f"and document each. Use at least {added_tokens + 2}."
            )

    # ------------------------------------------------------------------------------------------------------ tokens

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def tokenize(self, texts: Sequence[str]) -> list["numpy.ndarray"]:
        """Return the token ids of each text, int32, without special tokens, truncated to `max_length`."""
        import numpy

        if not len(texts):
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, truncation=True, max_length=self.max_length, verbose=False
        )
        return [numpy.array(ids, dtype=numpy.int32) for ids in encoded.input_ids]

    def tokenize_queries(self, queries: Sequence[str]) -> list["numpy.ndarray"]:
        """Return the token ids of each query, as `build_input` takes them."""
        return self.tokenize(queries)

    def build_input(self, query: "numpy.ndarray", text: "numpy.ndarray") -> tuple["numpy.ndarray", int]:
        """Return the model input of a pair, at most `max_length` tokens, and the position of its second segment.

        A pair that is too long loses tokens of the document.
        """
        raise NotImplementedError

    def added_tokens(self) -> int:
        """Return the number of tokens that `build_input` adds to those of query and document."""
        query, text = self.tokenize_queries([""])[0], self.tokenize([""])[0]
        return len(self.build_input(query, text)[0]) - len(query) - len(text)

    def encode(self, query: str, text: str) -> tuple["numpy.ndarray", int]:
        """Return `build_input` of two strings."""
        return self.build_input(*self.tokenize_queries([query]), *self.tokenize([text]))

    def pad(self, inputs: Sequence[tuple["numpy.ndarray", int]]) -> dict[str, "torch.Tensor"]:
        """Return a batch of inputs from `build_input`, int64 tensors of shape (pairs, longest input).

        Raises:
            InputError: The model has no embedding of a token.
        """
        import torch

        shape = len(inputs), max(len(ids) for ids, _ in inputs)
        batch = {"input_ids": torch.full(shape, self.tokenizer.pad_token_id)}
        batch |= {name: torch.zeros(shape, dtype=torch.int64) for name in ("attention_mask", "token_type_ids")}
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        for i, (ids, second_segment) in enumerate(inputs):
            arrays["input_ids"][i, : len(ids)] = ids
            arrays["attention_mask"][i, : len(ids)] = 1
            arrays["token_type_ids"][i, second_segment : len(ids)] = 1
        self._check_ids(batch["input_ids"])
        return {name: tensor for name, tensor in batch.items() if name in self.tokenizer.model_input_names}

    def _check_ids(self, ids: "torch.Tensor") -> None:
        """Check that the model has an embedding of each token, where torch would raise an IndexError."""
        largest = int(ids.max())
        if largest >= self._n_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"{self.model.config.name_or_path}: the tokenizer's token {token!r} has no embedding in this model. "
                "Put the files of the model's own tokenizer (tokenizer.json) into its folder."
            )

    # ----------------------------------------------------------------------------------------------------- training

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        """Return the training targets of pairs, as the model's own loss takes them."""
        raise NotImplementedError

    def collate(self, examples: Sequence[tuple[str, str, bool]]) -> dict[str, "torch.Tensor"]:
        """Return a training batch of (query, document, relevant or not) examples."""
        queries, texts, relevant = map(list, zip(*examples, strict=True))
        batch = self.pad(list(map(self.build_input, self.tokenize_queries(queries), self.tokenize(texts))))
        return {**batch, "labels": self.labels(relevant)}

    def loss(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the mean pointwise loss of a batch of `collate`: the model's own, unless a family has another."""
        loss: torch.Tensor = model(**batch).loss
        return loss

    def relevance_logits(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the relevance logit of each pair, shape (pairs,), differentiable. `model` may be a DDP wrapper."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ scoring

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the scores of a padded batch, shape (pairs,): the relevance logits, unless a family has others."""
        return self.relevance_logits(self.model, batch)

    def score(
        self, pairs: Sequence[tuple[str, str]], on_batch: Callable[[int], object] | None = None
    ) -> "numpy.ndarray":
        """Return the scores of (query, document) pairs of strings, shape (pairs,), float32, in the order given."""
        queries = list(dict.fromkeys(query for query, _ in pairs))
        texts = list(dict.fromkeys(text for _, text in pairs))
        query_ids = dict(zip(queries, self.tokenize_queries(queries), strict=True))
        text_ids = dict(zip(texts, self.tokenize(texts), strict=True))
        return self.score_tokens([(query_ids[query], text_ids[text]) for query, text in pairs], on_batch)

    def score_tokens(
        self,
        pairs: Sequence[tuple["numpy.ndarray", "numpy.ndarray"]],
        on_batch: Callable[[int], object] | None = None,
    ) -> "numpy.ndarray":
        """Return the scores of pairs of token ids, from `tokenize_queries` and `tokenize`.

        Batches hold pairs of similar length, the longest first, so that little is padding and memory runs out at
        once or not at all. The same pairs give the same batches, and so the same bits. `on_batch` is called after
        each batch with the batch's size.
        """
        import numpy
        import torch

        inputs = [self.build_input(*pair) for pair in pairs]
        lengths = numpy.array([len(ids) for ids, _ in inputs])
        order = numpy.argsort(-lengths, kind="stable").tolist()
        scores = numpy.empty(len(pairs), dtype=numpy.float32)
        self.batch_tokens = self.batch_tokens or self.default_batch_tokens()
        training = self.model.training
        self.model.eval()
        start = 0
        with torch.inference_mode():
            while start < len(order):
                chosen = order[start : start + max(1, self.batch_tokens // max(1, int(lengths[order[start]])))]
                try:
                    batch = self.pad([inputs[i] for i in chosen])
                    scored = self.forward({k: v.to(self.model.device) for k, v in batch.items()}).float().cpu()
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if len(chosen) == 1 or not OUT_OF_MEMORY.search(str(error)):
                        raise
                    self.batch_tokens = max(1, self.batch_tokens // 2)
                    continue
                if not torch.isfinite(scored).all():
                    ids = inputs[chosen[int(torch.isfinite(scored).int().argmin())]][0]
                    raise InputError(
                        f"{self.model.config.name_or_path}: the score of {self.tokenizer.decode(ids)[:200]!r} is not a "
                        "finite number. Use float32, or another model."
                    )
                scores[chosen] = scored
                start += len(chosen)
                if on_batch:
                    on_batch(len(chosen))
        self.model.train(training)
        return scores

    def default_batch_tokens(self) -> int:
        """Return the tokens per batch whose activations fill about a quarter of the GPU's memory.

        The estimate uses the total memory, not the free memory, so that equal GPUs build equal batches.
        """
        import torch

        if self.model.device.type != "cuda":
            return CPU_BATCH_TOKENS
        config = self.model.config
        width: Any = getattr(config, "d_ff", None) or getattr(config, "intermediate_size", 3072)
        heads: Any = getattr(config, "num_heads", None) or getattr(config, "num_attention_heads", 12)
        # Input and output of the widest layer, and each head's bias towards every other token; times four.
        bytes_per_token = 4 * self.model.dtype.itemsize * (2 * width + heads * self.max_length)
        memory = torch.cuda.mem_get_info(self.model.device)[1] // 4
        return max(self.max_length, min(GPU_BATCH_TOKENS, memory // bytes_per_token))
