"""Despeckled frames a second on one core: the homomorphic wavelet filter against scikit-image's.

Both with the same settings.

usage: python benchmarks/bench_despeckle.py [frames, default 32] [side, default 256]
The peer is `denoise_wavelet` (db4, three levels, BayesShrink, soft) between log1p and expm1, an image
at a time, as it takes one. CPU seconds of one thread, so that other work on the machine hardly counts.
Also printed: the greatest and the mean difference of the two results, in grey levels of 255."""

import os
import statistics
import sys
import time

if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ['OMP_NUM_THREADS'] = '1'
from dataclasses import replace

import numpy as np
import torch
from skimage.restoration import denoise_wavelet

from lus_fastai.data.despeckling import despeckle
from lus_fastai.synth.phantom import draw_patient, phantom_clip

torch.set_num_threads(1)
n, side = (int(a) for a in (sys.argv[1:] + ['32', '256'][len(sys.argv) - 1 :]))
frames = phantom_clip(
    replace(draw_patient(2, 'covid', 'linear'), smoothing=0.0), 0, n, (side, side)
).frames / np.float32(255)


def peer(x):
    return np.stack(
        [
            np.clip(
                np.expm1(
                    denoise_wavelet(
                        np.log1p(i), wavelet='db4', method='BayesShrink', mode='soft', wavelet_levels=3
                    )
                ),
                0,
                1,
            )
            for i in x
        ]
    )


def seconds(call):
    start = time.process_time()
    call(frames)
    return time.process_time() - start


difference = abs(despeckle(frames) - peer(frames)) * 255
pairs = [(seconds(despeckle), seconds(peer)) for _ in range(7)]
ours, theirs = (statistics.median(o) for o in zip(*pairs))
each = [p / o for o, p in pairs]
print(
    f'despeckle {side}x{side}: ours {n / ours:.0f} frames/s, scikit-image {n / theirs:.0f} frames/s, '
    f'ratio {theirs / ours:.2f} ({min(each):.2f}..{max(each):.2f}); '
    f'difference at most {difference.max():.2f}, on average {difference.mean():.3f} grey levels'
)
