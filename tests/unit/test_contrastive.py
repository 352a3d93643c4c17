"Pairs, NT-Xent and the methods against loops, lightly and torchvision; interrupts; two processes."

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lus_fastai.core import TableError
from lus_fastai.data.pairs import (
    PairItems,
    USCLAugment,
    beta_half,
    draw_triplets,
    label_budget,
    mix_triplets,
    pair_dls,
)
from lus_fastai.data.store import FrameStore
from lus_fastai.models.backbones import create_backbone
from lus_fastai.train.contrastive import (
    USCL,
    ContrastiveNet,
    MoCo,
    SimCLR,
    Supervised,
    alignment,
    info_nce,
    knn_accuracy,
    nt_xent,
    pair_learner,
    pretrain,
    soft_cross_entropy,
    uniformity,
)


class Tiny(nn.Module):
    "A backbone of 8 features, with batch norm or without."

    n_features = 8

    def __init__(self, bn=False, width=4):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 5, 4),
            nn.BatchNorm2d(width) if bn else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(width, 8, 3, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, x):
        return self.net(x)


def tiny(bn=False, width=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny(bn, width)


def parts(store):
    f = store.frames
    names = sorted(f['patient'].unique())
    return f[f['patient'].isin(names[:4])], f[f['patient'].isin(names[4:])]


def dls_of(store, **kw):
    return pair_dls(store, *parts(store), **{**dict(bs=4, device='cpu'), **kw})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---- losses


def loop_nt_xent(z1, z2, t, groups=None):
    "NT-Xent by a double loop."
    z, b = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    total = 0.0
    for i in range(2 * b):
        pos = z[i] @ z[(i + b) % (2 * b)] / t
        below = pos.exp()
        for j in range(2 * b):
            if j % b != i % b and (groups is None or groups[i % b] < 0 or groups[i % b] != groups[j % b]):
                below = below + (z[i] @ z[j] / t).exp()
        total = total - (pos.exp() / below).log()
    return total / (2 * b)


@pytest.mark.parametrize('t', [0.1, 0.5, 2.0])
def test_nt_xent_is_the_double_loop_and_lightlys(t):
    from lightly.loss import NTXentLoss

    torch.manual_seed(0)
    z1, z2 = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    assert torch.allclose(nt_xent(z1, z2, t), loop_nt_xent(z1, z2, t), atol=1e-6)
    assert torch.allclose(nt_xent(z1, z2, t), NTXentLoss(t)(z1, z2), atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(f(z1, z2), z1)[0] for f in (lambda a, b: nt_xent(a, b, t), NTXentLoss(t))
    )
    assert torch.allclose(ours, theirs, atol=1e-6)
    groups = torch.tensor([0, 1, 0, -1, -1])
    assert torch.allclose(nt_xent(z1, z2, t, groups), loop_nt_xent(z1, z2, t, groups), atol=1e-6)


def test_nt_xent_in_half_precision_and_collapsed():
    torch.manual_seed(0)
    z1, z2 = torch.randn(16, 8) * 100, torch.randn(16, 8) * 100
    for dtype, tol in ((torch.float16, 2e-2), (torch.bfloat16, 2e-1)):
        loss = nt_xent(z1.to(dtype), z2.to(dtype), 0.05)
        assert loss.dtype == torch.float32 and abs(loss - nt_xent(z1, z2, 0.05)) < tol
    with torch.autocast('cpu', torch.bfloat16):
        assert (
            torch.equal(nt_xent(z1, z2, 0.05), nt_xent(z1, z2, 0.05))
            and nt_xent(z1, z2).dtype == torch.float32
        )
    for z in (torch.ones(6, 4), torch.zeros(6, 4)):
        z.requires_grad_()
        loss = nt_xent(z, z.clone(), 0.01)
        loss.backward()
        assert math.isclose(float(loss), math.log(11), rel_tol=1e-5) and z.grad.isfinite().all()
    assert (
        nt_xent(z1, z2, groups=torch.zeros(16, dtype=torch.int64)) == 0
    )  # one patient: nobody has a negative
    assert torch.autograd.gradcheck(
        lambda a, b: nt_xent(a, b, 0.5, torch.tensor([0, 0, 1])),
        [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)],
    )


