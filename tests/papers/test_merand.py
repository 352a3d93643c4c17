"The reproduction of Merand 2021 on a tiny phantom: resumable, and no patient is in two steps."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lus_fastai.core import LeakError, MaskSet
from lus_fastai.papers import merand
from lus_fastai.papers.merand import Variant
from lus_fastai.runs import differences_table, read_results, results_table, trainings_table
from lus_fastai.train.segmentation import LossLog

pytestmark = [
    pytest.mark.filterwarnings('ignore:no pixel of'),  # so few images lack classes
    pytest.mark.filterwarnings('ignore::lus_fastai.stats.bootstrap.FewPatients'),
]
TINY = merand.MerandSettings(
    parts=('chain', 'unet', 'rotation', 'both', 'accuracy'),
    backbone='test_resnet',
    backbones=(),
    rows=('none', 'classifier', 'autoencoder, boxes'),
    seeds=(0,),
    early=(1,),
    size=32,
    bs=4,
    folds=2,
    first_n=40,
    first_bs=8,
    first_epochs=2,
    boxes_n=6,
    box_steps=4,
    steps=6,
    epochs=2,
    runs=3,
    target_n=20,
    test_n=4,
    chain_n=24,
    chain_steps=4,
    chain_masks=(3,),
    chain_main=3,
    chain_seeds=(0, 1),
    chain_shares=(0.4, 0.3, 0.3),
)
LABEL = 'test_resnet, U-Net encoder: none'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp('merand')
    return home, merand.reproduce('phantom', out=home / 'results', cache=home, settings=TINY)


@pytest.fixture(scope='module')
def images(run):
    return merand.StepImages('phantom', TINY, run[0])


def test_everything_is_in_the_results(run):
    results = read_results(run[1].with_suffix('.json'))
    t, d = results_table(results), differences_table(results)
    rows = {w.label for part in TINY.parts for w in merand.variants(part, TINY)}
    assert set(t[(t.table == 'mean IoU') & (t.protocol != 'chain')].row) == rows
    assert set(t.protocol) == {'folds', 'rotation', 'last', 'chain', 'first'}
    assert t[t.table == 'mean IoU'].theirs.isna().all()  # on the phantom nothing is theirs
    assert {'constant answer', 'mean image'} < set(t[t.table == 'first step'].column)
    assert set(d[d.protocol == 'chain'].column) == {'IoU', 'Dice'}
    a, b = f'3 masks: {merand.CHAIN[1]}', f'3 masks: {merand.CHAIN[2]}'
    assert len(d[(d.a == a) & (d.b == b)]) == 2 and d[d.a == a].trainings.iloc[0] == [2, 2]
    assert all(x.startswith(('simclr', 'imagenet', 'backbones', 'deeplabv3')) for x in results['not_run'])
    left = results['protocols']['folds']['left_out']
    assert 'images)' in left and set(trainings_table(results).protocol) == set(t.protocol)


def test_the_report_and_the_tables_beside_it(run):
    home, page = run
    text = page.read_text()
    assert 'Table 3' in text and 'Left out of the headline' in text and str(home) not in text
    file = page.with_suffix('') / f'{merand.target_name(Variant("test_resnet"), "folds", 0)}.csv.gz'
    table = pd.read_csv(file)
    assert len(table) == 20 and {'patient', 'fold', 'cm_right lung_shared'} <= set(table)


def test_a_second_run_trains_nothing(run):
    home, page = run
    folder = merand.run_folder(TINY, 'phantom', home)
    before = {f: f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}
    again = merand.reproduce('phantom', out=home / 'again', cache=home, settings=TINY)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    one, two = (read_results(p.with_suffix('.json')) for p in (page, again))
    assert one['cells'] == two['cells'] and one['differences'] == two['differences']


def test_parts_can_be_run_one_after_the_other(run):
    home, page = run
    core = replace(TINY, parts=('unet',), seeds=(0,))
    assert merand.run_folder(core, 'phantom', home) == merand.run_folder(TINY, 'phantom', home)
    alone = read_results(merand.reproduce('phantom', False, home / 'part', home, core).with_suffix('.json'))
    whole = results_table(read_results(page.with_suffix('.json')))
    t = results_table(alone)
    assert {'folds', 'first'} == set(t.protocol) and alone['not_run'][0].startswith('chain')
    both = t.merge(whole, on=['protocol', 'table', 'row', 'column'])
    assert len(both) == len(t) and (both.ours_x.dropna() == both.ours_y.dropna()).all()


