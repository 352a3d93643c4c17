"Shared by all tests: a small phantom, where real data is, and one thread a process."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))


def pytest_configure(config):
    for marker in (
        'gpu: needs a CUDA device, skipped without one',
        'slow: takes more than a few seconds, left out of `make quick`',
        'paper: reproduces a paper in small, left out of `make quick`',
    ):
        config.addinivalue_line('markers', marker)


def pytest_collection_modifyitems(config, items):
    """Notebooks first, so that no long one is left for the end; papers, faults and such are marked.

    GPU tests are skipped where there is none.
    """
    items.sort(key=lambda item: 'test_notebook_runs' not in item.nodeid)
    for item in items:
        folder = item.path.parent.name
        if folder == 'papers':
            item.add_marker('paper')
        if folder == 'faults' or 'test_notebook_runs' in item.nodeid:
            item.add_marker('slow')
        if 'gpu' in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))


@pytest.fixture(scope='session', autouse=True)
def lus_home_folder(tmp_path_factory):
    "The package's cache goes to a temporary folder, in this process and those it starts."
    before, folder = os.environ.get('LUS_HOME'), tmp_path_factory.mktemp('lus_home')
    os.environ['LUS_HOME'] = str(folder)
    yield folder
    if before is None:
        del os.environ['LUS_HOME']
    else:
        os.environ['LUS_HOME'] = before


@pytest.fixture(scope='session')
def root():
    return ROOT


def tracked():
    "Files that are, or would be, committed."
    git = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True
    )
    if git.returncode:
        return [
            p
            for p in ROOT.rglob('*')
            if p.is_file() and not {'.venv', '.git', '__pycache__'} & set(p.relative_to(ROOT).parts)
        ]
    return [ROOT / f for f in git.stdout.split('\0') if f and (ROOT / f).is_file()]


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "A wheel of the tracked files, built without network."
    folder = tmp_path_factory.mktemp('wheel')
    for p in tracked():
        to = folder / 'source' / p.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, to)
    subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--quiet',
            '--no-deps',
            '--no-build-isolation',
            '--no-index',
            '-w',
            str(folder),
            str(folder / 'source'),
        ],
        check=True,
    )
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='session')
def installed(wheel, tmp_path_factory):
    "A folder into which the wheel was installed, and nothing else."
    target = tmp_path_factory.mktemp('installed')
    subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'install',
            '--quiet',
            '--no-deps',
            '--no-index',
            '--target',
            str(target),
            str(wheel),
        ],
        check=True,
    )
    return target


@pytest.fixture(scope='session')
def phantom_table(tmp_path_factory):
    "Clip table of six phantom patients, two short clips each, 96x96."
    from lus_fastai.synth.phantom import phantom_dataset

    return phantom_dataset(
        tmp_path_factory.mktemp('phantom'), patients=6, clips=2, n=6, size=(96, 96), seed=0, workers=1
    )


@pytest.fixture(scope='session')
def phantom_store(phantom_table, tmp_path_factory):
    "Frame store of `phantom_table` at 64x64, masks included."
    from lus_fastai.data.store import FrameStore

    return FrameStore.build(
        phantom_table,
        tmp_path_factory.mktemp('store') / 'store',
        size=(64, 64),
        rate=8,
        max_frames=4,
        workers=1,
    )


@pytest.fixture(scope='session')
def real_data():
    "The folder of real clips named by LUS_DATA; the test is skipped where it is unset."
    folder = os.environ.get('LUS_DATA')
    if not folder:
        pytest.skip('LUS_DATA is not set')
    return Path(folder)
