"A short run of the fuzzing: `make fuzz` is the long one."

import pytest
from harness import TARGETS, Target, load_targets, outcome, run

load_targets()
NAMES = sorted(TARGETS)


@pytest.fixture(scope='module')
def short_run(tmp_path_factory):
    "Sixty damaged files a target, all in one process."
    return run(NAMES, 60, tmp_path_factory.mktemp('fuzz'))


@pytest.mark.parametrize('name', NAMES)
def test_a_damaged_file_is_read_or_refused_by_name(short_run, name):
    got = short_run.get(name, dict(counts={}, found=['an earlier target ended the process']))
    assert set(got['counts']) <= {'answer', 'ours'}, got['found']
    assert sum(got['counts'].values()) == 60, got['found']
    assert got['counts'].get('ours', 0) > 5  # the damage was seen


@pytest.mark.parametrize(
    'error, says',
    [
        (ValueError('a.mp4: it is damaged'), 'ours'),
        (ValueError('it is damaged'), 'nameless: '),
        (KeyError('a.mp4'), 'other: KeyError'),
        (MemoryError(), 'memory'),
    ],
)
def test_a_bad_outcome_is_told_from_a_good_one(tmp_path, error, says):
    def read(path):
        raise error

    assert outcome(Target(None, read, (ValueError,)), tmp_path / 'a.mp4').startswith(says)


def test_a_lack_of_memory_is_no_error_of_ours(tmp_path):
    def read(path):
        raise ValueError(f'{path}: MemoryError') from MemoryError()

    assert outcome(Target(None, read, (ValueError,)), tmp_path / 'a.mp4').startswith('memory')


def test_what_ends_the_process_is_counted(tmp_path):
    "A target that kills its process is a crash, not an answer, and the file that did it is kept."
    (tmp_path / 'killed_targets.py').write_text(
        'import os\nfrom harness import TARGETS, Target\n'
        "read = lambda p: os.abort() if p.name == 'a.bin' else None\n"
        "TARGETS['killed'] = Target(lambda folder: [('a.bin', b'abc')], read, ())\n"
    )
    got = run(['killed'], 5, tmp_path, targets=tmp_path)
    assert got['killed']['counts'] == {'crash': 1}
    assert [p.name for p in (tmp_path / 'killed').glob('found-*')] == ['found-0-crash-a.bin']
