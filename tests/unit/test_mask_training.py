"The rotation and the folds: what each run sees, resuming after a kill, equal starts, and when to stop."

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.models.transfer import load_weights

SETUP = '''
import os, signal, sys
import numpy as np, pandas as pd, torch
from fastai.vision.all import Callback
from dataclasses import replace
from functools import partial
from lus_fastai.data.augment import MerandAugment
from lus_fastai.data.folds import Folds
from lus_fastai.data.loaders import mask_dls
from lus_fastai.train.callbacks import TrainingSettings
from lus_fastai.core import MaskSet, seed_all
from lus_fastai.models.unet import unet
from lus_fastai.train.losses import SoftDiceLoss
from lus_fastai.train.segmentation import rotation_parts, Rotation, fit_rotation
from lus_fastai.train.segmentation import fit_in_folder, mask_learner, predict_masks, kfold_masks
torch.set_num_threads(1)

def made(n=9, size=32):
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:size, :size]
    centres = rng.uniform(8, 24, (n, 2))
    masks = np.stack([np.stack([np.hypot(y - cy, x - cx) < 6, y + cx > 28]) for cy, cx in centres])
    images = 60 + 80 * masks[:, 0] + 40 * masks[:, 1] + rng.integers(0, 30, (n, size, size))
    table = pd.DataFrame(dict(patient=[f'p{i // 2}' for i in range(n)]))
    return MaskSet(images.astype(np.uint8), masks, ('disc', 'band'), table)

ONE = TrainingSettings(1, lr=3e-3, schedule='constant')

def tiny(dls, loss=None, cbs=None):
    return mask_learner(dls, unet(2, c_in=3, width=4), loss, cbs=cbs)

def loaders(set):
    return partial(mask_dls, set, bs=3, notes=False, device='cpu')

def rotate(path, build=tiny):
    set, settings = made(), replace(ONE, epochs=2, select='best')
    data = partial(mask_dls, set, bs=3, batch_tfms=[MerandAugment()], notes=False, device='cpu')
    return fit_rotation(build, set, settings, data=data, path=path, parts=3)
'''
exec(SETUP)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 100), st.data())
def test_parts_are_disjoint_hold_everyone_and_are_equal_or_one_apart(n, data):
    parts, seed, epoch = (
        data.draw(st.integers(2, n)),
        data.draw(st.integers(0, 9)),
        data.draw(st.integers(0, 9)),
    )
    drawn = rotation_parts(n, parts, seed, epoch)
    assert len(drawn) == parts and sorted(np.concatenate(drawn)) == list(range(n))
    assert {len(p) for p in drawn} <= {n // parts, -(-n // parts)}
    assert all(np.array_equal(a, b) for a, b in zip(drawn, rotation_parts(n, parts, seed, epoch)))


def test_the_papers_parts_and_those_that_cannot_be():
    assert [len(p) for p in rotation_parts(90)] == [10] * 9
    assert (
        len(
            {tuple(rotation_parts(90, epoch=e)[0]) for e in range(5)} | {tuple(rotation_parts(90, seed=1)[0])}
        )
        == 6
    )
    for n, parts in ((5, 6), (5, 1)):
        with pytest.raises(ValueError, match='parts is 2..5'):
            rotation_parts(n, parts)


def test_a_run_trains_on_all_parts_but_its_own():
    seen = []
    rotation = Rotation(None, 10, parts=3, seed=4)
    for run in range(6):
        train, valid = rotation.rows(run)
        assert sorted([*train, *valid]) == list(range(10)) and np.array_equal(
            valid, rotation_parts(10, 3, 4, run // 3)[run % 3]
        )
        seen.append(valid)
    for epoch in (0, 1):
        assert sorted(np.concatenate(seen[3 * epoch : 3 * epoch + 3])) == list(range(10))


class Seen(Callback):
    "The rows of each run, as its DataLoaders have them."

    def __init__(self):
        self.runs = []

    def before_train(self):
        self.runs.append([list(dl.dataset.items.row) for dl in self.dls.loaders])


@pytest.mark.slow
def test_a_kill_in_the_second_epoch_then_resumed_is_an_unbroken_run_bit_for_bit(tmp_path):
    seen = Seen()
    whole, history = rotate(tmp_path / 'whole', lambda dls: tiny(dls, cbs=[seen]))
    assert list(history[['epoch', 'run']].itertuples(index=False, name=None)) == [
        (e, r) for e in (0, 1) for r in (0, 1, 2)
    ]
    for run, (train, valid) in enumerate(seen.runs):
        assert [list(r) for r in Rotation(None, 9, 3).rows(run)] == [train, valid]
    code = f'''
        class Seen(Callback):
            def before_batch(self):
                if self.training and self.epoch == 4 and self.iter == 1: os.kill(os.getpid(), signal.SIGKILL)
        Seen.__module__ = 'two'
        rotate({str(tmp_path / 'broken')!r}, lambda dls: tiny(dls, cbs=[Seen()]))
    '''
    done = subprocess.run(
        [sys.executable, '-c', SETUP + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / 'broken/history.csv').exists()
    again = Seen()
    resumed, history2 = rotate(tmp_path / 'broken', lambda dls: tiny(dls, cbs=[again]))
    assert again.runs == seen.runs[4:]  # four runs were behind it
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    pd.testing.assert_frame_equal(
        history.drop(columns='seconds'), history2.drop(columns='seconds'), check_exact=True
    )
    assert sorted(p.name for p in (tmp_path / 'broken').iterdir()) == [
        '.lock',
        'history.csv',
        'model.safetensors',
        'run.json',
    ]


class PresetLoss(torch.nn.Module):
    "A loss with preset validation values, one per validation batch; training moves the weights."

    def __init__(self, values):
        super().__init__()
        self.values = iter(values)

    def __repr__(self):
        return 'PresetLoss()'

    def forward(self, pred, y):
        return pred.mean() if torch.is_grad_enabled() else torch.tensor(float(next(self.values)))


class Weights(Callback):
    order = 56

    def __init__(self):
        self.after = []

    def after_epoch(self):
        self.after.append({k: v.clone() for k, v in self.model.state_dict().items()})


def test_early_stopping_looks_at_the_mean_of_the_runs_and_keeps_the_best_epoch(tmp_path):
    means = [5, 4, 4.5, 3, 3.2, 3.1, 0, 0]  # patience 2: stops after epoch 5, best is epoch 3
    for select, kept in (('best', 3), ('last', 5)):
        weights = Weights()
        loss = PresetLoss([m + d for m in means for d in (-2, 2)])
        model, history = fit_rotation(
            partial(tiny, loss=loss, cbs=[weights]),
            set := made(6),
            replace(ONE, epochs=8, select=select),
            data=loaders(set),
            path=tmp_path / select,
            parts=2,
            stop_after=2,
        )
        assert len(history) == 12 and history.groupby('epoch').valid_loss.mean().tolist() == pytest.approx(
            means[:6]
        )
        final = weights.after[2 * kept + 1]
        assert all(torch.equal(v.cpu(), final[k].cpu()) for k, v in model.state_dict().items())


def test_cut_off_after_the_checkpoint_that_stops_it_no_further_epoch_is_trained(tmp_path):
    armed = []

    class Cut(Callback):
        order = 81

        def after_epoch(self):
            if self.epoch == 3 and armed:
                armed.clear()
                raise KeyboardInterrupt

    dls = loaders(made(6))(range(3), range(3, 6))

    def fit(values, path='early', stop_after=2):
        build, epochs = partial(tiny, loss=PresetLoss(values), cbs=[Cut()]), 4 if stop_after is None else 9
        return fit_in_folder(build, dls, replace(ONE, epochs=epochs), tmp_path / path, stop_after=stop_after)

    armed.append('once')
    with pytest.raises(KeyboardInterrupt):
        fit([2, 1, 1.5, 1.5, 0])
    assert fit([])[1].valid_loss.tolist() == [2, 1, 1.5, 1.5]
    armed.append('again')
    with pytest.raises(KeyboardInterrupt):
        fit([4, 3, 2, 1], 'end', None)  # the last epoch of all
    assert fit([], 'end', None)[1].valid_loss.tolist() == [4, 3, 2, 1]


def test_folds_start_from_equal_weights_and_predict_what_they_have_not_seen(tmp_path):
    s = made()
    folds = np.arange(9) // 2 % 3

    def fit():
        settings = replace(ONE, epochs=2)
        return kfold_masks(tiny, s, Folds(s.table, folds), settings, data=loaders(s), path=tmp_path / 'k')

    p = fit()
    assert p.shape == s.masks.shape and p.dtype == np.float16
    runs = [json.loads((tmp_path / f'k/fold{k}/run.json').read_text()) for k in range(3)]
    assert len({r['start'] for r in runs}) == 1 and [r['seed'] for r in runs] == [0, 1, 2]
    for k in range(3):
        model = unet(2, c_in=3, width=4)
        model.load_state_dict(load_weights(tmp_path / f'k/fold{k}/model.safetensors'))
        np.testing.assert_array_equal(predict_masks(model, s.images[folds == k]), p[folds == k])
    np.testing.assert_array_equal(fit(), p)  # read, not trained again


def test_same_seed_same_network_another_seed_another(tmp_path):
    dls = loaders(made())(range(6), range(6, 9), batch_tfms=[MerandAugment()])
    a, b, c = (
        fit_in_folder(tiny, dls, replace(ONE, seed=seed), tmp_path / name)[0].state_dict()
        for name, seed in (('a', 1), ('b', 1), ('c', 2))
    )
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_frozen_layers_stay_and_only_the_rest_is_trained(tmp_path):
    def build(dls):
        learn = tiny(dls)
        for p in list(learn.model.parameters())[:4]:
            p.requires_grad_(False)
        return learn

    dls = loaders(made())(range(6), range(6, 9))
    seed_all(0)
    start = [p.detach().clone() for p in build(dls).model.parameters()]
    model, _ = fit_in_folder(build, dls, ONE, tmp_path / 'f')
    same = [torch.equal(a, b) for a, b in zip(start, model.parameters())]
    assert all(same[:4]) and not any(same[4:])


def test_a_folder_belongs_to_one_run_and_bad_arguments_are_named(tmp_path):
    s = made()
    data = loaders(s)

    def fit(loss=None, rows=range(6, 9), batch_tfms=(), **change):
        dls = data(range(6), rows, batch_tfms=batch_tfms)
        return fit_in_folder(partial(tiny, loss=loss), dls, replace(ONE, **change), tmp_path / 'x')

    fit()
    for change in (
        dict(lr=1e-4),
        dict(seed=1),
        dict(loss=SoftDiceLoss()),
        dict(batch_tfms=[MerandAugment()]),
        dict(rows=range(5, 8)),
    ):
        with pytest.raises(ValueError, match='holds another run'):
            fit(**change)
    for change, message in (
        (dict(select='inner'), "'last' or 'best'"),
        (dict(watch='score'), "'train_loss' or 'valid_loss'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(**change)
    how = dict(data=data, path=tmp_path / 'k')
    with pytest.raises(ValueError, match='not of this set of 9 images'):
        kfold_masks(tiny, s, Folds(s.table[:2], [0, 1]), ONE, **how)
    with pytest.raises(ValueError, match='at least two folds'):
        kfold_masks(tiny, s, Folds(s.table, [1] * 9), ONE, **how)
    with pytest.raises(ValueError, match='parts is 2..9'):
        fit_rotation(tiny, s, ONE, **how, parts=10)
    with pytest.raises(ValueError, match='epoch 0 is nan'):
        build = partial(tiny, loss=PresetLoss([float('nan')]))
        fit_in_folder(build, data(range(6), range(6, 9)), ONE, tmp_path / 'n')


def test_a_class_that_a_fold_lacks_is_named_with_the_fold(tmp_path):
    s = made()
    s.masks[3:, 1] = False
    folds = Folds(s.table, np.arange(9) // 3 % 2)
    with pytest.warns(UserWarning) as said:
        kfold_masks(tiny, s, folds, ONE, data=loaders(s), path=tmp_path / 'k')
    assert "no pixel of 'band' in the held-out images of fold 1" in [str(w.message) for w in said]
