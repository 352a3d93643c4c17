"""Every notebook: runs in a fresh kernel, gives the module that is there, is clean, and documents what it
exports."""

import ast
import configparser
import difflib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(
    p
    for p in (ROOT / 'nbs').rglob('*.ipynb')
    if not any(part[0] in '._' for part in p.relative_to(ROOT).parts)
)
MODULES = sorted(
    p
    for p in (ROOT / 'lus_fastai').rglob('*.py')
    if p.name not in ('__init__.py', '_modidx.py') and p != ROOT / 'lus_fastai/all.py'
)
each_notebook = pytest.mark.parametrize(
    'path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / 'nbs').with_suffix('').as_posix()
)
each_module = pytest.mark.parametrize(
    'module', MODULES, ids=lambda p: '.'.join(p.relative_to(ROOT / 'lus_fastai').with_suffix('').parts)
)


def load(path):
    return json.loads(path.read_text(encoding='utf-8'))


def source(cell):
    return cell['source'] if isinstance(cell['source'], str) else ''.join(cell['source'])


@pytest.fixture(scope='session')
def kernel(tmp_path_factory, installed, lus_home_folder):
    "The kernel that runs notebooks: forked from a process that has imported fastai, where that is safe."
    import torch

    if sys.platform != 'linux' or torch.cuda.is_available():  # a device that is in use cannot be forked
        yield 'python3'
        return
    spec = tmp_path_factory.mktemp('jupyter') / 'kernels/warm/kernel.json'
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv('JUPYTER_PATH', str(spec.parents[2]))
        command = [sys.executable, str(Path(__file__).with_name('warm_kernel.py'))]
        address = f'{short}/kernels'
        spec.parent.mkdir(parents=True)
        argv = [*command, 'start', address, '{connection_file}']
        spec.write_text(json.dumps(dict(argv=argv, display_name='warm', language='python')))
        env = {**os.environ, **ENVIRONMENT, 'PYTHONPATH': str(installed), 'JPY_PARENT_PID': '1'}
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, 'serve', address], env=env, stdin=pipe, stdout=pipe) as server:
            assert server.stdout.readline() == b'ready\n'
            yield 'warm'
            server.stdin.close()


ENVIRONMENT = dict(JUPYTER_PLATFORM_DIRS='1', MPLBACKEND='module://matplotlib_inline.backend_inline')


@pytest.fixture
def execute(tmp_path, installed, monkeypatch, kernel):
    "Execute cells as in Colab: alone in an empty folder, beside the wheel."
    from nbclient import NotebookClient

    for name, value in {**ENVIRONMENT, 'PYTHONPATH': str(installed)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('LUS_DATA', raising=False)  # the notebooks' default is the phantom

    def run(nb):
        where = {'metadata': {'path': str(tmp_path)}}
        return NotebookClient(nb, timeout=900, kernel_name=kernel, resources=where).execute()

    return run


@each_notebook
def test_notebook_runs(path, execute):
    import nbformat

    nb = nbformat.read(path, as_version=4)
    nb.cells = [
        c
        for c in nb.cells
        if not (c.cell_type == 'code' and re.search(r'^#\|\s*eval:\s*false', c.source, re.M))
    ]
    execute(nb)


def notebook(*cells):
    from nbformat.v4 import new_code_cell, new_notebook

    return new_notebook(cells=[new_code_cell(c) for c in cells])


def test_a_failing_cell_fails_and_a_dead_kernel_too(execute):
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    with pytest.raises(CellExecutionError, match='what it says'):
        execute(notebook('x = 1', 'assert x == 2, "what it says"', 'x = 3'))
    with pytest.raises(DeadKernelError):
        execute(notebook('import os; os._exit(3)'))


def test_every_kernel_is_fresh_and_a_real_one(execute, installed, tmp_path):
    change = """
        import os, lus_fastai.core, matplotlib
        x, os.environ["LUS_X"], matplotlib.rcParams["lines.linewidth"] = 1, "1", 99
    """
    look = """
        import os, sys, matplotlib
        assert "x" not in globals() and "LUS_X" not in os.environ and not os.listdir()
        assert matplotlib.rcParams["lines.linewidth"] != 99
        assert not any(m.startswith("lus_fastai") for m in sys.modules)
    """
    show = """
        import lus_fastai, matplotlib.pyplot as plt
        plt.plot([1, 2]); print(lus_fastai.__file__, os.getcwd(), type(get_ipython()).__name__)
    """
    execute(notebook(textwrap.dedent(change)))
    nb = execute(notebook(textwrap.dedent(look), textwrap.dedent(show), '! echo "from a shell"'))
    said = f'{installed / "lus_fastai/__init__.py"} {tmp_path} ZMQInteractiveShell\n'
    text, image = nb.cells[1].outputs
    assert text.text == said and 'image/png' in image.data
    assert nb.cells[2].outputs[0].text.strip() == 'from a shell'


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    "All modules, exported again into an empty folder that has the project's layout."
    from nbdev.export import nb_export

    folder = tmp_path_factory.mktemp('exported')
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('.*', '_*'))
    shutil.copy(ROOT / 'pyproject.toml', folder)
    here = os.getcwd()
    try:
        os.chdir(folder)
        for p in NOTEBOOKS:
            if '#| default_exp' in p.read_text(encoding='utf-8'):
                nb_export(Path('nbs') / p.relative_to(ROOT / 'nbs'), 'lus_fastai')
    finally:
        os.chdir(here)
    return folder / 'lus_fastai'


