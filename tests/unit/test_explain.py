"Explanations: hand-built networks, captum, pytorch-grad-cam, and that no question leaves a trace."

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lus_fastai.core import frozen_eval
from lus_fastai.explain import attribution as E
from lus_fastai.explain import occlusion as O
from lus_fastai.explain import occlusion_cache as C
from lus_fastai.explain.attribution import (
    cam,
    cam_layer,
    grad_cam,
    integrated_gradients,
    map_rgb,
    saliency,
    seg_target,
    show_map,
    show_maps,
    smooth_grad,
)
from lus_fastai.explain.occlusion import EXPLAINERS, OCCLUSION_ARORA, explain_clip, occlusion, write_map_video
from lus_fastai.models.classifiers import seg_to_cls
from lus_fastai.models.unet import unet
from lus_fastai.video import read_clip

METHODS = pytest.mark.parametrize('method', list(EXPLAINERS))
FEW = {'smooth-grad': dict(n=3), 'integrated gradients': dict(steps=4), 'occlusion': dict(size=9, stride=6)}


def conv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


@pytest.fixture
def net():
    "A small classifier with used batch norm statistics, in-place ReLU and dropout."
    torch.manual_seed(0)
    m = nn.Sequential(
        conv(3, 8),
        nn.MaxPool2d(2),
        conv(8, 16, 2),
        conv(16, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )
    with torch.no_grad():
        m(torch.rand(8, 3, 32, 32) * 2)
    with torch.no_grad():
        m[-1].weight.mul_(8)
    return m


@pytest.fixture
def x():
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def shape_of(o):
    return tuple(o.shape)


# hand-built networks


def test_saliency_of_a_linear_model_is_its_weights():
    w = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))

    class Linear(nn.Module):
        def forward(self, x):
            return torch.einsum('bchw,nchw->bn', x, w)

    x = torch.rand(2, 3, 4, 5)
    assert torch.allclose(saliency(Linear(), x, [0, 1]), w.abs().amax(1))
    assert torch.allclose(saliency(Linear(), x, [0, 1], signed=True), w.amax(1))
    assert torch.allclose(saliency(Linear(), x, [0, 1], per_channel=True), w)
    assert torch.allclose(integrated_gradients(Linear(), x, 1), (x * w[1]).sum(1), atol=1e-6)
    assert torch.allclose(
        occlusion(Linear(), x, lambda o: o[:, 0], size=1, fill=0.0), -(x * w[0]).sum(1), atol=1e-5
    )


class OnePixel(nn.Module):
    "Sees nothing but the pixel (5, 11), through a convolution."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x):
        v = torch.tanh(self.conv(x)[:, 0, 5, 11])
        return torch.stack([-v, v], 1)


@METHODS
def test_a_network_that_reads_one_pixel(method):
    x = torch.rand(2, 1, 12, 18, generator=torch.Generator().manual_seed(0)) + 0.2
    options = {
        'occlusion': dict(size=1),
        'grad-cam': dict(layer='conv'),
        'grad-cam++': dict(layer='conv'),
    }.get(method, {})
    m = EXPLAINERS[method](OnePixel(), x, 1, **options)
    if 'cam' in method:  # a map of weighed activations: the gradient's mean is the same for each pixel
        assert torch.allclose(m * x[:, 0].amax((1, 2), True), x[:, 0] * m.amax((1, 2), True), atol=1e-5)
        return
    rest = m.clone()
    rest[:, 5, 11] = 0
    assert (
        not rest.any() and (m[:, 5, 11] < 0 if method == 'occlusion' else m[:, 5, 11] > 0).all()
    )  # the fill is darker than all of x


