"Tests that a map can fail: hand-computed values, independent references, and bad input."

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lus_fastai.core import CLASSES, TableError
from lus_fastai.data.fan import Fan
from lus_fastai.explain.sanity_checks import (
    deletion_insertion,
    edge_map,
    heat_in_fan,
    heat_table,
    only_inside,
    only_outside,
    outside_fan_check,
    pointing_game,
    predict_source,
    randomisation_check,
    randomise_layers,
    rank_correlation,
    show_deletion,
    small_learner,
    structural_similarity,
)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )


def gradient(model, x, target):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0][:, 0]


def moved(a, b):
    return [n for (n, p), q in zip(a.named_parameters(), b.parameters()) if not torch.equal(p, q)]


def test_layers_fall_from_the_top():
    m = net()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    copies = list(randomise_layers(m))
    assert [n for n, _ in copies] == ['7', '3', '0']
    assert (
        moved(m, copies[0][1]) == ['7.weight', '7.bias']
        and len(moved(m, copies[1][1])) == 4
        and len(moved(m, copies[2][1])) == 7 + (before['1.bias'] != 0).any().item()
    )
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    alone = dict(randomise_layers(m, cascade=False))
    assert set(moved(m, alone['3'])) == {'3.weight', '3.bias'}
    assert torch.equal(alone['7'][7].weight, copies[0][1][7].weight) and not torch.equal(
        alone['7'][7].weight, dict(randomise_layers(m, 1))['7'][7].weight
    )
    with pytest.raises(ValueError, match="no layer.*'conv'.*there are"):
        randomise_layers(m, layers=['conv'])
    with pytest.raises(ValueError, match='no parameters'):
        randomise_layers(nn.ReLU())


def test_order_of_the_forward_pass():
    "The layer that runs last is randomised first, wherever it is defined; hooks are gone."

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.last(self.first(x).mean((2, 3)))

    m = Backwards().train()
    out = randomisation_check(m, torch.rand(2, 1, 12, 12), gradient)
    assert (
        out.layer.tolist() == ['last', 'first']
        and m.training
        and not any(k._forward_pre_hooks for k in m.modules())
    )


def test_check_against_references():
    import scipy.stats as stats
    import skimage.metrics as skimage

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 20, 17))
    b += a
    b[0] = b[0].round()
    assert np.allclose(
        rank_correlation(a, b), [stats.spearmanr(p.ravel(), q.ravel()).statistic for p, q in zip(a, b)]
    )

    def scaled(m):
        return (abs(m) - abs(m).min()) / np.ptp(abs(m))

    ours, theirs = (
        structural_similarity(a, b),
        [
            skimage.structural_similarity(
                scaled(p),
                scaled(q),
                data_range=1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                full=True,
            )[1][5:-5, 5:-5].mean()
            for p, q in zip(a, b)
        ],
    )
    assert np.allclose(ours, theirs, atol=1e-6)


def test_randomisation_check():
    x, m = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(0)), net()
    edges, grad = randomisation_check(m, x, edge_map), randomisation_check(m, x, gradient)
    assert np.allclose(edges.iloc[:, 1:], 1) and grad.spearman_abs.iloc[-1] < 0.5
    pd.testing.assert_frame_equal(grad, randomisation_check(m, x, gradient))
    assert all(p.grad is None for p in m.parameters())
    with pytest.raises(ValueError, match=r'hold NaN'):
        randomisation_check(m, x, lambda m, x, t: x[:, 0] * float('nan'))
    with pytest.raises(ValueError, match='constant'):
        randomisation_check(m, x, lambda m, x, t: x[:, 0] * 0)
    with pytest.raises(ValueError, match='method must be'):
        randomisation_check(m, x, 'tea')


def test_edges_of_a_step():
    x = torch.zeros(1, 1, 5, 6)
    x[..., 3:] = 1
    assert edge_map(None, x)[0, 2].tolist() == [0, 0, 4, 4, 0, 0]


def test_heat_by_hand():
    maps, fan = torch.tensor([[[1.0, -3], [0, 4]]]), np.array([[True, True], [False, False]])
    assert heat_in_fan(maps, fan) == pytest.approx([4 / 8]) and heat_in_fan(
        maps, fan, positive=True
    ) == pytest.approx([1 / 5])
    t = heat_table(np.concatenate([maps, 0 * maps]), fan)
    assert t.area.tolist() == [0.5, 0.5] and t.ratio[0] == pytest.approx(1) and np.isnan(t.heat[1])
    with pytest.raises(ValueError, match='resize'):
        heat_in_fan(maps, np.ones((2, 3), bool))
    with pytest.raises(ValueError, match='other values'):
        heat_in_fan(maps, np.full((2, 2), 7))
    with pytest.raises(ValueError, match='NaN'):
        heat_in_fan(maps / 0, fan)


