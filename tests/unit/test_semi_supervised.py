"Pi-model, temporal ensembling and FixMatch against plain loops and a replay of their training."

import math
import warnings

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, CancelFitException
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lus_fastai.data.pairs import USCLAugment, pair_dls
from lus_fastai.train.contrastive import ContrastiveNet, pair_learner, pretrain
from lus_fastai.train.semi_supervised import (
    FixMatch,
    PiModel,
    SemiSup,
    StrongAugment,
    TemporalEnsembling,
    WeakAugment,
    consistency,
    pseudo_labels,
    ramp_up,
    unbiased,
)


def backbone(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 5, 4, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    net.n_features = 16
    return net


def net(seed=0, n=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ContrastiveNet(backbone(seed), n, dim=8)


def batches(store, rate=0.25, valid=False, **kwargs):
    patients = sorted(store.frames['patient'].unique())
    train, test = (store.frames[store.frames['patient'].isin(p)] for p in (patients[:4], patients[4:]))
    return pair_dls(
        store,
        train,
        test if valid else None,
        **{**dict(bs=4, pair='same', label_rate=rate, device='cpu'), **kwargs},
    )


def methods():
    return [PiModel(), TemporalEnsembling(), FixMatch(threshold=0.4)]


each_method = pytest.mark.parametrize('method', methods(), ids=lambda m: type(m).__name__)


class At:
    "The part of a Learner that a method's `compute` looks at."

    def __init__(self, epoch=0, n_epoch=300, training=True, n=10):
        self.epoch, self.n_epoch, self.training = epoch, n_epoch, training
        self.dls = type(
            'dls', (), dict(train=type('dl', (), dict(dataset=range(n))), device='cpu', labelled=[0])
        )


def put(method, **kwargs):
    method.learn = At(**kwargs)
    method.reset()
    method.noted = {}
    return method


def softmax(row):
    e = [math.exp(v) for v in row]
    return [v / sum(e) for v in e]


# --- the pure functions


def test_ramp():
    length = 80
    for epoch in range(300):
        t = epoch / length
        want = 0.0 if epoch == 0 else math.exp(-5 * (1 - t) ** 2) if t < 1 else 1.0
        assert ramp_up(epoch, length) == pytest.approx(want, abs=1e-15)
    assert [ramp_up(e, 0) for e in range(3)] == [1.0, 1.0, 1.0]
    assert ramp_up(1, 0.5) == 1.0  # a ramp shorter than an epoch


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))
def test_consistency_is_the_plain_loop(b, n, seed):
    g = torch.Generator().manual_seed(seed)
    logits, target, known = (
        torch.randn(b, n, generator=g) * 3,
        torch.rand(b, n, generator=g),
        torch.rand(b, generator=g) < 0.5,
    )
    total = all_known = 0.0
    for i in range(b):
        p = softmax(logits[i].tolist())
        for j in range(n):
            d = (p[j] - float(target[i, j])) ** 2
            all_known += d
            total += d * bool(known[i])
    assert float(consistency(logits, target)) == pytest.approx(all_known / (b * n), abs=1e-6)
    assert float(consistency(logits, target, known)) == pytest.approx(total / (b * n), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 0.95), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_unbiased_is_the_weighted_mean_of_what_was_seen(alpha, values):
    Z = 0.0
    for v in values:
        Z = alpha * Z + (1 - alpha) * v
    weights = [(1 - alpha) * alpha ** (len(values) - 1 - i) for i in range(len(values))]
    want = sum(w * v for w, v in zip(weights, values)) / sum(weights)
    assert float(
        unbiased(torch.tensor([[Z]], dtype=torch.float64), torch.tensor([len(values)]), alpha)
    ) == pytest.approx(want, abs=1e-9)


def test_threshold_edge():
    logits = torch.tensor([[0.0, 0.0], [0.0, 1e-3], [5.0, 0.0], [-2.0, -2.0]])
    label, accepted = pseudo_labels(logits, 0.5)
    assert accepted.all() and label.tolist()[1:3] == [1, 0]  # exactly one half is accepted at .5
    edge = float(torch.tensor([0.0, 1e-3]).softmax(0)[1])
    assert pseudo_labels(logits, edge)[1].tolist() == [False, True, True, False]
    assert pseudo_labels(logits, math.nextafter(edge, 1) + 1e-7)[1].tolist() == [False, False, True, False]
    assert pseudo_labels(torch.tensor([[0.0, 200.0]]), 1.0)[1].item()  # certainty is accepted at 1


