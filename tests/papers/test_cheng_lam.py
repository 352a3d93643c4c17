"Cheng & Lam 2021 on tiny settings: equal steps, one fixed test set, what is frozen, what is no result."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lus_fastai.core import LeakError, MaskSet
from lus_fastai.data.folds import Folds
from lus_fastai.models.transfer import load_weights
from lus_fastai.papers import cheng_lam
from lus_fastai.runs import differences_table, read_results, results_table

TINY = cheng_lam.ChengSettings(
    size=32,
    native=32,
    width=4,
    bs=4,
    test=24,
    folds=2,
    shapes=40,
    xunet_steps=(4, 0, 60),
    vunet_steps=(1, 1, 1),
    xunet_lrs=(5e-3,) * 3,
    recipes=('X-Unet, random start', 'X-Unet', 'X-Unet, bottleneck frozen'),
    seeds=(0, 1),
)


def squares(n=24, size=32):
    "Bright squares on a dark ground, two images a patient."
    rng = np.random.default_rng(0)
    masks = np.zeros((n, 1, size, size), bool)
    for m in masks:
        y, x = rng.integers(4, size - 14, 2)
        m[0, y : y + 10, x : x + 10] = True
    images = (masks[:, 0] * 120 + rng.integers(0, 80, (n, size, size))).astype(np.uint8)
    return MaskSet(
        images,
        masks,
        ('rib',),
        pd.DataFrame(
            dict(
                patient=[f'p{i // 2}' for i in range(n)],
                clip=[f'c{i // 2}' for i in range(n)],
                frame=[i % 2 for i in range(n)],
                label='rib',
            )
        ),
    )


@pytest.fixture
def few(monkeypatch):
    "Instead of ribs: eight squares to train with, of each seed the same, and four to test."
    whole = squares(12)

    def target_set(data='phantom', settings=TINY, recipe=None, seed=None):
        return whole[8:] if seed is None else whole[:8]

    monkeypatch.setattr(cheng_lam, 'target_set', target_set)
    return whole


def test_mirrored_copies_are_mirrored_and_named_after_their_image():
    some = squares(6)
    both = cheng_lam.mirrored(some)
    assert len(both) == 12 and both.table['clip'].nunique() == 6
    assert (both.table.groupby('clip').size() == 2).all()
    assert (both.images[6:] == some.images[:, :, ::-1]).all()
    assert (both.masks[6:, 0] == some.masks[:, 0, :, ::-1]).all()
    assert (both.table.patient[6:].to_numpy() == some.table.patient.to_numpy()).all()


def test_copies_across_by_hand():
    both = cheng_lam.mirrored(squares(4))
    assert cheng_lam.copies_across(both, Folds(both.table, [0, 0, 1, 1] * 2)) == 0
    assert cheng_lam.copies_across(both, Folds(both.table, [0, 0, 1, 1, 1, 0, 1, 1])) == 0.25


def test_folds_by_patient_are_disjoint_and_random_ones_are_not():
    both = cheng_lam.mirrored(squares())
    honest, random = (cheng_lam.protocol_folds(both, p, TINY) for p in ('patient', 'image'))
    honest.prove()
    with pytest.raises(LeakError):
        random.prove()
    assert cheng_lam.copies_across(both, honest) == 0 < cheng_lam.copies_across(both, random)
    with pytest.raises(ValueError, match='sun'):
        cheng_lam.protocol_folds(both, 'sun', TINY)


def test_batch_dice_by_hand():
    some = squares(4)
    assert cheng_lam.batch_dice(some.masks.astype(np.float16), some, 2) == pytest.approx(1)
    area = some.masks[:2].sum()  # all squares have one size
    nothing = np.zeros(some.masks.shape, np.float16)
    assert cheng_lam.batch_dice(nothing, some, 2) == pytest.approx(1 / (area + 1))


def test_a_test_patient_among_the_training_patients_is_refused():
    some = squares(8)
    both, folds = cheng_lam.with_test_set(some[:4], some[4:])
    assert folds.fold.tolist() == [1] * 4 + [0] * 4 and (both.images == some.images).all()
    with pytest.raises(LeakError):
        cheng_lam.with_test_set(some[:5], some[5:])  # an odd number cuts a patient


