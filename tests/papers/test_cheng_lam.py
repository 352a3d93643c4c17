"Cheng & Lam 2021 on tiny settings: what a recipe freezes, what folds separate; a second run trains nothing."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lus_fastai.core import LeakError, MaskSet
from lus_fastai.data.folds import Folds
from lus_fastai.models.transfer import load_weights
from lus_fastai.papers import cheng_lam
from lus_fastai.runs import read_results, results_table

TINY = cheng_lam.ChengSettings(
    size=32,
    width=4,
    shapes=30,
    xunet_epochs=(1, 0, 1),
    vunet_epochs=(1, 1, 1),
    recipes=('X-Unet, random start', 'X-Unet'),
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


def test_mirrored_copies_are_mirrored_and_named_after_their_image():
    few = squares(6)
    both = cheng_lam.mirrored(few)
    assert (
        len(both) == 12
        and both.table['clip'].nunique() == 6
        and (both.table.groupby('clip').size() == 2).all()
    )
    assert (both.images[6:] == few.images[:, :, ::-1]).all() and (
        both.masks[6:, 0] == few.masks[:, 0, :, ::-1]
    ).all()
    assert (both.table.patient[6:].to_numpy() == few.table.patient.to_numpy()).all()


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
    few = squares(4)
    assert cheng_lam.batch_dice(few.masks.astype(np.float16), few, 2) == pytest.approx(1)
    area = few.masks[:2].sum()
    assert cheng_lam.batch_dice(np.zeros(few.masks.shape, np.float16), few[:4], 2) == pytest.approx(
        1 / (area + 1)
    )  # all squares have one size


def test_vunet_trains_its_decoder_first_then_everything(tmp_path, monkeypatch):
    few, s = squares(8), replace(TINY, bs=4)
    folds = cheng_lam.protocol_folds(few, 'patient', s)
    prob, first = cheng_lam.run_recipe(
        cheng_lam.Recipe('vunet', start='none', frozen='encoder frozen'),
        few,
        folds,
        tmp_path,
        None,
        'patient',
        s,
    )
    assert prob.shape == few.masks.shape and first.name.startswith('decoder')
    _, folder = cheng_lam.run_recipe(
        cheng_lam.Recipe('vunet', start='none'), few, folds, tmp_path, None, 'patient', s
    )
    tl, ft = (load_weights(f / 'fold0' / 'model.safetensors') for f in (first, folder))
    torch.manual_seed(1000 * s.seed)
    encoder = [k for k in tl if k.startswith('encoder') and k.endswith('weight')]
    assert encoder and any(
        not torch.equal(tl[k], ft[k]) for k in encoder
    )  # fine-tuning moves the encoder that transfer left alone
    torch.manual_seed(0)
    start = cheng_lam.new_network(cheng_lam.Recipe('vunet'), s).state_dict()
    assert all(
        torch.equal(start[k], tl[k]) for k in encoder
    )  # fold 0 has the seed 0, and its encoder has not moved


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp('cheng')
    return home, cheng_lam.reproduce('phantom', out=home / 'results', cache=home, settings=TINY)


def test_everything_is_in_the_results(run):
    results = read_results(run[1].with_suffix('.json'))
    t = results_table(results)
    assert set(t.row) == set(TINY.recipes) and set(t.table) == {'folds', 'copies', 'fixed 80'}
    assert set(t[t.row == 'X-Unet'].protocol) == {'patient', 'image'} and set(
        t[t.row == 'X-Unet, random start'].protocol
    ) == {'patient'}
    torn = t[(t.column == 'mirrored copy in training') & (t.protocol == 'patient')]
    assert len(torn) and torn.ours.max() == 0
    fixed = t[t.table == 'fixed 80'].set_index('column').ours
    assert fixed['highest'] >= fixed['mean']
    page = run[1].read_text()
    assert 'What the leak is worth' in page and str(run[0]) not in page


def test_a_second_run_trains_nothing(run):
    home, page = run
    before = {f: f.stat().st_mtime_ns for f in (home / 'cheng_lam').rglob('*') if f.is_file()}
    again = cheng_lam.reproduce('phantom', out=home / 'again', cache=home, settings=TINY)
    assert {f: f.stat().st_mtime_ns for f in (home / 'cheng_lam').rglob('*') if f.is_file()} == before
    assert (
        read_results(again.with_suffix('.json'))['cells'] == read_results(page.with_suffix('.json'))['cells']
    )


def test_real_data_must_be_there(monkeypatch):
    monkeypatch.delenv('LUS_DATA', raising=False)
    with pytest.raises(ValueError, match='LUS_DATA'):
        cheng_lam.target_set('real', TINY)
    with pytest.raises(ValueError, match="not 'ribs'"):
        cheng_lam.target_set('ribs', TINY)


def test_real_lesions(real_data):
    lesions = cheng_lam.target_set('real', TINY)
    assert len(lesions) == 300 and lesions.names == ('lesion',) and lesions.table.patient.nunique() > 150
