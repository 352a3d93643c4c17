"folds: properties, faults and independent references that the notebook does not own"

import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.core import LeakError, TableError, assert_disjoint, check_table
from lus_fastai.data.audit import audit, frame_hash, hamming, near_duplicates
from lus_fastai.data.folds import Folds, leaky_folds, patient_folds


def clips(patients, seed=0, classes='abc', most=5, p=None):
    "A made-up clip table; patients have 1..most clips of one class."
    rng, rows = np.random.default_rng(seed), []
    for i in range(patients):
        label = classes[i] if i < len(classes) else rng.choice(list(classes), p=p)
        rows += [
            dict(
                path=f'/d/p{i}/c{c}.mp4',
                kind='video',
                label=str(label),
                patient=f'p{i}',
                source=f's{i % 3}',
                probe='convex',
            )
            for c in range(rng.integers(1, most + 1))
        ]
    return pd.DataFrame(rows)


def frames(table, n=6, variants=1):
    t = table.loc[table.index.repeat(n * variants)].reset_index(drop=True)
    k = t.groupby('path').cumcount()
    t = t.assign(clip=t.path.str[3:], frame=k // variants * 10)
    return t.assign(variant=k % variants) if variants > 1 else t


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


# ---- patient_folds


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 9))
def test_folds_keep_patients_whole_and_do_not_depend_on_order(patients, seed, n, most):
    t = clips(patients, seed, most=most)
    if patients < n:
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        f = patient_folds(t, n, seed).fold
        mixed = t.sample(frac=1, random_state=seed % 1000).set_axis(
            np.random.default_rng(seed).integers(0, 3, len(t)), axis=0
        )  # index with repeats
        g = patient_folds(mixed, n, seed).fold
    assert f.index.equals(t.index) and f.name == 'fold' and f.dtype.kind == 'i'
    assert set(f) == set(range(n))  # no fold is empty
    assert (f.groupby(t.patient).nunique() == 1).all()
    assert dict(zip(t.path, f)) == dict(zip(mixed.path, g))
    for k in range(n):
        assert_disjoint(t[f != k], t[f == k])


def imbalance(t, f, n):
    "How far the classes' shares are from 1/n, worst class first."
    return np.abs(
        pd.crosstab(np.asarray(f), t.label.to_numpy(), normalize='columns')
        .reindex(range(n), fill_value=0)
        .to_numpy()
        - 1 / n
    ).mean()


def test_balance_is_no_worse_than_sklearn():
    from sklearn.model_selection import StratifiedGroupKFold

    ours, theirs = [], []
    for seed in range(25):
        for n in (3, 5):
            t = clips(30, seed, most=9, p=[0.5, 0.3, 0.2])
            ref = np.empty(len(t), int)
            for k, (_, i) in enumerate(
                StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(t, t.label, t.patient)
            ):
                ref[i] = k
            ours.append(imbalance(t, patient_folds(t, n, seed).fold, n))
            theirs.append(imbalance(t, ref, n))
    assert np.mean(ours) <= np.mean(theirs)
    assert np.mean(ours) < 0.08


def test_frame_table_weighs_by_frames():
    t = clips(12, most=1, classes='ab')
    many = t.index.repeat([60 if p in ('p0', 'p2') else 6 for p in t.patient])
    big = t.assign(label='a').loc[many].reset_index(drop=True)
    f = patient_folds(big, 2).fold
    assert (
        f[big.patient == 'p0'].iloc[0] != f[big.patient == 'p2'].iloc[0]
    )  # the two heavy patients stand apart
    assert abs((f == 0).mean() - 0.5) < 0.05


def test_patient_with_two_labels_is_one_group():
    t = clips(20)
    t.loc[t.patient == 'p3', 'label'] = ['a', 'b', 'c', 'a', 'b'][: (t.patient == 'p3').sum()]
    assert patient_folds(t).fold.groupby(t.patient).nunique().max() == 1


def test_seed_matters_and_repeats():
    t = clips(30)
    assert patient_folds(t, seed=3).fold.equals(patient_folds(t, seed=3).fold)
    assert len({tuple(patient_folds(t, seed=s).fold) for s in range(5)}) > 1