def test_fan_objects():
    fan = Fan('linear', (8, 10), 0, 8, 2, 7)
    m = np.ones((2, 8, 10))
    share = fan.mask().mean()
    assert (
        heat_in_fan(m, fan) == pytest.approx([share] * 2)
        and heat_in_fan(m, [fan, fan]) == pytest.approx([share] * 2)
        and 0 < share < 1
    )


class Sum(nn.Module):
    "Probability of class 0 is the share of the weight that is left."

    def forward(self, x):
        p = (x.flatten(1) @ torch.tensor([0.5, 0.25, 0.25, 0.0])).clamp(1e-6, 1 - 1e-6)
        return torch.stack([p, 1 - p], 1).log()


def test_deletion_by_hand():
    x = torch.ones(2, 1, 2, 2)
    curves, areas = deletion_insertion(
        Sum(), x, torch.tensor([[[4.0, 3], [2, 1]], [[1.0, 2], [3, 4]]]), target=0, steps=4
    )
    c = curves.set_index(['frame', 'mode', 'order']).probability
    assert np.allclose(c[0, 'deletion', 'map'], [1, 0.5, 0.25, 0, 0], atol=1e-5) and np.allclose(
        c[1, 'deletion', 'map'], [1, 1, 0.75, 0.5, 0], atol=1e-5
    )
    assert np.allclose(c[0, 'insertion', 'map'], [0, 0.5, 0.75, 1, 1], atol=1e-5) and np.allclose(
        c[0, 'deletion', 'reversed'], c[1, 'deletion', 'map']
    )
    a = areas.set_index(['frame', 'mode', 'order']).auc
    assert a[0, 'deletion', 'map'] == pytest.approx((0.5 + 0.5 + 0.25) / 4, abs=1e-5) and a[
        0, 'deletion', 'map'
    ] + a[0, 'insertion', 'reversed'] == pytest.approx(0.625)
    same = deletion_insertion(
        Sum(), x, torch.tensor([[[4.0, 3], [2, 1]], [[1.0, 2], [3, 4]]]), target=0, steps=4, bs=1
    )[0]
    pd.testing.assert_frame_equal(curves, same)
    half = deletion_insertion(Sum(), x, torch.ones(2, 2, 2), target=0, steps=1, fill=0.5 * x)[0]
    assert half[(half['mode'] == 'deletion') & (half.share == 1)].probability.to_numpy() == pytest.approx(0.5)
    import matplotlib

    matplotlib.use('Agg')
    assert len(show_deletion(curves)[0].lines) == 3


@pytest.mark.parametrize(
    'maps, options, text',
    [
        (np.zeros((1, 3, 3)), {}, 'do not fit'),
        (np.full((2, 2, 2), np.nan), {}, 'NaN'),
        (np.zeros((2, 2, 2)), dict(target=2, steps=2), 'out of range'),
        (np.zeros((2, 2, 2)), dict(steps=9), r'steps must be 1\.\.4'),
    ],
)
def test_bad_deletion(maps, options, text):
    with pytest.raises(ValueError, match=text):
        deletion_insertion(Sum(), torch.ones(2, 1, 2, 2), maps, **options)


def test_deletion_refuses_segmenters():
    with pytest.raises(ValueError, match='class probability'):
        deletion_insertion(nn.Conv2d(1, 2, 1), torch.ones(1, 1, 4, 4), np.ones((1, 4, 4)), steps=4)


def test_pointing_by_hand():
    masks = np.full((3, 6, 6), 6)
    masks[0, 2, 2] = masks[1, 0, 0] = 1
    maps = np.zeros((3, 6, 6))
    maps[0, 2, 4] = 1
    maps[1, 5, 5] = 1
    assert pointing_game(maps, masks, tolerance=2) == dict(
        hits=1.0, total=2, left_out=1, rate=0.5, chance=pytest.approx((13 + 6) / 72)
    )
    assert pointing_game(maps, masks, 1, tolerance=0)['hits'] == 0
    flat = pointing_game(0 * maps, masks)
    assert flat['rate'] == pytest.approx(flat['chance'])
    none = pointing_game(maps, masks, 'A-line')
    assert none['total'] == 0 and none['left_out'] == 3 and np.isnan(none['rate'])
    with pytest.raises(ValueError, match='differ in shape'):
        pointing_game(maps[:, :5], masks)
    with pytest.raises(ValueError, match='NaN'):
        pointing_game(maps * np.nan, masks)
    with pytest.raises(ValueError, match='no code named'):
        pointing_game(maps, masks, 'Z-line')


