"X-Unet, V-Unet, segmenters and autoencoders; halves of networks that move; gradual unfreezing."

import warnings

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lus_fastai.core import frozen_eval, seed_all
from lus_fastai.models.backbones import create_backbone
from lus_fastai.models.classifiers import BackboneClassifier
from lus_fastai.models.segmenters import SingleValueBatchNorm, autoencoder, segmenter
from lus_fastai.models.transfer import (
    GradualUnfreeze,
    copy_decoder,
    copy_encoder,
    freeze,
    load_weights,
    param_count,
    save_weights,
    stages,
)
from lus_fastai.models.unet import keras_init, unet, vunet, xunet

TRUNKS = dict(vgg16=14_714_688, resnet50=23_508_032, resnext50=22_979_904)


def total(m):
    return sum(p.numel() for p in m.parameters())


def conv(i, o, k=3):
    return i * o * k * k + o


def meta(f, *args, **kwargs):
    "A network without memory for its weights."
    with torch.device('meta'):
        return f(*args, **kwargs)


def state(m):
    return {k: v.clone() for k, v in m.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# counts


def test_xunet_and_vunet_by_hand():
    w = [64, 128, 256, 512, 1024]
    down = sum(conv(i, o) + conv(o, o) for i, o in zip([3] + w, w))
    back = sum(conv(2 * o, o, 2) + conv(2 * o, o) + conv(o, o) for o in w[:4])
    assert total(meta(xunet)) == down + back + 65 == 31_031_745
    vgg = sum(
        conv(i, o)
        for i, o in zip(
            [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512],
            [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
        )
    )

    def decoder(ns):
        return (
            sum(
                conv(i, o, 2) + conv(2 * o, o) + (n - 1) * conv(o, o)
                for i, o, n in zip([512, 512, 256, 128], [512, 256, 128, 64], ns)
            )
            + 65
        )

    for ns, n in (((3, 3, 2, 2), 28_804_545), ((2, 2, 2, 2), 25_854_657)):
        assert total(meta(vunet, convs=ns)) == vgg + decoder(ns) == n
    assert total(meta(xunet, c_in=1)) == 31_030_593


def test_what_cheng_and_lam_freeze():
    net = meta(xunet)
    assert (freeze(net, 'bottleneck frozen').trainable, param_count(net)['frozen']) == (
        16_873_921,
        14_157_824,
    )
    net = meta(vunet)
    assert freeze(net, 'encoder frozen').frozen == 14_714_688 and freeze(
        net, 'bottleneck frozen'
    ).frozen == 3 * conv(512, 512)
    assert freeze(net, 'all frozen').trainable == 0 and freeze(net, 'none frozen').frozen == 0
    for word in ('none', 'encoder', 'bottleneck'):
        with pytest.raises(ValueError, match=f"not '{word}'"):
            freeze(net, word)


@pytest.mark.parametrize('arch', ['unet', 'deeplabv3'])
@pytest.mark.parametrize('backbone', TRUNKS)
def test_trunks_of_merand(arch, backbone):
    net = meta(segmenter, arch, backbone)
    assert total(net.encoder) == TRUNKS[backbone] and net.head[0].out_channels == 13
    last = stages(net.encoder)[-1]
    assert freeze(net, 'bottleneck frozen').frozen == sum(p.numel() for p in last) > 7_000_000
    assert freeze(net, 'encoder frozen').frozen == TRUNKS[backbone]


def test_rates_of_deeplabv3_shrink_with_its_images():
    seed_all(0)
    x = torch.rand(2, 1, 64, 64)
    with pytest.warns(UserWarning, match=r'segmenter\(size=64\)'):
        segmenter('deeplabv3', 'resnet18', 2, 1).eval()(x)
    net = segmenter('deeplabv3', 'resnet18', 2, 1, size=64).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net(x)
    convs = [
        m for m in net.decoder.modules() if getattr(m, 'kernel_size', None) == (3, 3) and m.dilation != (1, 1)
    ]
    assert sorted({m.dilation[0] for m in convs}) == [3, 4]  # and one of rate 1
    with torch.no_grad():
        before = net(x)
        for m in convs:  # as published, at this size: only the centre tap sees anything
            m.weight[..., [0, 2], :] = m.weight[..., [0, 2]] = 0
        assert (net(x) - before).abs().max() > 1e-4, 'taps beside the centre matter'


def test_the_segmenters_are_the_librarys():
    import segmentation_models_pytorch as smp

    seed_all(0)
    x = torch.rand(2, 3, 64, 64)
    for arch, cls, args in (
        ('unet', smp.Unet, {}),
        ('deeplabv3', smp.DeepLabV3, dict(encoder_output_stride=8, decoder_atrous_rates=(12, 24, 36))),
    ):
        ours, theirs = (
            segmenter(arch, 'resnet18', 4),
            cls('resnet18', encoder_weights=None, classes=4, **args),
        )
        for part, other in (('encoder', 'encoder'), ('decoder', 'decoder'), ('head', 'segmentation_head')):
            getattr(ours, part).load_state_dict(getattr(theirs, other).state_dict())
        with frozen_eval(ours), frozen_eval(theirs), torch.no_grad():
            assert torch.allclose(ours(x), theirs((x - 0.5) / 0.25), atol=1e-5)


def test_dilated_vgg_against_convolutions_by_hand():
    seed_all(0)
    vgg, net = create_backbone('vgg16', 3), meta(segmenter, 'deeplabv3', 'vgg16')
    encoder = net.encoder.to_empty(device='cpu')
    copy_encoder(vgg, encoder)
    x = torch.rand(1, 3, 48, 40)
    with torch.no_grad():
        *skips, deep = encoder(x)
        y = vgg.features[:23](x)  # torchvision's, up to the fourth pooling
        for i in (24, 26, 28):
            y = F.conv2d(y, vgg.features[i].weight, vgg.features[i].bias, padding=2, dilation=2).relu()
    assert torch.allclose(deep, y, atol=1e-5) and deep.shape == (1, 512, 6, 5) and len(skips) == 3
    rates = [
        m.dilation[0]
        for m in net.decoder.aspp.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert rates == [12, 24, 36] and net.decoder.conv.out_channels == 256


# sizes, channels, classes

SMALL = {
    'X-Unet': lambda c, n: xunet(n, c, width=4),
    'V-Unet': lambda c, n: vunet(n, c, convs=(1, 1, 1, 1)),
    'U-Net': lambda c, n: segmenter('unet', 'mobilenetv3_small_050', n, c),
    'DeepLabv3': lambda c, n: segmenter('deeplabv3', 'mobilenetv3_small_050', n, c),
    'U-Net over ConvNeXt': lambda c, n: segmenter('unet', 'convnext_atto', n, c),
}


@pytest.mark.parametrize('name', SMALL)
def test_any_size_any_channels_any_classes(name):
    for c, n, size in ((1, 1, (16, 16)), (2, 13, (33, 47)), (3, 2, (17, 64))):
        seed_all(0)
        net = SMALL[name](c, n)
        x = torch.rand(2, c, *size)
        with frozen_eval(net), torch.no_grad():
            y = net(x)
            again = net(x[1:])
        assert y.shape == (2, n, *size) and y.isfinite().all() and torch.allclose(y[1:], again, atol=1e-4)
        for h, w in ((15, 40), (40, 15), (1, 1)):
            with pytest.raises(ValueError, match=f'{h}x{w} pixels is too small'):
                net(torch.rand(1, c, h, w))


NETS = {}


@settings(max_examples=8, deadline=None)
@given(h=st.integers(16, 70), w=st.integers(16, 70), name=st.sampled_from(['X-Unet', 'U-Net', 'DeepLabv3']))
def test_padding_repeats_the_border_and_is_cropped(h, w, name):
    if name not in NETS:
        seed_all(0)
        NETS[name] = SMALL[name](1, 2)
    net = NETS[name]
    k = {'X-Unet': 16, 'U-Net': 32, 'DeepLabv3': 8}[name]
    x = torch.rand(1, 1, h, w)
    rows, columns = (
        torch.arange(-(-h // k) * k).clamp(max=h - 1),
        torch.arange(-(-w // k) * k).clamp(max=w - 1),
    )
    with frozen_eval(net), torch.no_grad():
        assert torch.equal(net(x), net(x[..., rows, :][..., columns])[..., :h, :w])


@pytest.mark.parametrize('name', ['X-Unet', 'U-Net', 'DeepLabv3'])
def test_same_seed_same_network_and_every_loss_trains_it(name):
    nets = []
    for _ in range(2):
        seed_all(3)
        nets.append(SMALL[name](1, 3))
    assert equal(nets[0].state_dict(), nets[1].state_dict())
    x, codes = torch.rand(2, 1, 33, 40), torch.randint(0, 3, (2, 33, 40))
    for loss in (
        lambda z: F.cross_entropy(z, codes),
        lambda z: F.binary_cross_entropy_with_logits(z, F.one_hot(codes, 3).permute(0, 3, 1, 2).float()),
    ):
        nets[0].zero_grad()
        loss(nets[0](x)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in nets[0].parameters())


@pytest.mark.parametrize('backbone', ['mobilenetv3_small_050', 'resnet18'])
def test_deeplab_trains_on_a_batch_of_one(backbone):
    net = segmenter('deeplabv3', backbone, 2, 1).train()
    net(torch.rand(1, 1, 48, 48)).sum().backward()
    lone = next(m for m in net.modules() if isinstance(m, SingleValueBatchNorm))
    assert lone.num_batches_tracked == 0 and lone.running_mean.abs().sum() == 0  # one value has no statistics
    net(torch.rand(2, 1, 48, 48))
    assert lone.num_batches_tracked == 1


def test_a_unet_says_what_a_batch_of_one_small_image_lacks():
    net = segmenter('unet', 'resnet18', 2, 1).train()
    with pytest.raises(ValueError, match='one image of 20x32 pixels .* more images in a batch'):
        net(torch.rand(1, 1, 20, 32))
    assert (
        net(torch.rand(2, 1, 20, 32)).shape
        == net(torch.rand(1, 1, 33, 32))[..., :20, :].expand(2, -1, -1, -1).shape
    )


def test_bad_names_and_weights_that_cannot_be_loaded(monkeypatch):
    with pytest.raises(ValueError, match='resnet50'):
        segmenter('unet', 'resnet_50')
    with pytest.raises(ValueError, match="'unet' or 'deeplabv3'"):
        segmenter('fpn', 'resnet18')
    with pytest.raises(ValueError, match='no unet over'):
        segmenter('unet', 'vit_tiny_patch16_224')
    with pytest.raises(ValueError, match='no deeplabv3 over'):
        segmenter('deeplabv3', 'vit_tiny_patch16_224')

    def none(name, names):
        raise ConnectionError('no network')

    monkeypatch.setattr('lus_fastai.models.backbones._imagenet', none)
    with pytest.warns(UserWarning, match='starts from scratch'):
        net = segmenter('unet', 'resnet18', weights='imagenet')
    assert net.head[0].out_channels == 13


def test_keras_starts_with_glorot():
    seed_all(0)
    net = keras_init(xunet(width=8))
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            k = m.kernel_size[0] ** 2
            limit = (6 / (k * (m.in_channels + m.out_channels))) ** 0.5
            assert m.weight.abs().max() <= limit and not m.bias.any()
            if m.weight.numel() > 2000:
                assert abs(m.weight.std() - limit / 3**0.5) < 0.05 * limit


# halves that move


def test_encoders_move_between_all_kinds_of_networks(tmp_path):
    seed_all(0)
    backbone = create_backbone('resnet18', 3)
    backbone.bn1.running_var.fill_(7.0)
    want = {k: v for k, v in backbone.state_dict().items()}
    classifier, ae, unets, deeplab = (
        BackboneClassifier(backbone, 14),
        autoencoder('resnet18'),
        segmenter('unet', 'resnet18'),
        segmenter('deeplabv3', 'resnet18'),
    )
    save_weights(classifier, tmp_path / 'c.safetensors')
    sources = [
        backbone,
        classifier,
        classifier.state_dict(),
        tmp_path / 'c.safetensors',
        load_weights(tmp_path / 'c.safetensors'),
    ]
    for src in sources:
        account = copy_encoder(src, unets)
        assert (
            equal(unets.encoder.state_dict(), want)
            and len(account.loaded) == len(want)
            and not account.missing
        )
        unets.encoder.conv1.weight.data.zero_()
    copy_encoder(classifier, ae)
    copy_encoder(ae, unets)
    copy_encoder(unets, deeplab)
    assert equal(deeplab.encoder.state_dict(), want)  # statistics of batch norm too
    fresh = create_backbone('resnet18', 3)
    copy_encoder(deeplab, fresh)
    assert equal(fresh.state_dict(), want)
    given_ = segmenter('unet', 'resnet18', weights=classifier)
    assert equal(given_.encoder.state_dict(), want)


@pytest.mark.parametrize(
    'name', ['mobilenetv3_small_050', 'convnext_atto', 'regnetx_002', 'tf_efficientnet_lite0']
)
def test_encoders_of_timm_move_under_either_name(name):
    seed_all(0)
    backbone = create_backbone(name, 3)
    net = segmenter('unet', name, 2, weights=backbone)
    x = torch.rand(1, 3, 64, 64)
    with frozen_eval(backbone), frozen_eval(net), torch.no_grad():
        deep, whole = net.encoder(x)[-1], backbone.forward_features(x)
    if deep.shape == whole.shape:
        assert torch.allclose(deep, whole, atol=1e-5)


def test_a_grey_stem_is_divided_among_any_number_of_channels():
    seed_all(0)
    grey, x = create_backbone('resnet18', 1), torch.rand(1, 1, 32, 32)
    for c in (1, 2, 3, 5):
        net = segmenter('unet', 'resnet18', 2, c, weights=grey)
        with frozen_eval(net), frozen_eval(grey), torch.no_grad():
            assert torch.allclose(net.encoder(x.expand(-1, c, -1, -1))[-1].mean((2, 3)), grey(x), atol=1e-4)
    colour = create_backbone('resnet18', 3)
    net = segmenter('unet', 'resnet18', 2, 1, weights=colour)
    assert torch.allclose(net.encoder.conv1.weight, colour.conv1.weight.sum(1, keepdim=True))


@pytest.mark.parametrize(
    'src, dst, named',
    [
        ('resnet18', 'resnet34', 'layer1.2.conv1.weight'),
        ('resnet34', 'resnet18', 'layer1.2.conv1.weight'),
        ('resnet50', 'resnext50', 'layer1.0.conv1.weight'),
        ('vgg16', 'resnet18', 'conv1.weight'),
    ],
)
def test_an_encoder_of_another_depth_or_kind_is_an_error_that_names_the_tensors(src, dst, named):
    a, b = meta(segmenter, 'unet', src), meta(segmenter, 'unet', dst)
    with pytest.raises(ValueError, match='another depth') as e:
        copy_encoder(a, b)
    assert named in str(e.value)
    with pytest.raises(ValueError, match='the decoder does not fit'):
        copy_decoder(a, meta(segmenter, 'deeplabv3', dst))


def test_a_decoder_fills_the_upsampled_channels_and_no_others():
    seed_all(0)
    ae, net = autoencoder('vgg16', 1), segmenter('unet', 'vgg16', 2, 1)
    for m in ae.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.fill_(0.5)
    before, encoder, head = state(net.decoder), state(net.encoder), state(net.head)
    account = copy_decoder(ae, net)
    theirs = ae.decoder.state_dict()
    for k, v in net.decoder.state_dict().items():
        n = theirs[k].shape[1] if v.ndim == 4 else None
        assert torch.equal(v[:, :n] if n else v, theirs[k]) and (
            n is None or torch.equal(v[:, n:], before[k][:, n:])
        )
    assert len(account.fitted) == 4 and account.n_loaded == sum(v.numel() for v in theirs.values())
    assert equal(net.encoder.state_dict(), encoder) and equal(net.head.state_dict(), head)


def test_an_error_changes_nothing():
    seed_all(0)
    net = segmenter('unet', 'resnet18', 2)
    before = state(net)
    for f in (
        lambda: copy_encoder(meta(create_backbone, 'resnet34', 3), net),
        lambda: copy_decoder(meta(segmenter, 'deeplabv3', 'resnet18'), net),
        lambda: copy_encoder({'a': torch.zeros(1)}, net),
    ):
        with pytest.raises(ValueError, match='does not fit'):
            f()
    assert equal(net.state_dict(), before)


@pytest.mark.parametrize('policy', ['encoder frozen', 'bottleneck frozen', 'head'])
@pytest.mark.parametrize('name', ['X-Unet', 'U-Net'])
def test_a_step_moves_what_trains_and_nothing_else(name, policy):
    seed_all(0)
    net = xunet(width=4, c_in=1) if name == 'X-Unet' else segmenter('unet', 'resnet18', 1, 1)
    freeze(net, policy)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    net.train()(torch.rand(2, 1, 64, 64)).square().mean().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    for k, p in net.named_parameters():
        if not p.requires_grad:
            assert p.grad is None and torch.equal(p, before[k])
        elif p.ndim > 1:
            assert not torch.equal(p, before[k]), k


# gradual unfreezing


class Flags(Callback):
    "Which top modules train, epoch by epoch; stops in a chosen epoch, as Ctrl-C does."

    order = 50

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def before_train(self):
        self.seen.append({n.split('.')[0] for n, p in self.model.named_parameters() if p.requires_grad})

    def after_batch(self):
        if self.training and self.epoch == self.stop:
            raise KeyboardInterrupt


def small_learner(model, *cbs):
    from fastai.vision.all import Adam, DataLoader, DataLoaders, Learner

    items = [(torch.rand(1, 16, 16), torch.rand(2, 16, 16)) for _ in range(4)]
    return Learner(
        DataLoaders(DataLoader(items, bs=2), DataLoader(items, bs=2)),
        model,
        loss_func=nn.MSELoss(),
        opt_func=Adam,
        cbs=list(cbs),
    )


def fit(learn, n, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n, 0.01, **kwargs)


OPENS = ['head', 'decoder', 'ups', 'bottleneck', 'encoder']


def test_stages_open_from_the_head_and_everything_is_as_before():
    seed_all(0)
    net, flags = unet(2, width=2), Flags()
    learn = small_learner(net, GradualUnfreeze(every=2), flags)
    fit(learn, 11)
    assert flags.seen == [set(OPENS[: 1 + e // 2]) for e in range(10)] + [set(OPENS)]
    assert param_count(net)['frozen'] == 0
    before = state(net)
    fit(learn, 1)  # a second fit begins at the head, and Adam's momentum moves nothing else
    assert {k.split('.')[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])} == {
        'head'
    } and flags.seen[-1] == {'head'}
    fit(learn, 4, start_epoch=2)
    assert flags.seen[-2:] == [{'head', 'decoder'}] * 2  # taken up where it was


def test_what_was_frozen_before_stays_frozen():
    net, flags = unet(2, width=2), Flags()
    freeze(net, 'bottleneck frozen')
    want = [p.requires_grad for p in net.parameters()]
    fit(small_learner(net, GradualUnfreeze(), flags), 6)
    assert (
        flags.seen[-1] == set(OPENS) - {'bottleneck'} and [p.requires_grad for p in net.parameters()] == want
    )


def test_interrupt_lr_find_and_get_preds():
    net, flags = unet(2, width=2), Flags(stop=1)
    learn = small_learner(net, GradualUnfreeze(), flags)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 5)
    assert param_count(net)['frozen'] > 0  # fastai says nothing to callbacks then
    flags.stop = None
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    assert flags.seen[-1] == set(OPENS) and param_count(net)['frozen'] == 0
    with learn.no_bar():
        learn.get_preds()
    assert param_count(net)['frozen'] == 0
    fit(learn, 2)
    assert flags.seen[-2:] == [{'head'}, {'head', 'decoder'}] and param_count(net)['frozen'] == 0
    with pytest.raises(ValueError, match='1 or more'):
        GradualUnfreeze(0)
