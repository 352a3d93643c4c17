"""t-SNE of 5,000 points with 64 features: `tsne_map` (openTSNE) against scikit-learn, seconds and how many
true neighbours each map keeps."""

import argparse
import os

import numpy as np
from common import compare
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from lus_fastai.explain.embeddings import tsne_map

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--points', type=int, default=5000)
parser.add_argument('--repeats', type=int, default=3)
args = parser.parse_args()

n, perplexity, rng = args.points, 30, np.random.default_rng(0)
x = ((rng.normal(size=(40, 64)) * 1.5)[rng.integers(40, size=n)] + rng.normal(size=(n, 64))).astype(
    np.float32
)  # 40 clusters, as patients make them


def neighbours(points, k=30):
    return NearestNeighbors(n_neighbors=k).fit(points).kneighbors(return_distance=False)


true = neighbours(x)


def kept(points):
    return np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(true, neighbours(points))])


def ours():
    maps['ours'] = tsne_map(x, perplexity).points


def peer(iterations):
    def run():
        maps['peer'] = TSNE(
            perplexity=perplexity, max_iter=iterations, random_state=0, n_jobs=-1
        ).fit_transform(x)

    return run


maps = {}
for iterations, what in (
    (750, "at most 750 iterations each"),
    (1000, "scikit-learn's own 1,000 iterations"),
):  # `tsne_map` stops when the divergence hardly falls
    compare(
        f'tsne_map / sklearn.manifold.TSNE, {n:,} x 64, perplexity {perplexity}, {what}, '
        f'{os.cpu_count()} cores each',
        ours,
        peer(iterations),
        'maps',
        1,
        repeats=args.repeats,
    )
    print(
        f"  of 30 true neighbours kept: ours {kept(maps['ours']):.3f}, peer {kept(maps['peer']):.3f}",
        flush=True,
    )
