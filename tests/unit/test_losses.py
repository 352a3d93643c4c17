"Class weights, and cross-entropy plus Dice, against other people's code and in fastai's hands."

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from fastai.vision.all import Learner, OptimWrapper, SegmentationInterpretation

from lus_fastai.core import DENSE
from lus_fastai.data.loaders import frame_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.models.unet import unet
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.train.losses import DiceCELoss, class_weights, code_counts


def logits_and_codes(classes=4, seed=0, shape=(3, 9, 7)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], classes, *shape[1:], generator=g), torch.randint(classes, shape, generator=g)


@pytest.mark.parametrize('absent', [False, True])
def test_monai_computes_the_same(absent):
    monai = pytest.importorskip('monai.losses')
    pred, targ = logits_and_codes()
    if absent:
        targ[targ == 3] = 0  # a class without a pixel in this batch
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0])
    theirs = monai.DiceCELoss(
        softmax=True, to_onehot_y=True, batch=True, smooth_nr=1, smooth_dr=1, weight=weights
    )
    dice = theirs.dice
    dice.class_weight = None  # theirs weighs Dice as well
    assert DiceCELoss(weights)(pred, targ).item() == pytest.approx(
        (dice(pred, targ[:, None]) + theirs.ce(pred, targ[:, None])).item(), abs=1e-5
    )


def test_gradient_is_the_slope():
    pred, targ = logits_and_codes(3, shape=(2, 3, 3))
    targ[0, 0] = 255
    weights, h = torch.tensor([1.0, 4.0, 0.5]), 1e-2
    loss, pred = DiceCELoss(weights), pred.requires_grad_()
    loss(pred, targ).backward()
    for at in [(0, 1, 1, 2), (1, 0, 2, 2), (1, 2, 0, 0)]:
        step = torch.zeros_like(pred)
        step[at] = h
        slope = (loss(pred.detach() + step, targ) - loss(pred.detach() - step, targ)) / (2 * h)
        assert pred.grad[at].item() == pytest.approx(slope.item(), abs=2e-4) and abs(slope) > 1e-3
    assert (
        not pred.grad[0, :, 0].any() and pred.grad[0, :, 1].all()
    )  # nothing flows from pixels without a label


def test_unlabelled_pixels_and_batches():
    pred, targ = logits_and_codes()
    loss = DiceCELoss(class_weights([1, 2, 3, 4]))
    hidden, other = targ.clone(), pred.clone()
    hidden[:, 4:] = 255
    other[..., 4:, :] = 50 * torch.randn_like(other[..., 4:, :])  # whatever is said where nobody knows
    assert (
        loss(pred, hidden).item()
        == pytest.approx(loss(pred[..., :4, :], targ[:, :4]).item(), abs=1e-6)
        == pytest.approx(loss(other, hidden).item(), abs=1e-6)
    )
    nothing = loss(pred.requires_grad_(), torch.full_like(targ, 255))
    nothing.backward()
    assert nothing.item() == 0 and torch.isfinite(pred.grad).all() and not pred.grad.any()


def test_float32_inside_autocast_and_one_loss_per_image():
    pred, targ = logits_and_codes()
    want = DiceCELoss()(pred.bfloat16().float(), targ)
    with torch.autocast('cpu', torch.bfloat16):
        got = DiceCELoss()(pred.bfloat16(), targ)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), abs=1e-6)
    each = DiceCELoss(reduction='none')(pred, targ)
    assert each.shape == (3,) and each[1].item() == pytest.approx(
        DiceCELoss()(pred[1:2], targ[1:2]).item(), abs=1e-6
    )


@pytest.mark.parametrize('counts', [[], [1, -1], [0, 0], [[1, 2]], [1, np.nan]])
def test_counts_that_count_nothing(counts):
    with pytest.raises(ValueError, match='counts are one number for each class'):
        class_weights(counts)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp('losses')
    table = phantom_dataset(root / 'phantom', patients=6, clips=1, n=3, size=(48, 48), workers=1)
    return FrameStore.build(table, root / 'store', size=(48, 48), max_frames=3)


def dls_of(store, labels='dense'):
    held_out = store.frames.patient.isin(sorted(store.frames.patient.unique())[:3])
    return frame_dls(store, store.frames[~held_out], store.frames[held_out], labels, bs=4)


def test_only_training_masks_are_counted(store):
    dls = dls_of(store)
    rows = dls.train.dataset.tls[1].items.row.to_numpy()
    want = [int((np.asarray(store.masks)[rows] == k).sum()) for k in range(len(DENSE))]
    assert (
        code_counts(dls).tolist() == want and sum(want) == len(rows) * 48 * 48 < np.asarray(store.masks).size
    )
    assert code_counts(dls_of(store, 'sparse')).tolist() == [
        want[0],
        want[1],
        want[2] + want[3],
        sum(want[4:]),
    ]


def test_in_a_learner_from_training_to_a_fresh_process(store, tmp_path):
    dls = dls_of(store)
    learn = Learner(
        dls,
        unet(len(DENSE), width=2, bn=True),
        loss_func=DiceCELoss(class_weights(code_counts(dls))),
        opt_func=partial(OptimWrapper, opt=torch.optim.Adam),
        path=tmp_path,
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
    with learn.no_bar():
        probs, _, codes = learn.get_preds(with_decoded=True)
        assert np.allclose(probs.sum(1), 1, atol=1e-4) and torch.equal(
            torch.as_tensor(codes), torch.as_tensor(probs.argmax(1))
        )
        learn.show_results(max_n=2)
        assert np.isfinite(SegmentationInterpretation.from_learner(learn).losses).all()
    learn.export('model.pkl')
    code = '''if True:
        from fastai.vision.all import *
        loss = load_learner('model.pkl').loss_func
        print(type(loss).__name__, loss.weights.shape[0])
    '''
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.stdout.split() == ['DiceCELoss', '7'], done.stderr[-800:]
