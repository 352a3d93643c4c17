"Answers on the command line: odd files, odd names, odd models, and where results go."

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy.special import softmax

from lus_fastai.clip_report import answer_report, file_m_mode, heat_video, timeline
from lus_fastai.core import CLASSES
from lus_fastai.data.fan import Fan
from lus_fastai.data.store import FrameStore
from lus_fastai.models.stages import StageClassifier, StageFeatures
from lus_fastai.predict import ClipModel, ClipPrep, load_model, save_model
from lus_fastai.synth.motion import m_mode
from lus_fastai.synth.phantom import draw_patient, phantom_clip
from lus_fastai.video import Clip, read_clip, write_video

ODD = (
    'a name, with "quotes" and \'more\'',
    'two\nlines',
    'lung 🫁 ü',
    '<script>alert(1)<script>',
    '$x_$ & {y}',
)


def small_model(classes=CLASSES, **parts):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StageClassifier(StageFeatures('tf_efficientnet_lite0', weights=None), 4)
    prep = ClipPrep(size=64, frames=3)
    return ClipModel(net, classes, prep, findings=['blines'], **parts)


@pytest.fixture(scope='module')
def model():
    return small_model(scores={c: np.linspace(0, 0.6, 20) for c in CLASSES}, card=dict(licence='none'))


@pytest.fixture(scope='module')
def model_file(model, tmp_path_factory):
    file = tmp_path_factory.mktemp('model') / 'small.safetensors'
    save_model(model, file)
    return file


@pytest.fixture(scope='module')
def frames():
    return phantom_clip(draw_patient(3, 'covid', 'convex'), 0, 8, (96, 128)).frames


@pytest.fixture(scope='module')
def clip(frames, tmp_path_factory):
    path = tmp_path_factory.mktemp('clip') / 'good.mp4'
    write_video(path, frames, 8)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, model_file):
    "Call lus_predict as its console script does, in this process: exit status, stdout, stderr."

    def call(*args, model=model_file):
        script = tmp_path / 'lus_predict.py'
        code = 'from lus_fastai.cli import lus_predict\nstatus = lus_predict()'
        monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning)  # commands have their own
        monkeypatch.setattr(sys, 'argv', ['lus_predict', *map(str, args), '--model', str(model)])
        names = dict(__name__='__main__', __file__=str(script))
        capsys.readouterr()
        try:
            exec(compile(code, str(script), 'exec'), names)
            status = names['status']
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return call


def folder_of_everything(folder, clip):
    "Good clips, a broken one, an empty one, a text, hidden files, in a folder and one below."
    (folder / 'deep').mkdir(parents=True)
    shutil.copy(clip, folder / 'deep' / 'z good.mp4')
    shutil.copy(clip, folder / 'a good.mp4')
    (folder / 'broken.mp4').write_bytes(clip.read_bytes()[:700])
    (folder / 'empty.avi').touch()
    (folder / 'notes.txt').write_text('not a clip')
    (folder / '.hidden.mp4').write_text('not a clip')
    return folder


# ---- statuses ----


def test_a_process_from_a_folder_to_json(tmp_path, clip, model_file):
    folder = folder_of_everything(tmp_path / 'clips', clip)
    code = 'import sys\nfrom lus_fastai.cli import lus_predict\n'
    code += 'if __name__ == "__main__": sys.exit(lus_predict())'
    (tmp_path / 'run.py').write_text(code)
    done = subprocess.run(
        [sys.executable, 'run.py', str(folder), '--json', '--model', str(model_file), '--report', 'out.html'],
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]
    names = ['a good.mp4', 'broken.mp4', os.path.join('deep', 'z good.mp4'), 'empty.avi']
    assert [os.path.relpath(r['path'], folder) for r in rows] == names
    good = [r for r in rows if 'error' not in r]
    assert len(good) == 2 and all(
        sum(r['probabilities'].values()) == pytest.approx(1, abs=1e-3) for r in good
    )
    assert all('Not a medical device' in r['note'] for r in rows)
    assert 'broken.mp4: ' in done.stderr and 'empty.avi: the file is empty' in done.stderr
    assert 'notes' not in done.stderr and 'Traceback' not in done.stderr
    page = (tmp_path / 'out.html').read_text()
    assert '4 clips' in page and 'the file is empty' in page and str(tmp_path) not in page