@each_module
def test_module_is_what_its_notebook_exports(module, exported):
    new = exported / module.relative_to(ROOT / 'lus_fastai')
    assert new.is_file(), f'no notebook exports {module.name}'
    a, b = module.read_text(encoding='utf-8'), new.read_text(encoding='utf-8')
    notebook = re.search(r'File to edit: (\S+)', b)[1].rstrip('.').split('nbs/')[-1]
    diff = '\n'.join(
        list(difflib.unified_diff(a.splitlines(), b.splitlines(), 'module', 'notebook', n=0, lineterm=''))[
            :20
        ]
    )
    assert a == b, (
        f'lus_fastai/{module.relative_to(ROOT / "lus_fastai")} and nbs/{notebook} differ: '
        f'run nbdev-export\n{diff}'
    )


def test_every_export_has_its_module(exported):
    there = {p.relative_to(exported) for p in exported.rglob('*.py')} - {Path('__init__.py')}
    missing = sorted(
        str(p) for p in there if not (ROOT / 'lus_fastai' / p).is_file() and p.name != '__init__.py'
    )
    assert not missing, f'run nbdev-export: {missing}'


@each_notebook
def test_notebook_is_clean(path, tmp_path, monkeypatch):
    from nbdev.clean import nbdev_clean

    monkeypatch.chdir(ROOT)
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    nbdev_clean.__wrapped__(fname=str(copy))
    assert copy.read_text(encoding='utf-8') == path.read_text(encoding='utf-8'), (
        f'run nbdev-clean --fname {path.relative_to(ROOT)}'
    )


@each_notebook
def test_notebook_is_readable(path):
    assert path.stat().st_size < 1_000_000, (
        f'{path.name} has {path.stat().st_size:,} bytes; under 1 MB keeps it readable'
    )
    nb = load(path)
    first = nb['cells'][0]
    assert first['cell_type'] == 'markdown' and re.match(r'# \S.*\n\n?> \S.*\Z', source(first).strip()), (
        'the first cell is "# title", then one "> line"'
    )
    assert 'skip_exec' not in source(first), 'every notebook runs'
    for i, c in enumerate(nb['cells']):
        if c['cell_type'] != 'code':
            continue
        assert not any(o['output_type'] == 'error' for o in c['outputs']), f'cell {i} holds an error'
        assert 'Traceback (most recent call last)' not in ''.join(
            ''.join(o.get('text', '')) for o in c['outputs']
        ), f'cell {i} shows a traceback'
    ran = [
        c
        for c in nb['cells']
        if c['cell_type'] == 'code'
        and not re.search(r'^#\|\s*export', source(c), re.M)
        and re.search(r'^(?!\s*#).*\bshow\w*\(|^\s*print\(', source(c), re.M)
    ]
    assert not ran or any(c['outputs'] for c in ran), 'the notebook was saved without its outputs'


def colab_command():
    "What installs the release in Colab, and does nothing elsewhere."
    config = configparser.ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    cfg = config['DEFAULT']
    return f"[ -e /content ] && pip install -Uqq {cfg['lib_name']}=={cfg['version']}"