def test_by_source_and_integer_or_padded_patients():
    t = clips(12)
    assert patient_folds(t, 3, by='source').fold.groupby(t.source).nunique().max() == 1
    t = clips(12).assign(patient=lambda d: d.patient.str[1:])
    whole, padded = (
        t.assign(patient=t.patient.astype(int)),
        t.assign(patient=[p + ' ' * (i % 2) for i, p in enumerate(t.patient)]),
    )
    assert list(patient_folds(whole).fold) == list(patient_folds(t).fold) == list(patient_folds(padded).fold)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t[:0], 'empty'),
        (lambda t: t.drop(columns='patient'), "missing column.*'patient'"),
        (lambda t: t.drop(columns='label'), "'label'"),
        (lambda t: t.assign(patient=t.patient.where(t.index != 4)), r"'patient' is empty in row\(s\) 4"),
        (lambda t: t.assign(patient=[' ', *t.patient[1:]]), r'row\(s\) 0'),
        (lambda t: t.assign(label=t.label.where(t.index != 2)), r"'label' is empty in row\(s\) 2"),
        (lambda t: t.to_dict(), 'expected a clip or frame table'),
    ],
)
def test_bad_tables(change, message):
    for f in (patient_folds, leaky_folds):
        with pytest.raises(TableError, match=message):
            f(change(clips(9)), **({'by': 'clip'} if f is leaky_folds else {}))


def test_fewer_patients_than_folds_and_too_few_folds():
    with pytest.raises(ValueError, match=r'4 patient\(s\) cannot fill 5 folds'):
        patient_folds(clips(4), 5)
    for f in (patient_folds, lambda t, n: leaky_folds(t, n, by='clip').fold):
        with pytest.raises(ValueError, match='at least 2 folds'):
            f(clips(4), 1)


def test_class_that_a_fold_lacks_is_named():
    t = clips(30, classes='ab')
    with pytest.warns(UserWarning, match=r"all of 'rare' is in fold \d"):
        patient_folds(t.assign(label=t.label.where(t.patient != 'p4', 'rare')))
    two = t.assign(label=t.label.where(~t.patient.isin(['p4', 'p5']), 'rare'))
    with pytest.warns(UserWarning, match=r"no 'rare' in the test part of fold\(s\) \d"):
        patient_folds(two)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        patient_folds(t)


# ---- leaky folds


def test_leaky_units_are_whole_and_counts_are_true(capsys):
    t = frames(clips(8, most=3), n=5, variants=3)
    for by, key in (('clip', ['clip']), ('frame', ['clip', 'frame'])):
        f = leaky_folds(t, by=by).fold
        assert f.groupby([t[k] for k in key]).nunique().max() == 1
        sizes = f.groupby([t[k] for k in key]).first().value_counts()
        assert sizes.max() - sizes.min() <= 1
        spread = sum(len(set(f[t.patient == p])) > 1 for p in t.patient.unique())
        assert f'{spread} of {t.patient.nunique()} patients' in capsys.readouterr().out
    f = leaky_folds(t, by='variant').fold
    cut = sum(len(set(g)) > 1 for _, g in f.groupby([t['clip'], t['frame']]))
    assert (
        cut > 0 and f"{cut} of {len(t.drop_duplicates(['clip', 'frame']))} frames" in capsys.readouterr().out
    )


def test_leaky_by_clip_is_stratified():
    t = clips(40, most=4)
    c = pd.crosstab(leaky_folds(t, by='clip').fold, t.label)
    assert (c.max() - c.min()).max() <= 1


def test_leaky_folds_do_not_depend_on_order():
    t = frames(clips(6), 4)
    m = t.sample(frac=1, random_state=0).reset_index(drop=True)
    for by in ('clip', 'frame'):
        f, g = leaky_folds(t, by=by, seed=2).fold, leaky_folds(m, by=by, seed=2).fold
        assert dict(zip(zip(t['clip'], t['frame']), f)) == dict(zip(zip(m['clip'], m['frame']), g))
    assert not leaky_folds(t, seed=0).fold.equals(leaky_folds(t, seed=1).fold)


def test_leaky_bad_input():
    t = clips(6)
    with pytest.raises(TableError, match="need the column.*'frame'"):
        leaky_folds(t, by='frame')
    with pytest.raises(TableError, match="'variant'"):
        leaky_folds(frames(t), by='variant')
    with pytest.raises(ValueError, match="by must be one of"):
        leaky_folds(t, by='patient')
    with pytest.raises(ValueError, match='cannot fill 99 folds'):
        leaky_folds(t, 99, by='clip')


# ---- disjointness and names


