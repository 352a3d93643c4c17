"The panels: every control from Python, faults as messages, and a real browser on a page served by Voila."

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lus_fastai import widgets as W
from lus_fastai.core import CLASSES, DENSE, DENSE_COLORS, TableError, write_table
from lus_fastai.data.fan import Fan, find_fan
from lus_fastai.explain.occlusion import EXPLAINERS, explain_clip
from lus_fastai.plot import overlay
from lus_fastai.synth.motion import m_mode
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.toys import toy_net
from lus_fastai.video import read_clip, sample_clip

ROOT = Path(__file__).resolve().parents[2]


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image.value if hasattr(image, 'value') else image)))


def small_net(channels=1, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = toy_net(channels, classes)
    net.classes = CLASSES
    return net


@pytest.fixture
def broken(phantom_table, tmp_path):
    "The phantom's table with a first clip cut short, whose name is mischievous."
    bad = tmp_path / '<b>cut & short.mp4'
    bad.write_bytes(Path(phantom_table['path'][0]).read_bytes()[:900])
    table = phantom_table.copy()
    table.loc[0, 'path'] = str(bad)
    return table


# ---- import and errors ----


@pytest.mark.slow
def test_module_imports_without_ipywidgets():
    code = """
import sys; sys.modules['ipywidgets'] = None
from lus_fastai.widgets import ClipBrowser
try: ClipBrowser()
except ImportError as e: print(e)"""
    r = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert 'pip install lus_fastai[widgets]' in r.stdout, r.stderr


def test_bad_arguments(phantom_table):
    with pytest.raises(TableError, match='missing column'):
        W.ClipBrowser(phantom_table.drop(columns='label'))
    with pytest.raises(ValueError, match='size must be'):
        W.ClipBrowser(phantom_table, size=3)
    with pytest.raises(ValueError, match='path is missing'):
        W.FanEditor(phantom_table)


# ---- pickers ----


def test_pickers_offer_what_is_there(phantom_table):
    b = W.ClipBrowser(phantom_table)
    assert b.source.options[0] == ('all (12)', '') and len(b.clip.options) == 12
    for label in ('covid', 'pneumonia', 'regular'):
        b.label.value = label
        rows = phantom_table[phantom_table['label'] == label]
        assert [v for _, v in b.patient.options[1:]] == sorted(rows['patient'].unique()) and {
            i for _, i in b.clip.options
        } == set(rows.index)
        for text, patient in b.patient.options[1:]:
            b.patient.value = patient
            assert text == f'{patient} ({(rows["patient"] == patient).sum()})' and set(
                phantom_table.loc[[i for _, i in b.clip.options], 'patient']
            ) == {patient}
    b.source.value = phantom_table['source'][
        0
    ]  # the class stays if it is there, and falls back to all if it is not
    there = phantom_table[phantom_table['source'] == phantom_table['source'][0]]
    assert b.label.value == ('regular' if (there['label'] == 'regular').any() else '') and b.shown


def test_clip_stays_while_it_is_among_the_choices(phantom_table):
    b = W.ClipBrowser(phantom_table)
    b.clip.value = 5
    b.frame.value = 2
    before = b.image.value
    b.label.value = phantom_table['label'][5]
    assert (b.clip.value, b.frame.value, b.image.value) == (5, 2, before)


# ---- browser ----


def test_frames_and_masks_are_those_of_the_files(phantom_table):
    b = W.ClipBrowser(phantom_table)
    row = phantom_table.loc[b.clip.value]
    clip, masks = read_clip(row['path']), read_clip(row['mask'])
    for k in (0, 3, len(clip) - 1):
        b.frame.value = k
        assert (pixels(b.image) == clip.frames[k]).all() and f'{k + 1} of {len(clip)}' in b.where.value
    b.masks.value, b.opacity.value = True, 0.6
    assert (pixels(b.image) == overlay(clip.frames[k], masks.frames[k], alpha=0.6)).all()
    shown = {DENSE[c] for c in np.unique(masks.frames)} - {'background'}
    assert {name for name in DENSE if f'</span>{name}</span>' in b.legend.value} == shown
    assert 'rgb({},{},{})'.format(*DENSE_COLORS[masks.frames[masks.frames != 6].min()]) in b.legend.value


def test_player_follows_the_clip(phantom_table):
    b = W.ClipBrowser(phantom_table)
    b.frame.value = b.frame.max
    b.clip.value = 3
    clip = read_clip(phantom_table['path'][3])
    assert (b.frame.value, b.frame.max, b.play.max) == (
        0,
        len(clip) - 1,
        len(clip) - 1,
    ) and b.play.interval == pytest.approx(1000 * np.diff(clip.times).mean(), abs=1)


def test_broken_clip_is_a_message(broken):
    b = W.ClipBrowser(broken)
    assert (
        '&lt;b&gt;cut &amp; short.mp4' in b.status.value
        and 'cannot be shown' in b.status.value
        and '<b>cut' not in b.status.value
    )
    assert b.image.layout.display == 'none' and b.frame.disabled and b.play.disabled
    b.frame.value, b.masks.value = 1, True  # nothing to do, nothing to fail
    b.clip.value = 1
    assert (
        b.status.value == ''
        and b.image.layout.display is None
        and not b.frame.disabled
        and pixels(b.image).any()
    )


def test_broken_mask_leaves_the_frame(phantom_table, tmp_path):
    table = phantom_table.copy()
    table.loc[0, 'mask'] = str(tmp_path / 'gone.mkv')
    table.loc[1, 'mask'] = None
    b = W.ClipBrowser(table)
    assert (
        'gone.mkv' in b.status.value
        and 'no such file' in b.status.value
        and b.masks.disabled
        and pixels(b.image).ndim == 2
    )
    b.clip.value = 1
    assert b.status.value == '' and b.masks.disabled


def test_stills_and_long_clips(phantom_table, tmp_path):
    from lus_fastai.video import write_video

    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(tmp_path / 'still.png')
    n = W._MOST * 2 + 30
    write_video(
        tmp_path / 'long.mp4',
        np.arange(n)[:, None, None].astype(np.uint8) // 2 + np.zeros((1, 32, 48), np.uint8),
        30,
    )
    row = dict(kind='image', label='covid', patient='p', source='s', probe='linear')
    b = W.ClipBrowser(
        pd.DataFrame(
            [
                dict(row, path=str(tmp_path / 'long.mp4'), kind='video'),
                dict(row, path=str(tmp_path / 'still.png')),
            ]
        )
    )
    assert W._MOST / 4 < len(b.shown.frames) <= W._MOST and 'long clip' in b.status.value
    assert b.shown.times[-1] > 0.98 * (n - 1) / 30 and np.ptp(np.diff(b.shown.times)) < 0.04
    b.clip.value = 1
    assert b.frame.disabled and '1 of 1' in b.where.value and b.shown.frames.shape == (1, 64, 64)


def test_few_clips_are_kept(phantom_table):
    b = W.ClipBrowser(phantom_table)
    for i in range(8):
        b.clip.value = i
    assert list(b._kept) == [4, 5, 6, 7]


def test_phantom_by_default(tmp_path):
    b = W.ClipBrowser(folder=tmp_path)
    assert len(b.table) == 12 and (tmp_path / 'clips.csv').exists() and b.shown


# ---- explainer ----


def test_maps_and_probabilities_are_those_of_explain(phantom_table):
    net = small_net()
    e = W.Explainer(net, phantom_table, size=(64, 64))
    frames = sample_clip(phantom_table['path'][0], size=(64, 64)).frames
    for name in ('saliency', 'grad-cam'):
        maps, probs = explain_clip(net, frames, name)
        e.method.value = name
        for k in range(min(2, len(frames))):
            e.frame.value = k
            m = e._maps[0, k, name, int(probs[k].argmax())]
            assert np.allclose(m, maps[k], atol=1e-6) and all(f'{p:.2f}' in e.verdict.value for p in probs[k])
            assert (pixels(e.image) == frames[k]).all()
    assert np.allclose(e._probs[0][0], probs, atol=1e-6)
    assert net.training and all(p.grad is None for p in net.parameters()) and not net._forward_hooks


def test_each_control_changes_the_map_and_nothing_is_computed_twice(phantom_table):
    calls = []

    def corner(model, x, target):
        calls.append(int(target))
        m = torch.zeros(x.shape[0], *x.shape[-2:])
        m[:, :8, :8] = 1.0 + int(target)
        m[:, -8:, -8:] = -1.0
        return m

    e = W.Explainer(
        small_net(),
        phantom_table,
        size=(64, 64),
        methods={'corner': corner, 'saliency': EXPLAINERS['saliency']},
    )
    e.target.value = 2
    m = pixels(e.map_image).astype(int)
    assert (m[1, 1, 0] > m[1, 1, 2]) and (m[-2, -2, 2] > m[-2, -2, 0])  # orange for, blue against
    assert (
        '<span>-3</span><span>0</span><span>3</span>' in e.scale.value
        and 'corner for <b>regular</b>' in e.scale.value
    )
    before = e.map_image.value
    e.opacity.value = 0.2
    assert e.map_image.value != before
    n = len(calls)
    e.method.value = 'saliency'
    e.method.value = 'corner'
    e.opacity.value = 0.7
    assert len(calls) == n and e.map_image.value == before
    curve = e.curve_image.value
    e.frame.value = 1
    assert e.curve_image.value != curve and len(calls) == n + 1


def test_one_scale_for_the_clip(phantom_table):
    "The weaker of two maps is drawn paler, once the stronger one was seen."
    strong = iter((1.0, 4.0, 1.0))
    e = W.Explainer(
        small_net(),
        phantom_table,
        size=(64, 64),
        methods={'level': lambda model, x, target: torch.full((1, 64, 64), next(strong))},
    )
    e.target.value = 1  # second call: 4
    e.frame.value = 1  # third: 1
    assert '<span>4</span>' in e.scale.value and list(e._limits.values())[-1] == 4


def test_fan_of_the_table(phantom_table):
    fan = Fan('linear', (96, 96), 0, 48, 0, 96)  # the upper half
    table = phantom_table.assign(fan=[json.dumps(fan.to_dict())] * 11 + ['{"kind": 1}'])
    e = W.Explainer(
        small_net(), table, size=(64, 64), methods={'even': lambda model, x, target: torch.ones(1, 64, 64)}
    )
    assert '50% of it inside the fan' in e.scale.value
    e.clip.value = 11
    assert 'holds no fan' in e.status.value and e.map_image.layout.display == 'none'
    with torch.no_grad():
        want = EXPLAINERS['occlusion'](
            small_net().eval(),
            e._input(sample_clip(table['path'][0], size=(64, 64)).frames[:1]),
            0,
            fan=fan.resize((64, 64)),
        )
    e = W.Explainer(small_net(), table, size=(64, 64), methods={'occlusion': EXPLAINERS['occlusion']})
    e.target.value = 0
    assert np.allclose(e._maps[0, 0, 'occlusion', 0], want[0], atol=1e-6)


def test_store_and_channels(phantom_store):
    e = W.Explainer(small_net(3), phantom_store)
    assert e.channels == 3 and len(e.clip.options) == 12
    for i in (0, 7):
        e.clip.value = i
        at = np.flatnonzero(phantom_store.frames['clip'] == e.table['clip'][i])
        e.frame.value = 1
        assert (pixels(e.image) == phantom_store[at[1]]).all() and len(e.shown.frames) == len(at)


def test_explainer_faults_are_messages(phantom_table, broken):
    e = W.Explainer(small_net(classes=4), phantom_table, size=(64, 64))
    assert (
        'one logit for each of 3 classes' in e.status.value
        and e.map_image.layout.display == 'none'
        and pixels(e.image).any()
    )
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * 64, 3))
    e = W.Explainer(flat, phantom_table, CLASSES, size=(64, 64))
    e.method.value = 'grad-cam'
    assert 'convolution' in e.status.value and e.map_image.layout.display == 'none'
    e.method.value = 'saliency'
    assert e.status.value == '' and e.map_image.layout.display is None
    net = small_net()
    with torch.no_grad():
        net[-1].bias[0] = float('nan')
    assert 'NaN' in W.Explainer(net, phantom_table, size=(64, 64)).status.value
    e = W.Explainer(small_net(), broken, size=(64, 64))
    assert (
        'cannot be shown' in e.status.value
        and e.map_image.layout.display == e.curve_image.layout.display == 'none'
        and e.verdict.value == ''
    )
    e.clip.value = 2
    assert e.map_image.layout.display is None


