"Eight modes of leakage: each is found where it was planted, and none where there is none."

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lus_fastai.core import TableError
from lus_fastai.data.folds import Folds, leaky_folds, patient_folds
from lus_fastai.data.leaks import LOOKS, MODES, Split, find_leaks, label_from, look_outside, read_split

CLEAN = dict(
    preprocessing='train',
    selection='valid',
    order='later',
    question=dict(probe=['convex', 'linear'], source=['s0', 's1', 's2']),
)


def clips(seed, patients=40):
    "Clips of patients in order of time; nothing tells the label."
    rng, rows = np.random.default_rng(seed), []
    for i in range(patients):
        fixed = dict(patient=f'p{i:02d}', source=f's{rng.integers(3)}', label='abc'[rng.integers(3)])
        for k in range(rng.integers(1, 4)):
            path, probe = f'/clips/p{i:02d}/{k}.mp4', ('convex', 'linear')[rng.integers(2)]
            day = pd.Timestamp('2020-03-01') + pd.Timedelta(days=i)
            rows.append(
                dict(path=path, clip=path[7:], kind='video', probe=probe, date=str(day.date()), **fixed)
            )
    return pd.DataFrame(rows)


def looks_of(table, seed):
    "What lies outside the fan: noise."
    rng = np.random.default_rng(seed)
    columns = {c: rng.random(len(table)) for names in LOOKS.values() for c in names}
    columns['size'] = rng.choice(['640x480', '800x600'], len(table))
    return pd.DataFrame(dict(path=table['path'], **columns))


def store_of(table, seed):
    "One image a clip, none like another."
    images = np.random.default_rng(seed).integers(0, 255, (len(table), 32, 32)).astype(np.uint8)
    frames = table[['path', 'clip', 'patient', 'label']].assign(frame=0, row=range(len(table)))
    return SimpleNamespace(images=images, frames=frames)


def clean(seed):
    "A split by patient and time, with everything declared as it should be."
    table = clips(seed)
    code = pd.factorize(table['patient'])[0]
    side = np.where(code < 25, 'train', np.where(code < 28, 'valid', 'test'))
    return Split(table, side, dict(CLEAN), store_of(table, seed), looks_of(table, seed))


def severities(split):
    return {f.mode: f.severity for f in find_leaks(split)}


def test_a_hundred_clean_splits_are_silent():
    splits = [clean(seed) for seed in range(100)]
    found = [severities(s) for s in splits]
    assert {m: [f[m] for f in found].count('leak') for m in MODES} == dict.fromkeys(MODES, 0)
    assert not any('unchecked' in f.values() for f in found)
    untested = [s.table['label'][s.side == 'test'].nunique() < 3 for s in splits]
    assert [f['no test'] == 'warning' for f in found] == untested
    warned = {m: [f[m] for f in found].count('warning') for m in MODES if m != 'no test'}
    features = warned.pop('features')
    assert features <= 6 and not any(warned.values())  # of the features 2 are expected


def changed(split, **columns):
    "The split with other columns in its table; the store and the looks stay."
    return Split(split.table.assign(**columns), split.side, split.declared, split.store, split.looks)


def plant_no_test(s):
    return Split(s.table, s.side.replace('test', 'valid'), s.declared)


def plant_declared(**said):
    return lambda s: Split(s.table, s.side, s.declared | said)


def plant_file_twice(s):
    row = s.table[s.side == 'test'].iloc[:1]
    return Split(pd.concat([s.table, row]), [*s.side, 'train'], s.declared)


def plant_near_duplicate(s):
    "The image of a test clip, brighter and noisy, under a patient of the training side."
    store, rng = s.store, np.random.default_rng(0)
    a, b = (np.flatnonzero(s.side == k)[0] for k in ('test', 'train'))
    noisy = 0.8 * store.images[a] + rng.normal(0, 4, (32, 32)) + 20
    store.images[b] = noisy.clip(0, 255).astype(np.uint8)
    return s


def plant_source(s):
    others = s.table['source'].replace('s0', 's1')
    return changed(s, source=np.where(s.table['label'] == 'a', 's0', others))


def plant_probe(s):
    return changed(s, probe=np.where(s.table['label'] == 'b', 'linear', 'convex'))


