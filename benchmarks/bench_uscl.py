"""One USCL step against lightly's SimCLR step: the same ResNet-18, 32 pairs of 96x96, forward, loss,
backward, Adam; then the memory of each by batch size."""

import subprocess
import sys

import torch
from common import compare
from torch import nn

from lus_fastai.models.backbones import create_backbone
from lus_fastai.train.callbacks import autocast_for
from lus_fastai.train.contrastive import USCL, ContrastiveNet


def batch(b):
    x = torch.rand(b, 2, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    return (
        x,
        nn.functional.one_hot(torch.arange(b) % 3, 3).float()[:, None].repeat(1, 2, 1),
        torch.stack([torch.arange(b), torch.arange(b)], 1),
    )


def uscl(b):
    x, y, ids = batch(b)
    net = ContrastiveNet(create_backbone('resnet18'), 3).to(memory_format=torch.channels_last).train()
    opt, method = torch.optim.Adam(net.parameters(), 3e-4, weight_decay=1e-4), USCL()

    def step():
        with autocast_for('cpu'):
            pred = net(x)
        method.compute(pred, y, ids).backward()
        opt.step()
        opt.zero_grad()

    return step


def simclr(b):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    x = batch(b)[0]
    net = nn.Sequential(create_backbone('resnet18'), SimCLRProjectionHead(512, 512, 256)).train()
    opt, loss = torch.optim.Adam(net.parameters(), 3e-4, weight_decay=1e-4), NTXentLoss(0.5)

    def step():
        with autocast_for('cpu'):
            z1, z2 = net(x[:, 0]), net(x[:, 1])
        loss(z1.float(), z2.float()).backward()
        opt.step()
        opt.zero_grad()

    return step


def resident(field):
    "Megabytes of this process: VmRSS now, VmHWM at most (Linux)."
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(field)) / 1024


def peak(name, b):
    "Megabytes that three steps add to a process of their own, at most."
    code = (
        f"import bench_uscl as m; s = m.{name}({b}); open('/proc/self/clear_refs', 'w').write('5'); "
        "before = m.resident('VmRSS'); s(); s(); s(); print(m.resident('VmHWM') - before)"
    )
    return float(
        subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code],
            capture_output=True,
            text=True,
            check=True,
            cwd=__file__.rsplit('/', 1)[0],
        ).stdout.split()[-1]
    )


if __name__ == '__main__':
    compare("USCL step / lightly's SimCLR step", uscl(32), simclr(32), 'pairs', 32)
    for b in (8, 16, 32, 64):
        print(
            f"memory of {b} pairs: USCL {peak('uscl', b):.0f} MB, "
            f"lightly's SimCLR {peak('simclr', b):.0f} MB",
            flush=True,
        )
