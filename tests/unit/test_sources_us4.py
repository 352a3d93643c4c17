"sources: BUSI and the public parts of US-4 in made-up folders of their layouts; with LUS_DATA, BUSI for real"

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lus_fastai.core import CLIP_COLUMNS, TableError, read_table, write_table
from lus_fastai.data import readers
from lus_fastai.data.folds import patient_folds
from lus_fastai.data.readers import duplicate_groups, lesion_paths, pack_sequence, us4_rows
from lus_fastai.data.sources import (
    SOURCES,
    fetch_source,
    index_source,
    manifest,
    sources_table,
    verify_source,
)
from lus_fastai.data.store import FrameStore
from lus_fastai.video import ClipError, read_clip


def texture(seed, size=(64, 80)):
    return np.kron(
        np.random.default_rng(seed).integers(0, 200, (8, 8)), np.ones((size[0] // 8, size[1] // 8))
    ).astype(np.uint8)


def save(path, x, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **how)
    return path


def lesion(k=0, size=(64, 80)):
    m = np.zeros(size, np.uint8)
    m[8 + k : 24, 10 : 30 + k] = 255
    return m


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('LUS_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('LUS_DATA', raising=False)
    return tmp_path / 'home'


# ---- BUSI


def busi(root, images, folders):
    "`images`: (class, number, seed, brighter, masks); `folders` puts images and masks apart."
    for c, n, seed, more, masks in images:
        save(
            root / c / ('images/' if folders else '') / f'{c} ({n}).{"jpg" if folders else "png"}',
            texture(seed) + more,
            **(dict(quality=95) if folders else {}),
        )
        for k, m in enumerate(masks):
            save(root / c / ('mask/' if folders else '') / f'{c} ({n})_mask{f"_{k}" if k else ""}.png', m)
    return root


IMAGES = [
    ('benign', 1, 1, 0, [lesion()]),
    ('benign', 10, 2, 0, [lesion(), lesion(5), lesion(9)]),
    ('benign', 2, 3, 0, [lesion()]),
    ('malignant', 1, 1, 30, [lesion()]),
    ('malignant', 2, 4, 0, [lesion()]),
    ('malignant', 3, 4, 20, [lesion(3)]),
    ('malignant', 4, 4, 40, [lesion(3)]),
    ('normal', 1, 5, 0, [lesion() * 0]),
    ('normal', 2, 6, 0, []),
]


@pytest.mark.parametrize('folders', [False, True])
def test_busi_in_both_layouts(tmp_path, capsys, folders):
    t = index_source('busi', busi(tmp_path / 'busi', IMAGES, folders))
    out = capsys.readouterr().out
    assert tuple(t.columns) == (*CLIP_COLUMNS, 'lesions') and list(t.path) == sorted(t.path)
    t = t.set_index(t.path.map(lambda p: Path(p).stem))
    assert list(t.index) == [
        'benign (10)',
        'benign (2)',
        'malignant (2)',
        'malignant (3)',
        'malignant (4)',
        'normal (1)',
        'normal (2)',
    ]
    assert (
        t.patient.nunique() == 5
        and t.patient[['malignant (2)', 'malignant (3)', 'malignant (4)']].nunique() == 1
    )
    assert (
        set(t.kind) == {'image'}
        and set(t.source) == {'busi'}
        and set(t.probe) == {'linear'}
        and t.patient.str.fullmatch(r'busi-g\d{3}').all()
    )
    assert [Path(p).name for p in lesion_paths(t.lesions['benign (10)'])] == [
        'benign (10)_mask.png',
        'benign (10)_mask_1.png',
        'benign (10)_mask_2.png',
    ]
    assert t.lesions['normal (1)'] == t.lesions['normal (2)'] == '' and not lesion_paths(
        t.lesions['normal (1)']
    )
    for line in (
        '2 image(s) in 1 group(s) of duplicates that are in two classes, dropped: benign (1)',
        '3 image(s) have a duplicate, or nearly one, in their class: 1 group(s)',
        'patients are not given',
    ):
        assert line in out
    assert 'two labels' not in out and 'skipped' not in out


def test_busi_is_found_in_a_folder_of_data_sets_and_in_an_unpacked_archive(tmp_path, home):
    busi(tmp_path / 'Dataset_BUSI_with_GT', IMAGES, False)
    assert (
        len(index_source('busi', tmp_path))
        == len(index_source('busi', tmp_path / 'Dataset_BUSI_with_GT'))
        == 7
    )
    with pytest.raises(FileNotFoundError, match='is no folder with busi.*(?s:.*)cite: Al-Dhabyani'):
        index_source('busi')


def test_busi_with_damage(tmp_path, capsys):
    root = busi(tmp_path / 'busi', IMAGES, False)
    (root / 'benign/benign (2).png').write_bytes(b'\x89PNG damaged')  # no image
    save(root / 'malignant/malignant (3)_mask.png', lesion()[:32])  # a mask of another size
    (root / 'malignant/malignant (2)_mask.png').unlink()  # a lesion without its mask
    save(root / 'normal/normal (77)_mask.png', lesion() * 0)  # a mask without its image
    t = index_source('busi', root)
    out = capsys.readouterr().out
    assert {Path(p).stem for p in t.path} == {
        'benign (10)',
        'malignant (2)',
        'malignant (4)',
        'normal (1)',
        'normal (2)',
    }
    assert (
        '2 image(s) skipped: benign/benign (2).png (' in out
        and 'malignant (3).png (its mask has another size)' in out
    )
    assert (
        '1 image(s), not normal, without a mask of a lesion: malignant (2).png' in out
        and '1 mask(s) without an image: normal (77)_mask.png' in out
    )
    shutil.rmtree(root / 'benign')
    (root / 'benign').mkdir()
    assert set(index_source('busi', root).label) == {'malignant', 'normal'}  # nothing is across classes now
    for c in ('malignant', 'normal'):
        shutil.rmtree(root / c)
        (root / c).mkdir()
    with pytest.raises(TableError, match='has no clip of busi'):
        index_source('busi', root)


def test_busi_goes_through_a_store_and_a_csv(tmp_path):
    t = index_source('busi', busi(tmp_path / 'busi', IMAGES, True))
    store = FrameStore.build(t, tmp_path / 'store', size=(32, 40), workers=0)
    assert len(store) == len(t) and [len(lesion_paths(v)) for v in store.frames.lesions] == [
        len(lesion_paths(v)) for v in t.lesions
    ] == [3, 1, 1, 1, 1, 0, 0]
    write_table(t, tmp_path / 'busi.csv')
    assert [lesion_paths(v) for v in read_table(tmp_path / 'busi.csv').lesions] == [
        lesion_paths(v) for v in t.lesions
    ]
    assert lesion_paths(None) == lesion_paths(np.nan) == lesion_paths('') == []


def test_groups_are_linked_by_a_third_and_do_not_depend_on_order():
    a, b = texture(1).astype(float), texture(2).astype(float)
    chain = [
        (a * (1 - w) + b * w).astype(np.uint8) for w in np.linspace(0, 1, 30)
    ]  # each is near the next, the ends are far apart
    assert duplicate_groups([chain[0], chain[-1]]).tolist() == [0, 1]
    assert set(duplicate_groups(chain)) == {0}
    images = [texture(k % 7) for k in range(20)]
    order = np.random.default_rng(0).permutation(20)

    def same(g):
        return g[:, None] == g[None]

    assert (
        same(duplicate_groups([images[k] for k in order]))
        == same(duplicate_groups(images))[np.ix_(order, order)]
    ).all()
    assert duplicate_groups([texture(1), texture(1) + 1], bits=0).tolist() == [0, 0]


# ---- the sampling rule


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.fractions(Fraction(1, 2), 60, max_denominator=4),
    st.integers(1, 6),
    st.integers(0, 8),
)
@example(279, Fraction(40, 1), 1, 7)  # 279 / (279 / 7) is a little more than 7
def test_sampling_rule_against_exact_fractions(frames, fps, n, min_frames):
    step = max(min(fps / n, Fraction(frames, max(min_frames, 1))), 1)
    theirs, k = [], 0
    while k * step < frames:
        theirs.append(int(k * step))
        k += 1
    got = us4_rows(frames, float(fps), n, min_frames)
    assert got.tolist() == sorted(set(theirs)) and len(got) >= min(frames, min_frames)


def test_sampling_rule_by_hand():
    assert us4_rows(20, 30).tolist() == [0, 4, 8, 12, 16]  # two thirds of a second: five frames all the same
    assert us4_rows(100, 15, n=1).tolist() == [0, 15, 30, 45, 60, 75, 90]
    assert us4_rows(1, 30).tolist() == [0] and us4_rows(3, 1).tolist() == [0, 1, 2]
    for bad in (
        dict(frames=0, fps=30),
        dict(frames=9, fps=0),
        dict(frames=9, fps=np.nan),
        dict(frames=9, fps=30, n=0),
    ):
        with pytest.raises(ValueError, match='above 0'):
            us4_rows(**bad)


# ---- CLUST


def sequence(folder, n, digits=5, size=(24, 32), first=1):
    for k in range(n):
        save(folder / f'Data/{k + first:0{digits}d}.png', np.full(size, k, np.uint8))
    (folder / 'Annotation').mkdir(parents=True, exist_ok=True)
    for k in (1, 2):
        (folder / f'Annotation/{folder.name}_{k}.txt').write_text('1 12.0 8.5\n')
    return folder


def test_clust(tmp_path, home, capsys):
    root = tmp_path / 'clust'
    sequence(root / 'Training/2D/ETH-01-1', 75)
    sequence(root / 'Training/2D/ETH-01-2', 8, digits=4)
    sequence(root / 'Test/2D/CIL-02', 40)
    (root / 'Training/3D/EMC-01-1/Data').mkdir(parents=True)
    (root / 'Training/3D/EMC-01-1/Data/0001.mha').touch()
    pd.DataFrame(dict(sequence=['ETH-01-1', 'cil-02 '], fps=[25, 12.5])).to_csv(
        root / 'frame_rates.csv', index=False
    )
    t = index_source('clust', root)
    out = capsys.readouterr().out
    assert tuple(t.columns) == (
        'path',
        'kind',
        'label',
        'patient',
        'source',
        'probe',
        'sequence',
        'part',
        'fps',
        'length',
        'landmarks',
    )
    t = t.set_index('sequence')
    assert t.loc[
        'ETH-01-1', ['kind', 'label', 'patient', 'source', 'probe', 'part', 'fps', 'length', 'landmarks']
    ].tolist() == ['video', 'liver', 'clust-eth-01', 'clust-eth', 'convex', 'training', 25, 75, 2]
    assert (
        t.patient['ETH-01-2'] == 'clust-eth-01'
        and t.patient['CIL-02'] == 'clust-cil-02'
        and t.part['CIL-02'] == 'test'
    )
    clip = read_clip(t.path['ETH-01-1'])
    assert (
        clip.frames[:, 0, 0].tolist() == us4_rows(75, 25).tolist() == [0, 8, 16, 25, 33, 41, 50, 58, 66]
        and np.abs(clip.times - np.arange(9) / 3).max() < 2e-3
    )
    assert read_clip(t.path['ETH-01-2']).frames[:, 0, 0].tolist() == [
        0,
        1,
        3,
        4,
        6,
    ]  # 8 frames in five steps of 1.6
    for line in (
        "1 sequence(s) skipped: Training/3D/EMC-01-1 (no images in Data: a 3D sequence?)",
        "1 sequence(s) without a row in frame_rates.csv: 20 frames a second assumed: ETH-01-2",
    ):
        assert line in out
    store = FrameStore.build(
        index_source('clust', root), tmp_path / 'store', size=(24, 32), rate=30, workers=0
    )
    assert store.frames.groupby('sequence').size().to_dict() == {'ETH-01-1': 9, 'ETH-01-2': 5, 'CIL-02': 10}
    assert len(patient_folds(t.reset_index(), 2).numbers) == 2


def test_clust_packs_once_and_names_by_content(tmp_path, home, monkeypatch):
    root = sequence(tmp_path / 'clust/ETH-01-1', 20).parent
    first = index_source('clust', root)
    assert Path(first.path[0]).is_relative_to(home / 'packed/clust') and Path(first.path[0]).name.startswith(
        'ETH-01-1-'
    )
    monkeypatch.setattr(readers, 'write_video', lambda *a, **k: pytest.fail('packed again'))
    moved = tmp_path / 'elsewhere'
    shutil.copytree(root, moved / 'clust')
    assert (
        index_source('clust', root).path.tolist()
        == index_source('clust', moved).path.tolist()
        == first.path.tolist()
    )
    monkeypatch.undo()
    monkeypatch.setenv('LUS_HOME', str(home))
    save(root / 'ETH-01-1/Data/00001.png', np.full((24, 32), 99, np.uint8))  # another frame, another clip
    assert index_source('clust', root).path[0] != first.path[0]
    (root / 'frame_rates.csv').write_text('sequence,fps\nETH-01-1,10\n')  # another rate, another clip
    assert (
        len(set(index_source('clust', root).path) | set(first.path)) == 2
        and len(list((home / 'packed/clust').iterdir())) == 3
    )


def test_clust_with_damage(tmp_path, home, capsys):
    root = tmp_path / 'clust'
    for s in ('ETH-01-1', 'ETH-02-1', 'ETH-03-1'):
        sequence(root / s, 10)
    (root / 'ETH-01-1/Data/00001.png').write_bytes(b'\x89PNG no more')
    sequence(root / 'ETH-02-1', 3, size=(24, 40))
    t = index_source('clust', root)
    out = capsys.readouterr().out
    assert (
        t.sequence.tolist() == ['ETH-03-1']
        and '2 sequence(s) skipped: ETH-01-1 (' in out
        and 'ETH-02-1 (' in out
    )
    shutil.copytree(root / 'ETH-03-1', root / 'Test/2D/ETH-03-1')
    assert (
        len(index_source('clust', root)) == 1
        and 'ETH-03-1 (the same frames as another)' in capsys.readouterr().out
    )
    (root / 'frame_rates.csv').write_text('sequence,fps\nETH-01-1,fast\n')
    with pytest.raises(TableError, match='fps must be a number above 0, it is not for ETH-01-1'):
        index_source('clust', root)
    (root / 'frame_rates.csv').write_text('name,rate\nETH-01-1,9\n')
    with pytest.raises(TableError, match='lacks the column'):
        index_source('clust', root)
    (tmp_path / 'empty/x').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='does not hold clust'):
        index_source('clust', tmp_path / 'empty')


def test_frames_are_ordered_by_number_and_kept_exactly(tmp_path, home):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 15, 17), dtype=np.uint8)  # odd sizes, noise
    files = [
        save(tmp_path / f'take_7_frame{k}.png', x) for k, x in enumerate(frames)
    ]  # frame10 sorts before frame2 as text
    clip = read_clip(pack_sequence(files[::-1], 3, 'x/take 7'))
    assert (clip.frames == frames).all()
    assert not [p for p in (home / 'packed/x').iterdir() if p.suffix != '.mkv' or p.name.startswith('.')]
    with pytest.raises(ClipError, match='holds no frame'):
        pack_sequence([], 3, 'x/none')


