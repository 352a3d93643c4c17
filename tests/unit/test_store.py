"Clips and the frame store: formats, times, bad files, and builds that crash, run twice or fill the disk."

import errno
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lus_fastai.core import TableError
from lus_fastai.data import store as clips
from lus_fastai.data.store import FrameStore
from lus_fastai.runs import function_key
from lus_fastai.video import Clip, ClipError, frame_times, read_clip, sample_clip, sample_times, write_video

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != 'linux', reason='needs Linux')


def blobs(n=12, h=48, w=64, seed=0):
    "Smooth moving frames, every one different: (n, h, w) uint8."
    y, x = np.mgrid[:h, :w]
    k = np.arange(n)[:, None, None]
    return (127 + 90 * np.sin(x / 9 + k / 3 + seed) * np.cos(y / 7 - k / 5)).round().astype(np.uint8)


def encode(path, frames, codec, pix_fmt, rate=15, stamps=None, full=False, options=None, **box):
    "Any codec in any container; `stamps` are milliseconds."
    with av.open(str(path), 'w', **box) as out:
        s = out.add_stream(codec, rate=Fraction(rate), options=options or {})
        s.height, s.width, s.pix_fmt = *frames.shape[1:3], pix_fmt
        if stamps is not None:
            s.codec_context.time_base = s.time_base = Fraction(1, 1000)
        if full:
            s.codec_context.color_range = 2
        for k, x in enumerate(frames):
            f = av.VideoFrame.from_ndarray(x, format='gray' if x.ndim == 2 else 'rgb24')
            if full:
                f.color_range = 2
            f = f.reformat(format=pix_fmt, dst_color_range=2 if full else None, threads=1)
            if stamps is not None:
                f.pts, f.time_base = int(stamps[k]), Fraction(1, 1000)
            out.mux(s.encode(f))
        out.mux(s.encode())


def near(a, b, tolerance):
    return np.abs(a.astype(int) - b.astype(int)).mean() < tolerance


# ---- times and sampling ----


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e4, 1e4)), max_size=40), st.one_of(st.none(), st.floats(1, 100))
)
@settings(max_examples=150, deadline=None)
def test_times_always_increase(stamps, rate):
    t = list(frame_times(stamps, rate))
    assert len(t) == len(stamps) and t[:1] == [0.0][: len(t)] and all(b >= a for a, b in zip(t, t[1:]))
    nominal = 1 / (rate or 25)
    for k in range(1, len(t)):
        a, b = stamps[k - 1], stamps[k]
        assert t[k] - t[k - 1] == pytest.approx(b - a if None not in (a, b) and b > a else nominal, abs=1e-6)


def test_good_stamps_are_kept_as_they_are():
    stamps = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 300)) + 0.54
    np.testing.assert_allclose(list(frame_times(stamps, 7)), stamps - 0.54 - (stamps[0] - 0.54), atol=1e-9)


@given(st.lists(st.floats(0.002, 1.5), max_size=80), st.sampled_from([0.5, 1, 3, 7.5]))
@settings(max_examples=150, deadline=None)
def test_sampling_is_the_first_frame_of_each_grid_cell(steps, rate):
    t = np.cumsum([0, *steps])
    grid = (t + 0.001) * rate
    t = t[np.abs(grid - grid.round()) > 1e-6]  # away from the edges of float arithmetic
    if not len(t):
        return
    cells = pd.Series(np.floor((t + 0.001) * rate))
    wanted = cells.drop_duplicates().index.tolist()
    if cells[0] >= 0:
        assert sample_times(t, rate, 1000) == wanted
    assert sample_times(t, rate, 5) == wanted[:5]


@pytest.mark.parametrize('fps', [3, 6, 9, 15, 18, 24, 30, 45, 60, 120])
def test_sampling_is_pocovids_where_3_divides_the_rate(fps):
    assert sample_times(np.arange(1500) / fps) == list(range(0, 1500, int(fps / 3)))[:30]