# ---- fan editor ----


def test_found_edited_saved_and_reopened(phantom_table, tmp_path):
    csv = tmp_path / 'clips.csv'
    write_table(phantom_table, csv)
    e = W.FanEditor(phantom_table, csv)
    found = find_fan(read_clip(phantom_table['path'][0]).frames)
    assert e.fan == found and 'not saved' in e.status.value and not W.fans_file(csv).exists()
    before = e.image.value
    e.geometry['far'].value -= 10
    assert e.image.value != before and e.fan.far == found.far - 10 and 'edited, not saved' in e.status.value
    e.save.click()
    saved = pd.read_csv(tmp_path / 'clips.fans.csv')
    assert (
        list(saved.columns) == ['path', 'fan', 'fan_by'] and len(saved) == 1 and saved['fan_by'][0] == 'hand'
    )
    assert (
        e.table['fan'][0] == saved['fan'][0] == json.dumps(e.fan.to_dict())
        and 'edited by hand' in e.status.value
    )
    e.clip.value = 1
    e.save.click()  # as found
    again = W.FanEditor(phantom_table, csv, size=(240, 320))
    assert again.fan.to_dict() == e._edited[0].to_dict() and 'edited by hand' in again.status.value
    assert list(again.table['fan_by'][:3]) == ['hand', 'found', ''] and 'fan' not in phantom_table
    again.geometry['far'].value += 3
    again.revert.click()
    assert again.fan.to_dict() == e._edited[0].to_dict() and again.revert.disabled
    again.find.click()
    assert again.fan == found and not again.revert.disabled
    table = W.read_fans(phantom_table, csv)
    assert Fan.from_dict(json.loads(table['fan'][0])).far == pytest.approx(found.far - 10, abs=1e-3)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_edits_wait_while_other_clips_are_looked_at(phantom_table, tmp_path):
    e = W.FanEditor(phantom_table, tmp_path / 'c.csv')
    e.geometry['left'].value -= 5
    edited = e.fan
    e.clip.value = 3
    assert e.fan != edited
    e.clip.value = 0
    assert e.fan == edited and 'edited, not saved' in e.status.value