def test_assert_disjoint_names_patients():
    t = clips(10)
    with pytest.raises(LeakError, match='2 patient') as e:
        assert_disjoint(t[t.patient.isin(['p1', 'p2', 'p3'])], t[t.patient.isin(['p2', 'p3', 'p4'])])
    assert e.value.shared == ['p2', 'p3'] and isinstance(e.value, AssertionError)
    seven = pd.DataFrame(dict(patient=[7])), pd.DataFrame(dict(patient=['7 ']))
    with pytest.raises(LeakError):
        assert_disjoint(*seven)
    with pytest.raises(TableError, match='empty'):
        assert_disjoint(t, t[:0])
    with pytest.raises(TableError, match=r'row\(s\) 1'):
        assert_disjoint(t, pd.DataFrame(dict(patient=['x', None])))


def test_the_hash_sees_the_split_and_nothing_else():
    t = frames(clips(9), 3)
    folds = patient_folds(t)
    h, f = folds.hash, folds.fold
    m = t.sample(frac=1, random_state=0)
    assert len(h) == 16 and folds.of(m).hash == h  # aligned by index
    assert Folds(t.reset_index(drop=True), f.to_numpy()).hash == h
    moved = t.drop(columns='clip').assign(path=t.path.str.replace('/d/', '/elsewhere/x/'))
    assert Folds(moved, f).hash == h
    one = f.copy()
    one.iloc[0] = (one.iloc[0] + 1) % 3
    assert Folds(t, one).hash != h and folds.of(t[1:]).hash != h
    assert Folds(t.assign(variant=0), f).hash != Folds(t.assign(variant=1), f).hash
    with pytest.raises(ValueError, match='2 folds for'):
        Folds(t, [0, 1])
    with pytest.raises(ValueError, match='index does not fit'):
        Folds(t, f[1:])


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 40), st.integers(0, 10**6), st.integers(2, 5))
def test_training_test_and_inner_rows_share_no_patient_and_leave_none_out(patients, seed, n):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folds = patient_folds(clips(patients, seed), n, seed)
        assert folds.prove() is folds and folds.numbers == list(range(n))
        for k in folds.numbers:
            train, test, inner = folds.train(k), folds.test(k), folds.inner(k, 2)
            assert sorted([*train.index, *test.index]) == list(range(len(folds.table)))
            assert not set(train.patient) & set(test.patient)
            assert inner.prove().table.index.equals(train.index)


def test_a_cut_patient_is_named_by_the_proof():
    t = clips(6, most=1)
    torn = pd.concat([t, t[t.patient == 'p2'].assign(path='/d/again.mp4')], ignore_index=True)
    with pytest.raises(LeakError, match='p2'):
        Folds(torn, [0, 0, 0, 1, 1, 1, 1]).prove()


# ---- near-duplicate images


def smooth_images(n, h, w, seed=0):
    from scipy.ndimage import gaussian_filter

    x = gaussian_filter(np.random.default_rng(seed).random((n, h, w)), (0, h / 12, w / 12))
    return ((x - x.min()) / (x.max() - x.min()) * 255).astype(np.uint8)


def imagehash_bits(x):
    import imagehash
    from PIL import Image

    return np.stack([imagehash.phash(Image.fromarray(i)).hash.reshape(-1) for i in x])


def test_frame_hash_is_imagehash_where_no_resize_is_needed():
    x = smooth_images(40, 32, 32)
    ours = np.unpackbits(frame_hash(x).astype('>u8').view(np.uint8).reshape(-1, 8), axis=1).astype(bool)
    assert (ours == imagehash_bits(x)).all()


@pytest.mark.parametrize('shape', [(96, 96), (150, 224), (61, 37)])
def test_frame_hash_is_near_imagehash_after_a_resize(shape):
    x = smooth_images(30, *shape)
    ours = np.unpackbits(frame_hash(x).astype('>u8').view(np.uint8).reshape(-1, 8), axis=1).astype(bool)
    assert (ours != imagehash_bits(x)).sum(1).mean() < 3


def test_hamming_counts_bits_and_twins_match_a_loop():
    rng = np.random.default_rng(0)
    h = rng.integers(0, 2**63, 50).astype(np.uint64) * 2 + rng.integers(0, 2, 50).astype(np.uint64)
    h[10:20] = h[30:40] ^ np.uint64(5)
    side = rng.integers(0, 3, 50)
    want = np.array([[bin(int(a) ^ int(b)).count('1') for b in h] for a in h])
    assert (hamming(h, h) == want).all()
    got = near_duplicates(h, side, 6)
    for i in range(50):
        other = [want[i, j] for j in range(50) if side[j] != side[i]]
        row = got[got.frame == i]
        assert len(row) == (min(other) <= 6)
        if len(row):
            assert (
                row.bits.item() == min(other) == want[i, row.twin.item()] and side[row.twin.item()] != side[i]
            )


