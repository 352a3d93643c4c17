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
from lus_fastai.train import callbacks

TINY = uscl.UsclSettings(
    lr=1e-4,
    max_frames=2,
    bs=8,
    epochs=2,
    folds=2,
    tune_epochs=1,
    patients=6,
    label_rates=(),
    compared=('SimCLR', 'USCL'),
    ablated=(),
    detected=(),
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
    native, callbacks.has_bf16 = (
        callbacks.has_bf16,
        lambda device: False,
    )  # in bfloat16 two halves of a batch differ from the whole in the third digit
    try:
        return uscl.reproduce('phantom', out=home / 'results', cache=home, settings=TINY)
    finally:
        uscl.create_backbone, callbacks.has_bf16 = create, native


if __name__ == '__main__':
    home, rank, wrote, replace = Path(sys.argv[1]), os.environ['RANK'], [], os.replace
    os.replace = lambda a, b: (wrote.append(str(Path(b).relative_to(home))), replace(a, b))[1]
    report = reproduce(home)
    (home / f'rank{rank}.json').write_text(json.dumps(dict(report=report and report.name, wrote=wrote)))
