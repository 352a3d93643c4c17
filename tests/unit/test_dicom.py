"DICOM: transfer syntaxes, colour spaces, calibration, limits, and that no name of a patient leaves a file."

import io
import subprocess
import sys
import warnings
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom.data
import pydicom.filereader
import pytest
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

from lus_fastai.core import write_table
from lus_fastai.data.dicom import Region, deidentify, dicom_fan, dicom_region
from lus_fastai.data.fan import phantom_fan
from lus_fastai.data.folders import read_folder
from lus_fastai.data.store import FrameStore
from lus_fastai.synth.phantom import draw_patient, phantom_clip
from lus_fastai.video import ClipError, colour_share, decode_frames, read_clip, sample_clip

SAMPLES = Path(pydicom.data.__file__).parent / 'test_files'
NAME, NUMBER, DATE = 'Zwiebelfisch^Anneliese', 'PID-7716-ZW', '19481224'
PLUGINS = all(find_spec(m) for m in ('pylibjpeg', 'libjpeg', 'openjpeg'))


def write(path, x, kind='MONOCHROME2', syntax=ExplicitVRLittleEndian, pixels=None, **tags):
    "A multi-frame ultrasound file whose patient is named all over its header; x: (n, h, w) or (n, h, w, 3)."
    ds, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = UID(syntax), UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = NAME, NUMBER, DATE
    ds.StudyDate, ds.InstitutionName, ds.ImageComments = DATE, NAME, f'{NAME} {NUMBER}'
    ds.OtherPatientNames, ds.SOPInstanceUID = NAME, meta.MediaStorageSOPInstanceUID
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.NumberOfFrames, ds.Rows, ds.Columns = x.shape[:3]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, kind) if x.ndim == 4 else (1, kind)
    if x.ndim == 4:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = x.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation, ds.FrameTime = ds.BitsStored - 1, 0, '50'
    ds.file_meta, ds.PixelData = meta, x.tobytes() if pixels is None else pixels
    ds['PixelData'].VR = 'OW' if ds.BitsAllocated > 8 else 'OB'
    for k, v in tags.items():
        setattr(ds, k, v)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return ds


def scan(n=4, h=40, w=56):
    y, x = np.mgrid[:h, :w]
    spot = [200 * np.exp(-((y - 20) ** 2 + (x - 20 - 3 * k) ** 2) / 90) for k in range(n)]
    return np.array(spot).astype(np.uint8)


def packed(frames, kind, **how):
    files = [io.BytesIO() for _ in frames]
    for file, x in zip(files, frames):
        Image.fromarray(x).save(file, kind, **how)
    return encapsulate([f.getvalue() for f in files])


@pytest.mark.parametrize(
    'syntax, kind, how, off',
    [
        ('1.2.840.10008.1.2.4.50', 'JPEG', dict(quality=95), 4),
        ('1.2.840.10008.1.2.4.90', 'JPEG2000', dict(irreversible=False, no_jp2=True), 0),
        ('1.2.840.10008.1.2.4.91', 'JPEG2000', dict(irreversible=True, no_jp2=True), 2),
    ],
)
def test_compressed_frames(tmp_path, syntax, kind, how, off):
    x = scan()
    write(tmp_path / 'a.dcm', x, syntax=syntax, pixels=packed(x, kind, **how))
    c = read_clip(tmp_path / 'a.dcm')
    assert np.abs(c.frames.astype(int) - x).max() <= off
    np.testing.assert_allclose(c.times, np.arange(4) * 0.05)
    np.testing.assert_array_equal(sample_clip(tmp_path / 'a.dcm', rate=10).index, [0, 2])


def test_run_lengths(tmp_path):
    ds = write(tmp_path / 'a.dcm', scan())
    ds.compress('1.2.840.10008.1.2.5')
    ds.save_as(tmp_path / 'rle.dcm')
    np.testing.assert_array_equal(read_clip(tmp_path / 'rle.dcm').frames, scan())
    np.testing.assert_array_equal(
        [x for *_, x in decode_frames(tmp_path / 'rle.dcm', lambda k, t: True, codes=True)], scan()
    )


SAME = {  # what pydicom ships in several encodings, without loss
    'rgb': ['SC_rgb_rle.dcm', 'SC_rgb_rle_16bit.dcm', 'SC_rgb_rle_32bit.dcm', 'SC_rgb_jpeg_gdcm.dcm'],
    'mr': ['MR_small.dcm', 'MR_small_RLE.dcm', 'MR_small_bigendian.dcm', 'MR_small_implicit.dcm']
    + ['MR_small_jp2klossless.dcm', 'MR_small_jpeg_ls_lossless.dcm'],
    'dose': ['rtdose.dcm', 'rtdose_rle.dcm', 'rtdose_expb.dcm'],
}
NEED = {'SC_rgb_jpeg_gdcm.dcm', 'MR_small_jpeg_ls_lossless.dcm'}


