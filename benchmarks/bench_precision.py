"precision='auto' against fastai's default: training images a second, ResNet-18 at 224x224, batch 32."

import torch
from common import compare
from fastai.vision.all import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from torchvision.models import resnet18

from lus_fastai.train.callbacks import AutoPrecision, has_bf16

device = 'cuda' if torch.cuda.is_available() else 'cpu'
n, bs = (64, 32) if device == 'cpu' else (2048, 128)
items = [(torch.rand(3, 224, 224), torch.tensor(i % 3)) for i in range(n)]


def learner(cbs):
    dl = DataLoader(items, bs=bs, num_workers=0, device=torch.device(device))
    learn = Learner(DataLoaders(dl, dl), resnet18(num_classes=3), loss_func=CrossEntropyLossFlat(), cbs=cbs)
    learn.model.to(device)
    return learn


def epoch(learn):
    learn.recorder.valid_metrics = False
    learn._do_epoch_validate = lambda *args: None
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    if device == 'cuda':
        torch.cuda.synchronize()


ours, peer = learner([AutoPrecision('auto')]), learner([])
compare(
    f"precision='auto' / fastai default, ResNet-18 on {device} (native bf16: {has_bf16(device)})",
    lambda: epoch(ours),
    lambda: epoch(peer),
    'images',
    n,
    repeats=3,
)
