"""Rerankers from causal language models that answer yes or no, and their prompts."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from inpars_lib.cli import InputError, report
from inpars_lib.rerankers.base import Reranker, compute_in_float32

if TYPE_CHECKING:
    import numpy
    import torch


class Template(NamedTuple):
    """The prompt of a family of causal rerankers, in parts that no token spans.

    Attributes:
        source: Where the prompt is published.
        sentence: A sentence of the prompt, by which a chat template is recognised.
        prefix: The prompt up to the query, `{instruction}` included.
        query: What surrounds the query.
        separator: Between query and document.
        suffix: After the document.
        words: Tokens for relevant and not relevant.
        instruction: The default, as it stands in the prompt.
        told: What surrounds another instruction.
    """

    source: str
    sentence: str
    prefix: str
    query: str
    separator: str
    suffix: str
    words: tuple[str, str]
    instruction: str
    told: str = "{}"

    def markers(self) -> list[str]:
        """Return the special tokens of the prompt."""
        return re.findall(r"</?(?:think|\|im_\w+\|)>", self.prefix + self.suffix)


# By a part of the names under which the models are published
TEMPLATES = {
    "qwen3-reranker": Template(
        "https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, section Transformers Usage",
        sentence="Judge whether the Document meets the requirements",
        prefix=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: {instruction}\n<Query>:"
        ),
        query=" {}\n",
        separator="<Document>:",
        suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        words=("yes", "no"),
        instruction="Given a web search query, retrieve relevant passages that answer the query",
    ),
    "mxbai-rerank": Template(
        "https://github.com/mixedbread-ai/mxbai-rerank, mxbai_rerank_v2.py",
        sentence="You are a search relevance expert",
        prefix=(
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n{instruction}query:"
        ),
        query=" {}",
        separator="\ndocument:",
        suffix=(
            "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
            "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
            "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
        ),
        words=("1", "0"),
        instruction="",
        told="instruction: {}\n",
    ),
}
QWEN3 = TEMPLATES["qwen3-reranker"]


def find_template(name: str, config: Any, tokenizer: Any, any_model: bool) -> Template:
    """Return the prompt of a causal model: by its name, its chat template, or the target words of its training.

    Args:
        name: Folder or name of the model.
        config: Its config.
        tokenizer: Its tokenizer.
        any_model: Take Qwen3-Reranker's prompt for an unknown model, because it is to be trained or the user has said
            target words and instruction.

    Raises:
        InputError: The model is unknown.
    """
    chat, answers = str(getattr(tokenizer, "chat_template", "")), tuple(getattr(config, "answers", ()))
    for family, template in TEMPLATES.items():
        if family in name.lower() or template.sentence in chat or answers == template.words:
            return template
    if not (any_model or answers):
        raise InputError(
            f"{name}: not known as a reranker. Known: {', '.join(TEMPLATES)}. To score with this causal model all the "
            "same, in Qwen3-Reranker's prompt, add --token_true, --token_false and --instruction."
        )
    return QWEN3


class CausalReranker(Reranker):
    """Causal language model that answers `yes` or `no` after query and document (arXiv 2506.05176).

    The score is the logit of the first target word minus the logit of the second at the last position.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int,
        template: Template = QWEN3,
        targets: tuple[str, str] | None = None,
        instruction: str | None = None,
    ) -> None:
        import numpy
        import torch

        super().__init__(model, tokenizer, max_length)
        name = model.config.name_or_path
        vocabulary = tokenizer.get_vocab()
        words = targets or getattr(model.config, "answers", None) or template.words
        if absent := [word for word in (*template.markers(), *words) if word not in vocabulary]:
            raise InputError(
                f"{name}: its vocabulary has no token {absent[0]!r}, which the prompt or the answer needs. "
                "Name a Qwen3-Reranker, a T5 or a cross-encoder."
            )
        self.target_ids = [vocabulary[word] for word in words]
        model.config.answers = list(words)  # saved with the model
        self.template, self.instruction = template, instruction or template.instruction
        said = template.told.format(instruction) if instruction else template.instruction
        # Joined, the tokens of these parts are the tokens of the whole: no token spans two of them.
        parts = (template.prefix.replace("{instruction}", said), template.separator, template.suffix)
        self._prefix, self._separator, self._suffix = (numpy.array(self.ids(part), numpy.int32) for part in parts)
        if model.dtype == torch.float32:
            compute_in_float32(model.get_output_embeddings())
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        self._check_max_length(sum(map(len, (self._prefix, self._separator, self._suffix))), limit)
        prompt = next(family for family, known in TEMPLATES.items() if known is template)
        report(f"{name}: scored with the prompt of {prompt}, logit of {words[0]!r} minus logit of {words[1]!r}")

    def tokenize(self, texts: Sequence[str]) -> list["numpy.ndarray"]:
        """Return the token ids of each document with the space before it, truncated to `max_length`."""
        return super().tokenize([f" {text}" for text in texts])

    def tokenize_queries(self, queries: Sequence[str]) -> list["numpy.ndarray"]:
        """Return the token ids of each query with what surrounds it."""
        return super().tokenize([self.template.query.format(query) for query in queries])

    def build_input(self, query: "numpy.ndarray", text: "numpy.ndarray") -> tuple["numpy.ndarray", int]:
        """Return the tokens of the whole prompt."""
        import numpy

        space = self.max_length - sum(map(len, (self._prefix, self._separator, self._suffix)))
        text = text[: max(0, space - len(query))]
        return numpy.concatenate((self._prefix, query[:space], self._separator, text, self._suffix)), 0

    def pad(self, inputs: Sequence[tuple["numpy.ndarray", int]]) -> dict[str, "torch.Tensor"]:
        """Return a batch of inputs, padded on the left: the last position of every row is its last token."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.from_numpy(row).long() for row, _ in inputs]
        parts = {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows]}
        batch = {name: pad_sequence(part, batch_first=True, padding_side="left") for name, part in parts.items()}
        self._check_ids(batch["input_ids"])
        return batch

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        """Return 1.0 or 0.0 per pair, shape (pairs,)."""
        import torch

        return torch.tensor(relevant).float()

    def loss(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the binary cross-entropy: minus the log softmax of the right target over both targets."""
        import torch

        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.relevance_logits(model, inputs)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])

    def relevance_logits(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the logit of the first target minus that of the second at the last position."""
        logits = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1, self.target_ids].float()
        return logits[:, 0] - logits[:, 1]

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the difference of both targets' logits, in float32, without the logits of other tokens."""
        import torch

        hidden = self.model.base_model(**batch, use_cache=False).last_hidden_state[:, -1]
        first, second = self.model.get_output_embeddings().weight[self.target_ids].float()
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 logits would make ties
            return hidden.float() @ (first - second)
