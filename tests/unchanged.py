"""What the package computes, recorded and compared: proof that a change of its structure changes no number.

    python tests/unchanged.py record FILE [PART ...]     # before the change
    python tests/unchanged.py compare FILE [PART ...]    # after it: status 1 and a list of differences

Everything is computed in float32 with one thread, so that the same machine gives the same digits.
"""

import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(LUS_HOME=tempfile.mkdtemp(), OMP_NUM_THREADS='1')
os.environ.pop('LUS_DATA', None)

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import CrossEntropyLossFlat, Learner

from lus_fastai.core import CLASSES, seed_all
from lus_fastai.data.folds import Folds, leaky_folds, patient_folds
from lus_fastai.data.loaders import frame_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.models.backbones import create_backbone
from lus_fastai.models.classifiers import covidnet
from lus_fastai.models.segmenters import segmenter
from lus_fastai.models.unet import unet, vunet, xunet
from lus_fastai.stats.classification import evaluate, evaluate_seg
from lus_fastai.stats.curves import roc
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.train import callbacks
from lus_fastai.train.callbacks import ClassProbs, TrainingSettings
from lus_fastai.train.cross_validation import cross_validate
from lus_fastai.train.detection import mask_rcnn
from lus_fastai.video import read_clip

PAPERS = 'gare', 'cheng_lam', 'arora', 'uscl', 'merand', 'sim_to_real'
TOLERANCE = 1e-6


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def phantom():
    "Hashes of the pixels and masks of a small phantom set, and its table."
    with tempfile.TemporaryDirectory() as folder:
        table = phantom_dataset(folder, patients=6, clips=2, n=6, size=(96, 96), seed=3, workers=1)
        store = FrameStore.build(
            table, Path(folder) / 'store', size=(64, 64), rate=8, max_frames=4, workers=1
        )
        clips = [digest(read_clip(p).frames) for p in table.path]
        rows = table.drop(columns=['path', 'mask', 'findings']).astype(str).to_numpy().tolist()
        folds = patient_folds(store.frames, 3, seed=1)
        return dict(
            clips=clips,
            rows=rows,
            images=digest(store.images[:]),
            masks=digest(store.masks[:]),
            folds=folds.fold.tolist(),
            leaky=leaky_folds(store.frames, 3, by='clip', seed=1).fold.tolist(),
            split=Folds(store.frames.assign(path=''), folds.fold).hash,
        )


def out_of_fold():
    "Probabilities of a small cross-validated classifier."
    with tempfile.TemporaryDirectory() as folder:
        table = phantom_dataset(
            Path(folder) / 'phantom', patients=9, clips=1, n=4, size=(48, 48), seed=5, workers=1
        )
        store = FrameStore.build(table, Path(folder) / 'store', size=(48, 48), workers=1)
        folds = patient_folds(store.frames, 3, seed=0)

        def build(dls):
            return Learner(dls, covidnet('resnet18', weights=None), loss_func=CrossEntropyLossFlat())

        def data(train, valid):
            return frame_dls(store, train, valid, classes=CLASSES, bs=8, channels=3)

        oof = cross_validate(
            build,
            folds,
            TrainingSettings(2, seed=2),
            data=data,
            collect=ClassProbs(),
            path=Path(folder) / 'run',
        )
        return oof[[f'p_{c}' for c in CLASSES]].to_numpy(float).tolist()


def parameters():
    "Counts of the networks of the papers."
    networks = dict(
        unet=unet(7),
        unet_small=unet(4, width=8, bn=False),
        vunet=vunet(),
        xunet=xunet(),
        covidnet=covidnet(weights=None),
        deeplab=segmenter('deeplabv3', 'resnet18', 2),
        backbone=create_backbone('resnet18'),
        mask_rcnn=mask_rcnn(n_classes=2),
    )
    return {
        name: [sum(p.numel() for p in net.parameters()), len(net.state_dict())]
        for name, net in networks.items()
    }


def scores():
    "Metrics of fixed predictions."
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 60)
    oof = pd.DataFrame(
        dict(
            patient=[f'p{i // 5}' for i in range(60)],
            clip=[f'c{i // 2}' for i in range(60)],
            label=[CLASSES[i // 5 % 3] for i in range(60)],
            fold=np.arange(60) // 20,
        )
    )
    oof = oof.assign(frame=range(60), **{f'p_{c}': p[:, i] for i, c in enumerate(CLASSES)})
    counts = rng.integers(1, 99, (60, 16))
    seg = oof.assign(**{f'cm_{i}_{j}': counts[:, 4 * i + j] for i in range(4) for j in range(4)})
    return dict(
        evaluate=evaluate(oof).to_dict('list'),
        segmentation=evaluate_seg(seg, ['a', 'b', 'c', 'd']).to_dict('list'),
        areas=roc(oof)[1].to_dict('list'),
    )


def paper(name):
    "Cells of a paper's quick reproduction on the phantom."
    import importlib

    with tempfile.TemporaryDirectory() as out:
        importlib.import_module(f'lus_fastai.papers.{name}').reproduce('phantom', quick=True, out=out)
        found = json.loads(next(Path(out).glob('*.json')).read_text())
    return dict(cells=found['cells'], splits={k: v.get('split_hash') for k, v in found['protocols'].items()})


PARTS = dict(phantom=phantom, out_of_fold=out_of_fold, parameters=parameters, scores=scores)
PARTS |= {name: (lambda name=name: paper(name)) for name in PAPERS}


def differences(a, b, where=''):
    "Where two recordings differ, in words; numbers by more than the tolerance."
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return [
            d for k in keys for d in differences(a.get(k, 'missing'), b.get(k, 'missing'), f'{where}/{k}')
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{where}/{i}')]
    if isinstance(a, float) and isinstance(b, (int, float)):
        same = math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or math.isnan(a) and math.isnan(b)
    else:
        same = a == b
    return [] if same else [f'{where}: {a!r} was, {b!r} is']


def main(what, file, *parts):
    torch.set_num_threads(1)
    callbacks.has_bf16 = lambda device: False
    file = Path(file)
    known = json.loads(file.read_text()) if file.exists() else {}
    found = []
    for part in parts or PARTS:
        seed_all(0)
        now = json.loads(json.dumps(PARTS[part](), default=float))
        if what == 'record':
            known[part] = now
            file.write_text(json.dumps(known, indent=1) + '\n')
        else:
            found += differences(known[part], now, part)
        print(f'{part}: {"recorded" if what == "record" else f"{len(found)} differences so far"}', flush=True)
    if found:
        sys.exit('\n'.join(found[:50]))


if __name__ == '__main__':
    main(*sys.argv[1:])
