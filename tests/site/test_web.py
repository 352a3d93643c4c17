"The page that runs a model in the browser: a real Chromium opens the file, and answers as Python does."

import hashlib
import json
import re
import shutil
import subprocess

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lus_fastai.core import CLASSES
from lus_fastai.data.fan import add_overlays, crop_to_fan, find_fan
from lus_fastai.export import web_page, web_runtime
from lus_fastai.models.stages import StageClassifier, StageFeatures
from lus_fastai.predict import ClipModel, ClipPrep, Familiar
from lus_fastai.synth.phantom import draw_patient, phantom_clip
from lus_fastai.video import Clip, resize_frame, write_video

pytestmark = pytest.mark.slow
CLIPS = 10
WAIT = 60_000  # milliseconds, for a machine that is busy


def phantom(seed, n=6, size=(160, 192)):
    "Frames of a simulated patient; every fourth has a linear probe."
    patient = draw_patient(300 + seed, None, 'linear' if seed % 4 == 3 else 'convex')
    return phantom_clip(patient, seed, n=n, size=size).frames


def write_clip(path, frames, rate):
    "Frames without loss as GIF, PNG or WebP, or as a video, by the suffix."
    if path.suffix == '.mp4':
        return write_video(path, frames, rate)
    first, *others = [Image.fromarray(x) for x in frames]
    exact = dict(lossless=True, exact=True) if path.suffix == '.webp' else {}
    first.save(path, save_all=True, append_images=others, duration=round(1000 / rate), **exact)


@pytest.fixture(scope='module')
def model():
    "A small network that has learned nothing, with all that a finished model has; it is undecided at times."
    prep = ClipPrep(size=96)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = StageClassifier(StageFeatures('tf_efficientnet_lite0', (0, 1), weights=None), 4)
    seen = [
        prep(Clip(x, np.arange(2.0), np.arange(2), 'seen')).images[0] for x in map(phantom, range(4), [2] * 4)
    ]
    with torch.no_grad():
        x = torch.tensor(np.stack(seen))[:, None] / 255
        net.head.weight *= 30
        net.head.bias -= net(x).mean(0)
        features = net.features(x).double().numpy()
    known = np.eye(features.shape[1])[:, :5]
    familiar = Familiar(features.mean(0), 1 / features.std(0), known, 9.0, 7.0)
    scores = {c: np.linspace(0, 0.85, 12) for c in CLASSES}
    parts = dict(temperature=1.5, scores=scores, familiar=familiar, card=dict(title='a test'))
    return ClipModel(net, CLASSES, prep, ['blines'], **parts)


@pytest.fixture(scope='module')
def site(model, tmp_path_factory):
    "The page's file, the page in a browser, and the addresses that it asked for."
    import playwright.sync_api as api

    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium:
        pytest.skip('no chromium on the PATH: apt-get install chromium')
    if not shutil.which('npm'):
        pytest.skip('no npm on the PATH: apt-get install npm')
    file = web_page(model, tmp_path_factory.mktemp('web') / 'page.html', web_runtime())
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page, asked = browser.new_page(viewport=dict(width=1000, height=900)), []
        page.on('request', lambda r: asked.append(r.url))
        page.on('pageerror', lambda e: asked.append(f'error: {e}'))
        page.goto(file.as_uri())
        yield file, page, asked
        browser.close()


def answer(page, file=None):
    "What the page says of a file, or of its own clip: title, reasons, probabilities by name, seconds."
    if file is None:
        page.click('#phantom')
    else:
        page.set_input_files('#file', file)
    page.wait_for_selector('body[data-state=done]', timeout=WAIT)
    bars = page.locator('.bars li').all()
    numbers = {b.get_attribute('data-name'): float(b.get_attribute('data-value')) for b in bars}
    reasons = page.locator('#reasons li').all_text_contents()
    seconds = float(page.locator('body').get_attribute('data-seconds'))
    return page.locator('#answer-title').text_content(), reasons, numbers, seconds


def test_probabilities_are_those_of_python(site, model, tmp_path):
    _, page, _ = site
    titles, refused = set(), 0
    for k in range(CLIPS):
        file = tmp_path / f'{k}{(".gif", ".png", ".webp", ".mp4")[k % 4]}'
        frames = phantom(k, 1 if k == 5 else 7, ((160, 192), (128, 128), (220, 180))[k % 3])
        write_clip(file, frames, (5, 10)[k % 2])
        title, reasons, numbers, _ = answer(page, file)
        here = model.predict(file, heat=False)
        expected = {**here.probabilities, **here.findings}
        assert max(abs(numbers[name] - expected[name]) for name in expected) < 1e-4, file.name
        assert title == (here.label or 'I do not know')
        assert len(reasons) == len(here.refused) + len(here.cautions)
        titles.add(title)
        refused += bool(here.refused)
    assert len(titles) > 1 and 0 < refused < CLIPS  # the comparison is one of several answers