@pytest.mark.parametrize('fps', [3, 30])
def test_sampling_a_file_is_pocovids(tmp_path, fps):
    write_video(tmp_path / 'a.mp4', blobs(4 * fps + 1), fps)
    s = sample_clip(tmp_path / 'a.mp4', max_frames=9)
    assert s.index.tolist() == list(range(0, 4 * fps + 1, fps // 3))[:9]
    np.testing.assert_allclose(s.times, np.arange(9) / 3, atol=1e-4)


@pytest.mark.parametrize('fps', [0.5, 1, 2, 2.5])
def test_slow_clips_keep_every_frame(tmp_path, fps):
    write_video(tmp_path / 'a.mkv', blobs(5), fps, lossless=True)
    assert sample_clip(tmp_path / 'a.mkv').index.tolist() == [0, 1, 2, 3, 4]


def test_a_clip_shorter_than_a_step_keeps_its_first_frame(tmp_path):
    write_video(tmp_path / 'a.mp4', blobs(6), 30)
    s = sample_clip(tmp_path / 'a.mp4')
    assert s.index.tolist() == [0] and s.times.tolist() == [0]


def test_variable_rate(tmp_path):
    ms = np.r_[0, 40, 80, 500, 540, 1400, 1440, 1480, 1700, 2500]
    encode(tmp_path / 'a.mkv', blobs(10), 'ffv1', 'gray', stamps=ms + 700)
    c, s = read_clip(tmp_path / 'a.mkv'), sample_clip(tmp_path / 'a.mkv')
    np.testing.assert_allclose(c.times, ms / 1000, atol=0.0011)
    assert s.index.tolist() == [0, 3, 5, 8, 9]  # cells 0, 1, 4, 5, 7 of a third of a second
    np.testing.assert_array_equal(s.frames, blobs(10)[s.index])


def test_sampling_stops_decoding_where_it_is_done(tmp_path):
    encode(
        tmp_path / 'whole.mp4',
        blobs(120),
        'libx264',
        'yuv420p',
        rate=30,
        options=dict(g='10', bf='0'),
        container_options=dict(movflags='faststart'),
    )
    b = (tmp_path / 'whole.mp4').read_bytes()
    (tmp_path / 'blotted.mp4').write_bytes(b[: len(b) * 3 // 4] + bytes(len(b) - len(b) * 3 // 4))
    with pytest.raises(ClipError, match='damaged'):
        read_clip(tmp_path / 'blotted.mp4')
    np.testing.assert_array_equal(
        sample_clip(tmp_path / 'blotted.mp4', max_frames=3).frames,
        sample_clip(tmp_path / 'whole.mp4', max_frames=3).frames,
    )


@pytest.mark.parametrize(
    'bad, name',
    [
        (dict(rate=0), 'rate'),
        (dict(rate=float('nan')), 'rate'),
        (dict(rate=-3), 'rate'),
        (dict(max_frames=0), 'max_frames'),
        (dict(max_frames=1.5), 'max_frames'),
        (dict(size=(0, 5)), 'size'),
        (dict(size=(5,)), 'size'),
        (dict(size=5), 'size'),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, bad, name):
    with pytest.raises(ValueError, match=name):
        sample_clip(tmp_path / 'a.mp4', **bad)


def test_sampled_frames_are_the_clips_own_resized(tmp_path):
    write_video(tmp_path / 'a.mp4', blobs(40), 10)
    c, s, small = (
        read_clip(tmp_path / 'a.mp4'),
        sample_clip(tmp_path / 'a.mp4'),
        sample_clip(tmp_path / 'a.mp4', size=(20, 30)),
    )
    np.testing.assert_array_equal(s.frames, c.frames[s.index])
    for x, y in zip(s.frames, small.frames):
        np.testing.assert_array_equal(np.asarray(Image.fromarray(x).resize((30, 20), Image.BILINEAR)), y)


# ---- formats ----


@pytest.mark.parametrize(
    'name, codec, pix_fmt',
    [
        ('a.mp4', 'libx264', 'yuv420p'),
        ('a.mov', 'libx264', 'yuv444p'),
        ('a.avi', 'mpeg4', 'yuv420p'),
        ('a.mpeg', 'mpeg2video', 'yuv420p'),
        ('a.mkv', 'ffv1', 'bgra'),
        ('b.mkv', 'ffv1', 'gray10le'),
        ('a.avi', 'mjpeg', 'yuvj420p'),
        ('a.gif', 'gif', 'rgb8'),
        ('a.webm', 'libvpx', 'yuv420p'),
    ],
)
def test_video_formats(tmp_path, name, codec, pix_fmt):
    x, path = blobs(20, 64, 96), tmp_path / name
    encode(path, x, codec, pix_fmt, rate=25, full=pix_fmt == 'yuvj420p')
    c = read_clip(path)
    assert (
        c.frames.dtype == np.uint8
        and c.frames.shape == x.shape
        and c.index.tolist() == list(range(20))
        and c.path == str(path)
    )
    np.testing.assert_allclose(c.times, np.arange(20) / 25, atol=0.0051 if codec == 'gif' else 0.0011)
    assert near(c.frames, x, 20 if pix_fmt == 'rgb8' else 5)


@pytest.mark.parametrize(
    'pix_fmt, full', [('yuv420p', False), ('yuv420p', True), ('yuv422p', False), ('yuvj420p', True)]
)
def test_video_range_is_stretched_as_swscale_does(tmp_path, pix_fmt, full):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (1, 64, 1))
    encode(
        tmp_path / 'a.mkv',
        ramp,
        'mjpeg' if pix_fmt == 'yuvj420p' else 'ffv1',
        pix_fmt,
        full=full,
        options=dict(qscale='1') if pix_fmt == 'yuvj420p' else None,
    )
    ours = read_clip(tmp_path / 'a.mkv').frames[0]
    with av.open(str(tmp_path / 'a.mkv')) as box:
        theirs = next(box.decode(video=0)).to_ndarray(format='gray', threads=1)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - ramp[0]).max() <= (6 if pix_fmt == 'yuvj420p' else 1)


def test_lossless_grey_is_bit_exact(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 30, 42), dtype=np.uint8)
    write_video(tmp_path / 'a.mkv', x, 10, lossless=True)
    np.testing.assert_array_equal(read_clip(tmp_path / 'a.mkv').frames, x)


def test_odd_sizes_have_no_padding(tmp_path):
    x = blobs(3, 37, 51)
    write_video(tmp_path / 'a.mp4', x, 10)
    assert near(read_clip(tmp_path / 'a.mp4').frames, x, 4)


def test_phones_that_were_held_upright(tmp_path):
    write_video(tmp_path / 'a.mp4', blobs(3, 48, 64), 10)
    b = bytearray((tmp_path / 'a.mp4').read_bytes())
    at = b.index(b'tkhd') + 4 + 40  # version 0: the matrix follows 40 bytes of header
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30]  # a quarter turn clockwise for display
    b[at : at + 36] = b''.join(v.to_bytes(4, 'big', signed=True) for v in turn)
    (tmp_path / 'b.mp4').write_bytes(b)
    a, c = read_clip(tmp_path / 'a.mp4').frames, read_clip(tmp_path / 'b.mp4').frames
    np.testing.assert_array_equal(c, np.rot90(a, -1, (1, 2)))


def test_gif_transparency_is_black_and_one_frame_is_a_clip(tmp_path):
    x = np.full((32, 40), 200, np.uint8)
    x[:, :20] = 0
    im = Image.fromarray(x).convert('P')
    im.save(tmp_path / 'a.gif', transparency=int(np.asarray(im)[0, 0]))
    c = read_clip(tmp_path / 'a.gif')
    assert (
        len(c) == 1
        and c.times.tolist() == [0]
        and c.frames[0, :, :20].max() == 0
        and abs(int(c.frames[0, 0, 30]) - 200) <= 2
    )


def test_content_decides_not_the_name(tmp_path):
    x = blobs(1)[0]
    Image.fromarray(x).save(tmp_path / 'image.mp4', format='PNG')
    np.testing.assert_array_equal(read_clip(tmp_path / 'image.mp4').frames, x[None])
    write_video(tmp_path / 'a.mp4', blobs(4), 10)
    os.rename(tmp_path / 'a.mp4', tmp_path / 'a.png')
    assert len(read_clip(tmp_path / 'a.png')) == 4


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'RGB', 'RGBA', 'LA', 'I;16', 'CMYK', 'F'])
def test_stills(tmp_path, mode):
    x, path = blobs(1)[0], tmp_path / {'CMYK': 'a.tif', 'F': 'a.tif'}.get(mode, 'a.png')
    im, want, tolerance = Image.fromarray(x), x, 0
    if mode == '1':
        im = Image.fromarray(x > 127)
        want = (x > 127) * np.uint8(255)
    elif mode == 'P':
        im = Image.fromarray(255 - x)
        im = im.convert('P')
        im.putpalette([v for k in range(256) for v in (255 - k,) * 3])
    elif mode == 'I;16':
        im = Image.fromarray(x.astype(np.uint16) * 257)
    elif mode == 'F':
        im = Image.fromarray(x.astype(np.float32) / 7)
        want = (x - x.min()) * (255 / (x.max() - x.min()))
        tolerance = 1
    elif mode in ('RGBA', 'LA'):
        alpha = np.zeros_like(x)
        alpha[:, 20:] = 255
        im = Image.merge(mode, [Image.fromarray(x)] * (len(mode) - 1) + [Image.fromarray(alpha)])
        want = np.where(alpha > 0, x, 0)
    else:
        im = im.convert(mode)
    if mode == 'P':
        assert im.mode == 'P'
    im.save(path)
    c = read_clip(path)
    assert c.frames.shape == (1, *x.shape) and c.frames.dtype == np.uint8 and c.times.tolist() == [0]
    assert np.abs(c.frames[0] - np.asarray(want, float)).max() <= (tolerance or 1)


