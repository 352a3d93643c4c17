"What each process of test_distributed.py runs, and what it saw. Arguments: settings (JSON), results folder."

import json
import os
import sys
from pathlib import Path

import torch
from fastai.vision.all import Callback
from torch import nn

from lus_fastai.data.pairs import pair_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.train import contrastive as C
from lus_fastai.train import distributed as D
from lus_fastai.train import semi_supervised as S

torch.set_num_threads(1)


class Norm(nn.Module):
    "A small backbone; 'group' sees each frame alone, 'batch' has running statistics."

    def __init__(self, norm='group', width=16):
        super().__init__()
        layer = dict(group=lambda: nn.GroupNorm(4, width), batch=lambda: nn.BatchNorm2d(width))[norm]
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 5, 4, 2, bias=False),
            layer(),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.n_features, self.pretrained = width, False

    def forward(self, x):
        return self.body(x)


class Witness(Callback):
    "Keeps items, patients, sums of the pixels of both views, and losses of this process's training batches."

    def __init__(self):
        self.batches, self.losses = [], []

    def before_batch(self):
        if self.training:
            x, ids = self.learn.xb[0], self.learn.yb[-1]
            self.batches.append(
                [
                    [int(i), int(p), round(float(a), 3), round(float(b), 3)]
                    for (i, p), (a, b) in zip(ids, x.double().sum((2, 3, 4)))
                ]
            )

    def after_loss(self):
        if self.training:
            self.losses.append(self.loss.item())


class Stop(Callback):
    "One process fails in the middle of its second epoch."

    def before_batch(self):
        if self.epoch == 1 and D.process_rank() == 1:
            raise RuntimeError('planted failure')


METHODS = dict(
    uscl=lambda: C.USCL(weight=0.2),
    simclr=C.SimCLR,
    moco=lambda: C.MoCo(queue=16, momentum=0.9),
    supervised=C.Supervised,
    pi=lambda: S.PiModel(weight=10.0),
    ensemble=lambda: S.TemporalEnsembling(weight=10.0),
    fixmatch=lambda: S.FixMatch(threshold=0.34),
)


def train(run, store, out, extra=None, world_seed=0):
    "One pretraining as `run` says; the result's history, weights, and what this process saw."
    torch.manual_seed(
        100 + world_seed
    )  # different start weights in each process: those of the main one must win
    backbone, seen = Norm(run.get('norm', 'group')), Witness()
    frames = store.frames
    last = frames['patient'] == sorted(frames['patient'].unique())[-1]
    dls = pair_dls(
        store,
        frames[~last],
        frames[last],
        bs=run['bs'],
        unit=run.get('unit', 'clip'),
        pair=run.get('pair', 'mix'),
        per_epoch=run.get('per_epoch'),
        label_rate=run.get('label_rate', 1.0),
        augment2=S.StrongAugment() if run['method'] == 'fixmatch' else None,
        device='cpu',
        seed=3,
    )
    method = METHODS[run['method']]()
    fit = C.fit_resumable
    C.fit_resumable = lambda *a, cbs=(), **kw: fit(*a, cbs=[*cbs, seen, *([extra] if extra else [])], **kw)
    try:
        net, history = C.pretrain(
            method, dls, backbone, run['epochs'], out, lr=1e-2, seed=5, log=1, warm=1, precision='fp32', dim=8
        )
    finally:
        C.fit_resumable = fit
    return dict(history=history.to_dict('list'), batches=seen.batches, losses=seen.losses), {
        k: v.clone() for k, v in net.state_dict().items()
    }


def main(settings, out):
    rank = D.join_processes()
    settings, out = json.loads(Path(settings).read_text()), Path(out)
    with D.main_first():
        if rank == 0:
            (out / 'order.txt').write_text('0')
        else:
            assert (out / 'order.txt').read_text() == '0'
    store = FrameStore(settings['store'])
    wrote, write = [], os.replace
    os.replace = lambda a, b: (wrote.append(Path(b).name), write(a, b))[1]
    seen = {}
    for name, run in settings['runs'].items():
        seen[name], weights = train(run, store, out / name, world_seed=rank)
        torch.save(weights, out / f'{name}-rank{rank}.pt')
    world, backend = D.n_processes(), torch.distributed.get_backend_config()
    left = D.leave_processes(), D.n_processes()
    (out / f'rank{rank}.json').write_text(
        json.dumps(dict(runs=seen, wrote=wrote, world=world, backend=backend, left=left))
    )
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{out}/again', rank=rank, world_size=world
    )
    train(settings['fail'], store, out / 'fail', Stop(), rank)
    print('the failing run went on', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
