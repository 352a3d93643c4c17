"Faults and properties of M-mode and of the detector of sliding, and how the phantom's lungs move."

from dataclasses import replace

import numpy as np
import pytest

from lus_fastai.core import CLASSES
from lus_fastai.data.fan import Fan
from lus_fastai.synth.motion import (
    SLIDING_KINDS,
    clip_fan,
    clip_times,
    lateral_motion,
    lateral_positions,
    m_mode,
    order_score,
    sliding_aucs,
    sliding_score,
    sliding_table,
    stored_sliding,
)
from lus_fastai.synth.phantom import PHANTOM_LABELS, draw_patient, phantom_clip, phantom_dataset
from lus_fastai.video import Clip, read_clip, write_video

BOX = Fan('linear', (128, 128), 0, 128, 0, 128)


def read(frames, rate=10.0):
    n = len(frames)
    return Clip(frames, np.arange(n) / rate, np.arange(n), 'clip.mp4')


def texture(rng, rows, wide, grain=2.5):
    from scipy.ndimage import gaussian_filter1d

    x = gaussian_filter1d(rng.standard_normal((rows, wide)), grain, axis=1, mode='wrap')
    return 40 * x / x.std()


def moved(x, shift):
    "Rows of a periodic texture moved sideways by any number of columns."
    wave = np.exp(-2j * np.pi * np.arange(x.shape[1] // 2 + 1) / x.shape[1] * shift)
    return np.fft.irfft(np.fft.rfft(x) * wave, x.shape[1])


def sliding_clip(shift, noise=0.0, seed=0):
    "A still wall above a bright line at row 40; a texture below it that moves sideways."
    rng = np.random.default_rng(seed)
    wall, lung, line = texture(rng, 40, 128), texture(rng, 84, 128), np.full((4, 128), 250.0)
    frames = [np.concatenate([110 + wall, line, 70 + moved(lung, s)]) for s in shift]
    frames = np.stack(frames) + noise * rng.standard_normal((len(shift), 128, 128))
    return read(np.clip(frames, 0, 255).astype(np.uint8))


BREATH = 4 * np.sin(np.arange(40) / 5)  # columns


def test_m_mode_is_a_column_of_a_box():
    frames = np.random.default_rng(0).integers(0, 255, (7, 128, 128), dtype=np.uint8)
    m = m_mode(read(frames, 30), 0.25, BOX)
    np.testing.assert_array_equal(m.image, frames[:, :, 32].T)
    assert m.depth is None and m.beam == 0.25
    np.testing.assert_allclose(m.times, np.arange(7) / 30)
    assert m_mode(read(frames), 0, BOX).image[5, 3] == frames[3, 5, 0]
    assert m_mode(read(frames), 1, BOX).image[5, 3] == frames[3, 5, 127]


def test_m_mode_of_a_convex_phantom_runs_along_its_beam():
    clip = phantom_clip(draw_patient(1, 'regular', 'convex'), n=3, size=(96, 96))
    m = m_mode(clip, 0.5)
    assert m.depth == clip.patient.depth and m.image.dtype == np.uint8
    middle = clip.frames[0][:, 47:49].mean(1)
    top = np.flatnonzero(clip.fan[0][:, 48])[0]
    column = np.interp(np.linspace(0, 1, 96 - top), np.linspace(0, 1, len(m.image)), m.image[:, 0])
    assert np.corrcoef(column, middle[top:])[0, 1] > 0.97


@pytest.mark.parametrize('beam', [-0.01, 1.01, float('nan'), None, '0.5', True])
def test_a_beam_that_is_none(beam):
    with pytest.raises(ValueError, match='beam must be a number from 0'):
        m_mode(read(np.zeros((3, 128, 128), np.uint8)), beam, BOX)


def test_clips_that_are_none():
    frames = np.zeros((3, 64, 64), np.uint8)
    for wrong in (frames, None, read(frames[0]), read(frames.astype(float))):
        with pytest.raises(ValueError, match='clip must have frames'):
            m_mode(wrong, 0.5, BOX)
    with pytest.raises(ValueError, match='time for each'):
        clip_times(Clip(frames, np.array([0, 0.1]), np.arange(3), 'x.mp4'))
    with pytest.raises(ValueError, match='differ|resize'):
        m_mode(read(frames), 0.5, BOX)  # the fan of another size
    for n, rate in ((11, 2.0), (30, 30.0), (1, 10.0)):
        with pytest.raises(ValueError, match='at least 12 frames'):
            lateral_motion(read(np.zeros((n, 128, 128), np.uint8), rate), BOX)


def test_m_mode_shows_its_axes():
    import matplotlib.pyplot as plt

    clip = phantom_clip(draw_patient(1, 'regular', 'linear'), n=3, size=(64, 64))
    ax = m_mode(clip).show(title='here')
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ('time (s)', 'depth (mm)', 'here')
    assert ax.get_ylim()[0] == clip.patient.depth
    plt.close('all')
    ax = m_mode(read(clip.frames), 0.5, clip_fan(clip)).show()
    assert ax.get_ylabel() == 'share of the depth'
    plt.close('all')


def test_a_known_motion_is_found_to_a_fraction_of_a_column():
    motion = lateral_motion(sliding_clip(BREATH, noise=4), BOX)
    true = 100 / 128 * (BREATH - BREATH.mean())
    assert abs(motion.wall).max() < 0.1
    assert np.corrcoef(motion.sliding, true)[0, 1] > 0.995
    assert 1 < np.polyfit(true, motion.sliding, 1)[0] < 1.3  # the subtraction of clutter exaggerates
    assert motion.rate == pytest.approx(10)
    rows = np.stack([moved(texture(np.random.default_rng(2), 20, 160), k) for k in BREATH])
    assert abs(lateral_positions(rows) - (BREATH - BREATH.mean())).max() < 0.2


def test_lung_that_moves_with_its_wall_does_not_slide():
    x = sliding_clip(np.zeros(40), noise=4).frames
    together = np.stack([np.roll(f, k, 1) for f, k in zip(x, np.round(BREATH).astype(int))])
    motion = lateral_motion(read(together), BOX)
    assert np.ptp(motion.wall) > 4 and motion.sliding.std() < 0.2
    assert sliding_score(read(together), BOX) < 0.1 < sliding_score(sliding_clip(BREATH, 4), BOX)


def test_positions_do_not_depend_on_the_order_of_frames():
    rng = np.random.default_rng(1)
    x = np.stack([moved(texture(np.random.default_rng(2), 20, 160), s) for s in BREATH])
    x += 10 * rng.standard_normal(x.shape)
    order = rng.permutation(40)
    np.testing.assert_allclose(lateral_positions(x[order]), lateral_positions(x)[order], atol=1e-5)


def test_shuffled_frames_have_uniform_p():
    rng = np.random.default_rng(4)
    results = [order_score(rng.permutation(BREATH), 10, seed=k) for k in range(400)]
    p = np.array([p for _, p in results])
    assert abs(p.mean() - 0.5) < 0.05 and 0.02 < (p <= 0.05).mean() < 0.09
    assert 0.43 < np.mean([score > 0 for score, _ in results]) < 0.57
    assert order_score(BREATH, 10)[1] == 1 / 201


def test_one_frame_over_and_over_scores_nothing():
    clip = phantom_clip(draw_patient(3, 'regular', 'linear'), n=24, size=(96, 96))
    assert sliding_score(clip) != 0
    assert abs(sliding_score(replace(clip, frames=np.repeat(clip.frames[:1], 24, 0)))) < 1e-6


def test_a_file_gives_the_score_of_its_phantom(tmp_path):
    clip = phantom_clip(replace(draw_patient(3, 'regular', 'linear'), ribs=0), n=30, size=(128, 128))
    write_video(tmp_path / 'clip.mkv', clip.frames, clip.rate, lossless=True)
    again = read_clip(tmp_path / 'clip.mkv')
    fan = clip_fan(clip)
    assert sliding_score(again, fan) == pytest.approx(sliding_score(clip), rel=0.02)


def strip(clip, low, high, beams):
    "Frames of a linear clip in a window: mm below the pleura, share of the width."
    p, (h, w) = clip.patient, clip.frames.shape[1:]
    rows = slice(int((p.pleura + low) / p.depth * h), int((p.pleura + high) / p.depth * h))
    return clip.frames[:, rows, int(beams[0] * w) : int(beams[1] * w)].astype(float)


STILL = dict(ribs=0, persistence=0, smoothing=0.2, rate=30, haze=5, alines=0.6, slide=8, breath=3.0)


def test_at_a_lung_point_one_side_slides():
    air = replace(draw_patient(3, 'pneumothorax', 'linear'), **STILL, lung_point=1)
    clip = phantom_clip(air, seed=1, n=60, size=(128, 128))
    assert clip.findings['lung_point'] and clip.findings['sliding'] == 0
    left, right = (abs(np.diff(strip(clip, 2, 10, b), axis=0)).mean() for b in ((0.05, 0.25), (0.8, 0.95)))
    assert max(left, right) > 2 * min(left, right)
    closed = phantom_clip(replace(air, lung_point=0), seed=1, n=60, size=(128, 128))
    still = [abs(np.diff(strip(closed, 2, 10, b), axis=0)).mean() for b in ((0.05, 0.25), (0.8, 0.95))]
    assert not closed.findings['lung_point'] and max(still) < 2 * min(still)


@pytest.mark.parametrize('probe', ['convex', 'linear'])
def test_a_pneumothorax_has_no_b_lines_and_its_lung_moves_with_its_wall(probe):
    for seed in range(4):
        p = replace(draw_patient(seed, 'pneumothorax', probe), lung_point=0)
        clip = phantom_clip(p, seed, n=8, size=(64, 64))
        assert clip.findings['n_blines'] == 0 and not (clip.dense == 1).any()
    p = replace(p, ribs=0, persistence=0)
    still = lateral_motion(phantom_clip(p, n=36, size=(128, 128))).sliding.std()
    slides = replace(p, sliding=1.0, beat=0.25, slide=6.0)
    assert lateral_motion(phantom_clip(slides, n=36, size=(128, 128))).sliding.std() > 3 * still


def test_columns_of_tables(tmp_path):
    three = phantom_dataset(tmp_path / 'three', 3, 1, n=2, size=(48, 48))
    five = phantom_dataset(tmp_path / 'five', 5, 1, n=2, size=(48, 48), labels=PHANTOM_LABELS)
    assert set(three['label']) == set(CLASSES) and set(five['label']) == set(PHANTOM_LABELS)
    assert list(three.columns) == [c for c in five.columns if c not in ('sliding', 'lung_point')]
    sliding = five.set_index('label')['sliding']
    assert sliding['pneumothorax'] == 0 < sliding['weak sliding'] < sliding['regular'] == 1


def test_the_table_of_scores_is_what_its_arguments_say():
    kinds = ('regular', 'pneumothorax', 'held')
    small = dict(n=24, size=(96, 96))
    t = sliding_table(2, kinds, **small)
    assert t['kind'].value_counts().to_dict() == dict.fromkeys(kinds, 2)
    assert t['patient'].is_unique and set(t['probe']) == {'convex', 'linear'}
    np.testing.assert_allclose(t['score'][:2], sliding_table(2, kinds[:1], **small)['score'])
    areas = sliding_aucs(t, sliding_table(2, kinds, first=0, **small), n_boot=20)
    assert list(areas['frames'].unique()) == ['in order', 'shuffled', 'still']
    pairs = set(zip(areas['sliding'], areas['none']))
    assert pairs == {('regular', 'pneumothorax'), ('all', 'pneumothorax'), ('regular', 'held')}
    with pytest.raises(ValueError, match='fitted must be other patients'):
        sliding_aucs(t, t)


def test_the_stored_areas_are_those_that_are_asked_for():
    stored = stored_sliding()
    assert stored['made']['kinds'] == list(SLIDING_KINDS) and stored['made']['patients'] >= 30
    found = {(a['sliding'], a['none'], a['frames']): a['auc'] for a in stored['areas']}
    assert found['regular', 'pneumothorax', 'in order'] >= 0.95
    assert all(0.35 < x < 0.65 for (_, _, frames), x in found.items() if frames == 'shuffled')


def test_a_convex_file_is_read_without_being_given_its_fan(tmp_path):
    clip = phantom_clip(replace(draw_patient(1, 'regular', 'convex'), ribs=0), n=20, size=(160, 160))
    write_video(tmp_path / 'clip.mkv', clip.frames, clip.rate, lossless=True)
    m = m_mode(read_clip(tmp_path / 'clip.mkv'), 0.5)
    known = m_mode(clip, 0.5)
    assert m.depth is None and m.image.shape[1] == 20
    rows = np.linspace(0, 1, 60)
    a, b = (np.interp(rows, np.linspace(0, 1, len(x.image)), x.image.mean(1)) for x in (m, known))
    assert np.corrcoef(a, b)[0, 1] > 0.9
    assert abs(m.times[-1] - known.times[-1]) < 0.01


def test_the_lung_pulse_has_the_rate_of_the_heart():
    still = dict(STILL, sliding=0, beat=0.4)
    p = replace(draw_patient(5, 'regular', 'linear'), **still, pulse=1.3)
    motion = lateral_motion(phantom_clip(p, n=150, size=(128, 128)))
    power = abs(np.fft.rfft(motion.sliding * np.hanning(150)))
    hertz = np.fft.rfftfreq(150, 1 / 30)
    assert abs(hertz[1 + power[1:].argmax()] - 1.3) <= hertz[1]
