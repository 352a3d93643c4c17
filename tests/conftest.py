"Shared by all tests: a small phantom, where real data is, and one thread a process."
import os
from pathlib import Path
import pytest, torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))

def pytest_configure(config): config.addinivalue_line('markers', 'gpu: needs a CUDA device, skipped without one')

def pytest_collection_modifyitems(config, items):
    "Notebooks first, so that no long one is left for the end; GPU tests are skipped where there is none."
    items.sort(key=lambda item: 'test_notebook_runs' not in item.nodeid)
    if torch.cuda.is_available(): return
    for item in items:
        if 'gpu' in item.keywords: item.add_marker(pytest.mark.skip(reason='no CUDA device'))

@pytest.fixture(scope='session', autouse=True)
def lus_home_folder(tmp_path_factory):
    "The package's cache goes to a temporary folder, in this process and those it starts."
    before, folder = os.environ.get('LUS_HOME'), tmp_path_factory.mktemp('lus_home')
    os.environ['LUS_HOME'] = str(folder)
    yield folder
    if before is None: del os.environ['LUS_HOME']
    else: os.environ['LUS_HOME'] = before

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def phantom_table(tmp_path_factory):
    "Clip table of six phantom patients, two short clips each, 96x96."
    from lus_fastai.phantom import phantom_dataset
    return phantom_dataset(tmp_path_factory.mktemp('phantom'), patients=6, clips=2, n=6, size=(96, 96), seed=0, workers=1)

@pytest.fixture(scope='session')
def phantom_store(phantom_table, tmp_path_factory):
    "Frame store of `phantom_table` at 64x64, masks included."
    from lus_fastai.clips import FrameStore
    return FrameStore.build(phantom_table, tmp_path_factory.mktemp('store')/'store', size=(64, 64), rate=8, max_frames=4, workers=1)

@pytest.fixture(scope='session')
def real_data():
    "The folder of real clips named by LUS_DATA; the test is skipped where it is unset."
    folder = os.environ.get('LUS_DATA')
    if not folder: pytest.skip('LUS_DATA is not set')
    return Path(folder)
