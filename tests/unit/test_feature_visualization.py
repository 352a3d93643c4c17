"Imagined images and inverted features: known answers, traces left behind, and bad input."

import pytest
import torch
from torch import nn

from lus_fastai.explain.feature_visualization import (
    invert_features,
    maximise_class,
    show_class_images,
    show_inversions,
)
from lus_fastai.models.unet import unet

PLAIN = dict(channels=1, decay=0, jitter=0, blur=0)


def net(channels=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


def linear(w):
    m = nn.Sequential(nn.Flatten(), nn.Linear(w.numel(), 1, bias=False))
    m[1].weight.data = w.reshape(1, -1).clone()
    return m


def test_one_step_by_hand():
    "A linear model: noise, plus a step of known length along the weights; then the decay's pull."
    w = torch.tensor([[[3.0, 0], [0, 4]]])
    start = maximise_class(linear(w), 0, (2, 2), steps=1, step=0, clamp=None, **PLAIN)[0]
    moved, scores = maximise_class(linear(w), 0, (2, 2), steps=1, step=10.0, clamp=None, **PLAIN)
    length = 10 * (4 / (3 * 224**2)) ** 0.5
    assert torch.allclose(moved - start, length * w / 5, atol=1e-6)
    assert torch.allclose(scores, torch.stack([(start * w).sum(), (moved * w).sum()]), atol=1e-5)
    pulled = maximise_class(linear(w), 0, (2, 2), steps=1, step=10.0, clamp=None, **{**PLAIN, 'decay': 7.0})[
        0
    ]
    g = w - 14 * start
    assert torch.allclose(pulled - start, length * g / g.norm(), atol=1e-5)


def test_authors_step_at_their_size():
    w = torch.ones(3, 224, 224)
    a, b = (
        maximise_class(linear(w), 0, (224, 224), 3, steps=1, step=s, decay=0, jitter=0, blur=0, clamp=None)[0]
        for s in (0, 25.0)
    )
    assert (b - a).norm().item() == pytest.approx(25, rel=1e-3)


@pytest.mark.parametrize('gray', [True, False])
def test_scores_rise_and_channels(gray):
    x, s = maximise_class(net(), [2, 0], (24, 20), gray=gray, steps=40, decay=0)
    assert (
        x.shape == (2, 3, 24, 20)
        and s.shape == (2, 41)
        and (s[:, -1] > s[:, 0]).all()
        and 0 <= x.min()
        and x.max() <= 1
    )
    assert (x == x[:, :1]).all().item() == gray


def test_leaves_no_trace_and_repeats():
    m = net().train()
    m[4].weight.requires_grad_(False)
    before, _state = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    a, b = maximise_class(m, 1, (16, 16), steps=5)[0], maximise_class(m, 1, (16, 16), steps=5)[0]
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    state2 = torch.get_rng_state()
    c = invert_features(m, x, '4', steps=5)[0]
    d = invert_features(m, x, '4', steps=5)[0]
    assert torch.equal(a, b) and torch.equal(c, d)
    assert (
        m.training
        and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
        and torch.equal(state2, torch.get_rng_state())
    )
    assert (
        [p.requires_grad for p in m.parameters()] == [k != '4.weight' for k, _ in m.named_parameters()]
        and all(p.grad is None for p in m.parameters())
        and x.grad is None
    )
    assert not any(h._forward_hooks for h in m.modules())


def test_jitter_is_undone_and_bounded():
    w = torch.zeros(1, 20, 20)
    w[0, 10, 10] = 1
    a, b = (maximise_class(linear(w), 0, (20, 20), step=s, **{**PLAIN, 'jitter': 3})[0] for s in (0, 25.0))
    ys, xs = (a != b)[0].nonzero(as_tuple=True)
    assert ys.min() >= 7 and ys.max() <= 13 and xs.min() >= 7 and xs.max() <= 13 and len(ys) > 9


def test_blur_happens_inside_the_loop():
    "With no step at all, ten blurs take most of the noise's contrast; none leaves it."
    sharp, soft = (
        maximise_class(linear(torch.ones(1, 16, 16)), 0, (16, 16), step=0, **{**PLAIN, 'blur': b})[0]
        for b in (0, 0.5)
    )
    assert soft.std() < 0.7 * sharp.std() and abs(soft.mean() - sharp.mean()) < 0.05


def test_targets():
    m = net()
    several = maximise_class(m, torch.tensor([1, 2]), (16, 16), steps=5)[0]
    assert torch.allclose(several[1], maximise_class(m, 2, (16, 16), steps=5)[0], atol=1e-4)
    f = maximise_class(m, lambda out: out[:, 2], (16, 16), steps=5)[0]
    assert torch.allclose(f, several[1], atol=1e-4)
    torch.manual_seed(0)
    seg = unet(4, width=2)
    x, s = maximise_class(seg, 1, (32, 32), 1, steps=10, decay=0)
    assert x.shape == (1, 32, 32) and s[-1] > s[0]


@pytest.mark.parametrize(
    'args, options, text',
    [
        ((3, (8, 8)), {}, '3 outputs'),
        ((-1, (8, 8)), {}, 'out of range'),
        ((0, (8, 8), 2), {}, 'channels is 1 or 3'),
        ((0, (8, 8)), dict(steps=0), 'at least 1'),
    ],
)
def test_bad_maximisation(args, options, text):
    with pytest.raises(ValueError, match=text):
        maximise_class(net(), *args, **options)


def test_invertible_and_lossy_layers():
    x = torch.rand(2, 1, 10, 12, generator=torch.Generator().manual_seed(0))
    flip = nn.Conv2d(1, 1, 1)
    flip.weight.data.fill_(-2)
    flip.bias.data.fill_(3)
    y, e = invert_features(flip, x, '', tv=0)
    assert y.shape == x.shape and torch.allclose(y, x, atol=0.01) and e.max() < 0.01
    y, e = invert_features(nn.AdaptiveAvgPool2d(1), x, '', tv=0)
    assert (
        e.max() < 0.01
        and torch.allclose(y.mean((2, 3)), x.mean((2, 3)), atol=0.01)
        and (y - x).abs().mean() > 0.1
    )


def test_stops_at_the_layer_before_inplace_changes_it():
    "The features are those that the layer gives, not what an in-place ReLU makes of them."
    m = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True))
    m[0].weight.data.fill_(-1)
    m[0].bias.data.zero_()
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        invert_features(m, x, '0', tv=0)[0], x, atol=0.01
    )  # all features negative: ReLU would have left zeros
    with pytest.raises(ValueError, match='all zero'):
        invert_features(m, x, '1')


