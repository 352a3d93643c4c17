"Frozen features and heads for clips, against timm, scikit-learn and hand-computed values."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lus_fastai.core import LeakError
from lus_fastai.data.folds import Folds, patient_folds
from lus_fastai.models.backbones import import_timm
from lus_fastai.models.stages import StageClassifier, StageFeatures, class_maps
from lus_fastai.toys import toy_table
from lus_fastai.train.clip_heads import (
    StageHead,
    class_and_patient_weights,
    clip_vectors,
    cross_fit,
    predict_held_out,
    repeated_cross_fit,
    spread_positions,
)


@pytest.fixture(scope='module')
def features():
    torch.manual_seed(0)
    return StageFeatures('mobilenetv3_small_050', (0, 2, 4), weights=None)


def test_stages_are_those_of_timm(features):
    timm = import_timm()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = timm.create_model(
            'mobilenetv3_small_050', features_only=True, out_indices=(0, 2, 4), in_chans=1
        ).eval()
    ours = {k.replace('.', '_'): v for k, v in features.backbone.state_dict().items()}
    theirs.load_state_dict({k: ours[k.replace('.', '_')] for k in theirs.state_dict()})
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        for a, b in zip(features.maps(x), theirs(features.scale(x)), strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.sampled_from([32, 64, 96]), st.integers(2, 5), st.integers(0, 99))
def test_maps_add_up_to_logits(features, b, size, classes, seed):
    torch.manual_seed(seed)
    model, x = StageClassifier(features, classes).eval(), torch.rand(b, 1, size, size)
    with torch.no_grad():
        heat, logits = class_maps(model, x), model(x)
    torch.testing.assert_close(heat.mean((2, 3)) + model.head.bias, logits, atol=1e-4, rtol=1e-4)


def test_training_mode_leaves_the_network_as_it_is(features):
    x = torch.rand(4, 1, 64, 64)
    before = {k: v.clone() for k, v in features.state_dict().items()}
    StageClassifier(features, 3).train()(x).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in features.state_dict().items())


def drawn(n=90, d=6, seed=0):
    rng = np.random.default_rng(seed)
    label = np.array(['covid', 'pneumonia', 'regular'])[np.arange(n) % 3]
    table = pd.DataFrame(dict(clip=[f'c{i}' for i in range(n)], patient=np.arange(n) // 3, label=label))
    return rng.normal(size=(n, d)) + np.eye(3, d)[np.arange(n) % 3], table


def test_out_of_fold_is_what_scikit_learn_says():
    x, table = drawn()
    folds = patient_folds(table, 4)
    ours = cross_fit(StageHead(c=6.0), x, folds)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=5000))
    split = PredefinedSplit(folds.fold.to_numpy())
    theirs = cross_val_predict(pipeline, x, table['label'], cv=split, method='predict_proba')
    np.testing.assert_allclose(ours.filter(like='p_').to_numpy(), theirs, atol=1e-4)
    assert ours.index.equals(table.index)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000))
def test_weights_count_classes_and_patients_once(patients, seed):
    table = toy_table(patients, seed)
    weight = pd.Series(class_and_patient_weights(table), table.index)
    assert weight.mean() == pytest.approx(1)
    of_class = weight.groupby(table['label']).sum()
    assert np.allclose(of_class, of_class.iloc[0])
    for _, rows in table.groupby('label'):
        of_patient = weight[rows.index].groupby(rows['patient']).sum()
        assert np.allclose(of_patient, of_patient.iloc[0])


@given(st.integers(1, 200), st.integers(1, 30))
def test_spread_positions_rise_and_reach_both_ends(count, n):
    rows = spread_positions(count, n)
    assert len(rows) == min(count, n) and (np.diff(rows) > 0).all() and rows[0] == 0
    assert n == 1 or rows[-1] == count - 1


def test_clip_vectors_are_means_in_order_of_appearance():
    frames = pd.DataFrame(dict(clip=['b', 'a', 'b'], time=[0, 0, 1], row=[0, 1, 2], label=['x', 'y', 'x']))
    table, means = clip_vectors(np.array([[1.0], [5.0], [3.0]]), frames)
    assert table['clip'].tolist() == ['b', 'a'] and means.ravel().tolist() == [2, 5]


def test_a_class_that_training_lacks_gets_no_probability():
    x, table = drawn(30)
    held = (table['label'] == 'covid').to_numpy()
    table = table.assign(patient=np.where(held, 'ill', table['patient'].astype(str)))
    preds = predict_held_out(StageHead(), x, table, held)
    assert (preds['p_covid'] == 0).all() and np.allclose(preds.filter(like='p_').sum(axis=1), 1)


def test_a_patient_in_both_parts_is_refused():
    x, table = drawn(30)
    with pytest.raises(LeakError):
        cross_fit(StageHead(), x, Folds(table, np.arange(30) % 2))


def test_each_seed_draws_other_folds():
    x, table = drawn()
    several = repeated_cross_fit(StageHead(), x, table, n=3)
    assert len({tuple(t['fold']) for t in several}) == 3