def test_impossible_and_missing_fans(phantom_table, broken, tmp_path):
    e = W.FanEditor(broken, tmp_path / 'c.csv')
    assert 'cannot be shown' in e.status.value and e.save.disabled and e.find.disabled
    e.save.click()
    e.find.click()
    e.kind.value = 'linear'
    assert not (tmp_path / 'c.fans.csv').exists()
    e.clip.value = 1
    good, before = e.fan, e.image.value
    e.geometry['near'].value = e.geometry['near'].max
    if e.geometry['near'].max < good.far:
        e.geometry['far'].value = e.geometry['far'].min
    assert 'near &lt; far' in e.status.value and e.save.disabled
    e.revert.click()
    assert e.fan == good and e.image.value == before and not e.save.disabled
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(tmp_path / 'flat.png')
    row = dict(
        kind='image', label='covid', patient='p', source='s', probe='linear', path=str(tmp_path / 'flat.png')
    )
    e = W.FanEditor(pd.DataFrame([row]), tmp_path / 'd.csv')
    assert 'no fan was found' in e.status.value and 'draw it by hand' in e.status.value
    e.kind.value = 'convex'
    assert (
        e.fan.kind == 'convex'
        and e.geometry['x'].layout.display is None
        and e.geometry['flare'].layout.display == 'none'
    )


