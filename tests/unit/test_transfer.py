"Freezing by name on networks of several libraries, stages, and rates per stage."

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lus_fastai.models.backbones import create_backbone
from lus_fastai.models.classifiers import BackboneClassifier, covidnet, seg_to_cls
from lus_fastai.models.transfer import copy_weights, discriminative_lrs, freeze, param_count, stages
from lus_fastai.models.unet import unet

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
TIMM = (
    'mobilenetv3_small_050',
    'convnext_atto',
    'vit_tiny_patch16_224',
    'regnetx_002',
    'densenet121',
    'vgg11',
)
ALL = ('resnet18', 'vgg16', *TIMM)


def meta(name, n=3):
    "A classifier without memory for its weights."
    place = 'cpu' if name == 'regnetx_002' else 'meta'  # timm computes its widths; this one is small
    with torch.device(place), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return BackboneClassifier(create_backbone(name, channels=3), n)


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('channels', [1, 3])
def test_the_counts_of_chen_2021(channels):
    net = BackboneClassifier(create_backbone('resnet18', channels), 3)
    account = freeze(net, 'last 3')
    assert account.trainable == 4_722_179 == 4_720_640 + 1_539 == param_count(net)['trainable']
    assert account.trainable + account.frozen == {1: 11_170_240, 3: 11_176_512}[channels] + 1_539
    assert str(account).startswith('last 3: 4,722,179 of') and 'backbone.layer4.1.conv1' in str(account)


def test_the_counts_of_cheng_2021():
    with torch.device('meta'):
        net = unet(1, c_in=3)
    account = freeze(net, 'bottleneck frozen')
    assert (account.frozen, account.trainable) == (14_157_824, 16_873_921)
    freeze(net, 'encoder frozen')
    assert {n.split('.')[0] for n, f in flags(net).items() if not f} == {'encoder'}
    inside = seg_to_cls(unet(4, width=2))  # the U-Net inside a classifier
    assert freeze(inside, 'bottleneck frozen').frozen == sum(
        p.numel() for p in inside.segmenter.bottleneck.parameters()
    )


@pytest.mark.parametrize('name', ALL)
def test_last_n_is_the_end_of_the_list_of_layers_and_grows_with_n(name):
    net = meta(name)
    layers = [n for n, m in net.named_modules() if isinstance(m, LAYERS)]
    assert layers[-1] == 'head'
    before = set()
    for n in range(1, len(layers) + 1):
        freeze(net, f'last {n}')
        trains = {k for k, f in flags(net).items() if f}
        assert before < trains and {f'{l}.weight' for l in layers[-n:]} <= trains
        assert not {f'{l}.weight' for l in layers[:-n]} & trains
        before = trains
    with pytest.raises(ValueError, match=f'has {len(layers)} weight layers'):
        freeze(net, f'last {len(layers) + 1}')


@pytest.mark.parametrize('name', ALL)
def test_the_other_policies_on_any_backbone(name):
    net = meta(name)
    backbone = sum(p.numel() for p in net.backbone.parameters())
    assert freeze(net, 'head').layers == ['head'] == freeze(net, 'encoder frozen').layers
    assert freeze(net, 'all').frozen == 0
    stage = freeze(net, 'bottleneck frozen')
    assert (
        0 < stage.frozen < backbone
        and not any(p.requires_grad for p in stages(net.backbone)[-1])
        and net.head.weight.requires_grad
    )


@pytest.mark.parametrize('name', ALL)
def test_stages_hold_every_parameter_once_in_order_and_normalisation_goes_with_the_layer_before(name):
    net = meta(name)
    groups = stages(net)
    assert len(groups) >= 4 and sorted(id(p) for g in groups for p in g) == sorted(
        id(p) for p in net.parameters()
    )
    assert {id(p) for p in groups[-1]} == {id(p) for p in net.head.parameters()}
    position = {id(p): i for i, p in enumerate(net.parameters())}
    starts = [min(position[id(p)] for p in g) for g in groups]
    assert starts == sorted(starts)
    assert all(any(p.ndim > 1 for p in g) for g in groups)  # none is a lone batch norm