@pytest.mark.parametrize('same', SAME)
def test_one_image_in_every_transfer_syntax(same):
    first = read_clip(SAMPLES / SAME[same][0]).frames
    for name in SAME[same][1:]:
        if name in NEED and not PLUGINS:
            with pytest.raises(ClipError, match=r'JPEG.*pip install .lus_fastai\[dicom\]'):
                read_clip(SAMPLES / name)
        else:
            np.testing.assert_array_equal(read_clip(SAMPLES / name).frames, first, err_msg=name)


def test_colour_spaces(tmp_path):
    x = scan()
    y = np.stack([x, np.full_like(x, 128), np.full_like(x, 128)], -1)
    flat = y.reshape(4, 40, 28, 2, 3)  # two pixels share their colour: Y Y Cb Cr
    pairs = np.concatenate([flat[..., 0], flat[..., 0, 1:]], -1)
    write(tmp_path / 'rgb.dcm', np.stack([x] * 3, -1), 'RGB')
    write(tmp_path / 'full.dcm', y, 'YBR_FULL')
    write(tmp_path / 'pairs.dcm', y, 'YBR_FULL_422', pixels=pairs.tobytes())
    write(tmp_path / 'white.dcm', 255 - x, 'MONOCHROME1')
    shades = (np.arange(256)[::-1].astype(np.uint16) * 257).tobytes()  # a palette from white to black
    colours = {f'{c}PaletteColorLookupTableData': shades for c in ('Red', 'Green', 'Blue')}
    colours |= {f'{c}PaletteColorLookupTableDescriptor': [256, 0, 16] for c in ('Red', 'Green', 'Blue')}
    write(tmp_path / 'palette.dcm', 255 - x, 'PALETTE COLOR', **colours)
    for name in ('rgb', 'full', 'pairs', 'white', 'palette'):
        got = read_clip(tmp_path / f'{name}.dcm').frames
        assert np.abs(got.astype(int) - x).max() <= 1, name
        assert colour_share(tmp_path / f'{name}.dcm') == 0


def test_fewer_bits_than_eight_fill_the_range(tmp_path):
    write(tmp_path / 'a.dcm', scan() // 4, BitsStored=6, HighBit=5)
    x = scan() // 4
    np.testing.assert_array_equal(read_clip(tmp_path / 'a.dcm').frames, np.rint(x / x.max() * 255))


def peak_of(path):
    "Megabytes that reading a file takes on top, and what was said."
    code = (
        'import resource, sys, pydicom.pixels\nfrom lus_fastai.video import read_clip, ClipError\n'
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n'
        'before, said = peak(), "read"\n'
        'try: read_clip(sys.argv[1])\nexcept ClipError as e: said = str(e)\n'
        'print(peak() - before, said)\n'
    )
    done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True, check=True)
    grown, _, said = done.stdout.partition(' ')
    return float(grown), said


def test_a_small_file_that_declares_much_is_refused_at_once(tmp_path):
    write(tmp_path / 'frames.dcm', scan(), NumberOfFrames=200_000_000)
    write(tmp_path / 'pixels.dcm', scan(), Rows=65_000, Columns=65_000)
    x = scan(1)
    write(
        tmp_path / 'inside.dcm',
        x,
        syntax='1.2.840.10008.1.2.5',
        Rows=60_000,
        Columns=60_000,
        pixels=encapsulate([b'\0' * 80]),
    )
    write(tmp_path / 'whole.dcm', x, syntax='1.2.840.10008.1.2.1.99')
    raw = (tmp_path / 'whole.dcm').read_bytes()
    start = 144 + pydicom.filereader.read_file_meta_info(tmp_path / 'whole.dcm')[0x20000].value
    pack, blank = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20)
    body = pack.compress(zlib.decompress(raw[start:], -15)) + b''.join(
        pack.compress(blank) for _ in range(1100)
    )
    (tmp_path / 'deflated.dcm').write_bytes(raw[:start] + body + pack.flush())
    np.testing.assert_array_equal(read_clip(tmp_path / 'whole.dcm').frames, x)
    for name, what in (
        ('frames', 'frames'),
        ('pixels', 'pixels'),
        ('inside', 'pixels'),
        ('deflated', 'bytes'),
    ):
        grown, said = peak_of(tmp_path / f'{name}.dcm')
        assert f'{name}.dcm: it asks for' in said and f'LUS_LIMITS="{what}=' in said, said
        assert grown < 150, (name, grown)


