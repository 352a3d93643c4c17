"A device that runs out of memory: the fit goes on with smaller batches, says so, and gives the same weights."

import warnings
from functools import partial

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.vision.all import Callback, Learner, OptimWrapper

from lus_fastai.core import seed_all
from lus_fastai.train.callbacks import Checkpoint, fit_resumable


class Room(Callback):
    "Room for so many items, from an epoch on, in training or in validation."

    def __init__(self, most, epoch=0, at=1, training=True):
        self.most, self.at, self.where = most, at, (epoch, training)

    def before_batch(self):
        if (self.epoch, self.training) >= self.where and self.iter >= self.at and len(self.xb[0]) > self.most:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')


def learner(n=32, bs=8):
    seed_all(0)
    items = [(torch.randn(3), torch.randn(1)) for _ in range(n)]
    dls = DataLoaders(DataLoader(items, bs=bs, shuffle=True, drop_last=True), DataLoader(items[:8], bs=bs))
    adam = partial(OptimWrapper, opt=torch.optim.Adam)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return Learner(dls, net, loss_func=torch.nn.MSELoss(), opt_func=adam)


def fit(path, *cbs, halve=True, **how):
    learn = learner(**how)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit_resumable(learn, 3, 0.01, path, seed=1, cbs=cbs, halve=halve)
    return learn, [str(w.message) for w in caught if 'no memory' in str(w.message)]


@pytest.mark.parametrize('epoch', [0, 1])
def test_half_the_batch_gives_the_same_weights_and_is_said(tmp_path, epoch):
    whole, silent = fit(tmp_path / 'whole.pt')
    half, said = fit(tmp_path / 'half' / 'c.pt', Room(4, epoch))
    assert not silent and len(said) == 1
    assert f'half: no memory for batches of 8; goes on after {epoch} epochs with batches of 4' in said[0]
    for a, b in zip(whole.model.parameters(), half.model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert [dl.bs for dl in half.dls.loaders] == [8, 8]  # what was borrowed is given back


def test_it_halves_as_often_as_it_must_and_an_epoch_that_is_done_is_kept(tmp_path):
    done, said = fit(tmp_path / 'c' / 'c.pt', Room(2, 1))
    assert [s.split('batches of ')[1][0] + s.split('batches of ')[2][0] for s in said] == ['84', '42']
    assert all('after 1 epochs' in s for s in said) and Checkpoint(tmp_path / 'c' / 'c.pt').epochs_done() == 3


def test_one_item_that_has_no_room_is_an_error(tmp_path):
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(tmp_path / 'c.pt', Room(0))


def test_a_loss_of_whole_batches_is_not_changed(tmp_path):
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(tmp_path / 'c.pt', Room(4, 1), halve=False)
    assert Checkpoint(tmp_path / 'c.pt').epochs_done() == 1
