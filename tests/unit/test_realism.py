"Realism: refused input, clips of other sizes, and what is kept of real clips."

import json

import numpy as np
import pandas as pd
import pytest
from fastcore.test import test_close as check_close

from lus_fastai.data.fan import Fan, FanError, phantom_fan
from lus_fastai.data.realism import (
    b_line_counts,
    b_line_tilts,
    count_shares,
    find_b_lines,
    fit_height,
    local_texture,
    measure_sources,
    real_texture,
    speckle_contrast,
    spread,
    texture_statistics,
)
from lus_fastai.data.sources import index_source
from lus_fastai.papers.sim_to_real import tuning_patients
from lus_fastai.synth.phantom import draw_patient, phantom_clip
from lus_fastai.video import write_video


@pytest.fixture(scope='module')
def clip():
    return phantom_clip(draw_patient(7, 'covid', 'convex'), 0, 6, (160, 160))


@pytest.mark.parametrize('counts', [[], [0, 0], [-1, 2], [0.5, 1], [[1, 2]], [np.nan, 1]])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match='counts must be|no frame has'):
        count_shares(counts)


@pytest.mark.parametrize('shape', [(5,), (1, 2, 8, 8)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match='masks must be'):
        find_b_lines(np.zeros(shape, np.uint8))


def test_a_mask_without_b_lines_gives_empty_tables():
    empty = np.full((3, 40, 40), 6, np.uint8)
    assert len(find_b_lines(empty)) == 0 and len(b_line_tilts(empty)) == 0
    assert b_line_counts(empty).tolist() == [0, 0, 0]
    assert b_line_counts(empty[0]).tolist() == [0]


def test_b_lines_belong_to_their_frame():
    dense = np.full((3, 100, 100), 6, np.uint8)
    dense[1, 20:80, 30:34] = dense[1, 20:80, 60:64] = dense[2, 50:55, 50:54] = 1  # the last is too low
    assert b_line_counts(dense).tolist() == [0, 2, 0]
    assert find_b_lines(dense)['frame'].tolist() == [1, 1]


@pytest.mark.parametrize(
    'frames, fan',
    [
        (np.zeros((2, 64, 64), np.uint8), np.ones((64, 60), bool)),  # another size
        (np.zeros((64, 64), np.uint8), np.ones((64, 64), bool)),  # one frame without its axis
        (np.zeros((2, 64, 64), np.float32), np.ones((64, 64), bool)),
        (np.zeros((0, 64, 64), np.uint8), np.ones((64, 64), bool)),
        (np.zeros((2, 64, 64), np.uint8), np.zeros((64, 64), bool)),  # no fan
        (np.zeros((2, 64, 64), np.uint8), np.eye(64, dtype=bool)[::-1] & (np.arange(64) < 20)),  # too small
        (np.zeros((2, 64, 64), np.uint8), Fan('linear', (32, 32), 0, 32, 0, 32)),
    ],
)
def test_frames_and_fans_that_do_not_fit_are_refused(frames, fan):
    for f in (fit_height, texture_statistics):
        with pytest.raises(FanError, match='frames must be|too small'):
            f(frames, fan)


def test_black_white_and_plain_clips_give_no_texture():
    everywhere = np.ones((64, 64), bool)
    for grey in (0, 255):
        s = texture_statistics(np.full((2, 64, 64), grey, np.uint8), everywhere)
        assert s['grey 50'] == grey and np.isnan([s['contrast'], s['axial'], s['lateral']]).all()
    assert texture_statistics(np.full((1, 64, 64), 90, np.uint8), everywhere)['contrast'] < 1e-3


def test_a_fan_and_its_mask_give_the_same_numbers(clip):
    fan = phantom_fan(clip.patient, (160, 160))
    assert texture_statistics(clip.frames, fan) == texture_statistics(clip.frames, fan.mask())


def test_statistics_are_repeatable_and_blind_to_a_border(clip):
    first = texture_statistics(clip.frames, clip.fan[0])
    wide = np.pad(clip.frames, ((0, 0), (30, 20), (40, 10)), constant_values=200)
    assert texture_statistics(wide, np.pad(clip.fan[0], ((30, 20), (40, 10)))) == first
    assert texture_statistics(clip.frames, clip.fan[0]) == first


def test_a_window_ends_with_the_fan():
    half = np.arange(128) < 64
    mask = np.broadcast_to(half, (128, 128))
    frames = np.where(mask, 100.0, 255.0)[None] + np.random.default_rng(0).normal(0, 10, (1, 128, 128))
    t = local_texture(frames, mask)
    check_close(t.mean[0][:, 63].mean(), 100, eps=1)  # at the border, and nothing of what is beyond
    assert not t.use[0][:, 60:].any()
    check_close(speckle_contrast(t), 0.1, eps=0.005)


def test_patients_count_once():
    clips = pd.DataFrame(dict(patient=['a'] * 9 + ['b'], black=[0.0] * 9 + [1.0], label=['x'] * 10))
    assert spread(clips).loc['black', 0.5] == 0.5 and list(spread(clips).index) == ['black']


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match='unknown group'):
        real_texture('transbound')


