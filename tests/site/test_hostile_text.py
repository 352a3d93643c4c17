"File names, labels, patients and captions that are HTML, Markdown or templates are shown as text."

import re
import shutil
from html.parser import HTMLParser
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import torch

from lus_fastai import widgets as W
from lus_fastai.clip_report import answer_report
from lus_fastai.core import write_table
from lus_fastai.data.audit import audit
from lus_fastai.data.folds import patient_folds
from lus_fastai.data.leaks import Split
from lus_fastai.exercises import Marks
from lus_fastai.export import web_page
from lus_fastai.models.stages import StageClassifier, StageFeatures
from lus_fastai.predict import ClipModel, ClipPrep
from lus_fastai.report import Report
from lus_fastai.runs import cell
from lus_fastai.split_audit import audit_report, audit_split
from lus_fastai.stats import figures
from lus_fastai.toys import toy_net

# no page of ours has an element xss, or an attribute onx
TEXTS = [
    '<script>xss(1)</script>',
    '"><xss src=x onx=alert(1)>',
    "' onx='xss(1)",
    '</style><xss>a',
    '</title></textarea></script><xss>',
    '--><xss>',
    r'$\bad$ <xss>',
    '$x_{$ & {y}',
    '{{7*7}}{% raw %}{{ x }}{frame}{0}',
    '[xss](javascript:xss(1)) ![xss](http://xss.example/a.png)',
    '[xss]{onx=1} `xss`{=html} `<xss>`{=html}',
    '\n\n<xss>\n\n# xss\n\n| a |\n',
    'data:image/png;base64,AAAA <xss>',
    "'; --- \\| <xss> \\",
]
NAMES = [t.replace('/', '\N{DIVISION SLASH}').strip() for t in TEXTS]  # what a file may be called


class Page(HTMLParser):
    "Elements, attributes and text of a page."

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ''
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def flat(text):
    return ' '.join(text.split())


def checked(html, shown=(), scripts=0):
    "A page of which no element or attribute came from the texts above; all of `shown` can be read in it."
    page = Page(html)
    names = [t for t, _ in page.tags]
    assert 'xss' not in names and names.count('script') == scripts
    for tag, attrs in page.tags:
        assert not [k for k in attrs if k.startswith('on') and tag != 'style'], (tag, attrs)
        for k in ('href', 'src', 'action', 'xlink:href'):
            assert not re.match(r'\s*(javascript:|http://xss)', attrs.get(k) or '', re.I), (tag, attrs)
    for text in shown:
        assert flat(text) in flat(page.text), text
    return page


