"""What the notebook does not own: the promises of the page, faults while writing, odd tables and figures,
results that must be refused."""

import json
import platform
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai import plot, runs
from lus_fastai import report as R
from lus_fastai.core import DENSE, SPARSE, SPARSE_COLORS
from lus_fastai.stats import figures

EVIL = '<script>alert("x")</script> & <img src="https://evil.example/a.png"> \' " url(https://evil.example)'


class Page(HTMLParser):
    "Reads a page: addresses, ids, headings, cells; complains about tags that are not closed."

    VOID = {'meta', 'img', 'br', 'link', 'input', 'hr', 'base', 'source', 'image', 'use', 'path', 'rect'}

    def __init__(self, text):
        super().__init__()
        self.addresses, self.ids, self.tags, self.open, self.cells, self.styles, self.refs, self.unclosed = (
            [],
            [],
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag, attrs):
        self._start(tag, attrs)

    def handle_starttag(self, tag, attrs):
        self._start(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def _start(self, tag, attrs):
        a = dict(attrs)
        self.tags.append((tag, a))
        self.addresses += [
            v
            for k, v in attrs
            if k
            in (
                'src',
                'href',
                'xlink:href',
                'srcset',
                'action',
                'formaction',
                'poster',
                'data',
                'background',
                'ping',
            )
        ]
        self.styles += [
            v for k, v in attrs if k in ('style', 'clip-path', 'fill', 'stroke', 'filter', 'mask')
        ]
        self.ids += [a['id']] if 'id' in a else []
        self.refs += [i for k in ('aria-labelledby', 'aria-describedby') for i in (a.get(k) or '').split()]

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.unclosed.append((tag, self.open[-3:]))
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == 'style':
            self.styles.append(data)
        if self.open and self.open[-1] in ('td', 'th', 'small'):
            self.cells.append((self.tags[-1][1].get('class'), data))


def check_page(text):
    page = Page(text)
    assert not page.open and not page.unclosed, page.unclosed[:3]
    names = {t for t, _ in page.tags}
    assert not names & {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form'}
    assert not [k for _, a in page.tags for k in a if k.startswith('on')]
    assert all(a.startswith(('#', 'data:image/')) for a in page.addresses), page.addresses
    css = ' '.join(filter(None, page.styles))
    assert '@import' not in css and all(
        u.strip('\'"').startswith('#') for u in re.findall(r'url\(([^)]*)\)', css)
    )
    assert len(page.ids) == len(set(page.ids)), 'ids repeat'
    inside = (
        [a[1:] for a in page.addresses if a.startswith('#')]
        + [u.strip('\'"')[1:] for u in re.findall(r'url\(([^)]*)\)', css)]
        + page.refs
    )
    assert set(inside) <= set(page.ids), set(inside) - set(page.ids)
    policy = [a['content'] for t, a in page.tags if a.get('http-equiv') == 'Content-Security-Policy']
    assert policy and "default-src 'none'" in policy[0]
    rest = re.sub(
        r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"|data:image/[a-z]+;base64,[A-Za-z0-9+/=]+', '', text
    )
    return page, rest


def scores():
    return pd.DataFrame(
        dict(
            label=['a', 'b', 'a', 'b'],
            group=['x', 'x', 'y', 'y'],
            value=[0.5, 0.6, 0.7, 0.8],
            low=[0.4, np.nan, 0.6, 0.7],
            high=[0.6, np.nan, 0.8, 0.9],
            theirs=[0.55, np.nan, 0.55, 0.9],
        )
    )


def every_figure():
    rng = np.random.default_rng(0)
    frames, masks = rng.integers(0, 255, (3, 40, 30), np.uint8), rng.integers(0, 7, (3, 40, 30))
    curves = pd.DataFrame(
        {'class': ['a', 'a', 'a', 'macro', 'macro'], 'fpr': [0, 0.2, 1, 0, 1], 'tpr': [0, 0.8, 1, 0, 1]}
    )
    areas = pd.DataFrame(
        {'class': ['a', 'macro'], 'auc': [0.8, 0.5], 'low': [0.7, np.nan], 'high': [0.9, np.nan]}
    )
    return [
        plot.plot_masks(frames, masks, masks),
        figures.plot_confusion(rng.integers(0, 9, (7, 7)), DENSE),
        figures.plot_roc(curves, areas),
        figures.plot_comparison(scores(), group='group'),
    ]


def full_report():
    out = R.Report('Title', 'Sub').section('One', 'A first.\n\nA second.')
    for i, f in enumerate(every_figure()):
        out.figure(f, f'figure {i}')
    return (
        out.section('One')
        .table(scores(), 'scores')
        .section('Two: ä/ß?')
        .settings(dict(a=dict(b=1, c=[1, 2]), d='text', e=None), 'settings')
        .numbers({'n': '3\nof 4'})
    )


# -- the page


def test_the_page_keeps_its_promises(tmp_path):
    path = full_report().save(tmp_path / 'new' / 'report.html')
    page, rest = check_page(path.read_text(encoding='utf-8'))
    assert 'http:' not in rest and 'https:' not in rest
    assert [p.name for p in path.parent.iterdir()] == ['report.html']
    assert sum(t == 'section' for t, _ in page.tags) == 3 and sum(t == 'h1' for t, _ in page.tags) == 1
    assert all(a.get('aria-label') for t, a in page.tags if t == 'svg') and page.tags[0][1]['lang'] == 'en'
    assert not [k for k in ('/work', '/tmp', '/home', platform.node()) if k and k in rest]


def test_all_text_is_escaped():
    fig = figures.plot_comparison(scores().assign(label=EVIL), title=EVIL)
    out = (
        R.Report(EVIL, EVIL)
        .section(EVIL, EVIL)
        .figure(fig, EVIL)
        .table(pd.DataFrame({EVIL: [EVIL]}, index=pd.Index([EVIL], name=EVIL)), EVIL)
        .numbers({EVIL: EVIL})
        .settings({EVIL: EVIL}, EVIL)
    )
    out.cells([runs.cell(EVIL, EVIL, EVIL, 0.5, protocol=EVIL)], EVIL)
    page, _ = check_page(out.html())
    assert not [a for t, a in page.tags if t == 'img']


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_text_makes_a_whole_page(title, text):
    check_page(R.Report(title).section(title, text).table(pd.DataFrame({title: [text, 1]}), text).html())


def test_writing_twice_gives_the_same_bytes():
    assert full_report().html() == full_report().html()


def test_a_full_disk_leaves_the_last_report(tmp_path, monkeypatch):
    path = R.Report('first').save(tmp_path / 'r.html')
    before = path.read_bytes()

    def full(self, *args, **kw):
        open(self, 'w').write('<!doc')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(OSError, match='No space'):
        R.Report('second').save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['r.html']


def test_sections_of_the_same_name_have_their_own_address():
    out = R.Report('t').section('Same').section('Same').section('???')
    page, _ = check_page(out.html())
    assert len({a for a in page.addresses}) == 4  # three sections and the way to the content


# -- figures in the page


def test_ours_take_the_colour_of_the_page_and_others_keep_white():
    from matplotlib.figure import Figure

    other = Figure(figsize=(3, 2))
    other.subplots().plot([0, 1])
    ours = R.Report('t').figure(figures.plot_confusion(np.eye(2), 'ab'), 'c').html()
    assert (
        'currentColor' in ours
        and plot.INK not in ours.split('</style>')[1]
        and 'class="fig white"' not in ours
    )
    assert 'class="fig white"' in R.Report('t').figure(other, 'c').html()


def test_a_heavy_figure_becomes_a_bitmap():
    from matplotlib.figure import Figure

    heavy = Figure(figsize=(3, 2))
    rng = np.random.default_rng(0)
    heavy.subplots().scatter(*rng.random((2, 40_000)), s=1)
    text = R.Report('t').figure(heavy, 'points').html()
    page, _ = check_page(text)
    images = [a for t, a in page.tags if t == 'img']
    assert len(images) == 1 and images[0]['alt'] == 'points' and len(text) < 1_000_000


def test_each_svg_is_well_formed_and_keeps_its_text():
    svgs = re.findall(r'<svg.*?</svg>', full_report().html(), flags=re.S)
    assert len(svgs) == 4
    texts = [
        ' '.join(e.text or '' for e in ElementTree.fromstring(s).iter() if e.tag.endswith('text'))
        for s in svgs
    ]
    assert (
        'prediction' in texts[0]
        and 'unhealthy region' in texts[1]
        and '0.80 [0.70, 0.90]' in texts[2]
        and 'paper' in texts[3]
    )
    assert 'data:image/webp' in svgs[0]


def test_masks_are_recoded_without_changing_what_is_seen():
    import base64
    import io

    from PIL import Image

    frame = np.clip(np.add.outer(np.arange(64) * 2, np.arange(64)), 0, 255).astype(np.uint8)[None]
    svg = R.Report('t').figure(plot.plot_masks(frame), 'c').html()
    kind, raw = re.search(r'data:image/(\w+);base64,([^"]+)"', svg).groups()
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(raw))).convert('L')).astype(int)
    assert (
        seen.shape == (64, 64)
        and min(np.abs(seen - frame[0]).mean(), np.abs(seen[::-1] - frame[0]).mean()) < 3
    )