def plant_look(*columns):
    "A caption, a caliper, a border or a frame size that only one class has."

    def plant(s):
        told = (s.table['label'] == 'a').to_numpy()
        for c in columns:
            s.looks[c] = np.where(told, '1024x768', s.looks[c]) if c == 'size' else s.looks[c] + 3 * told
        return s

    return plant


def plant_time(s):
    "Two training patients come from after the first test patient."
    late = s.table['patient'].isin(['p00', 'p01'])
    return changed(s, date=np.where(late, '2021-01-01', s.table['date']))


def plant_patient(s):
    side = s.side.copy()
    test = np.flatnonzero(s.table['patient'] == s.table['patient'][s.side == 'test'].value_counts().index[0])
    side[test[0]] = 'train'
    return Split(s.table, side, s.declared)


def plant_elsewhere(s):
    return changed(s, source=np.where(s.side == 'test', 'abroad', s.table['source']))


PLANTED = [
    ('no test', plant_no_test),
    ('preprocessing', plant_declared(preprocessing='all')),
    ('selection', plant_declared(selection='test')),
    ('duplicates', plant_file_twice),
    ('duplicates', plant_near_duplicate),
    ('features', plant_source),
    ('features', plant_probe),
    ('features', plant_look('caption')),
    ('features', plant_look('calipers')),
    ('features', plant_look('border')),
    ('features', plant_look('size')),
    ('features', plant_look(*(f'o{i}' for i in range(144)))),
    ('time', plant_time),
    ('patients', plant_patient),
    ('elsewhere', plant_elsewhere),
    ('elsewhere', plant_declared(question=dict(source=['s0', 's1', 's2', 's9']))),
]


@pytest.mark.parametrize('mode,plant', PLANTED, ids=[f'{i}-{m}' for i, (m, _) in enumerate(PLANTED)])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_what_is_planted_is_found(mode, plant, seed):
    found = severities(plant(clean(seed)))
    assert found[mode] == 'leak', found
    follows = (
        {'time'} if mode in ('duplicates', 'patients') else set()
    )  # a test patient among the training rows
    follows |= {'patients'} if mode == 'duplicates' else set()
    others = {m for m, s in found.items() if s == 'leak'} - {mode} - follows
    assert not others, found


def test_every_mode_is_planted_here():
    assert {m for m, _ in PLANTED} == set(MODES) and len(MODES) == 8
    codes = ['L1.1', 'L1.2', 'L1.3', 'L1.4', 'L2', 'L3.1', 'L3.2', 'L3.3']
    assert sorted(m.code for m in MODES.values()) == codes


def test_what_is_not_declared_is_said_and_not_acquitted():
    s = clean(0)
    found = {f.mode: f for f in find_leaks(Split(s.table, s.side))}
    for name in ('preprocessing', 'selection', 'time', 'elsewhere'):
        assert found[name].severity == 'unchecked' and 'not declared: cannot be checked' in found[name].says
    assert 'no frame store' in found['duplicates'].says and found['duplicates'].severity == 'unchecked'
    assert 'not looked at' in found['features'].says
    bare = severities(Split(s.table))
    assert all(bare[m] == 'unchecked' for m in MODES if m != 'features')


def test_source_is_a_leak_by_patient_and_not_by_source():
    t = clips(3)
    t['source'] = np.where(t['label'] == 'a', 's0', np.where(t['source'] == 's0', 's1', t['source']))
    by_patient = severities(Split(t, patient_folds(t).fold))
    by_source = severities(Split(t, pd.factorize(t['source'])[0]))
    assert (by_patient['features'], by_source['features']) == ('leak', 'clean')


def test_the_share_of_false_alarms_is_the_p_value():
    rng, p = np.random.default_rng(0), []
    for seed in range(200):
        side = rng.integers(0, 2, 40)
        parts = [(side != k, side == k) for k in (0, 1)]
        p.append(label_from(rng.random((40, 4)), rng.integers(0, 3, 40), parts, draws=99, seed=seed)[2])
    assert 0.02 <= np.mean(np.array(p) <= 0.1) <= 0.2
    assert 0.4 <= np.mean(np.array(p) <= 0.5) <= 0.65


