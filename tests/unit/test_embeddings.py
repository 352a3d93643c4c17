"Features of a layer and their cache, maps and placing, thumbnails, neighbourhood purity."

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lus_fastai.core import TableError
from lus_fastai.data.loaders import frame_dls
from lus_fastai.explain import embeddings as embed
from lus_fastai.explain.embeddings import (
    _cells,
    features,
    pca_map,
    place_points,
    plot_embedding,
    plot_purity,
    plot_thumbnails,
    purity,
    tsne_map,
)


def net(c_in=1, seed=0, inplace=True):
    "A convolution, and a head like Covid-Net's: linear, batch norm, ReLU in place, dropout, linear."
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(c_in, 6, 5, 4),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
        nn.ReLU(inplace),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
    )


def batch(store, rows, channels=1):
    return torch.tensor(store[rows])[:, None].expand(-1, channels, -1, -1).float() / 255


def count(model):
    "A list that grows by the size of each batch the model sees."
    seen = []
    model.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    return seen


@pytest.fixture(scope='module')
def clouds():
    "240 points in six clouds in 16 dimensions, and their cloud numbers."
    rng = np.random.default_rng(0)
    which = np.arange(240) % 6
    return (rng.normal(size=(6, 16)) * 6)[which] + rng.normal(size=(240, 16)), which


@pytest.fixture(scope='module')
def cloud_map(clouds):
    return tsne_map(clouds[0], 20)


# features


def test_features_are_the_layers_output(phantom_store):
    model, s = net().eval(), phantom_store
    with torch.no_grad():
        x = batch(s, slice(None))
        conv = model[0](x)
        linear = model[4](model[3](model[2](model[1](conv.clone()))))
        last = linear.relu()
    np.testing.assert_allclose(
        features(model, s, layer='4', bs=7), linear, atol=1e-5
    )  # before the ReLU, which works in place
    assert (features(model, s, layer='4') < 0).any()
    np.testing.assert_allclose(features(model, s, bs=7), last, atol=1e-5)  # the input of the last Linear
    np.testing.assert_allclose(
        features(model, s, layer='0'), conv.mean((2, 3)), atol=1e-5
    )  # averaged over space
    rows = s.frames.iloc[[5, 2, 2, 9]]
    np.testing.assert_allclose(features(model, s, rows, '4'), linear[[5, 2, 2, 9]], atol=1e-5)
    np.testing.assert_array_equal(
        features(model, s[:6], layer='4', bs=3), features(model, s, s.frames[:6], '4', bs=3)
    )


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize('h,w', ((64, 64), (64, 96), (48, 32)))
def test_channels_last_maps_are_averaged_over_their_pixels(h, w):
    frames = np.random.default_rng(0).integers(256, size=(3, h, w), dtype=np.uint8)
    first, last = (
        nn.Sequential(nn.Conv2d(1, 24, 4, 4), nn.Conv2d(24, 24, 2, 2), m, nn.Flatten(), nn.LazyLinear(3))
        for m in (nn.Identity(), ChannelsLast())
    )
    for m in (first, last):
        m(torch.zeros(1, 1, h, w))
    last.load_state_dict(first.state_dict())
    np.testing.assert_allclose(
        features(last, frames, layer='2'), features(first, frames, layer='2'), atol=1e-6
    )
    assert features(last, frames, layer='2').shape == (3, 24) and features(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2)), frames, layer='0'
    ).shape == (3, 1)


def test_a_swin_transformers_layers():
    import timm

    torch.manual_seed(0)
    m = timm.create_model(
        'swin_tiny_patch4_window7_224',
        img_size=64,
        window_size=2,
        embed_dim=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 3, 6),
        in_chans=1,
        num_classes=3,
    ).eval()
    frames = np.random.default_rng(0).integers(256, size=(2, 64, 64), dtype=np.uint8)
    with torch.no_grad():
        want = m.forward_features(torch.from_numpy(frames)[:, None] / 255)
    assert want.shape == (2, 2, 2, 96)
    np.testing.assert_allclose(features(m, frames, layer='norm'), want.mean((1, 2)), atol=1e-5)