def test_info_nce_is_lightlys_with_a_memory_bank():
    from lightly.loss import NTXentLoss

    torch.manual_seed(0)
    theirs, _checked = NTXentLoss(0.2, memory_bank_size=(12, 7)), 0
    theirs(torch.randn(4, 7), torch.randn(4, 7))
    for _ in range(5):
        q, k = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
        bank = theirs.memory_bank.bank.clone()
        assert bank.shape == (12, 7)
        want = theirs(q, k)
        assert torch.allclose(info_nce(q, k, bank, 0.2), want, atol=1e-5)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, 3:] = True
    assert torch.allclose(info_nce(q, k, bank, 0.2, mask), info_nce(q, k, bank[:3], 0.2))


def test_soft_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(5, 2, 3, requires_grad=True)
    y = F.one_hot(torch.randint(3, (5, 2)), 3).float()
    assert torch.allclose(
        soft_cross_entropy(logits, y), F.cross_entropy(logits.flatten(0, 1), y.flatten(0, 1).argmax(1))
    )
    y[2:] = 0
    assert torch.allclose(
        soft_cross_entropy(logits, y),
        F.cross_entropy(logits[:2].flatten(0, 1), y[:2].flatten(0, 1).argmax(1)),
    )
    loss = soft_cross_entropy(logits, torch.zeros_like(y))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize('t', [0, -1.0, float('nan')])
def test_temperature(t):
    z = torch.randn(4, 3)
    for f in (
        lambda: nt_xent(z, z, t),
        lambda: info_nce(z, z, z, t),
        lambda: SimCLR(t),
        lambda: USCL(t),
        lambda: MoCo(t),
    ):
        with pytest.raises(ValueError, match='temperature must be above 0'):
            f()


# ---- pairs


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99), fixed=st.booleans()
)
def test_triplets_are_three_frames_of_the_clip(counts, seed, fixed):
    n, g = torch.tensor(counts), torch.Generator().manual_seed(seed)
    anchor = (torch.rand(len(n), generator=g) * n).long() if fixed else None
    t = draw_triplets(n, anchor, g)
    assert ((t >= 0) & (t < n[:, None])).all()
    if fixed:
        assert torch.equal(t[:, 1], anchor)
    for count, row in zip(counts, t.tolist()):
        if count >= 3:
            assert len(set(row)) == 3
        if count == 2:
            assert {row[0], row[2]} == {0, 1}


