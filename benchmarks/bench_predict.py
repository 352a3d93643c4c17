"Clips on one core, from the file to the answer, against decoding alone; and memory over 300 answers."

import os

os.environ['OMP_NUM_THREADS'] = '1'
if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # decoding would take all cores

import resource
import tempfile
from pathlib import Path

import torch
from common import compare

from lus_fastai.core import CLASSES, seed_all
from lus_fastai.models.stages import StageClassifier, StageFeatures
from lus_fastai.predict import ClipModel, ClipPrep, load_model
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.video import sample_clip

torch.set_num_threads(1)


def resident():
    "Megabytes that this process has in memory: now, where the system says so, else at most so far."
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def the_model():
    "The model that ships; where there is none, one of its size, without training."
    try:
        return load_model()
    except FileNotFoundError:
        seed_all(0)
        net = StageClassifier(StageFeatures('tf_efficientnet_lite0', weights=None), len(CLASSES))
        return ClipModel(net, CLASSES, ClipPrep())


with tempfile.TemporaryDirectory() as tmp:
    clips = phantom_dataset(tmp, patients=4, clips=1, n=48, size=(480, 640), workers=1)['path'].tolist()
    model, n = the_model(), len(clips)

    def decode():
        for path in clips:
            sample_clip(path, model.prep.rate, model.prep.max_frames)

    def answer(heat):
        for path in clips:
            model.predict(path, heat=heat)

    for heat in (False, True):
        compare(
            f'answer{" with its map" if heat else ""} / decoding alone, 48 frames of 640x480, one core',
            lambda heat=heat: answer(heat),
            decode,
            'clips',
            n,
            repeats=3,
        )
    for k in range(1, 301):
        model.predict(clips[k % n])
        if k in (50, 300):
            print(f'memory after {k} answers: {resident():.0f} MB', flush=True)
