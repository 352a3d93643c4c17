"Readers of clips, images and masks under fuzzing: a target for each format."

from functools import partial

import numpy as np
from harness import TARGETS, Target
from PIL import Image

from lus_fastai.data.mask_sets import read_mask
from lus_fastai.video import ClipError, colour_share, decode_frames, read_clip, sample_clip, write_video

_VIDEOS = dict(
    gif=('gif', 'gray', None),
    mpeg=('mpeg1video', 'yuv420p', 'mpeg'),
    mkv=('libx264', 'gray', None),
    webm=('libvpx', 'yuv420p', None),
    mp4=('libx264', 'yuv420p', None),
    mov=('mpeg4', 'yuv420p', None),
    avi=('mjpeg', 'yuvj420p', None),
)


def moving(n=8, h=32, w=48):
    "A bright spot that moves, on speckle: (n, h, w) uint8."
    y, x = np.mgrid[:h, :w]
    spot = [200 * np.exp(-((y - h / 2) ** 2 + (x - w / 4 - 2 * k) ** 2) / 60) for k in range(n)]
    return np.clip(np.array(spot) + np.random.default_rng(0).normal(20, 9, (n, h, w)), 0, 255).astype(
        np.uint8
    )


def video_bytes(path, kind, frames):
    "A video in one of the containers, as bytes."
    import av

    codec, pixels, form = _VIDEOS[kind]
    with av.open(str(path), 'w', format=form) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], pixels
        for x in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(x, format='gray').reformat(format=pixels)))
        out.mux(stream.encode())
    return path.read_bytes()


def video_seeds(folder, kind):
    return [(f'clip.{kind}', video_bytes(folder / f'a.{kind}', kind, moving()))]


def mask_seeds(folder):
    "FFV1 in Matroska, and PNG with grey and with a palette."
    codes = np.repeat(moving() % 7, 2, 1)
    write_video(folder / 'm.mkv', codes, 25, lossless=True)
    Image.fromarray(codes[0]).save(folder / 'm.png')
    palette = Image.fromarray(codes[0]).convert('P')
    palette.save(folder / 'p.png')
    return [('mask.mkv', (folder / 'm.mkv').read_bytes())] + [
        ('mask.png', (folder / f).read_bytes()) for f in ('m.png', 'p.png')
    ]


def image_seeds(folder):
    "Every kind of still, grey and in colour, and an animated PNG and a TIFF stack."
    frames = moving()
    grey, colour = Image.fromarray(frames[0]), Image.fromarray(np.stack(list(frames[:3]), -1))
    found = []
    for im, kinds in ((grey, 'png jpg bmp tif pgm webp jp2'), (colour, 'png jpg bmp tif ppm webp jp2')):
        for kind in kinds.split():
            im.save(path := folder / f'{im.mode}.{kind}')
            found.append((f'image.{kind}', path.read_bytes()))
    more = dict(save_all=True, append_images=[Image.fromarray(x) for x in frames[1:3]])
    for kind, extra in (('png', more), ('tif', more), ('tiff', dict(compression='tiff_lzw'))):
        grey.save(path := folder / f'more.{kind}', **extra)
        found.append((f'image.{kind}', path.read_bytes()))
    return found


def read_everything(path):
    "As the package does: sampled, whole, and in colour."
    sample_clip(path, max_frames=3, size=(16, 16))
    read_clip(path)
    colour_share(path)


def read_codes(path):
    "As the store reads masks, and as the mask sets do."
    for _ in decode_frames(path, lambda k, t: True, codes=True):
        pass
    if path.suffix == '.png':
        read_mask(path)


for kind in _VIDEOS:
    TARGETS[f'clip-{kind}'] = Target(partial(video_seeds, kind=kind), read_everything, (ClipError,))
TARGETS['clip-image'] = Target(image_seeds, read_everything, (ClipError,))
TARGETS['mask'] = Target(mask_seeds, read_codes, (ClipError,))