def test_grad_cam_of_a_detector_by_hand():
    "A vertical-edge detector weighed with 2 and a blur with -1: the map is their sum at 6 x 8 positions."
    m = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 1, bias=False),
    )
    with torch.no_grad():
        m[0].weight[0, 0] = torch.tensor([[-1.0, 0, 1]] * 3)
        m[0].weight[1] = 1 / 9
        m[4].weight.copy_(torch.tensor([[2.0, -1.0]]))
    x = torch.zeros(1, 1, 6, 8)
    x[..., 5:] = 1
    a = m[1](m[0](x))[0].detach()
    want = (2 * a[0] - a[1]) / 48
    got = grad_cam(m, x, 0, layer='1')[0]
    assert torch.allclose(got, want, atol=1e-7) and got.argmax() % 8 in (4, 5) and got.min() < 0
    assert cam_layer(m)[0] == '1' and torch.equal(grad_cam(m, x)[0], got)


def test_integrated_gradients_are_complete(net, x):
    with frozen_eval(net), torch.no_grad():
        gap = (net(x) - net(torch.full_like(x, 0.3)))[:, 2]
    assert torch.allclose(
        integrated_gradients(net, x, 2, steps=200, baseline=0.3).sum((1, 2)),
        gap,
        atol=0.02 * gap.abs().max().item(),
    )


def test_occlusion_of_the_paper_by_a_loop(net):
    "Centres at each stride, half-width 3 of 32, clipped at the border, P(true | covered) - P(true)."
    x, half, stride = torch.rand(1, 3, 20, 33), 3, 2
    with frozen_eval(net), torch.no_grad():
        before, want = net(x).softmax(1)[0, 1], torch.zeros(20, 33)
        for i in range(0, 20, stride):
            for j in range(0, 33, stride):
                y = x.clone()
                y[..., max(0, i - half) : i + half, max(0, j - half) : j + half] = 0.185
                want[i, j] = net(y).softmax(1)[0, 1] - before
    got = occlusion(net, x, 1, size=2 * half, stride=stride, value='centre')[0]
    assert (
        torch.allclose(got[::stride, ::stride], want[::stride, ::stride], atol=1e-5)
        and want.abs().max() > 1e-3
    )
    assert torch.equal(got[2:4, 4], got[4:6, 4][[0, 0]]) is False and torch.equal(
        got[3], got[4]
    )  # the nearest centre


def test_occlusion_defaults():
    from inspect import signature

    assert (
        OCCLUSION_ARORA == dict(size=44, stride=1, fill=0.185, value='centre')
        and signature(occlusion).parameters['fill'].default == 0.185
    )
    starts = []

    class Corner(nn.Module):
        def forward(self, x):
            starts.append((x == 0.185).flatten(1).sum(1))
            return x[:, :1, 0, 0].repeat(1, 2)

    occlusion(Corner(), torch.zeros(1, 1, 224, 224), 0)
    assert int(torch.cat(starts).max()) == 44 * 44


# captum


def test_against_captum_gradients(net, x):
    import captum.attr as captum

    with frozen_eval(net):
        t = torch.tensor([0, 2, 1])
        assert torch.allclose(saliency(net, x, t), captum.Saliency(net).attribute(x, t).amax(1), atol=1e-6)
        assert torch.allclose(
            saliency(net, x, t, per_channel=True), captum.Saliency(net).attribute(x, t, abs=False), atol=1e-6
        )
        want = (
            captum.IntegratedGradients(net)
            .attribute(x, torch.full_like(x, 0.1), t, n_steps=20, method='gausslegendre')
            .sum(1)
        )
        assert torch.allclose(integrated_gradients(net, x, t, steps=20, baseline=0.1, bs=7), want, atol=1e-5)
        noise = torch.randn((5, *x.shape), generator=torch.Generator().manual_seed(3))
        width = 0.1 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))[:, None, None, None]
        want = sum(captum.Saliency(net).attribute(x + width * n, t, abs=False) for n in noise) / 5
        assert torch.allclose(smooth_grad(net, x, t, n=5, seed=3, bs=4), want.abs().amax(1), atol=1e-6)