# ---- Butterfly


def test_butterfly_gallery_and_names_of_pocus(tmp_path, capsys):
    root = tmp_path / 'butterfly'
    for f in (
        'Lung/Normal Lung A lines.mp4',
        'Lung/Consolidation.mp4',
        'Lung/Consolidation_Example 2.mp4',
        'Cardiac/Cardiomyopathy.mp4',
        'Cov-Butterfly-Skip Lesion.mp4',
        'Reg_Butterfly_Normal Lung.mpeg',
        'Lung/poster.jpg',
        'Lung/.DS_Store',
    ):
        (root / f).parent.mkdir(parents=True, exist_ok=True)
        (root / f).touch()
    t = index_source('butterfly', root)
    out = capsys.readouterr().out
    assert (
        tuple(t.columns) == (*CLIP_COLUMNS, 'title', 'topic')
        and set(t.kind) == {'video'}
        and set(t.source) == {'butterfly'}
        and set(t.probe) == {'convex'}
    )
    t = t.set_index('title')
    assert t.label.to_dict() == {
        'Normal Lung A lines': 'regular',
        'Consolidation': 'covid',
        'Consolidation_Example 2': 'covid',
        'Cardiomyopathy': 'covid',
        'Skip Lesion': 'covid',
        'Normal Lung': 'regular',
    }
    assert (
        t.patient['Consolidation'] == t.patient['Consolidation_Example 2'] == 'butterfly-consolidation'
        and t.patient.nunique() == 5
    )
    assert (
        t.topic['Cardiomyopathy'] == 'Cardiac'
        and t.topic['Skip Lesion'] is None
        or pd.isna(t.topic['Skip Lesion'])
    )
    assert '1 still(s) skipped' in out and 'leave one of the two out' in out