def test_every_recipe_and_seed_is_tested_on_the_same_images():
    first = cheng_lam.target_set('phantom', TINY)
    for recipe, seed in ((cheng_lam.Recipe(images=200), 0), (cheng_lam.Recipe(images=600), 1)):
        train = cheng_lam.recipe_set(recipe, 'phantom', TINY, seed)
        both, folds = cheng_lam.with_test_set(train, cheng_lam.target_set('phantom', TINY, recipe))
        tested = both[(folds.fold == 0).to_numpy()]
        assert len(train) == recipe.images and (tested.images == first.images).all()
    seeds = [set(cheng_lam.target_set('phantom', TINY, seed=s).table.patient) for s in (0, 1)]
    assert not seeds[0] & seeds[1]


def test_200_400_and_600_images_take_the_same_number_of_steps(monkeypatch):
    steps = []

    def fit_in_folder(build, dls, how, path):
        steps.append((how.epochs, len(dls.train)))
        path.mkdir(parents=True)
        return build(dls).model, None

    monkeypatch.setattr(cheng_lam, 'fit_in_folder', fit_in_folder)
    for name in ('X-Unet, random start, 200 images', 'X-Unet, random start'):
        s = replace(TINY, bs=5, xunet_steps=cheng_lam.DEFAULT.xunet_steps)
        cheng_lam.run_recipe(name, path := cheng_lam.run_folder(s) / name, settings=s)
        assert path.exists()
    assert steps == [(48, 40), (24, 80)]
    assert len({e * n for e, n in steps}) == 1 and steps[0][0] * steps[0][1] == s.xunet_steps[2]


def test_a_recipe_says_what_regularises_it(few):
    s = TINY
    learn = {}
    for name in ('X-Unet, dropout', 'X-Unet, weight decay', 'X-Unet, gradual unfreezing', 'X-Unet'):
        recipe = replace(cheng_lam.RECIPES[name], start='none')
        images, folds = cheng_lam.with_test_set(few[:8], few[8:])
        dls = cheng_lam.mask_dls(images, np.arange(8), np.arange(8, 12), 4)
        learn[name] = cheng_lam._builder(recipe, s, None, 20)(dls)
        learn[name].create_opt()
    assert isinstance(learn['X-Unet, dropout'].model.bottleneck[-1], torch.nn.Dropout)
    decayed = learn['X-Unet, weight decay'].opt.opt
    assert type(decayed) is torch.optim.AdamW and decayed.param_groups[0]['weight_decay'] == 0.01
    assert type(learn['X-Unet'].opt.opt) is torch.optim.Adam
    assert [cb.every for cb in learn['X-Unet, gradual unfreezing'].cbs if hasattr(cb, 'every')] == [2]
    names = [set(learn[n].model.state_dict()) for n in ('X-Unet', 'X-Unet, dropout')]
    assert names[0] == names[1]  # so that weights from shapes fit


def test_vunet_goes_on_from_its_decoder(few, tmp_path):
    s = replace(TINY, bs=4)
    names = ['V-Unet, encoder frozen, random start', 'V-Unet, random start']
    todo = cheng_lam.cheng_trainings(
        'phantom', replace(s, parts=('more vunet',), recipes=names[1:], seeds=(0,))
    )
    assert [t.name for t in todo] == [f'phantom-{cheng_lam.training_name(n, "test", 0)}' for n in names]
    for t in todo:
        t.train(tmp_path / t.name)
    tl, ft = (load_weights(tmp_path / t.name / 'fold0' / 'model.safetensors') for t in todo)
    encoder = [k for k in tl if k.startswith('encoder') and k.endswith('weight')]
    torch.manual_seed(0)
    start = cheng_lam.new_network(cheng_lam.Recipe('vunet'), s).state_dict()
    assert encoder and all(torch.equal(start[k], tl[k]) for k in encoder)  # frozen
    assert any(not torch.equal(tl[k], ft[k]) for k in encoder)  # fine-tuning moves it, but not far
    assert max(float((tl[k] - ft[k]).abs().max()) for k in encoder) < 0.01


def test_double_size_has_its_own_pretraining():
    s = replace(TINY, parts=('large',), recipes=('X-Unet, double size',), seeds=(0,))
    names = [t.name for t in cheng_lam.cheng_trainings('phantom', s)]
    assert names == ['shapes-xunet-x2-s0', 'phantom-x-unet-double-size-s0']
    assert cheng_lam.target_set('phantom', s, cheng_lam.RECIPES['X-Unet, double size']).images.shape[1:] == (
        64,
        64,
    )


