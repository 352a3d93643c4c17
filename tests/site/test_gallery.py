"""The gallery: one figure each, in a dozen lines, and a page that shows them all."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location('gallery', ROOT / 'tools/gallery.py')
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)
EXAMPLES = sorted((ROOT / 'nbs/gallery').glob('*.ipynb'))


def test_twenty_examples_or_more():
    assert len(EXAMPLES) >= 20


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_one_figure_in_few_lines(path):
    code = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    figures = [o for c in code for o in c['outputs'] if 'image/png' in o.get('data', {})]
    assert len(figures) == 1
    lines = [x for x in ''.join(code[-1]['source']).splitlines() if x.strip() and not x.startswith('#|')]
    assert len(lines) <= 25, f'{len(lines)} lines are no short example'
    assert '#| fig-cap: ' in ''.join(code[-1]['source'])


def test_the_page_shows_every_example(tmp_path):
    shutil.copytree(ROOT / 'nbs/gallery', tmp_path / 'nbs/gallery')
    page = gallery.gallery_page(tmp_path).read_text(encoding='utf-8')
    for path in EXAMPLES:
        e = gallery.example(path)
        assert f']({path.name})' in page and e['title'] in page and e['alt'] in page
        assert (tmp_path / f'nbs/gallery/thumbs/{path.stem}.png').read_bytes() == e['png']


def test_an_example_without_a_figure_is_named(tmp_path):
    nb = json.loads(EXAMPLES[0].read_text(encoding='utf-8'))
    for c in nb['cells']:
        c.pop('outputs', None)
    (tmp_path / 'bare.ipynb').write_text(json.dumps(nb))
    with pytest.raises(ValueError, match='bare.ipynb holds no figure'):
        gallery.example(tmp_path / 'bare.ipynb')