def test_butterfly_as_frames_of_us4(tmp_path, home, capsys):
    root = tmp_path / 'butterfly'
    for title, n in (('Cov-Cardiomyopathy_mp4', 12), ('Reg-Normal Lung_mp4', 5)):
        for k in range(n):
            save(root / title / f'{title}_frame{k}.jpg', np.full((16, 16), 10 * k, np.uint8), quality=95)
    (root / 'Cov-Broken_mp4').mkdir()
    (root / 'Cov-Broken_mp4/Cov-Broken_mp4_frame0.jpg').write_bytes(b'\xff\xd8\xff no')
    t = index_source('butterfly', root).set_index('title')
    out = capsys.readouterr().out
    assert (
        t.label.to_dict() == {'Cardiomyopathy': 'covid', 'Normal Lung': 'regular'}
        and '1 folder(s) of frames skipped: Cov-Broken_mp4 (' in out
    )
    assert (
        np.abs(read_clip(t.path['Cardiomyopathy']).frames[:, 8, 8].astype(int) - 10 * np.arange(12)).max()
        <= 2
    )  # already sampled: all are kept, in order


# ---- sources that come by hand


@pytest.mark.parametrize('name', ['busi', 'butterfly', 'clust'])
def test_without_an_address_every_verb_says_so(name, tmp_path, home):
    for verb in (lambda: manifest(name), lambda: verify_source(name, tmp_path)):
        with pytest.raises(
            FileNotFoundError, match=f'{name} comes by hand(?s:.*){SOURCES[name].urls["homepage"]}'
        ):
            verb()
    with pytest.raises(FileNotFoundError, match=f'{name} is not in .*cannot be fetched(?s:.*)cite:') as e:
        fetch_source(name, tmp_path)
    assert SOURCES[name].layout in str(e.value) and str(tmp_path) in str(e.value)
    with pytest.raises(FileNotFoundError, match='comes by hand'):
        fetch_source(name, tmp_path, base_url='http://127.0.0.1:9/')
    s = sources_table().loc[name]
    assert pd.isna(s.files) and pd.isna(s.megabytes) and s.licence and s.citation