def test_stages_of_small_things():
    assert [len(g) for g in stages(nn.Linear(2, 2))] == [2]
    assert [
        len(g) for g in stages(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1)))
    ] == [4, 2]
    layer = nn.Linear(2, 2)
    assert [len(g) for g in stages(nn.Sequential(layer, layer, nn.Linear(2, 2)))] == [
        2,
        2,
    ]  # shared weights count once


def test_what_is_frozen_does_not_move_what_trains_moves_and_batch_norm_stays_in_training_mode():
    torch.manual_seed(0)
    net = BackboneClassifier(create_backbone('resnet18'), 3).train()
    account, before = freeze(net, 'last 3'), copy.deepcopy(net.state_dict())
    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.01, weight_decay=1e-4)
    for _ in range(2):
        opt.zero_grad()
        nn.functional.cross_entropy(net(torch.rand(4, 1, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
        opt.step()
    assert all(m.training for m in net.modules())
    for k, p in net.named_parameters():
        assert torch.equal(p, before[k]) != p.requires_grad, k
        assert p.requires_grad or p.grad is None
    assert not torch.equal(
        net.backbone.layer1[0].bn1.running_var, before['backbone.layer1.0.bn1.running_var']
    )
    assert account.layers[-1] == 'head'


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=12) | st.integers() | st.none())
def test_unknown_policies_name_the_known_ones_and_change_nothing(policy):
    net = unet(2, width=2)
    freeze(net, 'head')
    before = flags(net)
    if policy in ('all', 'head'):
        return
    with pytest.raises(ValueError, match="'encoder frozen' or 'last n'|'last -?[0-9]+' cannot be"):
        freeze(net, policy)
    assert flags(net) == before


@pytest.mark.parametrize(
    'policy, message',
    [
        ('last 0', 'n is 1 to'),
        ('last -1', 'n is 1 to'),
        ('last', 'policy is one of'),
        ('last 1.5', 'policy is one of'),
        ('Last 3', 'policy is one of'),
    ],
)
def test_bad_numbers(policy, message):
    with pytest.raises(ValueError, match=message):
        freeze(unet(2, width=2), policy)


def test_a_policy_that_the_network_has_no_part_for():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    for policy in ('bottleneck frozen', 'encoder frozen'):
        with pytest.raises(ValueError, match='no module named'):
            freeze(net, policy)
    assert all(flags(net).values())
    with pytest.raises(ValueError, match='has 0 weight layers'):
        freeze(nn.ReLU(), 'head')


def test_freezing_again_forgets_the_policy_before():
    net = covidnet('resnet18', weights=None, freeze=True)
    freeze(net, 'all')
    assert all(flags(net).values())
    assert freeze(net, 'head').layers == ['head.2']


def test_rates_fall_by_the_factor_and_torch_takes_the_groups():
    net = meta('resnet18')
    groups = discriminative_lrs(net, 0.01, 0.5)
    assert [len(g['params']) for g in groups] == [len(g) for g in stages(net)]
    assert [g['lr'] for g in groups] == pytest.approx([0.01 * 0.5**k for k in reversed(range(len(groups)))])
    assert [g['lr'] for g in torch.optim.SGD(groups).param_groups] == [g['lr'] for g in groups]
    for factor in (0, -1, 1.5):
        with pytest.raises(ValueError, match='factor must be'):
            discriminative_lrs(net, 0.01, factor)


def test_weights_of_a_state_dictionary_and_of_a_module_arrive_alike(tmp_path):
    a, b, c = (create_backbone('resnet18') for _ in range(3))
    assert copy_weights(a, b).n_loaded == copy_weights(a.state_dict(), c).n_loaded
    assert all(
        torch.equal(x, y) and torch.equal(x, z)
        for x, y, z in zip(*(m.state_dict().values() for m in (a, b, c)))
    )