def test_twins_across_chunks():
    h = np.random.default_rng(0).integers(0, 2**62, 2500).astype(np.uint64)
    h[2400] = h[3]
    assert near_duplicates(h, np.arange(2500), 0).values.tolist() == [[3, 2400, 0], [2400, 3, 0]]


def test_frame_hash_bad_shape():
    with pytest.raises(ValueError, match=r'\(n, h, w\)'):
        frame_hash(np.zeros((5, 5)))
    assert len(frame_hash(np.zeros((0, 9, 9)))) == 0


# ---- audit


@pytest.fixture
def store():
    t = clips(9, most=2)
    f = frames(t, 4)
    x = smooth_images(len(f), 48, 48)
    f['row'] = np.random.default_rng(1).permutation(len(f))  # table order is not store order
    x[f.row[f.patient == 'p7'].iloc[0]] = x[f.row[f.patient == 'p2'].iloc[0]]  # one image under two patients
    x[f.row[f.patient == 'p4'].iloc[0]] = x[f.row[f.patient == 'p5'].iloc[0]] = 0  # two blank ones
    return SimpleNamespace(images=x, frames=f, table=t)


def test_audit_finds_the_planted_twin_and_no_blank(store):
    d = audit(store.frames, store=store).duplicates
    assert set(zip(d.patient, d.twin_patient)) == {('p2', 'p7'), ('p7', 'p2')}
    assert d.attrs == dict(frames=len(store.frames), blank=2, side='patient', absent=0)
    assert (d.bits == 0).all() and (d.likeness > 0.999).all()


def test_audit_looks_across_folds_for_clip_and_frame_tables(store):
    apart = pd.Series(np.where(store.table.patient == 'p7', 1, 0), index=store.table.index)
    together = apart * 0 + (store.table.patient == 'p5')
    by_clip = audit(store.table, Folds(store.table, apart), store)
    assert set(by_clip.duplicates.patient) == {'p2', 'p7'} and set(by_clip.duplicates.fold) == {0, 1}
    assert by_clip.counts.frames.sum() == len(store.frames)
    assert not len(audit(store.table, Folds(store.table, together), store).duplicates)
    parts = np.where(store.frames.patient == 'p7', 'test', 'train')
    assert set(audit(store.frames, Folds(store.frames, parts), store).duplicates.twin_fold) == {
        'train',
        'test',
    }
    half = store.frames[store.frames.patient.isin(['p2', 'p3'])]
    assert not len(audit(half, store=store).duplicates)  # only the table's own frames are compared


def test_audit_needs_rows_of_the_store(store):
    with pytest.raises(TableError, match="column 'row'"):
        audit(store.frames.drop(columns='row'), store=store)


def test_audit_says_which_clips_the_store_lacks(store):
    with pytest.raises(TableError, match="none of the table's clips is in the store"):
        audit(store.table.assign(path='/x' + store.table.path), store=store)
    part = audit(store.table.assign(path=['/x.mp4', *store.table.path[1:]]), store=store)
    assert part.duplicates.attrs['absent'] == 1 and '1 clips are not in the store' in str(part)


def test_audit_counts_against_a_loop():
    t = frames(clips(12), 3, variants=2)
    f = leaky_folds(t, by='variant').fold
    a = audit(t, Folds(t, f))
    for (label, source, probe), row in a.counts.iterrows():
        g = t[(t.label == label) & (t.source == source) & (t.probe == probe)]
        assert tuple(row) == (g.patient.nunique(), g['clip'].nunique(), len(set(zip(g['clip'], g['frame']))))
    for (k, label), row in a.folds.iterrows():
        g = t[(f == k) & (t.label == label)]
        assert tuple(row) == (g.patient.nunique(), g['clip'].nunique(), len(set(zip(g['clip'], g['frame']))))
    assert set(a.shared.index) == {p for p in t.patient.unique() if f[t.patient == p].nunique() > 1}