def test_triplets_are_even():
    t = draw_triplets(torch.full((24000,), 4), generator=torch.Generator().manual_seed(0))
    seen = torch.bincount((t * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    assert (seen > 0).sum() == 24 and (seen[seen > 0] - 1000).abs().max() < 130  # 4 sigma of 24 equal chances


def test_beta_half():
    x = beta_half(200_000, generator=torch.Generator().manual_seed(0))
    assert abs(x.mean() - 0.5) < 0.003 and abs(x.var() - 0.125) < 0.002
    assert abs((x < 0.1).float().mean() - 2 / math.pi * math.asin(0.1**0.5)) < 0.005


def test_mixing_by_hand():
    x, y = torch.tensor([[10, 20, 40]], dtype=torch.uint8)[..., None], torch.eye(3)[None]
    views, labels = mix_triplets(x, y, torch.tensor([3]), torch.tensor([[0.25, 0.75]]))
    assert torch.allclose(views.flatten(), torch.tensor([17.5, 35.0]))  # .25*10 + .75*20, .75*40 + .25*20
    assert torch.allclose(labels, torch.tensor([[[0.25, 0.75, 0], [0, 0.25, 0.75]]]))
    for n in (1, 2):
        views, labels = mix_triplets(x, y, torch.tensor([n]), torch.tensor([[0.25, 0.75]]))
        assert views.flatten().tolist() == [10, 40] and torch.equal(labels[0], torch.eye(3)[[0, 2]])


def test_crop_is_torchvisions():
    from torchvision.transforms.v2 import functional as T

    torch.manual_seed(0)
    x = F.avg_pool2d(torch.rand(20, 1, 44, 52), 5, 1)  # (40, 48)
    a = USCLAugment(brightness=0, contrast=0)
    d = a.draw(20, (40, 48))
    ours = a.apply(x, d)
    for i in range(20):
        (top, left), (h, w) = d['corner'][i].int().tolist(), d['side'][i].int().tolist()
        assert 0 <= top <= 40 - h and 0 <= left <= 48 - w
        theirs = T.resized_crop(x[i], top, left, h, w, [40, 48], antialias=False)
        if d['flip'][i]:
            theirs = theirs.flip(-1)
        assert (ours[i] - theirs)[:, 1:-1, 1:-1].abs().max() < 1e-4, i
    assert torch.equal(ours[3:5], a.apply(x[3:5], {k: v[3:5] for k, v in d.items()}))  # parts do not matter


def test_crops_are_read_as_through_a_grid():
    torch.manual_seed(0)
    x, a = torch.rand(6, 3, 40, 52), USCLAugment(brightness=0, contrast=0)
    before, d = x.clone(), a.draw(6, (40, 52))

    def places(i, n):
        return (
            d['corner'][:, i, None].double() + d['side'][:, i, None] * (torch.arange(n) + 0.5) / n
        ) * 2 / n - 1

    rows, cols = places(0, 40)[:, :, None].expand(-1, -1, 52), places(1, 52)[:, None].expand(-1, 40, -1)
    cols = torch.where(d['flip'][:, None, None], cols.flip(2), cols)
    want = F.grid_sample(x.double(), torch.stack([cols, rows], -1), 'bilinear', 'border', align_corners=False)
    assert (a.apply(x, d) - want).abs().max() < 2e-5 and torch.equal(x, before)
    grey = USCLAugment(brightness=0, contrast=1)
    flat = grey.apply(
        x, {**grey.draw(6, (40, 52)), 'contrast': torch.zeros(6)}
    )  # no contrast leaves the mean
    assert (flat - flat[:, :1, :1, :1]).abs().max() < 1e-6


def test_a_batch_is_its_items(phantom_store):
    frames = phantom_store.frames
    for pair in ('mix', 'two', 'same'):
        items = PairItems(phantom_store, frames, unit='frame', pair=pair, augment=USCLAugment())
        x, y, ids, count, xi, *draws = items.draw(
            torch.arange(11), torch.Generator().manual_seed(0)
        )  # more than one part on a CPU
        views, labels, _ = items.finish((x, y, ids, count, xi, *draws))
        for i in (0, 7, 8, 10):
            one = slice(i, i + 1)
            a, b, _ = items.finish(
                (
                    x[one],
                    y[one],
                    ids[one],
                    count[one],
                    xi[one],
                    *({k: v[one] for k, v in d.items()} for d in draws),
                )
            )
            assert torch.allclose(views[one], a, atol=1e-6) and torch.equal(labels[one], b)


def test_crops_are_drawn_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    ours = USCLAugment().draw(4000, (100, 100))['side'].prod(1) / 1e4
    theirs = (
        torch.tensor(
            [
                [*RandomResizedCrop.get_params(torch.empty(1, 100, 100), [0.8, 1.0], [0.8, 1.25])[2:]]
                for _ in range(1500)
            ]
        ).prod(1)
        / 1e4
    )
    assert abs(ours.mean() - theirs.mean()) < 0.006 and abs(ours.std() - theirs.std()) < 0.006


def test_jitter_is_torchvisions():
    from torchvision.transforms.v2 import functional as T

    torch.manual_seed(0)
    x, a = torch.rand(8, 1, 12, 12), USCLAugment(scale=(1, 1), ratio=(1, 1), flip=0)
    d = a.draw(8, (12, 12))
    ours = a.apply(x, d)
    for i in range(8):
        b, c = float(d['brightness'][i]), float(d['contrast'][i])
        ops = [
            partial(T.adjust_brightness, brightness_factor=b),
            partial(T.adjust_contrast, contrast_factor=c),
        ]
        want = x[i]
        for op in ops if d['dark_first'][i] else ops[::-1]:
            want = op(want)
        assert torch.allclose(ours[i], want, atol=1e-5)


def test_batches(phantom_store):
    dls = dls_of(phantom_store)
    x, y, ids = dls.one_batch()
    assert x.shape == (4, 2, 1, 64, 64) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert (
        y.shape == (4, 2, 3)
        and torch.allclose(y.sum(-1), torch.ones(4, 2))
        and ids.dtype == torch.int64
        and ids.shape == (4, 2)
    )
    items = dls.train.dataset
    assert torch.equal(items.patient[ids[:, 0]], ids[:, 1])
    assert torch.equal(items.truth[items.start[ids[:, 0]]], y[:, 0])
    assert not set(items.patient.tolist()) & set(dls.valid.dataset.patient.tolist())
    assert dls_of(phantom_store, channels=3).one_batch()[0].shape == (4, 2, 3, 64, 64)
    first, again = (
        [torch.cat([b[0] for b in d.train]) for d in (dls_of(phantom_store, seed=s),)][0] for s in (3, 3)
    )
    assert torch.equal(first, again)
    assert all(
        torch.equal(a, b) for p, q in zip(dls.valid, dls.valid) for a, b in zip(p, q)
    )  # the same draws in every pass
    assert len(dls.train) == 2 and len({int(i) for _, _, ids in dls.train for i in ids[:, 0]}) == 8
    assert (
        len(pair_dls(phantom_store, parts(phantom_store)[0], bs=7, device='cpu').train) == 1
    )  # 8 clips: the eighth would be alone
    assert len(dls_of(phantom_store, unit='frame', per_epoch=6).train) == 2


@pytest.mark.parametrize('unit', ['clip', 'frame'])
@pytest.mark.parametrize('pair', ['mix', 'two', 'same'])
def test_views_are_what_they_say(phantom_store, unit, pair):
    dls = dls_of(phantom_store, unit=unit, pair=pair, augment=None, bs=8)
    items, pixels = dls.train.dataset, torch.tensor(np.asarray(phantom_store.images)).float() / 255
    x, y, ids = dls.one_batch()
    for views, (number, _) in zip(x[:, :, 0], ids.tolist()):
        row = int(parts(phantom_store)[0]['row'].iloc[number]) if unit == 'frame' else None
        clip = number if unit == 'clip' else int(items.clip_of[(items.number == number).nonzero()[0, 0]])
        rows = items.rows[items.start[clip] : items.start[clip] + items.count[clip]]
        is_row = [[bool(torch.allclose(v, pixels[r], atol=1e-6)) for r in rows] for v in views]
        if pair == 'mix':
            fits = []  # each view is a mean of two frames of its clip
            for v in views:
                basis = pixels[rows].flatten(1).T
                w = torch.linalg.lstsq(basis, v.flatten()[:, None]).solution[:, 0]
                fits.append(float((basis @ w - v.flatten()).abs().max()))
                assert abs(w.sum() - 1) < 1e-3 and (w.abs() > 1e-3).sum() <= 2
            assert max(fits) < 1e-3
        else:
            assert all(any(r) for r in is_row) and torch.equal(*views) == (pair == 'same')
            if unit == 'frame':
                assert row in [int(r) for r, hit in zip(rows, is_row[0]) if hit]


def test_short_clips_and_missing_labels(phantom_store):
    train, _ = parts(phantom_store)
    names = train['clip'].unique()
    short = pd.concat([train[train['clip'] == c].iloc[:n] for c, n in zip(names, (1, 2, 3, 4))]).assign(
        label=['covid', None, 'viral', np.nan] + ['negative'] * 6
    )
    short['patient'] = short['patient'].where(short['clip'] != names[3], None)
    dls = pair_dls(phantom_store, short, bs=4, augment=None, device='cpu')
    x, y, ids = dls.one_batch()
    at = {int(n): i for i, n in enumerate(ids[:, 0])}
    assert torch.equal(x[at[0], 0], x[at[0], 1])  # one frame: twice
    assert not torch.equal(x[at[1], 0], x[at[1], 1])
    frames = (
        torch.tensor(phantom_store.images[short[short['clip'] == names[1]]['row'].to_numpy()]).float() / 255
    )
    assert {tuple(v.flatten().tolist()) for v in frames} == {
        tuple(v.flatten().tolist()) for v in x[at[1], :, 0]
    }  # two frames: both, unmixed
    assert y.sum() == 2 and y[at[0], :, 0].sum() == 2 and ids[at[3], 1] == -1
    unknown = pair_dls(phantom_store, train.drop(columns=['label', 'patient']), bs=4, device='cpu')
    assert (
        unknown.one_batch()[1].sum() == 0
        and (unknown.one_batch()[2][:, 1] == -1).all()
        and unknown.labelled == []
    )


def test_label_budget():
    table = pd.DataFrame(
        dict(
            clip=[f'c{i:04d}' for i in range(1051)], label=np.repeat(['a', 'b', 'c', None], [1000, 30, 20, 1])
        )
    )
    assert len(label_budget(table[:1050], 0.01, 'abc')) == math.ceil(10.5)
    budgets = [set(label_budget(table, r, 'abc')) for r in (0, 0.001, 0.01, 0.1, 1)]
    assert [len(b) for b in budgets] == [0, 2, 11, 105, 1050] and all(
        a <= b for a, b in zip(budgets, budgets[1:])
    )
    assert set(table[table['clip'].isin(budgets[2])]['label']) == set('abc')
    assert label_budget(table, 0.01, 'abc', seed=1) != label_budget(table, 0.01, 'abc')
    with pytest.raises(ValueError, match='label_rate'):
        label_budget(table, 1.1)


def test_label_rate_hides_labels_in_training_only(phantom_store):
    dls = dls_of(phantom_store, label_rate=0.3, bs=8)
    _, y, ids = dls.one_batch()
    has = y.sum((1, 2)) > 0
    assert (
        sorted(dls.train.dataset.clips[i] for i in ids[has, 0].tolist()) == sorted(dls.labelled)
        and len(dls.labelled) == 3
    )
    assert (dls.valid.dataset.target.sum(1) == 1).all() and (dls.train.dataset.truth.sum(1) == 1).all()


def test_bad_batches(phantom_store):
    train, valid = parts(phantom_store)
    with pytest.warns(UserWarning, match='8 clips are fewer than bs=32'):
        dls = pair_dls(phantom_store, train, bs=32, device='cpu')
    assert dls.train.bs == 8 and len(dls.train) == 1
    one = train[train['clip'] == train['clip'].iloc[0]]
    for t, bs in ((one, 4), (train, 1), (train[:0], 4)):
        with pytest.raises(ValueError, match='no negatives'):
            pair_dls(phantom_store, t, bs=bs, device='cpu')
    with pytest.raises(ValueError, match='no negatives'):
        nt_xent(torch.randn(1, 4), torch.randn(1, 4))
    with pytest.raises(ValueError, match='unit'):
        pair_dls(phantom_store, train, unit='video', device='cpu')
    with pytest.raises(ValueError, match='pair'):
        pair_dls(phantom_store, train, pair='three', device='cpu')
    with pytest.raises(TableError, match="column 'clip'"):
        pair_dls(phantom_store, train.drop(columns='clip'), device='cpu')


# ---- model and methods


def test_counts():
    def count(m):
        return sum(p.numel() for p in m.parameters())

    net = ContrastiveNet(create_backbone(channels=3), 12)
    assert count(net) == 11_576_652 and count(net.projection) == 393_984 and count(net.head) == 6_156
    assert count(ContrastiveNet(net.backbone, 12, classify='projection')) == 11_573_580
    assert ContrastiveNet(net.backbone).head is None


def test_net_takes_views_and_frames():
    torch.manual_seed(0)
    net, x = ContrastiveNet(tiny(), 3, 5), torch.rand(4, 2, 1, 40, 40)
    h, z, logits = net(x)
    assert h.shape == (4, 2, 8) and z.shape == (4, 2, 5) and logits.shape == (4, 2, 3)
    assert torch.allclose(net(x[:, 1])[1], z[:, 1], atol=1e-6) and torch.allclose(
        net.backbone((x[:, 0] - 0.5) / 0.25), h[:, 0], atol=1e-6
    )


METHODS = [USCL, SimCLR, Supervised, lambda: MoCo(queue=16, parts=2)]


@pytest.mark.parametrize('build', METHODS)
def test_loss_is_given_back_and_a_second_fit_works(phantom_store, tmp_path, build):
    dls, net, method = dls_of(phantom_store), ContrastiveNet(tiny(True), 3, 6), build()
    learn = pair_learner(dls, net, method)
    learn.path, own = tmp_path, learn.loss_func
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, stop_div=False, suggest_funcs=None, show_plot=False)
        assert learn.loss_func is own
        learn.fit(1)
        assert learn.loss_func is own

        def stop(*args):
            raise KeyboardInterrupt

        _compute, method.compute = method.compute, stop
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1)
        assert learn.loss_func is own
        del method.compute
        learn.fit(1)
        assert learn.loss_func is own
        loss = learn.validate()[0]
        assert math.isfinite(loss) and learn.loss_func is own
        preds = learn.get_preds(ds_idx=1)
        assert learn.loss_func is own and len(preds[0][1]) == 4


