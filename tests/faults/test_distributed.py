"Two CPU processes (gloo, started by accelerate) train as one does on the same batches; one failure ends all."

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import two_processes

from lus_fastai.train import distributed as D

WORKER = Path(__file__).with_name('distributed_worker.py')
spec = importlib.util.spec_from_file_location('distributed_worker', WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

RUNS = dict(
    uscl=dict(
        method='uscl', bs=4, epochs=3, label_rate=0.3
    ),  # ten clips: batches of 4, 4 and 2; some batches and some processes without any label
    frames=dict(
        method='simclr', bs=8, epochs=2, unit='frame', per_epoch=16
    ),  # the head gets no gradient at all
    moco=dict(method='moco', bs=4, epochs=3),
    supervised=dict(method='supervised', bs=4, epochs=2, label_rate=0.3),
    **{
        k: dict(method=k, bs=4, epochs=3, label_rate=0.5, pair='same') for k in ('pi', 'ensemble', 'fixmatch')
    },
    batchnorm=dict(method='uscl', bs=4, epochs=2, norm='batch'),
)
SAME = [k for k in RUNS if k != 'batchnorm']


def launch(settings, out, timeout=500):
    "Run the worker in two processes; their exit status and output. A hang is stopped with its processes."
    file = out / 'settings.json'
    file.write_text(json.dumps(settings))
    command, env = two_processes(str(WORKER), str(file), str(out))
    with subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        try:
            said, _ = run.communicate(timeout=timeout)
        except BaseException:
            run.terminate()
            raise
    return run.returncode, said


@pytest.fixture(scope='module')
def two(phantom_store, tmp_path_factory):
    "All runs in two processes, and at the end one in which the second process fails."
    out = tmp_path_factory.mktemp('two')
    status, said = launch(dict(store=str(phantom_store.folder), runs=RUNS, fail=RUNS['uscl']), out)
    assert (out / 'rank1.json').exists(), said[-3000:]
    return dict(
        out=out,
        status=status,
        said=said,
        ranks=[json.loads((out / f'rank{r}.json').read_text()) for r in range(2)],
    )


@pytest.fixture(scope='module')
def one(phantom_store, tmp_path_factory):
    "The same runs in this process."
    out = tmp_path_factory.mktemp('one')
    return {name: worker.train(run, phantom_store, out / name) for name, run in RUNS.items()}


def test_two_processes_of_accelerate_over_gloo(two):
    assert [r['world'] for r in two['ranks']] == [2, 2] and all(
        'cpu:gloo' in r['backend'] for r in two['ranks']
    ), two['ranks'][0]['backend']


@pytest.mark.parametrize('name', RUNS)
def test_ranks_share_the_global_batch_pair_by_pair(two, one, phantom_store, name):
    "Each process has half of the pairs of a batch; both views of a pair, known by their pixels, in one."
    parts, whole = [r['runs'][name]['batches'] for r in two['ranks']], one[name][0]['batches']
    assert len(parts[0]) == len(parts[1]) == len(whole) > 3
    for a, b, w in zip(*parts, whole):
        assert a + b == w and len(a) == len(b) and not {i for i, *_ in a} & {i for i, *_ in b}
    assert (
        sorted({i for w in whole[:3] for i, *_ in w}) == list(range(10)) or name == 'frames'
    )  # an epoch has every clip once


@pytest.mark.parametrize('name', SAME)
def test_the_loss_of_every_step_is_that_of_one_process(two, one, name):
    losses = torch.tensor([r['runs'][name]['losses'] for r in two['ranks']])
    assert (losses.mean(0) - torch.tensor(one[name][0]['losses'])).abs().max() < 1e-5
    assert (losses[0] - losses[1]).abs().max() > 1e-4  # the processes had different pairs


@pytest.mark.parametrize('name', SAME)
def test_weights_and_history_are_those_of_one_process(two, one, name):
    history, mine = two['ranks'][0]['runs'][name]['history'], one[name][0]['history']
    assert two['ranks'][1]['runs'][name]['history'].keys() == history.keys() == mine.keys()
    for k in ('train_loss', 'valid_loss', 'alignment', 'uniformity', 'knn', 'lr'):
        assert history[k] == pytest.approx(mine[k], abs=1e-4, nan_ok=True), k
    weights = torch.load(two['out'] / f'{name}-rank0.pt', weights_only=True)
    for k, v in one[name][1].items():
        assert torch.allclose(weights[k], v, atol=1e-4), k


@pytest.mark.parametrize('name', RUNS)
def test_all_processes_end_with_the_same_weights(two, name):
    a, b = (torch.load(two['out'] / f'{name}-rank{r}.pt', weights_only=True) for r in range(2))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)  # batch norm statistics included


def test_batch_norm_on_cpu_sees_its_own_slice(two, one):
    "Without synced batch norm, which needs GPUs, each process normalises by its own pairs, so losses differ."
    losses = torch.tensor([r['runs']['batchnorm']['losses'] for r in two['ranks']])
    assert (losses.mean(0) - torch.tensor(one['batchnorm'][0]['losses'])).abs().max() > 1e-3


def test_only_the_main_process_writes(two):
    wrote = [r['wrote'] for r in two['ranks']]
    assert wrote[1] == [] and wrote[0].count('backbone.safetensors') == wrote[0].count(
        'history.csv'
    ) == wrote[0].count('run.json') == len(RUNS)
    assert wrote[0].count('checkpoint.pt') == sum(r['epochs'] for r in RUNS.values())
    for name in RUNS:
        assert sorted(p.name for p in (two['out'] / name).iterdir()) == [
            '.lock',
            'backbone.safetensors',
            'history.csv',
            'net.safetensors',
            'run.json',
        ]


def test_a_failing_process_ends_the_run(two):
    assert two['status'] != 0 and 'planted failure' in two['said'] and 'went on' not in two['said']
    assert sorted(p.name for p in (two['out'] / 'fail').iterdir()) == [
        '.lock',
        'checkpoint.pt',
        'run.json',
    ]  # the first epoch is kept


def test_one_process_goes_on_where_two_stopped(two, one, phantom_store):
    again, weights = worker.train(RUNS['uscl'], phantom_store, two['out'] / 'fail')
    assert len(again['batches']) == 6 and again['history']['train_loss'] == pytest.approx(
        one['uscl'][0]['history']['train_loss'], abs=1e-5
    )


def test_the_main_process_goes_on_alone(two):
    assert [r['left'] for r in two['ranks']] == [[True, 1], [False, 1]]


def test_alone_nothing_is_joined(monkeypatch):
    assert D.join_processes() == 0 and D.leave_processes() and not torch.distributed.is_initialized()
    with D.main_first():
        pass
    with pytest.raises(KeyError):
        with D.main_first():
            raise KeyError
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match='pip install accelerate'):
        D.join_processes()
