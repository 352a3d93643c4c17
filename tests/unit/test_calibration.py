"What the notebook does not own: naive loops, properties, known truths, networks of all kinds, bad input."

import random
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from lus_fastai.core import CLASSES, LeakError, TableError
from lus_fastai.stats import calibration as C
from lus_fastai.stats import classification as M
from lus_fastai.stats.bootstrap import patient_draws
from lus_fastai.toys import toy_forecasts

COLS = ['p_' + c for c in CLASSES]


table = partial(toy_forecasts, patients=12, frames=8, overconfidence=1.0)


def codes(t):
    return t.label.map({c: i for i, c in enumerate(CLASSES)}).to_numpy()


# -- reliability and ECE


@pytest.mark.parametrize('bins', [1, 7, 10, 15])
def test_bins_are_the_loop(bins):
    t = table(seed=1).round(1)  # many rows on the borders of ten bins
    conf, right = t[COLS].max(axis=1).to_numpy(), (M.predicted(t) == t.label).to_numpy()
    got, error, ends = C.reliability(t, bins, n_boot=10), 0.0, np.linspace(0, 1, bins + 1)
    for i, row in got.iterrows():
        held = [j for j in range(len(t)) if ends[i] < conf[j] <= ends[i + 1]]
        assert row.n == len(held) and (row.above, row.to) == (ends[i], ends[i + 1])
        if held:
            assert np.isclose(row.confidence, conf[held].mean()) and np.isclose(
                row.accuracy, right[held].mean()
            )
            error += len(held) / len(t) * abs(conf[held].mean() - right[held].mean())
        else:
            assert np.isnan(row.accuracy) and np.isnan(row.low)
    assert np.isclose(C.ece(t, bins), error) and got.n.sum() == len(t)


def test_one_bin_is_the_distance_of_the_means():
    t = table(overconfidence=3.0)
    assert np.isclose(C.ece(t, 1), abs(t[COLS].max(axis=1).mean() - (M.predicted(t) == t.label).mean()))


def test_bin_intervals_resample_patients():
    t = table(patients=9, seed=3)
    got, group = C.reliability(t, 4, n_boot=50, seed=7), pd.factorize(t.patient, sort=True)[0]
    right, at = (
        (M.predicted(t) == t.label).to_numpy(),
        np.digitize(t[COLS].max(axis=1), [0.25, 0.5, 0.75], right=True),
    )
    for b in (2, 3):
        naive = [
            np.average(right[at == b], weights=w[group][at == b])
            for w in patient_draws(9, 50, 7)
            if w[group][at == b].sum()
        ]
        np.testing.assert_allclose(
            got.loc[b, ['low', 'high']].astype(float), np.percentile(naive, [2.5, 97.5])
        )
    assert C.reliability(table(patients=1), n_boot=10).low.isna().all()


def test_certain_and_right_or_wrong():
    t = table()[['patient', 'frame', 'label']].assign(p_covid=1.0, p_pneumonia=0.0, p_regular=0.0)
    right = (t.label == 'covid').mean()
    assert np.isclose(C.ece(t), 1 - right) and C.reliability(t, n_boot=5).n.iloc[-1] == len(t)
    scores = C.calibration_scores(t, n_boot=5).set_index('metric').value
    assert np.isfinite(scores.nll) and np.isclose(scores.brier, 2 * (1 - right)) and scores.accuracy == right


def test_scores_against_scikit_learn_and_a_loop():
    from sklearn.metrics import log_loss

    t = table(patients=7, seed=2)
    scores = C.calibration_scores(t, n_boot=40, seed=3).set_index('metric')
    assert np.isclose(scores.value.nll, log_loss(codes(t), t[COLS], labels=[0, 1, 2])) and np.isclose(
        scores.value.brier, ((t[COLS] - np.eye(3)[codes(t)]) ** 2).sum(axis=1).mean()
    )
    assert (
        np.isclose(scores.value.ece, C.ece(t)) and np.isnan(scores.low.ece) and (scores.patients == 7).all()
    )
    group, row = (
        pd.factorize(t.patient, sort=True)[0],
        -np.log(t[COLS].to_numpy()[np.arange(len(t)), codes(t)]),
    )
    np.testing.assert_allclose(
        scores.loc['nll', ['low', 'high']].astype(float),
        np.percentile([np.average(row, weights=w[group]) for w in patient_draws(7, 40, 3)], [2.5, 97.5]),
    )