def test_fewer_frames_than_declared(tmp_path):
    write(tmp_path / 'a.dcm', scan(), NumberOfFrames=9)
    x = scan()
    j2k = packed(x, 'JPEG2000', no_jp2=True)
    write(tmp_path / 'b.dcm', x, syntax='1.2.840.10008.1.2.4.90', pixels=j2k, NumberOfFrames=9)
    for name in 'ab':
        with pytest.raises(ClipError):
            read_clip(tmp_path / f'{name}.dcm')


# ---- privacy ----


@pytest.mark.parametrize(
    'tags',
    [
        dict(FrameTime=NAME),
        dict(NumberOfFrames=NUMBER),
        dict(WindowCenter=NAME, WindowWidth=DATE),
        dict(PhotometricInterpretation=NAME),
        dict(RescaleSlope=NAME),
        dict(CineRate=NUMBER),
        dict(FrameTimeVector=[NAME, NUMBER]),
    ],
)
def test_an_error_does_not_say_what_the_header_says(tmp_path, tags, capfd, recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import pydicom.config

        pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
        try:
            ds = write(tmp_path / 'a.dcm', scan())
            for k, v in tags.items():
                vr = pydicom.datadict.dictionary_VR(k)
                text = '\\'.join(v) if isinstance(v, list) else v
                ds[k] = pydicom.dataelem.DataElement(k, 'LO', text)
                ds[k].VR = vr if vr == 'CS' else 'LO'
            ds.save_as(tmp_path / 'a.dcm')
        finally:
            pydicom.config.settings.writing_validation_mode = None
    with pytest.raises(ClipError) as e:
        read_clip(tmp_path / 'a.dcm')
    out, err = capfd.readouterr()
    chain, said = e.value, [out, err, *map(str, (w.message for w in recwarn.list))]
    while chain is not None:
        said.append(f'{chain} {chain.args}')
        chain = chain.__cause__
    for secret in (NAME, NUMBER, 'Zwiebelfisch'):
        assert not any(secret in s for s in said), said
    assert next(iter(tags)) in str(e.value) or 'colour space' in str(e.value)


def test_damaged_pixels_do_not_bring_out_the_header(tmp_path, capfd):
    x = scan()
    write(tmp_path / 'a.dcm', x, syntax='1.2.840.10008.1.2.4.50', pixels=encapsulate([NAME.encode() * 3] * 4))
    with pytest.raises(ClipError, match='cannot be decoded') as e:
        read_clip(tmp_path / 'a.dcm')
    assert e.value.__cause__ is None and 'Zwiebel' not in str(e.value) + ''.join(capfd.readouterr())


def banner(x, text):
    "Frames with a line of text above them."
    line = Image.new('L', (x.shape[2], 16))
    ImageDraw.Draw(line).text((2, 2), text, fill=240)
    return np.concatenate([np.repeat(np.asarray(line)[None], len(x), 0), x], 1)


def region(top, bottom, left, right, mm=(0.5, 0.25), **other):
    item = Dataset()
    item.RegionSpatialFormat = item.RegionDataType = 1
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.RegionLocationMinY0, item.RegionLocationMaxY1 = top, bottom - 1
    item.RegionLocationMinX0, item.RegionLocationMaxX1 = left, right - 1
    item.PhysicalDeltaY, item.PhysicalDeltaX = mm[0] / 10, mm[1] / 10
    for k, v in other.items():
        setattr(item, k, v)
    return item


@pytest.fixture(scope='module')
def named_clips(tmp_path_factory):
    "Three DICOM files of two patients, whose names are in the header, in the pixels, and in file names."
    folder = tmp_path_factory.mktemp('clips')
    frames = phantom_clip(draw_patient(3, probe='convex'), n=6, size=(120, 120)).frames
    x = banner(frames, 'ZWIEBELFISCH A 1948')
    box = [region(16, 136, 0, 120)]
    write(folder / f'a/{NAME}.dcm', x, SequenceOfUltrasoundRegions=box)
    write(folder / 'a/2.dcm', x[::-1].copy(), SequenceOfUltrasoundRegions=box)
    write(folder / 'b/3.dcm', x[:3].copy(), SequenceOfUltrasoundRegions=box, PatientID='other')
    write(folder / 'b/bad.dcm', x, SequenceOfUltrasoundRegions=box, NumberOfFrames=99)
    return folder


def test_calibration_gives_the_fan_and_millimetres(named_clips):
    path = named_clips / f'a/{NAME}.dcm'
    assert dicom_region(path) == Region(16, 136, 0, 120, 0.5, 0.25)
    fan, down, across = dicom_fan(path)
    true = phantom_fan(draw_patient(3, probe='convex'), (120, 120))
    assert fan.kind == 'convex' and fan.size == (136, 120) and (down, across) == (0.5, 0.25)
    seen = fan.mask()[16:]
    assert (seen & true.mask()).sum() / (seen | true.mask()).sum() > 0.93


def test_which_region_counts_and_which_cannot_be(tmp_path):
    trace = region(0, 40, 0, 56, RegionDataType=2)
    write(
        tmp_path / 'a.dcm',
        scan(),
        SequenceOfUltrasoundRegions=[trace, region(0, 9, 0, 9), region(2, 38, 4, 50)],
    )
    assert dicom_region(tmp_path / 'a.dcm') == Region(2, 38, 4, 50, 0.5, 0.25)
    write(tmp_path / 'none.dcm', scan(), SequenceOfUltrasoundRegions=[trace])
    assert dicom_region(tmp_path / 'none.dcm') is None
    for name, wrong in (('out', region(0, 900, 0, 56)), ('flat', region(0, 40, 0, 56, mm=(0, 1)))):
        write(tmp_path / f'{name}.dcm', scan(), SequenceOfUltrasoundRegions=[wrong])
        with pytest.raises(ClipError, match='calibration'):
            dicom_region(tmp_path / f'{name}.dcm')
    lacking = region(0, 40, 0, 56)
    del lacking.RegionLocationMaxX1
    write(tmp_path / 'lacking.dcm', scan(), SequenceOfUltrasoundRegions=[lacking])
    with pytest.raises(ClipError, match='regions cannot be read'):
        dicom_region(tmp_path / 'lacking.dcm')


def secrets_in(folder, *said):
    "Which of the planted words are in names or bytes below a folder, packed or not, or in what was said."
    texts = [s.encode() if isinstance(s, str) else s for s in said]
    for p in Path(folder).rglob('*'):
        texts.append(str(p.relative_to(folder)).encode())
        if p.is_file():
            texts.append(p.read_bytes())
            if zipfile.is_zipfile(p):
                with zipfile.ZipFile(p) as z:
                    texts += [z.read(n) for n in z.namelist()]
    return {
        w for w in ('Zwiebel', 'Anneliese', NUMBER, DATE) for t in texts if w.lower().encode() in t.lower()
    }


def test_copies_without_names(named_clips, tmp_path, capfd):
    table = deidentify(named_clips, tmp_path / 'out')
    said = capfd.readouterr()
    assert len(table) == 3 and sorted(table['patient'].value_counts()) == [1, 2]
    assert (table['down'] == 0.5).all() and (table['across'] == 0.25).all()
    assert '1 of 4 file(s) left out: it ends early' in said.out
    assert secrets_in(tmp_path / 'out', *said) == set()
    assert secrets_in(named_clips) >= {'Zwiebel', NUMBER, DATE}  # the search finds what is there
    whole = read_clip(named_clips / 'a/2.dcm').frames[:, 16:]
    letters = read_clip(named_clips / 'a/2.dcm').frames[0, :16] > 100
    for name in table['file']:
        copy = read_clip(tmp_path / 'out' / name).frames
        assert copy.shape[1] <= 120 and copy.max() > 60  # the line above is gone, the lung is not
        assert (copy > 0).mean() > 0.3
    assert letters.any() and whole.max() > 60


def test_deidentify_is_a_command(named_clips, tmp_path, capsys):
    from lus_fastai.cli import lus_data

    lus_data('deidentify', str(named_clips), str(tmp_path / 'out'))
    assert '3 copies of 2 patients' in capsys.readouterr().out
    for folder, out in ((None, str(tmp_path / 'x')), (str(named_clips), None), ('nowhere', 'x')):
        with pytest.raises(ValueError, match='lus_data deidentify CLIPS'):
            lus_data('deidentify', folder, out)
    with pytest.raises(ValueError, match='not below'):
        deidentify(named_clips, named_clips / 'out')
    with pytest.raises(ValueError, match='new or empty'):
        deidentify(named_clips, tmp_path / 'out')


def test_a_name_in_a_header_reaches_no_table_and_no_store(named_clips, tmp_path, capfd):
    "Files named by numbers, as scanners do: what is written of them knows no patient."
    clips = tmp_path / 'clips'
    for k, p in enumerate(sorted(named_clips.rglob('*.dcm'))):
        (to := clips / ('covid', 'regular')[k % 2] / f'IM{k:04d}.dcm').parent.mkdir(
            parents=True, exist_ok=True
        )
        to.write_bytes(p.read_bytes())
    table = read_folder(clips, label='folder', patient='file')
    write_table(table, tmp_path / 'written/table.csv')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        store = FrameStore.build(table, tmp_path / 'written/store', size=(32, 32), workers=0)
    said = [*capfd.readouterr(), *(str(w.message) for w in caught), repr(store), table.to_string()]
    assert len(store) > 0 and secrets_in(tmp_path / 'written', *said) == set()
