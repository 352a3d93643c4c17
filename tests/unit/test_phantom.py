"Faults, properties and independent measurements of the phantom; single images are tested in the notebook."

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.core import CLASSES, check_table, read_table
from lus_fastai.synth import phantom
from lus_fastai.synth.phantom import (
    BeamGrid,
    draw_patient,
    log_compress,
    phantom_clip,
    phantom_dataset,
    speckle,
)
from lus_fastai.video import write_video


def plain(label='regular', probe='linear', seed=3, **change):
    "A patient without ribs, edges or disease; nothing smoothed."
    base = dict(
        ribs=0.0,
        curtain=0.0,
        effusion=0.0,
        lobar=0.0,
        subpleural=0.0,
        blines=0.0,
        irregular=0.0,
        persistence=0.0,
        smoothing=0.0,
        aspect=1.0,
        flatness=0.0,
        crop=1.0,
        depth=50.0 if probe == 'linear' else 120.0,
    )
    return replace(draw_patient(seed, label, probe), **{**base, **change})


def read(path):
    import av

    with av.open(str(path)) as video:
        return np.stack([f.to_ndarray(format='gray', threads=1) for f in video.decode(video=0)])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    label=st.sampled_from(CLASSES),
    probe=st.sampled_from(['convex', 'linear']),
    h=st.integers(32, 90),
    w=st.integers(32, 90),
    n=st.integers(1, 3),
)
def test_any_clip_is_consistent(seed, label, probe, h, w, n):
    c = phantom_clip(draw_patient(seed, label, probe), seed=1, n=n, size=(h, w))
    for x in (c.frames, c.dense, c.rib, c.consolidation, c.effusion, c.fan):
        assert x.shape == (n, h, w) and x.dtype == np.uint8
    assert c.dense.max() <= 6 and max(x.max() for x in (c.rib, c.consolidation, c.effusion, c.fan)) <= 1
    out = c.fan == 0
    assert (
        not c.frames[out].any()
        and (c.dense[out] == 6).all()
        and not (c.rib | c.consolidation | c.effusion)[out].any()
    )
    assert not (c.consolidation & c.effusion).any()
    wet = (c.consolidation | c.effusion) == 1
    assert np.isin(c.dense[wet], (3, 5, 6)).all(), (
        "solid and fluid lung lies in the unhealthy region, at its pleura, or in a rib's shadow"
    )
    assert c.findings['consolidation'] == bool(c.consolidation.any()) and c.findings['effusion'] == bool(
        c.effusion.any()
    )
    json.dumps(c.findings)


def test_same_seed_same_bytes_in_any_order():
    p, size = draw_patient(11), (64, 80)
    first = phantom_clip(p, 2, 4, size)
    phantom_clip('covid', 9, 2, size)
    np.random.seed(0)
    again = phantom_clip(draw_patient(11), 2, 4, size)
    for a, b in ((first.frames, again.frames), (first.dense, again.dense), (first.rib, again.rib)):
        assert a.tobytes() == b.tobytes()
    assert (phantom_clip(p, 3, 4, size).frames != first.frames).any()
    assert (phantom_clip(draw_patient(12), 2, 4, size).frames != first.frames).any()


@settings(max_examples=10, deadline=None)
@given(axial=st.floats(0.6, 2.5), lateral=st.floats(0.6, 4), seed=st.integers(0, 1000))
def test_speckle_is_rayleigh_of_unit_power(axial, lateral, seed):
    white = np.random.default_rng(seed).normal(size=(400, 400, 2)).view(complex)[..., 0] * 0.5**0.5
    e = abs(speckle(white, axial, np.full(400, lateral)))
    assert abs(e.mean() / e.std() - np.sqrt(np.pi / (4 - np.pi))) < 0.1
    assert abs((e**2).mean() - 1) < 0.12


