"The reproduction of Chen 2021 on a tiny phantom: resumable, and no test fold is ever pretrained on."

import numpy as np
import pandas as pd
import pytest

from lus_fastai.core import LeakError
from lus_fastai.papers import uscl
from lus_fastai.runs import read_results
from lus_fastai.train.contrastive import conflict_table

TINY = uscl.UsclSettings(
    max_frames=2,
    bs=8,
    epochs=1,
    folds=2,
    tune_epochs=1,
    queue=16,
    patients=6,
    detect_epochs=1,
    detect_size=64,
    label_rates=(0.5,),
    compared=('supervised', 'FixMatch', 'USCL'),
    ablated=('negative assignment',),
    detected=('random', 'USCL'),
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp('uscl')
    return home, uscl.reproduce('phantom', out=home / 'results', cache=home, settings=TINY)


def test_everything_is_in_the_results(run):
    results = read_results(run[1].with_suffix('.json'))
    t = pd.DataFrame(results['cells'])
    assert set(t.protocol) == {'last', 'best', 'detection'}
    assert set(t.table) == {'comparison', 'labels', 'conflict', 'attention', 'detection'}
    assert set(t[t.table == 'comparison'].row) == {
        'random',
        'random, all layers',
        'supervised',
        'FixMatch',
        'USCL',
        'negative assignment',
    }
    assert set(t[t.table == 'labels'].row) == {'50% of the labels', '100% of the labels'}
    same = (
        t[(t.column == 'accuracy') & t.row.isin(['USCL', '100% of the labels'])]
        .groupby('protocol')
        .ours.nunique()
    )
    assert (same == 1).all()  # all labels is USCL itself
    page = run[1].read_text()
    assert 'Similarity conflict' in page and str(run[0]) not in page


def test_best_epoch_is_never_below_the_last(run):
    both = uscl.comparison_table(read_results(run[1].with_suffix('.json'))).pivot(
        index='label', columns='group', values='value'
    )
    assert (both['epoch picked on the test fold'] >= both['last epoch'] - 1e-12).all()


def test_the_released_backbone_loads_and_has_its_card(run):
    (weights,) = (run[0] / 'results' / 'release').glob('*.safetensors')
    card = weights.with_suffix('.md').read_text()
    results = read_results(run[1].with_suffix('.json'))
    assert weights.name.split('-')[0] == uscl.best_start(results).lower()
    assert (
        results['protocols']['last']['split_hash'] in card
        and weights.name in card
        and str(run[0]) not in card
    )
    from lus_fastai.models.backbones import create_backbone

    assert create_backbone('resnet18', weights=weights).pretrained


def test_a_second_run_trains_nothing(run):
    home, page = run
    before = {
        f: f.stat().st_mtime_ns for f in uscl.run_folder(TINY, 'phantom', home).rglob('*') if f.is_file()
    }
    cells = read_results(page.with_suffix('.json'))['cells']
    again = uscl.reproduce('phantom', out=home / 'again', cache=home, settings=TINY)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert read_results(again.with_suffix('.json'))['cells'] == cells


def test_pretraining_never_meets_the_test_fold(run):
    home, _ = run
    store = uscl.frame_store(uscl.clip_table('phantom', TINY, home), TINY, home)
    folds = uscl.downstream_folds(store.frames, TINY)
    for k in range(TINY.folds):
        rest, held_out = uscl.outside_fold(store.frames, folds, k), folds.test(k)
        assert not set(rest.patient) & set(held_out.patient) and not set(rest['clip']) & set(held_out['clip'])
        assert rest.label[~rest.downstream].isna().all() and (~rest.downstream).any()
    with pytest.raises(LeakError):
        uscl.assert_disjoint(store.frames, held_out)


@pytest.mark.parametrize(
    'x, kind, want',
    [
        (np.array([[1.0, 0], [1, 0], [-2, 0], [0, 1], [0, -1]]), 'same clip', 1.0),
        (np.array([[1.0, 0], [0, 1], [-2, 0], [1, 1], [0, -2]]), 'same clip', 0.0),
    ],
)
def test_conflict_by_hand(x, kind, want):
    got = (
        conflict_table(
            x, pd.DataFrame(dict(clip=list('aabcd'), patient=list('aaabc'), label=list('xxxyy'))), 2000
        )
        .set_index('pairs')
        .cosine
    )
    assert got[kind] == pytest.approx(want)


def test_real_pretraining_leaves_the_test_fold_out(real_data, tmp_path):
    table = uscl.clip_table('real', TINY)
    clips = table.assign(clip=table['path'], row=0, frame=0, time=0.0)
    folds = uscl.downstream_folds(clips, uscl.DEFAULT)
    assert 'blues' not in set(folds.table.source) and len(folds.table) == clips.downstream.sum() == 117
    for k in range(uscl.DEFAULT.folds):
        rest = uscl.outside_fold(clips, folds, k)
        assert not set(rest.patient) & set(folds.test(k).patient) and (rest.source == 'blues').sum() == 241