def test_frames_of_a_clip_on_both_sides_are_a_shared_patient():
    t = clips(1).loc[lambda t: t.index.repeat(4)].reset_index(drop=True)
    t['frame'] = t.groupby('path').cumcount()
    found = {f.mode: f for f in find_leaks(Split(t, leaky_folds(t, by='frame').fold))}
    assert found['patients'].severity == 'leak' and '39 of 40 patients' in found['patients'].says


def write(folder, table, **columns):
    csv = folder / 'split.csv'
    pd.DataFrame(dict(path=table['path'], **columns)).to_csv(csv, index=False)
    return csv


def test_a_split_is_read_by_path_clip_and_file_name(tmp_path):
    t = clips(0).assign(path=lambda t: [f'{tmp_path}/d/{i}.mp4' for i in range(len(t))]).drop(columns='clip')
    fold = patient_folds(t).fold
    names = dict(
        path=t['path'], file=[f'{i}.mp4' for i in range(len(t))], below=[f'd/{i}.mp4' for i in range(len(t))]
    )
    for paths in names.values():
        s = read_split(write(tmp_path, pd.DataFrame(dict(path=paths)), fold=fold), t)
        assert s.side.tolist() == fold.tolist() and s.table['path'].tolist() == t['path'].tolist()
    assert Folds(s.table, s.side).hash == Folds(t, fold).hash


@pytest.mark.parametrize(
    'text,said',
    [
        ('path,side\nnone.mp4,train\n', r'split.csv: row\(s\) 0 name no clip'),
        ('path,side\np00/0.mp4,tran\n', r"split.csv: side is train, valid or test, not 'tran' in row\(s\) 0"),
        ('path,part\np00/0.mp4,1\n', r'split.csv needs the columns path and side'),
        ('path,side\np00/0.mp4,\n', r"column 'side' is empty in row\(s\) 0"),
        ('', r'split.csv is empty'),
    ],
)
def test_a_bad_split_names_file_and_row(tmp_path, text, said):
    (tmp_path / 'split.csv').write_text(text)
    with pytest.raises(TableError, match=said):
        read_split(tmp_path / 'split.csv', clips(0))


@pytest.mark.parametrize(
    'declared,said',
    [
        ('{', 'split.json is no JSON'),
        ('[1]', 'is a dictionary, not list'),
        ('{"selection": "tset"}', r"split.json: selection is one of .*, not 'tset'"),
        ('{"chosen": 1}', "split.json: 'chosen' is not known"),
        ('{"question": {"probe": "convex"}}', 'question is a list of values for each column'),
    ],
)
def test_a_bad_declaration_names_file_and_entry(tmp_path, declared, said):
    t = clips(0)
    csv = write(tmp_path, t, side='train')
    csv.with_suffix('.json').write_text(declared)
    with pytest.raises(ValueError, match=said):
        read_split(csv, t)


@pytest.mark.parametrize('select,found', [('best', 'leak'), ('last', 'clean'), ('inner', 'clean')])
def test_the_claim_of_a_run_is_a_declaration(tmp_path, select, found):
    t = clips(0)
    csv = write(tmp_path, t, fold=patient_folds(t).fold)
    (tmp_path / 'run.json').write_text(json.dumps(dict(select=select, split='x')))
    assert severities(read_split(csv, t))['selection'] == found


def test_a_caption_is_seen_outside_the_fan(tmp_path):
    from PIL import Image

    y, x = np.mgrid[:240, :320]
    grain = np.random.default_rng(0).integers(60, 200, (240, 320))
    angle, depth = np.arctan2(x - 160, y + 20), np.hypot(x - 160, y + 20)
    frame = np.where((abs(angle) < 0.6) & (depth > 40) & (depth < 250), grain, 0).astype(np.uint8)
    paths = []
    for name, lit in (('plain', False), ('caption', True)):
        image = frame.copy()
        image[210:230, 5:60] = 255 * lit
        paths.append(str(tmp_path / f'{name}.png'))
        Image.fromarray(image).save(paths[-1])
    plain, caption = look_outside(pd.DataFrame(dict(path=paths))).to_dict('records')
    assert plain['size'] == caption['size'] == '320x240' and caption['caption'] > plain['caption'] + 0.01
