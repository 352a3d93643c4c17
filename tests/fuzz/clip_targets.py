"Readers of clips, images and masks under fuzzing: a target for each format."

import io
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from harness import TARGETS, Target
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, UltrasoundMultiFrameImageStorage
from videos import VIDEOS, speckle, video_bytes

from lus_fastai.data.dicom import dicom_region
from lus_fastai.data.fetching import FetchError, extract_archive
from lus_fastai.data.mask_sets import read_mask
from lus_fastai.video import ClipError, colour_share, decode_frames, read_clip, sample_clip, write_video


def video_seeds(folder, kind):
    return [(f'clip.{kind}', video_bytes(folder / f'a.{kind}', kind, speckle(8)))]


def mask_seeds(folder):
    "FFV1 in Matroska, and PNG with grey and with a palette."
    codes = np.repeat(speckle(8) % 7, 2, 1)
    write_video(folder / 'm.mkv', codes, 25, lossless=True)
    Image.fromarray(codes[0]).save(folder / 'm.png')
    palette = Image.fromarray(codes[0]).convert('P')
    palette.save(folder / 'p.png')
    return [('mask.mkv', (folder / 'm.mkv').read_bytes())] + [
        ('mask.png', (folder / f).read_bytes()) for f in ('m.png', 'p.png')
    ]


def image_seeds(folder):
    "Every kind of still, grey and in colour, and an animated PNG and a TIFF stack."
    frames = speckle(8)
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


def dicom_bytes(path, x, syntax='1.2.840.10008.1.2.1', pixels=None, **tags):
    "A small multi-frame ultrasound file in one of the transfer syntaxes, as bytes."
    ds, item, meta = Dataset(), Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = UID(syntax), UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.SOPClassUID, ds.PatientName, ds.PatientID = UltrasoundMultiFrameImageStorage, 'A^B', '7'
    ds.NumberOfFrames, ds.Rows, ds.Columns = x.shape[:3]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, 'RGB') if x.ndim == 4 else (1, 'MONOCHROME2')
    if x.ndim == 4:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = x.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation, ds.FrameTime = ds.BitsStored - 1, 0, '50'
    item.RegionSpatialFormat = item.RegionDataType = 1
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.RegionLocationMinY0, item.RegionLocationMaxY1 = 0, x.shape[1] - 1
    item.RegionLocationMinX0, item.RegionLocationMaxX1 = 0, x.shape[2] - 1
    item.PhysicalDeltaX = item.PhysicalDeltaY = 0.04
    ds.SequenceOfUltrasoundRegions = [item]
    ds.file_meta, ds.PixelData = meta, x.tobytes() if pixels is None else pixels
    ds['PixelData'].VR = 'OW' if ds.BitsAllocated > 8 else 'OB'
    for k, v in tags.items():
        setattr(ds, k, v)
    ds.save_as(path, enforce_file_format=True)
    return ds, path.read_bytes()


def dicom_seeds(folder):
    "Native, deflated, RLE, JPEG and JPEG 2000; grey of 8 and 16 bits, colour, and a palette."
    x, path = speckle(3, 16, 24), folder / 'a.dcm'
    ds, native = dicom_bytes(path, x)
    ds.compress('1.2.840.10008.1.2.5')
    ds.save_as(path)
    found = [native, path.read_bytes(), dicom_bytes(path, x, '1.2.840.10008.1.2.1.99')[1]]
    for syntax, kind in (('50', 'JPEG'), ('90', 'JPEG2000')):
        files = [io.BytesIO() for _ in x]
        for file, frame in zip(files, x):
            Image.fromarray(frame).save(file, kind, **dict(no_jp2=True) if kind == 'JPEG2000' else {})
        pixels = encapsulate([f.getvalue() for f in files])
        found.append(dicom_bytes(path, x, f'1.2.840.10008.1.2.4.{syntax}', pixels)[1])
    window = dict(WindowCenter='900', WindowWidth='800', RescaleSlope='2', RescaleIntercept='1')
    found += [dicom_bytes(path, y)[1] for y in (x.astype(np.uint16) * 9, np.stack([x] * 3, -1))]
    found.append(dicom_bytes(path, x.astype(np.uint16) * 9, **window)[1])
    shades = (np.arange(256).astype(np.uint16) * 257).tobytes()
    table = {f'{c}PaletteColorLookupTableData': shades for c in ('Red', 'Green', 'Blue')}
    table |= {f'{c}PaletteColorLookupTableDescriptor': [256, 0, 16] for c in ('Red', 'Green', 'Blue')}
    found.append(dicom_bytes(path, x, PhotometricInterpretation='PALETTE COLOR', **table)[1])
    return [('clip.dcm', data) for data in found]


def read_dicom_file(path):
    "As the package does, and the calibration."
    read_everything(path)
    dicom_region(path)


def archive_seeds(folder):
    "A zip and two tar files of a few small members."
    found = []
    for kind, form in (('zip', 'zip'), ('tar', 'tar'), ('tar.gz', 'gztar')):
        (inside := folder / kind / 'in' / 'deep').mkdir(parents=True)
        for k in range(3):
            (inside / f'{k}.txt').write_text('text ' * 40 * k)
        made = Path(shutil.make_archive(folder / kind / 'a', form, folder / kind / 'in'))
        found.append((f'archive.{kind}', made.read_bytes()))
    return found


def unpack(path):
    "Into a folder of its own; nothing may be written beside it."
    before = set(path.parent.iterdir())
    out = path.parent / 'unpacked'
    try:
        extract_archive(path, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        assert set(path.parent.iterdir()) == before, 'something is written outside the folder'


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


for kind in VIDEOS:
    TARGETS[f'clip-{kind}'] = Target(partial(video_seeds, kind=kind), read_everything, (ClipError,))
TARGETS['clip-image'] = Target(image_seeds, read_everything, (ClipError,))
TARGETS['clip-dicom'] = Target(dicom_seeds, read_dicom_file, (ClipError,))
TARGETS['archive'] = Target(archive_seeds, unpack, (FetchError,))
TARGETS['mask'] = Target(mask_seeds, read_codes, (ClipError,))