def test_lr_find_leaves_queue_and_momentum_encoder(phantom_store, tmp_path):
    learn = pair_learner(
        dls_of(phantom_store), ContrastiveNet(tiny(True), 3, 6), method := MoCo(queue=16, momentum=0.5)
    )
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        before = (
            {k: v.clone() for k, v in method.encoder.state_dict().items()},
            {k: v.clone() for k, v in method.memory.items()},
        )
        learn.lr_find(num_it=4, stop_div=False, suggest_funcs=None, show_plot=False)
    assert all(torch.equal(before[0][k], v) for k, v in method.encoder.state_dict().items()) and all(
        torch.equal(before[1][k], v) for k, v in method.memory.items()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.encoder.modules()) and not any(
        p.requires_grad for p in method.encoder.parameters()
    )


def test_moco_by_hand(phantom_store):
    dls, net = dls_of(phantom_store), ContrastiveNet(tiny(), 3, 6)
    method = MoCo(queue=8, momentum=0.9)
    learn = pair_learner(dls, net, method, lr=0.1)
    first = {k: v.clone() for k, v in net.state_dict().items()}
    seen = []
    compute = method.compute

    def spy(pred, y, ids):
        queue = {k: v.clone() for k, v in method.memory.items()}
        second, training = method.second, method.training
        loss = compute(pred, y, ids)
        if training:
            seen.append(
                (
                    pred[1].detach(),
                    second,
                    ids,
                    queue,
                    loss.detach(),
                    [p.clone() for p in method.encoder.parameters()],
                    [p.detach().clone() for p in net.parameters()],
                )
            )
        return loss

    method.compute = spy
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
    assert len(seen) == 4 and int(method.memory['at']) == 0 and int(method.memory['steps']) == 4
    old = list(first.values())
    for *_, encoder, weights in seen:
        old = [0.9 * a + 0.1 * b for a, b in zip(old, weights)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(old, encoder))
    q, second, ids, queue, loss, *_ = seen[-1]
    with torch.no_grad():
        keys = F.normalize(method.encoder(second)[1], dim=1)
    negative = ids[:, None, 1] != queue['ids'][:, 1]  # of one patient's clips, and the clip itself, none
    want = 0.0
    for i in range(4):
        qi = F.normalize(q[i], dim=0)
        terms = torch.cat([(qi @ keys[i])[None], queue['keys'][negative[i]] @ qi]) / 0.2
        want += float(terms.logsumexp(0) - terms[0]) / 4
    assert math.isclose(want, float(loss), rel_tol=1e-5)
    assert torch.allclose(method.memory['keys'][4:], keys, atol=1e-6) and torch.equal(
        method.memory['ids'][4:], ids
    )