def test_psf_has_the_width_asked_for():
    point = np.zeros((200, 120), complex)
    point[60, 60] = point[140, 60] = 1
    e = abs(speckle(point, 2.0, np.where(np.arange(200) < 100, 1.5, 5.0)))

    def std(x):
        k = np.arange(len(x))
        m = (k * x).sum() / x.sum()
        return np.sqrt(((k - m) ** 2 * x).sum() / x.sum())

    assert std(e[60]) == pytest.approx(1.5, abs=0.05) and std(e[140]) == pytest.approx(5, abs=0.1)
    assert std(e[40:80, 60]) == pytest.approx(2, abs=0.05)


def test_grain_of_homogeneous_lung_before_compression():
    p = plain()
    s = phantom.phantom_scene(p, 0, 2)
    e = abs(s.lung[100:350, 20:-20])
    assert e.mean() / e.std() == pytest.approx(1.91, abs=0.12)


def test_log_compression_is_linear_in_decibels():
    assert np.allclose(
        log_compress(10 ** np.array([0, -1.5, -3, -4.5, -9], np.float32), 60),
        [1, 0.75, 0.5, 0.25, 0],
        atol=1e-4,
    )
    assert np.allclose(log_compress(np.array([1e-3], np.float32), 60, gain=6), 0.6, atol=1e-4)


@pytest.mark.parametrize('probe', ['linear', 'convex'])
def test_scan_conversion_agrees_with_a_direct_look_up(probe):
    p = plain(probe=probe)
    g = BeamGrid(p, (100, 120))
    ramp = np.broadcast_to(g.z[:, None], (g.nz, g.nb)).copy()
    depth = g.scan_convert(ramp)
    i, j = np.array([70, 50, 90]), np.array([60, 40, 75])
    if probe == 'linear':
        expect = (i + 0.5) * p.depth / 100
    else:
        mm = p.depth / 100  # crop=1: row 0 touches the middle of the probe
        expect = np.hypot((j + 0.5 - 60) * mm, p.radius + (i + 0.5) * mm) - p.radius
    assert np.allclose(depth[i, j], expect, atol=g.dz)
    assert set(np.unique(g.scan_convert((ramp > 30).astype(np.uint8), 7))) <= {0, 1, 7}


@pytest.mark.parametrize('probe', ['linear', 'convex'])
def test_a_lines_of_the_image_are_bright_at_twice_the_pleural_depth(probe):
    p = plain(probe=probe, alines=1.0, haze=-12.0, slide=0.5, skin=2.0, fat=4.0, muscle=8.0)
    brighter = []
    for seed in range(4):
        c = phantom_clip(p, seed, 1)
        for x in range(120, 137):  # the middle, where a row of a convex image is a depth
            codes, grey = c.dense[0, :, x], c.frames[0, :, x].astype(float)
            pleura = np.flatnonzero(np.isin(codes, (2, 3)))
            line = np.flatnonzero(codes == 0)
            if not len(pleura) or not len(line):
                continue
            first = line[: np.flatnonzero(np.diff(np.r_[line, 999]) > 1)[0] + 1]  # the uppermost one
            if first[-1] + 8 > 255:
                continue
            assert abs(first.mean() + 0.5 - 2 * (pleura.mean() + 0.5)) <= 2.5, (seed, x)
            beside = np.r_[grey[first[0] - 7 : first[0] - 3], grey[first[-1] + 4 : first[-1] + 8]]
            brighter.append(grey[first].mean() > beside.mean())
    assert len(brighter) >= 20 and np.mean(brighter) > 0.9


def test_b_lines_run_from_the_pleura_to_the_bottom_without_fading():
    from scipy.ndimage import label

    wall = plain('covid', blines=4.0, haze=-25.0, alines=0.0, slide=4.0, tgc=0.0, noise=-95.0)
    ratios, fades = [], []
    for seed in range(4):
        c = phantom_clip(wall, seed, 4)
        for frame, dense in zip(c.frames.astype(float), c.dense):
            parts, k = label(dense == 1)
            for part in range(1, k + 1):
                rows, columns = np.nonzero(parts == part)
                x = int(np.median(columns[rows == rows.min()]))
                rows = np.flatnonzero(dense[:, x] == 1)
                assert rows[-1] == np.flatnonzero(c.fan[0, :, x])[-1], "reaches the bottom of the fan"
                assert dense[rows[0] - 1, x] in (2, 3) and len(rows) == rows[-1] - rows[0] + 1, (
                    "starts at the pleura and has no gap"
                )
                q = len(rows) // 4
                ratios.append(frame[rows[-q:], x].mean() / max(frame[rows[:q], x].mean(), 1))
        field = np.isin(c.dense, (4, 5))
        rows = np.arange(256)[None, :, None]
        fades.append(c.frames[field & (rows > 200)].mean() / c.frames[field & (rows < 130)].mean())
    assert len(ratios) > 20 and np.median(ratios) > 0.85
    assert np.mean(fades) < 0.75, "the field beside them does fade"