def test_shortcut_accuracy_against_a_loop():
    t = clips(25, seed=4, p=[0.6, 0.2, 0.2])
    t['source'] = ['x' if l == 'b' and int(p[1:]) % 2 else s for l, p, s in zip(t.label, t.patient, t.source)]
    row, hit, held = audit(t).shortcuts.loc['source'], [], []
    for _i, r in t.iterrows():

        def guess(g):
            return g.label.value_counts().sort_index().idxmax()

        same, rest = t[t.source == r.source], t[(t.source == r.source) & (t.patient != r.patient)]
        hit.append(guess(same) == r.label)
        held.append(guess(rest if len(rest) else t[t.patient != r.patient]) == r.label)
    assert row.accuracy == pytest.approx(np.mean(hit)) and row.held_out == pytest.approx(
        np.mean(held), abs=0.03
    )  # ties may fall either way
    assert row.baseline == pytest.approx(t.label.value_counts().max() / len(t))


def test_audit_names_pure_sources_and_conflicts():
    t = clips(12)
    t.loc[t.patient == 'p1', 'source'] = 'only'
    t.loc[t.patient == 'p1', 'label'] = 'b'
    t = pd.concat([t, t[t.patient == 'p1'].assign(path='/d/more.mp4')[:1]], ignore_index=True)
    t.loc[t.patient == 'p2', 'label'] = ['a', 'b', 'c', 'a', 'b'][: (t.patient == 'p2').sum()]
    a = audit(t)
    assert ('source', 'only', 'b', 1) in set(
        a.pure[['column', 'value', 'label', 'patients']].itertuples(index=False, name=None)
    )
    assert set(a.conflicts.index) <= {'p2'} and (
        len(a.conflicts) == (t[t.patient == 'p2'].label.nunique() > 1)
    )
    assert a.folds is a.shared is a.duplicates is None


def test_audit_report_reads(store):
    f = leaky_folds(store.frames, by='frame').fold
    a = audit(store.frames, Folds(store.frames, f), store)
    for text in (str(a), a._repr_html_()):
        for word in (
            'Counts',
            'Patients with two labels',
            'held_out',
            'this split leaks',
            'Near-duplicate frames',
            '2 blank frames',
        ):
            assert word in text
    assert str(audit(store.table)).count('\n') < 60


def test_audit_bad_input(store):
    with pytest.raises(TableError, match="'source'"):
        audit(store.table.drop(columns='source'))
    with pytest.raises(TableError, match='empty'):
        audit(store.table[:0])
    with pytest.raises(TypeError, match='got a list'):
        audit(store.table, [0])


# ---- one file under several paths


@pytest.fixture
def linked(tmp_path):
    "A clip table of one file under four names, and another file; patients differ."
    (tmp_path / 'c0.mp4').write_bytes(b'0')
    (tmp_path / 'c1.mp4').write_bytes(b'1')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub/link.mp4').symlink_to(tmp_path / 'c0.mp4')
    (tmp_path / 'sub/hard.mp4').hardlink_to(tmp_path / 'c0.mp4')
    names = ['c0.mp4', 'sub/../c0.mp4', 'sub/link.mp4', 'sub/hard.mp4', 'c1.mp4']
    paths = [f'{tmp_path}/{n}' for n in names]
    return pd.DataFrame(
        dict(
            path=paths,
            kind='video',
            label='a',
            patient=[f'p{i}' for i in range(5)],
            source='s',
            probe='convex',
        ),
        index=list('vwxyz'),
    )


def test_a_file_under_several_paths_is_found_wherever_a_table_is_checked(linked):
    with pytest.raises(
        TableError,
        match=r"a file twice in row\(s\) w, x, y: row w \(.*sub/\.\./c0.mp4\) is the file of row v "
        r"\(.*/c0.mp4\)",
    ):
        check_table(linked)
    check_table(linked.loc[['y', 'z']])
    for row in 'wxy':
        with pytest.raises(
            TableError, match=rf'row\(s\) v, {row} are one file .* of several patients \(p0, '
        ):
            patient_folds(linked.loc[['v', row, 'z']], 2)
        with pytest.raises(LeakError, match=rf'1 file\(s\) in both parts: row v \(.*\) is row {row} \(') as e:
            assert_disjoint(linked.loc[['v']], linked.loc[[row, 'z']])
        assert e.value.shared == [linked.path['v']]


def test_frame_tables_of_one_file_are_compared_by_file_too(linked):
    rows = frames(linked.assign(path=linked.path).loc[['v', 'x', 'z']]).set_axis(
        [0] * 18
    )  # an index that names no row
    with pytest.raises(LeakError, match='1 file'):
        assert_disjoint(rows[:6], rows[6:])
    with pytest.raises(TableError, match='are one file'):
        patient_folds(rows, 2)
    patient_folds(rows.assign(patient=['p0'] * 12 + ['p1'] * 6), 2)  # one patient's file may be listed twice