def test_fetch_finds_what_was_laid_down(tmp_path, home, capsys):
    root = busi(tmp_path / 'busi', IMAGES, False)
    assert fetch_source('busi', root) == root and 'nothing to fetch' in capsys.readouterr().out


# ---- the real thing


def test_real_busi(real_data, capsys):
    t = index_source('busi', real_data)
    out = capsys.readouterr().out
    assert (
        t.label.value_counts().to_dict() == dict(benign=214, malignant=164, normal=59)
        and t.patient.nunique() == 389
    )
    assert (
        '11 image(s) in 5 group(s) of duplicates that are in two classes' in out
        and '89 image(s) have a duplicate, or nearly one, in their class: 41 group(s)' in out
        and 'skipped' not in out
    )
    gone = {
        'benign (433)',
        'malignant (145)',
        'benign (42)',
        'benign (131)',
        'malignant (51)',
    }  # the first two are one file
    assert not gone & {Path(p).stem for p in t.path}
    assert t.lesions.map(lambda v: len(lesion_paths(v))).groupby(t.label).agg(
        ['min', 'max']
    ).to_numpy().tolist() == [[1, 2], [1, 2], [0, 0]]
    same = t.set_index(t.path.map(lambda p: Path(p).stem)).patient
    assert (
        same['benign (214)'] == same['benign (260)'] == same['benign (281)']
        and same['benign (10)'] != same['benign (101)']
    )
