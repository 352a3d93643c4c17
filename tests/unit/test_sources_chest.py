"CCXS, XPIE, CheXpert and SIIM-FISABIO-RSNA in small made-up folders of their layouts, and mask sets."

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lus_fastai.core import TableError
from lus_fastai.data.folds import patient_folds
from lus_fastai.data.mask_sets import busi_set, ccxs_set, read_mask, siim_set, transbound_set, xpie_set
from lus_fastai.data.readers import ccxs_patient, chexpert_labels, mask_paths, siim_boxes
from lus_fastai.data.sources import (
    SOURCES,
    fetch_source,
    index_source,
    manifest,
    manual_steps,
    sources_table,
    verify_source,
)
from lus_fastai.stats.classification import exact_match
from lus_fastai.synth.radiographs import CHEST, CHEXPERT
from lus_fastai.video import ClipError


def grey_image(seed, shape=(60, 80)):
    return np.asarray(
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).resize(
            shape[::-1], Image.NEAREST
        )
    )


def save(path, x, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **kw)
    return path


def rgba(mask, color=(40, 0, 90)):
    return np.dstack([mask[..., None] * np.array(color), np.full(mask.shape, 255)]).astype(np.uint8)


# --- masks in every dress

SHAPE = np.zeros((12, 16), bool)
SHAPE[3:7, 5:14] = True


def dresses():
    palette = Image.fromarray(SHAPE.astype(np.uint8), 'P')
    palette.putpalette([0, 0, 0, 30, 10, 0])
    yield 'zero and one', Image.fromarray(SHAPE.astype(np.uint8))
    yield 'zero and 255', Image.fromarray(SHAPE.astype(np.uint8) * 255)
    yield 'one bit', Image.fromarray(SHAPE)
    yield '16 bits', Image.fromarray(SHAPE.astype(np.uint16) * 40000)
    yield 'RGB', Image.fromarray(rgba(SHAPE)[..., :3].copy())
    yield 'dark RGBA on opaque black', Image.fromarray(rgba(SHAPE))
    yield (
        'black RGBA on nothing',
        Image.fromarray(np.dstack([np.zeros((12, 16, 3)), SHAPE * 255]).astype(np.uint8)),
    )
    yield (
        'white RGBA on nothing',
        Image.fromarray(np.dstack([np.full((12, 16, 3), 255), SHAPE * 255]).astype(np.uint8)),
    )
    yield (
        'grey and alpha',
        Image.fromarray(np.dstack([SHAPE * 200, np.full((12, 16), 255)]).astype(np.uint8), 'LA'),
    )
    yield 'palette', palette


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('number', range(10))
def test_masks_are_read_alike_whatever_they_wear(number, tmp_path):
    name, im = list(dresses())[number]
    im.save(tmp_path / 'm.png')
    np.testing.assert_array_equal(read_mask(tmp_path / 'm.png'), SHAPE, err_msg=name)


def test_soft_edges_empty_and_full_masks(tmp_path):
    x = np.zeros((8, 8), np.uint8)
    x[2:6, 2:6] = 255
    x[2:6, 6] = 60
    assert read_mask(save(tmp_path / 'soft.png', x)).sum() == 16
    assert (
        not read_mask(save(tmp_path / 'empty.png', x * 0)).any()
        and read_mask(save(tmp_path / 'full.png', x * 0 + 255)).all()
    )
    assert read_mask(save(tmp_path / 'colour.png', rgba(np.ones((5, 5), bool)))).all()


def test_a_mask_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\nrubbish')
    with pytest.raises(ClipError, match='broken.png'):
        read_mask(tmp_path / 'broken.png')
    with pytest.raises(ClipError, match='gone.png.*no such file'):
        read_mask(tmp_path / 'gone.png')


# --- CCXS