def test_votes_and_row_order():
    t = table(overconfidence=2.0)
    assert (
        C.ece(M.vote(t, 'patient')) >= 0
        and C.reliability(M.vote(t, 'clip'), n_boot=5).n.sum() == t['clip'].nunique()
    )
    mixed = t.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(C.reliability(t, n_boot=20), C.reliability(mixed, n_boot=20))
    pd.testing.assert_frame_equal(C.calibration_scores(t, n_boot=20), C.calibration_scores(mixed, n_boot=20))


@pytest.mark.parametrize('bins', [0, -1, 2.5, None])
def test_bins_are_a_count(bins):
    with pytest.raises(ValueError, match='bins is a whole number'):
        C.ece(table(), bins)


# -- temperature


@pytest.mark.parametrize('truth', [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(truth):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (20_000, 3))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)  # labels drawn from softmax(z)
    assert abs(C.fit_temperature(z * truth, y) / truth - 1) < 0.05


def nll(z, y, t):
    return nn.functional.cross_entropy(torch.tensor(z) / t, torch.tensor(y)).item()


@given(
    arrays(np.float64, (12, 3), elements=st.floats(-8, 8)), arrays(np.int64, 12, elements=st.integers(0, 2))
)
@settings(max_examples=60, deadline=None)
@example(
    np.array([[-2.25, -2.5, -2.25]] + 11 * [[-2.25] * 3]), np.zeros(12, int)
)  # the coldest allowed is best
def test_no_temperature_is_better(z, y):
    best = C.fit_temperature(z, y)
    assert 0.049 < best < 20.01
    assert all(
        nll(z, y, best) <= nll(z, y, t) + 1e-6
        for t in [*np.geomspace(0.05, 20, 60), max(best * 0.999, 0.05), min(best * 1.001, 20)]
    )


def test_fit_is_what_scipy_finds():
    from scipy.optimize import minimize_scalar

    t = table(patients=30, overconfidence=2.5)
    z, y = np.log(t[COLS].to_numpy()), codes(t)
    found = minimize_scalar(lambda log_t: nll(z, y, float(np.exp(log_t))), bracket=(-1, 1), tol=1e-10)
    assert np.isclose(C.fit_temperature(z, y), np.exp(found.x), rtol=1e-5)


@given(arrays(np.float64, (6, 4), elements=st.integers(-40, 40).map(lambda i: i / 8)), st.floats(0.05, 20))
@settings(max_examples=60, deadline=None)
def test_temperature_keeps_the_order_and_adds_up(z, t):
    p = C.apply_temperature(z, t)
    assert np.allclose(p.sum(1), 1) and (p >= 0).all()
    for row, q in zip(z, p):
        assert q.argmax() == row.argmax() and (np.diff(q[np.argsort(row, kind='stable')]) >= -1e-12).all()
    probs = C.apply_temperature(z, 1)
    if (probs > 1e-11).all():
        np.testing.assert_allclose(
            C.apply_temperature(probs, t), p, atol=1e-9
        )  # probabilities are as good as logits


def test_temperature_far_away_and_huge_logits():
    assert np.allclose(C.apply_temperature([[1e5, -1e5, 0]], 1), [[1, 0, 0]]) and np.allclose(
        C.apply_temperature([[1, 0, 0.0]], 20).sum(), 1
    )
    assert C.fit_temperature([[4.0, 0.0]] * 4, [1] * 4) == pytest.approx(
        20, rel=1e-6
    )  # always wrong: as modest as allowed
    assert isinstance(C.fit_temperature(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])), float)


