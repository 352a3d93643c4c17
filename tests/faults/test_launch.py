"`lus_repro uscl` under `accelerate launch`: two CPU processes, and the main one alone writes."

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from lus_fastai.models.transfer import load_weights
from lus_fastai.papers import uscl
from lus_fastai.runs import read_results

sys.path.insert(0, str(Path(__file__).parent))
import launch_worker
from two_processes import two_processes


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    home = tmp_path_factory.mktemp('two')
    command, env = two_processes(launch_worker.__file__, str(home))
    with subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        try:
            said, _ = run.communicate(timeout=500)
        except BaseException:
            run.terminate()
            raise
    assert run.returncode == 0, said[-3000:]
    return home


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    home = tmp_path_factory.mktemp('one')
    return home, launch_worker.reproduce(home)


def test_both_processes_end_well_and_the_main_one_alone_writes(two):
    main, other = (json.loads((two / f'rank{k}.json').read_text()) for k in range(2))
    assert (main['report'], other['report']) == ('uscl-phantom.html', None) and other['wrote'] == []
    assert 'results/uscl-phantom.json' in main['wrote'] and [
        f.name for f in two.rglob('uscl-phantom*.json')
    ] == ['uscl-phantom.json']


def test_pretraining_is_that_of_one_process_on_the_same_batches(two, one):
    folders = [uscl.run_folder(launch_worker.TINY, 'phantom', home) for home in (two, one[0])]
    for name in ('ResNet-18-SimCLR-s0', 'ResNet-18-USCL-s0'):
        a, b = (pd.read_csv(f / name / 'history.csv').train_loss for f in folders)
        assert (
            len(a) == 2
            and a[0] == pytest.approx(b[0], abs=1e-5)
            and a.to_numpy() == pytest.approx(b.to_numpy(), abs=1e-4)
            and abs(a[1] - a[0]) > 1e-3
        ), name
        a, b = (load_weights(f / name / 'backbone.safetensors') for f in folders)
        assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().mean()) for k in a) < 1e-5, name


def test_the_results_have_the_same_cells_and_what_is_not_pretrained_the_same_numbers(two, one):
    results = [read_results(home / 'results' / 'uscl-phantom.json') for home in (two, one[0])]
    a, b = (pd.DataFrame(r['cells']).set_index(['protocol', 'table', 'row', 'column']) for r in results)
    assert a.index.equals(b.index) and {k: v['split_hash'] for k, v in results[0]['protocols'].items()} == {
        k: v['split_hash'] for k, v in results[1]['protocols'].items()
    }
    random = a.index.get_level_values('row').isin(['ResNet-18: random', uscl.PIXELS])
    assert 0 < random.sum() < len(a) and a.ours[random].to_numpy(float) == pytest.approx(
        b.ours[random].to_numpy(float), abs=1e-6, nan_ok=True
    )
