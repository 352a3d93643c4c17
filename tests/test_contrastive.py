"Pairs, NT-Xent and the pretraining methods against loops, lightly and torchvision."
import math, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from lus_fastai.contrastive import *
from lus_fastai.models import create_backbone

def loop_nt_xent(z1, z2, t, groups=None):
    "Equation 1 of Chen 2021 by a double loop."
    z, b = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    total = 0.
    for i in range(2 * b):
        pos = z[i] @ z[(i + b) % (2 * b)] / t
        below = pos.exp()
        for j in range(2 * b):
            if j % b != i % b and (groups is None or groups[i % b] < 0 or groups[i % b] != groups[j % b]): below = below + (z[i] @ z[j] / t).exp()
        total = total - (pos.exp() / below).log()
    return total / (2 * b)

@pytest.mark.parametrize('t', [.1, .5, 2.])
def test_nt_xent_is_the_double_loop_and_lightlys(t):
    from lightly.loss import NTXentLoss
    torch.manual_seed(0)
    z1, z2 = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.allclose(nt_xent(z1, z2, t), loop_nt_xent(z1, z2, t), atol=1e-6)
    assert torch.allclose(nt_xent(z1, z2, t), NTXentLoss(t)(z1, z2), atol=1e-6)
    groups = torch.tensor([0, 1, 0, -1, -1])
    assert torch.allclose(nt_xent(z1, z2, t, groups), loop_nt_xent(z1, z2, t, groups), atol=1e-6)

def test_info_nce_is_lightlys_with_a_memory_bank():
    from lightly.loss import NTXentLoss
    torch.manual_seed(0)
    theirs = NTXentLoss(.2, memory_bank_size=(12, 7))
    for _ in range(3):
        q, k = torch.randn(4, 7), torch.randn(4, 7)
        bank = theirs.memory_bank.bank if theirs.memory_bank.bank.ndim == 2 and theirs.memory_bank.bank.numel() else None
        want = theirs(q, k)
        if bank is not None and bank.shape[0] == 12: assert torch.allclose(info_nce(q, k, bank.clone(), .2), want, atol=1e-5)

def test_crop_is_torchvisions():
    from torchvision.transforms.v2 import functional as T
    torch.manual_seed(0)
    x = F.avg_pool2d(torch.rand(6, 1, 44, 52), 5, 1)                     # (40, 48)
    a = USCLAugment(brightness=0, contrast=0)
    d = a.draw(6, (40, 48))
    ours = a.apply(x, d)
    for i in range(6):
        (top, left), (h, w) = d['corner'][i].int().tolist(), d['side'][i].int().tolist()
        theirs = T.resized_crop(x[i], top, left, h, w, [40, 48], antialias=False)
        if d['flip'][i]: theirs = theirs.flip(-1)
        assert (ours[i] - theirs)[:, 1:-1, 1:-1].abs().max() < 1e-4, i