def test_resumed_run_equals_undisturbed_one(images, tmp_path, monkeypatch):
    variant, epochs, s = Variant('test_resnet'), [], TINY
    name = merand.target_name(variant, 'folds', 5)
    whole = merand.target_run(variant, 'folds', 5, images, tmp_path / 'whole' / name, s)['folds']
    after = LossLog.end_epoch

    def stop(self):
        after(self)
        epochs.append(self.epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(LossLog, 'end_epoch', stop)
        with pytest.raises(KeyboardInterrupt):
            merand.target_run(variant, 'folds', 5, images, tmp_path / 'cut' / name, s)
    cut = merand.target_run(variant, 'folds', 5, images, tmp_path / 'cut' / name, s)['folds']
    assert epochs == [0, 1, 0]
    pd.testing.assert_frame_equal(whole, cut)


def test_no_patient_in_two_steps(images):
    for protocol in ('folds', 'rotation'):
        for x in merand.target_splits(images.target, protocol, 1, TINY):
            parts = [set(images.target.table.patient[rows]) for rows in (x.boxed, x.masked, x.tested)]
            assert sum(map(len, parts)) == len(set().union(*parts)) and all(parts)
    with pytest.raises(LeakError):
        merand.Split(x.table, x.boxed, x.masked, x.masked)
    assert not set(images.first[0].table.patient) & set(images.target.table.patient)


def test_rows_of_a_fold_are_compared_on_the_same_images(images):
    "What is tested and what gives boxes depends on the seed alone, not on the variant."
    a, b = (merand.target_splits(images.target, 'folds', 1, TINY) for _ in range(2))
    assert all((x.tested == y.tested).all() and (x.boxed == y.boxed).all() for x, y in zip(a, b))
    one, two = (merand.target_splits(images.target, 'rotation', seed, TINY)[0].tested for seed in (0, 1))
    assert (one == two).all()  # the paper's test images are drawn once


def test_what_moves(run, images):
    home, _ = run
    path = merand.run_folder(TINY, 'phantom', home) / 'any'
    both = Variant('test_resnet', 'autoencoder, boxes', moved='both')
    encoder = replace(both, moved='encoder')
    first = merand.load_weights(merand.first_weights(both, path))
    assert merand.first_weights(both, path) == merand.first_weights(encoder, path)
    for variant in (both, encoder):
        torch.manual_seed(0)
        net = merand.started(variant, path, 13, 32).state_dict()
        name = next(k for k in net if k.startswith('decoder') and net[k].ndim == 4)
        assert all(torch.equal(net[k], v) for k, v in first.items() if k.startswith('encoder'))
        moved = torch.equal(net[name][:, : first[name].shape[1]], first[name])
        assert moved == (variant.moved == 'both')


def counts(*images):
    "Counts of one class: (shared, predicted, truth) of each image; two of patient a, then one of b."
    table = pd.DataFrame(np.array(images), columns=merand.count_columns(['x']))
    return table.assign(patient=['a', 'a', 'b'][: len(images)], clip=list('123')[: len(images)])


def test_spread_and_interval_by_hand():
    runs = [counts([1, 2, 1], [0, 0, 2], [3, 3, 4]), counts([2, 2, 2], [2, 2, 2], [4, 4, 4])]
    runs.append(counts([0, 0, 2], [0, 0, 2], [0, 0, 4]))
    stack = merand.count_stack(runs, ['x'])
    got = merand.run_scores(stack, ['a', 'a', 'b'], np.array([True]), n_boot=4000)
    assert got['headline'][0] == pytest.approx((4 / 8 + 1 + 0) / 3) and got['spread'] == 1
    # patient a: 1/4, 1, 0; patient b: 3/4, 1, 0: twice a with probability 1/4, twice b as well
    assert got['headline'][1:] == pytest.approx(((1 / 4 + 1) / 3, (3 / 4 + 1) / 3))
    assert got['IoU'][0] == pytest.approx([got['headline'][0]])
    d = merand.count_difference(runs[1:2], runs[:1], ['x'])
    assert d[:3] == pytest.approx((1 / 2, 1 / 4, 3 / 4))


def test_a_class_that_the_headline_leaves_out():
    two = np.array([[[[2, 2, 2], [0, 1, 1]], [[2, 2, 2], [0, 0, 0]]]], float)  # (1, 2, 2, 3)
    got = merand.run_scores(two, ['a', 'b'], np.array([True, False]))
    assert got['headline'][0] == 1 and got['all'] == pytest.approx((0.5, 0.5, 0.5))
    gone = merand.run_scores(two[:, 1:], ['b'], np.array([True, True]))  # no image holds the second
    assert gone['all'][0] == 1 and np.isnan(gone['IoU'][0][1])


def test_runs_of_other_images_are_refused():
    other = counts([1, 1, 1], [1, 1, 1]).assign(clip=['1', '9'])
    with pytest.raises(ValueError, match='different images'):
        merand.count_difference([counts([1, 1, 1], [1, 1, 1])], [other], ['x'])


def test_counts_of_a_prediction():
    set = MaskSet(np.zeros((1, 16, 16), np.uint8), np.zeros((1, 2, 16, 16), bool), ('a', 'b'),
                  pd.DataFrame(dict(patient=['p'], clip=['c'])))  # fmt: skip
    set.masks[0, 0, :4] = True
    prob = np.zeros((1, 2, 16, 16))
    prob[0, 0, 2:8] = 0.9
    row = merand.count_table(prob, set, np.array([0]), 3).iloc[0]
    assert row[merand.count_columns('ab')].tolist() == [32, 96, 64, 0, 0, 0] and row.fold == 3


def test_the_trivial_answer_is_made_from_the_training_share():
    images = np.array([0, 0, 255, 255], np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
    train = np.array([True, True, False, False])
    assert merand.trivial_answers(images, None, train, ~train).tolist() == [-1, -1]
    labels = np.array([[1, 0], [1, 0], [1, 0], [0, 0]])
    assert merand.trivial_answers(images, labels, train, ~train).tolist() == [1, 0]


def test_a_first_step_that_is_no_better_than_trivial_has_failed(run):
    def results(low):
        rows = dict(table='first step', row='x: classifier', protocol='first')
        cells = [merand.cell(column=c, ours=0.1, **rows) for c in ('exact match', 'constant answer')]
        d = dict(protocol='first', column='exact match', a='x: classifier', b='constant answer', value=0.1)
        d |= dict(low=low, high=0.2, p=0.5, spread=None, trainings=[1, 1])
        protocols = dict(first=dict(settings=dict(backbone='x')))
        return dict(cells=cells, differences=[d], trainings={}, protocols=protocols)

    assert merand.failed_steps(results(0.01)) == [] and merand.failed_steps(results(0)) == ['x: classifier']
    assert merand.failed_steps({**results(0.01), 'differences': []}) == ['x: classifier']
    assert 'passed' in merand.read_step_one(results(0.01))[0]
    assert 'FAILED' in merand.read_step_one(results(-0.01))[0]
    claims = merand.claims_table(results(-0.01))
    stopped = claims['it would take'].str.startswith('a first step')
    assert stopped.sum() == 4  # labels help, two steps help, and each of the two steps adds to the other
    assert set(claims.verdict[stopped]) == {'cannot tell'}


def test_masks_of_the_chain_are_nested_and_follow_the_seed(images):
    split = merand.chain_split(images.lesions, TINY)
    few, more, other = (merand.some_masks(split, n, seed) for n, seed in ((2, 0), (3, 0), (2, 1)))
    assert (few <= more).all() and (few != other).any() and not (more & ~split.masked).any()
    assert merand.chain_numbers(split, TINY)[-1] == split.masked.sum()


def test_bad_input(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'phantom' or 'real', not 'ct'"):
        merand.reproduce('ct', out=tmp_path, cache=tmp_path, settings=TINY)
    monkeypatch.delenv('LUS_DATA', raising=False)
    with pytest.raises(ValueError, match='LUS_DATA'):
        merand.StepImages('real', TINY)
    with pytest.raises(ValueError, match='a row is one of'):
        Variant('resnet50', 'three steps')
    with pytest.raises(ValueError, match="start is"):
        Variant('resnet50', start='moon')
    with pytest.raises(ValueError, match="'both'"):
        Variant('resnet50', 'autoencoder, boxes', 'deeplabv3', 'both')
    with pytest.raises(ValueError, match='no part named'):
        merand.reproduce('phantom', out=tmp_path, cache=tmp_path, settings=replace(TINY, parts=('all',)))


def test_a_folder_of_another_run_is_refused(images, tmp_path):
    variant = Variant('test_resnet', 'classifier')
    merand.first_run(variant, images, tmp_path / variant.first_name, TINY)
    with pytest.raises(ValueError, match='holds another run'):
        other = replace(TINY, first_epochs=3)
        merand.first_run(variant, images, tmp_path / variant.first_name, other)


def test_the_papers_table():
    assert merand.theirs('vgg16', 'classifier, boxes', 'U-Net encoder') == (0.223, 0.042)
    assert merand.theirs('resnet50', 'none', 'DeepLabv3, ImageNet') == (0.179, 0.112)
    assert merand.theirs('resnext50', 'autoencoder', 'DeepLabv3') == (None, None)  # the paper's empty row
    assert np.isnan(merand.their_gain('autoencoder', 'none'))
    assert merand.their_gain('boxes', 'none') == pytest.approx((-0.27 + 5.1 + 7.5) / 300)


def test_a_number_of_the_paper_stands_beside_its_own_protocol_and_images_alone():
    score = dict(headline=(0.2, 0.1, 0.3), all=(0.2, 0.1, 0.3), spread=0.1, IoU=np.zeros((3, 1)))
    for row, protocol, data, there in (
        ('none', 'rotation', 'real', True),
        ('boxes', 'rotation', 'real', False),
        ('none', 'last', 'real', False),
        ('none', 'folds', 'real', False),
        ('none', 'rotation', 'phantom', False),
    ):
        cells = merand.iou_cells(Variant('vgg16', row), score, ('x',), protocol, data)
        assert [c['theirs'] is not None for c in cells] == [False, there, there, False]


def test_a_plan_of_the_real_thing():
    s = replace(merand.DEFAULT, parts=tuple(merand.PARTS))
    rows = {w.label for part in s.parts for w in merand.variants(part, s)}
    assert len(merand.variants('unet')) == 6 and len(rows) > 40
    assert merand.not_run(merand.DEFAULT)[0].startswith('rotation')
    assert merand.rotation_epochs(48, merand.DEFAULT) == 10  # 9 runs of 6 steps


def test_real_boxes_come_from_other_patients_than_those_tested(real_data):
    s = replace(TINY, folds=5, boxes_n=30, test_n=10)
    target = merand.target_images('real', s)  # at 32 pixels
    splits = merand.target_splits(target, 'folds', 0, s)
    assert sum(x.tested.astype(int) for x in splits).tolist() == [1] * 88
    for x in splits:
        boxes = merand.box_targets(merand.chest_box_set(target[x.boxed]))
        assert 25 <= len(boxes) <= 30 and (boxes.masks.sum(1) == 1).all() and boxes.masks[:, 1:].any()
    test = merand.target_splits(target, 'rotation', 0, s)[0].tested
    absent = [n for n, m in zip(target.names, target.masks[test].any((0, 2, 3))) if not m]
    assert test.sum() == 10 and absent == ['pneumothorax']


def test_real_lesions_are_divided_by_groups_of_near_duplicates(real_data):
    s = replace(TINY, chain_shares=merand.DEFAULT.chain_shares, chain_masks=(12, 24, 47), chain_main=47)
    set = merand.lesion_images('real', s)
    split = merand.chain_split(set, s)
    assert len(set) == 378 and set.masks.any((1, 2, 3)).all() and set.table.patient.nunique() == 338
    got = [int(x.sum()) for x in (split.boxed, split.masked, split.tested)]
    assert np.abs(np.subtract(got, (141, 94, 143))).max() <= 2, got
    assert merand.chain_numbers(split, s) == [12, 24, 47, got[1]]