def test_b_lines_erase_a_lines():
    p = plain('covid', alines=1.0, haze=-20.0, slide=0.5)
    without = [phantom_clip(p, s, 3) for s in range(4)]
    with_ = [phantom_clip(replace(p, blines=3.0), s, 3) for s in range(4)]
    assert all((c.dense == 0).any() for c in without)
    for c in with_:
        a, b = (c.dense == 0).any(1), (c.dense == 1).sum(1)
        assert (b > 0).any() and not (a & (b > 0.9 * b.max())).any(), (
            "no column that is B-line all the way down holds an A-line"
        )


def test_b_lines_erase_the_a_line_itself_not_only_its_label():
    p = plain('covid', alines=1.0, blines=3.0, slide=0.5)
    checked = 0
    for seed in range(5):
        s = phantom.phantom_scene(p, seed, 1)
        f = phantom._moment(s, 0)
        lines = phantom._a_lines(s, f)
        for ray in f.rays:
            if s.has.alines and 0 <= ray.x <= s.g.nb - 1:
                for a in lines:
                    assert a.amplitude[int(round(ray.x))] < 0.1 * a.amplitude.max()
                checked += 1
    assert checked > 3


def test_b_lines_move_with_the_lung():
    def wander(slide):
        c = phantom_clip(plain('covid', blines=5.0, slide=slide, pulse=0.0, rate=8.0), 1, 16)
        x = [np.flatnonzero((d == 1).any(0)) for d in c.dense]
        return max(len(set(a) ^ set(x[0])) for a in x), c.findings['n_blines']

    assert wander(0.0)[0] == 0 and wander(0.0)[1] >= 1
    assert wander(8.0)[0] > 10


def test_sliding_moves_lung_but_not_wall():
    def change(slide, part):
        c = phantom_clip(plain(slide=slide, pulse=0.0, rate=10.0, noise=-90.0), 1, 12)
        rows = np.flatnonzero((c.dense[0] == 2).any(1))
        zone = slice(0, rows[0] - 8) if part == 'wall' else slice(rows[-1] + 5, rows[-1] + 60)
        return abs(np.diff(c.frames[:, zone].astype(int), axis=0)).mean()

    assert change(6.0, 'lung') > 3 * change(0.0, 'lung')
    assert change(6.0, 'lung') > 1.5 * change(6.0, 'wall')


def test_rib_shadow_is_darker_and_is_background():
    p = plain(ribs=1.0, haze=3.0, slide=1.0)
    for seed in range(3):
        c = phantom_clip(p, seed, 3)
        assert c.findings['ribs']
        last = np.array([np.flatnonzero(r)[-1] if r.any() else -1 for r in c.rib[0].T])
        deep = max(last.max(), np.flatnonzero((c.dense[0] == 2).any(1)).max()) + 6
        zone = c.dense[0, deep : deep + 40]
        behind = (last > 0)[None] & (zone == 6) & (c.fan[0, deep : deep + 40] == 1)
        assert (
            behind.any()
            and c.frames[0, deep : deep + 40][behind].mean()
            < 0.6 * c.frames[0, deep : deep + 40][zone == 4].mean()
        )
        surface = c.frames[0][c.rib[0] == 1]
        assert surface.mean() > 2 * c.frames[0, deep : deep + 40][behind].mean()


