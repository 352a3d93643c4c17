"""Paired differences between two models: the same patients drawn for both."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.stats.bootstrap import Difference, auc, paired_difference, patient_interval


def study(seed, patients=12, clips=4):
    rng = np.random.default_rng(seed)
    whose = np.repeat([f'p{i}' for i in range(patients)], clips)
    truth = rng.integers(0, 2, len(whose))
    a, b = truth + rng.normal(size=(2, len(whose)))
    return a, b, truth, whose


@given(st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_model_does_not_differ_from_itself(seed):
    a, _, truth, whose = study(seed)
    for x in (a, [a, a]):
        d = paired_difference(x, x, auc, truth, whose, 50)
        assert d[:4] == (0, 0, 0, 1) and isinstance(d, Difference)


@given(st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_exchanging_the_models_changes_the_sign_only(seed):
    a, b, truth, whose = study(seed)
    d, e = (paired_difference(*x, auc, truth, whose, 60) for x in ((a, b), (b, a)))
    np.testing.assert_allclose([d.value, d.low, d.high, d.p], [-e.value, -e.high, -e.low, e.p], atol=1e-12)
    assert d.low <= d.high and 0 < d.p <= 1 and d.value == pytest.approx(auc(truth, a) - auc(truth, b))


def test_resamples_are_those_of_the_intervals_of_each_model():
    a, b, truth, whose = study(3)
    values, metric = [], lambda t, s: values.append(float(np.mean(s))) or values[-1]
    paired_difference(a, b, metric, truth, whose, 20, seed=4)
    alone, joint = [], np.array(values[:40]).reshape(20, 2)  # both metrics of each resample
    patient_interval(lambda t, s: alone.append(float(np.mean(s))) or alone[-1], truth, a, whose, 20, seed=4)
    np.testing.assert_array_equal(joint[:, 0], alone[:20])


def test_trainings_are_averaged_and_their_spread_is_given():
    a, b, truth, whose = study(5)
    one = paired_difference(a, b, auc, truth, whose, 30)
    assert np.isnan(one.spread)
    two = paired_difference([a, b], [b, b], auc, truth, whose, 30)
    assert two.value == pytest.approx(one.value / 2) and two.low == pytest.approx(one.low / 2)
    assert two.spread == pytest.approx(np.std([auc(truth, a), auc(truth, b)], ddof=1))
    assert paired_difference([a], b, auc, truth, whose, 30).value == one.value


def test_any_metric_of_any_score():
    _, _, truth, whose = study(6)
    sure = np.eye(2)[truth] * 0.8 + 0.1  # (rows, 2) probabilities

    def log_loss(t, p):
        return -np.log(p[np.arange(len(t)), t]).mean()

    d = paired_difference(sure, np.full_like(sure, 0.5), log_loss, truth, whose, 50)
    assert d.value == pytest.approx(np.log(0.5) - np.log(0.9)) and d.high < 0 and d.p == pytest.approx(2 / 51)


def test_rows_of_tables_are_matched_by_name():
    a, b, truth, whose = study(7)
    names = [f'clip {i}' for i in range(len(a))]
    a, b, t, w = (pd.Series(x, names) for x in (a, b, truth, whose))
    whole = paired_difference(a, b, auc, t, w, 40)
    shuffled = paired_difference(a, b.sample(frac=1, random_state=0), auc, t[::-1], w, 40)
    assert (
        whole[:4] == shuffled[:4] == paired_difference(a.to_numpy(), b.to_numpy(), auc, truth, whose, 40)[:4]
    )
    table = pd.DataFrame(dict(no=1 - b, yes=b))
    assert paired_difference(table, table, lambda t, p: auc(t, p[:, 1]), t, w, 20).value == 0


@pytest.mark.parametrize(
    'change,said',
    (
        (dict(b=pd.Series([1.0, 2], ['u', 'x'])), r'b has no row\(s\) v'),
        (dict(b=pd.Series([1.0, 2, 3], ['u', 'v', 'x'])), r'b has further row\(s\) x'),
        (dict(b=pd.Series([1.0, 2], ['u', 'u'])), 'b has rows of the same name: u'),
        (dict(patients=pd.Series(['p'], ['u'])), r'patients has no row\(s\) v'),
        (dict(patients=['p']), r'patients has 1 row\(s\), a has 2'),
        (dict(patients=['p', None]), 'rows without a patient: 1'),
        (dict(truth=[1, 0, 1]), r'truth has 3 row\(s\), a has 2'),
        (dict(b=[np.zeros(2), np.zeros(3)]), r'b\[1\] has 3 row\(s\), a has 2'),
    ),
)
def test_what_does_not_match_is_named(change, said):
    given = (
        dict(a=pd.Series([0.1, 0.9], ['u', 'v']), b=[0.2, 0.3], truth=[0, 1], patients=['p', 'q']) | change
    )
    with pytest.raises(ValueError, match=said):
        paired_difference(given['a'], given['b'], auc, given['truth'], given['patients'])


def test_one_patient_says_nothing_about_others():
    a, b, truth, _ = study(8)
    d = paired_difference(a, b, auc, truth, np.zeros(len(a)))
    assert d.value == auc(truth, a) - auc(truth, b) and np.isnan([d.low, d.high, d.p]).all()