def test_shipped_numbers_name_no_clip(root):
    groups = json.loads((root / 'data' / 'real_texture.json').read_text(encoding='utf-8'))
    assert sorted(groups) == ['blues', 'convex', 'pocus convex', 'pocus linear']
    for g in groups.values():
        assert set(g) == {'clips', 'patients', 'left_out', 'quantiles'}
        assert set(g['left_out']) == {'unreadable', 'no_fan', 'other_fan'}
        assert all(len(q) == 5 and sorted(q) == q for q in g['quantiles'].values())
    assert groups['convex']['clips'] == groups['blues']['clips'] + groups['pocus convex']['clips']


def test_sources_are_measured_and_what_has_no_fan_is_counted(tmp_path):
    def row(name, frames, patient, probe):
        write_video(tmp_path / name, frames, 4)
        return dict(path=str(tmp_path / name), kind='video', patient=patient, probe=probe)

    def clip(seed, probe):
        return phantom_clip(draw_patient(seed, 'covid', probe), 0, 6, (160, 160)).frames

    pocus = [row(f'c{s}.mp4', clip(s, 'convex'), f'p{s}', 'convex') for s in (7, 8)]
    pocus += [
        row('l.mp4', clip(5, 'linear'), 'p5', 'linear'),
        row('w.mp4', clip(9, 'convex'), 'p9', 'linear'),
    ]
    pocus += [row('grey.mp4', np.full((6, 160, 160), 90, np.uint8), 'p0', 'convex')]
    (tmp_path / 'broken.mp4').write_bytes(b'no video')
    pocus += [dict(pocus[0], path=str(tmp_path / 'broken.mp4')), dict(pocus[0], kind='image')]
    blues = [row(f'b{k}.mp4', clip(7, 'convex'), f'b{k}', 'convex') for k in range(2)]
    tables = pd.DataFrame(pocus), pd.DataFrame(blues)
    out = measure_sources(*tables, tmp_path / 'out.json')
    assert json.loads((tmp_path / 'out.json').read_text()) == out
    assert out['pocus convex']['left_out'] == dict(unreadable=1, no_fan=1, other_fan=0)
    assert out['pocus linear']['left_out']['other_fan'] == 1
    assert [out[g]['clips'] for g in ('pocus convex', 'pocus linear', 'blues', 'convex')] == [2, 1, 2, 4]
    assert 'mp4' not in json.dumps(out)


def test_real_clips_give_the_committed_numbers(real_data, root, tmp_path):
    pocus, blues = index_source('pocus', real_data), index_source('blues', real_data)
    videos, linear = pocus['kind'] == 'video', pocus['probe'] == 'linear'
    few = pd.concat([pocus[videos & linear], pocus[videos & ~linear].head(2)])
    out = measure_sources(few, blues[tuning_patients(blues) == 'tuning'].head(2), tmp_path / 'out.json')
    kept = json.loads((root / 'data' / 'real_texture.json').read_text(encoding='utf-8'))['pocus linear']
    assert {**out['pocus linear'], 'quantiles': None} == {**kept, 'quantiles': None}
    for name, quantiles in kept['quantiles'].items():
        check_close(out['pocus linear']['quantiles'][name], quantiles, eps=0.02)
