"""Mini-batch k-means: clusters of users' vectors that follow a model while it trains.

Sculley, "Web-Scale K-Means Clustering", WWW 2010, with a running mean in place of the mean over all
batches, since the vectors of a user change while the model trains. Every function is pure, and the
same on every device.

Shape letters: B users in a batch, D width, K clusters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_SMALLEST = 0.1  # of an equal share of the mass: a cluster with less is given up
_ROUNDING = 1e-6  # of the largest squared length of a vector: a smaller squared distance is none


class Clusters(NamedTuple):
    """Running sums of each cluster's members. The centroid is `sums / counts`."""

    counts: jax.Array  # f[K], of the members' masses; all 0 before the first batch
    sums: jax.Array  # f[K, D], of the members' vectors times their masses


class Found(NamedTuple):
    """What a batch changed."""

    clusters: Clusters
    membership: jax.Array  # bool[B, K], each user's one cluster
    # i32[K], which cluster each one was before the batch. After a split two have the same one, and
    # one is missing
    origin: jax.Array


def empty(num_clusters: int, dim: int) -> Clusters:
    """The clusters before the first batch."""
    return Clusters(jnp.zeros(num_clusters), jnp.zeros((num_clusters, dim)))


def update(clusters: Clusters, vectors: jax.Array, mass: jax.Array, rate: jax.Array) -> Found:
    """Put the users of a batch into clusters, and move the centroids towards them.

    The first batch chooses the centroids: the vector farthest from the mean, then again and again
    the one farthest from those chosen. In every batch each user goes to the nearest centroid. n_k
    is the mass of the batch's members of cluster k, and s_k the sum of their vectors times their
    masses:

        counts_k <- (1 - rate) counts_k + rate n_k,    sums_k <- (1 - rate) sums_k + rate s_k

    The first batch sets counts_k to n_k, and sums_k to s_k.

    If the smallest cluster has less than a tenth of an equal share of the counts, it is given up,
    and the largest is split: the given-up cluster starts anew half way from the largest one's
    centroid to its farthest user in the batch, with half of its counts. A batch has at most one
    split, and none if no user of the largest cluster is away from its centroid.

    Args:
        clusters: before the batch.
        vectors: f[B, D], finite.
        mass: f[B], how much each user counts.
        rate: above 0 and at most 1.
    """
    num_clusters = len(clusters.counts)
    is_first = clusters.counts.sum() == 0
    clusters, origin = _split(clusters, vectors)
    start = _far_apart(vectors, mass, num_clusters)
    centroids = jnp.where(is_first, start, _centroids(clusters))
    nearest = _nearest(vectors, centroids, is_first | (clusters.counts > 0))
    membership = jax.nn.one_hot(nearest, num_clusters, dtype=bool)
    # Sums of products, and not a matrix product, which an accelerator would round.
    weights = jnp.where(membership, mass[:, None], 0)
    of_batch = Clusters(weights.sum(axis=0), (weights[:, :, None] * vectors[:, None, :]).sum(0))
    clusters = jax.tree.map(
        lambda old, new: jnp.where(is_first, new, (1 - rate) * old + rate * new),
        clusters,
        of_batch,
    )
    return Found(clusters, membership, origin)


def _centroids(clusters: Clusters) -> jax.Array:
    """f[K, D]; 0 for a cluster without members."""
    return clusters.sums / jnp.where(clusters.counts > 0, clusters.counts, 1)[:, None]


def _distances(vectors: jax.Array, centroids: jax.Array) -> jax.Array:
    """Squared distances, f[B, K], from the differences, which keeps the digits of small ones."""
    return ((vectors[:, None, :] - centroids[None, :, :]) ** 2).sum(axis=2)


def _nearest(vectors: jax.Array, centroids: jax.Array, exists: jax.Array) -> jax.Array:
    """The nearest of the centroids that exist, i32[B]."""
    return jnp.where(exists, _distances(vectors, centroids), jnp.inf).argmin(axis=1)


def _far_apart(vectors: jax.Array, mass: jax.Array, num: int) -> jax.Array:
    """Farthest-first traversal (Gonzalez 1985) from the vector farthest from the mean, f[num, D].

    Vectors of the batch that are far from each other; fewer unequal ones than `num` are repeated.
    """
    middle = (mass[:, None] * vectors).sum(axis=0) / mass.sum()
    first = vectors[_distances(vectors, middle[None])[:, 0].argmax()]

    def add(place, carry):
        chosen, nearest = carry
        vector = vectors[nearest.argmax()]
        nearest = jnp.minimum(nearest, _distances(vectors, vector[None])[:, 0])
        return chosen.at[place].set(vector), nearest

    chosen = jnp.zeros((num, vectors.shape[1]), vectors.dtype).at[0].set(first)
    return lax.fori_loop(1, num, add, (chosen, _distances(vectors, first[None])[:, 0]))[0]


def _split(clusters: Clusters, vectors: jax.Array) -> tuple[Clusters, jax.Array]:
    """Give up a cluster that is too small, and split the largest; the origin i32[K] too."""
    num_clusters = len(clusters.counts)
    smallest, largest = clusters.counts.argmin(), clusters.counts.argmax()
    centroids = _centroids(clusters)
    nearest = _nearest(vectors, centroids, clusters.counts > 0)
    gaps = vectors - centroids[largest][None]
    lengths = jnp.where(nearest == largest, (gaps**2).sum(axis=1), 0)
    farthest = lengths.argmax()
    limit = _SMALLEST * clusters.counts.sum() / num_clusters
    # No split before the first batch, and none of users with equal vectors.
    is_wide = lengths[farthest] > _ROUNDING * (vectors**2).sum(axis=1).max()
    is_due = (clusters.counts[smallest] < limit) & is_wide
    order = jnp.arange(num_clusters)
    origin = jnp.where(is_due & (order == smallest), largest, order)
    parts = (origin[:, None] == origin[None, :]).sum(axis=1)
    counts = clusters.counts[origin] / parts
    moved = (centroids[largest] + gaps[farthest] / 2) * counts[smallest]
    sums = clusters.sums[origin] / parts[:, None]
    is_new = (is_due & (order == smallest))[:, None]
    return Clusters(counts, jnp.where(is_new, moved[None], sums)), origin