@pytest.mark.parametrize('shape', [(4, 5), (3, 4, 5), (3, 1, 4, 5), (3, 3, 4, 5)])
def test_blanking(shape):
    rng = np.random.default_rng(0)
    a, fan = rng.integers(1, 255, shape, dtype=np.uint8), rng.random((4, 5)) < 0.5
    for x in (a, torch.from_numpy(a)):
        i, o = only_inside(x, fan), only_outside(x, fan)
        assert (
            i.dtype == x.dtype
            and ((i + o) == x).all()
            and (np.asarray(i)[..., ~fan] == 0).all()
            and (np.asarray(o)[..., fan] == 0).all()
        )
    assert (only_outside(a, fan, fill=9)[..., fan] == 9).all()


def test_store_views(phantom_store):
    "A view blanks as it is read, whatever the rows are asked for by; views nest."
    fan = np.zeros((64, 64), bool)
    fan[8:, :40] = True
    view, images = only_inside(phantom_store, fan, fill=7), np.asarray(phantom_store.images)
    for rows in (3, slice(1, 4), np.array([5, 0])):
        assert (view.images[rows] == np.where(fan, images[rows], 7)).all() and view.images[
            rows
        ].dtype == np.uint8
    assert (
        len(view) == len(phantom_store) and (only_outside(view, fan).images[:] == np.where(fan, 0, 7)).all()
    )


@pytest.mark.slow
def test_outside_and_source(phantom_store, tmp_path):
    fan, built = np.ones((64, 64), bool), []
    fan[:8] = False

    def build(dls):
        built.append(list(dls.vocab))
        return small_learner(dls)

    options = dict(path=tmp_path / 'a', sees=('outside', 'inside'), epochs=1, folds=2, build=build)
    out = outside_fan_check(phantom_store, fan, **options)
    assert (
        out.index.tolist() == ['outside', 'inside']
        and (out.majority == 4 / 12).all()
        and (out.clips == 12).all()
        and (out.patients == 6).all()
        and built == [sorted(CLASSES)] * 8
    )  # two runs of two folds, and two more each for the claim
    assert ((0 <= out.low) & (out.low <= out.accuracy) & (out.accuracy <= out.high) & (out.high <= 1)).all()
    pd.testing.assert_frame_equal(out, outside_fan_check(phantom_store, fan, **options))
    assert len(built) == 12  # finished folds are read, not trained again
    outside_fan_check(phantom_store, ~fan, **{**options, 'sees': ('outside',)})
    assert len(built) == 16  # other fans are another run
    few = phantom_store.frames.groupby('source')['patient'].nunique()
    found = predict_source(phantom_store, ['label', 'source'], path=tmp_path / 'b', epochs=1, folds=2)
    assert found.loc['label', 'left_out'] == '' and all(
        s in found.loc['source', 'left_out'] for s in few.index[few < 2]
    )


def test_fans_of_the_table(phantom_store, tmp_path):
    "Fans come from the column `fan`, resized to the store; clips without one are left out and counted."
    import json

    frames = phantom_store.frames.copy()
    frames['fan'] = json.dumps(Fan('linear', (96, 96), 12, 96, 0, 95).to_dict())
    frames.loc[frames['clip'] == frames['clip'].iloc[0], 'fan'] = ''

    class Store:
        images, masks, folder, size, id = (
            phantom_store.images,
            None,
            phantom_store.folder,
            (64, 64),
            phantom_store.id,
        )

        def __len__(self):
            return len(phantom_store)

    store = Store()
    store.frames = frames
    out = outside_fan_check(store, path=tmp_path, epochs=1, folds=2)
    assert out.clips.iloc[0] == 11 and out.left_out.iloc[0] == '1 clips without a fan'
    store.frames = frames.assign(fan='')
    with pytest.raises(TableError, match='empty in every row'):
        outside_fan_check(store, path=tmp_path)
    store.frames = frames[frames['label'] == 'covid']
    with pytest.raises(ValueError, match="label 'covid'"):
        outside_fan_check(store, np.ones((64, 64), bool), path=tmp_path)


def test_bad_checks(phantom_store, tmp_path):
    with pytest.raises(TableError, match="no column 'fan'"):
        outside_fan_check(phantom_store, path=tmp_path / 'x')
    with pytest.raises(ValueError, match='resize'):
        outside_fan_check(phantom_store, np.ones((32, 32), bool), path=tmp_path / 'x')
    with pytest.raises(ValueError, match="got \\['below'\\]"):
        outside_fan_check(phantom_store, np.ones((64, 64), bool), path=tmp_path / 'x', sees=['below'])
    with pytest.raises(TableError, match="missing column.*'site'"):
        predict_source(phantom_store, ['site'], path=tmp_path / 'x')
    with pytest.raises(ValueError, match='there is nothing to predict'):
        predict_source(phantom_store, ['kind'], path=tmp_path / 'x')
