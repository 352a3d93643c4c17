"The reproduction of Merand 2021 on a tiny phantom: resumable, and no patient is in two steps."

import numpy as np
import pandas as pd
import pytest
import torch

from lus_fastai.core import LeakError, MaskSet
from lus_fastai.papers import merand
from lus_fastai.papers.merand import Variant
from lus_fastai.runs import read_results
from lus_fastai.train.segmentation import LossLog

pytestmark = pytest.mark.filterwarnings('ignore:no pixel of')  # so few images lack classes
TINY = merand.MerandSettings(
    backbones=('test_resnet',),
    matrix=('test_resnet',),
    rows=('autoencoder, boxes',),
    starts=('random',),
    beside=('SimCLR, boxes', 'classifier'),
    disjoint=('none',),
    seeds=(1,),
    size=32,
    bs=4,
    first_n=24,
    first_epochs=1,
    boxes_n=12,
    boxes_epochs=1,
    target_n=20,
    test_n=4,
    parts=3,
    epochs=1,
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp('merand')
    return home, merand.reproduce('phantom', out=home / 'results', cache=home, settings=TINY)


@pytest.fixture(scope='module')
def parts():
    return merand.learning_parts('phantom', TINY)


def test_everything_is_in_the_results(run):
    t = pd.DataFrame(read_results(run[1].with_suffix('.json'))['cells'])
    main = t[t.table == 'test_resnet']
    assert set(zip(main.row, main.column)) == {(w.row, w.column) for w in merand.variants(TINY)} | {
        ('none', 'U-Net encoder')
    } and set(main.protocol) == {'rotation', 'last', 'disjoint'}
    assert main.ours.between(0, 1).all() and main.interval.notna().all()
    assert set(t[t.table == 'first step'].column) == {'exact match', 'squared error'}
    assert t[t.table.str.endswith('worst run')].ours.isna().all()  # one run has no spread
    assert {'watched', 'last run', 'test'} == set(t[t.table == 'loss'].column)
    page = run[1].read_text()
    assert 'Best minus worst' not in page and 'Table 3' in page and str(run[0]) not in page


def test_a_second_run_trains_nothing(run):
    home, page = run
    before = {
        f: f.stat().st_mtime_ns for f in merand.run_folder(TINY, 'phantom', home).rglob('*') if f.is_file()
    }
    again = merand.reproduce('phantom', out=home / 'again', cache=home, settings=TINY)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert (
        read_results(again.with_suffix('.json'))['cells'] == read_results(page.with_suffix('.json'))['cells']
    )


def test_resumed_run_equals_undisturbed_one(parts, tmp_path, monkeypatch):
    variant, runs = Variant('test_resnet'), []
    whole = dict(np.load(merand.target_run(variant, 5, parts, tmp_path / 'whole', TINY)))
    after = LossLog.end_epoch

    def stop(self):
        after(self)
        runs.append(self.epoch)
        if len(runs) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(LossLog, 'end_epoch', stop)
        with pytest.raises(KeyboardInterrupt):
            merand.target_run(variant, 5, parts, tmp_path / 'cut', TINY)
    cut = dict(np.load(merand.target_run(variant, 5, parts, tmp_path / 'cut', TINY)))
    assert runs == [0, 1] and all(np.array_equal(whole[k], cut[k]) for k in whole)


def test_test_images_are_read_when_training_is_over(parts, tmp_path, monkeypatch):
    read, hidden = [], MaskSet(parts.test.images, parts.test.masks, parts.test.names, parts.test.table)

    class Watched(MaskSet):
        def __getattribute__(self, name):
            if name in ('images', 'masks'):
                read.append(
                    (tmp_path / 'target' / 'test_resnet-none-unet-encoder-random-s1' / 'history.csv').exists()
                )
            return super().__getattribute__(name)

    watched = merand.Parts(parts.first, parts.labels, parts.boxes, parts.target, parts.test)
    hidden.__class__ = Watched
    watched.test = hidden
    merand.target_run(Variant('test_resnet'), 1, watched, tmp_path, TINY)
    assert read and all(read)


def test_no_patient_in_two_steps(parts):
    sets = [set(p.table.patient) for p in (parts.first, parts.boxes, parts.target, parts.test)]
    assert sum(map(len, sets)) == len(set().union(*sets))
    with pytest.raises(LeakError):
        merand.Parts(parts.first, parts.labels, parts.test, parts.target, parts.test)


def test_what_moves(run, parts):
    home, _ = run
    path = merand.run_folder(TINY, 'phantom', home)
    both, encoder = (
        Variant('test_resnet', 'autoencoder, boxes', moved='both'),
        Variant('test_resnet', 'autoencoder, boxes'),
    )
    first = merand.load_weights(merand.first_step(both, parts, path, TINY))
    assert merand.first_step(both, parts, path, TINY) == merand.first_step(encoder, parts, path, TINY)
    for variant in (both, encoder):
        torch.manual_seed(0)
        net = merand.started(variant, path, 13).state_dict()
        name = next(k for k in net if k.startswith('decoder') and net[k].ndim == 4)
        assert all(torch.equal(net[k], v) for k, v in first.items() if k.startswith('encoder'))
        moved = torch.equal(net[name][:, : first[name].shape[1]], first[name])
        assert moved == (variant.moved == 'both')


def test_spread_and_interval_by_hand():
    def one(tp, fp, fn):
        return [[[0, fp], [fn, tp]]]

    runs = np.array(
        [
            [one(1, 1, 0), one(0, 0, 2), one(3, 0, 1)],
            [one(2, 0, 0), one(2, 0, 0), one(4, 0, 0)],
            [one(0, 0, 2), one(0, 0, 2), one(0, 0, 4)],
        ]
    )
    got = merand.run_scores(runs, ['a', 'a', 'b'], n_boot=4000)
    assert got['mIoU'][0] == pytest.approx((4 / 8 + 1 + 0) / 3) and got['spread'] == 1
    # patient a: 1/4, 1, 0; patient b: 3/4, 1, 0: twice a with probability 1/4, twice b as well
    assert got['mIoU'][1:] == pytest.approx(((1 / 4 + 1) / 3, (3 / 4 + 1) / 3))
    assert got['IoU'][0] == pytest.approx([got['mIoU'][0]])


def test_a_class_missing_from_the_test_or_from_training(parts, tmp_path):
    empty = MaskSet(parts.test.images, parts.test.masks.copy(), parts.test.names, parts.test.table)
    empty.masks[:, 0] = False
    less = MaskSet(parts.target.images, parts.target.masks.copy(), parts.target.names, parts.target.table)
    less.masks[:, 1] = False
    changed = merand.Parts(parts.first, parts.labels, parts.boxes, less, empty)
    t = pd.DataFrame(merand.variant_cells(Variant('test_resnet'), [1, 2], changed, tmp_path, TINY))
    classes = t[t.table.str.endswith('classes') & (t.protocol == 'last')].set_index('column').ours
    assert (
        np.isnan(classes['right lung']) and t[t.table.str.endswith('worst run')].ours.notna().all()
    )  # two runs have a spread
    mean = t[(t.table == 'test_resnet') & (t.protocol == 'last')].ours.item()
    assert mean == pytest.approx(classes.dropna().mean())


def test_bad_input(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'phantom' or 'real', not 'ct'"):
        merand.reproduce('ct', out=tmp_path, cache=tmp_path, settings=TINY)
    monkeypatch.delenv('LUS_DATA', raising=False)
    with pytest.raises(ValueError, match='LUS_DATA'):
        merand.learning_parts('real', TINY)
    with pytest.raises(ValueError, match='a row is one of'):
        Variant('resnet50', 'three steps')
    with pytest.raises(ValueError, match="start is"):
        Variant('resnet50', start='moon')
    with pytest.raises(ValueError, match="'both'"):
        Variant('resnet50', 'autoencoder, boxes', 'deeplabv3', 'both')


def test_a_folder_of_another_run_is_refused(parts, tmp_path):
    from dataclasses import replace

    file = merand.first_step(Variant('test_resnet', 'classifier'), parts, tmp_path, TINY)
    (file.parent / 'history.csv').unlink()
    with pytest.raises(ValueError, match='holds another run'):
        merand.first_step(
            Variant('test_resnet', 'classifier'), parts, tmp_path, replace(TINY, first_epochs=2)
        )


def test_the_papers_table():
    assert merand.theirs(Variant('vgg16', 'classifier, boxes')) == (0.223, 0.042) and merand.theirs(
        Variant('resnet50', 'none', 'deeplabv3', start='imagenet')
    ) == (0.179, 0.112)
    assert merand.theirs(Variant('resnext50', 'autoencoder')) == (None, None)  # the paper's empty row
    assert len(merand.variants(merand.PAPER)) == 78 and len(merand._THEIRS.strip().splitlines()) == 15


def test_real_boxes_come_from_other_patients_than_those_tested(real_data):
    parts = merand.learning_parts('real', TINY)  # at 32 pixels
    n = {k: len(getattr(parts, k)) for k in ('boxes', 'target', 'test')}
    assert n['test'] == 4 and sum(n.values()) == 88
    assert not set(parts.boxes.table.patient) & (
        set(parts.test.table.patient) | set(parts.target.table.patient)
    )
    assert not set(parts.target.table.patient) & set(parts.test.table.patient)
    assert (parts.boxes.masks.sum(1) == 1).all() and parts.boxes.masks[:, 1:].any()