@pytest.mark.parametrize(
    'z,y,words',
    [
        ([[1.0, 2.0]], [2], r'codes 0\.\.1'),
        ([[1.0, 2.0]], [-1], 'codes'),
        ([[1.0, 2.0]], [0, 1], 'labels are 1'),
        ([[1.0, 2.0]], [0.0], 'float64'),
        ([1.0, 2.0], [0], r'shape \(2,\)'),
        (np.zeros((0, 2)), np.zeros(0, int), 'at least one row'),
        ([[1.0, 2.0], [np.nan, 0]], [0, 1], r'NaN or infinite in row\(s\) \[1\]'),
        ([[np.inf, 0]], [0], 'infinite'),
    ],
)
def test_bad_logits_and_labels_are_named(z, y, words):
    with pytest.raises(ValueError, match=words):
        C.fit_temperature(z, y)


# -- training folds only


def test_each_fold_has_the_temperature_of_the_others():
    t = table(patients=24, overconfidence=2.0)
    out, temps = C.calibrate(t)
    assert (
        list(temps.index) == [0, 1, 2]
        and temps.name == 'temperature'
        and list(out.columns) == list(t.columns)
        and out.index.equals(t.index)
    )
    for k in range(3):
        held = (t.fold == k).to_numpy()
        assert temps[k] == C.fit_temperature(t[COLS].to_numpy()[~held], codes(t)[~held])
        np.testing.assert_allclose(out[COLS][held], C.apply_temperature(t[COLS].to_numpy()[held], temps[k]))
    assert (M.predicted(out) == M.predicted(t)).all()
    M.check_predictions(out)


def test_labels_of_a_fold_never_reach_its_own_probabilities():
    t = table(patients=24, overconfidence=2.0)
    for k in range(3):
        held = t.fold == k
        other = t.assign(label=t.label.where(~held, 'covid'))
        a, b = C.calibrate(t), C.calibrate(other)
        assert (
            a[1][k] == b[1][k]
            and a[0][COLS][held].equals(b[0][COLS][held])
            and (a[1].drop(k) != b[1].drop(k)).all()
        )


def test_calibration_mends_on_new_patients():
    t = table(patients=150, overconfidence=2.5)
    out, temps = C.calibrate(t)
    before, after = (C.calibration_scores(x, n_boot=10).set_index('metric').value for x in (t, out))
    assert (
        after.ece < before.ece / 3
        and after.nll < before.nll
        and after.brier < before.brier
        and after.accuracy == before.accuracy
        and temps.between(2.1, 2.9).all()
    )


def test_calibrate_leaves_its_table_alone_and_takes_votes_and_odd_folds():
    t = table(overconfidence=2.0)
    was = t.copy()
    C.calibrate(t)
    pd.testing.assert_frame_equal(t, was)
    assert set(C.calibrate(M.vote(t, 'patient'))[1].index) == {0, 1, 2}
    named = t.assign(fold=t.fold.map({0: 'a', 1: 'b', 2: 'c'})).sample(frac=1, random_state=0)
    out, temps = C.calibrate(named)
    assert list(temps.index) == ['a', 'b', 'c'] and np.allclose(
        out.sort_index()[COLS], C.calibrate(t)[0][COLS]
    )


def test_folds_that_share_patients_are_refused():
    with pytest.raises(LeakError, match='in both parts'):
        C.calibrate(table().assign(fold=lambda t: t.frame % 2))
    t = table()
    t.loc[t.index[0], 'fold'] = (t.fold[0] + 1) % 3
    with pytest.raises(LeakError, match='p0'):
        C.calibrate(t)


@pytest.mark.parametrize(
    'spoil,words',
    [
        (lambda t: t.drop(columns='fold'), r"\['fold'\]"),
        (lambda t: t.assign(fold=1), 'at least two'),
        (lambda t: t.assign(fold=t.fold.where(t.index != 4)), r'no fold in 1 row\(s\), such as 4'),
        (lambda t: t.assign(p_covid=t.p_covid - 2), 'softmax'),
        (lambda t: t[:0], 'empty'),
    ],
)
def test_bad_tables_are_named(spoil, words):
    with pytest.raises(TableError, match=words):
        C.calibrate(spoil(table()))


