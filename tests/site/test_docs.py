"The site without Quarto: what its checks find, what the pages of results say, and what a browser sees."

import ast
import json
import re
import shutil
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tracked

PAGES = 'index.ipynb', 'models/classifiers.ipynb', 'papers/claims.ipynb'  # processed and looked at here
MADE = 'results.qmd', 'results/arora.qmd', 'references.qmd'


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    return import_module


@pytest.fixture
def docs(tools):
    return tools('docs')


@pytest.fixture
def checks(tools):
    return tools('docs_checks')


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "A copy of what the site is made from, derived files included."
    folder = tmp_path_factory.mktemp('site')
    tops = (
        'nbs',
        'results',
        'lus_fastai',
        '_quarto.yml',
        'settings.ini',
        'pyproject.toml',
        'styles.css',
        'words.lua',
    )
    for p in tracked():
        if p.relative_to(ROOT).parts[0] in (*tops, 'README.md', 'references.bib', 'ruff.toml'):
            to = folder / p.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, to)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools'))
        import_module('docs').derive(folder)
    return folder


@pytest.fixture
def site(sources, tmp_path):
    "The same, to break."
    return shutil.copytree(sources, tmp_path / 'site')


def add(path, *cells):
    "Add cells to a notebook."
    nb = json.loads(path.read_text(encoding='utf-8'))
    nb['cells'] += [dict(id=f'new{i}', metadata={}, **c) for i, c in enumerate(cells)]
    path.write_text(json.dumps(nb), encoding='utf-8')


def markdown(text):
    return dict(cell_type='markdown', source=text)


def code(text, *outputs):
    return dict(cell_type='code', source=text, outputs=list(outputs), execution_count=None)


def shown(**data):
    return dict(output_type='display_data', metadata={}, data=data)


PNG = {'image/png': 'iVBORw0KGgo='}


# sources


def test_site_is_sound(sources, docs):
    assert docs.check(sources) == []


@pytest.mark.parametrize(
    'text, fault',
    [
        ('[there](nowhere.ipynb)', 'links to nowhere.ipynb, which does not exist'),
        ('![](images/phantom.png)', 'an image has no alternative text'),
        ('as [@nobody2021] says', '@nobody2021 is no label of a figure and not in references.bib'),
        ('see @fig-lost', '@fig-lost is no label of a figure and not in references.bib'),
        ('a list of <path> and more', '<path> in the text would vanish'),
    ],
)
def test_a_fault_in_the_text_is_found(site, docs, text, fault):
    add(site / 'nbs/toys.ipynb', markdown(text))
    found = docs.check(site)
    assert len(found) == 1 and found[0].startswith('toys.ipynb: cell') and fault in found[0]


def test_code_formulas_and_addresses_are_no_faults(site, docs):
    text = 'see `[not](this)` and `@patch`, $a<b>c$, [@gare2021], mail x@example.org, <b>bold</b>, '
    text += '[or](https://example.org)\n\n```python\n@patch\nx = "<path>"\n```\n'
    add(site / 'nbs/toys.ipynb', markdown(text), code('#| label: fig-a\n1'), markdown('see @fig-a'))
    assert docs.check(site) == []


def test_site_check_names_what_is_wrong(site, docs):
    (site / 'nbs/core.ipynb').rename(site / 'nbs/lost.ipynb')
    add(site / 'nbs/lost.ipynb', dict(cell_type='raw', source='---\na: [1\n---'))
    lost = json.loads((site / 'nbs/lost.ipynb').read_text(encoding='utf-8'))
    lost['cells'][0]['source'] = 'no title'
    (site / 'nbs/lost.ipynb').write_text(json.dumps(lost), encoding='utf-8')
    (site / 'nbs/new.qmd').write_text('---\ntitle: new\n---\n', encoding='utf-8')
    (site / 'README.md').write_text('old', encoding='utf-8')
    faults = '\n'.join(docs.check(site))
    for what in (
        'sidebar names nbs/core.ipynb, which does not exist',
        'navbar names nbs/core.ipynb, which does not exist',
        'nbs/lost.ipynb is not in the sidebar',
        'nbs/new.qmd is not in the sidebar',
        'front matter',
        'lost.ipynb: the first cell',
        'README.md is not what nbs/index.ipynb gives',
    ):
        assert what in faults, what
    (site / 'nbs/_quarto.yml').write_text('a: [1', encoding='utf-8')
    assert docs.check(site)[0].startswith('nbs/_quarto.yml:')