def test_help_is_there_before_torch(tmp_path):
    code = 'import sys\nfrom lus_fastai.cli import lus_predict\nif __name__ == "__main__":\n'
    code += '    try: lus_predict()\n    finally: print("loaded:", {"torch", "numpy"} & set(sys.modules))'
    (tmp_path / 'run.py').write_text(code)
    command = [sys.executable, 'run.py', '--help']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'loaded: set()' in done.stdout and '--report' in done.stdout


def test_good_clips_in_words(run, clip, tmp_path):
    status, out, err = run(clip)
    line, note = out.splitlines()
    assert status == 0 and not err and note == 'For teaching. Not a medical device.'
    assert line.startswith(f'{clip}: ') and 'covid 0.' in line and 'blines 0.' in line
    status, out, err = run(clip, tmp_path / 'gone.mp4', clip, clip.parent)
    assert status == 1 and err == f'2/2 {tmp_path}/gone.mp4: no such file\n'
    assert len(out.splitlines()) == 2  # the same clip is asked about once


def test_an_interrupt(run, clip, tmp_path, monkeypatch):
    shutil.copy(clip, tmp_path / 'second.mp4')
    predict = ClipModel.predict

    def interrupted(self, path, **kw):
        if 'second' in str(path):
            raise KeyboardInterrupt
        return predict(self, path, **kw)

    monkeypatch.setattr(ClipModel, 'predict', interrupted)
    status, out, err = run(clip, tmp_path / 'second.mp4', '--report', tmp_path / 'out.html')
    assert status == 130 and out.startswith('1/2 ') and err.startswith('interrupted: ')
    assert not (tmp_path / 'out.html').exists()


def test_an_error_of_ours_in_one_clip_does_not_stop_the_rest(run, clip, tmp_path, monkeypatch):
    shutil.copy(clip, tmp_path / 'second.mp4')
    heard = []

    def once(self, *args):
        heard.append(args)
        if len(heard) == 1:
            raise KeyError('ours')
        return []

    monkeypatch.setattr(ClipModel, '_cautions', once)
    status, out, err = run(clip, tmp_path / 'second.mp4')
    assert status == 1 and "KeyError: 'ours'" in err and out.startswith('2/2 ')


