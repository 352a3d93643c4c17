"""Near-duplicate frames: `near_duplicates` by its index / comparing all with all; hashes of 300 sides, every
third a copy of another with some of eight bits flipped."""

import resource

import numpy as np
from common import compare, seconds

from lus_fastai.data.audit import hamming, near_duplicates


def frames(n):
    "Hashes and sides of n frames."
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    hashes[::3] = hashes[1::3][: len(hashes[::3])] if n % 3 == 0 else hashes[::3]
    for _ in range(8):
        hashes[::3] ^= np.uint64(1) << rng.integers(0, 64, len(hashes[::3])).astype(np.uint64)
    return hashes, rng.integers(0, 300, n)


def all_pairs(hashes, sides, bits=8):
    "The nearest frame on another side, by a matrix product over blocks of frames."
    found = []
    for start in range(0, len(hashes), 1024):
        some = slice(start, start + 1024)
        distance = hamming(hashes[some], hashes)
        distance[sides[some, None] == sides[None]] = 65
        twin = distance.argmin(1)
        least = distance[np.arange(len(twin)), twin]
        found.append(np.c_[np.arange(len(twin)) + start, twin, least][least <= bits])
    return np.concatenate(found)


small = frames(21_000)
assert (near_duplicates(*small).to_numpy() == all_pairs(*small)).all() and len(all_pairs(*small)) > 10_000
compare(
    'near-duplicates of 21,000 frames / all with all',
    lambda: near_duplicates(*small),
    lambda: all_pairs(*small),
    'frames',
    21_000,
    3,
)
large = frames(600_000)
took = seconds(lambda: near_duplicates(*large))
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f'near-duplicates of 600,000 frames: {took:.0f} s, at most {memory:.1f} GB in use', flush=True)