@pytest.fixture(scope='module')
def table(phantom_table, tmp_path_factory):
    "Phantom clips whose names, labels, patients, sources and probes are hostile."
    folder, t = tmp_path_factory.mktemp('hostile'), phantom_table.copy()
    turn = [TEXTS[i % len(TEXTS)] for i in range(len(t) + 3)]
    t['path'] = [
        shutil.copy(p, folder / f'{name}.mp4') and str(folder / f'{name}.mp4')
        for p, name in zip(t['path'], NAMES)
    ]
    t['label'] = [TEXTS[i % 3] for i in range(len(t))]
    t['source'], t['probe'] = (turn[k : k + len(t)] for k in range(2))
    t['patient'] = [TEXTS[i // 2] for i in range(len(t))]
    return t


@pytest.fixture(scope='module')
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StageClassifier(StageFeatures('test_resnet', weights=None), 4)
    card = {'title': TEXTS[0], TEXTS[1]: TEXTS[3], 'data': ' '.join(TEXTS)}
    return ClipModel(net, tuple(TEXTS[:3]), ClipPrep(size=32, frames=2), [TEXTS[8]], card=card)


def test_a_report_shows_the_texts():
    every = ' | '.join(TEXTS)
    report = Report(every, every)
    for text in TEXTS:
        frame = pd.DataFrame({text: [text, 1]}, index=pd.Index([text, 'b'], name=text))
        report.section(text, text).table(frame, text).numbers({text: text}).settings({text: text}, text)
    cells = [cell(t, t, t, 0.5, protocol='p') for t in TEXTS]
    report.cells(cells, every).summary(every, 'b', 'c')
    shown = [t for t in TEXTS if '\n' not in t]
    page = checked(report.html(), shown)
    assert '49' not in page.text


def test_figures_of_a_report_show_the_texts():
    "One page, one label each: whatever the drawing makes of it, it is text of the figure."
    for label in TEXTS:
        figure = figures.plot_confusion(np.eye(2, dtype=int), [label, 'b'], title=label)
        checked(Report('t').figure(figure, label).html(), [label])


def test_a_report_of_answers_shows_the_texts(table, model, tmp_path):
    answer = model.predict(table['path'][1])
    failures = [(f'{name}.mp4', text) for name, text in zip(NAMES, TEXTS)]
    page = answer_report(model, [answer], tmp_path / 'a.html', failures).read_text(encoding='utf-8')
    checked(page, [NAMES[1], *TEXTS[:4], TEXTS[8]])
    title = answer_report(model, answer, tmp_path / 'b.html').read_text(encoding='utf-8')
    checked(title, [NAMES[1]])


def test_audits_show_the_texts(table, tmp_path):
    found = audit_split(Split(table, pd.Series(['train', 'test'] * 6)))
    assert found.leaks
    checked(audit_report(found, tmp_path / 'a.html').read_text(encoding='utf-8'), [*TEXTS[:6]])
    checked(found._repr_html_())
    checked(audit(table, patient_folds(table, 2))._repr_html_(), TEXTS[:3])


def html_of(widget, w):
    "The values of all HTML widgets below one."
    if isinstance(widget, w.HTML):
        yield widget.value
    for child in getattr(widget, 'children', ()):
        yield from html_of(child, w)


def test_panels_show_the_texts(table, tmp_path):
    import ipywidgets

    write_table(table, tmp_path / 'c.csv')
    broken = table.copy()
    (tmp_path / 'bad<xss>.mp4').write_bytes(b'no clip')
    broken.loc[0, 'path'] = str(tmp_path / 'bad<xss>.mp4')
    net = toy_net(1, 3)
    for panel in (
        W.ClipBrowser(table),
        W.MModePanel(table),
        W.FanEditor(table, tmp_path / 'c.csv'),
        W.FanEditor(broken, tmp_path / 'd.csv'),
        W.ClipBrowser(broken),
        W.Explainer(net, table, classes=TEXTS[:3], methods={TEXTS[1]: lambda m, x, t: x[:, 0] * 0}),
    ):
        parts = list(html_of(panel.box, ipywidgets))
        assert len(parts) > 3
        page = checked(' '.join(parts))
        assert flat(TEXTS[0]) in flat(page.text) or 'cannot be shown' in page.text


def test_the_page_in_the_browser_shows_the_texts(model, tmp_path):
    for f in ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm'):
        (tmp_path / 'dist').mkdir(exist_ok=True)
        (tmp_path / 'dist' / f).write_bytes(b'x')
    page = web_page(model, tmp_path / 'page.html', tmp_path).read_text(encoding='utf-8')
    before = ClipModel(model.nets[0], ('a', 'b', 'c'), model.prep, ['d'])
    plain = web_page(before, tmp_path / 'plain.html', tmp_path).read_text(encoding='utf-8')
    scripts = [t for t, _ in Page(plain).tags].count('script')
    found = checked(page, TEXTS[:3], scripts=scripts)
    assert [t for t, _ in found.tags] == [t for t, _ in Page(plain).tags]


def test_marks_of_an_exercise_show_the_texts():
    rows = pd.DataFrame(dict(seed=range(3), mark='wrong', truth=TEXTS[:3], answer=TEXTS[3:6], why=TEXTS[6:9]))
    marks = Marks.__new__(Marks)
    vars(marks).update(name=TEXTS[0], rows=rows, confidence=0.5)
    checked(marks._repr_html_(), [*TEXTS[:3], *TEXTS[6:9]])


def hostile_results(text):
    "A file of results in which every text is the same hostile one."
    one = dict(protocol=text, table=text, row=text, column=text, ours=0.7, interval=[0.6, 0.8], theirs=0.7)
    cells = [one, dict(one, table='b' + text), dict(one, row='b')]
    about = {text: dict(description=text, split_hash=text)}
    difference = dict(protocol=text, a=text, b='b', column=text, value=0.1, low=0.0, high=0.2)
    difference |= dict(p=0.5, spread=None, trainings=1)
    training = {text: dict(protocol=text, row=text, reasons=[text])}
    parts = dict(cells=cells, protocols=about, differences=[difference], trainings=training)
    build = dict(trainings=[text], torch=text, device=text, precision=text)
    parts |= dict(builds=[build, dict(build, precision='fp32')])
    facts = dict(paper=text, data=text, seeds=[text], hours=1.5, device=text, command=text, not_run=[text])
    return dict(facts, versions=dict(phantom=text), **parts)


@pytest.mark.parametrize('text', TEXTS, ids=range(len(TEXTS)))
def test_pages_of_results_show_the_texts(text, root, monkeypatch):
    import pypandoc
    import yaml

    monkeypatch.syspath_prepend(str(root / 'tools'))
    results = import_module('docs_results')
    runs = {'gare-pocus': hostile_results(text)}
    for source in (results.paper_pages(runs)['gare'], results.summary_page(runs)):
        head = yaml.safe_load(source.split('---\n')[1])
        html = pypandoc.convert_text(source, 'html', 'markdown', ['--wrap=none', '--metadata', 'lang=en'])
        page = checked(html)
        assert not {'math', 'img'} & {a.get('class', '').split(' ')[0] for _, a in page.tags}
        assert not [t for t, a in page.tags if t in ('img', 'a') and 'xss' in str(a)]
        assert page.tags and head['title']
    shown = flat(re.sub('[`\n]', ' ', text)) if '\n' in text else flat(text)
    page = Page(pypandoc.convert_text(results.paper_pages(runs)['gare'], 'html', 'markdown-smart'))
    assert shown in flat(page.text)