@pytest.mark.parametrize('channels', (1, 3))
def test_input_is_scaled_as_in_training(phantom_store, channels):
    s, seen = phantom_store, []
    model = net(channels)
    model.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    features(model, s, s.frames[:8], channels=channels)
    dl = frame_dls(s, s.frames[:8], s.frames[:8], bs=8, channels=channels, device=torch.device('cpu')).valid
    assert type(seen[0]) is torch.Tensor and torch.equal(seen[0], dl.one_batch()[0].as_subclass(torch.Tensor))


def test_tokens_are_averaged(phantom_store):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.block, self.head = nn.Conv2d(1, 5, 16, 16), nn.LayerNorm(5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

    model = Tokens()
    np.testing.assert_allclose(
        features(model, phantom_store, layer='block'), features(model, phantom_store), atol=1e-6
    )


def test_nothing_is_left_behind(phantom_store):
    model = net().train()
    model[6].eval()
    model[0].weight.requires_grad_(False)
    modes, grads, state = (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    rng = torch.get_rng_state()

    def same():
        return (
            modes == [m.training for m in model.modules()]
            and grads == [p.requires_grad for p in model.parameters()]
            and all(p.grad is None for p in model.parameters())
            and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
            and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        )

    a = features(model, phantom_store)
    assert same() and torch.equal(rng, torch.get_rng_state())
    np.testing.assert_array_equal(a, features(model, phantom_store))  # dropout is off
    with pytest.raises(RuntimeError):
        features(model, phantom_store, channels=3)  # the forward pass fails
    assert same()
    with pytest.raises(ValueError, match='not a row a frame'):
        bad = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 64)))
        features(bad, phantom_store, layer='0')
    assert not any(m._forward_hooks for m in bad.modules())


def test_layers_that_cannot_be_read(phantom_store):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.pair = nn.Linear(64 * 64, 3), nn.Linear(2, 2), nn.Identity()

        def forward(self, x):
            return self.pair((self.used(x.flatten(1)), 1))[0]

    with pytest.raises(ValueError, match="no layer 'usde'; the nearest names are .'used'"):
        features(Idle(), phantom_store, layer='usde')
    with pytest.raises(ValueError, match="no layer 'qqqq'; the nearest names are"):
        features(Idle(), phantom_store, layer='qqqq')
    with pytest.raises(ValueError, match="does not run the layer 'idle'"):
        features(Idle(), phantom_store, layer='idle')
    with pytest.raises(ValueError, match='tuple'):
        features(Idle(), phantom_store, layer='pair')
    with pytest.raises(ValueError, match='no Linear'):
        features(nn.Conv2d(1, 2, 3), phantom_store)
    assert features(nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 3)), phantom_store).shape == (
        len(phantom_store),
        64 * 64,
    )


def test_bad_tables_and_frames(phantom_store, tmp_path):
    model, s = net(), phantom_store
    with pytest.raises(TableError, match='empty'):
        features(model, s, s.frames[:0])
    with pytest.raises(TableError, match="'row'"):
        features(model, s, s.frames.drop(columns='row'))
    with pytest.raises(TableError, match='another store'):
        features(model, s, s.frames.assign(row=s.frames['row'] + 9999))
    with pytest.raises(ValueError, match='uint8'):
        features(model, s[:4].astype(np.float32))
    with pytest.raises(ValueError, match='uint8'):
        features(model, s[0])
    with pytest.raises(ValueError, match='bs'):
        features(model, s, bs=0)
    with pytest.raises(ValueError, match='channels'):
        features(model, s, channels=2)
    with pytest.raises(ValueError, match='.npz'):
        features(model, s, path=tmp_path / 'a.npy')


# the cache