@each_notebook
def test_all_but_the_installation_in_colab_is_run(path):
    "The one cell that tests leave out installs the package; the command itself is tested below."
    left_out = [
        source(c)
        for c in load(path)['cells']
        if c['cell_type'] == 'code' and re.search(r'^#\|\s*eval:\s*false', source(c), re.M)
    ]
    comment = '# in Colab, install the package first'
    assert left_out == [f'#| hide\n#| eval: false\n{comment}\n! {colab_command()}']


@each_notebook
def test_notebook_says_how_long_it_takes(path):
    words = '\n'.join(''.join(c['source']) for c in load(path)['cells'] if c['cell_type'] == 'markdown')
    assert re.search(r'[Rr]uns? (with)?in .*(seconds|minutes?)\b', words)


def test_the_time_of_a_notebook_is_written_below_its_title(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(root / 'tools')
    times = importlib.import_module('times')
    path = tmp_path / 'folds.ipynb'
    shutil.copy(root / 'nbs/data/folds.ipynb', path)
    times.write(path, 6.0)
    times.write(path, 7.0)  # 10.5 seconds on a machine that is half as slow again
    before, after = load(root / 'nbs/data/folds.ipynb')['cells'], load(path)['cells']
    assert [c['id'] for c in after] == [c['id'] for c in before]
    changed = [b for a, b in zip(before, after) if a != b]
    assert [c['source'] for c in changed] == [[times.sentence(7.0)]]
    assert 'half a minute' in times.sentence(7.0) and 'ten seconds' in times.sentence(6.0)
    with pytest.raises(ValueError, match='too long'):
        times.sentence(500)


@pytest.mark.parametrize('in_colab', [True, False])
def test_the_command_for_colab_installs_there_and_nowhere_else(in_colab, tmp_path):
    said, pip = tmp_path / 'said', tmp_path / 'pip'
    pip.write_text(f'#!/bin/sh\necho "$@" > {said}\n')
    pip.chmod(0o755)
    here = tmp_path / 'content'
    if in_colab:
        here.mkdir()
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = colab_command().replace('/content', str(here))
    subprocess.run(['bash', '-c', command], env={**os.environ, 'PATH': path})
    assert said.exists() == in_colab
    if in_colab:
        assert re.fullmatch(r'install -Uqq lus_fastai==\d+\.\d+\.\d+\n', said.read_text())


@pytest.fixture(scope='module')
def tidy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools'))
        yield importlib.import_module('tidy')


@each_notebook
def test_saved_outputs_are_tidy(path, tidy):
    "Each shows something, what was printed is in one piece, and a figure says how large it is shown."
    for i, c in enumerate(load(path)['cells']):
        outputs = c.get('outputs', [])
        assert len(tidy.tidied(outputs)) == len(outputs), f'cell {i}: run python tools/tidy.py'
        data = [(o, o.get('data', {})) for o in outputs]
        drawn = [o for o, d in data if 'image/png' in d and '<PIL.' not in ''.join(d['text/plain'])]
        assert all(o['metadata'].get('image/png', {}).get('width') for o in drawn), (
            f'cell {i}: a figure without its size; execute the notebook again, and then nbdev-clean'
        )


def test_what_shows_nothing_is_taken_away(tidy, tmp_path):
    def shown(**data):
        return dict(
            output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()}
        )

    def printed(text, name='stdout'):
        return dict(output_type='stream', name=name, text=[text])

    bar = shown(text_html=[], text_plain=['<IPython.core.display.HTML object>'])
    style = shown(text_html='<style>\np { }\n</style>\n', text_plain='<IPython.core.display.HTML object>')
    table = shown(text_html='<style>p { }</style><table></table>', text_plain='a')
    value = dict(output_type='execute_result', execution_count=None, metadata={}, data={'text/plain': '3'})
    widget = shown(**{'application_vnd.jupyter.widget-view+json': dict(model_id='a')})
    failed = dict(output_type='error', ename='a', evalue='b', traceback=[])
    stopped = shown(
        text_html='<div><progress max="2"></progress></div>', text_plain='<div><progress max="2">'
    )
    assert tidy.tidied([style, bar, stopped, printed(' \n')]) == []
    kept = [table, value, widget, failed]
    assert tidy.tidied([bar, *kept, bar]) == kept
    told = tidy.tidied([printed('a\n'), bar, printed('b\nc'), printed('d', 'stderr')])
    assert [''.join(o['text']) for o in told] == ['a\nb\nc', 'd']
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(dict(cells=[dict(source='x', outputs=[bar, value]), dict(source='y')])))
    assert [tidy.tidy(path), tidy.tidy(path)] == [1, 0] and load(path)['cells'][0]['outputs'] == [value]


