"Frame store against PNG files through fastai's own ImageBlock: samples a second at batch 32, 224x224, grey."

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import compare
from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, IndexSplitter, PILImageBW
from PIL import Image

from lus_fastai.data.loaders import frame_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.synth.phantom import phantom_dataset

with tempfile.TemporaryDirectory() as tmp:
    tmp = Path(tmp)
    store = FrameStore.build(
        phantom_dataset(tmp / 'phantom', patients=12, clips=2, size=(224, 224)),
        tmp / 'store',
        size=(224, 224),
    )
    frames, n = store.frames, 1024
    rows = frames.iloc[np.resize(np.arange(len(frames)), n)].reset_index(drop=True)
    (tmp / 'png').mkdir()
    for i, r in rows.iterrows():
        Image.fromarray(np.asarray(store.images[r.row])).save(tmp / 'png' / f'{i:05d}.png')
    files = pd.DataFrame(dict(path=[str(tmp / 'png' / f'{i:05d}.png') for i in range(n)], label=rows.label))
    ours = frame_dls(store, rows, rows.iloc[:1], bs=32).train
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_x=ColReader('path'),
        get_y=ColReader('label'),
        splitter=IndexSplitter([0]),
    )

    def through(dl):
        seen = 0
        for x, _y in dl:
            seen += len(x)
        return seen

    for workers in (0, 2):
        peer = block.dataloaders(files, bs=32, num_workers=workers).train
        compare(
            f'frame store / PNG through ImageBlock ({workers} workers)',
            lambda: through(ours),
            lambda peer=peer: through(peer),
            'samples',
            n,
        )