def test_animated_and_stacked_stills(tmp_path):
    x = blobs(4)
    im = [Image.fromarray(f) for f in x]
    im[0].save(tmp_path / 'a.png', save_all=True, append_images=im[1:], duration=200)
    im[0].save(tmp_path / 'a.tif', save_all=True, append_images=im[1:])
    for name, step in (('a.png', 0.2), ('a.tif', 0.04)):
        c = read_clip(tmp_path / name)
        np.testing.assert_array_equal(c.frames, x)
        np.testing.assert_allclose(c.times, np.arange(4) * step)


def test_a_turned_photograph_is_turned_back(tmp_path):
    x = np.zeros((40, 60), np.uint8)
    x[:10] = 255
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(x).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    c = read_clip(tmp_path / 'a.jpg').frames[0]
    assert c.shape == (60, 40) and c[:, -8:].min() > 200 and c[:, :28].max() < 50


# ---- DICOM ----


def dicom(path, x, kind='MONOCHROME2', bits=None, preamble=True, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = (
        ExplicitVRLittleEndian,
        UltrasoundMultiFrameImageStorage,
    )
    ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=['clips'])
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID, ds.Modality = (
        ds.file_meta.MediaStorageSOPClassUID,
        ds.file_meta.MediaStorageSOPInstanceUID,
        'p',
        'US',
    )
    colour = kind in ('RGB', 'YBR_FULL')
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = (
        3 if colour else 1,
        kind,
        int(x.dtype.kind == 'i'),
    )
    ds.BitsAllocated = x.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.NumberOfFrames, (ds.Rows, ds.Columns) = len(x), x.shape[1:3]
    if colour:
        ds.PlanarConfiguration = 0
    for k, v in tags.items():
        setattr(ds, k, v)
    ds.PixelData = x.tobytes()
    if preamble:
        ds.save_as(path, enforce_file_format=True)
    else:
        del ds.file_meta
        ds.save_as(path, implicit_vr=True, little_endian=True)


@pytest.mark.parametrize(
    'tags, times',
    [
        (dict(FrameTime='50'), [0, 0.05, 0.1]),
        (dict(CineRate='10'), [0, 0.1, 0.2]),
        (dict(RecommendedDisplayFrameRate='5', CineRate='10'), [0, 0.2, 0.4]),
        (dict(FrameTimeVector=['0', '40', '100']), [0, 0.04, 0.14]),
        (dict(FrameTimeVector=['0', '40'], FrameTime='20'), [0, 0.02, 0.04]),
        ({}, [0, 0.04, 0.08]),
    ],
)
def test_dicom_times(tmp_path, tags, times):
    dicom(tmp_path / 'a.dcm', blobs(3), **tags)
    c = read_clip(tmp_path / 'a.dcm')
    np.testing.assert_array_equal(c.frames, blobs(3))
    np.testing.assert_allclose(c.times, times)


def test_dicom_pixels(tmp_path):
    x = blobs(2)
    dicom(tmp_path / 'one.dcm', 255 - x, 'MONOCHROME1')
    np.testing.assert_array_equal(read_clip(tmp_path / 'one.dcm').frames, x)
    dicom(tmp_path / 'rgb.dcm', np.stack([x, x, x], -1), 'RGB')
    np.testing.assert_array_equal(read_clip(tmp_path / 'rgb.dcm').frames, x)
    dicom(tmp_path / 'ybr.dcm', np.stack([x, np.full_like(x, 128), np.full_like(x, 128)], -1), 'YBR_FULL')
    assert np.abs(read_clip(tmp_path / 'ybr.dcm').frames.astype(int) - x).max() <= 1


def test_dicom_windows(tmp_path):
    x = blobs(2).astype(np.uint16) * 10
    x[0] //= 2
    dicom(tmp_path / 'free.dcm', x, bits=12)  # no window: least to greatest of the whole clip
    want = np.rint((x - x.min()) / float(x.max() - x.min()) * 255)
    np.testing.assert_array_equal(read_clip(tmp_path / 'free.dcm').frames, want)
    y = x.astype(np.int16) - 1000
    dicom(
        tmp_path / 'set.dcm',
        y,
        RescaleSlope='2',
        RescaleIntercept='100',
        WindowCenter=['1000.5', '7'],
        WindowWidth=['1001', '9'],
    )
    want = np.rint(np.clip((y.astype(float) * 2 + 100 - 500) / 1000, 0, 1) * 255)
    np.testing.assert_array_equal(read_clip(tmp_path / 'set.dcm').frames, want)
    dicom(tmp_path / 'inverse.dcm', x, 'MONOCHROME1', bits=12)
    np.testing.assert_array_equal(
        255 - read_clip(tmp_path / 'inverse.dcm').frames, read_clip(tmp_path / 'free.dcm').frames
    )


@pytest.mark.parametrize('name', ['a.dcm', 'IM0001'])
def test_dicom_without_its_header(tmp_path, name):
    dicom(tmp_path / name, blobs(2), preamble=False)
    assert (tmp_path / name).read_bytes()[128:132] != b'DICM'
    np.testing.assert_array_equal(read_clip(tmp_path / name).frames, blobs(2))


def test_a_scanners_dicom():
    from pydicom import examples
    from pydicom.encaps import generate_frames

    c, ds = read_clip(examples.get_path('ybr_color')), examples.ybr_color
    assert c.frames.shape == (30, 240, 320)
    np.testing.assert_allclose(c.times, np.arange(30) * 0.033333, atol=1e-6)
    import io

    jpeg = Image.open(io.BytesIO(list(generate_frames(ds.PixelData, number_of_frames=30))[17])).convert('L')
    assert near(c.frames[17], np.asarray(jpeg), 1.5)
    s = sample_clip(examples.get_path('ybr_color'))
    np.testing.assert_array_equal(s.frames, c.frames[[0, 10, 20]])
    assert read_clip(examples.get_path('palette_color')).frames.std() > 10


# ---- files that are no clips ----