def test_cache_is_used_for_the_same_work_only(phantom_store, tmp_path):
    s, file = phantom_store, tmp_path / 'deep' / 'f.npz'
    model = net()
    seen = count(model)

    def run(**kw):
        seen.clear()
        return features(
            kw.pop('model', model),
            kw.pop('store', s),
            kw.pop('frames', s.frames[:10]),
            kw.pop('layer', '4'),
            path=file,
            **kw,
        )

    a = run()
    assert seen == [10] and np.array_equal(run(), a) and seen == []
    assert [f.name for f in file.parent.iterdir()] == ['f.npz']
    run(frames=s.frames[1:11])
    assert seen == [10]
    run()
    assert seen == [10]  # other rows
    run(frames=s.frames[:10][::-1])
    assert seen == [10]
    run()  # another order
    run(layer='0')
    assert seen == [10]
    run()
    run(layer=None)
    assert seen == [10]
    run()
    run(store=s[:10], frames=None)
    assert seen == [10]
    run()  # pixels that are not a store's
    with torch.no_grad():
        model[4].bias[0] += 1e-3
    b = run()
    assert seen == [10] and not np.array_equal(a, b)
    model[5] = nn.GELU()
    run()
    assert seen == [10]  # the same weights in another architecture
    model[5] = nn.ReLU(True)
    run()
    assert seen == [10]
    other = nn.Sequential(nn.BatchNorm2d(1), *net())
    theirs = count(other)
    features(other, s, s.frames[:4], path=file)
    other[0].running_mean += 1
    features(other, s, s.frames[:4], path=file)
    assert theirs == [4, 4]  # buffers count as weights


def test_cache_knows_its_store(phantom_table, phantom_store, tmp_path):
    from lus_fastai.data.store import FrameStore

    model, file = net(), tmp_path / 'f.npz'
    a = features(model, phantom_store, phantom_store.frames[:4], path=file)
    small = FrameStore.build(
        phantom_table[:2], tmp_path / 'store', size=(48, 48), rate=8, max_frames=4, workers=0
    )
    b = features(model, small, small.frames[:4], path=file)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize(
    'damage',
    (
        lambda raw: b'',
        lambda raw: b'not an archive',
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:300] + bytes([raw[300] ^ 255]) + raw[301:],
    ),
)
def test_damaged_cache_is_made_again(phantom_store, tmp_path, damage):
    model, file = net(), tmp_path / 'f.npz'
    a = features(model, phantom_store, path=file)
    file.write_bytes(damage(file.read_bytes()))
    assert np.array_equal(features(model, phantom_store, path=file), a)
    seen = count(model)
    assert np.array_equal(features(model, phantom_store, path=file), a) and not seen


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_the_old_file_or_none(phantom_store, tmp_path):
    "Half of the archive is written when the process is killed: it is not used, the next call makes it again."
    code = f"""
import os, sys, numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
from lus_fastai.explain import embeddings as embed
from lus_fastai.data.store import FrameStore
from test_embeddings import net
def half(f, **arrays):
    f.write(b'PK' + bytes(5000))
    f.flush()
    os.kill(os.getpid(), 9)
np.savez = half
embed.features(net(), FrameStore({str(phantom_store.folder)!r}), path={str(tmp_path / 'f.npz')!r})
"""
    whole = features(net(), phantom_store)
    for there in (False, True):
        if there:
            features(net(), phantom_store, phantom_store.frames[:4], path=tmp_path / 'f.npz')
        before = (tmp_path / 'f.npz').read_bytes() if there else None
        assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == -9
        assert there == (tmp_path / 'f.npz').exists() and (
            not there or (tmp_path / 'f.npz').read_bytes() == before
        )
        model = net()
        seen = count(model)
        assert np.array_equal(features(model, phantom_store, path=tmp_path / 'f.npz'), whole) and sum(
            seen
        ) == len(phantom_store)
        (tmp_path / 'f.npz').unlink()


def test_another_scaling_is_another_model(phantom_store, tmp_path):
    from lus_fastai.models.backbones import Scale

    def scaled(mean):
        torch.manual_seed(0)
        model = nn.Sequential(Scale([mean], [0.25]), nn.Conv2d(1, 2, 1))
        return features(model, phantom_store, layer='0', path=tmp_path / 'f.npz')

    a, b = scaled(0.5), scaled(0.25)
    np.testing.assert_allclose(b, a + 1, atol=1e-5)


def test_foreign_archives_are_not_trusted(phantom_store, tmp_path):
    model, file = net(), tmp_path / 'f.npz'
    a = features(model, phantom_store, path=file)
    with np.load(file) as f:
        key = f['key']
    for fake in (
        dict(x=a),
        dict(key=key, x=a.astype(float)),
        dict(key=key, x=np.r_[a, a]),
        dict(key=key, x=a[0]),
        dict(key=key, x=np.array([{}])),
    ):
        np.savez(file, **fake)
        assert np.array_equal(features(model, phantom_store, path=file), a)