@pytest.mark.parametrize(
    'size,stride,shape', [(9, 3, (32, 48)), (8, 5, (33, 41)), (7, 7, (32, 32)), (12, 2, (40, 40))]
)
def test_against_captum_occlusion(net, size, stride, shape):
    import captum.attr as captum

    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(2))
    with frozen_eval(net), torch.no_grad():
        want = -captum.Occlusion(lambda x: net(x).softmax(1)).attribute(
            x, (3, size, size), (3, stride, stride), 0.185, torch.tensor([1, 2]), perturbations_per_eval=8
        )[:, 0]
    got = occlusion(net, x, [1, 2], size=size, stride=stride, bs=16)
    assert (got - want).abs().max() < 1e-5 and want.abs().max() > 1e-3
    fan = torch.zeros(shape, dtype=torch.bool)
    fan[4:, 10:26] = True
    part = occlusion(net, x, [1, 2], size=size, stride=stride, fan=fan)
    assert (part - want)[:, fan].abs().max() < 1e-5 and not part[:, :, -1].any()


# pytorch-grad-cam


def test_against_pytorch_grad_cam(net, x):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import pytorch_grad_cam as peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer, t = net[3], [0, 2, 1]
    for method, name in E._CAMS.items():
        ours = cam(net, x, t, method=method, layer=layer)
        other = copy.deepcopy(net).eval()
        with getattr(peer, name)(other, [other[3]]) as them:
            seen = {}
            raw = them.get_cam_image
            them.get_cam_image = lambda *a, seen=seen, raw=raw, **k: seen.setdefault('raw', raw(*a, **k))
            scaled = them(x, [ClassifierOutputTarget(k) for k in t])
        want = F.interpolate(
            torch.as_tensor(np.ascontiguousarray(seen['raw']))[:, None].float(),
            x.shape[-2:],
            mode='bilinear',
            align_corners=False,
        )[:, 0]
        scale = want.abs().max()
        assert (ours - want).abs().max() < 1e-4 * scale, method
        # and the package's own end result, from our raw map: ReLU and min-max before and after enlarging
        cut = torch.as_tensor(np.ascontiguousarray(seen['raw'])).clamp(min=0).float()
        cut = F.interpolate(
            ((cut - cut.amin((1, 2), True)) / (1e-7 + (cut - cut.amin((1, 2), True)).amax((1, 2), True)))[
                :, None
            ],
            x.shape[-2:],
            mode='bilinear',
            align_corners=False,
        )[:, 0]
        cut = (cut - cut.amin((1, 2), True)) / (1e-7 + (cut - cut.amin((1, 2), True)).amax((1, 2), True))
        assert np.abs(cut.numpy() - scaled).max() < 1e-3, method
    assert torch.allclose(
        grad_cam(net, x, t, layer=layer), cam(net, x, t, method='gradcam', layer=layer), atol=1e-6
    )


# any timm model


@pytest.mark.parametrize(
    'name,channels,layer',
    [
        ('resnet10t', 3, 'layer4'),
        ('resnet18', 1, 'layer4'),
        ('vgg11', 3, 'features.19'),
        ('efficientnet_lite0', 3, 'bn2'),
        ('mobilenetv3_small_050', 1, 'blocks'),
        ('convnext_atto', 3, 'stages'),
        ('densenet121', 3, 'features'),
    ],
)
def test_timm_models(name, channels, layer):
    import timm

    if name == 'vgg11':  # its first fully connected layer alone is 400 MB
        m = timm.create_model(name, num_classes=0, global_pool='', in_chans=channels).features
        m = nn.Sequential(m, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 3))
        layer = '0.19'
    else:
        m = timm.create_model(name, num_classes=3, in_chans=channels)
    m.eval()
    x = torch.rand(2, channels, 64, 96, generator=torch.Generator().manual_seed(0))
    assert cam_layer(m, x)[0] == layer
    a = grad_cam(m, x, 1)
    assert shape_of(a) == (2, 64, 96) and a.isfinite().all() and a.abs().max() > 0
    assert torch.allclose(grad_cam(m, x[1:], 1), a[1:], atol=1e-5 * a.abs().max().item())
    assert torch.equal(grad_cam(nn.Sequential(m), x, 1), a)
    g = saliency(m, x)
    assert shape_of(g) == (2, 64, 96) and g.isfinite().all() and g.min() >= 0


