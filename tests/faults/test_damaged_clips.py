"Damaged, oversized and hostile clips, images and masks: refused by name, and before they take room or time."

import contextlib
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from videos import VIDEOS, speckle, video_bytes

from lus_fastai.data.fetching import FetchError, extract_archive
from lus_fastai.data.mask_sets import read_mask
from lus_fastai.data.store import read_masks
from lus_fastai.video import ClipError, decode_frames, read_clip, read_limits, sample_clip, write_video


def refused(path, read=read_clip, match='damaged|ends early|no image and no video'):
    with pytest.raises(ClipError, match=match) as e:
        read(path)
    assert e.value.path == str(path)


@pytest.mark.parametrize('kind', sorted(VIDEOS))
def test_a_clip_that_was_cut_is_refused(tmp_path, kind):
    whole = video_bytes(tmp_path / f'whole.{kind}', kind, speckle())
    frames = read_clip(tmp_path / f'whole.{kind}').frames
    assert len(frames) == 20
    draw, cut, seen = random.Random(0), tmp_path / f'cut.{kind}', 0
    for at in sorted(draw.sample(range(60, len(whole) - 40), 12)):
        cut.write_bytes(whole[:at])
        if kind == 'mpeg' and not whole[at:].strip(b'\xff').removesuffix(b'\0\0\1\xb9'):
            np.testing.assert_array_equal(read_clip(cut).frames, frames)  # only padding is gone
            continue
        refused(cut)
        refused(cut, lambda p: sample_clip(p, rate=50))
        seen += 1
    assert seen > 5


def test_a_cut_clip_is_refused_however_little_of_it_is_asked_for(tmp_path):
    whole = video_bytes(tmp_path / 'a.mkv', 'mkv', speckle())
    (tmp_path / 'cut.mkv').write_bytes(whole[:-30])
    refused(tmp_path / 'cut.mkv', lambda p: sample_clip(p, max_frames=1), 'ends early.*ffmpeg')


@pytest.mark.parametrize('kind', ['mpeg', 'mov', 'mp4'])
def test_frames_that_libav_guessed_are_refused(tmp_path, kind):
    "Zeros in the middle: the container is whole, and frames are shown, but they are not those of the clip."
    whole = bytearray(video_bytes(tmp_path / f'a.{kind}', kind, speckle()))
    at = len(whole) // 2
    whole[at : at + 120] = bytes(120)
    (tmp_path / f'b.{kind}').write_bytes(whole)
    refused(tmp_path / f'b.{kind}')


@pytest.mark.parametrize('kind', ['mov', 'mp4'])
def test_a_table_of_two_billion_entries_is_called_damage_not_a_lack_of_memory(tmp_path, kind):
    whole = bytearray(video_bytes(tmp_path / f'a.{kind}', kind, speckle(8)))
    at = whole.index(b'stts') + 8  # durations of frames: how many there are
    whole[at : at + 4] = (2_052_000_000).to_bytes(4, 'big')
    (tmp_path / f'b.{kind}').write_bytes(whole)
    refused(tmp_path / f'b.{kind}', match='declares too much')


def test_a_mask_with_a_changed_bit_is_refused(tmp_path):
    codes = speckle(6) % 7
    write_video(tmp_path / 'm.mkv', codes, 25, lossless=True)
    np.testing.assert_array_equal(read_masks(tmp_path / 'm.mkv', range(6), (32, 48), (32, 48)), codes)
    whole, draw = (tmp_path / 'm.mkv').read_bytes(), random.Random(0)
    with av.open(str(tmp_path / 'm.mkv')) as box:
        packets = [(p.pos, p.size) for p in box.demux(video=0) if p.size]
    for _ in range(30):
        at, size = draw.choice(packets)
        changed = bytearray(whole)
        changed[at + draw.randrange(12, size)] ^= 1 << draw.randrange(8)
        (tmp_path / 'bad.mkv').write_bytes(changed)
        refused(tmp_path / 'bad.mkv', lambda p: read_masks(p, range(6), (32, 48), (32, 48)))


def test_ffv1_without_checksums_is_read(tmp_path):
    "Level 1 has no slices, and slicecrc=0 leaves them out: nothing to check, and nothing to complain of."
    for name, options in (('one', dict(level='1')), ('none', dict(level='3', slicecrc='0'))):
        with av.open(str(tmp_path / f'{name}.mkv'), 'w') as out:
            stream = out.add_stream('ffv1', rate=25)
            stream.height, stream.width, stream.pix_fmt, stream.options = 32, 48, 'gray', options
            for x in speckle(4):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(x, format='gray')))
            out.mux(stream.encode())
        np.testing.assert_array_equal(read_clip(tmp_path / f'{name}.mkv').frames, speckle(4))