def make_ccxs(root):
    "Three patients, four images; a class of two masks, an overlap, a category nobody knows."
    rows = []

    def add(name, kind, left, top, mask, number):
        path = f'masks/{name}_{number}.png'
        save(root / path, rgba(mask))
        rows.append(
            (
                f'COVID-19 {kind}',
                kind,
                f'{name}.jpg',
                f'images/hash{number}.jpg',
                path,
                '80x60',
                top,
                left,
                mask.shape[1],
                mask.shape[0],
            )
        )

    box, thin = np.ones((20, 10), bool), np.zeros((40, 20), bool)
    thin[:, 7] = True
    for i, name in enumerate(('case-day0', 'case-day4', 'covid-19-pneumonia-7-PA', 'other')):
        save(root / f'images/{name}.{"png" if i == 2 else "jpg"}', grey_image(i))
        add(name, 'Right Lung', 10, 20, box, 10 * i)
        add(name, 'Ground Glass Opacities', 12, 25, box, 10 * i + 1)
    add('case-day0', 'Right Lung', 50, 0, box, 3)
    add('other', 'Nosogastric Tube', 60, 20, thin, 33)
    add('other', 'Chest Tube', 0, 0, box, 34)
    pd.DataFrame(
        rows, columns='Class,Template Name,Filename,Image,Mask,Resolution,Top,Left,Width,Height'.split(',')
    ).to_csv(root / 'structure.csv', index=False)
    return root


def test_ccxs_joins_patients_and_pastes_crops(tmp_path, capsys):
    table = index_source('ccxs', make_ccxs(tmp_path / 'ccxs'))
    said = capsys.readouterr().out
    assert (
        len(table) == 4
        and table['patient'].nunique() == 3
        and '4 right lung' in said
        and '1 nasogastric tube' in said
        and 'dropped: Chest Tube' in said
    )
    assert table.groupby('patient').size().to_dict()['ccxs-case'] == 2
    s = ccxs_set(table, (60, 80))
    assert s.names == CHEST and s.images.shape == (4, 60, 80) and s.table['clip'].is_unique
    one = s.masks[[p.endswith('case-day0.jpg') for p in table['path']].index(True)]
    want = np.zeros((60, 80), bool)
    want[20:40, 10:20] = True
    want[0:20, 50:60] = True
    np.testing.assert_array_equal(one[0], want)
    want[:] = False
    want[25:45, 12:22] = True
    np.testing.assert_array_equal(one[4], want)
    assert (one[0] & one[4]).any() and not one[1].any()
    x = np.asarray(Image.open(table['path'][0]).convert('L'))
    assert np.abs(s.images[0].astype(int) - x).max() <= 1
    folds = patient_folds(s.table, 3, seed=0)
    assert (s.table.assign(fold=folds.fold).groupby('patient')['fold'].nunique() == 1).all()


def test_a_thin_tube_survives_shrinking(tmp_path, capsys):
    table = index_source('ccxs', make_ccxs(tmp_path / 'ccxs'))
    s = ccxs_set(table[table['path'].str.contains('other')], (16, 20))
    tube = s.masks[0, CHEST.index('nasogastric tube')]
    assert 5 <= tube.sum() <= 14 and set(np.flatnonzero(tube.any(0))) == {16}
    assert s.masks[0, 0].sum() == 5 * 3 or abs(s.masks[0, 0].mean() - 200 / 4800) < 0.02


def test_ccxs_with_holes_says_so(tmp_path, capsys):
    root = make_ccxs(tmp_path / 'ccxs')
    (root / 'images/case-day4.jpg').unlink()
    (root / 'masks/other_33.png').unlink()
    (root / 'images/covid-19-pneumonia-7-PA.png').write_bytes(b'no image')
    table = index_source('ccxs', root)
    said = capsys.readouterr().out
    assert (
        len(table) == 1
        and '2 image(s) skipped: it, or one of its masks, is not here: case-day4.jpg, masks/other_33.png'
        in said
        and 'covid-19-pneumonia-7-PA.png' in said
    )
    mask_paths(table['masks'][0])
    (root / 'masks/case-day0_0.png').write_bytes(b'no mask')
    with pytest.raises(TableError, match='none of 1 image.*case-day0_0.png'):
        ccxs_set(table, 32)