def test_a_vision_transformer_has_no_convolution():
    import timm

    m = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, num_classes=3)
    x = torch.rand(1, 3, 32, 32)
    for f in (grad_cam, cam):
        with pytest.raises(
            ValueError, match='has no convolution but the one that cuts the image into patches'
        ):
            f(m, x)
    assert shape_of(saliency(m, x, 0)) == (1, 32, 32)
    assert (
        occlusion(m, x, 0, size=8, stride=2).isfinite().all()
    )  # more than 64 windows: it takes no crops, and none are forced on it


# no trace


@METHODS
@pytest.mark.parametrize('outer', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(method, outer, net, x):
    net.train()
    net[2].eval()
    for p in net[0].parameters():
        p.requires_grad_(False)
    net[-1].weight.grad = torch.full_like(net[-1].weight, 7.0)
    mine = x.clone().requires_grad_()
    before, modes, flags, rng = (
        copy.deepcopy(net.state_dict()),
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        torch.get_rng_state(),
    )
    with outer():
        m = EXPLAINERS[method](net, mine, **FEW.get(method, {}))
    assert (
        shape_of(m) == (3, 32, 48) and m.dtype == torch.float32 and not m.requires_grad and m.isfinite().all()
    )
    assert [m.training for m in net.modules()] == modes and [
        p.requires_grad for p in net.parameters()
    ] == flags
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.grad is None for p in net.parameters()] == [True] * (len(flags) - 2) + [False, True] and (
        net[-1].weight.grad == 7
    ).all()
    assert mine.grad is None and mine.requires_grad and torch.equal(mine, x)
    assert not any(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()
    )
    assert torch.equal(torch.get_rng_state(), rng)
    with outer():
        assert torch.equal(EXPLAINERS[method](net, x, **FEW.get(method, {})), m)


@METHODS
def test_frozen_in_place_and_single(method, net, x):
    "All parameters frozen, an in-place first layer, and a batch gives what its images give alone."
    net = nn.Sequential(nn.ReLU(inplace=True), *net)
    for p in net.parameters():
        p.requires_grad_(False)
    before = x.clone()
    m = EXPLAINERS[method](net, x, [2, 0, 1], **FEW.get(method, {}))
    assert torch.equal(x, before) and m.abs().amax((1, 2)).min() > 0
    if method != 'smooth-grad':  # whose noise is drawn for the batch
        assert torch.allclose(
            EXPLAINERS[method](net, x[1:2], 0, **FEW.get(method, {})),
            m[1:2],
            atol=1e-5 * m.abs().max().item(),
        )


