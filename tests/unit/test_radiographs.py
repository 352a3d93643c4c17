"Drawn shapes, radiographs and ribs: repeatable, difficult, and their masks, labels and boxes agree."

import numpy as np
import pandas as pd
import pytest

from lus_fastai.core import MaskSet
from lus_fastai.synth.radiographs import (
    CATEGORIES,
    CHEST,
    CHEXPERT,
    chest_box_set,
    chest_boxes,
    chest_labels,
    chest_phantom,
    rib_masks,
)
from lus_fastai.synth.shapes import box_set, boxes_of, fill_boxes, salient_shapes


def small(masks, names):
    return MaskSet(
        np.zeros((len(masks), *masks.shape[2:]), np.uint8),
        masks,
        names,
        pd.DataFrame(dict(patient=['p'] * len(masks))),
    )


@pytest.fixture(scope='module')
def chest():
    return chest_phantom(48, 96, seed=3)


def by_name(s):
    "The masks of each class, (n, h, w)."
    return dict(zip(s.names, s.masks.transpose(1, 0, 2, 3)))


def dice(p, m):
    return 2 * (p & m).sum() / (p.sum() + m.sum())


def best_threshold(x, m):
    return max(max(dice(x > t, m), dice(x <= t, m)) for t in range(0, 256, 8))


# --- all of them


@pytest.mark.parametrize('draw', (salient_shapes, chest_phantom, rib_masks))
def test_same_seed_same_images_and_columns_that_splits_need(draw):
    state = np.random.get_state()[1].copy()
    a, b, c = draw(5, 48, 1), draw(5, 48, 1), draw(5, 48, 2)
    assert (np.random.get_state()[1] == state).all()
    assert a.images.dtype == np.uint8 and a.images.shape == (5, 48, 48)
    assert a.masks.dtype == bool and a.masks.shape == (5, len(a.names), 48, 48)
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.masks, b.masks)
    pd.testing.assert_frame_equal(a.table, b.table)
    assert (a.images != c.images).any()
    assert not set(a.table['patient']) & set(c.table['patient'])
    assert a.table[['patient', 'clip', 'label']].notna().all().all()
    assert all(x.std() > 8 for x in a.images)
    tall = draw(2, (64, 48), 1)
    assert tall.images.shape == (2, 64, 48) and tall.masks.shape[2:] == (64, 48)


@pytest.mark.parametrize('draw', (salient_shapes, chest_phantom, rib_masks))
def test_images_of_less_than_16_pixels_are_refused(draw):
    with pytest.raises(ValueError, match='at least 16'):
        draw(1, 12)


def test_more_images_begin_with_the_same_ones():
    np.testing.assert_array_equal(salient_shapes(2, 32, 4).images, salient_shapes(6, 32, 4).images[:2])
    np.testing.assert_array_equal(
        chest_phantom(3, 32, 4, patients=3).images, chest_phantom(6, 32, 4, patients=3).images[:3]
    )


# --- salient shapes


def test_shapes_need_more_than_a_threshold():
    s = salient_shapes(30, 64, 0)
    area = s.masks.mean((1, 2, 3))
    assert (area > 0.01).all() and (area < 0.7).all() and area.max() > 3 * area.min()
    scores = [best_threshold(x, m[0]) for x, m in zip(s.images, s.masks)]
    assert 0.2 < np.mean(scores) < 0.8
    inside = np.array([x[m[0]].mean() - x[~m[0]].mean() for x, m in zip(s.images, s.masks)])
    assert (inside > 0).any() and (inside < 0).any()  # neither always brighter nor always darker


# --- boxes


def test_boxes_by_hand():
    m = np.zeros((2, 2, 16, 16), bool)
    m[0, 0, 1:3, 2:6] = m[0, 0, 3, 6] = True  # touches at a corner: one object
    m[0, 0, 10, 0] = m[1, 1, :, 15] = True
    assert boxes_of(small(m, ('a', 'b'))).values.tolist() == [
        [0, 'a', 2, 1, 5, 3],
        [0, 'a', 0, 10, 1, 1],
        [1, 'b', 15, 0, 1, 16],
    ]
    b = box_set(small(m, ('a', 'b')))
    assert b.masks[0, 0].sum() == 16 and (b.masks[1, 1] == m[1, 1]).all() and not b.masks[1, 0].any()


