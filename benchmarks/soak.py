"""Hundreds of answers, maps and fits in one process: its memory and its open files must stay flat.

python benchmarks/soak.py [HOW_MANY]
"""

import gc
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from fastai.vision.all import CrossEntropyLossFlat, Learner

from lus_fastai.data.loaders import frame_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.explain.attribution import grad_cam
from lus_fastai.models.classifiers import seg_to_cls
from lus_fastai.models.unet import unet
from lus_fastai.predict import load_model
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.train.callbacks import fit_resumable


def held() -> dict:  # MB of memory, open files, live tensors
    "What this process holds."
    gc.collect()
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    tensors = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    return dict(
        mb=pages * os.sysconf('SC_PAGE_SIZE') / 1e6, files=len(os.listdir('/proc/self/fd')), tensors=tensors
    )


def works(
    folder,  # an empty one
) -> dict:  # name -> function without arguments
    "What is done again and again: an answer for a clip, a map of a frame, a fit of an epoch."
    folder = Path(folder)
    table = phantom_dataset(folder / 'phantom', patients=6, clips=1, n=8, size=(96, 96))
    store = FrameStore.build(table, folder / 'store', size=(32, 32), max_frames=4, workers=0)
    model, net, x = load_model(), seg_to_cls(unet(7, width=2)).eval(), torch.rand(1, 1, 32, 32)

    def fit():
        dls = frame_dls(store, store.frames[:16], store.frames[16:], bs=8)
        learn = Learner(dls, seg_to_cls(unet(7, width=2)), loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging():
            fit_resumable(learn, 1, 1e-3, folder / 'c.pt')
        (folder / 'c.pt').unlink()

    return dict(predict=lambda: model.predict(table.path[0]), explain=lambda: grad_cam(net, x, 0), fit=fit)


def soak(
    work,  # function without arguments
    n: int,  # how often; a tenth of it first, which does not count
) -> tuple:  # what was held before and after
    "Do something n times."
    for _ in range(max(n // 10, 3)):
        work()
    before = held()
    for _ in range(n):
        work()
    return before, held()


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(folder).items():
            before, after = soak(work, n)
            print(f'{n} x {name}:', *(f'{k} {before[k]:.0f} -> {after[k]:.0f}' for k in before), flush=True)