@pytest.mark.parametrize('error', (KeyboardInterrupt, RuntimeError))
def test_interrupted_run_goes_on(phantom_store, tmp_path, error):
    model, file, n = net(), tmp_path / 'f.npz', len(phantom_store)
    whole, seen = features(model, phantom_store, bs=5), count(model)
    stop = model[4].register_forward_pre_hook(
        lambda m, x: (_ for _ in ()).throw(error()) if len(seen) == 3 else None
    )
    with pytest.raises(error):
        features(model, phantom_store, bs=5, path=file)
    stop.remove()
    seen.clear()
    np.testing.assert_array_equal(features(model, phantom_store, bs=5, path=file), whole)
    assert sum(seen) == n - 10  # two batches of five were kept
    assert [f.name for f in tmp_path.iterdir()] == ['f.npz']


def test_file_that_cannot_be_written_costs_no_features(phantom_store, tmp_path):
    model, blocked = net(), tmp_path / 'file'
    blocked.write_text('a file, not a folder')
    with pytest.warns(UserWarning, match='cannot be kept'):
        a = features(model, phantom_store, path=blocked / 'f.npz')
    assert np.array_equal(a, features(model, phantom_store))


@pytest.mark.gpu
def test_features_on_a_gpu(phantom_store):
    model = net()
    a, b = features(model, phantom_store, layer='4'), features(model, phantom_store, layer='4', device='cuda')
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert next(model.parameters()).device.type == 'cpu'


# maps


def test_tsne_is_seeded_and_leaves_the_global_generators(clouds, cloud_map):
    np.random.seed(5)
    torch.manual_seed(5)
    before, t = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = tsne_map(torch.tensor(clouds[0]), 20)
    assert np.array_equal(np.random.get_state()[1], before) and torch.equal(torch.get_rng_state(), t)
    assert np.array_equal(again.points, cloud_map.points) and not np.array_equal(
        tsne_map(clouds[0], 20, seed=1).points, again.points
    )
    assert (
        again.points.shape == (240, 2)
        and np.allclose(again.points.max(0), -again.points.min(0))
        and '240 points' in repr(again)
    )


def test_tsne_stops_when_it_has_settled(clouds, cloud_map):
    "No worse than scikit-learn's full run: the same share of true neighbours, to two percent."
    from sklearn.manifold import TSNE

    def near(p):
        return np.argsort(((p[:, None] - p) ** 2).sum(-1), 1)[:, 1:11]

    def kept(p):
        return np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(near(clouds[0]), near(p))])

    assert kept(cloud_map.points) > kept(TSNE(perplexity=20, random_state=0).fit_transform(clouds[0])) - 0.02


@pytest.mark.parametrize('n', (60, 3100))  # forces by tree, and on a grid
def test_threads_do_not_change_the_map(n, monkeypatch):
    for name, k in (('_EARLY', 10), ('_LATER', 10), ('_BLOCK', 5)):
        monkeypatch.setattr(embed, name, k)  # threads on a busy machine wait for one another
    x = np.random.default_rng(1).normal(size=(n, 4))
    assert np.array_equal(tsne_map(x, 5, n_jobs=1).points, tsne_map(x, 5, n_jobs=2).points)


def test_clouds_stay_apart(clouds, cloud_map):
    table = pd.DataFrame(dict(cloud=clouds[1], patient=np.arange(240)))
    assert purity(cloud_map.points, table, by='cloud', n_boot=10)['purity'].iloc[0] > 0.99


def test_placing_is_repeatable_separate_and_right(clouds, cloud_map):
    x, which = clouds
    new = x[:12] + np.random.default_rng(2).normal(size=(12, 16)) * 0.1
    points = cloud_map.points.copy()
    at = place_points(cloud_map, new)
    assert np.array_equal(cloud_map.points, points) and np.array_equal(place_points(cloud_map, new), at)
    np.testing.assert_allclose(
        np.concatenate([place_points(cloud_map, new[i : i + 1]) for i in range(3)]), at[:3], atol=1e-6
    )
    nearest = which[((at[:, None] - points) ** 2).sum(-1).argmin(1)]
    assert np.array_equal(nearest, which[:12])
    assert (
        np.median(np.linalg.norm(place_points(cloud_map, x) - points, axis=1)) < np.ptp(points) / 50
    )  # in the map's own frame of reference


