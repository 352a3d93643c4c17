"Work that is killed at random moments and resumed leaves the bytes of unbroken work."

import sys
from functools import partial

import pytest
import torch

from benchmarks import kills


@pytest.fixture(scope='module')
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp('kills') / 'material'
    torch.ones(1, requires_grad=True).sum().backward()  # a process that has trained may not simply be forked
    assert kills.run(kills.make_material, folder)[0] == 0
    return folder


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the clock of another process')
@pytest.mark.parametrize('kind', kills.KINDS)
def test_what_is_killed_and_resumed_is_the_same(kind, material, tmp_path):
    def draw(changes):  # a random moment, and before the very last change, such as removing a checkpoint
        return [*kills.draw_moments(changes, 1), kills.Moment(change=changes - 1)]

    found = kills.kill_and_resume(partial(kills.KINDS[kind], material), tmp_path, draw)
    assert len(found) == 2 and not any(files for _, files in found), found


def test_other_bytes_and_other_files_are_differences(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'history.csv').write_text(f'epoch,seconds\n0,{len(name) * 3}\n')
    (tmp_path / 'b/history.csv').write_text('epoch,seconds\n0,9\n')
    a, b = (kills.contents(tmp_path / name) for name in ('a', 'b'))
    assert kills.differences(a, b) == []  # durations may differ
    (tmp_path / 'b/history.csv').write_text('epoch,seconds\n1,9\n')
    (tmp_path / 'b/.run.json.0a1b2c3d.tmp.json').touch()
    assert kills.differences(a, kills.contents(tmp_path / 'b')) == [
        '.run.json.0a1b2c3d.tmp.json',
        'history.csv',
    ]