def table(dice, n=24):
    "Scores of n images, two a patient, all with one Dice."
    scores = dict.fromkeys(('dice', 'hd95', 'boundary_f1'), np.full(n, dice))
    return pd.DataFrame(
        dict(patient=np.arange(n) // 2, clip=[f'c{i // 2}' for i in range(n)], frame=np.arange(n) % 2)
        | scores
    )


def test_a_difference_is_paired_and_leaves_out_images_without_the_target():
    a, b = table(0.7), table(0.5)
    a.loc[0, 'dice'] = b.loc[0, 'dice'] = np.nan
    d = cheng_lam.score_difference([a, a], [b, b])
    assert (d.value, d.low, d.high) == pytest.approx((0.2, 0.2, 0.2)) and d.spread == 0


def test_images_to_look_at_are_of_different_patients():
    a, b = table(0.5), table(0.5)
    a['dice'] = np.linspace(0.1, 0.9, len(a))
    a['boundary_f1'] = 0.4  # b has the better boundary everywhere
    chosen = cheng_lam.chosen_images(a, b)
    assert [why for why in chosen.values()].count('best') == 2 and 0 in chosen and len(a) - 1 in chosen
    assert len({a.patient[i] for i in chosen}) == len(chosen)
    apart = [i for i, why in chosen.items() if why == 'Dice and boundary disagree']
    assert len(apart) == 2 and all(a.dice[i] > b.dice[i] for i in apart)


def reproduce(home, out, settings):
    "Squares instead of ribs; of one seed the network with its bottleneck frozen finds nothing."
    whole, real = squares(72), cheng_lam.run_recipe

    def target_set(data='phantom', settings=TINY, recipe=None, seed=None):
        return whole[48:] if seed is None else whole[24 * seed : 24 * seed + 24]

    def run_recipe(name, *args):
        out = real(name, *args)
        nothing = name == 'X-Unet, bottleneck frozen' and args[3] == 1
        return out._replace(scores=out.scores.assign(dice=0.0)) if nothing else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cheng_lam, 'target_set', target_set)
        patch.setattr(cheng_lam, 'run_recipe', run_recipe)
        return cheng_lam.reproduce('phantom', out=home / out, cache=home, settings=settings)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp('cheng')
    return home, reproduce(home, 'results', TINY)


def test_everything_is_in_the_results(run):
    results = read_results(run[1].with_suffix('.json'))
    t = results_table(results)
    both = {'X-Unet, folds by patient', 'X-Unet, images at random'}
    assert set(t.row[t.table == 'scores']) == {'X-Unet, random start', 'X-Unet'} | both
    assert t.theirs.isna().all()  # other images than theirs
    assert (
        t[t.column.str.startswith(('soft', 'highest', 'mean')) | t.column.str.contains('SD')].low.isna().all()
    )
    copies = t[t.table == 'copies'].set_index('protocol').ours
    assert copies['patient'] == 0 < copies['image']
    fixed = t[t.table == 'fixed 80'].set_index('column').ours
    assert fixed['highest'] >= fixed['mean']
    assert {'V-Unet', 'X-Unet, despeckled'} <= set(results['not_run']) and 'X-Unet' not in results['not_run']
    d = differences_table(results)
    assert set(zip(d.a, d.b)) == {
        ('first step of X-Unet', 'the mean mask'),
        ('X-Unet', 'X-Unet, random start'),
        ('X-Unet, images at random', 'X-Unet, folds by patient'),
    }
    d = d[d.protocol != 'first']
    assert set(d.column) == set(cheng_lam.SEEN) and {tuple(n) for n in d.trainings} == {(2, 2)}
    page = run[1].read_text()
    assert 'What the paper claims' in page and str(run[0]) not in page


def test_rows_say_that_their_first_step_learned_nothing(run):
    results = read_results(run[1].with_suffix('.json'))
    for name, t in results['trainings'].items():
        lost = any('its first step is hardly above the mean mask' in why for why in t['reasons'])
        assert lost == (t['row'] not in ('X-Unet, random start', 'first step of X-Unet')), name
    t = results_table(results).query("table == 'first step'").set_index('column').ours
    stored = [
        pd.read_csv(run[0] / 'results/cheng_lam-phantom' / f'shapes-xunet-s{seed}.csv.gz')
        for seed in TINY.seeds
    ]
    assert t['dice'] == pytest.approx(np.mean([x.dice.mean() for x in stored]), abs=1e-4)
    assert t['mean mask'] == pytest.approx(stored[0].mean_mask.mean(), abs=1e-4)


