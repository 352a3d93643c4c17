"""A model as ONNX in onnxruntime against the same model in PyTorch: frames a second on one
thread, with the maps of one class."""

import argparse
import tempfile

import numpy as np
import torch
from common import compare

from lus_fastai.core import CLASSES
from lus_fastai.export import export_onnx, load_onnx
from lus_fastai.models.stages import StageClassifier, StageFeatures
from lus_fastai.predict import ClipModel, ClipPrep

args = argparse.ArgumentParser(description=__doc__)
args.add_argument('--frames', type=int, default=4, help='in one pass: those of a clip')
args.add_argument('--repeats', type=int, default=9)
args = args.parse_args()
torch.set_num_threads(1)

torch.manual_seed(0)
net = StageClassifier(StageFeatures('tf_efficientnet_lite0', weights=None), 3)
model = ClipModel(net, CLASSES, ClipPrep())
images = np.random.default_rng(0).integers(0, 256, (args.frames, 224, 224), dtype=np.uint8)
with tempfile.TemporaryDirectory() as folder:
    runtime = load_onnx(export_onnx(model, f'{folder}/model.onnx'))
kept = {}


def ours():
    kept['ours'] = runtime.frame_logits(images), runtime.heat(images, 'covid')


def peer():
    kept['peer'] = model.frame_logits(images), model.heat(images, 'covid')


what = (
    f'logits and maps of {args.frames} frames of 224x224, EfficientNet-Lite0 to its fourth block, one thread'
)
compare(f'{what} / PyTorch', ours, peer, 'frames', args.frames, args.repeats)
print('  greatest difference:', max(abs(a - b).max() for a, b in zip(*kept.values())))
