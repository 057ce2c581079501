"""k-means clustering of the tokens of each head, by Lloyd's iterations. The same input gives the same clusters.

Sums are products of matrices, not scattered additions: on a card these would add in another order each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""A head whose centroids all move by less keeps them."""

MOST_SCORES = 2**22
"""Distances at a time, if more than one token fits."""


class Clusters(NamedTuple):
    """The clusters of the tokens of each head."""

    labels: torch.Tensor
    """(batch, heads, tokens), int64: each token's cluster, the nearest of the last but one centroids."""
    sizes: torch.Tensor
    """(batch, heads, clusters), float32: tokens of each cluster; some may have none."""
    centroids: torch.Tensor
    """(batch, heads, clusters, size), float32."""


def first_tokens(tokens: int, count: int) -> torch.Tensor:
    """The numbers of the tokens that are the first centroids, (count,): random, and the same each time."""
    import torch

    generator = torch.Generator("cpu").manual_seed(0)  # another than torch's, which makes the noise of samplers
    return torch.randperm(tokens, generator=generator, device="cpu")[:count]


def cluster(tokens: torch.Tensor, centroids: torch.Tensor, iterations: int) -> Clusters:
    """Assign each token to the nearest centroid, and move centroids to the mean of their tokens, again and again.

    Of equally near centroids the first one counts. A centroid without tokens stays where it is.

    Args:
        tokens: (batch, heads, tokens, size).
        centroids: (batch, heads, clusters, size), float32.
        iterations: most of them; with 0 tokens are assigned and no centroid moves.
    """
    import torch

    for number in range(max(iterations, 1)):
        labels, sums, sizes = _assign(tokens, centroids)
        if not iterations:
            break
        moved = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], centroids)
        moves = (moved - centroids).norm(dim=-1).amax(-1) >= TOLERANCE
        # A head that stays has the same labels in all further iterations, whatever others do.
        centroids = torch.where(moves[..., None, None], moved, centroids)
        # The host waits for other devices now and then only.
        if (tokens.device.type == "cpu" or number % 16 == 15) and not moves.any():
            break
    return Clusters(labels, sizes, centroids)


def _assign(tokens: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, and the sums and numbers of the tokens of each cluster."""
    import torch

    batch, heads, count, _ = centroids.shape
    half_squares = centroids.square().sum(-1)[:, :, None] / 2
    sums, sizes = torch.zeros_like(centroids), centroids.new_zeros(batch, heads, count)
    clusters, labels = torch.arange(count, device=tokens.device), []
    for part in torch.split(tokens, max(MOST_SCORES // (batch * heads * count), 1), 2):
        wide = part.float()
        nearest = (half_squares - wide @ centroids.mT).argmin(-1)  # the distance, but for what all have in common
        members = (nearest[..., None] == clusters).float()
        sums += members.mT @ wide
        sizes += members.sum(2)
        labels.append(nearest)
    return torch.cat(labels, 2), sums, sizes