def test_a_bad_mask_skips_its_image_only(tmp_path, capsys):
    root = make_ccxs(tmp_path / 'ccxs')
    table = index_source('ccxs', root)
    save(root / 'masks/other_33.png', rgba(np.ones((50, 90), bool)))
    capsys.readouterr()
    s = ccxs_set(table, 32)
    assert len(s) == 3 == len(s.table) and not s.table['path'].str.contains('other').any()
    assert '1 of 4 image(s) skipped: other_33.png' in capsys.readouterr().out
    with pytest.raises(ValueError, match='at least 16'):
        ccxs_set(table, 8)
    with pytest.raises(TableError, match='empty'):
        ccxs_set(table[:0], 32)


def test_images_that_look_alike_are_one_patient(tmp_path, capsys):
    root = make_ccxs(tmp_path / 'ccxs')
    save(root / 'images/other.jpg', grey_image(0))
    table = index_source('ccxs', root)
    assert table['patient'].nunique() == 2 and set(
        table['patient'][table['path'].str.contains('other|case')]
    ) == {'ccxs-case'}


@pytest.mark.parametrize(
    'names',
    (
        (
            'auntminnie-a-2020_01_28_23_51_6665_2020_01_28_Vietnam_coronavirus',
            'auntminnie-d-2020_01_28_23_51_6665_2020_01_28_Vietnam_coronavirus',
        ),
        ('nejmoa2001191_f1-PA', 'nejmoa2001191_f4', 'nejmoa2001191_f5-PA'),
        ('ryct.2020200034.fig5-day0', 'ryct.2020200034.fig5-day7'),
        ('41591_2020_819_Fig1_HTML.webp-day5', '41591_2020_819_Fig1_HTML.webp-day10'),
        ('all14238-fig-0001-m-b', 'all14238-fig-0001-m-c'),
        (
            'covid-19-rapidly-progressive-acute-respiratory-distress-syndrome-ards-admission',
            'covid-19-rapidly-progressive-acute-respiratory-distress-syndrome-ards-day-3',
        ),
        ('SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0', 'SARS-10.1148rg.242035193-g04mr34g0-Fig8c-day10'),
        ('pneumocystis-jirovecii-pneumonia-3-1', 'pneumocystis-jirovecii-pneumonia-3-2'),
    ),
)
def test_names_of_one_patient(names):
    assert len({ccxs_patient(f'{n}.jpeg') for n in names}) == 1


def test_names_of_different_patients():
    names = (
        'SARS-10.1148rg.242035193-g04mr34g04a-Fig4a-day7',
        'SARS-10.1148rg.242035193-g04mr34g05x-Fig5-day9',
        'ryct.2020200034.fig2',
        'ryct.2020200034.fig5-day0',
        'ryct.2020200028.fig1a',
        'pneumocystis-pneumonia-1',
        'pneumocystis-pneumonia-12',
        'pneumocystis-pneumonia-2-PA',
        'pneumocystis-pneumonia-8',
        'acute-respiratory-distress-syndrome-ards',
        'acute-respiratory-distress-syndrome-ards-1',
        'lancet-case2a',
        'gr1_lrg-a',
        '1312A392-67A3-4EBF-9319-810CF6DA5EF6',
        '9C34AF49-E589-44D5-92D3-168B3B04E4A6',
        '31BA3780-2323-493F-8AED-62081B9C383B',
        'CD50BA96-6982-4C80-AE7B-5F67ACDBFA56',
    )
    assert len({ccxs_patient(f'{n}.jpg') for n in names}) == len(names)


