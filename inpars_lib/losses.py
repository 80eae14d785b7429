"""Training losses: a registry of functions of the relevance logits of groups, a positive and its negatives each."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pairwise(logits: "Tensor") -> "Tensor":
    """Return the logistic loss of positive against negative. The shape is (groups, 2): each triple is a group."""
    import torch

    return -torch.nn.functional.logsigmoid(logits[:, 0] - logits[:, 1]).mean()


def listwise(logits: "Tensor") -> "Tensor":
    """Return the softmax cross-entropy of the positive in its group, as in RankT5 (arXiv 2210.10634)."""
    return -logits.log_softmax(dim=1)[:, 0].mean()


# Functions of logits of shape (groups, 1 + n), the positive's first. A negative that a group lacks has the logit -inf.
LOSSES: dict[str, Callable[["Tensor"], "Tensor"] | None] = {
    "pointwise": None,  # the model's own loss of each example
    "pairwise": pairwise,
    "listwise": listwise,
}
LOSSES_OF_TRIPLES = ("pointwise", "pairwise")  # other losses join adjacent triples of one query and positive