@METHODS
def test_an_interrupt_leaves_no_hooks(method, net, x):
    class Stop(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    net.train()
    net[-1] = Stop()
    options = dict(layer='3') if 'cam' in method else {}
    with pytest.raises(KeyboardInterrupt):
        EXPLAINERS[method](net, x, 0, **options)
    assert (
        not any(len(m._forward_hooks) for m in net.modules())
        and net.training
        and net[0][1].training
        and all(p.requires_grad for p in net.parameters())
    )


# targets and segmenters


def test_targets(net, x):
    with frozen_eval(net), torch.no_grad():
        best = net(x).argmax(1)
    for f in (saliency, grad_cam):
        assert (
            torch.equal(f(net, x), f(net, x, best))
            and torch.equal(f(net, x, 1), f(net, x, [1, 1, 1]))
            and torch.equal(f(net, x, np.array([1, 1, 1])), f(net, x, lambda o: o[:, 1]))
        )


@METHODS
def test_segmenters(method):
    torch.manual_seed(0)
    m, x = unet(4, width=2, bn=True).eval(), torch.rand(2, 1, 32, 48)
    with torch.no_grad():
        m.head.bias.copy_(torch.tensor([0.0, 0, 0.1, 0]))
        won = m(x).argmax(1)
    code = int(won.flatten().mode().values)
    a = EXPLAINERS[method](m, x, code, **FEW.get(method, {}))
    assert shape_of(a) == (2, 32, 48) and a.abs().max() > 0 and a.isfinite().all()
    if method != 'occlusion':
        assert torch.allclose(a, EXPLAINERS[method](m, x, seg_target(code), **FEW.get(method, {})), atol=1e-6)
    assert torch.allclose(a, EXPLAINERS[method](m, x, [code, code], **FEW.get(method, {})))
    masks = torch.zeros(2, 32, 48, dtype=torch.bool)
    masks[0, :8] = masks[1, 24:] = True
    b = EXPLAINERS[method](m, x, seg_target(1, masks), **FEW.get(method, {}))
    assert shape_of(b) == (2, 32, 48) and b.isfinite().all() and not torch.equal(a, b)


def test_occlusion_of_a_segmenter_by_a_loop():
    torch.manual_seed(0)
    m, x = unet(3, width=2).eval(), torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        p = m(x).softmax(1)[0]
        won = p.argmax(0) == 1
        if not won.any():
            m.head.bias[1] += 9
            p = m(x).softmax(1)[0]
            won = p.argmax(0) == 1
        y = x.clone()
        y[..., :8, 8:] = 0.185
        want = (m(y).softmax(1)[0, 1][won] - p[1][won]).sum()
    assert torch.allclose(occlusion(m, x, 1, size=8, stride=8)[0, 3, 12], want, atol=1e-5)


# bad input


def test_bad_input(net, x):
    for f in EXPLAINERS.values():
        with pytest.raises(ValueError, match=r'target \[3\] is out of range: the model has 3 classes, 0..2'):
            f(net, x, 3)
        with pytest.raises(ValueError, match='out of range'):
            f(net, x, [0, -1, 2])
        with pytest.raises(ValueError, match='target has shape'):
            f(net, x, [0, 1])
        with pytest.raises(ValueError, match='must be a class number'):
            f(net, x, 1.5)
        with pytest.raises(ValueError, match='one score for each'):
            f(net, x, lambda o: o.sum())
        bad = x.clone()
        bad[1, 0, 3, 3] = math.nan
        with pytest.raises(ValueError, match=r'NaN or infinite values in image\(s\) \[1\]'):
            f(net, bad)
        for wrong in (x[0], (x * 255).byte(), x.numpy(), x[:0]):
            with pytest.raises(ValueError, match='x must be a float batch'):
                f(net, wrong)
        with pytest.raises(ValueError, match='wrap it'):
            f(nn.Sequential(net, Pair()), x, 0, **(dict(layer='0.3') if f in (grad_cam, cam) else {}))
        assert f(net, torch.full((1, 3, 32, 32), 0.5), 0).isfinite().all()  # one colour
    for f in (grad_cam, cam):
        with pytest.raises(ValueError, match=r"no layer '3.2x'; the nearest names are \['3.2'"):
            f(net, x, layer='3.2x')
        with pytest.raises(ValueError, match='gives no maps'):
            f(net, x, layer='5')
        with pytest.raises(ValueError, match='a module of this model'):
            f(net, x, layer=nn.Conv2d(3, 3, 1))
        with pytest.raises(ValueError, match='has no convolution'):
            f(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 3)), x)
    with pytest.raises(ValueError, match='no layer of'):
        cam_layer(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)), x[..., :1, :1])
    with pytest.raises(ValueError, match='needs a segmenter'):
        saliency(net, x, seg_target(1))
    with pytest.raises(ValueError, match='fan has shape'):
        occlusion(net, x, 0, size=9, fan=np.ones((9, 9), bool))
    with pytest.raises(ValueError, match="value is 'mean' or 'centre'"):
        occlusion(net, x, 0, size=9, value='max')