def test_ccxs_manifest_lists_upstream():
    m = manifest('ccxs')
    assert (
        len(m) == 690
        and (m['kind'] == 'image').sum() == 100
        and m['path'].str.startswith('masks/').sum() == 588
        and m['git_blob_sha1'].str.fullmatch('[0-9a-f]{40}').all()
    )
    assert (m['patient'][m['kind'] == 'image'] == m['path'][m['kind'] == 'image'].map(ccxs_patient)).all()


def test_real_ccxs(real_data, capsys):
    table = index_source('ccxs', real_data)
    s = ccxs_set(table, 64)
    assert len(table) == len(s) == 88 and table['patient'].nunique() == 62
    assert dict(zip(CHEST, s.masks.any((2, 3)).sum(0).tolist())) == dict(
        zip(CHEST, (87, 87, 88, 87, 82, 30, 2, 1, 12, 10, 11, 9, 15))
    )

    def column(k):
        return (s.masks[:, k] * np.arange(64)).sum((1, 2)) / s.masks[:, k].sum((1, 2)).clip(1)

    both = s.masks[:, 0].any((1, 2)) & s.masks[:, 1].any((1, 2))
    assert (column(0) < column(1))[both].mean() > 0.97  # the right lung is on the left


# --- BUSI


def make_busi(root):
    lesion = np.zeros((60, 80), np.uint8)
    lesion[10:30, 20:40] = 255
    for i, (name, masks) in enumerate(
        (
            ('benign/benign (1)', (lesion, lesion[::-1])),
            ('malignant/malignant (1)', (lesion,)),
            ('normal/normal (1)', (lesion * 0,)),
        )
    ):
        save(root / f'{name}.png', grey_image(50 + i))
        for k, m in enumerate(masks):
            save(root / f"{name}_mask{f'_{k}' if k else ''}.png", m)
    return root


def test_busi_set_joins_lesions_and_keeps_normal_empty(tmp_path, capsys):
    table = index_source('busi', make_busi(tmp_path / 'busi'))
    s = busi_set(table, (60, 80))
    assert (
        s.names == ('lesion',)
        and s.masks.sum((1, 2, 3)).tolist() == [800, 400, 0]
        and s.table['label'].tolist() == ['benign', 'malignant', 'normal']
    )
    assert s.table['patient'].nunique() == 3 and s.table['clip'].is_unique
    save(tmp_path / 'busi/malignant/malignant (1)_mask.png', np.ones((9, 9), np.uint8) * 255)
    capsys.readouterr()
    assert (
        len(busi_set(table, 32)) == 2
        and 'malignant (1)_mask.png (the mask is 9x9, its image 80x60)' in capsys.readouterr().out
    )


# --- XPIE


@pytest.mark.parametrize('folders', (('images', 'masks'), ('XPIE_img', 'XPIE_gt'), ('imgs', 'GroundTruth')))
def test_xpie_pairs_images_and_masks(tmp_path, capsys, folders):
    root, m = tmp_path / 'xpie', np.zeros((60, 80), np.uint8)
    m[10:20, 10:50] = 255
    for i in range(4):
        save(root / folders[0] / f'{i:05d}.jpg', np.dstack([grey_image(i)] * 3))
    for i in (0, 1, 2, 7):
        save(root / folders[1] / f'{i:05d}.png', m)
    table = index_source('xpie', root)
    said = capsys.readouterr().out
    assert (
        len(table) == 3 == table['patient'].nunique()
        and 'without a mask, skipped' in said
        and '1 mask(s) without an image' in said
    )
    s = xpie_set(table, (60, 80))
    assert s.masks.sum((1, 2, 3)).tolist() == [400] * 3 and s.names == ('object',)
    save(root / folders[1] / '00001.png', m[:30])
    capsys.readouterr()
    assert len(xpie_set(table, 32)) == 2 and '00001.png' in capsys.readouterr().out


# --- CheXpert