def test_boxes_of_random_masks_against_a_plain_loop():
    from skimage.measure import label, regionprops

    s = small(np.random.default_rng(0).random((3, 2, 24, 20)) > 0.75, ('a', 'b'))
    want = []
    for i in range(3):
        for k, name in enumerate('ab'):
            for region in regionprops(label(s.masks[i, k], connectivity=2)):
                top, left, bottom, right = region.bbox
                want.append((i, name, left, top, right - left, bottom - top))
    assert sorted(map(tuple, boxes_of(s).values.tolist())) == sorted(want)
    filled = box_set(s)
    assert (filled.masks >= s.masks).all()
    for i, n, x, y, w, h in want:
        assert filled.masks[i, 'ab'.index(n), y : y + h, x : x + w].all()


def test_empty_and_full_masks_have_no_box_and_one():
    m = np.zeros((2, 1, 16, 16), bool)
    m[1] = True
    assert boxes_of(small(m, ('a',))).values.tolist() == [[1, 'a', 0, 0, 16, 16]]
    assert not len(boxes_of(small(m[:1], ('a',)))) and not box_set(small(m[:1], ('a',))).masks.any()


def test_boxes_that_leave_the_image_are_cut_and_the_later_wins_if_asked():
    boxes = pd.DataFrame(
        [(0, 'a', -5, -5, 10, 10), (0, 'b', 3, 3, 100, 2), (0, 'negative', 0, 0, 1, 1)],
        columns=['row', 'name', 'x', 'y', 'width', 'height'],
    )
    m = fill_boxes(boxes, 1, 16, ('a', 'b'))
    assert m.sum((0, 2, 3)).tolist() == [25, 26]
    assert fill_boxes(boxes, 1, 16, ('a', 'b'), later_wins=True).sum((0, 2, 3)).tolist() == [21, 26]


# --- chest phantom


def test_anatomy_stands_where_it_belongs(chest):
    m = by_name(chest)
    assert chest.names == CHEST and all(m[n].any((1, 2)).all() for n in CHEST[:4])

    def column(x):
        return (x * np.arange(96)).sum((1, 2)) / x.sum((1, 2))

    right, heart, left = (column(m[n]) for n in ('right lung', 'cardiomediastinum', 'left lung'))
    assert (right < heart).all() and (heart < left).all()
    lungs = m['right lung'] | m['left lung']
    assert not (m['right lung'] & m['left lung']).any()
    assert (lungs & m['cardiomediastinum']).sum() < 0.02 * lungs.sum()
    for n in ('ground glass', 'consolidation', 'effusion', 'pneumothorax'):
        assert (m[n] & ~lungs).sum() <= 0.02 * max(m[n].sum(), 50), n
    assert not (m['effusion'] & (m['consolidation'] | m['pneumothorax'])).any()
    tube = m['endotracheal tube'] & (np.arange(96)[:, None] > 30)
    if tube.any():
        assert (tube & m['airways']).sum() > 0.6 * tube.sum()


def test_what_is_drawn_can_be_seen(chest):
    "Air is darker than heart, opacities and fluid brighter than the rest of their lung."
    x, m = chest.images.astype(float), by_name(chest)
    lungs = m['right lung'] | m['left lung']
    clear = lungs & ~np.any([m[n] for n in CHEST[4:]], 0)

    def mean(mask):
        return np.array([x[i][mask[i]].mean() if mask[i].sum() > 20 else np.nan for i in range(len(x))])

    assert (mean(clear) < mean(m['cardiomediastinum']) - 15).all()
    for n in ('consolidation', 'effusion'):
        contrast = mean(m[n]) - mean(clear)
        contrast = contrast[~np.isnan(mean(m[n]))]
        assert len(contrast) and (contrast > 3).mean() > 0.9, n


def test_every_class_occurs_and_a_patient_has_several_images(chest):
    many = chest_phantom(300, 32, seed=0)
    assert many.masks.any((2, 3)).any(0).all()
    assert (chest.table.groupby('patient').size() == 2).all() and chest.table['clip'].is_unique
    assert (chest.table.groupby('patient')['label'].nunique() == 1).all()
    assert chest_phantom(5, 32, patients=2).table['patient'].value_counts().tolist() == [3, 2]