def test_effusion_is_black_and_consolidation_is_not():
    black, solid = [], []
    for seed in range(4):
        c = phantom_clip(plain('pneumonia', 'convex', effusion=1.0, lobar=1.0, bronchogram=0.0), seed, 2)
        assert c.findings['effusion'] and c.findings['consolidation']
        open_ = c.dense == 5
        if ((c.effusion == 1) & open_).any():
            black.append(c.frames[(c.effusion == 1) & open_].mean())
        if ((c.consolidation == 1) & open_).any():
            solid.append(c.frames[(c.consolidation == 1) & open_].mean())
    assert np.mean(black) < 0.5 * np.mean(solid)


def test_bronchograms_are_bright_and_dynamic_ones_change():
    p = plain('pneumonia', 'convex', lobar=1.0, bronchogram=1.0, slide=0.0, pulse=0.0, seed=5)
    clips = [phantom_clip(p, s, 12) for s in range(6)]
    assert all(c.findings['bronchogram'] for c in clips)

    def flux(c):
        inside = (c.consolidation == 1).all(0) & (c.dense == 5).all(0)
        return c.frames.astype(float).std(0)[inside].mean()

    dynamic, fixed = [[flux(c) for c in clips if c.findings['dynamic'] == d] for d in (True, False)]
    assert dynamic and fixed and np.mean(dynamic) > np.mean(fixed)


def test_classes_overlap_but_differ():
    found = {
        label: pd.DataFrame(
            [phantom_clip(draw_patient(i, label), 0, 1, (48, 48)).findings for i in range(40)]
        )
        .astype(float)
        .mean()
        for label in CLASSES
    }
    covid, pneumonia, regular = [found[c] for c in CLASSES]
    assert min(covid.n_blines, pneumonia.n_blines) > 3 * regular.n_blines > 0
    assert pneumonia.bronchogram > covid.bronchogram and regular.bronchogram == 0
    assert covid.irregular > regular.irregular and pneumonia.effusion > regular.effusion
    assert regular.n_alines > covid.n_alines > 0


def test_frames_of_a_patient_are_more_alike_than_of_two():
    def signature(p, seed):
        return phantom_clip(p, seed, 2, (64, 64)).frames.reshape(2, 16, 4, 16, 4).mean((0, 2, 4)).ravel()

    same, other, _clip = [], [], []
    people = [draw_patient(i, 'regular', 'convex') for i in range(8)]
    first, second = [[signature(p, s) for p in people] for s in (0, 1)]
    for i in range(8):
        same.append(abs(first[i] - second[i]).mean())
        other += [abs(first[i] - second[j]).mean() for j in range(8) if j != i]
    assert np.mean(same) < 0.75 * np.mean(other)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(patient='healthy'), "unknown label 'healthy'"),
        (dict(n=0), 'n must be'),
        (dict(n=2.5), 'n must be'),
        (dict(seed=-1), 'seed must be'),
        (dict(size=64), r'\(height, width\)'),
        (dict(size=(64, 16)), 'at least 32'),
        (dict(size=(64, 64, 3)), r'\(height, width\)'),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        phantom_clip(**{**dict(n=1, size=(32, 32)), **change})


def test_wrong_patients_and_videos_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown probe 'phased'"):
        draw_patient(0, probe='phased')
    with pytest.raises(ValueError, match='seed must be'):
        draw_patient(0.5)
    with pytest.raises(ValueError, match='patients must be'):
        phantom_dataset(tmp_path, patients=0)
    with pytest.raises(ValueError, match='labels must hold one of'):
        phantom_dataset(tmp_path, labels=())
    with pytest.raises(ValueError, match="unknown label 'asthma'"):
        phantom_dataset(tmp_path, labels=('covid', 'asthma'))
    for bad in (np.zeros((2, 8, 8)), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match='uint8'):
            write_video(tmp_path / 'x.mp4', bad, 10)
    for rate in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='rate'):
            write_video(tmp_path / 'x.mp4', np.zeros((1, 8, 8), np.uint8), rate)


