"""One process of `test_launch`: `reproduce` with tiny settings, as `lus_repro uscl` calls it.

Argument: a folder. Which files this process wrote goes to rank<k>.json.
"""

import json
import os
import sys
from pathlib import Path

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from lus_fastai.models.transfer import copy_weights
from lus_fastai.papers import uscl

TINY = uscl.UsclSettings(
    backbones=('resnet18',),
    size=64,
    lr=1e-4,
    max_frames=2,
    bs=8,
    steps=4,
    folds=2,
    tune_epochs=1,
    patients=6,
    budgets=(),
    core=('random', 'SimCLR', 'USCL'),
    parts=('core',),
    seeds=(0,),
)


def backbone(name, weights=None):
    "A short ResNet with group norm: statistics of batch norm would be of each process alone."
    net = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=lambda n: nn.GroupNorm(8, n))
    net.conv1, net.fc, net.n_features, net.pretrained = (
        nn.Conv2d(1, 64, 7, 2, 3, bias=False),
        nn.Identity(),
        512,
        False,
    )
    if weights not in (None, 'imagenet'):
        copy_weights(weights, net, strict=True)
    return net


def reproduce(home):
    "The report's path, or None in all processes but the main one."
    create, uscl.create_backbone = uscl.create_backbone, backbone
    try:
        return uscl.reproduce('phantom', out=home / 'results', cache=home, settings=TINY)
    finally:
        uscl.create_backbone = create


if __name__ == '__main__':
    home, rank, wrote, replace = Path(sys.argv[1]), os.environ['RANK'], [], os.replace
    os.replace = lambda a, b: (wrote.append(str(Path(b).relative_to(home))), replace(a, b))[1]
    report = reproduce(home)
    (home / f'rank{rank}.json').write_text(json.dumps(dict(report=report and report.name, wrote=wrote)))
