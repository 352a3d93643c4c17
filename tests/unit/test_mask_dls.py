"DataLoaders of images with a mask per class: values, order, notes and what they show."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from lus_fastai.core import MaskSet
from lus_fastai.data.loaders import TensorMasks, absent_classes, class_color, mask_dls


def made(n=7, k=3, size=(20, 24), seed=0):
    rng = np.random.default_rng(seed)
    return MaskSet(
        rng.integers(0, 256, (n, *size), dtype=np.uint8),
        rng.random((n, k, *size)) < 0.3,
        [f'c{i}' for i in range(k)],
        pd.DataFrame(dict(patient=[f'p{i // 2}' for i in range(n)])),
    )


def test_a_batch_is_the_rows_of_the_arrays():
    s = made()
    x, y = mask_dls(s, [0, 1, 2], [6, 3], bs=4, device='cpu').valid.one_batch()
    assert x.shape == (2, 3, 20, 24) and x.dtype == y.dtype == torch.float32
    for c in range(3):
        np.testing.assert_allclose(x[:, c], s.images[[6, 3]] / 255, atol=1e-6)
    np.testing.assert_array_equal(y, s.masks[[6, 3]])
    assert isinstance(y, TensorMasks) and y.class_names == ('c0', 'c1', 'c2')


def test_bools_and_integers_name_the_same_rows_and_an_epoch_holds_each_once():
    s, train = made(), np.array([True] * 5 + [False] * 2)
    a, b = (
        mask_dls(s, t, v, bs=2, channels=1, seed=3, device='cpu')
        for t, v in ((train, ~train), (range(5), [5, 6]))
    )
    xa, xb = (torch.cat([x for x, _ in d.train]) for d in (a, b))
    assert xa.shape == (4, 1, 20, 24)  # of a last batch of one image batch norm could make nothing
    torch.testing.assert_close(torch.Tensor(xa), torch.Tensor(xb))
    order = [
        int(
            np.flatnonzero(
                (s.images / 255 - x[0].numpy() < 1e-6).all((1, 2))
                & (abs(s.images / 255 - x[0].numpy()) < 1e-6).all((1, 2))
            )[0]
        )
        for x in xa
    ]
    assert len(set(order)) == 4 and set(order) <= set(range(5))
    assert len(torch.cat([x for x, _ in mask_dls(s, range(6), [6], bs=2, device='cpu').train])) == 6


def test_the_order_follows_the_seed():
    s = made(16)

    def first(seed):
        return torch.cat(
            [
                torch.Tensor(y)
                for _, y in mask_dls(s, range(12), range(12, 16), bs=4, seed=seed, device='cpu').train
            ]
        )

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_memory_maps_and_a_table_of_new_rows(tmp_path):
    s = made()
    np.save(tmp_path / 'x.npy', s.images)
    m = MaskSet(np.load(tmp_path / 'x.npy', mmap_mode='r'), s.masks, s.names, s.table)
    dls = mask_dls(m, [0, 1], [2], device='cpu')
    np.testing.assert_allclose(
        dls.test_dl(s.table.assign(row=range(7)).iloc[4:]).one_batch()[0][:, 0], s.images[4:] / 255, atol=1e-6
    )


def test_a_class_absent_from_a_part_is_a_note_that_names_both():
    s = made()
    s.masks[:4, 1] = False
    s.masks[4:, 2] = False
    with pytest.warns(UserWarning) as said:
        mask_dls(s, range(4), range(4, 7), device='cpu')
    assert [str(w.message) for w in said] == [
        "no pixel of 'c1' in the training images",
        "no pixel of 'c2' in the validation images",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mask_dls(s, range(4), range(4, 7), device='cpu', notes=False)
        mask_dls(made(), range(4), range(4, 7), device='cpu')
    assert absent_classes(s, fold_3=s.table.patient == 'p0') == ["no pixel of 'c1' in fold 3"]


@pytest.mark.parametrize(
    'train, valid, message',
    [
        ([0, 7], [1], 'up to 7'),
        ([], [1], 'train is empty'),
        ([0], [False] * 7, 'valid is empty'),
        ([-1], [1], 'integers 0..6'),
        ([True] * 6, [1], '7 bools'),
    ],
)
def test_rows_that_are_not_there(train, valid, message):
    with pytest.raises(ValueError, match=message):
        mask_dls(made(), train, valid, device='cpu')


def test_small_images_and_masks_of_0_and_255():
    with pytest.raises(ValueError, match='15x24 pixels.*at least 16x16'):
        mask_dls(made(size=(15, 24)), [0], [1], device='cpu')
    mask_dls(made(size=(16, 17)), [0], [1], device='cpu').valid.one_batch()
    s = made()
    with pytest.raises(ValueError, match='give `masks > 127`'):
        MaskSet(s.images, s.masks * np.uint8(255), s.names, s.table)


def test_batches_show_each_class_that_is_there():
    from matplotlib import pyplot as plt

    s = made(k=13)
    s.masks[:, 5] = False
    dls = mask_dls(s, [0, 1], [2, 3], notes=False, device='cpu')
    dls.valid.show_batch(max_n=2, nrows=1)
    figure = plt.gcf()
    axes = [a for a in figure.axes if a.images]
    assert len(axes) == 2 and {t.get_text() for t in axes[0].texts} == {f'c{i}' for i in range(13) if i != 5}
    assert len({class_color(i) for i in range(13)}) == 13
    assert dls.valid.one_batch()[1][0].show() is not None  # a mask alone, on black
    plt.close('all')


def test_a_tint_where_classes_overlap_is_both_colours():
    from matplotlib import pyplot as plt

    masks = torch.zeros(2, 16, 16)
    masks[0, :8] = 1
    masks[1, :, :8] = 1
    tint = TensorMasks(masks).show().images[-1].get_array()
    a, b = (np.array(class_color(i)) for i in (0, 1))
    np.testing.assert_allclose(tint[0, 15], [*a, 0.3])
    np.testing.assert_allclose(tint[15, 0], [*b, 0.3])
    assert tint[15, 15, 3] == 0
    np.testing.assert_allclose(tint[0, 0], [*(0.3 * b + 0.7 * 0.3 * a) / 0.51, 0.51])
    plt.close('all')