class Pair(nn.Module):
    def forward(self, x):
        return x, x


# crops


def both_ways(m, x, spans):
    "Window outputs with crops and in full, and how many stages were cropped."
    fill, at = (
        torch.tensor(0.185).reshape(1, 1, 1, 1),
        torch.tensor([[0, i, j] for i in range(len(spans[0])) for j in range(len(spans[1]))]),
    )
    with E.explain_mode(m), torch.no_grad():
        with torch.enable_grad():
            cache = C.OcclusionCache(m, x, spans)
        full = m(
            O._covered(x, at[:, 0], *(torch.from_numpy(s)[at[:, k]] for k, s in enumerate(spans, 1)), fill)
        )
        with cache.hooked():
            cache.remember(x)
            return (
                cache.run(at[:, 0], (at[:, 1], at[:, 2]), fill) if cache.stages else full,
                full,
                len(cache.stages),
            )


@settings(max_examples=12, deadline=None)
@given(
    st.integers(48, 80),
    st.integers(48, 80),
    st.integers(3, 16),
    st.sampled_from(['mean', 'centre']),
    st.lists(
        st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2]), st.booleans()),
        min_size=2,
        max_size=5,
    ),
)
def test_crops_are_exact(h, w, size, value, layers):
    "Any stack of convolutions, strides and pools, any size: windows on crops give what they give in full."
    torch.manual_seed(0)
    parts, c = [], 1
    for k, s, pool in layers:
        parts += [nn.Conv2d(c, 4, k, s, k // 2), nn.ReLU(inplace=True)] + (
            [nn.MaxPool2d(3, 2, 1)] if pool else []
        )
        c = 4
    m = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    fast, full, stages = both_ways(
        m, torch.rand(1, 1, h, w), [O._spans(n, size, max(1, size - 1), value) for n in (h, w)]
    )
    assert torch.allclose(fast, full, atol=1e-6)


def test_crops_are_used_and_never_forced(net):
    torch.manual_seed(0)

    def spans(n):
        return [O._spans(n, 12, 6, 'mean')] * 2

    fast, full, stages = both_ways(net, torch.rand(1, 3, 96, 96), spans(96))
    assert stages >= 3 and torch.allclose(fast, full, rtol=0, atol=1e-6) and full.std(0).max() > 3e-4
    import timm

    fast, full, stages = both_ways(
        timm.create_model('resnet10t', num_classes=3),
        torch.rand(1, 3, 128, 96),
        [O._spans(n, 12, 12, 'mean') for n in (128, 96)],
    )
    assert stages >= 3 and torch.allclose(fast, full, atol=1e-5)
    for m in (
        unet(3, width=2),
        seg_to_cls(unet(3, width=2)),
    ):  # skip connections, a crop of the input's size, a global mean: full or exact
        x = torch.rand(1, 1, 64, 64)
        a, real = occlusion(m, x, 1, size=9, stride=5), O.cached_model
        try:
            O.cached_model = lambda *args: None
            b = occlusion(m, x, 1, size=9, stride=5)
        finally:
            O.cached_model = real
        assert torch.allclose(a, b, atol=1e-5 * max(1, b.abs().max().item()))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 21), st.integers(1, 21), st.booleans(), st.integers(0, 99))
def test_convolutions_at_points_are_exact(b, h, w, bias, seed):
    torch.manual_seed(seed)
    conv, x = nn.Conv2d(5, 7, 3, padding=1, bias=bias), torch.randn(b, 5, h, w)
    with torch.no_grad():
        assert torch.allclose(C._Winograd(conv)(x), conv.double()(x.double()).float(), atol=1e-5)