def test_only_figures_are_figures():
    with pytest.raises(TypeError, match='not str'):
        R.Report('t').figure('picture.png', 'c')


# -- plots


def test_plots_leave_pyplot_and_its_settings_alone():
    import matplotlib.pyplot as plt

    before, known = dict(mpl.rcParams), plt.get_fignums()
    for f in every_figure():
        R._figure_html(f, 1, 'alt')
    assert plt.get_fignums() == known and dict(mpl.rcParams) == before


def test_confusion_shows_counts_and_row_shares():
    texts = [
        t.get_text() for t in figures.plot_confusion(torch.tensor([[3, 1], [0, 0]]), ['a', 'b']).axes[0].texts
    ]
    assert texts == ['3', '75%', '1', '25%', '0', '0%', '0', '0%']  # an empty row is no division by zero


def test_comparison_puts_dots_where_the_numbers_are():
    ax = figures.plot_comparison(scores(), group='group').axes[0]
    x, y, paper = (
        *(l for l in ax.lines if l.get_label() in 'xy'),
        next(l for l in ax.lines if l.get_label() == R.PAPERS),
    )
    assert (
        list(x.get_xdata()) == [0.5, 0.6]
        and list(y.get_xdata()) == [0.7, 0.8]
        and x.get_marker() != y.get_marker()
        and x.get_color() != y.get_color()
    )
    assert sorted(zip(paper.get_xdata(), paper.get_ydata())) == [
        (0.55, 0),
        (0.9, pytest.approx(1 + 0.155)),
    ]  # shared: once, in the middle
    segments = [s for c in ax.collections for s in c.get_segments() if len(s) and not np.isnan(s).any()]
    assert sorted((s[0][0], s[1][0]) for s in segments) == [(0.4, 0.6), (0.6, 0.8), (0.7, 0.9)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['a', 'b'] and ax.get_ylim()[0] > ax.get_ylim()[1]
    with pytest.raises(ValueError, match=r"\['low', 'nobody'\]"):
        figures.plot_comparison(scores().drop(columns='low'), group='nobody')


def test_comparison_without_groups_or_intervals():
    ax = figures.plot_comparison(scores()[:2].drop(columns='theirs').assign(low=np.nan, high=np.nan)).axes[0]
    assert list(ax.lines[0].get_xdata()) == [0.5, 0.6] and not ax.figure.legends


def made_up(patients=6, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for i in range(patients):
        for j in range(6):
            rows.append(
                dict(
                    patient=f'p{i}',
                    frame=j,
                    label='ab'[i % 2],
                    **dict(zip(('p_a', 'p_b', 'p_c'), rng.dirichlet([1, 1, 0.2] + 2 * np.eye(3)[i % 2]))),
                )
            )
    return pd.DataFrame(rows)


def line(ax, start):
    return next(l for l in ax.lines if l.get_label().startswith(start))


def test_roc_bands_stand_under_their_class():
    from lus_fastai.stats.curves import roc, roc_bands

    curves, areas = roc(made_up(), n_boot=20)
    bands = roc_bands(made_up(), points=11, n_boot=20)
    plain, banded = (
        figures.plot_roc(curves, areas).axes[0],
        figures.plot_roc(curves, areas, bands=bands).axes[0],
    )
    assert not plain.collections and len(banded.collections) == 2  # nobody has class c; means have no band
    for name, shape in zip('ab', banded.collections):
        assert mpl.colors.to_hex(shape.get_facecolor()[0]) == mpl.colors.to_hex(
            line(banded, f'{name} ').get_color()
        )
        top = shape.get_paths()[0].vertices[:, 1].max()
        assert top == bands[bands['class'] == name].high.max()
    assert [l.get_label() for l in plain.lines] == [l.get_label() for l in banded.lines]


def test_precision_recall_is_a_staircase_with_chance():
    from lus_fastai.stats.curves import pr_curve

    curves, areas = pr_curve(made_up(), n_boot=20)
    fig = figures.plot_pr(curves, areas, 'title')
    ax = fig.axes[0]
    a = line(ax, 'a ')
    assert a.get_drawstyle() == 'steps-pre' and list(a.get_ydata()) == list(
        curves[curves['class'] == 'a'].precision
    )
    chance = areas.set_index('class').chance
    assert [l.get_ydata()[0] for l in ax.lines[4:]] == [
        chance[c] for c in ('a', 'b', 'micro', 'macro')
    ] and chance['a'] == 0.5
    assert legend_fits(fig)


def test_reliability_draws_only_bins_with_rows():
    from lus_fastai.stats.calibration import reliability

    r = reliability(made_up(), n_boot=20)
    one, two = (
        figures.plot_reliability(r),
        figures.plot_reliability({'before': r, 'after': r.assign(n=r.n.where(r.n > 2, 0))}),
    )
    ax, below = one.axes
    assert list(ax.lines[1].get_xdata()) == list(r.confidence[r.n > 0]) and list(
        ax.lines[1].get_ydata()
    ) == list(r.accuracy[r.n > 0])
    assert np.isclose(sum(b.get_height() for b in below.patches), 1) and not one.legends
    assert legend_fits(two) and [t.get_text() for t in two.legends[0].get_texts()] == ['before', 'after']
    assert two.axes[0].lines[1].get_marker() != two.axes[0].lines[2].get_marker()  # colour is not alone
    one_bar, left, right = (
        below.patches[0],
        *(
            p
            for p in two.axes[1].patches
            if p.get_height() and abs(p.get_x() - two.axes[1].patches[-1].get_x()) < 0.07
        ),
    )
    assert left.get_x() + left.get_width() <= right.get_x() + 1e-9 and one_bar.get_width() < 0.1
    with pytest.raises(ValueError, match='at least one table'):
        figures.plot_reliability({})


def test_abstention_beside_random():
    from lus_fastai.stats.calibration import abstention

    preds = made_up().assign(blind=0.0)
    named = {
        'largest probability': abstention(preds, n_boot=20)[0],
        'always the same': abstention(preds, 'blind', n_boot=20)[0],
    }
    fig = figures.plot_abstention(named)
    ax = fig.axes[0]
    assert (
        len(ax.lines) == 3 and len(ax.collections) == 2 and legend_fits(fig)
    )  # one level for both: the rows are the same
    assert (
        set(line(ax, 'at random').get_ydata()) == {named['always the same'].random[0]}
        and ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    )
    assert [
        t.get_text() for t in figures.plot_abstention(named['always the same']).legends[0].get_texts()
    ] == ['at random']


def test_curves_go_into_a_page():
    from lus_fastai.stats.calibration import abstention, reliability
    from lus_fastai.stats.curves import pr_curve, roc, roc_bands

    preds, before = made_up(), dict(mpl.rcParams)
    out, title = R.Report('t'), '<b> & "'
    for f in (
        figures.plot_roc(*roc(preds, 5), title, roc_bands(preds, 11, 5)),
        figures.plot_pr(*pr_curve(preds, 5), title),
        figures.plot_reliability({title: reliability(preds, n_boot=5)}, title),
        figures.plot_abstention({title: abstention(preds, n_boot=5)[0]}, title),
    ):
        out.figure(f, title)
    check_page(out.html())
    assert dict(mpl.rcParams) == before and 'class="fig white"' not in out.html()


def test_iou_plot_takes_the_rows_that_are_ious():
    table = pd.DataFrame(
        dict(
            level='pixel',
            metric=['pixel_accuracy', 'mean_iou', 'iou'],
            value=[0.9, 0.5, np.nan],
            low=0.4,
            high=0.6,
            **{'class': ['all', 'all', 'pleura']},
        )
    )
    ax = figures.plot_iou(table).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['mean', 'pleura'] and ax.lines[0].get_xdata()[
        0
    ] == 0.5


def test_mask_plot_names_only_codes_that_occur():
    frames = np.zeros((2, 8, 8), np.uint8)
    truth = np.full((2, 8, 8), 3)
    truth[0, 0] = 1
    truth[1, 1] = 255  # 255: no label
    fig = plot.plot_masks(frames, truth, None, SPARSE_COLORS, SPARSE, titles=['a', 'b'])
    assert (
        [t.get_text() for t in fig.legends[0].get_texts()] == ['B-line']
        and len(fig.axes) == 4
        and fig.axes[0].get_title() == 'a'
    )
    assert not plot.plot_masks(frames, np.full((2, 8, 8), 3), None, SPARSE_COLORS, SPARSE).legends
    with pytest.raises(ValueError, match='prediction'):
        plot.plot_masks(frames, truth, truth[:, :4])
    with pytest.raises(ValueError, match=r'\(8, 8\)'):
        plot.plot_masks(frames[0])


def legend_fits(fig):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(fig).draw()
    box, page = fig.legends[0].get_window_extent(), fig.bbox
    return box.x0 >= -1 and box.x1 <= page.x1 + 1 and box.y0 >= -1


@pytest.mark.parametrize('n', [1, 2, 3, 4, 6])
def test_legends_are_never_cut_off(n):
    frames, masks = np.zeros((n, 48, 48), np.uint8), np.tile(np.arange(48) // 7, (n, 48, 1))
    assert legend_fits(plot.plot_masks(frames, masks, masks))
    long = pd.DataFrame(
        [
            dict(
                label=l,
                group=f'pretrained on dense labels {k}'[: 12 + 3 * n],
                value=0.5 + k / 50,
                low=0.4,
                high=0.6,
                theirs=0.5,
            )
            for l in 'ab'
            for k in range(n)
        ]
    )
    assert legend_fits(figures.plot_comparison(long, group='group'))


# -- tables


def cells_of(df, **kw):
    page, _ = check_page(R.Report('t').table(df, 'c', **kw).html())
    return page


def test_numbers_are_right_aligned_and_rounded():
    df = pd.DataFrame(
        {
            'name': ['a', 'b'],
            'x': [0.12345, np.nan],
            'n': [3, 4],
            'iv': ['0.8\n[0.7, 0.9]', '–'],
            'neg': [-1.0, 2.0],
            'code': ['1', 'b'],
        },
        index=pd.Index(['r1', 'r2'], name='row'),
    )
    page = cells_of(df)
    heads = [a.get('class') for t, a in page.tags if t == 'th' and a.get('scope') == 'col']
    assert heads == [None, None, 'num', 'num', 'num', 'num', None]
    said = [d for _, d in page.cells]
    assert '0.123' in said and '–' in said and '3' in said and '-1.000' in said and '[0.7, 0.9]' in said
    assert sum(t == 'th' and a.get('scope') == 'row' for t, a in page.tags) == 2 and {'r1', 'r2'} <= set(said)
    assert '0.12' in [d for _, d in cells_of(df, digits=2).cells]


def test_the_first_screen_says_what_was_counted_and_what_it_is_not():
    score = R.headline(
        'patients',
        'by patient',
        (0.6, 0.4, 0.8),
        ['covid'] * 6 + ['regular'] * 3 + ['pneumonia'],
        'dense start',
    )
    assert score == {
        'patients right, folds by patient (dense start)': '0.600\n95 % interval 0.400 to 0.800\n'
        'a random guess: 0.333, always covid: 0.600'
    }
    assert R.headline('clips', 'by frame', (0.5, np.nan, np.nan), 'abab') == {
        'clips right, folds by frame': '0.500\na random guess: 0.500'
    }
    page, _ = check_page(
        R.Report(EVIL).summary(EVIL, 'b', 'c').numbers(score).glossary(list(R.GLOSSARY)).html()
    )
    assert [t for t, _ in page.tags].count('dt') == 1 + len(R.GLOSSARY) and [t for t, _ in page.tags].count(
        'li'
    ) == 3 + 1  # and one section to go to
    assert R.Report('t').html().count('Not a medical device') == 2  # above, and below
    with pytest.raises(ValueError, match='What was done'):
        R.Report('t').summary('', 'b', 'c')
    with pytest.raises(ValueError, match='guess'):
        R.chance_text([])


def test_odd_tables():
    assert cells_of(pd.DataFrame({'a': []})) and cells_of(pd.DataFrame())
    two = pd.DataFrame(np.eye(2), columns=pd.MultiIndex.from_product([['x'], ['p', 'q']]))
    assert 'x · p' in [d for _, d in cells_of(two).cells]
    many = pd.DataFrame(
        {'v': [1, 2]}, index=pd.MultiIndex.from_tuples([('a', 1), ('b', 2)], names=['k', 'l'])
    )
    assert {'k', 'l', 'a', 'b'} <= {d for _, d in cells_of(many).cells}
    assert '–' in [d for _, d in cells_of(pd.DataFrame({'a': [None, pd.NA, pd.NaT]})).cells]


def test_settings_are_flat_and_whole_numbers_stay_whole():
    page, _ = check_page(
        R.Report('t')
        .settings(dict(folds=3, lr=1e-3, nested=dict(a=dict(b=True)), empty={}, path=None, seeds=[0, 1]), 's')
        .html()
    )
    said = [d for _, d in page.cells][2:]
    assert dict(zip(said[::2], said[1::2])) == {
        'folds': '3',
        'lr': '0.001',
        'nested.a.b': 'true',
        'empty': '{}',
        'path': 'null',
        'seeds': '[0, 1]',
    }


def test_wide_scores_keep_the_order_and_refuse_to_merge():
    long = pd.DataFrame(
        dict(
            level=['frame', 'frame', 'clip'],
            metric=['f1', 'mean_iou', 'f1'],
            value=[0.5, 0.6, 0.7],
            low=[0.4, np.nan, 0.6],
            high=[0.6, np.nan, 0.8],
        )
    )
    wide = R.wide_scores(long, digits=2)
    assert list(wide.index) == ['frame', 'clip'] and list(wide.columns) == ['f1', 'mean iou']
    assert wide.values.tolist() == [['0.50\n[0.40, 0.60]', '0.60'], ['0.70\n[0.60, 0.80]', '–']]
    with pytest.raises(ValueError, match='filter'):
        R.wide_scores(pd.concat([long, long]))


def test_cells_become_a_table_per_protocol():
    cells = [
        runs.cell('T1', r, c, 0.5, (0.4, 0.6), 0.55 if p == 'paper split' else None, protocol=p)
        for p in ('by patient', 'paper split')
        for r in ('dense', 'none')
        for c in ('acc', 'f1')
    ]
    out = R.Report('t').cells(cells, 'Table of')
    page, _ = check_page(out.html())
    said = [d for _, d in page.cells]
    assert out.tables == 2 and said.count('[0.400, 0.600]') == 8 and said.count(f'{R.PAPERS} 0.550') == 4


# -- results

PROTOCOLS = {'by patient': dict(split_hash='ab12', description='3 folds', n=3)}


def results(tmp_path, **change):
    kw = dict(
        paper='gare',
        data='phantom',
        protocols=PROTOCOLS,
        seeds=[0, np.int64(1)],
        cells=[runs.cell('T', 'r', 'c', np.float32(0.5), np.array([0.4, 0.6]), 0.55, protocol='by patient')],
        hours=0.5,
        command='lus_repro gare',
        device='cpu',
    )
    return runs.results_json(tmp_path / 'r.json', **{**kw, **change})


def test_results_come_back_as_they_went(tmp_path):
    wrote = results(tmp_path)
    assert runs.read_results(tmp_path / 'r.json') == wrote == json.loads((tmp_path / 'r.json').read_text())
    assert set(wrote) == {
        'paper',
        'data',
        'versions',
        'device',
        'hours',
        'command',
        'seeds',
        'protocols',
        'cells',
    }
    assert wrote['seeds'] == [0, 1] and wrote['cells'] == [
        dict(
            protocol='by patient', table='T', row='r', column='c', ours=0.5, interval=[0.4, 0.6], theirs=0.55
        )
    ]
    table = runs.results_table(wrote)
    assert table[['ours', 'low', 'high', 'theirs']].iloc[0].tolist() == [
        0.5,
        0.4,
        0.6,
        0.55,
    ] and table.equals(runs.results_table(wrote['cells']))


def test_what_is_not_known_is_null(tmp_path):
    nan = [
        runs.cell('T', 'r', 'c', float('nan'), (np.nan, np.nan), None, protocol='by patient'),
        runs.cell('T', 'r', 'd', torch.tensor(0.25), (0.1, np.nan), protocol='by patient'),
    ]
    wrote = results(tmp_path, cells=nan)
    assert [(c['ours'], c['interval'], c['theirs']) for c in wrote['cells']] == [
        (None, None, None),
        (0.25, None, None),
    ]
    assert 'NaN' not in (tmp_path / 'r.json').read_text() and runs.results_table(wrote).low.isna().all()
    assert runs.results_table([]).empty


@pytest.mark.parametrize(
    'command,want',
    [
        ('lus_repro gare --data /mnt/secret/pocus --quick', 'lus_repro gare --data pocus --quick'),
        ('/usr/bin/lus_demo --data=/a/b', 'lus_demo --data=b'),
        ('lus_demo --out ~/r.html', 'lus_demo --out r.html'),
        ('lus_demo --data ../data/pocus --out a/b.html', 'lus_demo --data ../data/pocus --out a/b.html'),
        ('lus_demo --data "/a/b c/d"', 'lus_demo --data "b c/d"'),
    ],
)
def test_no_absolute_path_is_published(tmp_path, command, want):
    assert results(tmp_path, command=command)['command'] == want


def test_versions_say_nothing_about_the_machine():
    text = json.dumps(runs.versions())
    assert {'python', 'torch', 'torchvision', 'fastai', 'lus_fastai', 'numpy', 'phantom', 'platform'} == set(
        runs.versions()
    ) and '/' not in text
    assert (
        runs.versions()['torch'] == torch.__version__.split('+')[0]
        or runs.versions()['torch'] == torch.__version__
    )
    assert runs.device_name('cpu').startswith('cpu: ') and runs.device_name(torch.device('meta')) == 'meta'


c1 = dict(protocol='by patient', table='T', row='r', column='c', ours=0.5, interval=None, theirs=None)


@pytest.mark.parametrize(
    'change,words',
    [
        (dict(cells=[c1, c1]), 'cell 1 repeats'),
        (dict(cells=[{**c1, 'protocol': 'by clip'}]), "protocol 'by clip'"),
        (dict(cells=[{k: v for k, v in c1.items() if k != 'theirs'}]), r"cell 0 misses \['theirs'\]"),
        (dict(cells=[{**c1, 'interval': [0.6, 0.4]}]), 'low, high'),
        (dict(cells=[{**c1, 'interval': [0.6]}]), 'low, high'),
        (dict(cells=[{**c1, 'ours': '0.5'}]), "ours is a number or null, got '0.5'"),
        (dict(protocols={}), 'protocols is empty'),
        (dict(protocols={'by patient': dict(description='x')}), 'split_hash'),
        (dict(hours=-1), 'hours'),
        (dict(hours=float('nan')), 'hours'),
        (dict(seeds=[]), 'seeds'),
        (dict(paper=''), 'paper'),
    ],
)
def test_results_that_cannot_be_trusted_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        results(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_result_is_named(tmp_path):
    for text, words in (('{"paper": ', 'no JSON'), ('[]', 'dictionary'), ('{"paper": "x"}', 'missing')):
        (tmp_path / 'bad.json').write_text(text)
        with pytest.raises(ValueError, match='bad.json.*' + words):
            runs.read_results(tmp_path / 'bad.json')


def test_an_intact_result_survives_a_refused_one(tmp_path):
    wrote = results(tmp_path)
    with pytest.raises(ValueError):
        results(tmp_path, seeds=[])
    assert runs.read_results(tmp_path / 'r.json') == wrote


def test_the_module_is_light():
    import subprocess
    import sys

    code = (
        "import sys, lus_fastai.report; "
        "print([m for m in ('matplotlib', 'fastai', 'sklearn', 'seaborn', 'PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


# -- the model card


def card(tmp_path, **change):
    from safetensors.torch import save_file

    if not (tmp_path / 'w.safetensors').exists():
        save_file(
            dict(
                a=torch.zeros(3, 4),
                b=torch.zeros(5, dtype=torch.float16),
                n=torch.zeros(7, dtype=torch.int64),
                **{'bn.running_mean': torch.zeros(9)},
            ),
            tmp_path / 'w.safetensors',
        )
    about = dict(
        title='A backbone',
        weights=tmp_path / 'w.safetensors',
        data='made up',
        licence='MIT',
        split_hash='ab12',
        results={'accuracy': '.8 [.7, .9]', 'a|b': 'x\ny'},
        usage="create_backbone('resnet18')",
        settings=dict(a=dict(b=1), c='d'),
    )
    return R.model_card(tmp_path / 'w.md', **{**about, **change}).read_text(encoding='utf-8')


def test_a_model_card_says_what_the_file_is(tmp_path):
    import hashlib

    import yaml

    text = card(tmp_path)
    raw = (tmp_path / 'w.safetensors').read_bytes()
    assert hashlib.sha256(raw).hexdigest() in text and f'{len(raw):,} bytes' in text
    assert (
        '| parameters | 17 (F16, F32), in a file of 4 tensors |' in text
    )  # 3*4 + 5; integers and running statistics are no parameters
    assert (
        '| accuracy | .8 [.7, .9] |' in text
        and '| a\\|b | x y |' in text
        and '| a.b | 1 |' in text
        and '| torch | ' in text
        and "```python\ncreate_backbone('resnet18')\n```" in text
    )
    head = yaml.safe_load(text.split('---\n')[1])
    assert (
        head['license'] == 'mit'
        and head['library_name'] == 'lus_fastai'
        and 'lung-ultrasound' in head['tags']
    )
    assert (
        text.startswith('---\n')
        and 'diagnosis' in text
        and sorted(p.name for p in tmp_path.iterdir()) == ['w.md', 'w.safetensors']
    )
    sentence = card(tmp_path, licence='derived from CC BY-NC-ND 4.0: research only')
    assert (
        yaml.safe_load(sentence.split('---\n')[1])['license'] == 'other'
        and 'derived from CC BY-NC-ND 4.0: research only' in sentence
    )
    assert 'license: cc-by-nc-nd-4.0' in card(
        tmp_path, licence='CC BY-NC-ND 4.0'
    ) and 'Nothing was measured' in card(tmp_path, results={})
    assert '````python\n```\n````' in card(tmp_path, usage='```')


@pytest.mark.parametrize(
    'said,want',
    [
        ('/mnt/me/data/pocus and https://a.example/b/c', 'pocus and https://a.example/b/c'),
        ('file:///srv/x/y.bin', 'y.bin'),
        ('C:\\Users\\me\\w.bin', 'w.bin'),
        ('~/a/b', 'b'),
        ('and/or, 1/2, (a)/b, a / b', 'and/or, 1/2, (a)/b, a / b'),
    ],
)
def test_a_model_card_names_no_folder(tmp_path, said, want):
    assert (
        f'\n{want}\n' in card(tmp_path, data=said)
        and f'| where | {want} |' in card(tmp_path, settings=dict(where=said))
        and str(tmp_path) not in card(tmp_path, settings=dict(p=tmp_path, l=[tmp_path]))
    )


def test_a_model_card_refuses_what_it_cannot_describe(tmp_path):
    before = card(tmp_path)
    with pytest.raises(FileNotFoundError, match='there is no file .*gone'):
        card(tmp_path, weights=tmp_path / 'gone.safetensors')
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'w.safetensors').read_bytes()[:-1])
    with pytest.raises(ValueError, match='cut.safetensors is no safetensors'):
        card(tmp_path, weights=tmp_path / 'cut.safetensors')
    with pytest.raises(ValueError, match="'data', 'usage'"):
        card(tmp_path, data=' ', usage=None)
    with pytest.raises(ValueError, match='named .md'):
        R.model_card(
            tmp_path / 'w.safetensors',
            title='t',
            weights=tmp_path / 'w.safetensors',
            data='d',
            licence='l',
            split_hash='s',
            results={},
            usage='u',
            settings={},
        )
    assert (tmp_path / 'w.md').read_text() == before and not list(tmp_path.glob('.*'))


def test_a_label_with_dollars_is_text_in_every_figure():
    bad, worse = r'$\bad$', '$x_{$'
    rows = scores().assign(label=lambda d: [bad if i % 2 else worse for i in range(len(d))])
    frames = np.zeros((2, 8, 8), np.uint8)
    for fig in (
        figures.plot_confusion(np.eye(2, dtype=int), [bad, worse], title=bad),
        figures.plot_comparison(rows, title=bad),
        plot.plot_masks(frames, frames, titles=[bad, worse], names=[bad, worse, 'background']),
    ):
        assert bad in plot.save_figure(fig, format='svg').decode()
    page = R.Report(bad).figure(figures.plot_confusion(np.eye(2, dtype=int), [bad, worse]), worse).html()
    assert bad in page