def test_rounding_by_the_browser_is_no_edit(phantom_table, tmp_path):
    e = W.FanEditor(phantom_table, tmp_path / 'c.csv')
    found, before = e.fan, e.image.value
    for slider in e.geometry.values():
        slider.value = round(slider.value / slider.step) * slider.step
    assert e.fan == found and 'not saved' in e.status.value and 'edited' not in e.status.value
    e.geometry['near'].value = e.geometry['near'].max
    e.geometry['far'].value = e.geometry['far'].min
    e.revert.click()
    assert e.fan == found and e.image.value == before


def test_unwritable_folder_is_a_message(phantom_table, tmp_path):
    (tmp_path / 'file').write_text('')
    e = W.FanEditor(phantom_table, tmp_path / 'file' / 'c.csv')
    e.save.click()
    assert 'cannot be written' in e.status.value and e.table['fan'][0] == ''


def test_damaged_fans_file(phantom_table, tmp_path):
    (tmp_path / 'c.fans.csv').write_text('path,fan,fan_by\na.mp4,{},hand\n')
    with pytest.raises(TableError, match='a.mp4'):
        W.FanEditor(phantom_table, tmp_path / 'c.csv')
    (tmp_path / 'c.fans.csv').write_text('x\n1\n')
    with pytest.raises(TableError, match='no table of fans'):
        W.read_fans(phantom_table, tmp_path / 'c.csv')