def test_pca_is_scikit_learns(clouds):
    x = clouds[0]
    m = pca_map(x)
    u, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(m.points), np.abs(u[:, :2] * s[:2]), atol=1e-8)
    np.testing.assert_allclose(place_points(m, x[:5]), m.points[:5], atol=1e-8)
    np.testing.assert_allclose(m.fitted.explained_variance_ratio_, s[:2] ** 2 / (s**2).sum())


@pytest.mark.parametrize('n,perplexity,most', ((90, 30, 29), (91, 30.5, 30), (7, 3, 2), (4, 2, 1)))
def test_too_few_points(n, perplexity, most):
    x = np.random.default_rng(0).normal(size=(n, 3))
    with pytest.raises(ValueError, match=f'{n} points are too few .* at most {most}$'):
        tsne_map(x, perplexity)
    assert np.isfinite(tsne_map(x, most).points).all()  # and the number that is named works
    assert np.isfinite(place_points(tsne_map(x, most), x[:2])).all()


def test_bad_points():
    x = np.random.default_rng(0).normal(size=(40, 3))
    bad = x.copy()
    bad[[3, 8], 1] = np.nan, np.inf
    for f in (
        lambda x: tsne_map(x, 5),
        pca_map,
        lambda x: place_points(pca_map(np.eye(3)), x),
        lambda x: purity(x, pd.DataFrame(dict(patient=range(40))), by='patient'),
    ):
        with pytest.raises(ValueError, match=r'row\(s\) 3, 8'):
            f(bad)
    with pytest.raises(ValueError, match='too few.*at least 4'):
        tsne_map(x[:3], 5)
    with pytest.raises(ValueError, match='at least 3'):
        pca_map(x[:2])
    with pytest.raises(ValueError, match='the same'):
        tsne_map(np.ones((40, 3)), 5)
    with pytest.raises(ValueError, match='above 0'):
        tsne_map(x, 0)
    with pytest.raises(ValueError, match='made of 3'):
        place_points(pca_map(x), x[:, :2])
    for shape in ((40,), (40, 1), (4, 3, 2)):
        with pytest.raises(ValueError, match=r'\(N, d\)'):
            tsne_map(np.zeros(shape), 5)


def test_many_equal_points_are_mapped():
    x = np.repeat(np.random.default_rng(0).normal(size=(20, 5)), 5, 0)  # frames of a frozen clip
    assert np.isfinite(tsne_map(x, 10).points).all()


# figures


def test_scatter_has_a_panel_and_a_colour_for_each(clouds):
    import matplotlib.pyplot as plt

    (x, which), before = clouds, plt.get_fignums()
    table = pd.DataFrame(
        dict(
            label=np.array(['covid', 'pneumonia', 'regular'])[which % 3],
            patient=[f'P{i:02}' for i in np.arange(240) % 20],
            part=np.where(np.arange(240) < 200, 'old', 'new'),
        )
    )
    fig = plot_embedding(x[:, :2], table, ('label', 'patient'), style='part', title='both')
    a, b = fig.axes
    assert (a.get_title(), b.get_title()) == ('label', 'patient (20 values)') and b.get_legend() is None
    assert {t.get_text() for t in a.get_legend().get_texts()} == {
        'covid',
        'pneumonia',
        'regular',
        'old',
        'new',
    }
    assert len(np.unique(np.concatenate([c.get_facecolors() for c in a.collections]), axis=0)) == 3
    assert len(np.unique(np.concatenate([c.get_facecolors() for c in b.collections]), axis=0)) == 20
    np.testing.assert_allclose(np.asarray(a.collections[0].get_offsets()), x[:, :2])
    assert plt.get_fignums() == before  # nothing is left open


