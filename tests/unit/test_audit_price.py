"The price of a leak: what is known where it is known, nothing where there is none; page, JSON, command."

import contextlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lus_fastai.cli import lus_audit
from lus_fastai.data.folds import leaky_folds, patient_folds
from lus_fastai.data.leaks import Split, find_leaks
from lus_fastai.split_audit import PRICES, audit_report, audit_split, honest_parts, price_split, replayed
from lus_fastai.stats.classification import predicted


def rows(patients=60, each=4, seed=0):
    "Clips of patients whose labels nothing tells, and vectors that say who they are."
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), each)
    label, source = rng.integers(0, 3, patients), rng.integers(0, 4, patients)
    t = pd.DataFrame(
        dict(
            path=[f'/c/{i}.mp4' for i in range(len(who))],
            kind='video',
            patient=[f'p{i}' for i in who],
            label=[f'l{i}' for i in label[who]],
            source=[f's{i}' for i in source[who]],
            probe='convex',
        )
    )
    person = 4 * rng.standard_normal((patients, 100))
    return t, person[who] + rng.standard_normal((len(who), 100)), label[who]


def price_of(mode, split, x):
    (price,) = [p for p in price_split(split, find_leaks(split), x) if p.mode == mode]
    return price


def test_shared_patients_cost_what_they_must():
    "The model can know a label only by knowing the patient: right with the leak, at chance without."
    t, x, _ = rows()
    price = price_of('patients', Split(t, leaky_folds(t, 4, 'clip').fold), x)
    assert price.leaky > 0.95 and abs(price.honest - 1 / 3) < 0.15
    assert price.difference.low > 0.4 and price.difference.value == pytest.approx(price.leaky - price.honest)


def test_an_honest_split_has_no_price_and_its_replay_is_itself():
    t, x, _ = rows()
    fold = patient_folds(t, 5).fold
    split = Split(t, fold)
    assert not price_split(split, find_leaks(split), x)
    again = replayed(x, split.table, honest_parts(split))
    assert (predicted(again) == predicted(replayed(x, split.table, split.parts()))).all()


def test_the_same_rows_are_asked_with_and_without_the_leak():
    t, x, _ = rows()
    split = Split(t, np.where(np.arange(len(t)) % 4 == 0, 'test', 'train'))
    for train, test in honest_parts(split):
        assert not set(t['patient'][train]) & set(t['patient'][test])
        assert (split.side[test] == 'test').all()
    assert np.any([test for _, test in honest_parts(split)], 0).sum() == (split.side == 'test').sum()
    price = price_of('patients', split, x)
    assert price.leaky > 0.9 > price.honest + 0.3


def test_the_best_epoch_on_the_test_rows_is_never_worse():
    t, x, _ = rows()
    split = Split(t, patient_folds(t, 4).fold, dict(selection='test'))
    price = price_of('selection', split, x)
    assert price.difference.value >= 0 and price.leaky > price.honest


def test_features_chosen_on_all_rows_find_what_is_not_there():
    "Of 2,000 columns of noise some go with the labels by chance: known since Ambroise and McLachlan (2002)."
    t, _, _ = rows(patients=40, each=1)
    x = np.random.default_rng(1).standard_normal((len(t), 2000))
    price = price_of('preprocessing', Split(t, patient_folds(t, 4).fold, dict(preprocessing='all')), x)
    assert price.leaky > 0.7 and price.honest < 0.55 and price.difference.low > 0.1


def test_no_test_set_is_asked_what_it_learnt():
    t, x, _ = rows(each=1)
    price = price_of('no test', Split(t, ['train'] * len(t)), x)
    assert price.leaky > 0.95 and price.honest < 0.6


def test_look_alikes_cost_their_share():
    "Every patient has a second name; without the look-alikes in training the model is at chance."
    t, x, _ = rows(patients=40, each=1)
    t = pd.concat([t, t.assign(path=t['path'] + '2', patient=t['patient'] + 'x')], ignore_index=True)
    split = Split(t, patient_folds(t, 4).fold)
    clip = split.table['clip']
    pairs = pd.DataFrame(dict(clip=clip[:40].to_numpy(), twin_clip=clip[40:].to_numpy()))
    finding = type('Found', (), dict(mode='duplicates', severity='leak', rows=pairs))
    (price,) = price_split(split, [finding], np.concatenate([x, x]))
    assert price.leaky > price.honest + 0.2


