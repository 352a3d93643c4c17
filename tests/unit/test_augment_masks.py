"Augmentation of image and masks: by hand, against SciPy, and what must hold whatever is drawn."

import numpy as np
import pytest
import torch
from fastai.vision.all import TensorImage, TensorMask
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform, gaussian_filter

from lus_fastai.core import seed_all
from lus_fastai.data.augment import ChengAugment, MaskAugment, MerandAugment, gaussian_blur_each, keras_theta
from lus_fastai.data.loaders import TensorMasks

few = settings(max_examples=15, deadline=None)


def pair(x, masks):
    return TensorImage(torch.as_tensor(x, dtype=torch.float32)), TensorMask(torch.as_tensor(masks))


def fixed(theta=None, field=None):
    "A `MaskAugment` that has drawn these, and no mirror."
    g = MaskAugment()
    g.before_call((torch.zeros(1, 1, 4, 4),), 0)
    g.theta, g.field = theta, field
    return g


def theta_of(size, turn=0.0, shift=(0.0, 0.0), shear=0.0, zoom=(1.0, 1.0)):
    def one(v):
        return torch.tensor([v], dtype=torch.float32)

    return keras_theta(one(turn), one(shift), one(shear), one(zoom), size)


def test_a_mirror_swaps_the_classes_of_the_sides_and_no_others():
    masks = torch.zeros(1, 5, 2, 3)
    masks[0, 0, 0, 0] = masks[0, 2, 1, 2] = masks[0, 3, 0, 1] = 1
    x, y = MaskAugment(flip=1, swap=[(0, 1), (3, 4)])(
        pair(np.arange(6.0).reshape(1, 1, 2, 3), masks), split_idx=0
    )
    assert x.flatten().tolist() == [2, 1, 0, 5, 4, 3]
    assert torch.nonzero(y)[:, 1:].tolist() == [[1, 0, 2], [2, 1, 0], [4, 0, 1]]


def test_codes_are_swapped_and_no_label_stays():
    codes = torch.tensor([[[0, 1, 2, 255]]])
    y = MaskAugment(flip=1, swap=[(0, 1)])(pair(np.zeros((1, 1, 1, 4)), codes), split_idx=0)[1]
    assert y.tolist() == [[[255, 2, 0, 1]]] and y.dtype == torch.int64
    assert MaskAugment(flip=1)(pair(np.zeros((1, 1, 1, 4)), codes), split_idx=0)[1].tolist() == [
        [[255, 2, 1, 0]]
    ]


def test_half_of_the_batch_is_mirrored_and_each_mask_with_its_image():
    seed_all(0)
    m = (torch.rand(40, 2, 5, 6) > 0.5).float()
    g = MerandAugment(turn=0, blur=0)
    x, y = g(pair(m[:, :1], m), split_idx=0)
    assert 10 < g.mirrored.sum() < 30
    assert torch.equal(
        torch.where(g.mirrored[:, None, None], torch.Tensor(y)[:, 1], torch.Tensor(y)[:, 0]),
        torch.Tensor(x)[:, 0],
    )