@pytest.mark.parametrize('read', [read_clip, read_mask])
def test_a_png_with_a_changed_bit_is_refused(tmp_path, read):
    Image.fromarray(speckle(1)[0]).save(tmp_path / 'a.png')
    whole = (tmp_path / 'a.png').read_bytes()
    read(tmp_path / 'a.png')
    for at in range(60, len(whole) - 20, 97):
        changed = bytearray(whole)
        changed[at] ^= 1
        (tmp_path / 'bad.png').write_bytes(changed)
        refused(tmp_path / 'bad.png', read, 'damaged')


def png_of(side):
    "A PNG of black pixels: (side, side), a few hundred kilobytes for 20,000."
    row, pack = b'\0' * (side * 3 + 1), zlib.compressobj(9)

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    data = b''.join(pack.compress(row) for _ in range(side)) + pack.flush()
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def gif_of(side):
    screen = struct.pack('<HHBBB', side, side, 0x80, 0, 0) + bytes(6)
    return b'GIF89a' + screen + b',' + struct.pack('<HHHHB', 0, 0, side, side, 0) + b'\2\2\x4c\1\0;'


def y4m_of(side):
    return f'YUV4MPEG2 W{side} H{side} F25:1 C420\nFRAME\n'.encode() + bytes(1000)


@pytest.mark.parametrize(
    'name, data',
    [('a.png', png_of(9000)), ('a.gif', gif_of(16000)), ('a.y4m', y4m_of(15000))],
    ids=['png', 'gif', 'y4m'],
)
def test_an_image_with_too_many_pixels_is_refused_before_it_is_made(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    code = (
        'import resource, sys\nfrom lus_fastai.video import read_clip, ClipError\n'
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n'
        'before = peak()\n'
        'try: read_clip(sys.argv[1])\nexcept ClipError as e: print(peak() - before, e)\n'
    )
    done = subprocess.run([sys.executable, '-c', code, tmp_path / name], capture_output=True, text=True)
    grown, _, said = done.stdout.partition(' ')
    assert said.startswith(str(tmp_path / name)), (done.stdout, done.stderr[-500:])
    assert float(grown) < 200  # MB; one such frame in colour takes more


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['jp2', 'tif'])
def test_a_length_in_a_small_image_reserves_no_memory(tmp_path, kind):
    "Pillow asks its file for as many bytes as a box of JPEG 2000 declares, and Python makes room for them."
    Image.fromarray(speckle(1)[0]).save(path := tmp_path / f'a.{kind}')
    whole, sizes = path.read_bytes(), (b'\x7f\xff\xff\xf0', b'\xf0\xff\xff\x7f')
    for at in range(min(len(whole), 160)):
        for size in sizes:
            path.write_bytes(whole[:at] + size + whole[at + 4 :])
            tracemalloc.start()
            with contextlib.suppress(ClipError):
                read_clip(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 100e6, (at, size, peak)


def test_limits_are_read_from_the_environment(tmp_path, monkeypatch):
    write_video(tmp_path / 'a.mkv', speckle(20), 10, lossless=True)
    for limits, said in (
        ('frames=19', '20 frames, more than 19'),
        ('pixels=1000', 'more than 1,000 pixels'),
        ('seconds=1', 'seconds, more than 1'),
        ('total=20000', 'pixels in all, more than 20,000'),
        ('bytes=5000', 'bytes, more than 5,000'),
    ):
        monkeypatch.setenv('LUS_LIMITS', limits)
        refused(tmp_path / 'a.mkv', match=f'{said}.*LUS_LIMITS')
    monkeypatch.setenv('LUS_LIMITS', 'frames=20')
    assert len(read_clip(tmp_path / 'a.mkv')) == 20
    for wrong in ('frames', 'films=3', 'frames=-1', 'frames=many', 'frames=nan'):
        monkeypatch.setenv('LUS_LIMITS', wrong)
        with pytest.raises(ValueError, match='LUS_LIMITS') as e:
            read_clip(tmp_path / 'a.mkv')
        assert not isinstance(e.value, ClipError)
    monkeypatch.delenv('LUS_LIMITS')
    assert read_limits().frames == 1e5


def test_a_playlist_does_not_lead_to_its_neighbour(tmp_path):
    write_video(tmp_path / 'secret.mkv', speckle(3), 10, lossless=True)
    (tmp_path / 'a.mp4').write_text("ffconcat version 1.0\nfile 'secret.mkv'\n")
    (tmp_path / 'b.mp4').write_text(
        '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.mkv\n#EXT-X-ENDLIST\n'
    )
    (tmp_path / 'c.mp4').write_bytes(b'<?xml version="1.0"?><MPD><BaseURL>secret.mkv</BaseURL></MPD>')
    for name in 'abc':
        refused(tmp_path / f'{name}.mp4', match='no image and no video')


NAMES = [
    'a:b.mkv',
    'http:x.mkv',
    'concat:a.mkv',
    'with blank.mkv',
    '"quoted" \'both\'.mkv',
    'two\nlines.mkv',
    '😷🫁.mkv',
]
NAMES += ['-dash.mkv', '%d.mkv', '*.mkv', 'a|b.mkv', os.fsdecode(b'M\xfcller.mkv')]


@pytest.mark.parametrize('name', NAMES)
def test_a_file_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / 'a.mkv', speckle(3), 10, lossless=True)
    if name != 'a.mkv':
        os.replace('a.mkv', name)
    for path in (name, Path(name), tmp_path / name):
        np.testing.assert_array_equal(read_clip(path).frames, speckle(3))
    Path(name).write_bytes(Path(name).read_bytes()[:-20])
    with pytest.raises(ClipError) as e:
        read_clip(name)
    str(e.value).encode()  # it can be printed
    assert '\n' not in str(e.value) and e.value.path == name


