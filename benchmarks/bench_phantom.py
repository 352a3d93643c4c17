"Phantom frames a second on one core at 256x256, masks included."

import os
import time

if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from lus_fastai.synth.phantom import draw_patient, phantom_clip

rates = []
for seed in range(9):
    patient = draw_patient(seed)
    start = time.perf_counter()
    clip = phantom_clip(patient, seed=seed, n=60, size=(256, 256))
    rates.append(len(clip.frames) / (time.perf_counter() - start))
rates.sort()
print(
    f'phantom at 256x256: {rates[4]:.0f} frames/s (min {rates[0]:.0f}, max {rates[-1]:.0f}), '
    'clips of 60 frames by 9 patients, set-up of each included'
)
