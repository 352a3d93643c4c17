"Answers, maps and fits, one after the other, leave no tensor and no open file behind."

import sys

import pytest

from benchmarks.soak import soak, works


@pytest.fixture(scope='module')
def all_works(tmp_path_factory):
    return works(tmp_path_factory.mktemp('soak'))


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('name', ['predict', 'explain', 'fit'])
@pytest.mark.filterwarnings('ignore')
def test_nothing_is_left_behind(all_works, name):
    before, after = soak(all_works[name], 6)
    assert after['files'] == before['files'] and after['tensors'] <= before['tensors']
