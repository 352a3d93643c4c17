"Scores of overlapping masks: by hand, by brute force, and for every pair of masks that can be drawn."

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from lus_fastai.core import MaskSet, TableError
from lus_fastai.stats.bootstrap import bootstrap
from lus_fastai.stats.classification import iou
from lus_fastai.stats.segmentation import (
    boundary_f1,
    connected_components,
    dice_scores,
    evaluate_masks,
    false_positive_area,
    hd95,
    iou_scores,
    mask_confusions,
    mask_scores,
    worst_cases,
)
from lus_fastai.train.losses import BCEDiceLoss, SoftDiceLoss, soft_dice

masks = arrays(bool, (2, 1, 2, 7, 9))  # prediction and truth


def edge(m):
    "Pixels of the mask with a neighbour that is not, one by one."
    return [
        (y, x)
        for y, x in np.argwhere(m)
        if not all(
            0 <= y + a < m.shape[0] and 0 <= x + b < m.shape[1] and m[y + a, x + b]
            for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))
        )
    ]


def brute(a, b, spacing=(1, 1), within=2):
    "HD95 and boundary F1 from all pairs of edge pixels."
    ea, eb = edge(a), edge(b)
    if not ea and not eb:
        return np.nan, np.nan
    if not ea or not eb:
        return np.hypot(a.shape[0] * spacing[0], a.shape[1] * spacing[1]), 0.0
    d = np.array([[np.hypot((p[0] - q[0]) * spacing[0], (p[1] - q[1]) * spacing[1]) for q in eb] for p in ea])
    near = d.min(1), d.min(0)
    p, r = ((x <= within).mean() for x in near)
    return max(np.percentile(x, 95) for x in near), 2 * p * r / (p + r) if p + r else 0.0


@settings(max_examples=60, deadline=None)
@given(masks)
def test_boundaries_by_brute_force(pair):
    p, t = pair
    want = np.array([brute(p[0, k], t[0, k], (1, 0.5)) for k in range(2)])
    assert np.allclose(hd95(p, t, spacing=(1, 0.5))[0], want[:, 0], equal_nan=True) and np.allclose(
        boundary_f1(p, t, spacing=(1, 0.5))[0], want[:, 1], equal_nan=True
    )


@settings(max_examples=60, deadline=None)
@given(masks)
def test_pixels_by_counting(pair):
    p, t = pair
    d, i, f = dice_scores(p, t), iou_scores(p, t), false_positive_area(p, t)
    for k in range(2):
        a, b = {*map(tuple, np.argwhere(p[0, k]))}, {*map(tuple, np.argwhere(t[0, k]))}
        if a | b:
            assert d[0, k] == pytest.approx(2 * len(a & b) / (len(a) + len(b))) and i[0, k] == pytest.approx(
                len(a & b) / len(a | b)
            )
        else:
            assert np.isnan(d[0, k]) and np.isnan(i[0, k])
        assert f[0, k] == pytest.approx(len(a - b) / 63)
    assert np.allclose(i, d / (2 - d), equal_nan=True)
    for score in (dice_scores, iou_scores, hd95, boundary_f1):  # what both are called makes no difference
        assert np.allclose(score(p, t), score(t, p), equal_nan=True)
        assert np.allclose(score(p, p)[p.any((2, 3))], 0 if score is hd95 else 1)
    table = mask_scores(p, t, pd.DataFrame({'patient': ['x']}), 'ab')
    for name, score in dict(
        dice=dice_scores,
        iou=iou_scores,
        hd95=hd95,
        boundary_f1=boundary_f1,
        false_positive_area=false_positive_area,
        components=connected_components,
    ).items():
        assert np.allclose(table[name], score(p, t)[0], equal_nan=True), name
    assert np.array_equal(table['missed'], connected_components(t, p)[0])


