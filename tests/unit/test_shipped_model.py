"The model that ships: its file, its card, what it refuses, and that it agrees with its results."

import re

import numpy as np
import pytest
from PIL import Image

from lus_fastai.core import read_table, shipped_folder
from lus_fastai.predict import load_model
from lus_fastai.runs import read_results
from lus_fastai.toys import drawn_images
from lus_fastai.video import Clip, read_clip

WEIGHTS = shipped_folder('data') / 'weights'


@pytest.fixture(scope='module', params=['pocus', 'small'])
def model(request):
    return load_model(request.param)


def test_weights_are_small():
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) < 8e6
    assert (WEIGHTS / 'small.safetensors').stat().st_size < 1.5e6


@pytest.mark.parametrize('name', [None, 'pocus', 'small'])
def test_no_model_needs_the_weights_of_imagenet(monkeypatch, name):
    def never(*args):
        raise AssertionError('the weights of ImageNet were asked for')

    monkeypatch.setattr('lus_fastai.models.backbones._imagenet', never)
    assert load_model(name).card['title'].endswith('regular')


@pytest.mark.parametrize('name, run', [('pocus', 'pocus_model-pocus'), ('small', 'small_model-pocus')])
def test_card_file_and_results_are_of_one_run(name, run):
    model, protocols = load_model(name), read_results(run)['protocols']
    card = (WEIGHTS / f'{name}.md').read_text(encoding='utf-8')
    assert model.card['split_hash'] == protocols['patient']['split_hash']
    assert model.card['split_hash'] in card and 'Not a medical device' not in model.card['title']
    assert 'no medical device' in card and 'CC BY' in model.card['data'] and 'BLUES' not in model.card['data']
    honest = [k for k in model.card['results'] if re.search(r'by (patient|source), choice included$', k)]
    assert len(honest) == 8 and any(k.startswith('refused') for k in model.card['results'])


@pytest.mark.parametrize('seed', range(4))
def test_what_is_no_lung_is_refused(model, tmp_path, seed):
    for kind, image in drawn_images(100 + seed).items():
        Image.fromarray(image).save(tmp_path / f'{kind}.png')
        answer = model.predict(tmp_path / f'{kind}.png')
        assert answer.refused and answer.label is None, kind


def test_answers_are_whole(model):
    for path in read_table(shipped_folder('data') / 'phantom' / 'clips.csv')['path']:
        answer = model.predict(path)
        assert answer.probabilities.sum() == pytest.approx(1) and set(answer.likely) <= set(model.classes)
        side = model.prep.size // 16
        assert answer.heat.shape == (len(answer.frames), side, side) and np.isfinite(answer.heat).all()
        assert (
            len(answer.findings) == len(model.findings)
            and ((0 <= answer.findings) & (answer.findings <= 1)).all()
        )


def test_a_mirrored_clip_gets_the_same_answer(model):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (6, model.prep.size, model.prep.size), np.uint8)
    plain, mirrored = (model.frame_logits(x) for x in (frames, frames[..., ::-1]))
    np.testing.assert_allclose(plain, mirrored, atol=1e-4)


def test_a_still_is_answered_with_caution(model):
    path = read_table(shipped_folder('data') / 'phantom' / 'clips.csv')['path'][0]
    first = model.prep(path)
    assert len(first.images) == model.prep.frames
    clip = read_clip(path)
    still = Clip(clip.frames[:1], clip.times[:1], clip.index[:1], clip.path)
    assert any('single frame' in c for c in model.predict(still).cautions)