def test_an_untouched_fan_is_never_edited(phantom_table, tmp_path):
    e = W.FanEditor(phantom_table, tmp_path / 'c.csv')
    found = e.fan
    e.clip.value = 3
    e.clip.value = 0
    e._touch((60, 40), (60, 40))  # a click
    assert e.fan == found and 'found by image analysis, not saved' in e.status.value
    e.clip.value = 1
    e.clip.value = 0
    e.save.click()
    assert e.table['fan_by'][0] == 'found'


def test_the_nearest_edge_is_dragged(phantom_table, tmp_path):
    e = W.FanEditor(phantom_table, tmp_path / 'c.csv')
    found, moved = e.fan, []
    for edge, at in dict(near=(0, 0.5), far=(1, 0.5), left=(0.5, 0), right=(0.5, 1)).items():
        start = tuple(map(float, found.pixels(*at)))
        inside = tuple(np.add(start, np.subtract(found.pixels(0.5, 0.5), start) * 0.2))
        e._touch(start, np.add(inside, 1))
        e._touch(start, inside)  # the pointer goes on, and the edge with it
        depth, beam = e.fan.coordinates(*inside)
        assert abs(dict(near=depth, far=depth - 1, left=beam, right=beam - 1)[edge]) < 0.03
        moved.append([k for k in ('near', 'far', 'left', 'right') if getattr(e.fan, k) != getattr(found, k)])
        e.revert.click()
    assert moved == [['near'], ['far'], ['left'], ['right']] and e.fan == found


# ---- m-mode ----


def test_the_strip_is_the_m_mode_of_the_beam(phantom_table, broken):
    e = W.MModePanel(phantom_table)
    clip = read_clip(phantom_table['path'][0])
    fan = find_fan(clip.frames)
    x, y = map(float, fan.pixels(0.7, 0.3))
    w, h = clip.frames.shape[2], clip.frames.shape[1]
    e.field.value = f'0.1 0.1 {x / w} {y / h}'  # as the page says it
    assert e.beam.value == pytest.approx(0.3, abs=1e-6)
    strip, shown = m_mode(clip, 0.3, fan).image, pixels(e.strip)
    rows = np.floor((np.arange(shown.shape[0]) + 0.5) * len(strip) / shown.shape[0]).astype(int)
    columns = np.floor((np.arange(420) + 0.5) * strip.shape[1] / 420).astype(int)
    grey = (shown == shown[..., :1]).all(-1)
    assert (shown[..., 0] == strip[rows][:, columns])[grey].all() and grey.mean() > 0.98
    before = e.image.value, e.strip.value
    e.frame.value = 3
    assert e.image.value != before[0] and e.strip.value != before[1]
    e.field.value = '0 0 -3 0.5'  # dragged out of the image
    assert e.beam.value == 0
    e = W.MModePanel(broken)
    assert 'cannot be shown' in e.status.value and e.strip.layout.display == 'none' and e.beam.disabled
    e.field.value = '0.5 0.5 0.5 0.5'
    e.clip.value = 2
    assert e.strip.layout.display is None and e.beam.value == 0.5