def test_an_archive_that_does_not_fit_changes_nothing(tmp_path):
    "A file where the archive has a folder: the files before it in the archive are not replaced either."
    with zipfile.ZipFile(tmp_path / 'new.zip', 'w') as z:
        z.writestr('a.txt', 'new')
        z.writestr('b/inside.txt', 'new')
        z.writestr('c.txt', 'new')
    folder = tmp_path / 'here'
    for other in ('b', 'c.txt'):
        folder.mkdir()
        (folder / 'a.txt').write_text('old')
        (folder / 'b').write_text('a file') if other == 'b' else (folder / 'c.txt').mkdir()
        with pytest.raises(FetchError, match=f'{other}.* is a (file|folder).*nothing was unpacked'):
            extract_archive(tmp_path / 'new.zip', folder)
        assert (folder / 'a.txt').read_text() == 'old'
        assert sorted(p.name for p in folder.iterdir()) == sorted(['a.txt', other])
        assert sorted(p.name for p in tmp_path.iterdir()) == ['here', 'new.zip']
        os.rename(folder, tmp_path / 'gone')

        shutil.rmtree(tmp_path / 'gone')


def test_one_that_reads_codes_sees_the_damage_too(tmp_path):
    Image.fromarray(speckle(1)[0] % 7).save(tmp_path / 'm.png')
    b = bytearray((tmp_path / 'm.png').read_bytes())
    b[-30] ^= 8
    (tmp_path / 'm.png').write_bytes(b)
    refused(tmp_path / 'm.png', lambda p: list(decode_frames(p, lambda k, t: True, codes=True)), 'damaged')


def test_a_log_that_another_library_turned_on_does_not_stop_a_reader(tmp_path):
    "torchvision 0.25 does so: a decoder's thread waits for the interpreter, which waits for the thread."
    write_video(tmp_path / 'clip.mp4', speckle(), 10)
    code = (
        'import av, logging, sys\n'
        'from lus_fastai.video import sample_clip\n'
        'logging.disable()\n'
        'for _ in range(20):\n'
        '    av.logging.set_level(av.logging.DEBUG)\n'
        '    sample_clip(sys.argv[1], max_frames=2)\n'
    )
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'clip.mp4')], check=True, timeout=60)


def test_a_process_that_is_forked_after_frames_were_converted_reads_too(tmp_path):
    "PyAV 19 keeps a converter with threads for each thread; a forked process would wait for those for ever."
    with av.open(str(tmp_path / 'clip.avi'), 'w') as out:  # RGB frames, which are converted to grey
        stream = out.add_stream('ffv1', rate=10)
        stream.width, stream.height, stream.pix_fmt = 256, 256, 'bgr0'
        for x in np.random.default_rng(0).integers(0, 255, (4, 256, 256, 3), np.uint8):
            out.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(x, format='rgb24').reformat(format='bgr0', threads=1)
                )
            )
        out.mux(stream.encode())
    code = (
        'import os, sys\n'
        'from lus_fastai.video import colour_share, read_clip\n'
        'def ask():\n'
        '    return read_clip(sys.argv[1]).frames.sum(), colour_share(sys.argv[1])\n'
        'before, child = ask(), os.fork()\n'
        'if child == 0:\n'
        '    os._exit(0 if ask() == before else 1)\n'
        'sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n'
    )
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'clip.avi')], check=True, timeout=60)