@pytest.mark.parametrize(
    'args, said',
    [
        ([], 'name a clip or a folder'),
        (['.'], 'no clip below .'),
        (['{clip}', '{other}', '--map', 'map.mp4'], '--map is for one clip, and there are 2'),
        (['{clip}', '--map', 'map.avi'], 'ends in .mp4, not map.avi'),
        (['{clip}', '--map', '{clip}'], 'would replace the clip good.mp4'),
        (['{clip}', '--report', 'out.pdf'], 'ends in .html'),
        (['{clip}', '--report', '{clip}/out.html'], 'cannot be written'),
        (['{clip}', '--report', 'taken.html'], 'cannot be written'),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, clip, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken.html').mkdir()
    before = clip.read_bytes()
    status, out, err = run(*(a.format(clip=clip, other='other.mp4') for a in args))
    assert (status, out) == (2, '') and err.startswith('error: ') and said in err
    assert len(err.splitlines()) == 1 and clip.read_bytes() == before


# ---- models ----


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_models(folder, good):
    "Files that are no model, by what is said of them."
    trap = folder / 'sprung'
    (folder / 'pickle.safetensors').write_bytes(pickle.dumps(Trap(trap)))
    (folder / 'short.safetensors').write_bytes(good.read_bytes()[:-5000])
    (folder / 'empty.safetensors').touch()
    facts = json.dumps(dict(format=99))
    save_file(dict(a=torch.zeros(1)), folder / 'later.safetensors', dict(lus_fastai=facts))
    save_file(dict(a=torch.zeros(1)), folder / 'weights.safetensors')
    weights, facts = load_parts(good)
    facts['classes'] = facts['classes'][:2]
    save_file(weights, folder / 'classes.safetensors', dict(lus_fastai=json.dumps(facts)))
    names = dict(pickle='no safetensors', short='cut short', empty='no safetensors', later='format 99')
    return trap, names | dict(weights='no model', classes='do not fit', gone='no model at')


def load_parts(file):
    from safetensors import safe_open

    with safe_open(file, 'pt') as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()['lus_fastai'])


def test_a_file_that_is_no_model_is_a_mistake(run, clip, tmp_path, model_file):
    trap, models = bad_models(tmp_path, model_file)
    for name, said in models.items():
        status, out, err = run(clip, model=tmp_path / f'{name}.safetensors')
        assert (status, out) == (2, '') and err.startswith('error: ') and said in err, (name, err)
        assert 'Traceback' not in err
    assert not trap.exists()


def test_class_names_of_all_sorts(run, clip, tmp_path):
    odd = '<b>&"x"', '$\\frac{$ & $', '_hidden 🫁'
    save_model(small_model(odd), tmp_path / 'odd.safetensors')
    out = tmp_path / 'out.html'
    status, said, err = run(
        clip, '--report', out, '--map', tmp_path / 'm.mp4', model=tmp_path / 'odd.safetensors'
    )
    assert status == 0 and all(name in said for name in odd), err
    assert '<b>&' not in out.read_text() and '&lt;b&gt;&amp;' in out.read_text()


# ---- clips ----


def test_names_are_one_line_and_no_program(run, clip, tmp_path):
    for stem in ODD:
        shutil.copy(clip, tmp_path / f'{stem}.mp4')
    status, out, err = run(tmp_path, '--report', tmp_path / 'out.html')
    assert status == 0 and not err and len(out.splitlines()) == len(ODD) + 2
    page = (tmp_path / 'out.html').read_text()
    assert '<script' not in page and all(
        x in page for x in ('&lt;script&gt;', 'two\\nlines', '🫁', '$x_$ &amp;')
    )
    status, out, err = run(tmp_path, '--json')
    assert {Path(json.loads(x)['path']).stem for x in out.splitlines()} == set(ODD)


def test_a_name_that_is_no_text(run, clip, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/\xff\xfe.mp4')
    try:
        shutil.copy(clip, odd)
    except OSError:
        pytest.skip('this file system takes text only')
    for extra in ((), ('--json',)):
        status, out, err = run(odd, '--report', tmp_path / 'out.html', *extra)
        assert status == 0 and 'udcff' in out, err
    assert 'udcff' in (tmp_path / 'out.html').read_text()


def test_an_output_that_has_no_such_letters(run, clip, tmp_path, monkeypatch):
    import io

    shutil.copy(clip, tmp_path / f'{ODD[2]}.mp4')
    narrow = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.setattr(sys, 'stdout', narrow)
    status, _, err = run(tmp_path / f'{ODD[2]}.mp4')
    assert status == 0, err
    narrow.seek(0)
    assert '\\U0001fac1' in narrow.read()


def some_clips(folder, frames):
    "Clips that are unusual, but clips."
    tall = np.zeros((6, 320, 180), np.uint8)
    tall[:, 100:196, 26:154] = frames[:6]
    write_video(folder / 'portrait.mp4', tall, 8)
    Image.fromarray(frames[0]).save(folder / 'still.png')
    rng = np.random.default_rng(0)
    broken = frames[0].astype(np.float32)
    broken[rng.random(broken.shape) < 0.1] = np.nan
    Image.fromarray(broken).save(folder / 'nan.tiff')
    Image.fromarray(np.full((90, 90), 40, np.uint8)).save(folder / 'grey.png')
    Image.fromarray(frames[0][:9, :9]).save(folder / 'tiny.png')


def test_odd_clips_are_answered_or_refused(run, frames, tmp_path):
    some_clips(tmp_path, frames)
    status, out, err = run(tmp_path, '--json', '--report', tmp_path / 'out.html')
    found = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    rows = {Path(r['path']).stem: r for r in found}
    assert status == 1 and set(rows) == {'portrait', 'still', 'nan', 'grey', 'tiny'}, err
    assert 'nan.tiff: ValueError: some of its pixels are NaN' in err and 'warning' not in err
    assert not rows['portrait']['refused'] and rows['portrait']['probabilities']
    assert 'a single frame' in rows['still']['cautions'][0]
    for name in ('grey', 'tiny'):
        assert rows[name]['label'] is None and 'no fan was found' in rows[name]['refused'][0], rows[name]
    page = (tmp_path / 'out.html').read_text()
    assert 'The clip is refused: ' in page and 'A single frame' in page


def test_a_map_of_what_has_none(run, frames, tmp_path):
    some_clips(tmp_path, frames)
    status, out, err = run(tmp_path / 'grey.png', '--map', tmp_path / 'map.mp4')
    assert status == 0 and 'no map: no fan was found' in err and not (tmp_path / 'map.mp4').exists()
    status, out, err = run(tmp_path / 'still.png', '--map', tmp_path / 'new' / 'map.mp4')
    assert status == 0 and 'map.mp4' in out and len(read_clip(tmp_path / 'new' / 'map.mp4')) == 1


def test_nan_pixels_in_memory(model):
    unready = Clip(np.full((3, 60, 60), np.nan), np.arange(3) / 3, np.arange(3), 'nan.mp4')
    with pytest.raises(ValueError, match='NaN'):
        timeline(model, unready)


# ---- what is shown ----


def test_the_map_plays_in_browsers(model, clip, tmp_path):
    import av

    answer = heat_video(model, clip, tmp_path / 'map.mp4')
    assert answer.probabilities.equals(model.predict(clip).probabilities)
    with av.open(str(tmp_path / 'map.mp4')) as box:
        stream = box.streams.video[0]
        form = stream.codec_context.name, stream.codec_context.pix_fmt
        images = [f.to_ndarray(format='rgb24', threads=1).astype(int) for f in box.decode(stream)]
    assert form == ('h264', 'yuv420p') and len(images) == 8
    top = images[0][:-76] if len(images[0]) > 76 else images[0]
    assert (np.ptp(top, axis=2) > 30).any()  # there is colour
    raw = (tmp_path / 'map.mp4').read_bytes()
    assert raw.index(b'moov') < raw.index(b'mdat')  # it plays before it has come whole


def test_after_the_last_sampled_frame_there_is_no_map(model, frames, tmp_path):
    short = replace(model, prep=replace(model.prep, max_frames=2))
    long = Clip(np.resize(frames, (24, *frames.shape[1:])), np.arange(24) / 8, np.arange(24), 'x.mp4')
    heat_video(short, long, tmp_path / 'map.mp4')
    import av

    with av.open(str(tmp_path / 'map.mp4')) as box:
        images = [f.to_ndarray(format='rgb24', threads=1).astype(int) for f in box.decode(video=0)]
    tinted = [(np.ptp(x[:-80], axis=2) > 30).any() for x in images]
    assert tinted[0] and not any(tinted[8:]) and len(images) == 24


def test_a_timeline_is_the_frames_logits(model, clip):
    warm = replace(model, temperature=1.7)
    table = timeline(warm, clip)
    everything = replace(model.prep, frames=30)(clip)
    logits = model.frame_logits(everything.images)
    assert list(table['time']) == list(everything.times)
    expected = softmax(logits[:, :3] / 1.7, axis=1)
    np.testing.assert_allclose(table[[f'p_{c}' for c in CLASSES]], expected, atol=1e-9)
    np.testing.assert_allclose(table['p_blines'], 1 / (1 + np.exp(-logits[:, 3])), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(1, 6), st.floats(-20, 20), st.booleans())
def test_m_mode_of_a_pattern_known_by_hand(beam, n, flare, convex):
    "Grey that is the depth gives a ramp down, the frame's number a ramp to the right."
    if convex:
        fan = Fan('convex', (120, 160), 20, 110, -30, 30, 80, 5)
    else:
        fan = Fan('linear', (120, 160), 10, 110, 40, 120, flare=flare)
    depth, _ = fan.coordinates(np.arange(160) + 0.5, np.arange(120)[:, None] + 0.5)
    down = np.clip(depth * 200, 0, 255).round().astype(np.uint8)
    images = np.stack([down // 2 + k * 20 for k in range(n)])
    clip = Clip(images, np.arange(n) / 10, np.arange(n), 'x.mp4')
    strip = file_m_mode(clip, fan, beam)
    rows = len(strip.image)
    expected = (np.arange(rows) + 0.5)[:, None] / rows * 100 + 20 * np.arange(n)
    np.testing.assert_allclose(strip.image[2:-2], expected[2:-2], atol=2.5)
    assert strip.image.dtype == np.uint8 and (strip.image == m_mode(clip, beam, fan).image).all()


def test_a_clip_that_has_gone_is_still_reported(model, clip, tmp_path):
    gone = tmp_path / 'gone.mp4'
    shutil.copy(clip, gone)
    answer = model.predict(gone)
    gone.unlink()
    page = answer_report(model, answer, tmp_path / 'out.html').read_text()
    assert 'The rest could not be shown: ' in page and 'no such file' in page


def test_a_page_opens_without_a_network_and_fits_a_phone(model, model_file, clip, frames, tmp_path):
    import playwright.sync_api as api

    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium:
        pytest.skip('no chromium on the PATH: apt-get install chromium')
    some_clips(tmp_path, frames)
    odd = tmp_path / f'{ODD[3]} {"long" * 30}.mp4'
    shutil.copy(clip, odd)
    judge = load_model(model_file)
    answers = [judge.predict(p) for p in (odd, tmp_path / 'still.png', tmp_path / 'grey.png')]
    one, many = tmp_path / 'one.html', tmp_path / 'many.html'
    answer_report(judge, answers[0], one)
    answer_report(judge, answers, many, [('broken.mp4', f'it ends {"early" * 40}')])
    said, asked = [], []
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=390, height=800))
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('dialog', lambda dialog: said.append(dialog.message))
        page.on('request', lambda request: asked.append(request.url))
        for file, figures in ((one, 4), (many, 6)):
            page.goto(file.as_uri())
            assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), file.name
            shown = page.locator('svg.fig')
            assert shown.count() == figures and all(x.get_attribute('aria-label') for x in shown.all())
            assert page.locator('text=Not a medical device').count() >= 3
        browser.close()
    assert not said and [a for a in asked if not a.startswith('data:')] == [one.as_uri(), many.as_uri()]


# ---- a folder of broken clips ----


def broken_clips(folder, clip, n=300):
    "A whole clip, and n small files that are none: empty, cut, of random bytes, or with a right beginning."
    folder.mkdir()
    shutil.copy(clip, folder / 'whole.mp4')
    rng, heads = np.random.default_rng(0), dict(mp4=clip.read_bytes()[:900])
    for kind in ('png', 'jpg', 'gif', 'tif', 'webp'):
        Image.fromarray(rng.integers(0, 255, (24, 24)).astype(np.uint8)).save(folder / f'a.{kind}')
        heads[kind] = (folder / f'a.{kind}').read_bytes()[:200]
        (folder / f'a.{kind}').unlink()
    for i in range(n):
        kind = list(heads)[i % len(heads)]
        noise, cut = rng.bytes(100), heads[kind][: rng.integers(4, 200)]
        data = (b'', cut, noise, heads[kind][:8] + noise)[i // len(heads) % 4]
        (folder / f'{i:04d}.{kind}').write_bytes(data)
    return folder


def resident():
    "Megabytes that this process holds."
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='memory is read from /proc')
def test_a_folder_of_broken_clips_is_a_line_each_in_flat_memory(tmp_path, clip, run):
    folder = broken_clips(tmp_path / 'clips', clip)
    broken = sorted(p.name for p in folder.glob('0*'))
    run(folder, '--json')  # what is imported late is there
    held, start = resident(), time.process_time()
    status, out, err = run(folder)
    assert status == 1 and resident() - held < 20 and time.process_time() - start < 60
    lines = [line for line in err.splitlines() if str(folder) in line]
    assert [Path(line.split(': ')[0].split(' ', 1)[1]).name for line in lines] == broken
    assert all(len(line.split(': ', 1)[1]) > 8 for line in lines)  # with a reason
    assert len(out.splitlines()) == 2 and 'whole.mp4' in out
    _, out, _ = run(folder, '--json')
    said = [json.loads(line) for line in out.splitlines()]
    assert [Path(x['path']).name for x in said if 'error' in x] == broken and len(said) == len(broken) + 1


def test_a_store_skips_broken_clips_with_a_reason_each(tmp_path, clip):
    folder = broken_clips(tmp_path / 'clips', clip)
    rows = [dict(path=str(p), patient=p.stem) for p in sorted(folder.iterdir())]
    table = pd.DataFrame(rows).assign(kind='video', label='a', source='s', probe='convex')
    store = FrameStore.build(table, tmp_path / 'store', size=(32, 32), workers=0)
    assert set(store.frames['patient']) == {'whole'} and len(store.skipped) == 300
    assert store.skipped['reason'].str.len().min() > 8
