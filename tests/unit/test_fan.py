"Preprocess: fans of phantom truth and of real clips, crop, polar and back, writing removed."

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.data.fan import (
    Fan,
    FanError,
    add_fans,
    add_overlays,
    crop_to_fan,
    fan_crop,
    find_fan,
    find_overlays,
    from_polar,
    remove_overlays,
    to_polar,
)
from lus_fastai.synth.phantom import draw_patient, phantom_clip
from lus_fastai.video import sample_clip


def overlap(fan, truth):
    return (fan.mask() & truth).sum() / (fan.mask() | truth).sum()


fans = st.one_of(
    st.builds(
        lambda n, f, a, b, x, y, s: Fan('convex', (60, 80), n, n + f, -a, b, x, -y, s),
        st.floats(5, 30),
        st.floats(20, 60),
        st.floats(10, 50),
        st.floats(10, 50),
        st.floats(20, 60),
        st.floats(0, 20),
        st.floats(0.7, 1.3),
    ),
    st.builds(
        lambda n, f, l, w, s: Fan('linear', (60, 80), n, n + f, l, l + w, flare=s),
        st.floats(0, 20),
        st.floats(10, 60),
        st.floats(0, 30),
        st.floats(10, 70),
        st.floats(-4, 10),
    ),
)


@settings(max_examples=30, deadline=None)
@given(fans)
def test_coordinates_and_pixels_are_inverse(fan):
    d, b = np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 7), indexing='ij')
    back = fan.coordinates(*fan.pixels(d, b))
    np.testing.assert_allclose(back[0], d, atol=1e-7)
    np.testing.assert_allclose(back[1], b, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(fans)
def test_fans_survive_json_resize_and_crop(fan):
    assert Fan.from_dict(json.loads(json.dumps(fan.to_dict()))) == fan
    np.testing.assert_allclose(
        np.array(fan.resize((120, 40)).resize((60, 80)).pixels(0.3, 0.7)), np.array(fan.pixels(0.3, 0.7))
    )
    t, b, l, r = fan.box()
    assert (
        fan.cropped().mask() == fan.mask()[t:b, l:r]
    ).all() and fan.mask().sum() == fan.cropped().mask().sum()


@pytest.mark.parametrize('probe', ['convex', 'linear'])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_fan_of_the_phantom(probe, seed):
    clip = phantom_clip(draw_patient(seed, None, probe), seed, n=4, size=(112, 128))
    truth = clip.fan[0] > 0
    for x in (clip.frames, clip.frames[0], add_overlays(clip.frames, seed)[0]):
        fan = find_fan(x)
        assert fan.kind == probe and fan.size == (112, 128)
        assert overlap(fan, truth) >= 0.96
    assert find_fan(clip.frames) == find_fan(
        torch.tensor(clip.frames)
    )  # deterministic, and tensors are frames too


@pytest.mark.parametrize(
    'seed', [36, 37, 1005, 1139, 2197, 2037, 2171, 2257, 2278]
)  # dark sides, of the machine whose darkest grey is black
def test_fans_with_a_dark_side(seed):
    clip = phantom_clip(
        draw_patient(seed, None, 'linear' if seed % 3 == 2 else 'convex'),
        seed,
        6,
        ((128, 128), (256, 256), (180, 240))[seed // 3 % 3],
    )
    assert overlap(find_fan(clip.frames), clip.fan[0] > 0) >= 0.97


def test_a_sector_off_centre_cut_by_the_border():
    truth = Fan('convex', (150, 140), near=40, far=150, left=-35, right=35, x=40.0, y=-20.0)
    frame = np.where(truth.mask(), np.random.default_rng(0).integers(30, 200, (150, 140)), 0).astype(np.uint8)
    fan = find_fan(frame)
    assert overlap(fan, truth.mask()) > 0.98 and abs(fan.x - 40) < 3 and abs(fan.right - 35) < 2


def test_no_fan():
    for x in (
        np.zeros((3, 64, 64), np.uint8),
        np.full((64, 64), 200, np.uint8),
        np.full((64, 64), 5, np.uint8) + np.eye(64, dtype=np.uint8),
    ):
        with pytest.raises(FanError, match='single colour'):
            find_fan(x)
    with pytest.raises(ValueError, match='uint8'):
        find_fan(np.zeros((2, 64, 64), np.float32))
    with pytest.raises(ValueError, match='not empty'):
        find_fan(np.zeros((0, 64, 64), np.uint8))
    assert issubclass(FanError, ValueError)


def test_table(phantom_table, tmp_path):
    from PIL import Image

    Image.new('L', (64, 64), 80).save(tmp_path / 'grey.png')
    table = pd.concat(
        [
            phantom_table.iloc[:3],
            phantom_table.iloc[:1].assign(path=str(tmp_path / 'grey.png'), kind='image', mask=np.nan),
        ],
        ignore_index=True,
    )
    with pytest.warns(UserWarning, match=r'no fan in 1 of 4 clips.*grey\.png: every pixel is 80'):
        fans = add_fans(table)
    assert 'fan' not in table and fans['fan'].map(bool).tolist() == [True, True, True, False]
    assert Fan.from_dict(json.loads(fans['fan'][0])).size == (96, 96)
    fans.to_csv(tmp_path / 'fans.csv', index=False)
    again = pd.read_csv(tmp_path / 'fans.csv')  # the empty entry is NaN now
    x = np.full((2, 96, 96), 9, np.uint8)
    assert fan_crop(x, again.iloc[3]) is x
    cut = fan_crop(x, again.iloc[0], outside=6)
    assert set(np.unique(cut)) <= {6, 9} and (fan_crop(x, again.iloc[0]) == np.where(cut == 6, 0, cut)).all()
    with pytest.raises(FanError, match="column 'fan' of a.mp4"):
        fan_crop(x, dict(path='a.mp4', fan='{}'))


@pytest.mark.parametrize(
    'fan',
    [
        Fan('convex', (90, 120), 15, 95, -40, 35, 58.0, -8.0, 1.1),
        Fan('linear', (90, 120), 5, 85, 12, 100, flare=6),
    ],
    ids=['convex', 'linear'],
)
def test_polar_and_back(fan):
    rows, cols = np.mgrid[:90, :120]
    smooth = (np.sin(rows / 9) + np.cos(cols / 11)).astype(np.float32)
    codes = ((rows // 12 + cols // 15) % 7).astype(np.uint8)
    inside = fan.mask()
    core = inside & (fan.coordinates(cols + 0.5, rows + 0.5)[0] > 0.03)
    maps = from_polar(to_polar(torch.tensor(smooth)[None, None], fan), fan)
    assert (
        maps.shape == (1, 1, 90, 120)
        and maps.dtype == torch.float32
        and not maps[0, 0][~torch.tensor(inside)].any()
    )
    assert abs(maps[0, 0].numpy() - smooth)[core].max() < 0.1  # signed maps come back, sign and all
    back = from_polar(to_polar(codes, fan, nearest=True), fan, nearest=True)
    assert back.dtype == np.uint8 and (back != codes)[inside].mean() < 0.03 and not back[~inside].any()
    assert set(np.unique(to_polar(codes, fan, (33, 47), nearest=True))) <= set(range(7))
    small = to_polar(smooth, fan, (30, 40))
    assert small.shape == (30, 40) and from_polar(small, fan.resize((45, 60))).shape == (45, 60)


def test_a_beam_is_a_column():
    fan = Fan('convex', (100, 100), 20, 110, -30, 30, 50.0, -15.0)
    depth, beam = fan.coordinates(np.arange(100) + 0.5, np.arange(100)[:, None] + 0.5)
    ray = (abs(beam - 0.8) < 0.03).astype(np.float32)
    polar = to_polar(ray, fan, (50, 60))
    assert (polar.argmax(1)[2:-6] == polar.argmax(1)[10]).mean() > 0.9 or np.ptp(polar.argmax(1)[2:-6]) <= 3
    assert abs(polar[5:40].sum(0).argmax() - 0.8 * 60) <= 2


@pytest.mark.parametrize('probe', ['convex', 'linear'])
def test_writing_is_removed_and_nothing_else(probe):
    clip = phantom_clip(draw_patient(7, None, probe), 7, n=5, size=(160, 160))
    x, ink = add_overlays(clip.frames, 5)
    ink &= x[0] > clip.frames[0] + 40.0
    where, fixed = find_overlays(x), remove_overlays(x)
    assert (fixed[:, ~where] == x[:, ~where]).all()

    def error(z):
        return abs(z[:, ink].astype(float) - clip.frames[:, ink]).mean()

    assert error(fixed) < 0.5 * error(x) and find_overlays(clip.frames).mean() < 0.04
    assert (x == add_overlays(clip.frames, 5)[0]).all()  # the input is not written to


def test_what_is_outside_the_fan_is_writing():
    fan = Fan('linear', (100, 100), 0, 100, 0, 70)
    x = np.zeros((100, 100), np.uint8)
    x[:, :70] = np.random.default_rng(1).integers(40, 120, (100, 70))
    x[20:50, 80:95] = 180  # a block: no stroke, but outside
    assert find_overlays(x, fan)[20:50, 80:95].all() and not find_overlays(x, fan)[:, :70].any()
    assert remove_overlays(x, fan)[:, 78:].max() < 60
    with pytest.raises(FanError, match='use fan.resize'):
        find_overlays(x[1:], fan)


def test_crop_of_tensors_and_stacks():
    fan = Fan('linear', (20, 30), 2, 12, 5, 25)
    x = torch.arange(1200.0).reshape(2, 1, 20, 30)
    assert (
        torch.equal(crop_to_fan(x, fan), x[:, :, 2:12, 5:25])
        and (crop_to_fan(x.numpy(), fan) == x[:, :, 2:12, 5:25].numpy()).all()
    )
    with pytest.raises(FanError, match='is outside its image'):
        Fan('linear', (20, 30), 40, 50, 5, 25).box()


def test_module_is_light():
    heavy = ('fastai', 'torchvision', 'matplotlib', 'skimage', 'scipy')
    code = f"import sys, lus_fastai.data.fan; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_real_clips(real_data):
    files = (
        sorted(real_data.glob('pocus/pocus_videos/convex/*'))[::30]
        + sorted(real_data.glob('pocus/pocus_videos/linear/*'))[:1]
        + sorted(real_data.glob('blues/lus_videos/*'))[:1]
    )
    assert files
    for path in files:
        frames = sample_clip(path, rate=3, max_frames=6).frames
        fan = find_fan(frames)
        inside, most = fan.mask(), frames.max(0).astype(float)
        assert fan.size == frames.shape[1:] and 0.3 < inside.mean() <= 1 and 0.5 < fan.aspect < 2
        if (~inside).mean() > 0.05:
            assert most[inside].mean() > 2 * most[~inside].mean()


def test_store_cut_to_the_fan_fills_frames_with_black_and_masks_with_background(phantom_table, tmp_path):
    from lus_fastai.core import DENSE
    from lus_fastai.data.store import FrameStore

    table = add_fans(phantom_table[phantom_table.probe == 'convex'].head(2), workers=1)
    whole = FrameStore.build(table, tmp_path / 'whole', size=(96, 96), max_frames=2, workers=0)
    cut = FrameStore.build(table, tmp_path / 'cut', size=(96, 96), max_frames=2, workers=0, prepare=fan_crop)
    for i, row in cut.frames.iterrows():
        fan = Fan.from_dict(json.loads(row['fan'])).cropped().resize((96, 96))
        far = ~ndi.binary_dilation(fan.mask(), iterations=2)
        assert far.any() and (cut.images[i][far] == 0).all() and (cut.masks[i][far] == len(DENSE) - 1).all()
        assert cut.images[i].mean() >= whole.images[i].mean() * 0.9 and set(np.unique(cut.masks[i])) <= set(
            np.unique(whole.masks[i])
        )