# -- many passes


def net(kind='dropout'):
    torch.manual_seed(0)
    extra = dict(
        dropout=nn.Dropout(0.5),
        channels=nn.Dropout2d(0.5),
        alpha=nn.AlphaDropout(0.3),
        none=nn.Identity(),
        zero=nn.Dropout(0.0),
    )[kind]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        extra,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


X = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize('kind', ['dropout', 'channels', 'alpha'])
@pytest.mark.parametrize('training', [True, False])
def test_mc_dropout_leaves_no_trace(kind, training):
    model = net(kind).train(training)
    model[1].eval()  # a layer in a mode of its own
    weights, modes, rng = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        states(),
    )
    s = C.mc_dropout(model, X, n=6, seed=3)
    assert (
        s.shape == (6, 3, 3)
        and torch.allclose(s.sum(-1), torch.ones(6, 3))
        and (s.std(0) > 0).any()
        and not s.requires_grad
    )
    assert (
        all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        and [m.training for m in model.modules()] == modes
        and states() == rng
    )
    assert torch.equal(s, C.mc_dropout(model, X, n=6, seed=3)) and not torch.equal(
        s, C.mc_dropout(model, X, n=6, seed=4)
    )
    assert all(p.grad is None for p in model.parameters()) and not any(
        m._forward_hooks for m in model.modules()
    )


def test_only_dropout_is_active():
    "With batch norm in evaluation mode an item's passes do not depend on its neighbours' values."
    model = net()
    other = torch.cat([X[:1], 1 - X[1:]])
    assert torch.allclose(C.mc_dropout(model, X)[:, 0], C.mc_dropout(model, other)[:, 0], atol=1e-6)


def test_mc_dropout_is_the_loop_and_its_mean_is_right():
    "One dropout before a linear layer: the mean of evaluation mode, the variance of a Bernoulli sum."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 2, bias=False))
    z = C.mc_dropout(model, X, n=4000).log()
    z = z[..., 1] - z[..., 0]
    w, x = (model[2].weight[1] - model[2].weight[0]).detach(), X.flatten(1)
    assert torch.allclose(z.mean(0), x @ w, atol=0.06) and torch.allclose(
        z.var(0), (x * w).square().sum(1), rtol=0.1
    )


@pytest.mark.parametrize('kind', ['none', 'zero'])
def test_without_dropout_there_is_no_doubt_to_see(kind):
    model = net(kind)
    with pytest.raises(ValueError, match='Sequential has no dropout layer.*tta'):
        C.mc_dropout(model, X)
    assert model.training


def test_modes_and_generators_come_back_after_an_error():
    model, rng = net(), states()
    for f in (
        lambda: C.mc_dropout(model, X[:, :, :2, :2]),
        lambda: C.tta(model, X, lambda x: 1 / 0),
        lambda: C.mc_dropout(model, X * torch.nan),
    ):
        with pytest.raises((RuntimeError, ZeroDivisionError, ValueError)):
            f()
        assert all(m.training for m in model.modules()) and states() == rng


def test_tta_draws_from_any_generator_and_evaluates():
    model, rng = net(), states()
    for draw in (lambda: torch.rand(1).item(), random.random, np.random.rand):
        seen = []

        def augment(x, draw=draw, seen=seen):
            seen.append(draw())
            return x * (0.5 + seen[-1])

        x = X.clone()
        s = C.tta(model, x, augment, n=4, seed=5)
        first = list(seen)
        seen.clear()
        assert torch.equal(x, X) and len(set(first)) == 4 and states() == rng
        assert torch.equal(s, C.tta(model, x, augment, n=4, seed=5)) and seen == first
        with torch.no_grad():
            want = torch.stack([model.eval()(X * (0.5 + f)).softmax(1) for f in first])
            model.train()
        assert torch.allclose(s, want, atol=1e-6)

    def in_place(x):
        x.zero_()
        return x

    C.tta(model, X, in_place, n=2)
    assert X.std() > 0


