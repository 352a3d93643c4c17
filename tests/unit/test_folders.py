"A folder of any files becomes a clip table, or an error that names the file."

import os
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_store import dicom

from lus_fastai.core import TableError, write_table
from lus_fastai.data.folders import clip_kind, index_folder, read_folder
from lus_fastai.toys import toy_frames
from lus_fastai.video import ClipError, write_video


def frames(n, seed=0):
    return toy_frames(n, (32, 32), seed)[0]


@pytest.fixture
def mine(tmp_path):
    "Two classes of three patients; every kind of file that a clinic exports."
    for name in ('covid/p1', 'covid/p2', 'well/p3'):
        (tmp_path / name).mkdir(parents=True)
    write_video(tmp_path / 'covid/p1/a.mp4', frames(3, 1), 5)
    first, *more = [Image.fromarray(x) for x in frames(3, 2)]
    first.save(tmp_path / 'covid/p2/b.GIF', format='GIF', save_all=True, append_images=more, duration=50)
    Image.fromarray(frames(1, 3)[0]).save(tmp_path / 'well/p3/still.png')
    dicom(tmp_path / 'well/p3/IM0001', frames(4, 4), FrameTime='50')
    dicom(tmp_path / 'well/p3/1.2.840.7', frames(1, 5))
    return tmp_path


by_folder = dict(label='folder', patient=r'/(p\d)/')


def test_kinds_come_from_the_content(mine):
    table = index_folder(mine, **by_folder)
    kinds = {os.path.basename(p): k for p, k in zip(table.path, table.kind)}
    assert {n for n, k in kinds.items() if k == 'video'} == {'a.mp4', 'b.GIF', 'IM0001'}
    assert {n for n, k in kinds.items() if k == 'image'} == {'still.png', '1.2.840.7'}
    assert list(table.label) == ['covid', 'covid', 'well', 'well', 'well']
    assert list(table.patient) == ['p1', 'p2', 'p3', 'p3', 'p3']
    assert set(table.source) == set(table.probe) == {'unknown'}


def test_what_is_no_clip_is_named_with_the_reason(mine):
    (mine / 'list.txt').write_text('A text, of which a video library would make a film.\n' * 20)
    (mine / 'well/empty.mp4').touch()
    (mine / 'well/.DS_Store').write_bytes(b'\0\0\0\1Bud1')
    (mine / 'well/report.pdf').write_bytes(b'%PDF')
    said = (
        r'4 file\(s\) .* left out: list.txt \(.*\), well/.DS_Store \(.*\), '
        r'well/empty.mp4 \(the file is empty\), well/report.pdf \(.*\)'
    )
    with pytest.warns(UserWarning, match=said):
        assert len(index_folder(mine, **by_folder)) == 5
    with pytest.raises(ClipError, match='list.txt'):
        clip_kind(mine / 'list.txt')


@pytest.mark.parametrize(
    'make, error, message',
    [
        (None, FileNotFoundError, 'new is not a folder'),
        ([], TableError, 'holds no clip, and no other file'),
        (['a.txt'], TableError, r'holds no clip: a.txt \(files named \*.txt'),
    ],
)
def test_folders_without_a_clip(tmp_path, make, error, message):
    if make is not None:
        (tmp_path / 'new').mkdir()
    for name in make or ():
        (tmp_path / 'new' / name).touch()
    with pytest.raises(error, match=message):
        index_folder(tmp_path / 'new', **by_folder)


@pytest.fixture
def sheet(mine):
    "Labels and patients of `mine` as a spreadsheet program saves them, in another order."
    table = index_folder(mine, **by_folder)
    rows = table[['label', 'patient']].assign(file=[os.path.basename(p) for p in table.path])[::-1]
    rows.to_csv(mine / 'labels.csv', index=False, encoding='utf-8-sig')
    return rows