def test_the_page_of_notebooks_lists_each_with_its_line_and_colab(sources, docs):
    page, cfg = (sources / 'nbs/notebooks.qmd').read_text(encoding='utf-8'), docs.settings()
    repo = cfg['git_url'].split('github.com/')[1]
    sidebar = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']
    names = [p for s in sidebar['contents'] if 'section' in s for p in docs.pages(s) if p.endswith('.ipynb')]
    assert len(names) > 60
    for name in names:
        colab = f"https://colab.research.google.com/github/{repo}/blob/{cfg['branch']}/{name}"
        assert f']({name.removeprefix("nbs/")})' in page and colab in page, name


def test_the_page_of_names_lists_functions_and_classes(sources):
    page = (sources / 'nbs/api.qmd').read_text(encoding='utf-8')
    assert '| [`patient_sums`](stats/bootstrap.ipynb#patient_sums) | Sum the rows of each patient. |' in page
    assert '[`FrameStore`](data/store.ipynb#framestore)' in page and '`_' not in page


def test_the_bibliography_has_papers_and_data_sets(checks):
    from lus_fastai.data.sources import SOURCES

    papers = {'gare2021', 'cheng2021', 'arora2020', 'chen2021', 'merand2021'}
    keys = checks.keys_of(ROOT / 'references.bib')
    assert papers | set(SOURCES) <= keys
    text = '\n'.join(p.read_text(encoding='utf-8') for p in (ROOT / 'nbs/papers').glob('*.ipynb'))
    assert papers <= {k for k in keys if f'@{k}' in text}


def test_quarto_is_told_what_the_site_promises():
    cfg = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    html, web = cfg['format']['html'], cfg['website']
    assert set(html['theme']) == {'light', 'dark'} and html['code-copy'] is True
    assert html['code-overflow'] == 'wrap' and html['html-math-method'] == 'mathml'
    assert [html['grid'][k] for k in ('sidebar-width', 'margin-width')] == ['210px', '210px']
    assert [o['text'] for o in web['navbar']['left']] == ['Learn', 'Use', 'Papers', 'Results', 'API']
    assert web['page-navigation'] and 'Not a medical device' in web['page-footer']['right']
    assert 'font-size: .82em' in (ROOT / 'styles.css').read_text(encoding='utf-8')


def test_the_logo_is_drawn_by_code(tools):
    assert (ROOT / 'nbs/images/logo.svg').read_text(encoding='utf-8') == tools('logo').logo()


# what nbdev makes of a notebook

WIDE = dict(width=900, height=300)
LABEL, CAPTION, ALT = '#| label: fig-a', '#| fig-cap: "A curve."', '#| fig-alt: "It falls."'


@pytest.mark.parametrize(
    'cell, fault',
    [
        (code('show_doc(overlay)'), 'show_doc(overlay) has no documentation: no output'),
        (code(f'{LABEL}\n{ALT}\nplot()', shown(**PNG)), 'its figure has no caption'),
        (code(f'{LABEL}\n{CAPTION}\nplot()', shown(**PNG)), 'its figure has no alternative text'),
        (code(f'{CAPTION}\n{ALT}\nplot()', shown(**PNG)), 'its figure has no label'),
        (
            code(f'{LABEL}\n#| fig-cap: A curve: it falls.\n{ALT}\nplot()', shown(**PNG)),
            '"#| fig-cap" is no YAML',
        ),
        (
            code(f'{LABEL}\n{CAPTION}\n{ALT}\nplot()', dict(shown(**PNG), metadata={'image/png': WIDE})),
            'a picture of 900 pixels, and 800 fit',
        ),
        (code('x = 1\n#| hide'), '"#| hide" stands below code, so it would show'),
        (code('#| hidden\nx = 1'), '"#| hidden" is no option that Quarto knows'),
        (code('fig', shown(**{'text/plain': '<Figure size 640x480 with 1 Axes>'})), 'would show as <Figure'),
        (code('x = ' + '1 + ' * 30 + '1'), 'a line of 125 characters'),
        (dict(cell_type='raw', source='some text'), 'a raw cell would show as it is'),
        (markdown('[there](nowhere.ipynb)'), 'links to nowhere.ipynb'),
    ],
)
def test_a_fault_in_a_processed_cell_is_found(checks, cell, fault):
    found = checks.cell_faults([cell], ROOT / 'nbs/toys.ipynb', set())
    assert len(found) == 1 and fault in found[0]