def make_chexpert(root):
    rows = []
    for i, (patient, view) in enumerate(
        (
            ('patient00001/study1', 'view1_frontal'),
            ('patient00001/study2', 'view1_frontal'),
            ('patient00002/study1', 'view2_lateral'),
            ('patient00003/study1', 'view1_frontal'),
        )
    ):
        path = f'train/{patient}/{view}.jpg'
        if i != 3:
            save(root / path, grey_image(i))
        rows.append(
            {
                'Path': f'CheXpert-v1.0-small/{path}',
                'Sex': 'Female',
                'Age': 60,
                'Frontal/Lateral': 'Frontal',
                'AP/PA': 'AP',
            }
            | dict.fromkeys(CHEXPERT, None)
            | {'Edema': -1.0, 'Consolidation': -1.0, 'Support Devices': 1.0, 'Fracture': 0.0}
        )
    pd.DataFrame(rows).to_csv(root / 'train.csv', index=False)
    return root


def test_chexpert_layout_and_policy(tmp_path, capsys):
    root = make_chexpert(tmp_path / 'CheXpert-v1.0-small')
    table = index_source('chexpert', root)
    said = capsys.readouterr().out
    assert (
        len(table) == 3
        and table['patient'].tolist() == ['chexpert-patient00001'] * 2 + ['chexpert-patient00002']
        and table['view'].tolist() == ['frontal', 'frontal', 'lateral']
    )
    assert 'file is not here, skipped: patient00003' in said
    y = chexpert_labels(table)
    assert (
        y.shape == (3, 14)
        and list(y.columns) == list(CHEXPERT)
        and {c for c in y if y[c].all()} == {'Edema', 'Support Devices'}
        and y.to_numpy().sum() == 6
    )
    assert {c for c in CHEXPERT if chexpert_labels(table, ())[c].any()} == {'Support Devices'}
    assert {c for c in CHEXPERT if chexpert_labels(table, CHEXPERT)[c].any()} == {
        'Edema',
        'Consolidation',
        'Support Devices',
    }


def test_chexpert_found_one_folder_up_and_bad_values_named(tmp_path, capsys):
    root = make_chexpert(tmp_path / 'CheXpert-v1.0-small')
    assert len(index_source('chexpert', tmp_path)) == 3
    t = pd.read_csv(root / 'train.csv')
    t.loc[0, 'Edema'] = 2
    t.to_csv(root / 'train.csv', index=False)
    capsys.readouterr()
    assert (
        len(index_source('chexpert', root)) == 2
        and 'not 1, 0, -1 or empty: patient00001' in capsys.readouterr().out
    )
    t.drop(columns='Edema').to_csv(root / 'train.csv', index=False)
    with pytest.raises(TableError, match='Edema'):
        index_source('chexpert', root)


def test_exact_match_is_a_whole_row():
    y = np.random.default_rng(0).integers(0, 2, (20, 14))
    p = y.copy()
    p[:5, 3] ^= 1
    p[0] ^= 1
    assert exact_match(p, y) == 15 / 20 and exact_match(y, y) == 1 and np.isnan(exact_match(y[:0], y[:0]))
    with pytest.raises(ValueError, match='alike'):
        exact_match(y, y[:3])


# --- SIIM-FISABIO-RSNA

BOXES = {
    'aaa': 'opacity 1 10 20 40 50 opacity 1 50 0 80 30',
    'bbb': 'none 1 0 0 1 1',
    'ccc': 'opacity 1 0 0 20 20',
    'ddd': 'opacity 1 0 0 9',
}
STUDY = dict(aaa='s1', bbb='s2', ccc='s1', ddd='s2', eee='s3')


