"""A fast T5 forward pass for reranking: logits of chosen tokens at the first decoding step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def first_token_logits(
    model: Any, input_ids: "torch.Tensor", mask: "torch.Tensor", token_ids: Sequence[int]
) -> "torch.Tensor":
    """Return the logits of `token_ids` at the first decoding step of a T5 model.

    The numbers are those of transformers' forward pass up to rounding. Three things are computed differently:

    - queries, keys and values are one multiplication;
    - the decoder's self-attention sees one token, so its softmax is 1 and only its values count;
    - the decoder's cross-attention has one query, so keys and values are not computed for each encoder token:
      q · (W_k h) = (W_k^T q) · h, and the sum of p W_v h is W_v times the sum of p h.

    Args:
        model: A `T5ForConditionalGeneration` in float32 or bfloat16.
        input_ids: Shape (pairs, tokens).
        mask: Shape (pairs, tokens), True where a token is not padding.
        token_ids: Vocabulary ids.

    Returns:
        Shape (pairs, token_ids), float32.
    """
    import torch
    from torch.nn.functional import linear

    states = encode(model, input_ids, mask)
    hidden = decode_first_token(model, states, mask)
    if getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings):
        hidden = hidden * model.config.d_model**-0.5
    with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 logits would make ties
        return linear(hidden.float(), model.lm_head.weight[token_ids].float())


def encode(model: Any, input_ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the encoder's states, shape (pairs, tokens, d_model)."""
    import torch
    from torch.nn.functional import embedding, linear

    pairs, length = input_ids.shape
    encoder, heads, width = model.encoder, model.config.num_heads, model.config.d_kv
    hidden = embedding(input_ids, model.shared.weight)
    bias = encoder.block[0].layer[0].SelfAttention.compute_bias(length, length).to(hidden.dtype)
    if not bool(mask.all()):
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
    buffers: list[torch.Tensor] = []
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        bias = bias.expand(pairs, -1, -1, -1).reshape(pairs * heads, length, length)
        buffers = [torch.empty_like(bias) for _ in range(2)]
    for block in encoder.block:
        self_layer, feed_forward = block.layer[0], block.layer[-1]
        weights = self_layer.SelfAttention
        qkv = linear(self_layer.layer_norm(hidden), torch.cat([weights.q.weight, weights.k.weight, weights.v.weight]))
        q, k, v = qkv.view(pairs, length, 3, heads, width).permute(2, 0, 3, 1, 4).contiguous()
        mixed = attention(q, k, v, bias, buffers)
        hidden = hidden.add_(weights.o(mixed.transpose(1, 2).reshape(pairs, length, heads * width)))
        hidden = hidden.add_(feed_forward.DenseReluDense(feed_forward.layer_norm(hidden)))
    return encoder.final_layer_norm(hidden)


def attention(
    q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", bias: "torch.Tensor", buffers: "list[torch.Tensor]"
) -> "torch.Tensor":
    """Return the attention over values, shape (pairs, heads, tokens, width). T5 does not scale its scores.

    PyTorch's fused attention computes in float32 on a CPU, so in bfloat16 two multiplications are faster: then
    `buffers` holds two tensors of the bias's shape, for scores and probabilities. Otherwise it is empty.
    """
    import torch

    if not buffers:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    shape, (scores, probabilities) = q.shape, buffers
    q, k, v = (x.view(-1, *shape[2:]) for x in (q, k, v))
    torch.baddbmm(bias, q, k.transpose(1, 2), out=scores)
    torch.softmax(scores, -1, out=probabilities)
    return torch.bmm(probabilities, v).view(shape)


def decode_first_token(model: Any, states: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the decoder's state of its start token, shape (pairs, d_model).

    Args:
        model: The T5 model.
        states: The encoder's states, shape (pairs, tokens, d_model).
        mask: Shape (pairs, tokens), True where a token is not padding.
    """
    import torch
    from torch.nn.functional import embedding

    pairs, heads, width = len(states), model.config.num_heads, model.config.d_kv
    start = torch.full((pairs,), model.config.decoder_start_token_id, device=mask.device)
    hidden = embedding(start, model.shared.weight)
    padding_bias = torch.zeros((), dtype=torch.float32, device=mask.device).masked_fill(~mask, -torch.inf)[:, None]
    for block in model.decoder.block:
        self_layer, cross_layer, feed_forward = block.layer
        own = self_layer.SelfAttention
        hidden = hidden.add_(own.o(own.v(self_layer.layer_norm(hidden))))
        weights = cross_layer.EncDecAttention
        q = weights.q(cross_layer.layer_norm(hidden)).view(pairs, heads, width)
        keys, values = (w.weight.view(heads, width, -1).to(q.dtype) for w in (weights.k, weights.v))
        projected = torch.einsum("phw,hwd->phd", q, keys)
        scores = torch.bmm(projected, states.transpose(1, 2).to(q.dtype)).float() + padding_bias
        probabilities = scores.softmax(-1).to(q.dtype)
        mixed = torch.einsum("phd,hwd->phw", torch.bmm(probabilities, states.to(q.dtype)), values)
        hidden = hidden.add_(weights.o(mixed.reshape(pairs, heads * width)))
        hidden = hidden.add_(feed_forward.DenseReluDense(feed_forward.layer_norm(hidden)))
    return model.decoder.final_layer_norm(hidden)
