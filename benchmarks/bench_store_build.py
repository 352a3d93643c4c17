"""Store build against bare PyAV decoding of the same files, on one process and on two; real POCUS clips
where LUS_DATA names them."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import av
import pandas as pd
from common import compare

from lus_fastai.data.store import FrameStore
from lus_fastai.synth.phantom import phantom_dataset

with tempfile.TemporaryDirectory() as tmp:
    tmp, data = Path(tmp), os.environ.get('LUS_DATA')
    if data:
        files = sorted(p for p in (Path(data) / 'pocus' / 'pocus_videos').rglob('*') if p.is_file())[::4]
        table = pd.DataFrame(
            [
                dict(path=str(p), kind='video', label='x', patient=str(i), source='s', probe='convex')
                for i, p in enumerate(files)
            ]
        )
    else:
        table = phantom_dataset(tmp / 'phantom', patients=9, clips=2, n=60).drop(columns='mask')

    def bare():
        n = 0
        for path in table.path:
            with av.open(path) as box:
                n += sum(1 for frame in box.decode(video=0))
        return n

    n, what = bare(), f"{len(table)} {'POCUS' if data else 'phantom'} clips"
    for workers in (0, 2):  # 0 decodes in this process
        for end, most in (
            ('as by default', 30),
            ('every clip to its end', 1000),
        ):  # by default decoding stops at 30 samples, ten seconds into a clip
            compare(
                f'store build / bare decoding, {what}, {workers} workers, {end}',
                partial(FrameStore.build, table, tmp / 'store', max_frames=most, workers=workers),
                bare,
                'frames',
                n,
                repeats=3,
                prepare=lambda: shutil.rmtree(tmp / 'store', ignore_errors=True),
            )