def test_labels_follow_the_masks(chest):
    y, m = chest_labels(chest), by_name(chest)
    assert list(y.columns) == list(CHEXPERT) and y.isin([0, 1]).all().all()
    signs = {
        'Consolidation': ['consolidation'],
        'Pleural Effusion': ['effusion'],
        'Pneumothorax': ['pneumothorax'],
        'Lung Opacity': ['ground glass', 'consolidation'],
        'Support Devices': CHEST[8:],
    }
    for name, classes in signs.items():
        assert (y[name] == np.any([m[n].any((1, 2)) for n in classes], 0)).all(), name
    findings = y[list(CHEXPERT[1:13])].sum(axis=1)
    assert ((y['No Finding'] == 1) == (findings == 0)).all()
    assert not (y['Edema'] & y['Pneumonia']).any()
    assert (y['Enlarged Cardiomediastinum'] >= y['Cardiomegaly']).all()


def test_cardiomegaly_is_half_of_the_chest():
    m = np.zeros((2, 13, 32, 32), bool)
    m[:, 0, 4:28, 2:10] = m[:, 1, 4:28, 22:30] = True  # the chest is 28 wide
    m[0, 2, 8:26, 9:23] = m[1, 2, 8:26, 9:24] = True  # a heart of 14, and one of 15
    assert chest_labels(small(m, CHEST))['Cardiomegaly'].tolist() == [0, 1]


def category(**parts):
    "Category of an image of two lungs of 20 rows, with so many rows of a class in the right and left one."
    m = np.zeros((1, 13, 32, 32), bool)
    m[0, 0, 6:26, 2:12] = m[0, 1, 6:26, 20:30] = True
    for name, (right, left) in parts.items():
        m[0, CHEST.index(name), 6 : 6 + right, 2:12] = m[0, CHEST.index(name), 6 : 6 + left, 20:30] = True
    boxes = chest_boxes(small(m, CHEST))
    assert boxes['name'].nunique() == 1
    return boxes['name'][0], len(boxes)


def test_categories_by_hand():
    assert category() == ('negative', 1)
    assert category(**{'ground glass': (8, 8)}) == ('typical', 2)
    assert category(**{'ground glass': (8, 0)}) == ('indeterminate', 1)
    assert category(**{'ground glass': (4, 0), 'consolidation': (8, 0)}) == ('atypical', 1)
    assert category(**{'ground glass': (8, 8), 'effusion': (0, 3)}) == ('atypical', 2)
    assert category(effusion=(0, 3)) == ('negative', 1)


def test_boxes_hold_the_opacities_and_a_negative_has_one_pixel(chest):
    boxes, filled = chest_boxes(chest), chest_box_set(chest)
    names = boxes.groupby('row')['name']
    assert set(boxes['row']) == set(range(len(chest))) and set(boxes['name']) <= set(CATEGORIES)
    assert (names.nunique() == 1).all()
    negative = boxes[boxes['name'] == 'negative']
    assert (negative[['x', 'y', 'width', 'height']] == [0, 0, 1, 1]).all().all()
    assert filled.names == CATEGORIES[1:] and (filled.table['category'] == names.first()).all()
    opaque = chest.masks[:, 4] | chest.masks[:, 5]
    assert (opaque & ~filled.masks.any(1)).sum() <= 0.02 * opaque.sum()  # but for specks of a few pixels
    assert (filled.masks.any((2, 3)).sum(1) == (filled.table['category'] != 'negative')).all()


# --- ribs


def test_ribs_are_bright_and_clean_frames_have_less_grain():
    s, clean = rib_masks(8, 96, 0, clean=True)
    assert clean.shape == s.images.shape and clean.dtype == np.uint8
    np.testing.assert_array_equal(rib_masks(8, 96, 0).images, s.images)
    assert (s.table.groupby('patient').size() == 4).all()
    assert s.table['frame'].tolist() == [0, 1, 2, 3] * 2
    assert s.masks.any((1, 2, 3)).mean() > 0.8 and (s.masks.mean((1, 2, 3)) < 0.15).all()
    for x, m in zip(s.images, s.masks[:, 0]):
        if m.any():
            assert x[m].mean() > x.mean()

    def grain(x):
        return np.abs(np.diff(x.astype(float), 2, axis=-1)).mean()

    assert all(grain(c) < grain(x) for c, x in zip(clean, s.images))
    assert all(np.corrcoef(c.ravel(), x.ravel())[0, 1] > 0.8 for c, x in zip(clean, s.images))
