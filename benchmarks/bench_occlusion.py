"""Occlusion maps against captum's: the same windows (45 pixels, stride 15), batch and fill on convex
phantom frames of 224x224; Covid-Net's two backbones."""

import argparse

import torch
from captum.attr import Occlusion
from common import compare
from torchvision.models import resnet18, vgg16

from lus_fastai.explain.occlusion import occlusion
from lus_fastai.synth.phantom import draw_patient, phantom_clip

args = argparse.ArgumentParser(description=__doc__)
args.add_argument('--frames', type=int, default=1, help='of one clip')
args.add_argument('--bs', type=int, default=32, help='covered images in one pass')
args.add_argument('--repeats', type=int, default=3)
args.add_argument('--models', nargs='+', default=['vgg16', 'resnet18'])
args = args.parse_args()
device = 'cuda' if torch.cuda.is_available() else 'cpu'
if device == 'cuda':
    torch.backends.cudnn.allow_tf32 = False  # both in full precision
size, stride, fill = 45, 15, 0.185

patient = next(p for p in (draw_patient(seed) for seed in range(100)) if p.probe == 'convex')
clip = phantom_clip(patient, 0, args.frames, (224, 224))
fan = torch.from_numpy(clip.fan).bool().to(device)
x = (torch.from_numpy(clip.frames)[:, None].float() / 255).repeat(1, 3, 1, 1).to(device)


def measure(name):
    "One network: ours against captum, and how far the maps lie apart."
    torch.manual_seed(0)
    model = {'vgg16': vgg16, 'resnet18': resnet18}[name](weights=None, num_classes=3).to(device).eval()
    with torch.no_grad():
        list(model.modules())[-1].weight.mul_(30)  # so that probabilities move, as a trained model's do
    method = Occlusion(lambda x: model(x).softmax(1))
    kept = {}

    def ours():
        kept['ours'] = occlusion(model, x, 1, size=size, stride=stride, fill=fill, fan=fan, bs=args.bs).cpu()

    def peer():
        with torch.no_grad():
            kept['peer'] = method.attribute(
                x,
                (3, size, size),
                (3, stride, stride),
                fill,
                1,
                perturbations_per_eval=max(1, args.bs // len(x)),
            )[:, 0].cpu()

    compare(
        f'occlusion of {args.frames} frame(s), {name} on {device}, '
        f'fan {fan.float().mean():.0%} of the image / captum',
        ours,
        peer,
        'windows',
        169 * len(x),
        args.repeats,
    )
    gap = (kept['ours'] + kept['peer'])[fan.cpu()].abs().max().item()  # captum's sign is the other way round
    print(
        f'  maps differ by at most {gap:.1e} inside the fan, where they reach {kept["peer"].abs().max():.3f}',
        flush=True,
    )
    assert gap < 1e-4


for name in args.models:
    measure(name)