def test_a_clip_of_five_seconds(site, tmp_path):
    _, page, _ = site
    write_clip(tmp_path / 'five.mp4', phantom(1, 100, (256, 256)), 20)
    seconds = answer(page, tmp_path / 'five.mp4')[3]
    print(f'a clip of five seconds: {seconds:.1f} s')
    assert (
        page.locator('#clip-name').text_content().startswith('five.mp4: 15 sampled frames over 4.7 seconds')
    )
    assert len(page.locator('#chart polyline').first.get_attribute('points').split()) == 15


def test_what_is_no_clip_is_told(site, tmp_path):
    _, page, _ = site
    (tmp_path / 'letter.mp4').write_text('Dear colleague, please find the clip attached.')
    (tmp_path / 'empty.mp4').touch()
    write_clip(tmp_path / 'cut.png', phantom(0), 5)
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'cut.png').read_bytes()[:300])
    (tmp_path / 'scan.dcm').write_bytes(bytes(128) + b'DICM' + bytes(64))
    said = dict(letter='cannot play it', empty='file is empty', cut='is damaged', scan='DICOM')
    for file in tmp_path.iterdir():
        answer(page, file)
        assert said[file.stem] in page.locator('#fault').text_content()
        assert page.locator('#fault').is_visible() and not page.locator('#answer').is_visible()
    Image.new('L', (64, 64), 90).save(tmp_path / 'grey.png')
    title, reasons, _, _ = answer(page, tmp_path / 'grey.png')
    assert title == 'I do not know' and 'No fan was found' in reasons[0]
    assert not page.locator('#fault').is_visible() and not page.locator('#numbers').is_visible()


def test_colour_is_refused(site, model, tmp_path):
    _, page, _ = site
    grey = phantom(0, 1)[0]
    coloured = np.stack([grey] * 3, 2)
    coloured[60:110, 70:120] = 200, 30, 30  # as colour Doppler has it
    for name, x, reason in (('doppler', coloured, True), ('grey', np.stack([grey] * 3, 2), False)):
        Image.fromarray(x).save(tmp_path / f'{name}.png')
        reasons = answer(page, tmp_path / f'{name}.png')[1]
        here = model.predict(tmp_path / f'{name}.png', heat=False).refused
        assert any('coloured' in r for r in reasons) == any('coloured' in r for r in here) == reason


def write_colours(path, frames, rate):
    "Frames (n, h, w, 3) as a GIF, or as a video with colours."
    if path.suffix == '.gif':
        first, *others = [Image.fromarray(x) for x in frames]
        return first.save(path, save_all=True, append_images=others, duration=round(1000 / rate))
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('libx264', rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
        stream.options = dict(crf='8')
        for x in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(x, format='rgb24')))
        out.mux(stream.encode())


def share_of(reasons):
    "Percent that is coloured, by the reasons to refuse; None where none of them says so."
    return next((int(re.match(r'\d+', r)[0]) for r in reasons if 'coloured' in r), None)


@pytest.mark.parametrize('suffix', ['.gif', '.mp4'])
def test_colour_is_looked_for_in_the_same_frames(site, model, tmp_path, suffix):
    _, page, _ = site
    grey = np.repeat(phantom(0, 25)[..., None], 3, 3)
    shares = {}
    for at in (0, 7, 10, 20):  # the page samples frame 7, and looks for colour in the others
        frames, file = grey.copy(), tmp_path / f'{at}{suffix}'
        frames[at, 64:112, 64:112] = 220, 20, 20
        write_colours(file, frames, 10)
        shares[at] = share_of(answer(page, file)[1])
        here = share_of(model.predict(file, heat=False).refused)
        assert shares[at] == here if here is None else abs(shares[at] - here) <= 1, at
    assert [at for at, share in shares.items() if share] == [0, 10, 20]


