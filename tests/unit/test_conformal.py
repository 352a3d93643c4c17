"Conformal sets: the theorem on any scores, an independent reference, and what is refused."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.core import TableError
from lus_fastai.stats.classification import vote
from lus_fastai.stats.conformal import (
    conformal_coverage,
    conformal_p_values,
    conformal_scores,
    out_of_fold_sets,
    prediction_sets,
)
from lus_fastai.toys import toy_predictions

shares = st.lists(st.integers(0, 20).map(lambda k: k / 20), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(shares, st.floats(0.05, 0.95))
def test_of_exchangeable_patients_few_are_unusual(scores, alpha):
    "Each patient in turn is the new one: at most a share alpha of them has a p-value of alpha or less."
    p = [
        conformal_p_values([[1 - s, s]], dict(a=np.sort(np.delete(scores, i)), b=np.array([0.5])))[0, 0]
        for i, s in enumerate(scores)
    ]
    assert np.mean(np.array(p) <= alpha) <= alpha + 1e-9


@settings(max_examples=30, deadline=None)
@given(shares, shares, st.floats(0.01, 0.99))
def test_p_values_are_those_of_crepes(first, second, share):
    from crepes import ConformalClassifier

    p = np.array([[share, 1 - share]])
    known = dict(a=np.sort(first), b=np.sort(second))
    reference = ConformalClassifier().fit(
        np.r_[first, second], bins=np.repeat([0, 1], [len(first), len(second)])
    )
    theirs = [reference.predict_p(1 - p, bins=np.array([k]), smoothing=False)[0, k] for k in (0, 1)]
    np.testing.assert_allclose(conformal_p_values(p, known)[0], theirs)


def test_each_patient_gives_one_clip():
    clips = vote(toy_predictions(30), 'clip')
    scores = conformal_scores(clips)
    assert sum(map(len, scores.values())) == len(clips.drop_duplicates(['patient', 'label']))
    assert any(not np.array_equal(a, b) for a, b in zip(scores.values(), conformal_scores(clips, 1).values()))


def test_higher_levels_give_larger_sets():
    clips = vote(toy_predictions(120), 'clip')
    scores, p = conformal_scores(clips), clips.filter(like='p_').to_numpy()
    low, high = (prediction_sets(p, scores, level) for level in (0.6, 0.9))
    assert (low <= high).all() and high.sum() > low.sum()


def test_few_patients_are_in_every_set_with_a_warning():
    with pytest.warns(UserWarning, match='too few patients'):
        assert prediction_sets([[0.0, 1.0]], dict(a=np.zeros(3), b=np.zeros(99)), 0.9)[0, 0]


def test_sets_do_not_see_their_own_fold():
    clips = vote(toy_predictions(60), 'clip')
    spoiled = clips.copy()
    held = spoiled.fold == 0
    spoiled.loc[held, ['p_covid', 'p_pneumonia', 'p_regular']] = [0.2, 0.3, 0.5]
    assert out_of_fold_sets(clips)[held].shape == out_of_fold_sets(spoiled)[held].shape
    scores = conformal_scores(clips[~held])
    expected = prediction_sets(spoiled[held].filter(like='p_').to_numpy(), scores)
    pd.testing.assert_frame_equal(
        out_of_fold_sets(spoiled)[held], pd.DataFrame(expected, spoiled.index[held], scores)
    )


def test_one_fold_or_a_level_out_of_range_is_refused():
    clips = vote(toy_predictions(30), 'clip')
    with pytest.raises(TableError, match='at least two'):
        conformal_coverage(clips.assign(fold=1))
    with pytest.raises(ValueError, match='between 0 and 1'):
        prediction_sets([[0.5, 0.5]], dict(a=np.zeros(9), b=np.zeros(9)), 1.0)