def test_without_a_fan_beams_are_columns(tmp_path):
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(tmp_path / 'flat.png')
    row = dict(kind='image', label='covid', patient='p', source='s', probe='linear')
    e = W.MModePanel(pd.DataFrame([row | dict(path=str(tmp_path / 'flat.png'))]))
    assert 'beams are columns' in e.status.value
    e._touch(None, (16, 40))
    assert e.beam.value == pytest.approx(0.25)


# ---- for those who do not see ----


def test_images_are_described(phantom_table, tmp_path):
    table = phantom_table.assign(clip=[f'<{i}>' for i in range(len(phantom_table))])
    panels = [
        (W.ClipBrowser(table), 1),
        (W.Explainer(small_net(), table, size=(64, 64)), 3),
        (W.MModePanel(table), 2),
        (W.FanEditor(table, tmp_path / 'c.csv'), 1),
    ]
    for panel, images in panels:
        panel.frame.value = 1
        said = panel.alt.value
        assert said.count('<span') == images, type(panel)
        assert 'frame 2 of clip &lt;0&gt;, labelled' in said
    browser = panels[0][0]
    browser.masks.value = True
    assert 'tinted by its mask' in browser.alt.value


# ---- a real browser ----

APP = """
import warnings; warnings.filterwarnings('ignore')
import pandas as pd, torch
from pathlib import Path
from IPython.display import display
from lus_fastai.core import CLASSES, read_table
from lus_fastai.widgets import ClipBrowser, Explainer, FanEditor, MModePanel
table = read_table('clips.csv')
torch.manual_seed(0)
from torch import nn
convs = nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
display(ClipBrowser(table), Explainer(net, table, CLASSES, size=(64, 64)), MModePanel(table))
display(FanEditor(table, 'clips.csv'))
"""


