"""Training losses by name. A loss maps the relevance logits of groups, a positive and n negatives each, to a scalar."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def softmax_cross_entropy(logits: "Tensor") -> "Tensor":
    """Return the softmax cross-entropy of the positive in its group, as in RankT5 (arXiv 2210.10634).

    For a positive and one negative, this is the logistic loss of the difference of their logits.
    """
    return -logits.log_softmax(dim=1)[:, 0].mean()


# Functions of logits of shape (groups, 1 + n), the positive's first. A negative that a group lacks has the logit -inf.
LOSSES: dict[str, Callable[["Tensor"], "Tensor"] | None] = {
    "pointwise": None,  # the model's own loss of each example
    "pairwise": softmax_cross_entropy,  # each triple is a group
    "listwise": softmax_cross_entropy,
}
LOSSES_OF_TRIPLES = (
    "pointwise",
    "pairwise",
)  # others join adjacent triples with the same query and positive
