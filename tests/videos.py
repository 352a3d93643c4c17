"Small videos in each container that is read; converted without threads, which PyAV keeps and a fork lacks."

import av
import numpy as np

VIDEOS = dict(  # container -> codec, pixels, format where the file's ending does not name it
    gif=('gif', 'gray', None),
    mpeg=('mpeg1video', 'yuv420p', 'mpeg'),
    mkv=('libx264', 'gray', None),
    webm=('libvpx', 'yuv420p', None),
    mp4=('libx264', 'yuv420p', None),
    mov=('mpeg4', 'yuv420p', None),
    avi=('mjpeg', 'yuvj420p', None),
)


def speckle(n=20, h=32, w=48):
    "A bright spot that moves, on speckle: (n, h, w) uint8."
    y, x = np.mgrid[:h, :w]
    spot = [200 * np.exp(-((y - h / 2) ** 2 + (x - w / 4 - k) ** 2) / 60) for k in range(n)]
    noise = np.random.default_rng(0).normal(20, 9, (n, h, w))
    return np.clip(np.array(spot) + noise, 0, 255).astype(np.uint8)


def video_bytes(path, kind, frames):
    "Write frames (n, h, w) uint8 as a video in one of the containers; the file's bytes."
    codec, pixels, form = VIDEOS[kind]
    with av.open(str(path), 'w', format=form) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], pixels
        for x in frames:
            frame = av.VideoFrame.from_ndarray(x, format='gray').reformat(format=pixels, threads=1)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path.read_bytes()