@pytest.mark.parametrize('dice, lost', [(0.9, False), (0.49, True)])
def test_only_a_first_step_above_the_mean_mask_counts(monkeypatch, tmp_path, dice, lost):
    scores = (
        cheng_lam.unseen_shapes(settings=TINY).table[['patient', 'clip']].assign(dice=dice, mean_mask=0.4)
    )
    monkeypatch.setattr(cheng_lam, 'shape_scores', lambda *_: scores)
    losses = pd.DataFrame(dict(epoch=range(10), train_loss=[1.0] + [0.0] * 9))
    monkeypatch.setattr(cheng_lam, 'fold_history', lambda _: losses)
    run = cheng_lam.Experiment('cheng_lam', 'Cheng', 'phantom', TINY, tmp_path / 'a', out=tmp_path)
    why = cheng_lam._keep_first(run, cheng_lam.Recipe(), {0: None})
    said = ['its first step is hardly above the mean mask: Dice 0.49, 0.40']
    assert why == {'shapes-xunet-s0': said * lost}


def test_a_row_that_finds_nothing_is_listed_as_failed(run):
    results = read_results(run[1].with_suffix('.json'))
    failed = {k: t for k, t in results['trainings'].items() if t['row'] == 'X-Unet, bottleneck frozen'}
    assert set(failed) == {'x-unet-bottleneck-frozen-s0', 'x-unet-bottleneck-frozen-s1'}
    assert any('never found' in why for why in failed['x-unet-bottleneck-frozen-s1']['reasons'])
    assert not (results_table(results).row == 'X-Unet, bottleneck frozen').any()
    assert not list((run[0] / 'results').rglob('x-unet-bottleneck-frozen*'))
    assert 'No pixel of the target was found' in run[1].read_text()


def test_tables_are_stored_without_pixels(run):
    results = read_results(run[1].with_suffix('.json'))
    file = run[0] / 'results' / 'cheng_lam-phantom' / 'x-unet-s1.csv.gz'
    stored = pd.read_csv(file)
    assert len(stored) == TINY.test and {'patient', 'clip', 'frame', 'dice', 'components'} <= set(stored)
    seeds = [pd.read_csv(file.with_name(f'x-unet-s{s}.csv.gz')).dice.mean() for s in TINY.seeds]
    t = results_table(results).query("table == 'scores' and row == 'X-Unet' and column == 'dice'")
    assert t.ours.item() == pytest.approx(np.mean(seeds), abs=1e-4)


def test_a_second_run_trains_nothing(run):
    home, page = run
    files = {f: f.stat().st_mtime_ns for f in (home / 'cheng_lam').rglob('*') if f.suffix != '.lock'}
    files = {f: t for f, t in files.items() if f.is_file() and f.name != '.lock'}
    s = replace(TINY, parts=('core',), recipes=('X-Unet, random start', 'X-Unet'))
    again = read_results(reproduce(home, 'again', s).with_suffix('.json'))
    assert {f: f.stat().st_mtime_ns for f in files} == files
    first = read_results(page.with_suffix('.json'))['cells']
    assert [c for c in again['cells'] if c['table'] == 'scores'] == [
        c for c in first if c['table'] == 'scores' and c['protocol'] == 'test'
    ]


def test_real_data_must_be_there(monkeypatch):
    monkeypatch.delenv('LUS_DATA', raising=False)
    with pytest.raises(ValueError, match='LUS_DATA'):
        cheng_lam.target_set('real', TINY)
    with pytest.raises(ValueError, match="not 'ribs'"):
        cheng_lam.target_set('ribs', TINY)


def test_real_lesions(real_data):
    s = replace(TINY, test=300)
    train, test = (cheng_lam.target_set('real', s, seed=seed) for seed in (0, None))
    assert len(train) > 290 and train.names == ('lesion',) and train.table.patient.nunique() > 200
    assert len(test) > 120 and not set(train.table.patient) & set(test.table.patient)
    filtered = cheng_lam.target_set('real', s, cheng_lam.Recipe(despeckled=True))
    assert (filtered.masks == test.masks).all() and (filtered.images != test.images).any()
