"Gare 2021 where no notebook looks: what class weights are counted on, what the first screen says."

from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lus_fastai.core import CLASSES
from lus_fastai.data.audit import nearest_frame
from lus_fastai.data.folds import Folds
from lus_fastai.papers import gare

TINY = gare.GareSettings(size=(48, 48), width=2, folds=2, seg_patients=6, seg_frames=3, seg_epochs=1)


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    return gare.labelled_frames(TINY, tmp_path_factory.mktemp('gare'))


def test_class_weights_never_see_the_test_fold(labelled, tmp_path, monkeypatch):
    counted, used, whole = [], [], gare.DiceCELoss

    class Seen(whole):
        def __init__(self, weights):
            used.append(weights)
            super().__init__(weights)

    def count(dls):
        counted.append([set(dl.dataset.tls[1].items.patient) for dl in dls.loaders])
        return np.array([1, 1, 1, 1, 1, 1, 64 * len(counted)])

    monkeypatch.setattr(gare, 'code_counts', count)
    monkeypatch.setattr(gare, 'DiceCELoss', Seen)
    oof = gare.segment(labelled, 'dense', tmp_path, settings=TINY)
    tested = [set(p) for _, p in oof.groupby('fold').patient]
    assert all(train == set(oof.patient) - test for train, test in counted)
    assert all(t in [test for _, test in counted] for t in tested)
    ratios = [float(w[0] / w[6]) for w in used]  # what was counted reaches the loss
    assert ratios == pytest.approx([8 * (i + 1) ** 0.5 for i in range(len(counted))])


def test_the_papers_row_keeps_its_loss(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(gare, 'DiceCELoss', lambda *a: pytest.fail('the paper has plain cross-entropy'))
    gare.segment(labelled, 'sparse', tmp_path, settings=TINY, recipe='paper')
    assert 'paper' in gare.DEFAULT.parts and gare.PAPER.recipe == 'paper'
    with pytest.raises(ValueError, match="recipe is one of .*'lines', 'paper'.*, not 'dice'"):
        gare.segment(labelled, 'sparse', tmp_path, settings=TINY, recipe='dice')


def test_the_papers_split_picks_the_epoch_by_accuracy(tmp_path):
    tiny = replace(TINY, split_frames=4, split_epochs=3)
    store = gare.split_frames(tiny, tmp_path)
    people = store.frames.groupby('patient').agg(label=('label', 'first'), frames=('row', 'size'))
    assert people.label.tolist() == ['covid'] * 3 + ['regular'] and set(people.frames) == {4}
    assert set(store.frames.probe) == {'linear'}
    run = tmp_path / 'run'
    oof = gare.segment(store, 'sparse', run, 'variant', tiny, 'paper')
    assert len(oof) == 6 * len(store.frames)
    last = gare.last_epoch(gare.Folds(oof, oof.fold), run)
    for k, part in oof.groupby('fold'):
        picked, ended = (
            gare.pixel_accuracy(gare.seg_confusions(t, by='fold')[0]) for t in (part, last[last.fold == k])
        )
        assert picked >= ended


def test_the_papers_numbers_stand_beside_their_protocol_on_their_data_alone():
    class Run:
        data = 'pocus'

    assert gare._theirs(Run, 'dense', 'clip')['accuracy'] == 0.849
    assert gare._theirs(Run, 'dense', 'patient') is None
    Run.data = 'phantom'
    assert gare._theirs(Run, 'dense', 'clip') is None


def test_a_protocol_says_what_steers_the_rate():
    assert gare.describe('patient').endswith(
        'the last epoch counts; the learning rate follows the training loss'
    )
    assert gare.describe('frame').endswith('the learning rate follows the score on the test fold')
    assert gare.describe('frame', 'one-cycle').endswith('the learning rate follows one cycle')


class FirstScreen(HTMLParser):
    "Text of the cards, before the first section."

    def __init__(self, html):
        super().__init__()
        self.cards, self.inside = [], False
        self.feed(html[html.index('<dl class="numbers">') : html.index('<section')])

    def handle_starttag(self, tag, attrs):
        if tag == 'dt':
            self.cards.append('')

    def handle_data(self, data):
        self.cards[-1] += f' {data}'


@pytest.mark.parametrize('data', ['phantom', 'pocus'])
def test_the_first_screen_names_frames_and_patients(data):
    "Six patients: five of them right, but the wrong one has half of the frames."
    oof = pd.DataFrame(
        [
            dict(patient=f'p{i}', clip=f'c{i}', label=CLASSES[i % 3], right=i != 0)
            for i in range(6)
            for _ in range(5 if i == 0 else 1)
        ]
    )
    predicted = [c if r else CLASSES[(CLASSES.index(c) + 1) % 3] for c, r in zip(oof.label, oof.right)]
    oof = oof.assign(
        fold=0, frame=range(len(oof)), **{f'p_{c}': [float(t == c) for t in predicted] for c in CLASSES}
    )
    rows = [
        (p, row, t)
        for p in ('by patient', 'by frame')
        for row, t in (('dense', 'classification'), ('most similar frame', 'look-up'))
    ]
    cells = [c for p, row, t in rows for c in gare.classification_cells(oof, row, f'classification {p}', t)]
    report = gare.Report('t')
    results = dict(cells=cells, data=data, hours=0.05, device='cpu')
    gare._first_screen(report, results, np.zeros(9), oof, gare.QUICK)
    html = report.section('s').html()
    cards = FirstScreen(html).cards
    assert (
        'patients right, folds by patient (dense start) 0.833' in cards[0]
        and 'a random guess: 0.333' in cards[0]
    )
    assert (
        'frames right, folds by patient (dense start) 0.500' in cards[1] and 'always covid: 0.600' in cards[1]
    )
    assert 'leaky' in cards[2] and '6 · 6 · 10' in cards[4] and not any('accuracy' in c for c in cards)
    assert 'the class of 83% of these patients correctly' in html and (
        'simulated, so nothing here' in html
    ) == (data == 'phantom')


def test_looking_up_never_takes_a_frame_of_its_own_fold():
    "Three images in a row, each most like the one before; the middle one may only ask the other fold."

    class Store:
        images = np.repeat(np.repeat(np.array([0, 10, 40], np.uint8)[:, None, None], 8, 1), 8, 2)
        frames = pd.DataFrame(dict(row=[0, 1, 2], label=['a', 'b', 'c']))

    copied = nearest_frame(Store, Folds(Store.frames, [0, 0, 1]))
    assert copied[['p_a', 'p_b', 'p_c']].to_numpy().tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert nearest_frame(Store, Folds(Store.frames, [0, 1, 1]))['p_a'].tolist() == [
        0,
        1,
        1,
    ] and copied.fold.tolist() == [0, 0, 1]


@pytest.mark.parametrize('settings', [gare.DEFAULT, gare.QUICK, gare.PAPER])
def test_every_training_comes_after_those_it_starts_from(settings):
    stores = SimpleNamespace(kind='phantom', masks=lambda protocol: None, clips=lambda protocol: None)
    before = set()
    for t in gare.gare_trainings(stores, settings):
        assert set(t.needs) <= before, t.name
        before.add(t.name)
    assert len(before) == len(gare.plan_segmenters(settings)) + len(gare.plan_classifiers(settings))


def test_classifiers_that_start_from_another_recipe_have_another_folder(tmp_path):
    one, other = (gare.run_folder(replace(TINY, recipe=r), tmp_path) for r in gare.RECIPES)
    assert one != other
    assert gare.run_folder(replace(TINY, seeds=(7,), parts=('core',)), tmp_path) == one