def make_siim(root, writer):
    for name, study in STUDY.items():
        if name != 'eee':
            writer(root / 'train' / study / 'series' / name, grey_image(sum(map(ord, name))))
    pd.DataFrame(
        [
            dict(id=f'{n}_image', boxes=None, label=BOXES.get(n, 'none 1 0 0 1 1'), StudyInstanceUID=s)
            for n, s in STUDY.items()
        ]
    ).to_csv(root / 'train_image_level.csv', index=False)
    pd.DataFrame(
        [('s1_study', 0, 1, 0, 0), ('s2_study', 1, 0, 0, 0), ('s3_study', 0, 0, 0, 1)],
        columns=[
            'id',
            'Negative for Pneumonia',
            'Typical Appearance',
            'Indeterminate Appearance',
            'Atypical Appearance',
        ],
    ).to_csv(root / 'train_study_level.csv', index=False)
    return root


def test_siim_png_boxes_filled_negatives_empty(tmp_path, capsys):
    table = index_source('siim', make_siim(tmp_path / 'siim', lambda p, x: save(p.with_suffix('.png'), x)))
    said = capsys.readouterr().out
    assert table['category'].tolist() == ['typical', 'typical', 'negative'] and table['patient'].tolist() == [
        'siim-s1',
        'siim-s1',
        'siim-s2',
    ]
    assert (
        'of the table not here, skipped: eee' in said
        and 'boxes cannot be read: ddd' in said
        and '1 image(s) without a box' in said
    )
    s = siim_set(table, (60, 80))
    assert s.names == ('typical', 'indeterminate', 'atypical') and s.masks.sum((2, 3)).tolist() == [
        [1800, 0, 0],
        [400, 0, 0],
        [0, 0, 0],
    ]
    assert (
        s.masks[0, 0, 20:50, 10:40].all()
        and s.masks[0, 0, :30, 50:80].all()
        and s.table['category'].tolist() == table['category'].tolist()
    )
    np.testing.assert_array_equal(
        siim_set(table, 40).masks[1, 0], np.pad(np.ones((13, 10), bool), ((0, 27), (0, 30)))
    )


def test_siim_boxes_are_in_original_pixels(tmp_path, capsys):
    root = make_siim(tmp_path / 'siim', lambda p, x: save(p.with_suffix('.png'), x))
    pd.DataFrame([(n, 120, 160) for n in STUDY], columns=['image_id', 'dim0', 'dim1']).to_csv(
        root / 'meta.csv', index=False
    )
    s = siim_set(index_source('siim', root), (60, 80))
    assert s.masks[0, 0].sum() == 450 and s.masks[0, 0, 10:25, 5:20].all()


def test_siim_dicom_knows_its_patient(tmp_path, capsys):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    def write(path, x):
        path = path.with_suffix('.dcm')
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.1'
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0' * 128)
        (
            ds.PatientID,
            ds.Rows,
            ds.Columns,
            ds.SamplesPerPixel,
            ds.PhotometricInterpretation,
            ds.BitsAllocated,
            ds.BitsStored,
            ds.HighBit,
            ds.PixelRepresentation,
        ) = 'P7', *x.shape, 1, 'MONOCHROME2', 8, 8, 7, 0
        ds.PixelData = x.tobytes()
        ds.save_as(path, enforce_file_format=True)

    table = index_source('siim', make_siim(tmp_path / 'siim', write))
    assert (
        set(table['patient']) == {'siim-' + hashlib.sha256(b'P7').hexdigest()[:12]}
        and table['height'].tolist() == [60] * 3
    )
    assert siim_set(table, (60, 80)).masks.sum((1, 2, 3)).tolist() == [1800, 400, 0]


def test_siim_box_strings():
    assert siim_boxes('none 1 0 0 1 1') == [] and siim_boxes('opacity 1 0.5 0 2.5 4') == [(0.5, 0, 2, 4)]
    assert siim_boxes('opacity 1 0 0 1 1') == []  # a box of one pixel is no opacity
    for bad in ('opacity 1 0 0', 'lesion 1 0 0 1 1', '', None, 'opacity 1 a b c d'):
        with pytest.raises(ValueError):
            siim_boxes(bad)