@pytest.mark.parametrize(
    'make',
    [
        lambda: PiModel(weight=-1),
        lambda: PiModel(weight=math.nan),
        lambda: PiModel(ramp=1.5),
        lambda: TemporalEnsembling(alpha=1),
        lambda: TemporalEnsembling(alpha=-0.1),
        lambda: FixMatch(threshold=0),
        lambda: FixMatch(threshold=1.01),
        lambda: FixMatch(weight=math.inf),
        lambda: StrongAugment(cutout=2),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match='weight|ramp|alpha|threshold|cutout'):
        make()


# --- the losses


def pred_of(logits):
    return None, None, logits


def test_pi_model_is_the_plain_loop():
    torch.manual_seed(0)
    logits, y, ids = torch.randn(5, 2, 3), torch.zeros(5, 2, 3), torch.arange(10).view(5, 2)
    y[1, :, 2] = y[4, :, 0] = 1
    ce = -sum(math.log(softmax(logits[i, 0].tolist())[c]) for i, c in ((1, 2), (4, 0))) / 2
    mse = (
        sum((a - b) ** 2 for v in logits for a, b in zip(softmax(v[0].tolist()), softmax(v[1].tolist()))) / 15
    )
    for epoch, w in ((0, 0.0), (40, 100 * math.exp(-5 / 4)), (80, 100.0), (299, 100.0)):
        assert float(put(PiModel(), epoch=epoch).compute(pred_of(logits), y, ids)) == pytest.approx(
            ce + w * mse, rel=1e-5
        )
    assert float(put(PiModel(), epoch=99, training=False).compute(pred_of(logits), y, ids)) == pytest.approx(
        ce, rel=1e-5
    )


def test_pi_models_gradient_is_the_same_for_both_views():
    logits = torch.tensor([[[0.3, -0.2, 0.1], [0.3, -0.2, 0.4]]], requires_grad=True)
    put(PiModel(ramp=0.0)).compute(
        pred_of(logits), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
    ).backward()
    swapped = logits.detach().flip(1).requires_grad_()
    put(PiModel(ramp=0.0)).compute(
        pred_of(swapped), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
    ).backward()
    assert (
        torch.allclose(logits.grad, swapped.grad.flip(1))
        and logits.grad[:, 0].abs().max() > 0 < logits.grad[:, 1].abs().max()
    )


def test_ensembling_over_three_epochs_by_hand():
    "Two classes, three items; item 2 is not drawn in the second epoch."
    te = put(TemporalEnsembling(weight=10.0, ramp=0.0, alpha=0.6), n=3)

    def logit(ps):
        return torch.tensor([[math.log(p), math.log(1 - p)] for p in ps], requires_grad=True)

    none, ids = lambda b: torch.zeros(b, 2, 2), lambda *i: torch.tensor([[j, -1] for j in i])
    loss = te.compute(pred_of(logit([0.8, 0.5, 0.3])), none(3), ids(0, 1, 2))
    assert loss.item() == 0  # nobody has a target yet
    loss = te.compute(pred_of(logit([0.4, 0.5])), none(2), ids(0, 1))
    assert float(loss) == pytest.approx(10 * 2 * (0.4 - 0.8) ** 2 / 4, rel=1e-5)
    last = logit([0.9, 0.6, 0.5])
    loss = te.compute(pred_of(last), none(3), ids(2, 0, 1))  # in another order
    target = {2: 0.3, 0: (0.6 * 0.4 * 0.8 + 0.4 * 0.4) / (1 - 0.36), 1: 0.5}
    assert target[0] == pytest.approx(0.55)
    assert float(loss) == pytest.approx(10 * 2 * ((0.9 - 0.3) ** 2 + (0.6 - 0.55) ** 2) / 6, rel=1e-4)
    assert te.seen.tolist() == [3, 2 + 1, 2]
    assert te.ensemble[:, 0].tolist() == pytest.approx(
        [0.6 * 0.352 + 0.4 * 0.6, 0.784 * 0.5, 0.6 * 0.4 * 0.3 + 0.4 * 0.9], abs=1e-6
    )
    assert not te.ensemble.requires_grad
    loss.backward()
    assert last.grad[0].abs().max() > 0 and last.grad[2].abs().max() < 1e-6  # item 1 agrees with its target


def test_validation_and_labels_leave_the_ensemble_alone():
    te = put(TemporalEnsembling(ramp=0.0), n=3, training=False)
    y = torch.tensor([[[1.0, 0.0]] * 2])
    assert float(te.compute(pred_of(torch.zeros(1, 2)), y, torch.tensor([[7, 0]]))) == pytest.approx(
        math.log(2)
    )
    assert te.ensemble is None


def test_fixmatch_is_the_plain_loop_and_its_targets_have_no_gradient():
    torch.manual_seed(1)
    logits, y = (torch.randn(6, 2, 3) * 3).requires_grad_(), torch.zeros(6, 2, 3)
    y[0, :, 1] = 1
    ce, total, taken = -math.log(softmax(logits[0, 0].tolist())[1]), 0.0, 0
    for weak, strong in logits.tolist():
        p = softmax(weak)
        if max(p) >= 0.8:
            total, taken = total - math.log(softmax(strong)[p.index(max(p))]), taken + 1
    assert 0 < taken < 6
    fm = put(FixMatch(weight=2.0, threshold=0.8))
    loss = fm.compute(pred_of(logits), y, torch.zeros(6, 2, dtype=torch.long))
    assert float(loss) == pytest.approx(ce + 2 * total / 6, rel=1e-5)
    assert float(fm.noted['accepted'][0][0]) == pytest.approx(taken / 6)
    loss.backward()
    assert (logits.grad[1:, 0] == 0).all() and logits.grad[
        0, 0
    ].abs().max() > 0  # weak views learn from labels alone
    silent = pseudo_labels(logits[:, 0], 0.8)[1].logical_not()
    assert (logits.grad[silent, 1] == 0).all()


@each_method
def test_batch_without_labels_is_zero_and_finite(method):
    logits = torch.randn(4, 2, 3, requires_grad=True)
    view = logits[:, 0] if isinstance(method, TemporalEnsembling) else logits
    loss = put(type(method)()).compute(pred_of(view), torch.zeros(4, 2, 3), torch.arange(8).view(4, 2) % 4)
    assert float(loss) == 0
    loss.backward()
    assert logits.grad.isfinite().all()


def test_half_precision_logits():
    logits = torch.randn(4, 2, 3)
    a, b = (
        float(
            put(PiModel(ramp=0.0)).compute(
                pred_of(l), torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.long)
            )
        )
        for l in (logits, logits.bfloat16())
    )
    assert a == pytest.approx(b, rel=0.1)
    with torch.autocast('cpu', torch.bfloat16):
        assert consistency(logits[:, 0], logits[:, 1].softmax(-1)).dtype == torch.float32