def test_a_shift_moves_a_pixel_and_the_border_is_repeated():
    image = np.zeros((1, 1, 4, 5))
    image[0, 0, 2, 3] = 1
    image[0, 0, :, 4] = 0.5
    g = fixed(
        theta_of((4, 5), shift=(1.0, -1.0))
    )  # each pixel shows the one a row below, a column to the left
    x, y = (
        g.encodes(TensorImage(torch.tensor(image, dtype=torch.float32))),
        g.encodes(TensorMask(torch.tensor(image == 1))),
    )
    expected = np.zeros((4, 5))
    expected[1, 4] = 1
    np.testing.assert_allclose(x[0, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(y[0, 0], expected == 1)
    left = fixed(theta_of((4, 5), shift=(0.0, 1.0))).encodes(
        TensorImage(torch.tensor(image, dtype=torch.float32))
    )
    np.testing.assert_allclose(left[0, 0, :, 3:], 0.5, atol=1e-6)


def test_zoom_above_one_shows_more():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2:6, 2:6] = 1
    small = fixed(theta_of((8, 8), zoom=(2.0, 1.0))).encodes(TensorMask(image))
    assert torch.nonzero(small[0, 0].sum(1))[:, 0].tolist() == [3, 4] and torch.nonzero(small[0, 0].sum(0))[
        :, 0
    ].tolist() == [2, 3, 4, 5]


@few
@given(
    st.floats(-0.5, 0.5),
    st.floats(-6, 6),
    st.floats(-6, 6),
    st.floats(-0.4, 0.4),
    st.floats(0.8, 1.2),
    st.floats(0.8, 1.2),
    st.integers(16, 40),
    st.integers(16, 40),
)
def test_the_affine_part_is_scipys_with_keras_matrices(turn, dy, dx, shear, zy, zx, h, w):
    frame = gaussian_filter(np.random.default_rng(h * w).random((h, w)), 1)
    R, S = (
        np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]),
        np.array([[1, -np.sin(shear)], [0, np.cos(shear)]]),
    )
    M, c = R @ S @ np.diag([zy, zx]), np.array([h - 1, w - 1]) / 2
    theirs = affine_transform(frame, M, offset=c + R @ [dy, dx] - M @ c, order=1, mode='nearest')
    ours = fixed(theta_of((h, w), turn, (dy, dx), shear, (zy, zx)))._sample(
        torch.tensor(frame, dtype=torch.float32)[None, None], 'bilinear'
    )
    np.testing.assert_allclose(ours[0, 0], theirs, atol=1e-4)