@settings(max_examples=40, deadline=None)
@given(arrays(bool, (1, 1, 8, 8)), arrays(bool, (1, 1, 8, 8)))
def test_components_by_flooding(m, other):
    left, found = {*map(tuple, np.argwhere(m[0, 0]))}, []
    while left:
        todo, island = [left.pop()], []
        while todo:
            y, x = todo.pop()
            island.append((y, x))
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(island)
    assert connected_components(m)[0, 0] == len(found) and connected_components(m, other)[0, 0] == sum(
        not any(other[0, 0][p] for p in island) for island in found
    )


def test_empty_and_full_in_every_score():
    full = np.ones((1, 1, 6, 8), bool)
    none = ~full
    diagonal = 10.0
    for p, t, want in (
        (none, none, [np.nan, np.nan, np.nan, np.nan, 0, 0, 0]),
        (full, none, [0, 0, diagonal, 0, 1, 1, 0]),
        (none, full, [0, 0, diagonal, 0, 0, 0, 1]),
        (full, full, [1, 1, 0, 1, 0, 0, 0]),
    ):
        row = mask_scores(p, t, pd.DataFrame({'patient': ['x']}), ['a'])
        got = row[
            ['dice', 'iou', 'hd95', 'boundary_f1', 'false_positive_area', 'components', 'missed']
        ].to_numpy(float)[0]
        assert np.allclose(got, want, equal_nan=True), (p.all(), t.all(), got)
        n = 2 * (p & t).sum()
        assert float(soft_dice(p, t)) == pytest.approx((n + 1) / (p.sum() + t.sum() + 1))
        evaluate_masks(row, 10)


def test_soft_dice_is_keras():
    "The authors' lines: flatten all of the batch, then the ratio."
    rng = np.random.default_rng(0)
    y, p = rng.random((20, 1, 16, 16)) > 0.7, rng.random((20, 1, 16, 16), dtype=np.float32)
    flat_y, flat_p = y.ravel().astype(float), p.ravel().astype(float)
    assert float(soft_dice(p, y)) == pytest.approx(
        (2 * (flat_y * flat_p).sum() + 1) / (flat_y.sum() + flat_p.sum() + 1), rel=1e-5
    )
    two_p, two_y = np.concatenate([p, p[::-1]], 1), np.concatenate([y, y], 1)
    assert float(soft_dice(two_p, two_y)) == pytest.approx(
        np.mean([float(soft_dice(two_p[:, [k]], two_y[:, [k]])) for k in (0, 1)]), rel=1e-5
    )


def test_losses():
    from fastai.vision.all import TensorImage, TensorMask

    logits, y = torch.randn(3, 2, 8, 8, requires_grad=True), (torch.rand(3, 2, 8, 8) > 0.5).float()
    for loss in (SoftDiceLoss(), BCEDiceLoss()):
        value = loss(logits, y)
        value.backward()
        assert value.ndim == 0 and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
        typed = loss(TensorImage(logits.detach()), TensorMask(y))
        assert type(typed) is torch.Tensor and torch.isclose(typed, value.detach())
        assert torch.isclose(loss(torch.where(y > 0.5, 30.0, -30.0), y), torch.tensor(-1.0), atol=1e-5)
        with pytest.raises(ValueError, match='both'):
            loss(logits, y[:, :1])
    assert torch.isclose(
        BCEDiceLoss()(logits, y), torch.nn.BCEWithLogitsLoss()(logits, y) - soft_dice(logits.sigmoid(), y)
    )
    big = torch.full((4, 1, 256, 256), 8.0, dtype=torch.float16)  # sums beyond float16
    assert torch.isclose(SoftDiceLoss()(big, torch.ones(4, 1, 256, 256)), torch.tensor(-1.0), atol=1e-3)
    assert torch.equal(SoftDiceLoss().activation(logits), logits.sigmoid())


def test_a_network_learns_by_them():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 12, 12)
    y = (x > 0.6).float()
    for loss in (SoftDiceLoss(), BCEDiceLoss()):
        model = torch.nn.Conv2d(1, 1, 1)
        opt = torch.optim.Adam(model.parameters(), 0.3)
        before = loss(model(x), y).item()
        for _ in range(60):
            opt.zero_grad()
            value = loss(model(x), y)
            value.backward()
            opt.step()
        assert value.item() < before - 0.3