def test_grey_frames_give_grey_images():
    x = torch.rand(1, 1, 12, 12).expand(-1, 3, -1, -1)
    y, _ = invert_features(net(), x, '0', steps=5)
    assert torch.equal(y[:, 0], y[:, 2])


@pytest.mark.parametrize(
    'x, layer, text',
    [
        (torch.rand(1, 3, 8, 8), 'conv4', 'no layer'),
        (torch.rand(3, 8, 8), '0', 'float batch'),
        (torch.full((1, 3, 8, 8), float('nan')), '0', r'image\(s\) \[0\]'),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), '0', 'float batch'),
    ],
)
def test_bad_inversion(x, layer, text):
    with pytest.raises(ValueError, match=text):
        invert_features(net(), x, layer)


def test_nearest_names_and_unreached_layer():
    m = nn.ModuleDict(dict(encoder=nn.Conv2d(1, 1, 1), unused=nn.Linear(1, 1)))
    m.forward = lambda x: m['encoder'](x)
    with pytest.raises(ValueError, match=r"'encodr'; the nearest names are \['encoder'"):
        invert_features(m, torch.rand(1, 1, 8, 8), 'encodr')
    with pytest.raises(ValueError, match='does not come through'):
        invert_features(m, torch.rand(1, 1, 8, 8), 'unused')
    assert not m['unused']._forward_hooks and not m['encoder']._forward_hooks


def test_panels():
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    out = show_class_images(net(), (16, 16), 'abc', steps=3)
    assert set(out) == {True, False} and len(plt.gcf().axes) == 6
    out = show_class_images(net(1), (16, 16), 'abc', channels=1, steps=3, clamp=None)
    assert set(out) == {True} and len(plt.gcf().axes) == 3
    rows = show_inversions(net(), torch.rand(2, 3, 16, 16), ['0', '6', ''], steps=3)
    assert [r['layer'] for r in rows] == ['0', '6', ''] and rows[0]['images'].shape == (2, 3, 16, 16)
    plt.close('all')


@pytest.mark.gpu
def test_on_a_gpu():
    m = net().cuda()
    x, s = maximise_class(m, [0, 1], (32, 32), steps=20, decay=0)
    assert x.is_cuda and (s[:, -1] > s[:, 0]).all()
    y, e = invert_features(m, torch.rand(1, 3, 32, 32, device='cuda'), '0', steps=50)
    assert y.is_cuda and e.max() < 1