def test_sources_that_tell_the_label():
    t, x, label = rows()
    t['source'] = [f's{i}' for i in label]
    noise = np.random.default_rng(0).standard_normal((len(t), 20))
    told = np.concatenate([np.eye(3)[label] * 3, noise], 1)
    extra = np.random.default_rng(1).integers(0, 2, 60).repeat(4)
    t['source'] += pd.Series(extra).map({0: 'a', 1: 'b'})
    split = Split(t, patient_folds(t, 4).fold)
    price = price_of('features', split, told)
    assert (
        price.leaky > 0.9 and price.honest > 0.9
    )  # what is seen is no source: other sources show it as well


def test_order_in_time_and_elsewhere_are_priced():
    t, x, label = rows()
    t['date'] = pd.date_range('2020-01-01', periods=len(t)).astype(str)
    side = np.where(np.arange(len(t)) % 8 < 4, 'train', 'test')
    side[:40], side[-8:] = 'train', 'train'
    found = price_of('time', Split(t, side, dict(order='later')), x)
    assert np.isfinite(found.difference.value)
    easy = np.where((t['source'] == 's0').to_numpy()[:, None], np.eye(3)[label] * 9, 0.0)
    asked = Split(t, np.where(t['source'] == 's0', 'test', 'train'), dict(question=dict(source=['s1'])))
    price = price_of('elsewhere', asked, easy + np.random.default_rng(0).standard_normal(easy.shape))
    assert price.leaky > 0.9 and price.honest < 0.6 and price.difference.low > 0.2


def test_every_mode_has_a_price():
    from lus_fastai.data.leaks import MODES

    assert set(PRICES) == set(MODES)


def test_page_and_json_escape_what_a_table_holds(tmp_path):
    t, x, _ = rows(patients=12)
    bad = '<img src=x onerror=alert(1)>'
    t['patient'], t['source'] = bad + t['patient'], bad
    found = audit_split(Split(t, leaky_folds(t, 3, 'clip').fold), x)
    page = audit_report(found, tmp_path / 'a.html').read_text(encoding='utf-8')
    assert '<img' not in page and '&lt;img' in page
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain['leaks'] >= 1 and plain['patients'] == 12 and len(plain['findings']) == 8


def said(*args, **options):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = lus_audit(*map(str, args), **options)
    return status, out.getvalue()


def test_the_command_ends_with_the_status_of_a_test(tmp_path, phantom_table):
    t, csv = phantom_table, tmp_path / 'clips.csv'
    t.to_csv(csv, index=False)
    split = tmp_path / 'split.csv'
    pd.DataFrame(dict(path=t['path'], fold=patient_folds(t, 2).fold)).to_csv(split, index=False)
    status, text = said(csv, split=str(split))
    assert status == 0 and 'no leak found' in text
    pd.DataFrame(dict(path=t['path'], fold=np.arange(len(t)) % 2)).to_csv(split, index=False)
    status, text = said(csv, split=str(split), report=str(tmp_path / 'a.html'))
    assert status == 1 and 'leak      L3.2' in text and (tmp_path / 'a.html').stat().st_size > 5000
    status, text = said(csv, split=str(split), json=True)
    assert status == 1 and json.loads(text)['leaks'] == 1
    script = tmp_path / 'audit.py'
    script.write_text('import sys\nfrom lus_fastai.cli import lus_audit\nsys.exit(lus_audit())\n')
    for args, status, words in (
        ([csv, '--split', tmp_path / 'no.csv'], 2, 'error: .*no.csv: No such file'),
        ([csv, '--split', split, '--folds', '2'], 2, 'error: --split and --folds are two splits'),
        ([csv, '--split', split], 1, ''),
    ):
        done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True)
        assert done.returncode == status and re.match(words, done.stderr), done.stderr


def test_a_store_brings_images_and_prices(tmp_path, phantom_table):
    t, split = phantom_table, tmp_path / 'split.csv'
    t.to_csv(tmp_path / 'clips.csv', index=False)
    pd.DataFrame(dict(path=t['path'], fold=np.arange(len(t)) % 2)).to_csv(split, index=False)
    options = dict(split=str(split), store=str(tmp_path / 'store'), json=True)
    first = json.loads(said(tmp_path / 'clips.csv', **options)[1])
    assert [p['mode'] for p in first['prices']][-1] == 'patients'
    kept = list((tmp_path / 'store').glob('vectors-*.npz'))
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    assert json.loads(said(tmp_path / 'clips.csv', **options)[1]) == first
    assert kept[0].stat().st_mtime_ns == stamp  # nothing was computed again