def test_probabilities_tensors_and_memory_maps(tmp_path):
    rng = np.random.default_rng(1)
    prob, y = rng.random((3, 2, 8, 8)), rng.random((3, 2, 8, 8)) > 0.5
    want = dice_scores(prob > 0.5, y)
    for p in (prob, prob.astype(np.float16), torch.tensor(prob), torch.tensor(prob).bfloat16().clamp(0, 1)):
        assert np.allclose(dice_scores(p, torch.tensor(y)), want, atol=0.1)
    assert np.array_equal(dice_scores(prob, y.astype(np.uint8)), want)
    assert not np.array_equal(dice_scores(prob, y, threshold=0.8), want)
    np.save(tmp_path / 'p.npy', prob)
    table = pd.DataFrame({'patient': list('abc'), 'path': list('uvw')})
    assert mask_scores(np.load(tmp_path / 'p.npy', mmap_mode='r'), y, table, 'ab').equals(
        mask_scores(prob, y, table, 'ab')
    )


@pytest.mark.parametrize(
    'pred, target, words',
    [
        (np.zeros((1, 1, 4, 4)), np.full((1, 1, 4, 4), 255), 'target > 127'),
        (np.full((1, 1, 4, 4), 255, np.uint8), np.zeros((1, 1, 4, 4)), 'pred > 127'),
        (np.full((1, 1, 4, 4), -2.0), np.zeros((1, 1, 4, 4)), 'sigmoid'),
        (np.full((1, 1, 4, 4), np.nan), np.zeros((1, 1, 4, 4)), 'nan'),
        (np.zeros((1, 1, 4, 4)), np.full((1, 1, 4, 4), 0.5), '0 and 1'),
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), r'\(n, k, h, w\)'),
        (np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 5)), r'\(1, 1, 4, 5\)'),
    ],
)
def test_bad_masks_are_named(pred, target, words):
    for score in (mask_confusions, dice_scores, iou_scores, hd95, boundary_f1, false_positive_area):
        with pytest.raises(ValueError, match=words):
            score(pred, target)
    if pred.ndim == 4:
        with pytest.raises(ValueError, match=words):
            mask_scores(pred, target, pd.DataFrame({'patient': ['x']}), 'a')


def test_a_table_that_does_not_fit():
    m = np.zeros((2, 1, 4, 4), bool)
    with pytest.raises(ValueError, match='1 rows'):
        mask_scores(m, m, pd.DataFrame({'patient': ['x']}), 'a')
    with pytest.raises(ValueError, match='2 names for 1 classes'):
        mask_scores(m, m, pd.DataFrame({'patient': list('xy')}), 'ab')
    scores = mask_scores(m, m, pd.DataFrame({'path': list('xy')}), 'a')
    with pytest.raises(TableError, match='patient'):
        evaluate_masks(scores)
    with pytest.raises(TableError, match='no patient'):
        evaluate_masks(scores.assign(patient=['x', None]))
    with pytest.raises(TableError, match='empty'):
        evaluate_masks(scores.assign(patient='x')[:0])


@pytest.fixture
def scores():
    rng = np.random.default_rng(2)
    y = rng.random((12, 3, 8, 8)) > 0.6
    y[:, 2] = False
    y[3, 1] = False  # a class that is nowhere, one that is not everywhere
    return mask_scores(
        y ^ (rng.random(y.shape) > 0.8),
        y,
        pd.DataFrame({'patient': np.repeat(list('abcd'), 3), 'class': 'ours wins'}),
        ('one', 'two', 'three'),
    ), y