def test_an_even_bend_is_a_shift():
    image = torch.rand(1, 1, 8, 10)
    field = torch.zeros(1, 2, 7, 7)
    field[:, 0] = 2 / 10 * 3  # three of ten columns, on a side that is 2 long
    y = fixed(field=field)._sample(image, 'bilinear')
    torch.testing.assert_close(y[..., :7], image[..., 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(y[..., 7:], image[..., -1:].expand(-1, -1, -1, 3), atol=1e-5, rtol=0)


@few
@given(st.floats(0, 3), st.integers(5, 24), st.integers(5, 24))
def test_blur_is_scipys(sd, h, w):
    x = np.random.default_rng(h).random((1, 2, h, w)).astype(np.float32)
    y = gaussian_blur_each(torch.from_numpy(x), torch.tensor([sd]))
    r = min(int(np.ceil(3 * np.float32(sd))), h - 1, w - 1)
    for c in range(2):
        np.testing.assert_allclose(
            y[0, c],
            gaussian_filter(x[0, c], sd, mode='nearest', radius=r) if sd > 1e-3 else x[0, c],
            atol=1e-4,
        )


def test_intensity_by_hand():
    g = MaskAugment(intensity=0.2)
    g.before_call((torch.zeros(1, 1, 1, 3),), 0)
    g.contrast, g.bright = torch.tensor([1.2]), torch.tensor([0.1])
    np.testing.assert_allclose(
        g.encodes(TensorImage(torch.tensor([[[[0.5, 0.25, 1.0]]]]))).flatten(), [0.6, 0.3, 1.0], atol=1e-6
    )
    torch.manual_seed(0)
    g.before_call((torch.zeros(500, 1, 1, 1),), 0)
    assert (
        0.8 <= g.contrast.min() < 0.82
        and 1.18 < g.contrast.max() <= 1.2
        and -0.1 <= g.bright.min() < -0.09
        and 0.09 < g.bright.max() <= 0.1
    )


STRONG = dict(turn=30, shift=0.2, shear=10, zoom=0.2, flip=0.5, bend=0.03)


@few
@given(st.integers(0, 10**6), st.integers(16, 40), st.integers(16, 40), st.integers(1, 4))
def test_whatever_is_drawn_masks_stay_masks_and_move_with_their_image(seed, h, w, n):
    rng = np.random.default_rng(seed)
    m = torch.from_numpy(gaussian_filter(rng.random((n, 2, h, w)), (0, 0, 3, 3)))
    m = (m > m.mean()).float()

    def draw(g, x, y):
        seed_all(seed)
        return g((TensorImage(x.clone()), TensorMasks(y.clone(), class_names=('a', 'b'))), split_idx=0)

    x, y = draw(MaskAugment(**STRONG), m, m)
    assert (
        set(y.unique().tolist()) <= {0, 1}
        and y.dtype == torch.float32
        and x.shape == y.shape
        and isinstance(y, TensorMasks)
        and y.class_names == ('a', 'b')
    )
    inside = (torch.Tensor(x) < 0.02) | (
        torch.Tensor(x) > 0.98
    )  # away from the rims, where the image is interpolated
    assert torch.equal((torch.Tensor(x) > 0.5)[inside], (torch.Tensor(y) > 0.5)[inside])
    again = draw(MaskAugment(**STRONG, blur=0), m, m)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    codes = draw(MaskAugment(**STRONG), m, m[:, 0].long())[1]
    assert torch.equal(torch.Tensor(codes), torch.Tensor(y)[:, 0].long())


def test_no_change_is_asked_for_none_is_made_and_validation_is_left_alone():
    x, m = torch.rand(3, 1, 7, 9), (torch.rand(3, 2, 7, 9) > 0.5).float()
    for g, split in ((MaskAugment(), 0), (MaskAugment(**STRONG, blur=2, intensity=0.5), 1)):
        a, b = g((TensorImage(x.clone()), TensorMask(m.clone())), split_idx=split)
        assert torch.equal(torch.Tensor(a), x) and torch.equal(torch.Tensor(b), m)


def test_the_papers_values():
    g = ChengAugment()
    assert (g.turn, g.shift, g.shear, g.zoom, g.flip, tuple(g.swap), g.blur, g.bend, g.intensity) == (
        0.15,
        0.05,
        0.05,
        0.05,
        0.5,
        (),
        0,
        0,
        0,
    )
    x = torch.zeros(2000, 1, 100, 50)
    seed_all(0)
    g.before_call((x,), 0)
    shift = g.theta[:, :, 2].abs().amax(0) * torch.tensor([25, 50])  # pixels
    assert 2.4 < shift[0] <= 2.52 and 4.8 < shift[1] <= 5.02
    scale = g.theta[:, [0, 1], [0, 1]]
    assert scale.min() > 0.9499 and scale.max() < 1.0501 and (scale[:, 0] - scale[:, 1]).abs().max() > 0.05
    assert (
        0.8 < g.theta[:, 1, 0].abs().max() / (np.deg2rad(0.15 + 0.05) / 2) < 1.05
    )  # turned and sheared, on an image twice as high as wide
    m = MerandAugment()
    assert (m.flip, tuple(m.swap), m.shift, m.zoom) == (0.5, ((0, 1),), 0, 0) and m.turn > 0 and m.blur > 0
    assert ChengAugment(turn=8, blur=1).turn == 8 and '0x' not in repr([ChengAugment(), MerandAugment()])


def test_a_pair_that_is_not_there_is_named():
    with pytest.raises(ValueError, match='exchanges class 3, the masks have classes 0..1'):
        MaskAugment(swap=[(0, 3)])(pair(np.zeros((1, 1, 4, 4)), torch.zeros(1, 2, 4, 4)), split_idx=0)


@pytest.mark.gpu
def test_the_same_draws_on_the_gpu():
    x, m = torch.rand(4, 3, 64, 48), (torch.rand(4, 2, 64, 48) > 0.5).float()

    def on(device):
        seed_all(3)
        return MaskAugment(**STRONG, blur=1.5, intensity=0.2, swap=[(0, 1)])(
            (TensorImage(x.to(device)), TensorMask(m.to(device))), split_idx=0
        )

    (a, p), (b, q) = on('cpu'), on('cuda')
    assert b.is_cuda and q.is_cuda
    torch.testing.assert_close(torch.Tensor(a), torch.Tensor(b.cpu()), atol=1e-3, rtol=0)
    assert (torch.Tensor(p) == torch.Tensor(q.cpu())).float().mean() > 0.999