def test_wide_convolutions_are_replaced_and_given_back():
    torch.manual_seed(0)
    m = nn.Sequential(
        nn.Conv2d(3, 128, 4, 4),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(True),
        nn.Conv2d(128, 130, 3, padding=1, bias=False),
        nn.Conv2d(130, 128, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 2),
    ).eval()
    x, real, seen = torch.rand(2, 3, 64, 48), C._Winograd.__call__, []
    assert C._wide(m, x) == [m[1], m[3]] and not C._wide(m, x.double())
    try:
        C._Winograd.__call__ = lambda self, x: seen.append(len(x)) or real(self, x)
        fast = occlusion(m, x, 1, size=8, stride=6)
        C._Winograd.__call__ = lambda self, x: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            occlusion(m, x, 1, size=8, stride=6)
    finally:
        C._Winograd.__call__ = real
    assert seen and not any('forward' in vars(k) or k._forward_hooks for k in m.modules())
    try:
        O.cached_model, cache = lambda *args: None, O.cached_model
        slow = occlusion(m, x, 1, size=8, stride=6)
    finally:
        O.cached_model = cache
    assert torch.allclose(fast, slow, rtol=0, atol=1e-6) and slow.abs().max() > 1e-5


# clips, images, videos


def test_clips(net, phantom_store):
    frames = np.asarray(phantom_store.images[:7])
    maps, probs = explain_clip(net, frames, bs=3)
    x = torch.from_numpy(frames)[:, None].expand(-1, 3, -1, -1).float() / 255
    assert maps.shape == (7, 64, 64) and maps.dtype == np.float32 and probs.shape == (7, 3)
    assert np.allclose(maps, grad_cam(net, x).numpy(), atol=1e-6)
    with frozen_eval(net), torch.no_grad():
        assert np.allclose(probs, net(x).softmax(1), atol=1e-6)
    assert np.allclose(
        explain_clip(net, frames.astype(np.float32) / 255, 'saliency', 2)[0], saliency(net, x, 2), atol=1e-6
    )
    assert np.allclose(
        explain_clip(net, frames, saliency, [0, 1, 2, 0, 1, 2, 0], bs=4)[0],
        saliency(net, x, [0, 1, 2, 0, 1, 2, 0]),
        atol=1e-6,
    )
    fan = np.zeros((7, 64, 64), bool)
    fan[:, :, :20] = True
    m, p = explain_clip(net, frames, 'occlusion', 1, bs=4, fan=fan, size=16, stride=8)
    assert (
        np.allclose(m, occlusion(net, x, 1, size=16, stride=8, fan=fan), atol=1e-6)
        and np.allclose(p, probs, atol=1e-6)
        and not m[:, :, 40:].any()
        and m.any()
    )
    for name in EXPLAINERS:
        assert explain_clip(net, frames[:2], name, 0, fan=fan[:2], **FEW.get(name, {}))[1].shape == (2, 3)
    seg = unet(4, width=2)
    maps, probs = explain_clip(seg, frames[:2], 'grad-cam', 1)
    assert maps.shape == (2, 64, 64) and probs.shape == (2, 4) and np.allclose(probs.sum(1), 1, atol=1e-5)
    for bad, what in (
        (dict(method='gradcam'), 'method must be one of'),
        (dict(target=[0, 1]), '2 targets for 7 frames'),
        (dict(fan=fan[:3]), 'fan has shape'),
        (dict(layer='nowhere'), "no layer 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=what):
            explain_clip(net, frames, **bad)
    with pytest.raises(ValueError, match='at least one'):
        explain_clip(net, frames[:0])
    assert not any(len(m._forward_hooks) for m in net.modules())


def test_videos(tmp_path):
    import av
    from PIL import Image

    frames, maps = np.full((10, 31, 45), 60, np.uint8), np.zeros((10, 31, 45), np.float32)
    maps[:, 4:20, 4:20] = np.linspace(0.1, 1, 10)[:, None, None]
    maps[:, 4:20, 26:40] = -1
    for name in ('a.mp4', 'a.gif'):
        write_map_video(tmp_path / 'deep' / name, frames, maps, 12.5)
    assert sorted(p.name for p in (tmp_path / 'deep').iterdir()) == ['a.gif', 'a.mp4']
    with av.open(str(tmp_path / 'deep/a.mp4')) as box:
        stream = box.streams.video[0]
        shown = [f.to_ndarray(format='rgb24', threads=1).astype(int) for f in box.decode(stream)]
        assert (
            len(shown) == 10
            and shown[0].shape == (32, 46, 3)
            and stream.codec_context.pix_fmt == 'yuv420p'
            and float(stream.average_rate) == 12.5
        )
    for k in (0, 9):
        want = map_rgb(frames, maps)[k].astype(int)
        for y, z in ((12, 12), (12, 33), (26, 22)):
            assert np.abs(shown[k][y, z] - want[y, z]).max() < 24, (k, y, z)
    assert shown[9][12, 12, 0] > shown[0][12, 12, 0] + 40  # weak evidence looks weak beside strong evidence
    gif = Image.open(tmp_path / 'deep/a.gif')
    assert gif.size == (45, 31) and gif.n_frames == 10
    assert sum((gif.seek(k), gif.info['duration'])[1] for k in range(10)) == 800
    assert read_clip(tmp_path / 'deep/a.mp4').frames.shape[0] == 10
    for bad, what in (
        (('a.avi', frames, maps, 10), 'write an .mp4 or a .gif'),
        (('b.mp4', frames, maps, 0), 'rate must be'),
        (('b.mp4', frames, maps[:3], 10), 'must both be'),
        (('b.mp4', frames, maps * np.nan, 10), 'NaN'),
        (('b.mp4', frames[:0], maps[:0], 10), 'at least one'),
    ):
        with pytest.raises(ValueError, match=what):
            write_map_video(tmp_path / 'deep' / bad[0], *bad[1:])
    assert sorted(p.name for p in (tmp_path / 'deep').iterdir()) == ['a.gif', 'a.mp4']


def test_images():
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    frame, m = np.full((20, 30), 80, np.uint8), np.zeros((20, 30))
    m[5, 5], m[9, 9] = 1, -0.5
    fan = np.zeros((20, 30), bool)
    fan[2:, 5:25] = True
    ax = show_map(frame, torch.from_numpy(m), fan, title='t')
    assert ax.images[0].get_array().shape == (20, 30, 3) and ax.get_title() == 't'
    fig = show_maps(frame, [m, m * 3], ['a', 'b'], fan)
    one, three = (a.images[0].get_array()[5, 5].astype(int) for a in fig.axes[:2])
    assert one.sum() < three.sum()  # one scale for both
    fig = show_maps(frame, [m, m * 3], limit='each')
    assert (fig.axes[0].images[0].get_array() == fig.axes[1].images[0].get_array()).all()
    show_map(frame, m * 0, np.ones_like(fan))
    with pytest.raises(ValueError, match='do not fit'):
        show_maps(np.stack([frame] * 3), [m, m])
    with pytest.raises(ValueError, match='no map'):
        show_maps(frame, [])
    plt.close('all')


@pytest.mark.gpu
@METHODS
def test_on_a_gpu(method, net, x):
    want = EXPLAINERS[method](net, x, [0, 1, 2], **FEW.get(method, {}))
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        got = EXPLAINERS[method](net.cuda(), x.cuda(), [0, 1, 2], **FEW.get(method, {}))
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert got.is_cuda and (got.cpu() - want).abs().max() < 1e-3 * want.abs().max()