# --- TransBound


PUBLISHED = 'AlineBlineSegmentation_Full/Images', 'AlineBlineSegmentation_Full/AlineBlineSegmentation'


@pytest.mark.parametrize('folders', (('images', 'masks'), PUBLISHED))
def test_transbound_parts_the_pleura_from_a_lines(tmp_path, capsys, folders):
    root, m = tmp_path / 'transbound', np.zeros((60, 80), bool)
    m[10:14, 10:50] = m[30:33, 20:50] = m[45:48, 30:60] = True
    for i in range(1, 12):
        save(root / folders[0] / f'{i}.png', grey_image(i))
    for i in (*range(1, 11), 20):
        save(root / folders[1] / f'{i}.png', m if i != 3 else m[:20])
    table = index_source('transbound', root)
    said = capsys.readouterr().out
    assert '1 image(s) without a mask, skipped: 11' in said and '1 mask(s) without an image: 20' in said
    assert [Path(p).stem for p in table['path']] == [str(i) for i in range(1, 11)]
    assert set(table['patient']) == {'transbound'} and 'count as one patient' in said
    s = transbound_set(table, (60, 80))
    assert s.names == ('A-line', 'pleura') and len(s) == 9  # the mask of 3 does not fit its image
    assert s.masks.sum((2, 3)).tolist() == [[180, 160]] * 9 and s.masks[0, 1, 10:14, 10:50].all()
    assert '3.png (the mask is 80x20, its image 80x60)' in capsys.readouterr().out
    assert transbound_set(table, 32).masks.any((2, 3)).all()
    save(root / folders[1] / '5.png', ~m & False)
    assert not transbound_set(table[table['path'].str.endswith('5.png')], 32).masks.any()  # nothing drawn


def test_a_folder_of_other_masks_is_not_transbound(tmp_path):
    for top in ('images', 'masks'):
        save(tmp_path / 'xpie' / top / '00001.png', grey_image(1))
    with pytest.raises(FileNotFoundError, match='transbound'):
        index_source('transbound', tmp_path)


# --- the registry


@pytest.mark.parametrize('name', ('xpie', 'chexpert', 'siim', 'transbound'))
def test_what_comes_by_hand_says_where_from(name, tmp_path):
    s = SOURCES[name]
    assert (
        s.licence
        and s.citation
        and s.urls['homepage'] in manual_steps(name, tmp_path)
        and pd.isna(sources_table().loc[name, 'files'])
    )
    with pytest.raises(FileNotFoundError, match='by hand'):
        index_source(name, tmp_path)
    with pytest.raises(FileNotFoundError, match='by hand|cannot be fetched'):
        fetch_source(name, tmp_path)
    with pytest.raises(FileNotFoundError, match='nothing to verify'):
        verify_source(name, tmp_path)


def test_one_bad_cell_of_ccxs_costs_one_image(tmp_path, capsys):
    root = make_ccxs(tmp_path / 'ccxs')
    whole = index_source('ccxs', root)
    sheet = pd.read_csv(root / 'structure.csv', dtype=str)
    for column, bad in (
        ('Left', '12px'),
        ('Top', None),
        ('Mask', None),
        ('Mask', '../../etc/passwd'),
        ('Left', '1.5'),
    ):
        changed = sheet.copy()
        changed.loc[0, column] = bad
        changed.to_csv(root / 'structure.csv', index=False)
        capsys.readouterr()
        table = index_source('ccxs', root)
        assert (
            '1 row(s) of structure.csv with a wrong cell, their images skipped: line 2'
            in capsys.readouterr().out
        )
        name = Path(sheet.loc[0, 'Filename']).stem
        gone = [p for p in whole['path'] if Path(p).stem == name]
        assert len(gone) == 1 and set(table['path']) == set(whole['path']) - set(gone), (column, bad)