def test_sound_cells_have_no_faults(checks):
    drawn = code(f'{LABEL}\n{CAPTION}\n{ALT}\nplot()', shown(**PNG))
    told = code('show_doc(overlay)', shown(**{'text/markdown': '### overlay'}))
    wrapped = code('#| echo: false\nx = ' + '1 + ' * 30 + '1')
    text = code(f'"{"a docstring wraps as text does, " * 4}"')
    hidden = code('#| output: false\nplot()', shown(**PNG))
    cells = [drawn, told, wrapped, text, hidden, dict(cell_type='raw', source='---\ntitle: a\n---')]
    assert checks.cell_faults(cells, ROOT / 'nbs/toys.ipynb', set()) == []


def test_an_error_in_a_documented_name_is_told(checks):
    failed = dict(output_type='error', ename='TypeError', evalue='ambiguous\narray')
    assert checks.told(code('show_doc(overlay)', failed)) == 'TypeError: ambiguous array'


@pytest.mark.slow
def test_nbdev_processes_every_notebook(checks, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('IN_TEST', '1')
    assert checks.process(ROOT) == []


@pytest.fixture
def cells(tools):
    return tools('docs_cells')


def test_long_tests_and_plots_are_folded(cells):
    tests = 'test_eq(1, 1)\nassert 2 == 2\nwith expect_fail(ValueError):\n    int("a")'
    assert cells.folding(tests, []) == 'Tests'
    assert cells.folding('test_eq(1, 1)\nassert 2 == 2', []) == ''  # short: an example
    assert cells.folding('x = train()\n' + tests, []) == ''  # does something
    assert cells.folding(tests, [dict(output_type='stream', text='a')]) == ''  # shows something
    plot = '\n'.join(f'ax.plot({i})' for i in range(5))
    assert cells.folding(plot, [shown(**PNG)]) == 'Code of the figure'
    assert cells.folding('plot_roc(preds)', [shown(**PNG)]) == ''
    assert cells.folding('! ls', []) == ''
    assert cells.folding('def a():\n    pass\n\n\nquiz = Quiz(\n    []\n)', []) == 'Code of the quiz'
    assert cells.folding('count = Exercise(\n    question=a\n)', []) == 'Code of the exercise'
    assert cells.folding('x = 1\n' * 34, []) == '' and cells.folding('x = 1\n' * 35, []) == 'Code'


def test_long_helpers_are_folded_under_what_they_do(cells):
    helper = 'def _half(x):\n    "Half of \\"it\\"."\n' + '    x = x / 2\n' * 9 + '    return x'
    assert cells.folding(helper, []) == '_half: Half of "it".'
    assert cells.folding(helper.replace('_half', 'plot_half'), []) == 'plot_half: Half of "it".'
    assert cells.folding('_N = 3\n\n' + helper, []) == '_half: Half of "it".'
    assert cells.folding(helper.replace('_half', 'half'), []) == ''  # public: what the page is about
    assert cells.folding(helper + '\n\ndef half(x):\n    return _half(x)', []) == ''
    assert cells.folding('def _half(x):\n    return x / 2', []) == ''  # short
    cell = Cell(code(helper))
    cells.fold_code(cell)
    assert cell.source.splitlines()[1] == '#| code-summary: "_half: Half of \\"it\\"."'


class Cell(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


def test_a_cell_is_folded_once_and_not_against_its_will(cells):
    tests = 'test_eq(1, 1)\n' * 3
    cell = Cell(code(tests))
    cells.fold_code(cell)
    assert cell.source.startswith('#| code-fold: true\n#| code-summary: "Tests"\n')
    for own in ('#| code-fold: false\n', '#| echo: false\n'):
        cell = Cell(code(own + tests))
        cells.fold_code(cell)
        assert cell.source == own + tests


def test_a_fold_that_is_asked_for_gets_a_name(cells):
    cell = Cell(code('#| code-fold: true\nquiz = Quiz(\n    []\n)'))
    cells.fold_code(cell)
    assert cell.source.startswith('#| code-summary: "Code of the quiz"\n#| code-fold: true\n')
    cell = Cell(code('#| code-fold: true\nplot()', shown(**PNG)))
    cells.fold_code(cell)
    assert cell.source.startswith('#| code-summary: "Code of the figure"\n')
    own = '#| code-fold: true\n#| code-summary: "mine"\nquiz = Quiz(\n    []\n)'
    cell = Cell(code(own))
    cells.fold_code(cell)
    assert cell.source == own


def test_private_methods_have_no_entry(cells):
    for name in '_Search.sector', 'Audit.__repr__', 'lus_fastai.core.Answer.__str__':
        cell = Cell(code(f'show_doc({name})', shown(**{'text/markdown': 'a'})))
        cells.hide_private(cell)
        assert cell.source == '#| include: false' and cell['outputs'] == []
    for name in 'MaskSet.__getitem__', 'Audit', 'audit':
        cell = Cell(code(f'show_doc({name})', shown(**{'text/markdown': 'def a():\n\n*Says it.*'})))
        cells.hide_private(cell)
        assert cell.source == f'show_doc({name})' and len(cell['outputs']) == 1
    cell = Cell(code('show_doc(MaskSet.name)', shown(**{'text/markdown': 'def name():\n\n'})))
    cells.hide_private(cell)
    assert cell.source == '#| include: false'


def test_outputs_have_no_types_of_numpy_and_pandas(cells):
    def plain(text, *more):
        cell = Cell(code('a', shown(**{'text/plain': text}), *more))
        cells.plain_outputs(cell)
        return [o['data']['text/plain'] for o in cell['outputs'] if 'image/png' not in o['data']]

    assert plain("{'a': np.float64(0.5), 'b': np.int64(-3)}") == ["{'a': 0.5, 'b': -3}"]
    assert plain('a    1\nb    2\nName: count, dtype: int64') == ['a    1\nb    2']
    assert plain('a    1\nLength: 9, dtype: float64') == ['a    1']
    assert plain('array([1.], dtype=float32)') == ['array([1.], dtype=float32)']
    assert plain('<matplotlib.legend.Legend>', shown(**PNG)) == [] != plain('<Answer>')


def test_a_long_head_of_a_row_is_broken(cells):
    name = 'balanced accuracy by source, this head, picked with these patients in view'
    page = f'<table><tr><th class="a">{name}</th><th>short &amp; plain</th><td>{name}</td></tr></table>'
    cell = Cell(code('a', shown(**{'text/html': page})))
    cells.break_heads(cell)
    got = cell['outputs'][0]['data']['text/html']
    assert got.replace('<br>', ' ') == page and got.count('<br>') == 2
    head = re.search(r'<th class="a">(.*?)</th>', got)[1]
    assert all(len(line) <= cells.HEAD for line in head.split('<br>'))
    many = f'<tr><th>{name[:30]}</th>{"<td>1</td>" * cells.MANY}</tr>'  # would fit beside fewer columns
    more = f'<tr><th>temporal ensembling</th>{"<td>0.7 [0.6, 0.8]</td>" * (cells.MANY + 1)}</tr>'
    for page in (many, more):
        cell = Cell(code('a', shown(**{'text/html': page})))
        cells.break_heads(cell)
        assert cell['outputs'][0]['data']['text/html'].count('<br>') == 1


def test_an_interval_in_a_table_is_not_broken(cells):
    cell = Cell(
        code('a', shown(**{'text/html': '<td>0.685 [0.58, 0.76]</td><td>-0.1 [-0.3, +0.1], [a, b]</td>'}))
    )
    cells.break_heads(cell)
    kept = '<td>0.685 [0.58,\N{NO-BREAK SPACE}0.76]</td><td>-0.1 [-0.3,\N{NO-BREAK SPACE}+0.1], [a, b]</td>'
    assert cell['outputs'][0]['data']['text/html'] == kept


def test_private_names_are_no_links(cells):
    cell = Cell(markdown('[`_a`](https://lus.org/b.html#_a) and [`b`](https://lus.org/b.html#b)'))
    cells.unlink_private(cell)
    assert cell.source == '`_a` and [`b`](https://lus.org/b.html#b)'


def test_a_picture_that_stands_alone_has_alternative_text(cells):
    cell = Cell(markdown('![A fan.](a.png)\n\nwords ![b](b.png)\n\n[![c](c.png)](c.ipynb)'))
    cells.name_pictures(cell)
    assert cell.source == '![A fan.](a.png){fig-alt="A fan."}\n\nwords ![b](b.png)\n\n[![c](c.png)](c.ipynb)'


def test_a_link_holds_no_other_link(cells):
    cell = Cell(markdown('see [the `b`](../b.ipynb), [`c`](c.ipynb#c) and [d](d.ipynb)'))
    right = cell.source
    cell.source = right.replace('`b`', '[`b`](https://lus.org/b.html#b)').replace(
        '`c`', '[`c`](https://lus.org/c.html)'
    )
    cells.unlink_private(cell)
    assert cell.source == right


def test_a_default_has_no_address_in_memory(cells):
    text = 'log:__main__.Log=<__main__.Log object at 0x7f0b307dfa10>, n:int=3'
    cell = Cell(code('show_doc(a)', shown(**{'text/markdown': text})))
    cells.steady_defaults(cell)
    assert cell['outputs'][0]['data']['text/markdown'] == 'log:Log=Log(), n:int=3'
    text = (
        'def A(\n    *, before_fit:NoneType=None, after_epoch:NoneType=None,\n    after_fit:NoneType=None\n):'
    )
    cell = Cell(code('show_doc(A)', shown(**{'text/markdown': text})))
    cells.steady_defaults(cell)
    assert cell['outputs'][0]['data']['text/markdown'] == 'def A(\n    **events\n):'


def test_code_is_broken_to_fit_and_means_the_same(cells):
    words = 'a long message with many words, ' * 3
    text = f"#| label: a\nprint(\n    f'{words}{{x:.3f}} {words}'\n)\ny = [{', '.join(map(str, range(40)))}]"
    cell = Cell(code(text))
    cells.fit_code(cell)
    options, shown_code = cells.split_options(cell.source)
    assert options == {'label': 'a'} and ast.dump(ast.parse(shown_code)) == ast.dump(ast.parse(text))
    assert len(max(shown_code.splitlines(), key=len)) < len(max(text.splitlines(), key=len))
    magic = Cell(code('! ' + 'a' * 100))
    cells.fit_code(magic)
    assert magic.source == '! ' + 'a' * 100


# results


@pytest.fixture
def results(tools):
    return tools('docs_results')


def result(**more):
    cell = dict(protocol='by patient', table='2', row='Dense', column='F1', ours=0.70126, theirs=0.762)
    cells = [dict(cell, interval=[0.6, 0.8]), dict(cell, row='a|b', ours=None, interval=None, theirs=None)]
    about = dict(description='honest', split_hash='abc')
    run = dict(
        paper='Gare et al. 2021', data='phantom', seeds=[0], hours=1.5, device='cpu', command='lus_repro'
    )
    return dict(run, cells=cells, protocols={'by patient': about}, versions={}, **more)


def test_a_line_breaks_before_an_interval_and_never_within(results):
    text = results.number_text(0.68451, [0.5812, 0.7641])
    assert text.split(' ') == ['0.685', '[0.58,\N{NO-BREAK SPACE}0.76]']
    assert results.number_text(0.0021, [0.0011, 0.0032]).endswith('[0.001,\N{NO-BREAK SPACE}0.003]')
    assert (
        results.number_text(-0.05, [-0.2, 0.1], '+').startswith('-0.050') and results.number_text(None) == '–'
    )


def test_a_table_is_pivoted_and_turned_where_it_is_wide(results):
    def cells(rows, columns):
        return [dict(row=f'r{i}', column=f'c{j}', ours=0.5) for i in range(rows) for j in range(columns)]

    heads = [x for x in results.pivot(cells(2, 3)) if x.startswith('|  |')]
    assert heads == ['|  | c0 | c1 | c2 |']
    turned = results.pivot(cells(2, 8))
    assert turned[0] == '| score | r0 | r1 |' and len(turned) == 2 + 8 + 1
    long = [dict(c, row='a name of a row that is long ' + c['row']) for c in cells(9, 8)]
    assert [x.count('|') - 2 for x in results.pivot(long) if x.startswith('|  |')] == [2, 3, 3]
    beneath = [x.count('|') - 2 for x in results.pivot(cells(9, 9)) if x.startswith('|  |')]
    assert beneath == [3, 3, 3]  # scores


def test_a_short_run_took_minutes(results):
    for hours, words in (
        (0.01, '1 minute of'),
        (0.05, '3 minutes of'),
        (3.8, '3.8 hours of'),
        (0, 'No network'),
    ):
        assert words in results.run_facts(dict(hours=hours))


def test_settings_that_changed_since_a_run_are_named(results):
    from lus_fastai.papers import gare

    def changed(command, then):
        return results.changed_settings(dict(command=command, protocols=dict(p=dict(settings=then))), 'gare')

    today = json.loads(json.dumps(asdict(replace(gare.DEFAULT, folds=5))))
    command = 'lus_repro gare --data pocus --settings "folds=5"'
    assert changed(command, today) == []
    assert changed('lus_repro gare --data pocus', today) == ['folds']
    then = {k: v for k, v in today.items() if k != 'size'} | dict(width=3, gone=1)
    assert changed(command, then) == ['gone', 'size', 'width']
    quick = json.loads(json.dumps(asdict(gare.QUICK)))
    assert changed('lus_repro gare --data phantom --quick', quick) == []


def test_every_stored_protocol_has_a_title(results, tools):
    for stem, run in results.read_all(ROOT / 'results').items():
        paper = results.module_of(stem)
        names = {c['protocol'] for c in run['cells']}
        assert names <= set(tools('docs_names').PROTOCOLS[paper]), f'{stem}: a title in tools/docs_names.py'
    assert results.protocol_title('gare', 'a new one') == 'a new one'


def test_counts_are_whole_and_names_are_spelled_as_in_the_field(results):
    assert results.number_text(13.0) == '13' and results.number_text(1.0) == '1.000'
    assert results.number_text(13.0, [12.0, 14.0]).startswith('13.000')
    cells = [dict(row='b_lines', column='f1 by clip', ours=0.5), dict(row='b', column='iou', ours=2.0)]
    lines = results.pivot(cells)
    assert lines[0] == '|  | F1 by clip | IoU |' and lines[2].startswith('| B-lines | 0.500 |')


def test_the_preview_numbers_figures_and_refers_to_them(tools):
    figure = '::: {{#fig-{0}}}\n\n<figcaption>Of {0}.</figcaption>\n\n:::\n'
    text = tools('preview').numbered(f"{figure.format('a')}{figure.format('b')}see @fig-b, not `@fig-b`.")
    assert '>Figure 1: Of a.<' in text and '>Figure 2: Of b.<' in text
    assert text.endswith('see [Figure\N{NO-BREAK SPACE}2](#fig-b), not `@fig-b`.')


def shown_text(page):
    "Markdown with the brackets and blanks that a reader sees."
    return re.sub(r'\\([\[\]])', r'\1', page).replace('\N{NO-BREAK SPACE}', ' ')


def test_a_paper_has_a_page_with_quick_runs_last(results):
    pages = results.paper_pages({'gare-phantom-quick': result(), 'gare-pocus': result()})
    page = shown_text(pages['gare'])
    assert list(pages) == ['gare']
    assert page.index('## Data: the phantom\n') < page.index('## Data: the phantom, quick run')
    assert '0.701 [0.60, 0.80] (paper: 0.762)' in page and 'a\\|b' in page and '### by patient' in page
    assert 'Honest. In the file this is protocol `by patient`, split `abc`.' in page


def test_a_protocol_has_a_title_on_the_page(results):
    run = result()
    run['protocols'] = {'classification by patient': run['protocols'].pop('by patient')}
    run['cells'] = [dict(c, protocol='classification by patient') for c in run['cells']]
    page = results.paper_pages({'gare-phantom': run})['gare']
    assert '### Classification, folds by patient' in page and 'protocol `classification by patient`' in page


def test_a_page_has_the_evidence(results):
    training = dict(protocol='by patient', row='Dense', seed=0, reasons=['still falls'])
    gap = dict(protocol='by patient', column='F1', a='Dense', b='none', value=0.1, low=-0.1, high=0.3, p=0.25)
    build = dict(torch='2', device='cpu', precision='fp32')
    builds = [dict(build, trainings=['dense-s0']), dict(build, precision='bf16', trainings=['none-s0'])]
    run = result(differences=[gap], not_run=['none-s2'], trainings={'dense-s0': training}, builds=builds)
    page = shown_text(results.paper_pages({'gare-phantom': run})['gare'])
    assert '| Dense minus none | +0.100 [-0.10, +0.30] † |' in page and '| Dense † |' in page
    assert '- Trained too little: Dense, by patient (1 training; still falls).' in page
    assert '- Trained apart: dense-s0: torch 2, cpu, fp32; none-s0: torch 2, cpu, bf16.' in page
    assert '- Not run: none-s2.' in page


def test_builds_that_differ_by_a_spelling_are_one(results):
    build = dict(torch='2', device='cpu: x86_64, 1 threads', precision='fp32', numpy='2.4')
    builds = [
        dict(build, trainings=['a']),
        dict(build, device='cpu: x86_64, 1 thread', trainings=['b']),
        dict(build, device='cpu: x86_64, 2 threads', trainings=['c']),
        dict(build, trainings=['d']),
        dict(build, numpy='2.5', trainings=['e']),
    ]
    found = results.distinct_builds(dict(builds=builds))
    assert [b['trainings'] for b in found] == [['a', 'b', 'd'], ['c'], ['e']]
    assert [b['trainings'] for b in builds] == [['a'], ['b'], ['c'], ['d'], ['e']]  # left as they are
    page = results.paper_pages({'gare-phantom': result(builds=builds[:2])})['gare']
    assert 'Trained apart' not in page and 'What to know' not in page
    for stem, run in results.read_all(ROOT / 'results').items():
        devices = {re.sub('threads', 'thread', b['device']) for b in run.get('builds', [])}
        assert ('Trained apart' in str(results.remarks(run, 'gare'))) == (len(devices) > 1), stem


def test_what_was_typed_is_a_block_of_code(results):
    command = "lus_repro gare --settings \"parts=('core',)\""
    page = results.paper_pages({'gare-phantom': dict(result(), command=command)})['gare']
    assert f'```sh\n{command}\n```\n\n1.5 hours of training on cpu; seed 0;' in page


def test_a_column_without_a_value_is_not_shown(results):
    rows = [['a', '–', '0.1', ''], ['b', '', '–', '–']]
    assert results.without_empty(list('wxyz'), rows) == (['w', 'y'], [['a', '0.1'], ['b', '–']])
    assert results.without_empty(['claim', 'x'], [['', '–']]) == (['claim'], [['']])
    scores = [dict(row=r, column=c, ours=None) for r in 'ab' for c in ('F1', 'spread')]
    scores[2]['ours'] = 0.5
    assert results.pivot(scores)[0] == '|  | F1 |' and results.pivot(scores)[2:4] == [
        '| a | – |',
        '| b | 0.500 |',
    ]
    assert results.pivot(scores[:2]) == []


def test_the_summary_has_no_column_without_a_value(sources):
    page = (sources / 'nbs/results.qmd').read_text(encoding='utf-8')
    tables = re.findall(r'(?:^\|.*\n)+', page, re.M)
    cells = [[re.split(r' ?(?<!\\)\| ?', x)[1:-1] for x in t.splitlines() if x[:3] != '|--'] for t in tables]
    assert len(tables) > 8
    for head, *rows in cells:
        for name, *column in zip(head, *rows):
            assert set(column) - {'–', ''}, f'{name!r} of {rows[0][0]!r}'
    [arora] = [t for t in cells if any('Grad-CAM' in r[0] for r in t) and 'verdict' in t[0]]
    assert arora[0] == ['claim', 'paired difference, honest', 'verdict']


def test_the_summary_has_every_claim_and_its_verdict(results, sources):
    from lus_fastai.papers import arora, gare
    from lus_fastai.papers.experiment import verdicts
    from lus_fastai.runs import read_results

    page = (sources / 'nbs/results.qmd').read_text(encoding='utf-8')
    for claim in (*gare.CLAIMS, *arora.arora_claims()):
        assert f'| {claim.text} |' in page, claim.text
    said = verdicts(read_results('gare-pocus'), gare.CLAIMS).verdict.tolist()
    lines = [next(x for x in page.splitlines() if x.startswith(f'| {c.text} |')) for c in gare.CLAIMS]
    assert [re.search(r'\*\*(.+?)\*\*', x)[1] for x in lines] == said
    assert len(page.splitlines()) < 200  # a page that is read, not a list of cells


def test_the_summary_says_what_each_rule_of_splitting_is_worth(results):
    rows = results.split_rows(results.read_all(ROOT / 'results')['splits-pocus'])
    papers = 'Gare et al. 2021', 'Cheng & Lam', 'Born et al.', 'Chen et al.', 'Merand & Klein'
    assert all(any(what.startswith(paper) for what, *_ in rows) for paper in papers)
    numbers = [[float(re.match(r'[+-]?[\d.]+', text)[0]) for text in row[2:]] for row in rows]
    assert all(abs(rule - honest - worth) < 0.002 for rule, honest, worth in numbers)


@pytest.fixture(scope='module')
def preview(sources):
    "A few pages as HTML, and the module that made them."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools'))
        patch.chdir(sources)
        patch.setenv('IN_TEST', '1')
        checks, module = import_module('docs_checks'), import_module('preview')
        found = {n: checks.processed(sources / 'nbs' / n, sources) for n in PAGES}
        found |= {n: sources / 'nbs' / n for n in MADE}
        yield module, module.render(sources, found, sources / '_preview')


@pytest.mark.slow
def test_pages_fit_their_window_and_ask_for_nothing(preview):
    module, pages = preview
    assert len(pages) == len(PAGES) + len(MADE)
    assert module.browser_faults(pages) == []


@pytest.mark.slow
def test_a_page_has_its_furniture(preview):
    home, classifiers, claims, results, arora, references = (
        p.read_text(encoding='utf-8') for p in preview[1]
    )
    assert 'alt="Accuracy of one model' in home and 'Open in Colab' in home and 'Not a medical device' in home
    assert re.search(r'<a href="segmenters.html">← [^<]+</a><a href="stages.html">[^<]+ →</a>', classifiers)
    assert '<figcaption>Figure 1: Claims of the five papers by verdict.</figcaption>' in claims
    assert 'href="results/arora.html"' in results and '<summary>' in arora
    assert '10.1109/ISBI48211.2021.9433826' in references


@pytest.mark.slow
def test_what_a_browser_would_stumble_over_is_found(preview, tmp_path):
    module, pages = preview
    text = pages[1].read_text(encoding='utf-8')
    wide = '<div style="width: 3000px">wide</div><img src="https://example.invalid/a.png">'
    cell = '<tr><td><div style="width: 2000px">wide</div></td></tr>'
    wide += f'<details><table style="display: block; overflow-x: auto">{cell}</table></details>'
    bad = tmp_path / 'bad.html'
    bad.write_text(text.replace('</main>', wide + '</main>'), encoding='utf-8')
    faults = '\n'.join(module.browser_faults([bad], (1280,)))
    for what in (
        'scrolls sideways by',
        '1 images without alternative text',
        'asks for https://example.invalid',
        'a table scrolls sideways: wide (',
    ):
        assert what in faults, what


@pytest.mark.slow
def test_dead_links_and_places_are_found(tools, tmp_path):
    (tmp_path / 'a.html').write_text('<h2 id="here"></h2><a href="b.html#there"></a><a href="#here"></a>')
    (tmp_path / 'b.html').write_text(
        '<a href="c.html"></a><a href="a.html#here"></a><a href="https://x.y"></a>'
    )
    faults = tools('preview').anchor_faults(tmp_path)
    assert faults == [
        'a.html: links to b.html#there, and that page has no such place',
        'b.html: links to c.html, which is no page',
    ]


def test_the_picture_of_a_page_has_its_path_and_the_width(tools):
    name = tools('preview').shot_name
    assert name(Path('data/folds.html'), 390) == 'data/folds-390.png'
    assert name(Path('predict.html'), 1280) == 'predict-1280.png'


def test_short_words_with_hyphens_stay_whole_in_tables():
    import pypandoc

    def made(text, kind='markdown'):
        return pypandoc.convert_text(
            text, 'html', kind, ['--wrap=none', f'--lua-filter={ROOT / "words.lua"}']
        )

    long = 'pocus-northumbria-0409'
    table = f'| X-Unet | `a-b` |\n|---|---|\n| COVID-19, **A-line** | [k-Wave](a-b.html) {long} -0.5 |\n'
    page = made(f'X-Unet\n\n{table}')
    assert re.findall('<span class="word">(.*?)</span>', page) == ['X-Unet', 'COVID-19,', 'A-line', 'k-Wave']
    assert '<p>X-Unet</p>' in page and '<code>a-b</code>' in page and 'href="a-b.html"' in page
    cell = '<td data-id="a-b">pocus-17<br>[-0.5, 0.1]</td>'
    page = made(f'```{{=html}}\n<style>#T-a-b {{}}</style><table><tr>{cell}</tr></table><p>a-b</p>\n```\n')
    whole = cell.replace('pocus-17', '<span class="word">pocus-17</span>')
    assert page.strip() == f'<style>#T-a-b {{}}</style><table><tr>{whole}</tr></table><p>a-b</p>'
    table = '```{{=html}}\n<table class="dataframe"><tr><td>{}</td></tr></table>\n```\n'
    assert '<td class="sentence">' in made(table.format('a sentence ' * 4))
    assert '<td>a sentence' in made(table.format('a sentence ' * 3))
    cells = '<tr><td>{}</td><td>a-b</td></tr>'.format('a sentence ' * 4)
    page = made(f'<table class="dataframe">{cells}</table>', 'html')  # as Quarto reads it
    assert '<td class="sentence">' in page and page.count('class="word"') == 1 == page.count('sentence">')
    assert 'sentence">' not in made(f'<table>{cells}</table>', 'html')
    assert '.word { white-space: nowrap; }' in (ROOT / 'styles.css').read_text(encoding='utf-8')


def test_links_lead_to_pages_of_the_preview(tools):
    to_html, home = tools('preview').to_html, 'https://lus.org/site'
    assert to_html('../core.ipynb#a', 'data/store.ipynb', home) == '../core.html#a'
    assert to_html(f'{home}/stats/bootstrap.html#x', 'data/store.ipynb', home) == '../stats/bootstrap.html#x'
    assert to_html('https://example.org/a.ipynb', 'core.ipynb', home) == 'https://example.org/a.ipynb'


def test_every_folder_of_pages_is_cleaned_and_ignored():
    ignored, make = ((ROOT / n).read_text(encoding='utf-8') for n in ('.gitignore', 'Makefile'))
    for name in (
        '_preview',
        'nbs/api.qmd',
        'nbs/results.qmd',
        'nbs/references.bib',
        'nbs/words.lua',
        'nbs/results/',
    ):
        assert name in ignored and name.removesuffix('/') in make, name
    assert Path(ROOT / 'tools/preview.template').is_file()