def test_every_way_gives_the_same_table(mine, sheet):
    csv, more = mine / 'labels.csv', dict(source='folder', probe='convex')
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # the spreadsheet itself is no lost clip
        table = index_folder(mine, label=csv, patient=str(csv), **more)
    assert list(table.patient) == ['p1', 'p2', 'p3', 'p3', 'p3'] and list(table.source) == list(table.label)
    csv.unlink()
    short, full = (
        dict(zip(paths, table.label))
        for paths in ([os.path.relpath(p, mine) for p in table.path], table.path)
    )
    patients = dict(zip(table.path, table.patient))
    ways = (
        ('folder', '/(p.)/'),
        ('([a-z]+)/', lambda p: p.parts[1]),
        (sheet, sheet),
        (short, patients),
        (full, patients),
    )
    for label, patient in ways:
        pd.testing.assert_frame_equal(index_folder(mine, label=label, patient=patient, **more), table)


@pytest.mark.parametrize(
    'given, message',
    [
        (
            dict(patient='/(p[12])/'),
            r"no patient for 3 of 5 clips .* by '/.*/': well/p3/1.2.840.7, well/p3/IM0001, well/p3/still.png",
        ),
        (
            dict(patient=lambda p: np.nan if p.suffix == '.png' else 'x'),
            'no patient for 1 of 5 .* the function: well/p3/still.png',
        ),
        (
            dict(label={'a.mp4': 'covid'}),
            r'no label for 4 of 5 clips .*: covid/p2/b.GIF, .*, well/p3/still.png',
        ),
        (
            dict(label={'a.mp4': 'covid', 'gone.mp4': 'well'}),
            r'table for label: 1 row\(s\) name no clip below .*: gone.mp4',
        ),
        (dict(patient='p1'), "patient='p1' is not one of the ways"),
        (dict(label=3), 'not as int'),
        (dict(label='file'), "label='file' is not one of the ways"),
        (dict(probe='(c)(d)'), 'needs one group in parentheses, the part of the path to take; it has 2'),
    ],
)
def test_mistakes_name_files(mine, given, message):
    with pytest.raises(ValueError, match=message):
        index_folder(mine, **{**by_folder, **given})


def test_a_name_that_two_files_have_is_refused(mine):
    write_video(mine / 'well/p3/a.mp4', frames(2), 5)
    said = r'a.mp4 is the name of 2 files .*covid/p1/a.mp4, well/p3/a.mp4\): give its path'
    with pytest.raises(TableError, match=said):
        index_folder(mine, label={'a.mp4': 'x'}, patient='/(p.)/')


def test_a_linked_clip_is_one_clip(mine):
    (mine / 'well/p3/again.mp4').symlink_to(mine / 'covid/p1/a.mp4')
    with pytest.raises(TableError, match='names a file twice'):
        index_folder(mine, **by_folder)


def test_a_patient_a_file_is_warned_of(mine):
    with pytest.warns(UserWarning, match='each of the 5 clips as a patient of its own'):
        assert index_folder(mine, label='folder', patient='file').patient.nunique() == 5


def test_a_folder_describes_itself_in_part(mine):
    with pytest.raises(TableError, match='whose clips are in .*clips.csv with the columns path,patient'):
        read_folder(mine)
    table = index_folder(mine, **by_folder)
    pd.testing.assert_frame_equal(read_folder(mine, patient='/(p.)/'), table)
    names = [os.path.relpath(p, mine) for p in table.path]
    pd.DataFrame(dict(path=names, patient=list('abcde'), probe='linear')).to_csv(
        mine / 'clips.csv', index=False
    )
    part = read_folder(mine)
    assert list(part.patient) == list('abcde') and list(part.label) == list(table.label)
    assert set(part.probe) == {'linear'}
    assert list(read_folder(mine, label='([^/]+)$').label) == [os.path.basename(n) for n in names]


def test_a_folder_describes_itself_wholly(mine):
    table = index_folder(mine, **by_folder).assign(source='here')[:3]
    write_table(table, mine / 'clips.csv')
    pd.testing.assert_frame_equal(
        read_folder(mine), table
    )  # what a whole clip table does not list is not read
    (mine / 'covid/p1/a.mp4').unlink()
    with pytest.raises(TableError, match='no such file in row'):
        read_folder(mine)