LONG = ROOT / 'tests/long_cells.tsv'  # cells that may have more lines, each with its reason
LINES = 25


def export_cells(path):
    "Id and code of the cells that are exported and define something."
    for c in load(path)['cells']:
        code = source(c)
        if c['cell_type'] == 'code' and re.search(r'^#\|\s*exporti?\b', code, re.M):
            body = ast.parse(code).body
            if any(not isinstance(s, (ast.Import, ast.ImportFrom)) for s in body):
                yield c['id'], '\n'.join(x for x in code.splitlines() if not x.startswith('#|')).strip()


def test_an_exported_cell_has_one_idea():
    "At most 25 lines; the few exceptions are listed with a reason, and are exceptions."
    allowed = dict(line.split('\t') for line in LONG.read_text(encoding='utf-8').splitlines())
    assert all(reason.strip() for reason in allowed.values())
    long = {}
    for path in NOTEBOOKS:
        for name, code in export_cells(path):
            if len(code.splitlines()) > LINES:
                long[f'{path.relative_to(ROOT)}:{name}'] = len(code.splitlines())
    new, gone = {k: n for k, n in long.items() if k not in allowed}, set(allowed) - set(long)
    assert not new, f'split them, or list them in {LONG.name} with a reason: {new}'
    assert not gone, f'no longer long, so no longer listed: {gone}'


@each_notebook
def test_a_function_has_at_most_40_lines(path):
    allowed = {line.split('\t')[0] for line in LONG.read_text(encoding='utf-8').splitlines()}
    for name, code in export_cells(path):
        if f'{path.relative_to(ROOT)}:{name}' in allowed:
            continue
        for f in ast.walk(ast.parse(code)):
            if isinstance(f, ast.FunctionDef):
                assert f.end_lineno - f.lineno < 40, f'{f.name} in cell {name}'


def test_no_name_with_an_underscore_is_imported_from_another_module():
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith('lus_fastai')):
                found += [f'{module.name}: {a.name}' for a in node.names if a.name.startswith('_')]
    assert not found, found


@each_notebook
def test_imports_have_their_own_cells(path):
    for i, c in enumerate(load(path)['cells']):
        if c['cell_type'] != 'code' or re.match(r'\s*[%!]', source(c)):
            continue
        lines = [line for line in source(c).splitlines() if not re.match(r'\s*[%!]', line)]
        kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse('\n'.join(lines)).body}
        assert len(kinds) < 2, (
            f'cell {i} mixes imports with other code; the documentation runs import cells alone'
        )


def exports(module):
    name = '.'.join(module.relative_to(ROOT).with_suffix('').parts)
    m = importlib.import_module(name)
    return [(n, getattr(m, n)) for n in m.__all__ if getattr(getattr(m, n), '__module__', None) == name]


def undocumented(name, f):
    from fastcore.docments import docments

    f = inspect.unwrap(f)
    docs = docments(f, returns=False, args_kwargs=True)
    arguments = [a for a in inspect.signature(f).parameters if a not in ('self', 'cls')]
    ticks = [
        f'the comment beside {name}({a}) has backticks, which show as raw links'
        for a in arguments
        if '`' in (docs.get(a) or '')
    ]
    return ticks + [f'{name}({a}) has no comment beside it' for a in arguments if not docs.get(a)]


@each_module
def test_exports_are_documented(module):
    faults = []
    for name, o in exports(module):
        if not (
            inspect.isfunction(inspect.unwrap(o))
            if callable(o) and not inspect.isclass(o)
            else inspect.isclass(o)
        ):
            continue
        doc = inspect.unwrap(o).__doc__ if not inspect.isclass(o) else o.__dict__.get('__doc__')
        if not doc or not doc.strip():
            faults.append(f'{name} has no docstring')
        elif len(doc.strip().splitlines()) > 1:
            faults.append(f'the docstring of {name} has more than one line')
        if inspect.isclass(o) and (issubclass(o, BaseException) or getattr(o, '_is_protocol', False)):
            continue  # raised by us, or never made: a protocol
        if not inspect.isclass(o):
            faults += undocumented(name, o)
        elif '__init__' in o.__dict__ and not hasattr(o, '__dataclass_fields__'):
            faults += undocumented(name, o.__init__)
    assert not faults, '\n'.join([f'{module.name}:', *faults])