def test_moco_queue_must_fit(phantom_store):
    learn = pair_learner(dls_of(phantom_store), ContrastiveNet(tiny(), 3, 6), MoCo(queue=18))
    with (
        learn.no_bar(),
        learn.no_logging(),
        pytest.raises(ValueError, match='queue of 18 is not a multiple of the batch size 4: take 16'),
    ):
        learn.fit(1)


def test_uscl_is_both_losses():
    torch.manual_seed(0)
    pred, y, ids = (
        (torch.randn(4, 2, 8), torch.randn(4, 2, 6), torch.randn(4, 2, 3)),
        torch.zeros(4, 2, 3),
        torch.tensor([[0, 0], [1, 0], [2, 1], [3, -1]]),
    )
    y[:2, :, 1] = 1
    contrast, ce = (
        nt_xent(pred[1][:, 0], pred[1][:, 1], 0.5, ids[:, 1]),
        F.cross_entropy(pred[2][:2].flatten(0, 1), torch.ones(4, dtype=torch.int64)),
    )
    assert torch.allclose(USCL().compute(pred, y, ids), contrast + 0.2 * ce)
    assert torch.allclose(USCL(views='sum').compute(pred, y, ids), contrast + 0.4 * ce)
    assert torch.allclose(
        SimCLR(by_patient=False).compute(pred, y, ids), nt_xent(pred[1][:, 0], pred[1][:, 1])
    )
    assert torch.allclose(USCL().compute(pred, 0 * y, ids), contrast)
    frames = USCL(by_patient=False).compute(pred, 0 * y, ids)
    assert torch.allclose(frames, nt_xent(pred[1][:, 0], pred[1][:, 1], 0.5))
    with pytest.raises(ValueError, match='needs a classifier'):
        USCL().compute((*pred[:2], None), y, ids)