def test_bad_images(clouds):
    x, table, frames = clouds[0][:, :2], pd.DataFrame(dict(label=clouds[1])), np.zeros((240, 8, 8), np.uint8)
    with pytest.raises(TableError, match='hospital'):
        plot_embedding(x, table, 'hospital')
    with pytest.raises(ValueError, match='240 points, but 3 rows'):
        plot_embedding(x, table[:3])
    with pytest.raises(ValueError, match=r'\(N, 2\)'):
        plot_embedding(clouds[0], table)
    with pytest.raises(ValueError, match='3 images'):
        plot_thumbnails(x, frames[:3], table['label'])
    with pytest.raises(ValueError, match='3 labels'):
        plot_thumbnails(x, frames, table['label'][:3])
    with pytest.raises(ValueError, match='uint8'):
        plot_thumbnails(x, frames / 255, table['label'])
    with pytest.raises(ValueError, match='n=0'):
        plot_thumbnails(x, frames, table['label'], n=0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=60), st.integers(1, 50)
)
def test_thumbnails_never_overlap_and_stand_near_their_points(points, n):
    points = np.array(points)
    g, cells = _cells(points, n)
    assert (
        1 <= len(cells) <= n
        and len({(c, r) for c, r, _ in cells}) == len(cells)
        and len(set(cells[:, 2])) == len(cells)
    )
    scaled = (points - points.min(0)) / np.maximum(np.ptp(points, 0), 1e-12) * g
    assert (np.abs(scaled[cells[:, 2]] - cells[:, :2] - 0.5) <= 0.5 + 1e-9).all()
    assert {tuple(c) for c in np.minimum(scaled.astype(int), g - 1)} == {
        (c, r) for c, r, _ in cells
    }  # no part of the map is left out