@pytest.mark.parametrize('size', [(33, 47), (64, 64)])
def test_video_round_trip(tmp_path, size):
    x = np.random.default_rng(0).integers(0, 256, (5, *size)).astype(np.uint8)
    write_video(tmp_path / 'x.mkv', x, 7.5, lossless=True)
    assert (read(tmp_path / 'x.mkv') == x).all()
    smooth = np.clip(np.linspace(-20, 280, size[0])[None, :, None] + np.zeros((5, *size)), 0, 255).astype(
        np.uint8
    )
    write_video(tmp_path / 'x.mp4', smooth, 30)
    y = read(tmp_path / 'x.mp4')
    assert y.shape == smooth.shape and abs(y.astype(int) - smooth).mean() < 1.5, (
        "the full range of greys survives"
    )


SMALL = dict(patients=4, clips=2, n=2, size=(48, 64), seed=3)


def files(root):
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in sorted(root.rglob('*')) if f.is_file()}


def test_dataset_table_and_masks(tmp_path):
    t = phantom_dataset(tmp_path, **SMALL)
    check_table(t)
    assert len(t) == 8 and t.patient.nunique() == 4 and t.groupby('patient').label.nunique().max() == 1
    per_class = t.drop_duplicates('patient').label.value_counts()
    assert set(per_class.index) == set(CLASSES) and per_class.max() - per_class.min() <= 1
    pd.testing.assert_frame_equal(t, read_table(tmp_path / 'clips.csv'))
    assert not any(str(tmp_path) in line for line in (tmp_path / 'clips.csv').read_text().splitlines()), (
        "paths in the file are relative"
    )
    for row in t.itertuples():
        dense, bits, grey = read(row.mask), read(row.findings), read(row.path)
        assert dense.shape == bits.shape == grey.shape == (2, 48, 64) and dense.max() <= 6 and bits.max() < 16
        assert (
            bool((bits & 2).any()) == row.consolidation
            and bool((bits & 4).any()) == row.effusion
            and bool((bits & 1).any()) == row.ribs
        )


def test_dataset_resumes_after_a_kill_and_is_left_alone_when_whole(tmp_path, monkeypatch):
    phantom_dataset(tmp_path / 'whole', **SMALL)
    real, calls = phantom.write_video, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(phantom, 'write_video', dies)
    with pytest.raises(KeyboardInterrupt):
        phantom_dataset(tmp_path / 'broken', workers=1, **SMALL)
    monkeypatch.setattr(phantom, 'write_video', real)
    assert not (tmp_path / 'broken' / 'clips.csv').exists() and not list(
        (tmp_path / 'broken').rglob('*.tmp*')
    )
    done = {f: f.stat().st_mtime_ns for f in (tmp_path / 'broken' / 'clips').iterdir()}
    phantom_dataset(tmp_path / 'broken', **SMALL)
    assert files(tmp_path / 'broken') == files(tmp_path / 'whole')
    assert done and sum(f.stat().st_mtime_ns == t for f, t in done.items()) >= 2, (
        "finished clips are not made again"
    )

    def never(*args, **kwargs):
        raise AssertionError('simulated again')

    monkeypatch.setattr(phantom, 'phantom_clip', never)
    pd.testing.assert_frame_equal(
        phantom_dataset(tmp_path / 'whole', **SMALL), read_table(tmp_path / 'whole' / 'clips.csv')
    )
    with pytest.raises(ValueError, match='choose another folder'):
        phantom_dataset(tmp_path / 'whole', **{**SMALL, 'n': 3})


def test_a_lost_file_is_made_again(tmp_path):
    t = phantom_dataset(tmp_path, **SMALL)
    before = files(tmp_path)
    for path in (t['mask'][1], t['path'][5]):
        Path(path).unlink()
    phantom_dataset(tmp_path, **SMALL)
    assert files(tmp_path) == before


def test_the_encoder_gives_the_same_bytes_in_each_run(tmp_path):
    "x264 with its macroblock tree did not, on some processors: clips differed by up to 17 grey levels."
    runs = []
    for k in range(3):
        table = phantom_dataset(
            tmp_path / str(k), patients=4, clips=1, size=(64, 64), seed=1, probe='convex', workers=1 + k % 2
        )
        runs.append([Path(p).read_bytes() for p in table['path']])
    assert runs[0] == runs[1] == runs[2]