def test_representation_measures():
    from sklearn.neighbors import KNeighborsClassifier

    torch.manual_seed(0)
    a = F.normalize(torch.randn(30, 4), dim=1)
    d = (a[:, None] - a).square().sum(-1)[~torch.eye(30, dtype=torch.bool)]
    assert math.isclose(uniformity(a), float((-2 * d).exp().mean().log()), rel_tol=1e-5)
    assert alignment(a, a) < 1e-9 and math.isclose(alignment(a, -a), 4, rel_tol=1e-5)
    bank, y, query, qy = (
        torch.randn(40, 4),
        torch.randint(3, (40,)),
        torch.randn(20, 4),
        torch.randint(3, (20,)),
    )
    theirs = KNeighborsClassifier(1, metric='cosine').fit(bank, y).score(query, qy)
    assert math.isclose(knn_accuracy(query, qy, bank, y, k=1), theirs, rel_tol=1e-6)
    patient = torch.arange(40) % 2
    assert knn_accuracy(bank, y, bank, y, k=1) == 1 > knn_accuracy(bank, y, bank, y, patient, patient, k=1)
    assert math.isnan(knn_accuracy(bank, y, bank, y, 0 * patient, 0 * patient))  # one patient: no neighbours


def test_timm_backbone(phantom_store, tmp_path):
    dls = pair_dls(phantom_store, parts(phantom_store)[0], bs=4, device='cpu')
    net, history = pretrain(USCL(), dls, create_backbone('mobilenetv3_small_050'), 1, tmp_path, log=0)
    assert len(history) == 1 and history['train_loss'].notna().all() and history['knn'].isna().all()


