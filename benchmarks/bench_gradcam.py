"""Grad-CAM over a clip of 300 phantom frames at 224x224 against a loop over the frames with pytorch-grad-
cam, ResNet-18."""

import argparse
import warnings

import numpy as np
import torch
from common import compare
from torchvision.models import resnet18

from lus_fastai.explain.occlusion import explain_clip
from lus_fastai.synth.phantom import draw_patient, phantom_clip

warnings.simplefilter('ignore')
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

args = argparse.ArgumentParser(description=__doc__)
args.add_argument('--frames', type=int, default=300)
args.add_argument('--bs', type=int, default=16, help='frames in one pass of ours')
args.add_argument('--repeats', type=int, default=3)
args = args.parse_args()
device = 'cuda' if torch.cuda.is_available() else 'cpu'
if device == 'cuda':
    torch.backends.cudnn.allow_tf32 = False  # both in full precision

torch.manual_seed(0)
model = resnet18(weights=None, num_classes=3).to(device).eval()
clip = phantom_clip(draw_patient(0), 0, args.frames, (224, 224))
kept = {}


def ours():
    kept['ours'], _ = explain_clip(model, clip.frames, 'grad-cam', 1, bs=args.bs)


def peer():
    with GradCAM(model, [model.layer4]) as cam:
        kept['peer'] = np.concatenate(
            [
                cam(
                    (torch.from_numpy(f).float() / 255).expand(1, 3, -1, -1).to(device),
                    [ClassifierOutputTarget(1)],
                )
                for f in clip.frames
            ]
        )


compare(
    f'Grad-CAM of {args.frames} frames, ResNet-18 on {device} / pytorch-grad-cam frame by frame',
    ours,
    peer,
    'frames',
    args.frames,
    args.repeats,
)
flat = [m.clip(min=0).reshape(len(m), -1) for m in kept.values()]
alike = min(
    np.corrcoef(a, b)[0, 1] if a.any() and b.any() else float(not a.any() and not b.any())
    for a, b in zip(*flat)
)
print(f'  correlation of the maps, frame by frame, after the peer\'s ReLU and scaling: at least {alike:.4f}')
