"""A Learner with the callbacks of cross_validate against a bare PyTorch loop: the same U-Net steps, fp32,
128x128, batch 8."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import compare
from fastai.vision.all import CrossEntropyLossFlat, Learner, OptimWrapper

from lus_fastai.data.loaders import frame_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.models.unet import unet
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.train.callbacks import AutoPrecision, EpochSeed, PixelCounts, PlateauLR, TrainingSettings
from lus_fastai.train.cross_validation import FoldLog

with tempfile.TemporaryDirectory() as tmp:
    store = FrameStore.build(
        phantom_dataset(f'{tmp}/phantom', patients=12, clips=1, size=(128, 128)),
        f'{tmp}/store',
        size=(128, 128),
        max_frames=8,
    )
    frames = store.frames.iloc[:64]
    dls = frame_dls(store, frames, frames.iloc[:8], 'dense', bs=8, device='cpu')
    learn = Learner(
        dls,
        unet(7, width=16),
        loss_func=CrossEntropyLossFlat(axis=1),
        opt_func=partial(OptimWrapper, opt=torch.optim.Adam),
    )
    log = FoldLog(PixelCounts(7), frames.iloc[:8], Path(tmp), TrainingSettings(1))
    learn.add_cbs([AutoPrecision('fp32'), EpochSeed(0), log, PlateauLR(log.watched)])
    model = unet(7, width=16).to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    images, masks = (
        torch.from_numpy(np.asarray(store.images[:64])),
        torch.from_numpy(np.asarray(store.masks[:64])).long(),
    )

    def ours():
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)

    def bare():
        model.train()
        for i in torch.randperm(64).split(8):
            loss = torch.nn.functional.cross_entropy(
                model((images[i][:, None].float() / 255).contiguous(memory_format=torch.channels_last)),
                masks[i],
            )
            loss.backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            logits = model((images[:8][:, None].float() / 255).contiguous(memory_format=torch.channels_last))
            torch.nn.functional.cross_entropy(logits, masks[:8])

    compare('Learner with our callbacks / bare PyTorch loop, U-Net step', ours, bare, 'frames', 64)
