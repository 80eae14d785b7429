"""The pointwise relevance models: `MonoT5` and `CrossEncoder`, made from a checkpoint and asked the same way.

    model = load_model("castorini/monot5-base-msmarco-10k", device="cuda")
    scores = model.score([("how long do cats sleep", "Cats sleep sixteen hours a day."), ...])

Higher is more relevant. This file knows nothing of files other than checkpoints.

What makes it fast, each measured in benchmarks/NOTES.md: batches of like length under a budget of tokens, each text
tokenised once however many queries it is a hit of, one step of decoding, only the answers' rows of the output layer,
and a forward pass of T5 that does less and goes through memory fewer times than transformers' own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from formats import InputError, in_short

if TYPE_CHECKING:
    import numpy
    import torch

# Pairs of answers that T5-like rerankers were trained to give, the usual one first. A vocabulary decides: the T5 and
# Flan-T5 ones have "true" and "false" as one piece each, that of mT5 has "yes" and "no" alone.
ANSWERS = [("true", "false"), ("yes", "no")]
CPU_TOKENS = 2048  # of a batch on a CPU: more no longer fits into its caches
GPU_TOKENS = 65536  # of a batch on a GPU, at most


class Reranker:
    """What the two families share: tokens, batches, and a loop over them. `model` may be on any device."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.batch_tokens: int | None = None  # of a batch; found from the device when first needed

    # ------------------------------------------------------------------------------------------------------ tokens

    def tokenize(self, texts: Sequence[str]) -> list["numpy.ndarray"]:
        """The token ids of each text, int32, without special tokens, no more than could ever be used."""
        import numpy

        if not len(texts):
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, truncation=True, max_length=self.max_length, verbose=False
        )
        return [numpy.array(ids, dtype=numpy.int32) for ids in encoded.input_ids]

    def tokenize_queries(self, queries: Sequence[str]) -> list["numpy.ndarray"]:
        """The token ids of each query, as `join` takes them."""
        return self.tokenize(queries)

    def join(self, query: "numpy.ndarray", text: "numpy.ndarray") -> tuple["numpy.ndarray", int]:
        """The input of a pair, at most `max_length` tokens, and where its second part begins.

        What is too long loses tokens of the document.
        """
        raise NotImplementedError

    def encode(self, query: str, text: str) -> tuple["numpy.ndarray", int]:
        """The same from texts."""
        return self.join(*self.tokenize_queries([query]), *self.tokenize([text]))

    def pad(self, joined: Sequence[tuple["numpy.ndarray", int]]) -> dict[str, "torch.Tensor"]:
        """What the model takes of pairs from `join`: int64 of shape (pairs, tokens of the longest)."""
        import torch

        shape = len(joined), max(len(ids) for ids, _ in joined)
        batch = {"input_ids": torch.full(shape, self.tokenizer.pad_token_id)}
        batch |= {name: torch.zeros(shape, dtype=torch.int64) for name in ("attention_mask", "token_type_ids")}
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        for i, (ids, second) in enumerate(joined):
            arrays["input_ids"][i, : len(ids)] = ids
            arrays["attention_mask"][i, : len(ids)] = 1
            arrays["token_type_ids"][i, second : len(ids)] = 1
        return {name: tensor for name, tensor in batch.items() if name in self.tokenizer.model_input_names}

    # ----------------------------------------------------------------------------------------------------- training

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        """The targets of pairs, as the checkpoint's own loss wants them."""
        raise NotImplementedError

    def collate(self, examples: Sequence[tuple[str, str, bool]]) -> dict[str, "torch.Tensor"]:
        """A training batch of (query, document text, whether it is relevant)."""
        queries, texts, relevant = map(list, zip(*examples, strict=True))
        batch = self.pad(list(map(self.join, self.tokenize_queries(queries), self.tokenize(texts))))
        return {**batch, "labels": self.labels(relevant)}

    def margins(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """How much rather relevant than not, shape (pairs,), with gradients; `model` is this one, perhaps wrapped."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ scoring

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """The scores, shape (pairs,), of a padded batch with `input_ids` and `attention_mask` of (pairs, tokens)."""
        raise NotImplementedError

    def score(self, pairs: Sequence[tuple[str, str]]) -> "numpy.ndarray":
        """The scores of (query, document text) pairs, shape (pairs,), float32, in the order given."""
        known: list[dict[str, numpy.ndarray]] = []
        for side, tokenize in enumerate((self.tokenize_queries, self.tokenize)):
            texts = list(dict.fromkeys(pair[side] for pair in pairs))
            known.append(dict(zip(texts, tokenize(texts), strict=True)))
        return self.score_tokens([(known[0][query], known[1][text]) for query, text in pairs])

    def score_tokens(self, pairs: Sequence[tuple["numpy.ndarray", "numpy.ndarray"]]) -> "numpy.ndarray":
        """The same for (query, document) pairs of token ids, from `tokenize_queries` and `tokenize`.

        Batches hold pairs of like length, the longest first, so that little is padded and too little memory shows at
        once. The same pairs give the same batches, and so the same bits.
        """
        import numpy
        import torch

        joined = [self.join(*pair) for pair in pairs]
        lengths = numpy.array([len(ids) for ids, _ in joined])
        order = numpy.argsort(-lengths, kind="stable").tolist()
        scores = numpy.empty(len(pairs), dtype=numpy.float32)
        self.batch_tokens = self.batch_tokens or self.find_batch_tokens()
        training = self.model.training
        self.model.eval()
        start = 0
        with torch.inference_mode():
            while start < len(order):
                chosen = order[start : start + max(1, self.batch_tokens // max(1, int(lengths[order[start]])))]
                try:
                    batch = self.pad([joined[i] for i in chosen])
                    scored = self.forward({k: v.to(self.model.device) for k, v in batch.items()}).float().cpu()
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if len(chosen) == 1 or not is_out_of_memory(error):
                        raise
                    self.batch_tokens = max(1, self.batch_tokens // 2)
                    continue
                scores[chosen] = scored
                start += len(chosen)
        self.model.train(training)
        return scores

    def find_batch_tokens(self) -> int:
        """As many tokens as a quarter of the GPU's memory holds the activations of, roughly.

        Of the whole memory, not of what is free: like cards make like batches, and so like scores.
        """
        import torch

        if self.model.device.type != "cuda":
            return CPU_TOKENS
        config = self.model.config
        width = getattr(config, "d_ff", None) or getattr(config, "intermediate_size", 3072)
        heads = getattr(config, "num_heads", None) or getattr(config, "num_attention_heads", 12)
        # The widest layer's input and output, and each head's bias towards every other token; four times all of that.
        each = 4 * self.model.dtype.itemsize * (2 * width + heads * self.max_length)
        memory = torch.cuda.mem_get_info(self.model.device)[1] // 4
        return max(self.max_length, min(GPU_TOKENS, memory // each))


def is_out_of_memory(error: Exception) -> bool:
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()


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
        import numpy

        self._label = numpy.array(self._ids("Document:"), dtype=numpy.int32)
        self._suffix = numpy.array([*self._ids("Relevant:"), tokenizer.eos_token_id], dtype=numpy.int32)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _find_answers(self, answers: Sequence[str] | None) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        for pair in [answers] if answers else ANSWERS:
            pieces = [self._ids(word) for word in pair]
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

    def tokenize_queries(self, queries: Sequence[str]) -> list["numpy.ndarray"]:
        return self.tokenize([f"Query: {query}" for query in queries])

    def join(self, query: "numpy.ndarray", text: "numpy.ndarray") -> tuple["numpy.ndarray", int]:
        # T5's pieces never reach across a blank, so that the parts give the tokens of the whole.
        import numpy

        room = self.max_length - len(self._suffix)
        query = query[: room - len(self._label)]
        room -= len(query) + len(self._label)
        return numpy.concatenate((query, self._label, text[:room], self._suffix)), len(query)

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        logits = first_step(self.model, batch["input_ids"], batch["attention_mask"].bool(), self.answer_ids)
        return logits.float().log_softmax(dim=-1)[:, 0]

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        import torch

        eos = self.tokenizer.eos_token_id
        return torch.tensor([[self.answer_ids[0 if r else 1], eos] for r in relevant])

    def margins(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        ids = batch["input_ids"]
        start = ids.new_full((len(ids), 1), self.model.config.decoder_start_token_id)
        logits = model(**batch, decoder_input_ids=start).logits[:, 0, self.answer_ids]
        return logits[:, 0] - logits[:, 1]


def first_step(model: Any, input_ids: "torch.Tensor", mask: "torch.Tensor", rows: list[int]) -> "torch.Tensor":
    """The logits of the tokens `rows`, shape (pairs, rows), at the first step of decoding of a T5.

    The numbers are those of transformers' own forward pass up to rounding. What differs is the way there:

    - each layer's norm is one pass over memory; queries, keys and values are one multiplication;
    - the decoder's self-attention sees one token, so that its softmax is 1 and only its values count;
    - its cross-attention has one query, so that keys and values need not be computed for each token of the encoder:
      q · (W_k h) = (W_k^T q) · h, and the sum of p W_v h is W_v times the sum of p h.

    Args:
        input_ids: (pairs, tokens).
        mask: (pairs, tokens), True where there is no padding.
    """
    import torch
    from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, buffers: list[torch.Tensor]
    ) -> torch.Tensor:
        # PyTorch's fused attention computes in float32 on a CPU: with the matrices in bfloat16 it is the slower way.
        if not buffers:
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        shape, (scores, shares) = q.shape, buffers
        q, k, v = (x.view(-1, *shape[2:]) for x in (q, k, v))
        torch.baddbmm(bias, q, k.transpose(1, 2), out=scores)
        torch.softmax(scores, -1, out=shares)
        return torch.bmm(shares, v).view(shape)

    def norm(hidden: torch.Tensor, layer: Any) -> torch.Tensor:
        return rms_norm(hidden, layer.normalized_shape, layer.weight.to(hidden.dtype), layer.eps)

    def add(hidden: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        hidden = hidden.add_(change)
        # T5 was trained in bfloat16, and its activations go beyond what float16 holds.
        return hidden.clamp_(-64000, 64000) if hidden.dtype == torch.float16 else hidden

    pairs, length = input_ids.shape
    config, encoder, decoder = model.config, model.encoder, model.decoder
    heads, width = config.num_heads, config.d_kv
    hidden = embedding(input_ids, model.shared.weight)
    bias = encoder.block[0].layer[0].SelfAttention.compute_bias(length, length).to(hidden.dtype)
    padded = not bool(mask.all())
    bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min) if padded else bias
    buffers: list[torch.Tensor] = []
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        bias = bias.expand(pairs, -1, -1, -1).reshape(pairs * heads, length, length)
        buffers = [torch.empty_like(bias) for _ in range(2)]
    for block in encoder.block:
        attention, feed = block.layer[0], block.layer[-1]
        weights = attention.SelfAttention
        qkv = linear(
            norm(hidden, attention.layer_norm), torch.cat([weights.q.weight, weights.k.weight, weights.v.weight])
        )
        q, k, v = qkv.view(pairs, length, 3, heads, width).permute(2, 0, 3, 1, 4).contiguous()
        mixed = attend(q, k, v, bias, buffers)
        hidden = add(hidden, weights.o(mixed.transpose(1, 2).reshape(pairs, length, heads * width)))
        hidden = add(hidden, feed.DenseReluDense(norm(hidden, feed.layer_norm)))
    states = norm(hidden, encoder.final_layer_norm)

    start = input_ids.new_full((pairs,), config.decoder_start_token_id)
    hidden = embedding(start, model.shared.weight)  # (pairs, d_model): one token each
    hole = torch.zeros((), dtype=torch.float32, device=mask.device).masked_fill(~mask, -torch.inf)[:, None]
    for block in decoder.block:
        attention, cross, feed = block.layer
        own = attention.SelfAttention
        hidden = add(hidden, own.o(own.v(norm(hidden, attention.layer_norm))))
        weights = cross.EncDecAttention
        q = weights.q(norm(hidden, cross.layer_norm)).view(pairs, heads, width)
        keys, values = (w.weight.view(heads, width, -1).to(q.dtype) for w in (weights.k, weights.v))
        towards = torch.einsum("phw,hwd->phd", q, keys)
        shares = (torch.bmm(towards, states.transpose(1, 2).to(q.dtype)).float() + hole).softmax(-1).to(q.dtype)
        mixed = torch.einsum("phd,hwd->phw", torch.bmm(shares, states.to(q.dtype)), values)
        hidden = add(hidden, weights.o(mixed.reshape(pairs, heads * width)))
        hidden = add(hidden, feed.DenseReluDense(norm(hidden, feed.layer_norm)))
    hidden = norm(hidden, decoder.final_layer_norm)
    if getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        hidden = hidden * config.d_model**-0.5
    return linear(hidden, model.lm_head.weight[rows].to(hidden.dtype))


class CrossEncoder(Reranker):
    """An encoder that reads query and document together and has one output, the score (arXiv 1901.04085).

    As in InPars-light (arXiv 2301.02998); the loss is the binary cross-entropy of each pair.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        import numpy

        super().__init__(model, tokenizer, max_length)
        # What stands before, between and after the two texts: [CLS], [SEP] and [SEP], or what this vocabulary has.
        pair = tokenizer("a", "a")
        parts = pair.sequence_ids()
        first, second = ([i for i, part in enumerate(parts) if part == n] for n in (0, 1))
        ids = numpy.array(pair.input_ids, dtype=numpy.int32)
        self._before, self._between = ids[: first[0]], ids[first[-1] + 1 : second[0]]
        self._after = ids[second[-1] + 1 :]

    def join(self, query: "numpy.ndarray", text: "numpy.ndarray") -> tuple["numpy.ndarray", int]:
        import numpy

        query = query[: self.max_length // 2]  # cut only when little would be left of the document
        room = self.max_length - len(query) - len(self._before) - len(self._between) - len(self._after)
        joined = numpy.concatenate((self._before, query, self._between, text[:room], self._after))
        return joined, len(self._before) + len(query) + len(self._between)

    def forward(self, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        return self.model(**batch).logits[:, 0]

    def labels(self, relevant: list[bool]) -> "torch.Tensor":
        import torch

        return torch.tensor([[float(r)] for r in relevant])

    def margins(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        return model(**batch).logits[:, 0]


def use_fused_norms(model: Any) -> None:
    """Replace T5's layer norms by PyTorch's RMSNorm, which computes the same in fewer passes over memory."""
    import torch

    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if hasattr(norm, "variance_epsilon"):  # T5's, mT5's, ...: each has a class of its own
                fused = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                fused.weight = norm.weight
                setattr(module, name, fused)


def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 is faster than float32 there: GPUs since Ampere, processors with AVX512-BF16 or AMX."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def checkpoint_name(name: str) -> str:
    """A checkpoint as users write it: the paper's `t5_base` is the hub's `google-t5/t5-base`."""
    size = name.removeprefix("t5_").removeprefix("t5-")
    return f"google-t5/t5-{size}" if name != size and size in ("small", "base", "large", "3b", "11b") else name


def default_device(local_rank: int = 0) -> str:
    """The GPU of this process, or the CPU where there is none."""
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


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
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where it is fast, float32 elsewhere.
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
    device = device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    name = checkpoint if os.path.isdir(checkpoint) else checkpoint_name(checkpoint)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if config.is_encoder_decoder:
            model = transformers.AutoModelForSeq2SeqLM.from_pretrained(name, dtype=getattr(torch, dtype))
            use_fused_norms(model)
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
            f"it gave: {in_short(error)}"
        ) from None