def bad_files(folder):
    rng = np.random.default_rng(0)
    write_video(folder / 'good.mp4', blobs(30), 15)
    encode(folder / 'good.avi', blobs(30), 'mpeg4', 'yuv420p', rate=15)
    encode(folder / 'fast.mp4', blobs(60), 'libx264', 'yuv420p', container_options=dict(movflags='faststart'))
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(folder / 'good.png')
    dicom(folder / 'good.dcm', blobs(4))
    (folder / 'zero.mp4').touch()
    (folder / 'text.mp4').write_text('not a video\n' * 50)
    (folder / 'noise.mp4').write_bytes(rng.bytes(5000))
    (folder / 'noise.dcm').write_bytes(rng.bytes(5000))
    (folder / 'folder.mp4').mkdir()
    for name in ('good.mp4', 'good.avi', 'fast.mp4', 'good.png', 'good.dcm'):
        b = (folder / name).read_bytes()
        (folder / f'cut-{name}').write_bytes(b[: len(b) * 2 // 3])
    with av.open(str(folder / 'sound.mp4'), 'w') as out:
        s = out.add_stream('aac', rate=8000)
        f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        f.sample_rate = 8000
        for o in (f, None):
            out.mux(s.encode(o))


@pytest.mark.filterwarnings('ignore')
def test_what_is_no_clip_is_a_clip_error_with_a_reason(tmp_path):
    bad_files(tmp_path)
    reasons = {
        'zero.mp4': 'empty',
        'missing.mp4': 'no such file',
        'folder.mp4': 'folder',
        'text.mp4': 'no video',
        'noise.mp4': 'no video',
        'noise.dcm': '.',
        'sound.mp4': 'no image',
        'cut-good.mp4': 'damaged',
        'cut-good.avi': 'ends early: [0-9]+ of 30|damaged',
        'cut-fast.mp4': 'ends early: [0-9]+ of 60|damaged',
        'cut-good.png': 'truncated|broken',
        'cut-good.dcm': '.',
    }
    for name, reason in reasons.items():
        for read in (read_clip, lambda p: sample_clip(p, rate=30, max_frames=100)):
            with pytest.raises(ClipError, match=reason) as e:
                read(tmp_path / name)
            assert (
                e.value.path == str(tmp_path / name)
                and str(e.value).startswith(str(tmp_path / name))
                and e.value.reason
            )
            assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


def test_a_container_that_promises_more_than_it_holds(tmp_path):
    encode(tmp_path / 'a.avi', blobs(30), 'mjpeg', 'yuvj420p', full=True)
    with av.open(str(tmp_path / 'a.avi')) as box:
        at = [p.pos for p in box.demux(video=0) if p.size][12]
    b = (tmp_path / 'a.avi').read_bytes()[:at]
    (tmp_path / 'b.avi').write_bytes(b[:4] + (len(b) - 8).to_bytes(4, 'little') + b[8:])  # its size is right
    with pytest.raises(ClipError, match='it ends early: 12 of 30 frames'):
        read_clip(tmp_path / 'b.avi')


def test_frames_that_change_their_size(tmp_path):
    im = [Image.fromarray(blobs(1, 40, 40 + 8 * k)[0]) for k in range(3)]
    im[0].save(tmp_path / 'a.tif', save_all=True, append_images=im[1:])
    with pytest.raises(ClipError, match='40x40 to 48x40 at frame 1'):
        read_clip(tmp_path / 'a.tif')
    assert len(sample_clip(tmp_path / 'a.tif', max_frames=1)) == 1


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp('originals')
    bad_files(folder)
    im = [Image.fromarray(x) for x in blobs(5)]
    im[0].save(folder / 'good.gif', save_all=True, append_images=im[1:])
    return {p.suffix: p.read_bytes() for p in folder.glob('good.*')}, folder


@given(
    st.sampled_from(['.mp4', '.avi', '.png', '.gif', '.dcm']),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=12),
)
@settings(max_examples=120, deadline=None, derandomize=True)
@pytest.mark.filterwarnings('ignore')
def test_scratched_files_give_a_clip_or_a_clip_error(originals, kind, scratches):
    files, folder = originals
    b = bytearray(files[kind])
    for at, v in scratches:
        b[min(int(at * len(b)), len(b) - 1)] = v
    path = folder / f'scratched{kind}'
    path.write_bytes(b)
    try:
        c = sample_clip(path, rate=30, size=(16, 16))
    except ClipError:
        return
    assert isinstance(c, Clip) and c.frames.shape[1:] == (16, 16) and len(c) == len(c.times) == len(c.index)


# ---- the frame store ----


def make(folder, n=6, frames=30, masks=True, rate=15):
    "A table of small clips with masks."
    rows = []
    for i in range(n):
        path, mask = folder / 'clips' / f'c{i:02d}.mkv', folder / 'masks' / f'c{i:02d}.mkv'
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.parent.mkdir(exist_ok=True)
        x = blobs(frames, seed=i)
        write_video(path, x, rate, lossless=True)
        write_video(mask, x // 43, rate, lossless=True)
        rows.append(
            dict(
                path=str(path),
                kind='video',
                label=('covid', 'regular')[i % 2],
                patient=f'{i // 2:03d}',
                source='s',
                probe='convex',
                **dict(mask=str(mask)) if masks else {},
            )
        )
    return pd.DataFrame(rows)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file() and p.name != '.lock'}


@pytest.fixture
def count(monkeypatch):
    "Names of the clips that are decoded in this process."
    names, real = [], clips._make_part
    monkeypatch.setattr(
        clips,
        '_make_part',
        lambda part, path, *rest: names.append(Path(path).stem) or real(part, path, *rest),
    )
    return names


small = dict(size=(24, 32), workers=0)


def test_store_holds_sampled_frames_and_their_masks(tmp_path):
    table = make(tmp_path)
    s = FrameStore.build(table, tmp_path / 'store', **small)
    assert s.images.dtype == s.masks.dtype == np.uint8 and s.images.shape == s.masks.shape == (
        36,
        24,
        32,
    ) == (len(s), *s.size)
    assert isinstance(s.frames.index, pd.RangeIndex) and s.frames.columns.tolist() == [
        *table,
        'clip',
        'frame',
        'time',
        'row',
        'store',
    ]
    assert s.frames.row.tolist() == list(range(36)) and s.frames['clip'].tolist() == [
        f'c{i:02d}.mkv' for i in range(6) for _ in range(6)
    ]
    for i, r in s.frames.iterrows():
        assert (
            r.frame % 5 == 0
            and r.time == pytest.approx(r.frame / 15, abs=0.0011)
            and r.path == table.path[i // 6]
            and r.patient == f'{i // 12:03d}'
        )
        x = blobs(30, seed=i // 6)[r.frame]
        np.testing.assert_array_equal(s[i], np.asarray(Image.fromarray(x).resize((32, 24), Image.BILINEAR)))
        np.testing.assert_array_equal(
            s.masks[i], (x // 43)[1::2, 1::2]
        )  # nearest of 2x2: Pillow takes the lower right
    assert s.skipped.columns.tolist() == ['path', 'reason'] and not len(s.skipped)
    assert sorted(p.suffix for p in (tmp_path / 'store').iterdir()) == [
        '',
        '.csv',
        '.csv',
        '.json',
        '.u8',
        '.u8',
    ]
    np.testing.assert_array_equal(s[[3, 5]], s.images[[3, 5]])
    assert '36 frames of 32x24 from 6 clips, with masks' in repr(s)


def test_store_gives_arrays_that_torch_takes_without_a_warning_and_keeps_the_file(tmp_path):
    s = FrameStore.build(make(tmp_path, 2), tmp_path / 'store', **small)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t = torch.from_numpy(s[0])
    before = s[0].copy()
    t.zero_()
    twin = pickle.loads(pickle.dumps(s))
    np.testing.assert_array_equal(twin[0], before)
    assert len(pickle.dumps(s)) < 500 and twin.folder == s.folder


def test_same_bytes_whatever_the_number_of_workers(tmp_path):
    table = make(tmp_path)
    out = [
        contents(FrameStore.build(table, tmp_path / f'store{w}', size=(24, 32), workers=w).folder)
        for w in (0, 1, 3)
    ]
    assert out[0] == out[1] == out[2]


def test_table_columns_come_back_as_they_were(tmp_path):
    table = make(tmp_path, 4, masks=False).assign(
        patient=['007', 'NA', 'None', '1e5'],
        label=['a', 'b,c', 'd"e', 'ü'],
        code=['01', '02', None, ''],
        score=[1 / 3, np.nan, 2.0, 1e-9],
        flag=[True, False, True, True],
        n=[1, 2, 3, 4],
        clip='mine',
        row=9,
    )
    f = (
        FrameStore.build(table, tmp_path / 'store', **small)
        .frames.groupby('path', sort=False)
        .first(skipna=False)
        .reset_index()
    )
    for c in ('patient', 'label', 'flag', 'n'):
        assert f[c].tolist() == table[c].tolist(), c
    assert f.code.tolist()[:2] == ['01', '02'] and f.code[2:].isna().all()
    np.testing.assert_array_equal(f.score, table.score)
    assert f['clip'].tolist()[0] == 'c00.mkv' and f.flag.dtype == bool and f.n.dtype.kind == 'i'


def test_rows_without_a_mask_have_no_label(tmp_path):
    table = make(tmp_path, 3)
    table['mask'] = [None, table['mask'][1], np.nan]
    s = FrameStore.build(table, tmp_path / 'store', **small)
    assert [set(np.unique(s.masks[6 * i : 6 * i + 6])) == {255} for i in range(3)] == [True, False, True]
    table['mask'] = None
    s = FrameStore.build(table, tmp_path / 'store', **small)
    assert s.masks is None and len(s) == 18 and not list((tmp_path / 'store').glob('masks*'))


def test_masks_as_images(tmp_path):
    x = blobs(1)[0]
    Image.fromarray(x).save(tmp_path / 'a.png')
    codes = Image.fromarray(x // 43).convert('P')
    codes.putpalette([v for k in range(256) for v in (k * 36 % 256, 255 - k, 9)])
    codes.save(tmp_path / 'm.png')
    table = make(tmp_path, 1).assign(path=str(tmp_path / 'a.png'), mask=str(tmp_path / 'm.png'), kind='image')
    s = FrameStore.build(table, tmp_path / 'store', size=x.shape, workers=0)
    np.testing.assert_array_equal(s.masks[0], np.asarray(codes))
    assert s.masks[0].max() == 5
    Image.fromarray(x).convert('RGB').save(tmp_path / 'm.png')
    with pytest.raises(TableError, match=r'm\.png.*one number a pixel.*RGB'):
        FrameStore.build(table, tmp_path / 'store', size=x.shape, workers=0)


def test_bad_masks_are_named_and_their_clips_skipped(tmp_path):
    table = make(tmp_path, 7)
    x = blobs(30) // 43

    def mask(i):
        return table['mask'][i]

    painted = x.copy()
    painted[10, 5, 7], painted[10, 6, 7] = 7, 255
    write_video(mask(1), painted, 15, lossless=True)
    write_video(mask(2), x[:, :40], 15, lossless=True)
    write_video(mask(3), x[:20], 15, lossless=True)
    os.remove(mask(4))
    encode(mask(5), np.repeat(x[..., None], 3, -1), 'ffv1', 'bgra')
    with pytest.warns(UserWarning, match='5 of 7 clips'):
        s = FrameStore.build(table, tmp_path / 'store', **small)
    assert s.frames.path.unique().tolist() == [table.path[0], table.path[6]]
    reasons = dict(zip(s.skipped.path, s.skipped.reason))
    for i, words in {
        1: ['code(s) [7, 255] at frame 10', '0..6'],
        2: ['64x40', '64x48'],
        3: ['ends before frame 20'],
        4: ['no such file'],
        5: ['8-bit grey', 'bgra'],
    }.items():
        for w in [mask(i), *words]:
            assert w in reasons[table.path[i]], reasons[table.path[i]]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.filterwarnings('ignore:The value length')
def test_broken_clips_are_skipped_with_their_reason_and_never_stop_a_build(tmp_path, workers):
    bad_files(tmp_path)
    good = make(tmp_path, 3, masks=False)
    names = ['zero.mp4', 'text.mp4', 'cut-good.mp4', 'missing.mp4', 'folder.mp4', 'noise.dcm']
    table = pd.concat(
        [good.iloc[:1].assign(path=[str(tmp_path / n)]) for n in names] + [good], ignore_index=True
    )
    with pytest.warns(UserWarning, match='6 of 9 clips cannot be read'):
        s = FrameStore.build(table, tmp_path / 'store', size=(24, 32), workers=workers)
    assert s.frames.path.unique().tolist() == good.path.tolist()
    assert s.skipped.path.tolist() == [str(tmp_path / n) for n in names] and all(
        s.skipped.reason.str.len() > 5
    )
    assert (
        s.skipped.reason[0] == 'the file is empty'
        and s.skipped.reason[3] == 'no such file'
        and '6 skipped' in repr(s)
    )


def test_tables_that_cannot_become_a_store(tmp_path):
    table = make(tmp_path, 2)
    with pytest.raises(TableError, match='empty'):
        FrameStore.build(table[:0], tmp_path / 'store')
    with pytest.raises(TableError, match='patient'):
        FrameStore.build(table.drop(columns='patient'), tmp_path / 'store')
    with pytest.raises(TableError, match='none of the 2 clips can be read.*no such file'):
        FrameStore.build(table.assign(path=['/no/a.mp4', '/no/b.mp4']), tmp_path / 'store', **small)
    for bad in (dict(size=None), dict(size=(0, 1)), dict(rate=0), dict(max_frames=0), dict(workers=-1)):
        with pytest.raises(ValueError, match=list(bad)[0]):
            FrameStore.build(table, tmp_path / 'store', **bad)
    with pytest.raises(FileNotFoundError, match='FrameStore.build'):
        FrameStore(tmp_path / 'store')


def test_only_what_changed_is_decoded(tmp_path, count):
    table, folder = make(tmp_path, 5), tmp_path / 'store'

    def build(t=table, **kwargs):
        count.clear()
        s = FrameStore.build(t, folder, **{**small, **kwargs})
        assert (
            not (folder / 'parts').exists()
            and len(list(folder.glob('*.u8'))) == 2
            and len(list(folder.glob('*.csv'))) == 2
        )
        fresh = (
            FrameStore.build(t, tmp_path / f'fresh{time.time_ns()}', **{**small, **kwargs}) if count else None
        )
        if fresh:
            del count[-len(t) :]
            assert contents(folder) == contents(fresh.folder)
        return s, sorted(count)

    every = [f'c{i:02d}' for i in range(5)]
    assert build()[1] == every
    assert build()[1] == []
    s, n = build(table.assign(label='x', extra=3))
    assert n == [] and set(s.frames.label) == {'x'} and set(s.frames.extra) == {3}
    assert build(table.iloc[[4, 0, 2]])[1] == []
    assert build()[1] == ['c01', 'c03']  # they were left out in between
    os.utime(table.path[3], ns=(1, 1))
    assert build()[1] == ['c03']
    write_video(table['mask'][2], blobs(30, seed=9) // 50, 15, lossless=True)
    assert build()[1] == ['c02']
    write_video(table.path[0], blobs(31, seed=9), 15, lossless=True)
    write_video(table['mask'][0], blobs(31) // 50, 15, lossless=True)
    s, n = build()
    assert n == ['c00'] and len(s) == 5 * 6 + 1
    for changed in (dict(rate=2), dict(max_frames=2), dict(size=(20, 20))):
        assert build(**changed)[1] == every


def halved(frames, row, outside=0):
    return frames[:, : len(frames[0]) // 2]


class Shift:
    "A callable object with a state."

    def __init__(self, by):
        self.by = by

    def __call__(self, frames, row, outside=0):
        return np.roll(frames, self.by, 1)


def compiled(text, **names):
    "A function `prepare` of a module that says `text`, as a notebook or an edited file defines it."
    space = dict(names, np=np, __name__='edited')
    exec(compile(text, '<edited>', 'exec'), space)
    return space['prepare']


def test_an_edited_prepare_decodes_again(tmp_path, count):
    table = make(tmp_path, 2)
    inner = "def prepare(frames, row, outside=0):\n    def cut(x): return x[:, %d:]\n    return cut(frames)"
    helper = (
        "EDGE = %d\ndef cut(x): return x[:, EDGE + %d:]\n"
        "def prepare(frames, row, outside=0): return cut(frames)"
    )
    default = "def prepare(frames, row, outside=0, by=%d): return frames[:, by:]"
    versions = [
        compiled(inner % 2),
        compiled(inner % 3),
        compiled(helper % (4, 0)),
        compiled(helper % (5, 0)),
        compiled(helper % (5, 1)),
        compiled(default % 7),
        compiled(default % 8),
        functools.partial(compiled(default % 0), by=9),
        Shift(3),
        Shift(4),
        Shift(5).__call__,
        lambda frames, row, outside: frames[:, 10:],
        lambda frames, row, outside: frames[:, 11:],
        halved,
    ]
    seen = set()
    for prepare in versions:
        count.clear()
        s = FrameStore.build(table, tmp_path / 'store', prepare=prepare, **small)
        assert len(count) == 2, prepare
        seen.add(s.images.tobytes())
    assert len(seen) == len(versions)  # each made other frames
    count.clear()
    assert (
        FrameStore.build(table, tmp_path / 'store', prepare=halved, **small).prepare.endswith('.halved')
        and not count
    )
    assert FrameStore.build(table, tmp_path / 'store', **small).prepare is None and len(count) == 2


def test_the_same_function_has_the_same_key_everywhere(tmp_path):
    (tmp_path / 'mine.py').write_text(
        "NAMES = {'a', 'b', 'c'}\ndef prepare(frames, row, outside=0):\n"
        "    return frames if row['kind'] in {'video', 'image', 'x'} else len(NAMES)\n"
    )
    code = "import functools, mine; from lus_fastai.runs import function_key as k; "
    code += "from lus_fastai.data.fan import fan_crop; "
    code += "print(k(mine.prepare), k(functools.partial(mine.prepare, outside={1: [2., None]})), k(fan_crop))"

    def keys(seed):
        env = {
            **os.environ,
            'PYTHONHASHSEED': str(seed),
            'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]),
        }
        return subprocess.run(
            [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True
        ).stdout.split()

    first = keys(1)
    assert len(set(first)) == 3 and keys(2) == keys(3) == first  # compiled, and from the cached bytecode


def test_what_prepare_holds_must_be_comparable():
    with pytest.raises(TypeError, match='generator .*cannot be compared'):
        function_key(functools.partial(halved, row=(i for i in ())))

    def loop(frames, row, outside):
        return loop(frames, row, outside)

    assert function_key(loop) == function_key(loop)
    assert function_key(functools.partial(halved, outside=np.zeros(3))) != function_key(
        functools.partial(halved, outside=np.ones(3))
    )


def upper(frames, row, outside=0, rows=8):
    return frames[:, :rows]


@pytest.mark.parametrize(
    'prepare',
    (
        lambda frames, row, outside: frames[:, :5],
        functools.partial(upper, rows=5),
        functools.partial(compiled("def prepare(frames, row, outside=0, n=1): return frames[:, :n]"), n=5),
    ),
)
def test_lambdas_and_partials_with_worker_processes(tmp_path, prepare):
    table = make(tmp_path, 2)
    many = FrameStore.build(table, tmp_path / 'many', size=(24, 32), workers=2, prepare=prepare)
    one = FrameStore.build(table, tmp_path / 'one', prepare=functools.partial(upper, rows=5), **small)
    np.testing.assert_array_equal(many.images, one.images)
    assert not len(many.skipped)


def test_a_frame_table_as_clip_table_and_moved_folders_decode_nothing(tmp_path, count):
    s = FrameStore.build(make(tmp_path, 3), tmp_path / 'store', prepare=halved, **small)
    shutil.copytree(tmp_path / 'store', tmp_path / 'copy')
    count.clear()
    rows = s.frames.drop_duplicates('clip')
    again = FrameStore.build(rows, tmp_path / 'copy', prepare=halved, **small)
    assert len(count) == 3  # `prepare` gets the row, and this one has more columns
    count.clear()
    twice = FrameStore.build(again.frames.drop_duplicates('clip'), tmp_path / 'copy', prepare=halved, **small)
    assert not count and twice.holds(again.id) and twice.frames['store'].unique().tolist() == [twice.id]


def test_clips_that_could_not_be_read_are_tried_again(tmp_path, count):
    table = make(tmp_path, 3)
    b = Path(table.path[1]).read_bytes()
    Path(table.path[1]).write_bytes(b'')
    for _ in range(2):
        count.clear()
        with pytest.warns(UserWarning):
            FrameStore.build(table, tmp_path / 'store', **small)
    assert count == ['c01']
    Path(table.path[1]).write_bytes(b)
    assert not len(FrameStore.build(table, tmp_path / 'store', **small).skipped)


def test_equal_names_sizes_and_times_in_two_folders_are_two_clips(tmp_path):
    rows = []
    for i in range(2):
        path = tmp_path / f'p{i}' / 'IM0001.dcm'
        path.parent.mkdir()
        dicom(path, blobs(1, seed=i))
        os.utime(path, ns=(10**18, 10**18))
        rows.append(
            dict(path=str(path), kind='image', label='covid', patient=str(i), source='s', probe='convex')
        )
    s = FrameStore.build(pd.DataFrame(rows), tmp_path / 'store', size=(48, 64), workers=0)
    np.testing.assert_array_equal(s.images, np.concatenate([blobs(1, seed=i) for i in range(2)]))


def test_damage_is_noticed_and_mended(tmp_path):
    table, folder = make(tmp_path, 3), tmp_path / 'store'
    whole = contents(FrameStore.build(table, folder, **small).folder)
    for name in whole:
        for damage in ('cut', 'gone'):
            if damage == 'gone':
                os.remove(folder / name)
            else:
                os.truncate(folder / name, 0 if name.endswith('.csv') else len(whole[name]) // 2)
            with pytest.raises((ValueError, OSError)) as e:
                FrameStore(folder)
            if name.endswith(('.u8', '.json')):
                assert 'build' in str(e.value)
            FrameStore.build(table, folder, **small)
            assert contents(folder) == whole


def test_half_of_the_table_of_frames_is_damage_and_is_mended(tmp_path, count):
    table, folder = make(tmp_path, 3), tmp_path / 'store'
    whole = contents(FrameStore.build(table, folder, **small).folder)
    name = next(n for n in whole if n.startswith('frames-'))
    (folder / name).write_bytes(b'\n'.join(whole[name].splitlines()[:10]) + b'\n')
    with pytest.raises(ValueError, match=rf'{name} is damaged: build the store again'):
        FrameStore(folder)
    FrameStore.build(table, folder, **small)
    assert contents(folder) == whole


@pytest.mark.parametrize('kind', ['images', 'masks'])
def test_zeroed_pixels_are_named_and_only_their_clip_is_decoded_again(tmp_path, count, kind):
    table, folder = make(tmp_path, 4), tmp_path / 'store'
    store = FrameStore.build(table, folder, **small)
    whole, row = contents(folder), int(store.frames.row[store.frames.path == table.path[2]].iloc[-1])
    store.verify()
    with open(folder / store.meta['files'][kind], 'r+b') as f:
        f.seek(row * 24 * 32)
        f.write(bytes(64) if kind == 'images' else bytes([9]) * 64)
    with pytest.raises(ValueError, match=r'the pixels of 1 clip\(s\) changed .*c02\.mkv'):
        FrameStore(folder).verify()
    count.clear()
    FrameStore.build(table, folder, **small).verify()
    assert count == ['c02'] and contents(folder) == whole


def test_a_store_without_checksums_opens_says_so_and_gets_them(tmp_path, count):
    table, folder = make(tmp_path, 2), tmp_path / 'store'
    whole = contents(FrameStore.build(table, folder, **small).folder)
    old = {k: v for k, v in json.loads(whole['meta.json']).items() if k not in ('sums', 'check')}
    (folder / 'meta.json').write_text(json.dumps(old))
    assert len(FrameStore(folder)) == 12
    with pytest.raises(ValueError, match='was written without checksums'):
        FrameStore(folder).verify()
    count.clear()
    FrameStore.build(table, folder, **small).verify()
    assert not count and contents(folder) == whole


@pytest.mark.parametrize(
    'change',
    [
        lambda m: [],
        lambda m: {},
        lambda m: m | dict(rows='x'),
        lambda m: m | dict(rows=m['rows'] - 1),
        lambda m: m | dict(size=[24]),
        lambda m: m | dict(files=m['files'] | dict(images='../images.u8')),
        lambda m: m | dict(clips=[['a']]),
        lambda m: {k: v for k, v in m.items() if k != 'text'},
    ],
)
def test_a_meta_file_that_cannot_be_meant_is_damage(tmp_path, change):
    folder = FrameStore.build(make(tmp_path, 2), tmp_path / 'store', **small).folder
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps(change(meta)))
    with pytest.raises(ValueError, match=r'meta\.json is damaged: build the store again'):
        FrameStore(folder)


@linux
def test_a_name_that_is_not_utf8_is_skipped_with_its_reason(tmp_path):
    table = make(tmp_path, 3)
    odd = os.fsencode(tmp_path) + b'/M\xfcller.mkv'
    os.rename(table.path[1], odd)
    table.loc[1, 'path'] = os.fsdecode(odd)
    with pytest.warns(UserWarning, match='1 of 3 clips cannot be read'):
        store = FrameStore.build(table, tmp_path / 'store', size=(24, 32), workers=2)
    assert store.frames.path.unique().tolist() == [table.path[0], table.path[2]]
    assert store.skipped.path.tolist() == [str(tmp_path / 'M') + '\\udcfcller.mkv']
    assert 'not UTF-8: rename it' in store.skipped.reason[0]
    with pytest.raises(TableError, match="column 'note' holds what is no text"):
        FrameStore.build(table.assign(note='\udcfc'), tmp_path / 'other', **small)


def test_a_damaged_part_is_made_again(tmp_path, monkeypatch):
    table, folder = make(tmp_path, 3), tmp_path / 'store'

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(clips, '_write', stop)
        FrameStore.build(table, folder, **small)
    parts = sorted((folder / 'parts').iterdir())
    assert len(parts) == 3
    os.truncate(parts[1], 1000)
    assert contents(FrameStore.build(table, folder, **small).folder) == contents(
        FrameStore.build(table, tmp_path / 'fresh', **small).folder
    )


@pytest.mark.parametrize('at', ['images', 'masks', 'frames', 'skipped', 'meta.json'])
def test_interrupted_while_writing_the_old_store_stays_whole(tmp_path, monkeypatch, count, at):
    table, folder = make(tmp_path, 4), tmp_path / 'store'
    old = FrameStore.build(table[:3], folder, **small)
    pixels, before = old.images[:].copy(), contents(folder)
    real = os.replace

    def interrupted(a, b):
        if Path(b).name.startswith(at):
            raise KeyboardInterrupt
        return real(a, b)

    table['label'] = 'other'
    table = pd.concat(
        [table[1:], table[3:].assign(path=str(tmp_path / 'gone.avi'))], ignore_index=True
    )  # each file of the store is another one now
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, 'replace', interrupted)
        FrameStore.build(table, folder, **small)
    assert {k: v for k, v in contents(folder).items() if k in before} == before
    again = FrameStore(folder)
    np.testing.assert_array_equal(again.images, pixels)
    count.clear()
    done = FrameStore.build(table, folder, **small)
    assert (
        count == ['gone']
        and contents(folder) == contents(FrameStore.build(table, tmp_path / 'fresh', **small).folder)
        and len(done) == 18
    )


SCRIPT = '''
import sys, time, resource, signal, pandas as pd
from lus_fastai.data import store as clips
def main(csv, folder, pause, limit):
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    real = clips.read_frames
    def slow(*args): time.sleep(pause); return real(*args)
    clips.read_frames = slow
    clips.FrameStore.build(pd.read_csv(csv, dtype=str), folder, size=(24, 32), workers=2)
if __name__ == '__main__': main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
'''


def start(tmp_path, csv, folder, pause=0.0, limit=0):
    (tmp_path / 'script.py').write_text(SCRIPT)
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(tmp_path / 'script.py'), str(csv), str(folder), str(pause), str(limit)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid):
    out = []
    for p in Path('/proc').glob('[0-9]*/stat'):
        try:
            after = p.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(after[1]) == pid and after[0] != 'Z':
            out.append(int(p.parent.name))
    return out


def alive(pid):
    try:
        return (Path('/proc') / str(pid) / 'stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@linux
def test_killed_and_resumed_is_as_if_never_broken(tmp_path, count):
    table, folder = make(tmp_path, 16), tmp_path / 'store'
    table.to_csv(tmp_path / 't.csv', index=False)
    p = start(tmp_path, tmp_path / 't.csv', folder, pause=0.25)
    while len(list(folder.glob('parts/[0-9a-f]*.npz'))) < 4:
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.02)
    workers = children(p.pid)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert workers
    with pytest.raises(FileNotFoundError, match='interrupted'):
        FrameStore(folder)
    end = time.time() + 10
    while any(map(alive, workers)) and time.time() < end:
        time.sleep(0.05)
    assert not any(map(alive, workers)), 'workers outlive their parent'
    there = len(list(folder.glob('parts/[0-9a-f]*.npz')))
    assert 4 <= there < 16
    s = FrameStore.build(table, folder, **small)
    assert len(count) == 16 - there
    assert (
        contents(folder) == contents(FrameStore.build(table, tmp_path / 'unbroken', **small).folder)
        and len(s) == 16 * 6
    )
    assert sorted(x.name for x in folder.iterdir() if x.name not in contents(folder)) == ['.lock']


@linux
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, count):
    table, folder = make(tmp_path, 8), tmp_path / 'store'
    FrameStore.build(table[:1], folder, **small)
    before = contents(folder)
    table.to_csv(tmp_path / 't.csv', index=False)
    p = start(
        tmp_path, tmp_path / 't.csv', folder, limit=15000
    )  # a part of this table has 10 kB, the images of all 36
    assert p.wait() != 0
    stderr = p.stderr.read()
    assert f'no room to write the frame store {folder}' in stderr and 'make room and build again' in stderr
    assert contents(folder) == before and len(FrameStore(folder)) == 6  # the old store, and no temporary file
    count.clear()
    FrameStore.build(table, folder, **small)
    assert count == [] and contents(folder) == contents(
        FrameStore.build(table, tmp_path / 'fresh', **small).folder
    )


@pytest.mark.parametrize('workers', [0, 2])
@linux
def test_a_disk_that_fills_while_parts_are_written_is_no_fault_of_the_clips(tmp_path, monkeypatch, workers):
    table, folder = make(tmp_path, 5), tmp_path / 'store'
    real = np.savez

    def full(f, images, **arrays):
        if len(list((folder / 'parts').glob('[0-9a-f]*.npz'))) >= 2:
            f.write(b'some bytes')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(f, images=images, **arrays)

    with monkeypatch.context() as m, pytest.raises(OSError, match='no room to write') as e:
        m.setattr(np, 'savez', full)
        FrameStore.build(table, folder, size=(24, 32), workers=workers)
    assert e.value.errno == errno.ENOSPC
    assert not list((folder / 'parts').glob('.*')) and len(list((folder / 'parts').iterdir())) >= 2
    s = FrameStore.build(table, folder, **small)
    assert not len(s.skipped) and contents(folder) == contents(
        FrameStore.build(table, tmp_path / 'fresh', **small).folder
    )


@linux
def test_a_clip_that_kills_its_decoder_is_found_and_reported(tmp_path, monkeypatch):
    table = make(tmp_path, 8)
    real = clips.read_frames

    def deadly(path, *rest):
        if path.endswith(('c02.mkv', 'c05.mkv')):
            os.kill(os.getpid(), signal.SIGKILL)  # as a crash does, without its noise
        return real(path, *rest)

    monkeypatch.setattr(clips, 'read_frames', deadly)
    with pytest.warns(UserWarning, match='2 of 8'):
        s = FrameStore.build(table, tmp_path / 'store', size=(24, 32), workers=2)
    assert s.skipped.path.tolist() == [table.path[2], table.path[5]] and set(s.skipped.reason) == {
        'decoding it kills the process'
    }
    assert s.frames.path.nunique() == 6


@linux
def test_two_builds_of_one_folder_at_once(tmp_path):
    table, folder = make(tmp_path, 8), tmp_path / 'store'
    table.to_csv(tmp_path / 'a.csv', index=False)
    table[3:].assign(label='b').to_csv(tmp_path / 'b.csv', index=False)
    running = [start(tmp_path, tmp_path / c, folder, pause=0.05) for c in ('a.csv', 'b.csv')]
    for p in running:
        assert p.wait() == 0, p.stderr.read()
    s = FrameStore(folder)
    want = table if s.frames.path.nunique() == 8 else table[3:].assign(label='b')
    assert contents(folder) == contents(FrameStore.build(want, tmp_path / 'fresh', **small).folder)


@pytest.mark.parametrize('workers', [0, 2])
def test_threads_that_build_one_folder_at_once(tmp_path, workers):
    tables = [make(tmp_path, 6)[k:].assign(label=f'l{k}') for k in range(4)]

    def build(table):
        store = FrameStore.build(table, tmp_path / 'store', size=(24, 32), workers=workers)
        return store.frames.label.unique().tolist(), len(store)

    before = os.umask(0o027)
    try:
        with ThreadPoolExecutor(4) as pool:
            built = list(pool.map(build, tables * 3))
        assert os.umask(0o027) == 0o027  # which threads share
    finally:
        os.umask(before)
    assert built == [([f'l{k}'], 6 * (6 - k)) for k in range(4)] * 3
    FrameStore(tmp_path / 'store').verify()
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / 'store').glob('*-*')} == {0o640}


# ---- real clips ----


@pytest.mark.filterwarnings('ignore')
def test_real_files(real_data, tmp_path):
    "A spread of every collection and format reads; a store of them holds what `sample_clip` gives."
    files = sorted(
        p
        for d in ('pocus', 'blues', 'busi', 'ccxs')
        for p in (real_data / d).rglob('*')
        if p.suffix.lower() in ('.gif', '.mp4', '.mov', '.avi', '.mpeg', '.jpg', '.png')
    )
    assert files, f'no clips under {real_data}'
    edited = [
        p for p in files if p.name.endswith(('vid5.mov', 'vid13.mov'))
    ]  # they show fewer frames than they hold
    kinds = Counter()
    some = [
        p
        for p in files
        if (
            kinds.update([(p.relative_to(real_data).parts[0], p.suffix.lower())])
            or kinds[p.relative_to(real_data).parts[0], p.suffix.lower()]
        )
        in (1, 3, 8)
        or p in edited
    ]
    table = pd.DataFrame(
        [
            dict(path=str(p), kind='video', label='x', patient=str(i), source='s', probe='convex')
            for i, p in enumerate(some)
        ]
    )
    s = FrameStore.build(table, tmp_path / 'store', size=(64, 64), workers=1)
    assert not len(s.skipped) and s.frames.path.nunique() == len(some)
    for path, g in list(s.frames.groupby('path'))[::4]:
        c = sample_clip(path, size=(64, 64))
        np.testing.assert_array_equal(s[g.row.to_numpy()], c.frames)
        assert (np.diff(c.times) > 1 / 3 - 0.1).all() and c.frames.std() > 1