# --- augmentation


def test_cutout_is_one_square_of_grey():
    a = StrongAugment(cutout=0.5, brightness=0, contrast=0)
    g = torch.Generator().manual_seed(0)
    draws = a.draw(40, (32, 48), g)
    out = a.apply(torch.ones(40, 1, 32, 48), draws)
    for view, (side, down, right) in zip(out[:, 0].numpy(), draws['hole'].tolist()):
        rows, cols = (
            [i for i in range(n) if abs((i + 0.5) / n - at) <= side / 2 + 1e-6]
            for n, at in ((32, down), (48, right))
        )
        assert (
            (view[np.ix_(rows, cols)] == 0.5).all()
            and (view == 0.5).sum() == len(rows) * len(cols)
            and set(np.unique(view)) <= {0.5, 1.0}
        )
    assert draws['hole'][:, 0].max() <= 0.5 and (out == 0.5).flatten(1).any(1).float().mean() > 0.8


def test_without_cutout_strong_is_uscls_and_weak_is_its_crop():
    x = torch.rand(20, 1, 24, 24)

    def g():
        return torch.Generator().manual_seed(3)

    assert torch.equal(StrongAugment(cutout=0.0)(x, g()), USCLAugment()(x, g()))
    assert torch.equal(WeakAugment()(x, g()), USCLAugment(brightness=0, contrast=0)(x, g()))
    before = x.clone()
    StrongAugment()(x, g())
    assert torch.equal(x, before)
    assert repr(WeakAugment()) != repr(USCLAugment()) != repr(StrongAugment())


