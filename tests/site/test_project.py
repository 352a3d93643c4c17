"The house: imports, names, packaging, files, site and commands."

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import ROOT, tracked

MODULES = [
    '.'.join(p.relative_to(ROOT / 'lus_fastai').with_suffix('').parts)
    for p in sorted((ROOT / 'lus_fastai').rglob('*.py'))
    if p.name not in ('__init__.py', '_modidx.py', 'all.py')
]
LIGHT = (
    'core',
    'synth.phantom',
    'data.sources',
    'data.store',
    'data.folds',
)  # importing one of these imports no fastai


def settings():
    parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def fresh(code, cwd=ROOT, **env):
    "What `code` prints in a new process."
    r = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **env},
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    return r.stdout.strip()


def reading_order(separator='.'):
    "The notebooks of the sidebar, from the first to the last, by module."
    names = re.findall(r'- nbs/(\S+)\.ipynb', (ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    return [n.replace('/', separator) for n in names if n != 'index']


# imports and names


def imported_from(notebook):
    "The modules of ours that the cells of a notebook import from."
    cells = json.loads((ROOT / 'nbs' / notebook).read_text(encoding='utf-8'))['cells']
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    code = '\n'.join(line for line in code.splitlines() if not re.match(r'\s*[%!]', line))
    found = set()
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            names = [node.module] + [f'{node.module}.{a.name}' for a in node.names]
        found |= {n.removeprefix('lus_fastai.') for n in names if n.startswith('lus_fastai.')}
    return found & set(MODULES)


@pytest.mark.parametrize('name', reading_order())
def test_a_notebook_imports_only_from_notebooks_before_it(name):
    before = reading_order()[: reading_order().index(name)]
    later = imported_from(name.replace('.', '/') + '.ipynb') - set(before)
    assert not later, f'{name} comes before {sorted(later)} in the sidebar of _quarto.yml'


@pytest.mark.parametrize('name', LIGHT)
def test_light_modules_do_not_import_fastai(name):
    assert (
        fresh(
            f"import sys, lus_fastai.{name} as it; "
            "print(sorted(m for m in ('fastai', 'torchvision', 'matplotlib.pyplot', 'av', 'pydicom', "
            f"'seaborn', 'sklearn', 'lus_fastai.all') if m in sys.modules), it.__name__)"
        )
        == f'[] lus_fastai.{name}'
    )


def test_importing_the_package_imports_nothing_else():
    assert (
        fresh(
            "import sys, lus_fastai; "
            "print([m for m in ('torch', 'numpy', 'fastai') if m in sys.modules], lus_fastai.__version__)"
        )
        == f"[] {settings()['version']}"
    )


def test_star_import_gives_ours_and_what_fastai_gives():
    got = json.loads(
        fresh('''
import json, sys
before = {}
exec('from fastai.vision.all import *', before)
ours = {}
exec('from lus_fastai import *', ours)
import lus_fastai, lus_fastai.all
ours.pop('__builtins__')
print(json.dumps(dict(
    fastai=sorted(k for k in before if k[0] != '_'), ours=sorted(ours), all=sorted(lus_fastai.all.__all__),
    same=all(ours[k] is getattr(lus_fastai.all, k) for k in ours),
    twice=len(lus_fastai.__all__) - len(set(lus_fastai.__all__)),
)))''')
    )
    public = {
        n for m in MODULES if not m.startswith('papers.') for n in import_module(f'lus_fastai.{m}').__all__
    } | {m.split('.')[1] for m in MODULES if m.startswith('papers.')}  # a paper is a module
    assert set(got['ours']) == set(got['all']) == (set(got['fastai']) - {'models'}) | public
    assert got['same'] and not got['twice']


def test_the_star_import_warns_of_nothing():
    r = subprocess.run(
        [sys.executable, '-c', 'from lus_fastai import *'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0 and not r.stdout and 'Warning' not in r.stderr, (
        r.stderr
    )  # on a new machine matplotlib says there that it looks for fonts


def test_attributes_on_demand():
    assert (
        fresh(
            "import lus_fastai; print(lus_fastai.unet.__module__, lus_fastai.models.transfer.__name__, "
            "lus_fastai.Learner.__name__, hasattr(lus_fastai, 'nonsense'), "
            "hasattr(lus_fastai, '_hidden'))"
        )
        == 'lus_fastai.models.unet lus_fastai.models.transfer Learner False False'
    )


def test_names_shared_with_fastai_are_known():
    import fastai.vision.all as fastai_all

    theirs = {k for k in vars(fastai_all) if k[0] != '_'}
    ours = {
        n: getattr(import_module(f'lus_fastai.{m}'), n)
        for m in MODULES
        for n in import_module(f'lus_fastai.{m}').__all__
    }
    shared = {n for n in ours if n in theirs and ours[n] is not getattr(fastai_all, n)}
    # ours win; rather find another name than add one here
    assert shared == {'Source', 'load_model', 'save_model'}
    assert {m.split('.')[0] for m in MODULES} & theirs == {
        'models'
    }  # fastai's is torchvision.models; a star import brings neither


def test_no_name_stands_for_two_things():
    where = {}
    for m in MODULES:
        if m.startswith('papers.'):
            continue  # a paper comes as a module, and each has its own `reproduce`
        module = import_module(f'lus_fastai.{m}')
        for n in module.__all__:
            where.setdefault(n, {})[id(getattr(module, n))] = m
    twice = {n: list(o.values()) for n, o in where.items() if len(o) > 1}
    assert not twice, f'exported by several modules, and not the same: {twice}'
    parts = {m.split('.')[0] for m in MODULES}
    assert not parts & set(where), f'{parts & set(where)} would hide modules of that name'


def test_all_lists_every_module():
    listed = re.findall(
        r'^from lus_fastai\.(\S+) import \*', (ROOT / 'lus_fastai/all.py').read_text(encoding='utf-8'), re.M
    )
    papers = re.search(
        r'^from lus_fastai\.papers import ([\w, ]+?) *(#|$)',
        (ROOT / 'lus_fastai/all.py').read_text(encoding='utf-8'),
        re.M,
    )[1].split(', ')
    assert listed + [f'papers.{p}' for p in papers] == [m for m in reading_order() if m in MODULES] and set(
        reading_order()
    ) >= set(MODULES)


def test_what_is_imported_is_required():
    comes_with_fastai = {'fastcore', 'fastprogress', 'requests', 'IPython'}  # the last where a notebook runs

    def named(key):
        return {re.split(r'[<>=!~]', r)[0].lower() for r in settings()[key].split()}

    required, asked_for = (
        named('requirements'),
        {n for k in ('widgets', 'imagenet', 'distributed', 'onnx') for n in named(f'{k}_requirements')},
    )
    packages = {}  # what is imported as pytorch_grad_cam comes in grad-cam
    for d in distributions():
        for name in {f.parts[0].removesuffix('.py') for f in d.files or []}:
            packages.setdefault(name, set()).add(d.metadata['Name'].lower())
    used = {}
    for m in MODULES:
        for node in ast.walk(
            ast.parse((ROOT / 'lus_fastai' / (m.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
        ):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for n in names:
                used.setdefault(n.split('.')[0], m)
    missing = {
        n: m
        for n, m in used.items()
        if n not in sys.stdlib_module_names | comes_with_fastai | {'lus_fastai', 'huggingface_hub'}
        and not packages.get(n, {n}) & (required | asked_for)
    }  # timm brings huggingface_hub
    assert not missing, f'imported but not in settings.ini: {missing}'
    by_name = (ROOT / 'lus_fastai/models/backbones.py').read_text(
        encoding='utf-8'
    )  # packages of weights are looked up by name
    unused = {
        d
        for d in (required | asked_for) - {d for n in used for d in packages.get(n, {n})}
        if f"'{d}'" not in by_name
    }
    assert not unused, f'required in settings.ini but imported nowhere: {unused}'


@pytest.mark.parametrize('script', settings()['console_scripts'].split())
def test_commands_are_there(script):
    name, target = script.split('=')
    module, function = target.split(':')
    assert name == function and callable(getattr(import_module(module), function))


# files


def test_no_file_knows_this_machine_or_its_registry():
    where = {str(ROOT)} | {
        home for home in [str(Path.home())] if home.count('/') > 1
    }  # one right below the root is too common a word
    for line in subprocess.run(
        [sys.executable, '-m', 'pip', 'config', 'list'], capture_output=True, text=True
    ).stdout.splitlines():
        where |= {
            re.sub(r'^\w+://(?:[^@/]*@)?', '', v).rstrip('/').split('/')[0] or v
            for v in re.findall(r"\w+://[^\s']+", line)
        }
        if 'find-links' in line:
            where |= set(re.findall(r"'(/[^']+)'", line))
    where = {w for w in where if len(w) > 4}
    rules = [
        (
            re.compile(r'(?<![\w.-])(?:' + '|'.join(map(re.escape, sorted(where))) + r')(?![\w.-])'),
            'a path or host of this machine',
        ),
        (re.compile(r'/[\w./-]*/(?:site|dist)-packages/'), 'where packages are installed'),
        (
            re.compile(r'(?<![\w.~}>])/(?:home|Users)/[a-z]\w+/|(?<![\w.~}>])/ro{2}t/[\w.]'),
            'the path of a home folder',
        ),
        (
            re.compile(r'files\.pythonhosted\.org|pypi\.org/simple|--(?:extra-)?index-url|--find-links'),
            'a registry',
        ),
    ]
    temporary = re.compile(r'/tmp/\w|/var/folders/')
    faults = []
    for p in tracked():
        try:
            text = p.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue
        if p == Path(__file__).resolve():
            continue
        faults += [
            f'{p.relative_to(ROOT)}: {what}: {m[0]!r}' for rule, what in rules for m in rule.finditer(text)
        ]
        if p.suffix == '.ipynb':
            shown = '\n'.join(json.dumps(c.get('outputs', [])) for c in json.loads(text)['cells'])
            faults += [
                f'{p.relative_to(ROOT)}: an output shows a temporary folder'
                for _ in temporary.findall(shown)[:1]
            ]
    assert not faults, '\n'.join(faults)


def test_images_and_clips_are_the_phantoms():
    media = {
        '.png',
        '.jpg',
        '.jpeg',
        '.gif',
        '.mp4',
        '.mkv',
        '.avi',
        '.mov',
        '.mpeg',
        '.dcm',
        '.pt',
        '.pth',
        '.safetensors',
        '.html',
        '.zip',
        '.xz',
    }
    found = {p.relative_to(ROOT).as_posix() for p in tracked() if p.suffix.lower() in media}
    model, small = (f'data/weights/{name}.safetensors' for name in ('pocus', 'small'))
    assert all(re.match(r'nbs/images/|data/phantom|data/templates/', f) for f in found - {model, small}), (
        found
    )
    big = {
        p.relative_to(ROOT).as_posix(): p.stat().st_size for p in tracked() if p.stat().st_size > 1_000_000
    }
    assert set(big) == {model} and big[model] < 4e6, f'over 1 MB: {big}'


def test_readme_embeds_nothing_and_fits_a_screen():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert 'data:image' not in readme and len(readme.splitlines()) < 90
    for target in re.findall(r'\]\((?!https?:|#)([^)\s]+)\)', readme):
        assert (ROOT / target.split('#')[0]).exists(), target


# packaging


def test_pyproject_repeats_settings(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    written = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    assert written == import_module('docs').pyproject(settings())


def test_wheel_holds_the_package_and_its_data_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split('/')[0] for n in names}
    assert tops == {'lus_fastai', f"lus_fastai-{settings()['version']}.dist-info"}
    assert not [n for n in names if n.endswith('.ipynb') or '/tests/' in n or '/nbs/' in n]
    shipped = {p.relative_to(ROOT / 'data').as_posix() for p in tracked() if p.is_relative_to(ROOT / 'data')}
    assert {
        n.removeprefix('lus_fastai/_data/') for n in names if n.startswith('lus_fastai/_data/')
    } == shipped
    assert {
        n.removeprefix('lus_fastai/_results/') for n in names if n.startswith('lus_fastai/_results/')
    } == {p.name for p in (ROOT / 'results').glob('*.json')}
    assert {f"lus_fastai/{m.replace('.', '/')}.py" for m in MODULES} <= set(names) and any(
        n.endswith('licenses/LICENSE') or n.endswith('/LICENSE') for n in names
    )
    meta = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith('/METADATA'))).decode()
    runtime = [r for r in re.findall(r'^Requires-Dist: (.*)$', meta, re.M) if 'extra ==' not in r]
    assert len(runtime) == len(settings()['requirements'].split()) and not any(
        re.search(r'[<=]=|<', r.split(';')[0].replace('>=', '')) for r in runtime
    )
    assert {'dev', 'dicom', 'distributed', 'docs', 'imagenet', 'onnx', 'widgets'} == set(
        re.findall(r'^Provides-Extra: (\S+)', meta, re.M)
    ) and re.search(r'^Requires-Python: >=3\.10$', meta, re.M)


def test_installed_wheel_works_elsewhere(installed, tmp_path):
    out = fresh(
        "import lus_fastai; from lus_fastai.data.sources import manifest; "
        "from lus_fastai.runs import read_results; print(lus_fastai.__version__, lus_fastai.__file__, "
        "len(manifest('pocus')) > 100, read_results('gare-pocus')['data'])",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert out == f"{settings()['version']} {installed / 'lus_fastai/__init__.py'} True pocus"


# the index that documentation links by


def test_nbdev_finds_every_name_and_its_page(installed):
    "The entry point of an installed wheel, by which documentation links, and the index behind it."
    points = [e for d in distributions(path=[str(installed)]) for e in d.entry_points if e.group == 'nbdev']
    assert [(e.name, e.value) for e in points] == [('lus_fastai', 'lus_fastai._modidx:d')] and (
        installed / 'lus_fastai/_modidx.py'
    ).is_file()
    known = points[0].load()['syms']
    assert set(known) == {f'lus_fastai.{m}' for m in MODULES}
    for name, index in known.items():
        module = import_module(name)
        own = [
            getattr(module, n)
            for n in module.__all__
            if getattr(getattr(module, n), '__module__', None) == name
        ]
        named = {f'{name}.{o.__name__}' for o in own if hasattr(o, '__name__')}
        assert named and named <= set(index), f'run nbdev-export: {sorted(named - set(index))}'


# commands


def copy_of(tmp_path, *names):
    for n in names:
        (tmp_path / n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / n, tmp_path / n)
    return tmp_path


def test_make_says_when_python_is_too_old(tmp_path):
    folder, old = (
        copy_of(tmp_path, 'Makefile', 'setup.py', 'settings.ini', 'pyproject.toml'),
        tmp_path / 'python-old',
    )
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.10" && exit 0\nexit 1\n')
    old.chmod(0o755)
    r = subprocess.run(['make', 'demo', f'PYTHON={old}'], cwd=folder, capture_output=True, text=True)
    assert (
        r.returncode
        and 'Python 3.10 or newer' in r.stderr
        and '3.8.10' in r.stderr
        and not (folder / '.venv').exists()
    )


def test_make_installs_once(tmp_path):
    folder = copy_of(tmp_path, 'Makefile', 'setup.py', 'settings.ini', 'pyproject.toml')

    def plan():
        return subprocess.run(
            ['make', '-n', 'test'], cwd=folder, capture_output=True, text=True, check=True
        ).stdout

    assert 'pip install' in plan()
    (folder / '.venv').mkdir()
    (folder / '.venv/.installed').touch()
    assert 'pip install' not in plan() and 'pytest' in plan()
    os.utime(folder / '.venv/.installed', (0, 0))
    assert 'pip install' in plan()


def test_the_demo_installs_no_development_tools(tmp_path):
    folder = copy_of(tmp_path, 'Makefile', 'setup.py', 'settings.ini', 'pyproject.toml')
    plan = subprocess.run(
        ['make', '-n', 'demo'], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    assert 'pip install' in plan and '-e .\n' in plan and '[dev]' not in plan and 'lus_demo' in plan


@pytest.mark.parametrize(
    'closing,tests,plain',
    [
        ('3 passed, 1 skipped in 0.12s', 0, 0),
        ('1 failed, 2 passed in 61.20s (0:01:01)', 1, 0),
        ('3 passed in 0.12s', 0, 1),
    ],
)
def test_ci_ends_with_the_closing_line_and_its_verdict(tmp_path, closing, tests, plain):
    folder = copy_of(tmp_path, '.ci/run')
    (folder / 'Makefile').write_text(f"test:\n\t@echo 'slowest durations'; echo '{closing}'; exit {tests}\n")
    (folder / '.ci/plain').write_text(f'#!/bin/sh\nexit {plain}\n')
    (folder / '.ci/plain').chmod(0o755)
    r = subprocess.run([str(folder / '.ci/run')], cwd='/', capture_output=True, text=True)
    assert bool(r.returncode) == bool(tests or plain) and r.stdout.strip().splitlines()[-1] == closing


# ---- nothing that is downloaded or typed is run ----

RUNS_TEXT = {'eval', 'exec', 'compile', '__import__'}


def calls_of(path):
    "Calls of a module: (dotted name, node)."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call, name):
    "The source of a keyword argument, or None."
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def dangers(path):
    "What a module does that could run a text, unpickle a file, or wait without end for the network."
    for name, call in calls_of(path):
        last = name.split('.')[-1]
        options = [k.arg for k in call.keywords]
        if name in RUNS_TEXT or name.startswith('builtins.') and last in RUNS_TEXT:
            yield f'{name}(...)'
        if name.split('.')[0] == 'os' and (last in ('system', 'popen') or last.startswith(('spawn', 'exec'))):
            yield f'{name}(...)'
        if keyword(call, 'shell') not in (None, 'False') or last in ('getoutput', 'getstatusoutput'):
            yield f'{name} with a shell'
        if name.startswith('subprocess.') and last != 'Popen' and 'timeout' not in options:
            yield f'{name} without a timeout'
        if name.split('.')[0] in ('pickle', 'cPickle', 'dill', 'joblib', 'marshal', 'shelve') and last in (
            'load',
            'loads',
            'Unpickler',
            'open',
        ):
            yield f'{name}(...)'
        if last in ('read_pickle', 'load_learner') or keyword(call, 'allow_pickle') not in (None, 'False'):
            yield f'{name} unpickles'
        if name == 'torch.load' and keyword(call, 'weights_only') != 'True':
            yield 'torch.load without weights_only=True'
        if (
            last == 'get_state_dict'
            and not keyword(call, 'check_hash') == keyword(call, 'weights_only') == 'True'
        ):
            yield f'{name} of torchvision without check_hash=True and weights_only=True'
        if last in ('load_url', 'load_state_dict_from_url', 'urlretrieve') or name.startswith('torch.hub.'):
            yield f'{name}: a download without limits'
        if name.split('.')[0] == 'yaml' and last not in ('safe_load', 'safe_dump', 'dump'):
            yield f'{name}(...)'
        network = last in ('urlopen', 'create_connection', 'HTTPConnection', 'HTTPSConnection')
        network |= name.split('.')[0] in ('requests', 'httpx', 'aiohttp', 'urllib3')
        if network and path.name != 'fetching.py' and name != 'requests.head':  # which brings no content
            yield f'{name}: only fetching.py asks the network'
        if network and 'timeout' not in options:
            yield f'{name} without a timeout'
        if last in ('extractall', 'unpack_archive'):
            yield f'{name}: extract_archive checks what it unpacks'


SOURCES = sorted((ROOT / 'lus_fastai').rglob('*.py'))


def test_nothing_that_is_read_is_run():
    "No text becomes code, nothing is unpickled, and the network is asked in one place, with a timeout."
    found = {p.relative_to(ROOT).as_posix(): list(dangers(p)) for p in SOURCES}
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.parametrize(
    'code, says',
    [
        ('eval(x)', 'eval'),
        ('exec(compile(x, "", "exec"))', 'exec'),
        ('os.system(x)', 'os.system'),
        ('subprocess.run(x, shell=True, timeout=1)', 'shell'),
        ('subprocess.run(x)', 'timeout'),
        ('pickle.load(f)', 'pickle.load'),
        ('np.load(f, allow_pickle=True)', 'unpickles'),
        ('pd.read_pickle(f)', 'unpickles'),
        ('torch.load(f)', 'weights_only'),
        ('torch.load(f, weights_only=False)', 'weights_only'),
        ('yaml.load(f, Loader=yaml.Loader)', 'yaml.load'),
        ('urllib.request.urlopen(url)', 'timeout'),
        ('requests.get(url, timeout=3)', 'fetching'),
        ('torch.hub.load_state_dict_from_url(url)', 'download'),
        ('archive.extractall(folder)', 'extract_archive'),
        ('weights.get_state_dict(progress=False)', 'weights_only'),
        ('requests.head(url)', 'timeout'),
    ],
)
def test_what_would_run_is_found(tmp_path, code, says):
    (tmp_path / 'a.py').write_text(code)
    assert [d for d in dangers(tmp_path / 'a.py') if says in d]
    (tmp_path / 'b.py').write_text('torch.load(f, weights_only=True)\nyaml.safe_load(f)\nmodel.eval()\n')
    assert not list(dangers(tmp_path / 'b.py'))