@contextlib.contextmanager
def voila(folder, source):
    "Voila serving one notebook on localhost; yields its address. Its log is printed, for a failure."
    import nbformat

    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source)],
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
    )
    nbformat.write(nb, folder / 'app.ipynb')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
        'JUPYTER_PLATFORM_DIRS': '1',
        'OMP_NUM_THREADS': '1',
    }
    with open(folder / 'voila.log', 'w') as log:
        server = subprocess.Popen(
            [
                sys.executable,
                '-m',
                'voila',
                'app.ipynb',
                '--no-browser',
                f'--port={port}',
                '--Voila.ip=127.0.0.1',
                '--show_tracebacks=True',
            ],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + PATIENCE / 1000
        while True:
            try:
                socket.create_connection(('127.0.0.1', port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, 'Voila did not start'
                time.sleep(0.1)
        yield f'http://127.0.0.1:{port}/'
    finally:
        server.terminate()  # Voila ends its kernels
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        print((folder / 'voila.log').read_text())


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A page with the four panels: address, its folder, and a Chromium."
    import playwright.sync_api as api

    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium:
        pytest.skip('no chromium on the PATH: apt-get install chromium')
    folder = tmp_path_factory.mktemp('site')
    table = phantom_dataset(folder, patients=3, clips=1, n=8, size=(96, 128), seed=1, workers=1)
    (folder / 'clips' / 'broken.mp4').write_bytes(Path(table['path'][0]).read_bytes()[:900])
    row = {
        **table.loc[0].to_dict(),
        'path': str(folder / 'clips' / 'broken.mp4'),
        'mask': None,
        'findings': None,
    }
    write_table(pd.concat([table, pd.DataFrame([row])], ignore_index=True), folder / 'clips.csv')
    with voila(folder, APP) as address, api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        try:
            yield address, folder, browser
        finally:
            browser.close()


PATIENCE = 120_000  # milliseconds that a loaded machine may take; nothing waits longer than it needs

DRAWN = """img => new Promise(done => {
  const draw = () => {
    const c = document.createElement('canvas');
    c.width = img.naturalWidth; c.height = img.naturalHeight;
    const g = c.getContext('2d');
    g.drawImage(img, 0, 0);
    const d = g.getImageData(0, 0, c.width, c.height).data;
    let s = '';
    for (let i = 0; i < d.length; i += 8192) s += String.fromCharCode.apply(null, d.subarray(i, i + 8192));
    done(btoa(s));
  };
  img.complete && img.naturalWidth ? draw() : img.addEventListener('load', draw, {once: true});
})"""


def drawn(img):
    return np.frombuffer(
        base64.b64decode(img.evaluate(DRAWN)), np.uint8
    )  # what an <img> shows, decoded by the browser


def changes(page, img, act):
    "What the image shows after `act`, waited for until it is another than before."
    before = drawn(img)
    src = img.get_attribute('src')
    act()
    page.wait_for_function(
        '([img, src]) => img.src !== src && img.complete && img.naturalWidth > 0',
        arg=[img.element_handle(), src],
        timeout=PATIENCE,
    )
    after = drawn(img)
    assert after.shape != before.shape or (after != before).any(), 'the image is the same'
    return after


@pytest.fixture(scope='module')
def opened(site):
    "The page, opened once: every visit starts a kernel."
    address, folder, browser = site
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.set_default_timeout(PATIENCE)
    page.route(
        lambda url: not url.startswith(address), lambda route: route.abort()
    )  # nothing from elsewhere is needed
    page.goto(address)
    page.locator('.lus-faneditor img').wait_for()
    return page


@pytest.fixture
def page(opened):
    yield opened
    text, wide = (
        opened.locator('body').inner_text(),
        opened.evaluate('document.documentElement.scrollWidth - innerWidth'),
    )
    if folder := os.environ.get('LUS_SHOTS'):  # look at them: LUS_SHOTS=folder pytest tests/test_widgets.py
        opened.set_viewport_size(dict(width=opened.viewport_size['width'], height=2400))
        opened.screenshot(
            path=f'{folder}/{os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]}.png'
        )
    assert 'Traceback' not in text and wide <= 0


@pytest.mark.slow
def test_panels_in_a_browser(page, site):
    folder = site[1]
    panel, image = page.locator('.lus-clipbrowser'), page.locator('.lus-clipbrowser img')
    # browser: another frame by the slider, masks with their legend, a broken clip
    handle = panel.locator('.noUi-handle').first
    handle.focus()
    second = changes(page, image, lambda: handle.press('ArrowRight'))
    panel.get_by_text('2 of 8').wait_for()
    changes(page, image, lambda: handle.press('ArrowLeft'))
    assert (changes(page, image, lambda: handle.press('ArrowRight')) == second).all()
    tinted = changes(page, image, lambda: panel.get_by_label('masks').check())
    assert (tinted.reshape(-1, 4)[:, 0] != tinted.reshape(-1, 4)[:, 2]).any()
    panel.get_by_text('pleura').first.wait_for()
    panel.get_by_label('clip').select_option(label='broken.mp4')
    panel.get_by_text('cannot be shown').wait_for()
    image.wait_for(state='hidden')  # it comes in a message of its own
    assert 'broken.mp4' in panel.locator('[role=status]').inner_text()
    panel.get_by_label('clip').select_option(index=0)
    image.wait_for()
    # explainer: another method, another class
    panel = page.locator('.lus-explainer')
    shown = panel.locator('img').nth(1)
    saliency = drawn(shown)
    cam = changes(page, shown, lambda: panel.get_by_label('method').select_option('grad-cam'))
    panel.get_by_role('img', name='map of grad-cam for').wait_for()
    assert (cam != saliency).mean() > 0.05
    changes(page, shown, lambda: panel.get_by_label('explain').select_option('covid'))
    panel.get_by_label('clip').select_option(label='broken.mp4')
    panel.get_by_text('cannot be shown').wait_for()
    panel.get_by_label('clip').select_option(index=0)
    shown.wait_for()
    # m-mode: a click chooses the beam
    panel = page.locator('.lus-mmodepanel')
    frame, strip = panel.locator('img').nth(0), panel.locator('img').nth(1)
    box = frame.bounding_box()
    at = dict(x=0.3 * box['width'], y=0.6 * box['height'])
    changes(page, strip, lambda: frame.click(position=at))
    beam = panel.get_by_role('slider', name='beam')
    assert 0 < float(beam.get_attribute('aria-valuenow')) < 0.5
    changes(page, strip, lambda: beam.press('ArrowRight'))
    # fan editor: the outline moves, by hand on the image and by a slider; the file is there
    panel = page.locator('.lus-faneditor')
    panel.get_by_text('found by image analysis, not saved').wait_for()
    image = panel.locator('img')
    image.click()
    far = panel.get_by_role('slider', name='far arc').or_(panel.get_by_role('slider', name='bottom'))
    before, box = float(far.get_attribute('aria-valuenow')), image.bounding_box()
    panel.get_by_text('found by image analysis, not saved').wait_for()  # a click is no edit
    page.mouse.move(box['x'] + 0.5 * box['width'], box['y'] + 0.95 * box['height'])
    page.mouse.down()
    inside = box['x'] + 0.5 * box['width'], box['y'] + 0.8 * box['height']
    changes(page, image, lambda: page.mouse.move(*inside))
    page.mouse.up()
    panel.get_by_text('edited, not saved').wait_for()
    moved = before - float(far.get_attribute('aria-valuenow'))
    assert moved == pytest.approx(0.15 * 96, abs=1)  # rows of the file
    handle = panel.locator('.widget-slider:visible', has_text='left').locator('.noUi-handle')
    handle.focus()
    changes(page, panel.locator('img'), lambda: handle.press('ArrowRight'))
    panel.get_by_text('edited, not saved').wait_for()
    panel.get_by_role('button', name='save').click()
    panel.get_by_text('marked as edited by hand').wait_for()
    saved = pd.read_csv(folder / 'clips.fans.csv')
    assert list(saved['fan_by']) == ['hand'] and Fan.from_dict(json.loads(saved['fan'][0])).size == (96, 128)


@pytest.mark.slow
def test_everything_has_a_name(page):
    nameless = """panel => [...panel.querySelectorAll('img, [role=slider], button, select, input, textarea')]
        .filter(x => x.checkVisibility() && !(x.alt || x.ariaLabel || x.textContent.trim() || x.title
                     || (x.labels && [...x.labels].some(l => l.textContent.trim()))))
        .map(x => x.outerHTML.slice(0, 200))"""
    for name in ('clipbrowser', 'explainer', 'mmodepanel', 'faneditor'):
        assert page.locator(f'.lus-{name}').evaluate(nameless) == [], name
    panel = page.locator('.lus-faneditor')
    panel.get_by_role('slider', name='frame').wait_for()
    panel.get_by_role('img', name='with the outline of its fan').wait_for()


@pytest.mark.slow
def test_playing_moves_the_frames(page):
    panel, image = page.locator('.lus-clipbrowser'), page.locator('.lus-clipbrowser img')
    changes(page, image, lambda: panel.locator('.jupyter-widgets.widget-play button').first.click())
    panel.get_by_text('8 of 8').wait_for()


@pytest.mark.slow
def test_narrow_screen(page):
    page.set_viewport_size(dict(width=390, height=900))
    for name in ('clipbrowser', 'explainer', 'mmodepanel', 'faneditor'):
        for part in page.locator(
            f'.lus-{name} img:visible, .lus-{name} .widget-dropdown:visible, '
            f'.lus-{name} .widget-slider:visible, .lus-{name} button:visible'
        ).all():
            box = part.bounding_box()
            assert box['x'] >= 0 and box['x'] + box['width'] <= 390, (name, box)