def test_dropout_that_is_no_layer_is_not_seen():
    "timm's `drop_rate` without a layer of its own, for one: better an error than passes that are all equal."

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(144, 3)

        def forward(self, x):
            return self.l(nn.functional.dropout(x.flatten(1), 0.5, self.training))

    with pytest.raises(ValueError, match='Functional has no dropout layer'):
        C.mc_dropout(Functional(), X)


@pytest.mark.parametrize('n', [0, 1, 2.5])
def test_passes_are_a_count(n):
    with pytest.raises(ValueError, match='at least 2'):
        C.mc_dropout(net(), X, n=n)
    with pytest.raises(ValueError, match='at least 2'):
        C.tta(net(), X, lambda x: x, n=n)


def test_augment_must_keep_the_shape():
    with pytest.raises(ValueError, match=r'\(3, 1, 12, 12\), got \(3, 1, 6, 12\)'):
        C.tta(net(), X, lambda x: x[:, :, ::2])
    with pytest.raises(ValueError, match='got NoneType'):
        C.tta(net(), X, lambda x: None)


@pytest.mark.gpu
def test_passes_on_a_gpu_leave_its_generator_alone():
    model, x, before = net().cuda(), X.cuda(), torch.cuda.get_rng_state().tolist()
    a, b = C.mc_dropout(model, x, seed=1), C.mc_dropout(model, x, seed=1)
    assert (
        a.is_cuda
        and torch.equal(a, b)
        and (a.std(0) > 0).any()
        and torch.cuda.get_rng_state().tolist() == before
        and C.confidence(a).is_cuda
    )
    t = C.tta(model, x, lambda x: x + torch.randn_like(x), seed=1)
    assert (
        torch.equal(t, C.tta(model, x, lambda x: x + torch.randn_like(x), seed=1))
        and torch.cuda.get_rng_state().tolist() == before
    )


@given(arrays(np.float64, (5, 4, 3), elements=st.floats(0.001, 1)))
@settings(max_examples=40, deadline=None)
def test_confidence_is_the_loop(raw):
    p = raw / raw.sum(-1, keepdims=True)
    want = [1 - np.clip(np.std(p[:, i, p[:, i].mean(0).argmax()]), 0, 0.5) / 0.5 for i in range(4)]
    got = C.confidence(p)
    assert isinstance(got, np.ndarray) and got.shape == (4,)
    if all(np.diff(np.sort(p[:, i].mean(0)))[-1] > 1e-9 for i in range(4)):
        np.testing.assert_allclose(got, want, atol=1e-9)
        np.testing.assert_allclose(C.confidence(torch.tensor(p)), want, atol=1e-9)
    assert (got >= 0).all() and (got <= 1).all()


@pytest.mark.parametrize('shape', [(4, 3), (1, 4, 3), (2, 2, 2, 2)])
def test_confidence_names_the_shape(shape):
    with pytest.raises(ValueError, match='at least 2 passes, got shape'):
        C.confidence(np.ones(shape))


# -- abstention


def test_abstention_is_the_loop():
    t = table(patients=10, seed=4).assign(sure=lambda d: np.random.default_rng(0).random(len(d)))
    steps = len(t)  # every coverage k/n is a point
    curve, areas = C.abstention(t, 'sure', steps=steps, n_boot=30, seed=2)
    order = np.argsort(-t.sure.to_numpy())
    right = (M.predicted(t) == t.label).to_numpy()[order]
    np.testing.assert_allclose(curve.accuracy, np.cumsum(right) / np.arange(1, steps + 1))
    assert (curve.random == right.mean()).all()
    areas = areas.set_index('name')
    assert (
        np.isclose(areas.value.abstention, curve.accuracy.mean())
        and np.isclose(areas.value.gain, curve.accuracy.mean() - right.mean())
        and areas.patients.eq(10).all()
    )
    group, naive = pd.factorize(t.patient, sort=True)[0][order], []
    for w in patient_draws(10, 30, 2):
        rows = np.repeat(right, w[group])
        n = len(rows)
        naive.append(
            [np.interp(c * n, np.arange(n + 1), np.r_[0, np.cumsum(rows)]) / (c * n) for c in curve.coverage]
        )
    atol = 0.03  # copies of a row are one tie here, a run there
    np.testing.assert_allclose(
        [curve.low[5:], curve.high[5:]], np.percentile(naive, [2.5, 97.5], axis=0)[:, 5:], atol=atol
    )