def test_controls(site):
    _, page, _ = site
    answer(page)
    moment, frame = page.locator('#moment'), page.locator('#frame')
    assert moment.text_content().startswith('1 of 12')
    before = frame.evaluate('c => c.toDataURL()')
    page.locator('#scrubber').focus()
    page.keyboard.press('ArrowRight')
    assert moment.text_content().startswith('2 of 12')
    page.locator('#answer-title').click()  # the arrows work anywhere on the page
    page.keyboard.press('ArrowRight')
    assert moment.text_content().startswith('3 of 12')
    assert frame.evaluate('c => c.toDataURL()') != before
    box, strip = frame.bounding_box(), page.locator('#mmode')
    before = strip.evaluate('c => c.toDataURL()')
    frame.click(position=dict(x=0.35 * box['width'], y=0.5 * box['height']))
    assert float(page.locator('#beam').input_value()) < 45
    assert strip.evaluate('c => c.toDataURL()') != before
    before = frame.evaluate('c => c.toDataURL()')
    page.get_by_role('radio', name='blines').check(force=True)
    assert frame.evaluate('c => c.toDataURL()') != before
    page.locator('#opacity').fill('0')
    page.get_by_role('radio', name='pneumonia').check(force=True)
    plain = frame.evaluate('c => c.toDataURL()')
    page.get_by_role('radio', name='regular').check(force=True)
    assert frame.evaluate('c => c.toDataURL()') == plain


UNNAMED = """
() => [...document.querySelectorAll('input, button, canvas, svg[role]')]
  .filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))
  .map((e) => e.id)
"""


def test_everything_has_a_name(site):
    _, page, _ = site
    answer(page)
    unnamed = page.evaluate(UNNAMED)
    assert not unnamed
    assert page.locator('[role=status][aria-live=polite]').count() == 1
    assert page.get_by_text('For teaching. Not a medical device. Nothing leaves this page.').count() == 2


def test_a_telephone_shows_it_whole(site):
    _, page, _ = site
    answer(page)
    page.set_viewport_size(dict(width=390, height=844))
    try:
        assert page.evaluate('() => document.documentElement.scrollWidth') <= 390
    finally:
        page.set_viewport_size(dict(width=1000, height=900))


def test_nothing_leaves_the_page(site):
    file, page, asked = site
    answer(page)
    away = [a for a in asked if not a.startswith(('file://', 'data:', 'blob:'))]
    assert not away
    assert [a for a in asked if a.startswith('file://')] == [file.as_uri()]
    assert file.stat().st_size < 25e6
    refused = page.evaluate("() => fetch('data:text/plain,a').then(() => 'sent', () => 'refused')")
    assert refused == 'refused'  # the browser itself would refuse a request


FANS = """
import fs from 'fs';
import crypto from 'crypto';
const [sources, folder] = process.argv.slice(2);
const { findFan, fanMask } = await import(`${sources}/fan.mjs`);
const { fanCutter, resize } = await import(`${sources}/images.mjs`);
const found = JSON.parse(fs.readFileSync(`${folder}/clips.json`)).map(({ file, n, width, height }) => {
  const all = new Uint8Array(fs.readFileSync(`${folder}/${file}`));
  const each = width * height;
  const frames = Array.from({ length: n }, (_, k) => all.slice(k * each, (k + 1) * each));
  const fan = findFan(frames, width, height);
  const { top, bottom, left, right } = fanMask(fan).box;
  const cutter = fanCutter(fan, width, height);
  const hash = crypto.createHash('md5');
  for (const x of frames) hash.update(resize(cutter.cut(x), cutter.width, cutter.height, 96, 96));
  return { fan, box: [top, bottom, left, right], md5: hash.digest('hex') };
});
console.log(JSON.stringify(found));
"""


def test_fan_crop_and_size_are_those_of_python(tmp_path):
    if not shutil.which('node'):
        pytest.skip('no node on the PATH to run the page\'s sources')
    from lus_fastai.core import shipped_folder

    sizes, clips, expected = ((96, 128), (128, 128), (200, 260), (256, 256), (300, 220)), [], []
    for k in range(20):
        frames = phantom(k, 1 if k % 7 == 0 else 4, sizes[k % 5])
        frames = add_overlays(frames, k)[0] if k % 3 == 0 else frames
        (tmp_path / f'{k}.bin').write_bytes(frames.tobytes())
        n, height, width = frames.shape
        clips.append(dict(file=f'{k}.bin', n=n, height=height, width=width))
        fan = find_fan(frames)
        small = np.stack([resize_frame(x, (96, 96)) for x in crop_to_fan(frames, fan)])
        expected.append((fan, hashlib.md5(small.tobytes()).hexdigest()))
    (tmp_path / 'clips.json').write_text(json.dumps(clips))
    (tmp_path / 'fans.mjs').write_text(FANS)
    sources = shipped_folder('data') / 'templates' / 'web'
    command = ['node', tmp_path / 'fans.mjs', sources, tmp_path]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for there, (fan, md5) in zip(found, expected, strict=True):
        here = fan.to_dict()
        assert there['fan']['kind'] == fan.kind and tuple(there['box']) == fan.box()
        numbers = ('near', 'far', 'left', 'right', 'x', 'y', 'aspect')
        assert max(abs(there['fan'][k] - here[k]) for k in numbers) < 1e-6
        assert there['md5'] == md5  # to the last grey level