def test_thumbnails_show_frames_in_their_borders():
    corners = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    frames = np.stack([np.full((12, 16), v, np.uint8) for v in (10, 80, 150, 220)])
    fig = plot_thumbnails(corners, frames, ['covid', 'covid', 'regular', 'pneumonia'], n=4)
    sheet = fig.axes[0].images[0].get_array()
    h, w = sheet.shape[:2]
    assert abs(h / w - 12 / 16) < 0.01
    g, _ = _cells(corners, 4)
    th, tw = h // g, w // g
    assert [
        int(sheet[r, c, 0])
        for r, c in (
            (h - th // 2, tw // 2),
            (h - th // 2, w - tw // 2),
            (th // 2, tw // 2),
            (th // 2, w - tw // 2),
        )
    ] == [10, 80, 150, 220]  # up is up
    border = [
        tuple(int(v) for v in sheet[r, c])
        for r, c in ((h - 3, tw // 2), (h - 3, w - tw // 2), (2, tw // 2), (2, w - tw // 2))
    ]
    assert border[0] == border[1] and len(set(border)) == 3
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['covid', 'pneumonia', 'regular']


# purity


def test_purity_by_hand():
    x = np.c_[[0.0, 1, 3, 7], np.zeros(4)]
    table = pd.DataFrame(
        dict(label=['sick', 'sick', 'well', 'well'], patient=list('ppqr'), source=list('aabb'))
    )
    got = purity(x, table, k=1).set_index(['by', 'neighbours'])
    assert list(got.index) == [
        ('label', 'all'),
        ('label', 'other patients'),
        ('patient', 'all'),
        ('source', 'all'),
        ('source', 'other patients'),
    ]
    np.testing.assert_allclose(got['purity'], [3 / 4, 1 / 4, 2 / 4, 3 / 4, 1 / 4])
    np.testing.assert_allclose(got['chance'], [1 / 3, 1 / 6, 1 / 6, 1 / 3, 1 / 6])
    assert (got[['k', 'n', 'patients']] == [1, 4, 3]).all().all()
    assert ((got['low'] <= got['purity']) & (got['purity'] <= got['high'])).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(5, 40), st.integers(1, 4))
def test_purity_against_a_loop_and_chance(seed, n, k):
    rng = np.random.default_rng(seed)
    x, table = (
        rng.normal(size=(n, 3)),
        pd.DataFrame(dict(label=rng.integers(3, size=n), patient=rng.integers(4, size=n))),
    )
    got = purity(x, table, k=k, by='label', n_boot=5).set_index('neighbours')
    l, p = table['label'].to_numpy(), table['patient'].to_numpy()
    for name, ok in (('all', np.ones((n, n), bool)), ('other patients', p[:, None] != p)):
        hits = there = 0
        chance = []
        for i in range(n):
            others = [j for j in np.argsort(((x - x[i]) ** 2).sum(1)) if j != i and ok[i, j]]
            hits += sum(l[j] == l[i] for j in others[:k])
            there += len(others[:k])
            if others:
                chance.append(np.mean(l[others] == l[i]))
        if there:
            np.testing.assert_allclose(
                got.loc[name, ['purity', 'chance']].astype(float), [hits / there, np.mean(chance)]
            )
    whole = purity(x, table, k=n - 1, by='label', n_boot=5).iloc[0]
    np.testing.assert_allclose(
        whole['purity'], whole['chance']
    )  # with every other point a neighbour, purity is chance


def test_clusters_that_are_patients_are_found_out():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(30), 20)
    x = (rng.normal(size=(30, 8)) * 9)[patient] + rng.normal(size=(600, 8))
    table = pd.DataFrame(dict(label=patient % 3, patient=patient, source='a'))
    got = purity(x, table).set_index(['by', 'neighbours'])
    assert (
        got['purity']['label', 'all'] > 0.99 and got['purity']['patient', 'all'] > 0.99
    )  # looks like knowledge
    low, high = got.loc[('label', 'other patients'), ['low', 'high']]
    assert (
        low < got['chance']['label', 'other patients'] < high
        and got['purity']['label', 'other patients'] < 0.6
    )
    assert got['purity']['source', 'all'] == got['chance']['source', 'all'] == 1


def test_purity_is_seeded_and_blocks_do_not_matter():
    rng = np.random.default_rng(3)
    x, table = (
        rng.normal(size=(1100, 4)),
        pd.DataFrame(dict(label=rng.integers(3, size=1100), patient=rng.integers(30, size=1100))),
    )
    a = purity(x, table, by='label')
    pd.testing.assert_frame_equal(a, purity(x, table, by='label'))
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=10).fit(x).kneighbors(return_distance=False)
    l = table['label'].to_numpy()
    assert a['purity'][0] == pytest.approx((l[near] == l[:, None]).mean())


def test_one_patient_has_no_others():
    got = purity(
        np.random.default_rng(0).normal(size=(9, 2)),
        pd.DataFrame(dict(label=list('aaabbbccc'), patient='p')),
        k=3,
        by='label',
    )
    assert (
        got['purity'].notna().tolist() == [True, False]
        and got['chance'].notna().tolist() == [True, False]
        and got['low'].isna().all()
    )


def test_bad_purity():
    x, table = (
        np.random.default_rng(0).normal(size=(6, 2)),
        pd.DataFrame(dict(label=list('ababab'), patient=list('ppqqrr'))),
    )
    for k in (0, 6, 2.5):
        with pytest.raises(ValueError, match='from 1 to 5'):
            purity(x, table, k=k, by='label')
    with pytest.raises(ValueError, match='6 points, but 5 rows'):
        purity(x, table[:5], by='label')
    with pytest.raises(TableError, match='source'):
        purity(x, table, k=2)
    with pytest.raises(TableError, match='patient'):
        purity(x, table.drop(columns='patient'), k=2, by='label')


def test_purity_is_drawn_with_its_chance():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(label=rng.integers(3, size=40), patient=rng.integers(8, size=40), source='a'))
    scores = purity(rng.normal(size=(40, 3)), table, k=5, n_boot=50)
    fig = plot_purity(pd.concat([scores.assign(features='one'), scores.assign(features='two')]))
    assert [ax.get_title() for ax in fig.axes] == ['one', 'two'] and len(plot_purity(scores).axes) == 1
    ax = fig.axes[0]
    bars = {
        (round(b.get_x() + b.get_width() / 2, 3), round(b.get_height(), 6))
        for b in ax.patches
        if b.get_height() > 0
    }
    where = dict(zip(zip(scores['by'], scores['neighbours']), scores.itertuples()))
    at = {
        ('label', 'all'): -0.2,
        ('label', 'other patients'): 0.2,
        ('patient', 'all'): 0.8,
        ('source', 'all'): 1.8,
        ('source', 'other patients'): 2.2,
    }
    assert bars == {(x, round(where[k].purity, 6)) for k, x in at.items()}
    lines = {
        (round(float(s[:, 0].mean()), 3), round(float(s[0, 1]), 6)) for s in ax.collections[1].get_segments()
    }
    assert lines == {(x, round(where[k].chance, 6)) for k, x in at.items()}