# ---- runs


@pytest.mark.parametrize('build', [USCL, lambda: MoCo(queue=16, parts=2)])
def test_interrupted_runs_resume_to_the_same_bits(phantom_store, tmp_path, build):
    def run(folder, stop_at=None):
        method, calls, dls = build(), [0], dls_of(phantom_store)
        compute = method.compute

        def count(*args):
            calls[0] += 1
            if calls[0] == stop_at:
                raise KeyboardInterrupt
            return compute(*args)

        method.compute = count
        return pretrain(method, dls, tiny(True), 4, tmp_path / folder, warm=1)

    whole, history = run('a')
    with pytest.raises(KeyboardInterrupt):
        run('b', 7)  # the third epoch has begun
    assert (tmp_path / 'b' / 'checkpoint.pt').exists()
    resumed, again = run('b')
    assert same(whole, resumed) and history.drop(columns='seconds').equals(again.drop(columns='seconds'))
    loaded, stored = run('a', 1)  # finished: nothing is computed
    assert same(whole, loaded) and stored.equals(history)
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == [
        '.lock',
        'backbone.safetensors',
        'history.csv',
        'net.safetensors',
        'run.json',
    ]
    assert history['lr'].round(9).tolist() == [3e-4, 3e-4, round(3e-4 * 0.75, 9), round(3e-4 * 0.25, 9)]


