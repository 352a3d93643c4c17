"""Contrastive pairs a second: `pair_dls` on a frame store against PIL and torchvision item by item; three
96x96 frames of a clip mixed to two, cropped, flipped, jittered."""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import compare
from PIL import Image
from torchvision import transforms as T

from lus_fastai.data.pairs import pair_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.synth.phantom import phantom_dataset


class Pairs(torch.utils.data.Dataset):
    "What one writes first: open three files of a clip, blend them, transform each view."

    def __init__(self, clips):
        self.clips, self.tfm = (
            clips,
            T.Compose(
                [
                    T.RandomResizedCrop(96, (0.8, 1), (0.8, 1.25)),
                    T.RandomHorizontalFlip(),
                    T.ColorJitter(0.8, 0.8),
                    T.ToTensor(),
                ]
            ),
        )

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        first, anchor, second = (Image.open(f) for f in random.sample(self.clips[i], 3))
        return torch.stack(
            [self.tfm(Image.blend(anchor, x, random.betavariate(0.5, 0.5))) for x in (first, second)]
        )


with tempfile.TemporaryDirectory() as tmp:
    tmp = Path(tmp)
    store = FrameStore.build(
        phantom_dataset(tmp / 'phantom', patients=64, clips=2, n=6, size=(96, 96)),
        tmp / 'store',
        size=(96, 96),
        rate=60,
    )
    files = []
    for _, rows in store.frames.groupby('clip'):
        files.append([str(tmp / f'{r:05d}.png') for r in rows['row']])
        for r, f in zip(rows['row'], files[-1]):
            Image.fromarray(np.asarray(store.images[r])).save(f)
    ours = pair_dls(store, store.frames, bs=32).train

    def through(dl, times=8):
        for _ in range(times):
            for _batch in dl:
                pass

    assert next(iter(ours))[0].shape == (32, 2, 1, 96, 96)
    for workers in (0, 2):
        peer = torch.utils.data.DataLoader(
            Pairs(files), 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        compare(
            f'pairs from a frame store / PIL and torchvision ({workers} workers)',
            lambda: through(ours),
            lambda peer=peer: through(peer),
            'pairs',
            8 * len(files),
            9,
        )