def test_weak_first_and_strong_second(phantom_store):
    x, _, _ = batches(
        phantom_store,
        augment=WeakAugment(flip=0.0),
        augment2=StrongAugment(cutout=1.0, brightness=0, contrast=0, flip=0.0),
        bs=8,
    ).train.one_batch()
    grey = (x == 0.5).flatten(2).float().mean(-1)[:, :, None].flatten(1)
    assert (grey[:, 0] < 0.02).all() and grey[:, 1].max() > 0.1


# --- fits


@each_method
def test_fit_learns_logs_and_gives_back(method, phantom_store):
    dls = batches(phantom_store, valid=True)
    learn = pair_learner(dls, net(), type(method)())
    own = learn.loss_func
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-3)
    m = (
        learn.cbs[-1]
        if isinstance(learn.cbs[-1], SemiSup)
        else next(c for c in learn.cbs if isinstance(c, SemiSup))
    )
    assert learn.loss_func == own and [r['epoch'] for r in m.history] == [0, 1, 2]
    assert all(math.isfinite(v) for r in m.history for v in r.values())
    assert {'supervised', 'unsupervised', 'weight'} <= set(m.history[0]) and (
        'accepted' in m.history[0]
    ) == isinstance(m, FixMatch)
    rows, state = m.history, m.state_dict()
    learn.validate()
    learn.get_preds()
    assert m.history is rows
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
        assert learn.loss_func == own and m.history == rows
        if isinstance(m, TemporalEnsembling):
            assert torch.equal(m.ensemble, state['ensemble']) and m.seen.max() == 3
        learn.fit(2, 1e-3)  # a second fit starts from nothing
    assert [r['epoch'] for r in m.history] == [0, 1]
    if isinstance(m, TemporalEnsembling):
        assert m.seen.max() == 2


class StopAt(Callback):
    "Ends a fit by `error` in an epoch's batch."

    def __init__(self, epoch, batch=1, error=KeyboardInterrupt):
        self.at, self.error = (epoch, batch), error

    def after_loss(self):
        if self.training and (self.epoch, self.iter) == self.at and not hasattr(self.learn, 'lr_finder'):
            raise self.error()


@each_method
def test_interrupt_gives_the_loss_back_and_the_next_fit_is_as_new(method, phantom_store):
    learn = pair_learner(batches(phantom_store), net(), type(method)())
    own = learn.loss_func
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt):
            learn.fit(2, 1e-3, cbs=StopAt(1))
        assert learn.loss_func == own
        learn.fit(1, 1e-3, cbs=StopAt(0, error=CancelFitException))
        assert learn.loss_func == own
        learn.fit(2, 1e-3)
    m = next(c for c in learn.cbs if isinstance(c, SemiSup))
    assert len(m.history) == 2 and (not isinstance(m, TemporalEnsembling) or m.seen.max() == 2)


@each_method
def test_learns_from_a_quarter_of_the_labels(method, phantom_store, tmp_path):
    m = dict(
        PiModel=PiModel(weight=5.0),
        TemporalEnsembling=TemporalEnsembling(weight=5.0),
        FixMatch=FixMatch(threshold=0.6),
    )[type(method).__name__]
    _, history = pretrain(
        m, batches(phantom_store, bs=8, **views(m)), backbone(), 25, tmp_path / 'run', lr=1e-2, log=0, dim=8
    )
    supervised = [r['supervised'] for r in m.history]
    assert np.mean(supervised[-5:]) < 0.8 * np.mean(supervised[:3])
    assert max(r['unsupervised'] for r in m.history) > 0


def views(method):
    return dict(augment=WeakAugment(), augment2=StrongAugment()) if isinstance(method, FixMatch) else {}