def test_summary_is_that_of_metrics(scores):
    scores, y = scores
    out = evaluate_masks(scores, 300, seed=5)
    assert list(scores['class'].unique()) == ['one', 'two', 'three'] and len(scores) == 36
    value = out.set_index(['level', 'class', 'metric'])
    for c in ('one', 'two'):
        rows = scores[scores['class'] == c]
        cms = np.stack(
            [
                [[64 * 3 - t - p + s, p - s], [t - s, s]]
                for t, p, s in rows.groupby('patient')[['truth', 'predicted', 'shared']].sum().to_numpy()
            ]
        )
        v, low, high = bootstrap(cms, lambda cm: iou(cm)[..., 1], 300, seed=5)
        assert np.allclose(
            value.loc['pixel', c, 'iou'][['value', 'low', 'high']].astype(float), [v, low, high]
        )
        assert np.isclose(value.loc['image', c, 'dice']['value'], rows['dice'].mean()) and np.isclose(
            value.loc['image', c, 'components']['value'], rows['components'].mean()
        )
    assert value.loc['pixel', 'three', 'iou']['value'] == 0 and value.loc['image', 'three', 'hd95']['n'] == 0
    for level, metric in (
        ('pixel', 'iou'),
        ('image', 'hd95'),
    ):  # the mean is over classes that the truth holds
        assert np.isclose(
            value.loc[level, 'all', metric]['value'],
            np.mean([value.loc[level, c, metric]['value'] for c in ('one', 'two')]),
        )
    assert out.equals(evaluate_masks(scores, 300, seed=5)) and not out.equals(
        evaluate_masks(scores, 300, seed=6)
    )
    assert out.equals(
        evaluate_masks(
            scores.sample(frac=1, random_state=0)
            .sort_values('image', kind='stable')
            .sort_values(
                ['image', 'class'],
                key=lambda c: c.map(dict(one=0, two=1, three=2)) if c.name == 'class' else c,
            ),
            300,
            seed=5,
        )
    )
    alone = evaluate_masks(scores.query("patient == 'a'"), 50)
    assert alone[['low', 'high']].isna().all(axis=None) and alone['patients'].eq(1).all()


def test_a_class_absent_from_all_says_nothing_but_false_alarms(scores):
    rows = scores[0].query("`class` == 'three'")
    assert (
        (rows['iou'] == 0).all() and (rows['false_positive_area'] > 0).all() and (rows['missed'] == 0).all()
    )


def test_worst_cases_are_the_worst():
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    y = np.zeros((5, 2, 16, 16), bool)
    y[:, 0, 4:12, 4:12] = True
    y[:4, 1] = True
    p = y.copy()
    for i in range(5):
        p[i, 0, 4 : 4 + i] = False  # the later, the worse
    p[2, 1] = False
    s = MaskSet(np.zeros((5, 16, 16), np.uint8), y, ('box', 'all'), pd.DataFrame({'patient': list('abcde')}))
    scores = mask_scores(p, y, s.table, s.names)

    def titles(axs):
        return [ax.get_title().split('\n')[0] for ax in axs]

    assert titles(worst_cases(s, p, scores, n=3)) == ['2: all', '4: box', '3: box']
    assert titles(worst_cases(s, p, scores[scores['class'] == 'box'], by='hd95', n=2)) == ['4: box', '3: box']
    assert (
        titles(worst_cases(s, p, scores.query("`class` == 'box'"), n=7))[5:] == [''] * 3
    )  # fewer than asked for
    with pytest.raises(ValueError, match='boundary_f1'):
        worst_cases(s, p, scores, by='auc')
    with pytest.raises(ValueError, match='cyst'):
        worst_cases(s, p, scores.assign(**{'class': 'cyst'}))
    plt.close('all')


@pytest.mark.gpu
def test_on_the_gpu():
    logits, y = torch.randn(2, 1, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float()
    for loss in (SoftDiceLoss(), BCEDiceLoss()):
        assert torch.isclose(loss(logits.cuda(), y.cuda()).cpu(), loss(logits, y), atol=1e-5)
    assert np.array_equal(dice_scores(logits.cuda().sigmoid(), y.cuda()), dice_scores(logits.sigmoid(), y))