def test_ties_are_broken_at_random_in_expectation():
    t = table(patients=6, seed=5).assign(sure=lambda d: np.round(np.random.default_rng(0).random(len(d)), 1))
    curve, right, n = (
        C.abstention(t, 'sure', steps=48, n_boot=2)[0],
        (M.predicted(t) == t.label).to_numpy(),
        len(t),
    )
    rng, runs = np.random.default_rng(0), []
    for _ in range(3000):
        order = np.lexsort([rng.random(n), -t.sure])
        runs.append(np.cumsum(right[order]) / np.arange(1, n + 1))
    np.testing.assert_allclose(curve.accuracy, np.mean(runs, 0), atol=0.03)


def test_a_perfect_and_a_perverse_doubt():
    t = table(patients=12, seed=6)
    right = (M.predicted(t) == t.label).astype(float)
    best, worst = (C.abstention(t.assign(c=c), 'c', n_boot=50) for c in (right, -right))
    assert (best[0].accuracy[best[0].coverage <= right.mean()] > 1 - 1e-9).all() and best[1].low[
        2
    ] > 0 > worst[1].high[2]
    for curve, _ in (best, worst):
        assert (
            np.isclose(curve.accuracy.iloc[-1], right.mean())
            and (curve.low <= curve.accuracy + 1e-9).all()
            and (curve.accuracy <= curve.high + 1e-9).all()
        )
    middle = C.abstention(t.assign(c=1.0), 'c', n_boot=50)[1].set_index('name')
    assert abs(middle.loc['gain', ['value', 'low', 'high']].astype(float)).max() < 1e-12


def test_abstention_on_any_scale_order_and_level():
    t = table(patients=9, seed=7).assign(sure=lambda d: np.random.default_rng(0).random(len(d)))
    a = C.abstention(t, 'sure', n_boot=20)
    for b in (
        C.abstention(t.assign(sure=np.exp(9 * t.sure)), 'sure', n_boot=20),
        C.abstention(t.sample(frac=1, random_state=0), 'sure', n_boot=20),
    ):
        for x, y in zip(a, b):
            pd.testing.assert_frame_equal(x, y)
    pd.testing.assert_frame_equal(
        C.abstention(t, n_boot=5)[0], C.abstention(t.assign(top=t[COLS].max(axis=1)), 'top', n_boot=5)[0]
    )
    assert (
        len(C.abstention(M.vote(t, 'patient'), steps=9, n_boot=5)[0]) == 9
        and C.abstention(table(patients=1), n_boot=5)[1].low.isna().all()
    )


@pytest.mark.parametrize(
    'spoil,by,words',
    [
        (lambda t: t, 'doubt', "no column 'doubt'"),
        (
            lambda t: t.assign(c=np.where(t.index == 3, np.nan, 1.0)),
            'c',
            r"no confidence 'c' in row\(s\) \[3\]",
        ),
        (lambda t: t[:0], None, 'empty'),
    ],
)
def test_bad_confidences_are_named(spoil, by, words):
    with pytest.raises(TableError, match=words):
        C.abstention(spoil(table()), by)


def test_everything_is_seeded():
    t, before = table(), np.random.get_state()[1].tolist()
    for f in (C.reliability, C.calibration_scores):
        pd.testing.assert_frame_equal(f(t, n_boot=20, seed=1), f(t, n_boot=20, seed=1))
    assert (
        not C.abstention(t, n_boot=20, seed=1)[0].equals(C.abstention(t, n_boot=20, seed=2)[0])
        and np.random.get_state()[1].tolist() == before
    )