@each_method
@pytest.mark.parametrize('epoch', [0, 2])
def test_resume_bit_for_bit(method, epoch, phantom_store, tmp_path):
    def make():
        return (
            type(method)(**{k: v for k, v in method.settings().items()}),
            batches(phantom_store, valid=True, **views(method)),
            backbone(),
        )

    whole = make()
    a, ha = pretrain(*whole, 4, tmp_path / 'a', lr=1e-2, log=0, dim=8)
    stopped = make()
    stopped[0].before_backward = lambda self=stopped[0]: (
        (_ for _ in ()).throw(KeyboardInterrupt())
        if self.training and self.epoch == epoch and self.iter == 1
        else None
    )
    with pytest.raises(KeyboardInterrupt):
        pretrain(*stopped, 4, tmp_path / 'b', lr=1e-2, log=0, dim=8)
    again = make()
    b, hb = pretrain(*again, 4, tmp_path / 'b', lr=1e-2, log=0, dim=8)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert again[0].history == whole[0].history and ha['train_loss'].equals(hb['train_loss'])
    for k in whole[0].history[0]:
        assert hb[k].tolist() == pytest.approx(
            [r[k] for r in whole[0].history]
        )  # the rows are in history.csv too
    if isinstance(method, TemporalEnsembling):
        assert torch.equal(whole[0].ensemble, again[0].ensemble) and torch.equal(whole[0].seen, again[0].seen)


def test_ensemble_of_a_fit_is_the_plain_replay(phantom_store):
    "Every answer of three epochs is written down; the ensemble is then made by loops."
    said = []

    class Listen(Callback):
        order = 75  # after the method

        def after_loss(self):
            if self.training:
                said.append((self.yb[-1][:, 0].tolist(), self.learn.pred[2].detach().softmax(-1)))

    te = TemporalEnsembling(alpha=0.7)
    learn = pair_learner(batches(phantom_store, per_epoch=6), net(), te)
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, 1e-2, cbs=Listen())
    n = len(learn.dls.train.dataset)
    Z, count = np.zeros((n, 3)), np.zeros(n, int)
    for items, p in said:
        for i, row in zip(items, p.numpy()):
            Z[i] = 0.7 * Z[i] + 0.3 * row
            count[i] += 1
    assert len(set(count.tolist())) > 1  # six of eight items an epoch
    assert te.seen.tolist() == count.tolist() and np.allclose(te.ensemble, Z, atol=1e-6)


def test_no_labels_at_all_warns_and_stays_finite(phantom_store, tmp_path):
    for m in methods():
        with pytest.warns(UserWarning, match='no clip of the training table has a label'):
            trained, history = pretrain(
                m, batches(phantom_store, rate=0.0), backbone(), 2, tmp_path / type(m).__name__, log=0, dim=8
            )
        assert np.isfinite(history['train_loss']).all() and all(
            p.isfinite().all() for p in trained.parameters()
        )
        assert all(r['supervised'] == 0 for r in m.history)


@each_method
def test_same_seed_same_history_and_no_warning(method, phantom_store, tmp_path):
    runs = []
    for k in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            m = type(method)()
            pretrain(m, batches(phantom_store, **views(m)), backbone(), 2, tmp_path / str(k), log=0, dim=8)
        runs.append(m.history)
    assert runs[0] == runs[1]


def test_settings_bind_a_folder(phantom_store, tmp_path):
    pretrain(FixMatch(), batches(phantom_store), backbone(), 1, tmp_path / 'run', log=0, dim=8)
    with pytest.raises(ValueError, match='another run'):
        pretrain(
            FixMatch(threshold=0.9), batches(phantom_store), backbone(), 1, tmp_path / 'run', log=0, dim=8
        )


def test_without_a_classifier(phantom_store):
    learn = pair_learner(batches(phantom_store), ContrastiveNet(backbone(), None, dim=8), PiModel())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='needs a classifier'):
        learn.fit(1)


@pytest.mark.gpu
def test_on_the_device(phantom_store, tmp_path):
    for m in methods():
        pretrain(
            m,
            batches(phantom_store, device='cuda', **views(m)),
            backbone(),
            3,
            tmp_path / type(m).__name__,
            log=0,
            dim=8,
        )
        assert len(m.history) == 3 and all(math.isfinite(v) for r in m.history for v in r.values())