def test_other_architectures_and_other_runs_are_told(phantom_store, tmp_path):
    dls = dls_of(phantom_store)
    pretrain(SimCLR(), dls, tiny(), 1, tmp_path / 'a')
    with pytest.raises(ValueError, match=r'net.0.weight \(4, 1, 5, 5\) -> \(6, 1, 5, 5\)'):
        pretrain(SimCLR(), dls, tiny(width=6), 1, tmp_path / 'a')
    with pytest.raises(ValueError, match='another run.*temperature'):
        pretrain(SimCLR(0.1), dls, tiny(), 1, tmp_path / 'a')
    with pytest.raises(ValueError, match='another run.*method SimCLR -> USCL'):
        pretrain(USCL(), dls, tiny(), 1, tmp_path / 'a')

    class Stop(USCL):
        def compute(self, pred, y, ids):
            if self.epoch:
                raise KeyboardInterrupt
            return super().compute(pred, y, ids)

    with pytest.raises(KeyboardInterrupt):
        pretrain(Stop(), dls, tiny(), 2, tmp_path / 'b')
    with pytest.raises(ValueError, match=r'checkpoint.pt is of another architecture.*(?s:.)*net.0.weight'):
        pretrain(Stop(), dls, tiny(width=6), 2, tmp_path / 'b')


def test_all_labels_missing_and_identical_frames(phantom_store, tmp_path):
    train, _ = parts(phantom_store)
    one = train.groupby('clip')['row'].transform('first')
    dls = pair_dls(phantom_store, train.assign(row=one, label=None), bs=4, device='cpu')
    for i, method in enumerate((USCL(), Supervised(), MoCo(queue=8))):
        net, history = pretrain(method, dls, tiny(True), 1, tmp_path / str(i))
        assert (
            np.isfinite(history['train_loss']).all()
            and all(v.isfinite().all() for v in net.state_dict().values())
            and history['alignment'].iloc[0] < 1e-9
        )


# ---- two processes


def _rank(rank, world, folder, rows):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world)
    dls = dls_of(FrameStore(rows))
    torch.save(list(dls.train), f'{folder}/batches{rank}.pt')
    torch.manual_seed(0)
    net, method = ContrastiveNet(tiny(), 3, 6), USCL()
    x, y, ids = next(iter(dls_of(FrameStore(rows), label_rate=0.4).train))
    loss = method.compute(net(x), y, ids)
    loss.backward()
    torch.save((loss.detach(), [p.grad for p in net.parameters()]), f'{folder}/grads{rank}.pt')
    nets = [
        pretrain(
            m,
            dls_of(FrameStore(rows)),
            tiny() if rank == 0 else Tiny(),
            2,
            f'{folder}/{type(m).__name__}',
            precision='fp32',
        )
        for m in (USCL(), MoCo(queue=8))
    ]
    torch.save(
        [(n.state_dict(), h.drop(columns='seconds').to_numpy()) for n, h in nets], f'{folder}/nets{rank}.pt'
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(phantom_store, tmp_path):
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path), str(phantom_store.folder)), nprocs=2)

    def load(name):
        return [torch.load(tmp_path / f'{name}{r}.pt', weights_only=False) for r in (0, 1)]

    for (x, y, ids), *both in zip(dls_of(phantom_store).train, *load('batches')):
        for one, a, b in zip((x, y, ids), *both):
            assert torch.equal(one, torch.cat([a, b]))
    torch.manual_seed(0)
    net = ContrastiveNet(tiny(), 3, 6)
    x, y, ids = next(iter(dls_of(phantom_store, label_rate=0.4).train))
    loss = USCL().compute(net(x), y, ids)
    loss.backward()
    (la, ga), (lb, gb) = load('grads')
    assert abs(float(loss - (la + lb) / 2)) < 1e-5
    for p, a, b in zip(net.parameters(), ga, gb):
        assert torch.allclose(p.grad, (a + b) / 2, atol=1e-5)
    for method, a, b in zip((USCL(), MoCo(queue=8)), *load('nets')):
        one, history = pretrain(
            method,
            dls_of(phantom_store),
            tiny(),
            2,
            tmp_path / f'one{type(method).__name__}',
            precision='fp32',
        )
        for k, v in one.state_dict().items():
            assert torch.allclose(v, a[0][k], atol=1e-4) and torch.equal(a[0][k], b[0][k])
        assert np.allclose(history.drop(columns='seconds'), a[1], atol=1e-4)
