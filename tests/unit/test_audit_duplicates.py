"Near-duplicates by an index: the pairs of a brute-force comparison, whatever the hashes."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.data.audit import frame_hash, hamming, near_duplicates, twin_frames
from lus_fastai.data.sources import find_source
from lus_fastai.data.store import FrameStore


def brute_force(hashes, sides, bits):
    "All with all; of equally near frames the first."
    distance = hamming(hashes, hashes)
    distance[np.equal.outer(sides, sides)] = 65
    frame = np.flatnonzero(distance.min(1, initial=65) <= bits)
    return np.c_[frame, distance[frame].argmin(1), distance[frame].min(1)] if len(frame) else np.empty((0, 3))


def families(rng, n, per_family, flips):
    "Hashes in families that differ in a few bits, some of them equal."
    founders = rng.integers(0, 2**64, max(n // per_family, 1), dtype=np.uint64)
    hashes = founders[rng.integers(len(founders), size=n)]
    for _ in range(flips):
        hit = rng.random(n) < 0.4
        hashes[hit] ^= np.uint64(1) << rng.integers(0, 64, hit.sum()).astype(np.uint64)
    return hashes


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 500),
    per_family=st.integers(1, 40),
    flips=st.integers(0, 12),
    sides=st.integers(1, 9),
    bits=st.integers(0, 64),
    seed=st.integers(0, 10**6),
)
def test_an_index_finds_what_brute_force_finds(n, per_family, flips, sides, bits, seed):
    rng = np.random.default_rng(seed)
    hashes, side = families(rng, n, per_family, flips), rng.integers(0, sides, n)
    assert (near_duplicates(hashes, side, bits).to_numpy() == brute_force(hashes, side, bits)).all()


@pytest.mark.parametrize('bits', [0, 3, 8])
def test_many_hashes_in_few_buckets(bits):
    "What the index is for: more hashes than a comparison of all is chosen for, many of them alike."
    rng = np.random.default_rng(bits)
    hashes, side = families(rng, 3000, 30, 6), rng.integers(0, 300, 3000)
    found = near_duplicates(hashes, side, bits)
    assert len(found) > 100 and (found.to_numpy() == brute_force(hashes, side, bits)).all()
    assert (side[found['frame']] != side[found['twin']]).all()


def test_equal_hashes_of_one_side_are_no_twins_and_of_two_sides_are():
    hashes = np.full(5, 7, np.uint64)
    assert not len(near_duplicates(hashes, ['a'] * 5))
    assert near_duplicates(hashes, list('aabab'))['twin'].tolist() == [2, 2, 0, 2, 0]


def test_one_image_of_two_patients_of_northumbria(real_data, tmp_path):
    "Sets 4 and 6 hold one image; the other stills of these sets are no twins."
    from lus_fastai.data.sources import index_source

    table = index_source('pocus', find_source('pocus', real_data))
    stills = table[table['path'].str.contains('northumbria') & (table['kind'] == 'image')]
    store = FrameStore.build(stills.reset_index(drop=True), tmp_path / 'store', size=(224, 224), workers=0)
    found = twin_frames(store.frames, store.images)
    pairs = {
        frozenset(p.split('-')[-1] for p in pair) for pair in zip(found['patient'], found['twin_patient'])
    }
    assert pairs == {frozenset({'set4', 'set6'})}
    assert (found['likeness'] > 0.99).all() and len(frame_hash(store.images)) == len(stills)
