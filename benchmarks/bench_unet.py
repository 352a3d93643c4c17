"""Training images a second and frames of a clip a second: our U-Net (31 M) against MONAI's BasicUNet and
segmentation_models.pytorch's Unet at like size; and seconds a step by freezing policy."""

import os
import statistics
import time
import warnings

warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from common import compare
from monai.networks.nets import BasicUNet
from torch.utils.flop_counter import FlopCounterMode

from lus_fastai.core import seed_all
from lus_fastai.models.transfer import freeze, param_count
from lus_fastai.models.unet import xunet
from lus_fastai.train.callbacks import autocast_for, has_bf16
from lus_fastai.train.segmentation import predict_masks

SIZE, BATCH, REPEATS = (int(os.environ.get(k, v)) for k, v in (('SIZE', 128), ('BATCH', 4), ('REPEATS', 5)))
device = 'cuda' if torch.cuda.is_available() else 'cpu'
images, masks = (
    torch.rand(BATCH, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last),
    torch.rand(BATCH, 1, SIZE, SIZE, device=device).gt(0.5).float(),
)


def gmac(build):
    "Billions of multiply-adds for one image of 256x256."
    with torch.device('meta'):
        net, x = build().eval(), torch.rand(1, 3, 256, 256)
    with FlopCounterMode(display=False) as c, torch.no_grad():
        net(x)
    return c.get_total_flops() / 2e9


def stepper(net, precision):
    "A function that does one step of Adam: the same for all, with the memory format that suits convolutions."
    net = net.to(device, memory_format=torch.channels_last).train()
    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-5)

    def step():
        with autocast_for(device, precision):
            loss = F.binary_cross_entropy_with_logits(net(images).float(), masks)
        loss.backward()
        opt.step()
        opt.zero_grad()
        if device == 'cuda':
            torch.cuda.synchronize()

    return step


def seconds_by_part(policy):
    "Medians of the seconds of forward pass, backward pass and optimiser, and the parameters that train."
    seed_all(0)
    net = xunet()
    freeze(net, policy)
    net = net.to(device, memory_format=torch.channels_last).train()
    opt, rows = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-5), []

    def now():
        if device == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(REPEATS + 1):
        a = now()
        loss = F.binary_cross_entropy_with_logits(net(images), masks)
        b = now()
        loss.backward()
        c = now()
        opt.step()
        opt.zero_grad()
        rows.append((b - a, c - b, now() - c))
    return [statistics.median(t) for t in zip(*rows[1:])], param_count(net)['trainable']


PEERS = {
    "MONAI's BasicUNet": lambda: BasicUNet(2, 3, 1, features=(64, 128, 256, 512, 1024, 64)),
    "segmentation_models.pytorch's Unet over VGG16, its decoder widened to our work": lambda: smp.Unet(
        'vgg16', encoder_weights=None, decoder_channels=(512, 256, 128, 128, 96)
    ),  # parameters within one in a hundred, multiply-adds within one in a thousand
    "segmentation_models.pytorch's Unet over VGG16, three quarters of the work": lambda: smp.Unet(
        'vgg16', encoder_weights=None, decoder_channels=(512, 256, 128, 64, 64)
    ),
}  # the same parameters; over a ResNet it begins at half the size and does a fifth

for name, build in {'ours': xunet, **PEERS}.items():
    with torch.device('meta'):
        n = param_count(build())['total']
    print(f'{name}: {n:,} parameters, {gmac(build):.1f} billion multiply-adds an image of 256x256')
for precision in ('fp32', 'bf16') if has_bf16(device) else ('fp32',):
    for name, build in PEERS.items():
        seed_all(0)
        compare(
            f'training the U-Net / {name}, {SIZE}x{SIZE}, batch {BATCH}, {precision}',
            stepper(xunet(), precision),
            stepper(build(), precision),
            'images',
            BATCH,
            REPEATS,
        )

# A clip, as bytes in and probabilities out: `predict_masks` against what one writes first, a batch of frames
# at a time in the memory format they come in.
clip = np.random.default_rng(0).integers(0, 256, (4 * BATCH, SIZE, SIZE), dtype=np.uint8)


def plain(net):
    with torch.no_grad():
        return np.concatenate(
            [
                net(torch.from_numpy(x).to(device)[:, None].expand(-1, 3, -1, -1).float() / 255)
                .sigmoid()
                .cpu()
                .numpy()
                for x in np.split(clip, len(clip) // BATCH)
            ]
        )


ours = xunet().to(device).eval()
for name, build in PEERS.items():
    net = build().to(device).eval()
    compare(
        f'a clip of {len(clip)} frames through the U-Net / {name}, {SIZE}x{SIZE}, batch {BATCH}',
        lambda: predict_masks(ours, clip, BATCH),
        lambda net=net: plain(net),
        'frames',
        len(clip),
        REPEATS,
    )

# Freezing spares the gradients of the frozen weights and the optimiser's work on them. The forward pass is
# the same, and so is the part of the backward pass that carries the gradient through a frozen bottleneck to
# the encoder in front of it.
# Only where everything in front of a layer is frozen too does the backward pass stop: with a frozen encoder,
# whose skips and input need no gradient.
for policy in ('all', 'bottleneck frozen', 'encoder frozen', 'head'):
    (forward, backward, rest), n = seconds_by_part(policy)
    if policy == 'all':
        whole = forward + backward + rest
    step = forward + backward + rest
    print(
        f'one step, {policy}: {step:.3f} s, {step / whole:.2f} of that of all '
        f'(forward {forward:.3f}, backward {backward:.3f}, optimiser {rest:.3f}); {n:,} parameters train',
        flush=True,
    )
