"What notebooks do not own: independent references (loops, scikit-learn), properties, Learners, bad input."

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Datasets,
    ItemGetter,
    Learner,
    ReduceLROnPlateau,
    TensorImage,
    TensorMask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk

from lus_fastai.core import CLASSES, DENSE, DENSE_TO_SPARSE, SPARSE, TableError, dense_to_sparse
from lus_fastai.stats import classification as M
from lus_fastai.stats import curves as R
from lus_fastai.stats.bootstrap import bootstrap, patient_draws

codes = arrays(np.int64, 60, elements=st.integers(0, 3))
pytestmark = pytest.mark.filterwarnings(
    'ignore::sklearn.exceptions.UndefinedMetricWarning',
    'ignore:y_pred contains classes:UserWarning',
    'ignore:A single label was found:UserWarning',
)


def table(patients=8, frames=5, seed=0, two_labels=True):
    rng, rows = np.random.default_rng(seed), []
    for i in range(patients):
        for k in range(2):
            at = 2 if two_labels and (i, k) == (0, 1) else i % 3
            for j in range(frames):
                p = rng.dirichlet(np.ones(3) + 2 * np.eye(3)[at])
                rows.append(
                    dict(
                        clip=f'{i}/{k}',
                        frame=j,
                        patient=f'p{i}',
                        label=CLASSES[at],
                        source='s',
                        probe='convex',
                        fold=i % 3,
                        **{f'p_{c}': v for c, v in zip(CLASSES, p)},
                    )
                )
    return pd.DataFrame(rows)


def naive_confusion(pred, targ, n):
    cm = [[0] * n for _ in range(n)]
    for p, t in zip(np.ravel(pred), np.ravel(targ)):
        if t != 255:
            cm[t][p] += 1
    return cm


# -- counting


@given(codes, arrays(np.int64, 60, elements=st.sampled_from([0, 1, 2, 3, 255])))
@settings(max_examples=60, deadline=None)
def test_confusion_is_the_loop(pred, targ):
    want = naive_confusion(pred, targ, 4)
    assert M.confusion(pred, targ, 4).tolist() == want
    assert M.confusion(torch.tensor(pred), torch.tensor(targ), 4).tolist() == want
    parts = M.confusions(pred.reshape(3, 20), targ.reshape(3, 20), 4)
    assert parts.tolist() == [
        naive_confusion(p, t, 4) for p, t in zip(pred.reshape(3, 20), targ.reshape(3, 20))
    ]


def test_small_integers_do_not_overflow():
    big = np.full((64, 64), 6, np.uint8)
    assert M.confusion(big, big, 7)[6, 6] == 4096
    assert M.confusion(TensorMask(torch.tensor(big)), TensorMask(torch.tensor(big)), 7)[6, 6] == 4096


@pytest.mark.parametrize(
    'pred,targ,words',
    [
        (np.zeros(3), np.zeros(3, int), 'argmax'),
        (np.zeros(3, int), np.zeros(4, int), 'differ in shape'),
        (np.full(3, 7), np.zeros(3, int), 'predicted codes are 0..6, got 7..7'),
        (np.zeros(3, int), np.full(3, -1), 'true codes are 0..6, got -1'),
        (np.zeros(3, int), np.full(3, 7), 'true codes'),
    ],
)
def test_bad_codes_are_named(pred, targ, words):
    with pytest.raises(ValueError, match=words):
        M.confusion(pred, targ, 7)


def test_nothing_labelled_counts_nothing():
    assert M.confusion(np.zeros(5, int), np.full(5, 255), 3).sum() == 0
    assert (
        np.isnan(M.mean_iou(np.zeros((3, 3))))
        and np.isnan(M.balanced_accuracy(np.zeros((3, 3))))
        and np.isnan(M.macro_f1(np.zeros((3, 3))))
    )


# -- scores against scikit-learn


@given(codes, codes, st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_scores_are_scikit_learns(pred, targ, size):
    pred, targ = pred[:size], targ[:size]
    cm, held = M.confusion(pred, targ, 4), sorted(set(pred) | set(targ))
    kw = dict(labels=held, average=None, zero_division=0)
    for ours, theirs in ((M.precision, sk.precision_score), (M.recall, sk.recall_score), (M.f1, sk.f1_score)):
        assert np.allclose(ours(cm)[held], theirs(targ, pred, **kw))
        assert np.isnan(np.delete(ours(cm), held)).all()
    assert np.allclose(M.iou(cm)[held], sk.jaccard_score(targ, pred, **kw))
    assert np.isclose(M.overall_accuracy(cm), sk.accuracy_score(targ, pred)) and M.pixel_accuracy(
        cm
    ) == M.overall_accuracy(cm)
    assert np.isclose(M.balanced_accuracy(cm), sk.balanced_accuracy_score(targ, pred))
    for ours, theirs in (
        (M.macro_precision, sk.precision_score),
        (M.macro_recall, sk.recall_score),
        (M.macro_f1, sk.f1_score),
        (M.mean_iou, sk.jaccard_score),
    ):
        assert np.isclose(ours(cm), theirs(targ, pred, average='macro', zero_division=0))


@pytest.mark.parametrize(
    'score',
    [
        M.iou,
        M.precision,
        M.recall,
        M.f1,
        M.overall_accuracy,
        M.balanced_accuracy,
        M.mean_iou,
        M.macro_precision,
        M.macro_recall,
        M.macro_f1,
    ],
)
def test_scores_of_a_stack_are_those_of_its_parts(score):
    stack = np.random.default_rng(0).integers(0, 3, (5, 2, 4, 4)) * (
        np.random.default_rng(1).random((5, 2, 4, 1)) < 0.7
    )
    want = np.array([[score(cm) for cm in row] for row in stack])
    np.testing.assert_allclose(score(stack), want)
    np.testing.assert_allclose(score(torch.tensor(stack)), want)


@given(arrays(np.int64, 50, elements=st.integers(0, 6)), arrays(np.int64, 50, elements=st.integers(0, 6)))
@settings(max_examples=40, deadline=None)
def test_merging_the_matrix_is_merging_the_masks(pred, targ):
    merged = M.merge_confusion(M.confusion(pred, targ, 7))
    assert merged.tolist() == naive_confusion(dense_to_sparse(pred), dense_to_sparse(targ), 4)
    assert merged.sum() == 50 and np.issubdtype(merged.dtype, np.integer)


def test_merging_needs_a_class_for_each_class():
    with pytest.raises(ValueError, match='7 classes, the confusion matrix 4'):
        M.merge_confusion(np.eye(4))


# -- Learner


class Wide(torch.nn.Module):
    "1x1 convolution over pixels"

    def __init__(self, n):
        super().__init__()
        self.c = torch.nn.Conv2d(1, n, 1)

    def forward(self, x):
        return self.c(x)


class Flat(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.l = torch.nn.Linear(64, n)

    def forward(self, x):
        return self.l(x.flatten(1))


def seg_learner(path, metrics, n=7, bs=4, items=11, **kw):
    torch.manual_seed(0)
    x, y = torch.rand(2 * items, 1, 8, 8), torch.randint(0, n, (2 * items, 8, 8))
    data = [(TensorImage(a), TensorMask(b)) for a, b in zip(x, y)]
    dls = DataLoaders(DataLoader(data[:items], bs=bs), DataLoader(data[items:], bs=bs))
    return (
        Learner(dls, Wide(n), loss_func=CrossEntropyLossFlat(axis=1), metrics=metrics, path=path, **kw),
        x[items:],
        y[items:],
    )


def test_learner_scores_the_whole_set_whatever_the_batch(tmp_path):
    for bs in (1, 4, 11):
        learn, x, y = seg_learner(tmp_path, M.seg_metrics() + M.seg_metrics(sparse=True), bs=bs)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-2)
        with torch.no_grad():
            pred = learn.model(x).argmax(1)
        want = [
            sk.accuracy_score(y.flatten(), pred.flatten()),
            sk.jaccard_score(y.flatten(), pred.flatten(), average='macro', zero_division=0),
            *M.iou(M.confusion(pred, y, 7)),
            M.overall_accuracy(M.confusion(dense_to_sparse(pred), dense_to_sparse(y), 4)),
        ]
        np.testing.assert_allclose(learn.recorder.values[-1][2 : 2 + len(want)], want)
        with learn.no_bar():
            np.testing.assert_allclose(learn.validate()[1 : 1 + len(want)], want)
        assert (
            learn.recorder.metric_names[3:5] == ['pixel_accuracy', 'mean_iou']
            and 'iou_healthy_pleura' in learn.recorder.metric_names
        )
        assert 'sparse_iou_pleura' in learn.recorder.metric_names
        assert learn.metrics[0].confusion.sum() == 11 * 64


def test_train_metrics_do_not_leak_into_validation(tmp_path):
    learn, x, y = seg_learner(tmp_path, M.seg_metrics()[:2])
    learn.recorder.train_metrics = True
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    with torch.no_grad():
        pred = learn.model(x).argmax(1)
    assert (
        np.isclose(learn.recorder.values[-1][-2], M.overall_accuracy(M.confusion(pred, y, 7)))
        and len(learn.recorder.values[-1]) == 6
    )


def test_any_of_the_metrics_works_alone(tmp_path):
    learn, x, y = seg_learner(tmp_path, M.seg_metrics()[3:4])
    with learn.no_bar():
        value = learn.validate()[1]
    with torch.no_grad():
        assert np.isclose(value, M.iou(M.confusion(learn.model(x).argmax(1), y, 7))[1])


def test_metrics_survive_lr_find_get_preds_plateau_and_a_second_fit(tmp_path):

    learn, x, y = seg_learner(tmp_path, M.seg_metrics(), cbs=ReduceLROnPlateau('mean_iou'))
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        before = learn.validate()
        learn.get_preds()
        learn.remove_cbs(learn.cbs.filter(lambda c: isinstance(c, ReduceLROnPlateau)))
        learn.lr_find(num_it=4, show_plot=False)
        assert learn.validate() == before  # lr_find puts the weights back
        learn.fit(1)
        assert all(np.isfinite(learn.recorder.values[-1][1:3]))


def test_class_names_are_no_number_of_classes():
    with pytest.raises(ValueError, match='number of classes, not .*covid'):
        M.cls_metrics(('covid', 'pneumonia', 'regular'))


def test_exported_learner_loads_in_a_fresh_process(tmp_path):
    items = list(zip(torch.rand(8, 1, 8, 8), torch.randint(0, 7, (8, 8, 8))))
    dls = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[range(4), range(4, 8)]).dataloaders(
        bs=4
    )
    learn = Learner(
        dls,
        torch.nn.Conv2d(1, 7, 1),
        loss_func=CrossEntropyLossFlat(axis=1),
        metrics=M.seg_metrics() + M.seg_metrics(sparse=True),
        path=tmp_path,
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    learn.export('learner.pkl')
    file = str(tmp_path / 'learner.pkl')
    code = (
        f"from fastai.learner import load_learner; l = load_learner({file!r}, cpu=True); "
        "print(*[m.name for m in l.metrics])"
    )
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert (
        out.stdout.split()[:2] == ['pixel_accuracy', 'mean_iou'] and len(out.stdout.split()) == 2 + 7 + 2 + 4
    )


def test_classification_metrics(tmp_path):
    torch.manual_seed(0)
    x, y = torch.rand(30, 1, 8, 8), torch.randint(0, 3, (30,))
    dls = DataLoaders(DataLoader(list(zip(x, y))[:15], bs=4), DataLoader(list(zip(x, y))[15:], bs=4))
    learn = Learner(dls, Flat(3), loss_func=CrossEntropyLossFlat(), metrics=M.cls_metrics(3), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    with torch.no_grad():
        pred = learn.model(x[15:]).argmax(1)
    want = [
        sk.accuracy_score(y[15:], pred),
        sk.balanced_accuracy_score(y[15:], pred),
        sk.f1_score(y[15:], pred, average='macro'),
    ]
    np.testing.assert_allclose(learn.recorder.values[-1][2:], want)
    assert learn.recorder.metric_names[3:6] == ['accuracy', 'balanced_accuracy', 'macro_f1']


def test_wrong_number_of_outputs_is_named(tmp_path):
    learn, _, _ = seg_learner(tmp_path, M.seg_metrics(SPARSE))
    with learn.no_bar(), pytest.raises(ValueError, match='counts 4 classes, the model'):
        learn.validate()
    with pytest.raises(ValueError, match='only the dense classes'):
        M.seg_metrics(SPARSE, sparse=True)


def test_before_the_first_batch_there_is_no_value():
    metric = M.cls_metrics(3)[0]
    assert metric.value is None and pickle.loads(pickle.dumps(metric)).value is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.gpu
def test_counts_on_a_gpu(tmp_path):
    learn, x, y = seg_learner(tmp_path, M.seg_metrics())
    learn.dls.to(torch.device('cuda'))
    learn.model.cuda()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    with torch.no_grad():
        pred = learn.model(x.cuda()).argmax(1)
    assert learn.metrics[0].confusion.tolist() == naive_confusion(pred.cpu().numpy(), y.numpy(), 7)


# -- votes


def test_votes_against_a_loop():
    preds, cols = table(), ['p_' + c for c in CLASSES]
    for by, keys in (('clip', ['patient', 'label', 'clip']), ('patient', ['patient', 'label'])):
        mean, major = M.vote(preds, by), M.vote(preds, by, 'majority')
        np.testing.assert_allclose([mean[cols].sum(axis=1), major[cols].sum(axis=1)], 1, atol=1e-12)
        assert len(mean) == len(preds[keys].drop_duplicates()) and mean.votes.sum() == len(preds)
        for i, row in mean.iterrows():
            rows = preds[(preds[keys] == row[keys]).all(axis=1)]
            assert np.allclose(row[cols].astype(float), rows[cols].mean())
            ballots = rows[cols].to_numpy().argmax(1)
            share = np.bincount(ballots, minlength=3) / len(rows)
            assert np.allclose(major.loc[i, cols].astype(float), share, atol=2e-6)
            best = max(range(3), key=lambda k: (share[k], rows[cols[k]].mean()))
            assert M.predicted(major)[i] == CLASSES[best]


def test_a_patient_with_two_labels_is_two_rows_and_one_patient():
    preds = table()
    by_patient = M.vote(preds, 'patient')
    assert by_patient.patient.tolist().count('p0') == 2 and sorted(
        by_patient[by_patient.patient == 'p0'].label
    ) == ['covid', 'regular']
    assert len(M.cls_confusions(by_patient)) == preds.patient.nunique() and M.cls_confusions(
        by_patient
    ).sum() == len(by_patient)
    assert set(M.evaluate(preds, n_boot=20).patients) == {8}


def test_columns_that_vary_within_a_group_are_not_invented():
    preds = table()
    leaky = preds.assign(fold=preds.frame % 3)
    assert (
        'fold' in M.vote(preds, 'clip')
        and 'fold' not in M.vote(leaky, 'clip')
        and 'probe' in M.vote(leaky, 'clip')
    )


def test_row_order_does_not_matter():
    preds = table()
    pd.testing.assert_frame_equal(
        M.evaluate(preds, n_boot=50), M.evaluate(preds.sample(frac=1, random_state=1), n_boot=50)
    )
    pd.testing.assert_frame_equal(
        R.roc(preds, n_boot=50)[1], R.roc(preds.sample(frac=1, random_state=1), n_boot=50)[1]
    )


def test_vote_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'probe'"):
        M.vote(table(), 'probe')
    with pytest.raises(ValueError, match="'median'"):
        M.vote(table(), how='median')
    with pytest.raises(ValueError, match="'video'"):
        M.evaluate(table(), levels=['video'])
    with pytest.raises(TableError, match="'clip'"):
        M.vote(table().drop(columns='clip'), 'clip')


# -- bootstrap


def test_bootstrap_is_the_naive_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (9, 3, 3))
    draws = patient_draws(9, 200, 7)
    assert (draws.sum(1) == 9).all()
    naive = []
    for draw in draws:
        total = np.zeros((3, 3))
        for patient, times in enumerate(draw):
            for _ in range(times):
                total += counts[patient]
        naive.append(np.trace(total) / total.sum())
    value, low, high = bootstrap(counts, M.overall_accuracy, n_boot=200, seed=7)
    assert value == np.trace(counts.sum(0)) / counts.sum()
    np.testing.assert_allclose([low, high], np.percentile(naive, [2.5, 97.5]))


def test_bootstrap_agrees_with_resampling_rows_of_the_table():
    preds = table(patients=20, seed=3)
    ours = M.evaluate(preds, levels=['frame'], n_boot=4000).set_index(['class', 'metric']).loc[('all', 'f1')]
    truth, guess, patient = preds.label.to_numpy(), M.predicted(preds).to_numpy(), preds.patient.to_numpy()
    rows, rng, scores = {p: np.flatnonzero(patient == p) for p in set(patient)}, np.random.default_rng(11), []
    for _ in range(400):
        take = np.concatenate([rows[p] for p in rng.choice(sorted(rows), len(rows))])
        scores.append(sk.f1_score(truth[take], guess[take], average='macro'))
    assert np.isclose(ours.value, sk.f1_score(truth, guess, average='macro'))
    np.testing.assert_allclose([ours.low, ours.high], np.percentile(scores, [2.5, 97.5]), atol=0.02)


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone():
    counts = np.random.default_rng(0).integers(0, 6, (9, 3, 3))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    a, b, c = (bootstrap(counts, M.mean_iou, seed=s) for s in (1, 1, 2))
    assert a == b and a != c and (np.random.get_state()[1] == before).all()


def test_frames_of_a_patient_stay_together():
    "Copying every frame of every patient tells nothing new: the interval must not shrink."
    preds = table(patients=12)
    more = pd.concat([preds.assign(frame=preds.frame + 100 * k) for k in range(5)], ignore_index=True)
    pd.testing.assert_frame_equal(M.evaluate(preds).drop(columns='n'), M.evaluate(more).drop(columns='n'))


@pytest.mark.parametrize('shape', [(3, 3), (0, 3, 3), (4, 3, 2)])
def test_bootstrap_names_the_shape(shape):
    with pytest.raises(ValueError, match=r'got shape'):
        bootstrap(np.zeros(shape), M.overall_accuracy)


def test_a_class_that_some_resamples_miss_still_has_an_interval():
    counts = np.zeros((6, 3, 3), int)
    counts[:, 0, 0] = 5
    counts[0, 1, 1] = 3
    counts[0, 1, 0] = 1  # only one patient has class 1, nobody class 2
    value, low, high = bootstrap(counts, M.iou)
    assert np.isfinite([low[1], high[1]]).all() and value[1] == 0.75
    assert np.isnan(value[2]) and np.isnan(low[2]) and np.isnan(high[2])


# -- evaluate


def test_evaluate_against_scikit_learn_at_each_level():
    preds = table(patients=13, seed=5)
    scores = M.evaluate(preds, how='majority', n_boot=10).set_index(['level', 'class', 'metric'])
    for level, units in (
        ('frame', preds),
        ('clip', M.vote(preds, 'clip', 'majority')),
        ('patient', M.vote(preds, 'patient', 'majority')),
    ):
        guess = M.predicted(units)
        p, r, f, n = sk.precision_recall_fscore_support(
            units.label, guess, labels=list(CLASSES), zero_division=0
        )
        for i, c in enumerate(CLASSES):
            np.testing.assert_allclose(
                [scores.value[level, c, m] for m in ('precision', 'recall', 'f1')], [p[i], r[i], f[i]]
            )
            assert scores.n[level, c, 'recall'] == n[i]
        assert scores.value[level, 'all', 'accuracy'] == sk.accuracy_score(units.label, guess)
        assert np.isclose(
            scores.value[level, 'all', 'balanced_accuracy'], sk.balanced_accuracy_score(units.label, guess)
        )
        assert scores.n[level, 'all', 'f1'] == len(units)


def test_a_class_absent_from_a_fold():
    fold = table(patients=9, two_labels=False)
    fold = fold[fold.label != 'pneumonia']
    scores = M.evaluate(fold, levels=['frame'], n_boot=50).set_index(['class', 'metric']).value
    called = (M.predicted(fold) == 'pneumonia').any()
    assert called and scores['pneumonia', 'recall'] == 0 and scores['pneumonia', 'precision'] == 0
    assert np.isclose(
        scores['all', 'balanced_accuracy'], (scores['covid', 'recall'] + scores['regular', 'recall']) / 2
    )
    never = fold.assign(p_pneumonia=0.0)
    assert np.isnan(
        M.evaluate(never, levels=['frame'], n_boot=50).set_index(['class', 'metric']).value['pneumonia', 'f1']
    )
    curves, areas = R.roc(fold, n_boot=20)
    assert (
        np.isnan(areas.set_index('class').auc['pneumonia'])
        and 'pneumonia' not in set(curves['class'])
        and areas.auc.notna().sum() == 4
    )


def test_one_patient_has_scores_but_no_interval():
    lone = table(patients=1)
    for scores in (M.evaluate(lone), R.roc(lone)[1]):
        assert scores.low.isna().all() and scores.high.isna().all() and (scores.patients == 1).all()


@pytest.mark.parametrize(
    'spoil,words',
    [
        (lambda t: t.drop(columns=['label', 'frame']), r"\['label', 'frame'\]"),
        (lambda t: t.drop(columns=['p_' + c for c in CLASSES]), 'p_<class>'),
        (lambda t: t.drop(columns='p_pneumonia'), r"no column \['p_pneumonia'\]"),
        (lambda t: t.iloc[:0], 'empty'),
        (lambda t: t.assign(patient=t.patient.where(t.index != 4)), r'no patient in row\(s\) 4'),
        (
            lambda t: t.assign(p_covid=t.p_covid.where(~t.index.isin([2, 9]))),
            r'NaN or infinite in row\(s\) 2, 9',
        ),
        (lambda t: t.assign(p_covid=np.where(t.index == 3, np.inf, t.p_covid)), r'row\(s\) 3'),
        (lambda t: t.assign(p_covid=t.p_covid - 2), 'apply softmax'),
        (lambda t: t.assign(p_covid='high'), 'hold numbers from 0 to 1'),
        (lambda t: pd.concat([t, t[:2]], ignore_index=True), r'row\(s\) 80, 81 repeat'),
        (lambda t: t.assign(label=t.label.where(t.index != 0, 'viral')), 'viral'),
    ],
)
def test_bad_tables_are_named(spoil, words):
    for use in (M.check_predictions, M.evaluate):
        with pytest.raises(TableError, match=words):
            use(spoil(table()))


def test_many_bad_rows_are_not_all_listed():
    with pytest.raises(TableError, match='and 75 more'):
        M.evaluate(table().assign(p_covid=np.nan))


# -- ROC


def test_areas_and_curves_are_scikit_learns():
    preds = table(patients=10, seed=2).round(1)  # rounding makes ties
    curves, areas = R.roc(preds, n_boot=10)
    areas, cols = areas.set_index('class'), ['p_' + c for c in CLASSES]
    hot = preds.label.to_numpy()[:, None] == np.array(CLASSES)
    for i, c in enumerate(CLASSES):
        assert (
            np.isclose(areas.auc[c], sk.roc_auc_score(hot[:, i], preds[cols[i]]))
            and areas.n[c] == hot[:, i].sum()
        )
        g = curves[curves['class'] == c]
        assert np.isclose(sk.auc(g.fpr, g.tpr), areas.auc[c])
    assert np.isclose(areas.auc['micro'], sk.roc_auc_score(hot.ravel(), preds[cols].to_numpy().ravel()))
    assert np.isclose(areas.auc['macro'], areas.auc[list(CLASSES)].mean())
    for _, g in curves.groupby('class'):
        assert (
            g.fpr.iloc[0] == 0
            and g.tpr.iloc[0] == 0
            and np.isclose(g.tpr.iloc[-1], 1)
            and (np.diff(g.fpr) >= 0).all()
            and (np.diff(g.tpr) >= 0).all()
        )


def test_area_bootstrap_is_the_naive_loop():
    preds = table(patients=7, seed=4)
    got = R.roc(preds, n_boot=60, seed=5)[1].set_index('class').loc['covid']
    group, P = pd.factorize(preds.patient, sort=True)[0], 7
    naive = [
        sk.roc_auc_score(preds.label == 'covid', preds.p_covid, sample_weight=draw[group])
        for draw in patient_draws(P, 60, 5)
        if len(set((preds.label == 'covid')[draw[group] > 0])) == 2
    ]
    np.testing.assert_allclose([got.low, got.high], np.percentile(naive, [2.5, 97.5]))


@pytest.mark.parametrize('curve', [R.roc, R.roc_bands, R.pr_curve])
def test_curves_of_one_class_only_are_refused(curve):
    only = table(two_labels=False)
    only = only[only.label == 'covid']
    with pytest.raises(ValueError, match="every row is truly 'covid'.*at least two classes"):
        curve(only, n_boot=10)
    with pytest.raises(ValueError, match="'covid'"):
        curve(M.vote(only, 'patient'), n_boot=10)
    with pytest.raises(TableError, match='empty'):
        curve(only[:0], n_boot=10)


def test_band_is_the_naive_loop():
    preds = table(patients=7, seed=4).round(1)
    got, group, grid = (
        R.roc_bands(preds, points=11, n_boot=40, seed=5),
        pd.factorize(preds.patient, sort=True)[0],
        np.linspace(0, 1, 11),
    )
    for c in CLASSES:
        hit, naive = (preds.label == c).to_numpy(), []
        for draw in patient_draws(7, 40, 5):
            take = np.repeat(np.arange(len(preds)), draw[group])
            if len(set(hit[take])) == 2:
                naive.append(
                    np.interp(
                        grid,
                        *sk.roc_curve(hit[take], preds['p_' + c].to_numpy()[take], drop_intermediate=False)[
                            :2
                        ],
                    )
                )
        g = got[got['class'] == c]
        np.testing.assert_allclose([g.low, g.high], np.percentile(naive, [2.5, 97.5], axis=0), atol=1e-12)
        np.testing.assert_allclose(
            g.tpr, np.interp(grid, *sk.roc_curve(hit, preds['p_' + c])[:2]), atol=1e-12
        )
    curves = R.roc(preds, n_boot=2)[0]
    for c in ('micro', 'macro'):
        g, one = got[got['class'] == c], curves[curves['class'] == c]
        np.testing.assert_allclose(
            g.tpr, np.interp(grid, one.fpr, one.tpr), atol=0.02 if c == 'macro' else 1e-12
        )


def test_bands_of_a_missing_class_and_of_one_patient():
    fold = table(patients=9, two_labels=False)
    fold = fold[fold.label != 'pneumonia']
    assert set(R.roc_bands(fold, n_boot=10)['class']) == {'covid', 'regular', 'micro', 'macro'}
    lone = table(patients=1)  # one patient, two labels
    assert (
        R.roc_bands(lone, n_boot=10).low.isna().all()
        and R.roc_bands(lone, n_boot=10).tpr.notna().all()
        and R.pr_curve(lone, n_boot=10)[1].low.isna().all()
    )


# -- precision and recall


def test_average_precision_is_scikit_learns():
    preds = table(patients=10, seed=2).round(1)  # rounding makes ties
    curves, areas = R.pr_curve(preds, n_boot=10)
    areas, cols, hot = (
        areas.set_index('class'),
        ['p_' + c for c in CLASSES],
        preds.label.to_numpy()[:, None] == np.array(CLASSES),
    )
    for i, c in enumerate(CLASSES):
        assert (
            np.isclose(areas.ap[c], sk.average_precision_score(hot[:, i], preds[cols[i]]))
            and areas.n[c] == hot[:, i].sum()
            and areas.chance[c] == hot[:, i].mean()
        )
        p, r, _ = sk.precision_recall_curve(hot[:, i], preds[cols[i]])
        assert {*zip(*curves[curves['class'] == c][['recall', 'precision']].to_numpy()[1:].T)} <= {*zip(r, p)}
    assert np.isclose(
        areas.ap['micro'], sk.average_precision_score(hot.ravel(), preds[cols].to_numpy().ravel())
    ) and np.isclose(areas.ap['macro'], areas.ap[list(CLASSES)].mean())
    for c, g in curves.groupby('class'):
        assert g.recall.iloc[0] == 0 and np.isclose(g.recall.iloc[-1], 1) and (np.diff(g.recall) > 0).all()
        assert np.isclose((np.diff(g.recall) * g.precision[1:]).sum(), areas.ap[c])


def test_average_precision_bootstrap_is_the_naive_loop():
    preds = table(patients=7, seed=4).round(1)
    got, group = (
        R.pr_curve(preds, n_boot=60, seed=5)[1].set_index('class').loc['covid'],
        pd.factorize(preds.patient, sort=True)[0],
    )
    hit = (preds.label == 'covid').to_numpy()
    naive = [
        sk.average_precision_score(hit, preds.p_covid, sample_weight=draw[group])
        for draw in patient_draws(7, 60, 5)
        if len(set(hit[draw[group] > 0])) == 2
    ]
    np.testing.assert_allclose([got.low, got.high], np.percentile(naive, [2.5, 97.5]))


def test_precision_recall_without_one_class():
    fold = table(patients=9, two_labels=False)
    fold = fold[fold.label != 'pneumonia']
    curves, areas = R.pr_curve(fold, n_boot=20)
    areas = areas.set_index('class')
    assert (
        np.isnan(areas.ap['pneumonia'])
        and 'pneumonia' not in set(curves['class'])
        and areas.ap.notna().sum() == 4
        and areas.chance['macro'] == 0.5
    )


# -- the classification report


def test_report_is_scikit_learns():
    preds = table(patients=13, seed=5)
    theirs = sk.classification_report(preds.label, M.predicted(preds), labels=list(CLASSES), output_dict=True)
    ours = M.classification_report(preds)
    for ours_row, row in [(c, c) for c in CLASSES] + [('macro', 'macro avg'), ('weighted', 'weighted avg')]:
        np.testing.assert_allclose(
            ours.loc[ours_row], [theirs[row][k] for k in ('precision', 'recall', 'f1-score', 'support')]
        )
    assert np.allclose(ours.loc['accuracy', ['precision', 'recall', 'f1']], theirs['accuracy'])
    pd.testing.assert_frame_equal(
        ours, M.classification_report(torch.tensor(M.cls_confusions(preds).sum(0)), CLASSES)
    )
    assert M.classification_report(M.vote(preds, 'clip')).support['macro'] == preds['clip'].nunique()


PAPER = {  # Arora et al. 2020: test fold of the authors' notebook, rows true
    'vgg16': (
        [[204, 1, 20], [11, 82, 3], [30, 4, 170]],
        [[0.83, 0.91, 0.87], [0.94, 0.85, 0.90], [0.88, 0.83, 0.86]],
        0.8686,
    ),
    'resnet18': (
        [[167, 23, 35], [0, 95, 1], [22, 7, 175]],
        [[0.88, 0.74, 0.81], [0.76, 0.99, 0.86], [0.83, 0.86, 0.84]],
        0.8324,
    ),
}


@pytest.mark.parametrize('name', PAPER)
def test_the_paper_s_confusions_give_its_printed_reports(name):
    cm, printed, accuracy = PAPER[name]
    ours = M.classification_report(cm, CLASSES)
    assert ours.round(2).loc[
        list(CLASSES), ['precision', 'recall', 'f1']
    ].values.tolist() == printed and list(ours.support[:3]) == [225, 96, 204]
    assert round(ours.f1['accuracy'], 4) == round(float(M.overall_accuracy(cm)), 4) == accuracy


def test_report_of_odd_confusions():
    absent = M.classification_report([[3, 0, 1], [0, 0, 0], [0, 0, 4]], 'abc')
    assert (
        absent.loc['b'].isna().tolist() == [True] * 3 + [False]
        and np.isclose(absent.recall['macro'], (3 / 4 + 1) / 2)
        and np.isclose(absent.recall['weighted'], absent.recall['accuracy'])
    )
    assert (
        M.classification_report(np.zeros((2, 2), int), 'ab')
        .drop(columns='support')
        .loc[['a', 'accuracy', 'macro']]
        .isna()
        .all(axis=None)
    )
    for bad in (np.eye(3), np.zeros((2, 3)), np.zeros(2)):
        with pytest.raises(ValueError, match='2 names for a confusion matrix of shape'):
            M.classification_report(bad, 'ab')
    with pytest.raises(ValueError, match='0 names'):
        M.classification_report(np.eye(3))


def test_votes_are_pocovid_nets_two_ways():
    "Majority of the frames' classes, and largest summed probability."
    preds, cols = table(patients=12, seed=8), ['p_' + c for c in CLASSES]
    by_sum = preds.groupby(['patient', 'label', 'clip'])[cols].sum().to_numpy().argmax(1)
    assert list(M.predicted(M.vote(preds, 'clip'))) == [CLASSES[i] for i in by_sum]
    majority = M.predicted(M.vote(preds, 'clip', 'majority'))
    for (_, rows), called in zip(preds.groupby(['patient', 'label', 'clip']), majority):
        n = M.predicted(rows).value_counts()
        assert n[called] == n.max()


# -- segmentation tables


def seg_table(seed=0, frames=18, n=7):
    rng = np.random.default_rng(seed)
    cms = rng.integers(0, 50, (frames, n, n)) + 200 * np.eye(n, dtype=int)
    cms[:, 2] *= rng.random((frames, 1)) < 0.5  # healthy pleura is in half of the frames
    return cms, pd.DataFrame(cms.reshape(frames, -1), columns=M.confusion_columns(n)).assign(
        patient=[f'p{i // 3}' for i in range(frames)], fold=[i % 2 for i in range(frames)]
    )


def test_seg_confusions_add_up():
    cms, segs = seg_table()
    assert (M.seg_confusions(segs) == cms.reshape(6, 3, 7, 7).sum(1)).all()
    assert (M.seg_confusions(segs, 'fold') == np.stack([cms[::2].sum(0), cms[1::2].sum(0)])).all()
    shuffled = segs[list(segs.columns[::-1])].sample(frac=1, random_state=0)
    assert (M.seg_confusions(shuffled) == M.seg_confusions(segs)).all()


def test_evaluate_seg_dense_and_merged():
    cms, segs = seg_table()
    dense = M.evaluate_seg(segs, DENSE).set_index(['class', 'metric'])
    sparse = M.evaluate_seg(segs, SPARSE, merge=DENSE_TO_SPARSE).set_index(['class', 'metric'])
    np.testing.assert_allclose(dense.value[[(c, 'iou') for c in DENSE]], M.iou(cms.sum(0)))
    assert np.isclose(dense.value['all', 'mean_iou'], M.iou(cms.sum(0)).mean()) and np.isclose(
        sparse.value['all', 'pixel_accuracy'], M.overall_accuracy(M.merge_confusion(cms.sum(0)))
    )
    assert dense.n['healthy pleura', 'iou'] == (cms[:, 2].sum(1) > 0).sum() < dense.n['all', 'mean_iou'] == 18
    assert (
        (dense.low <= dense.value).all() and (dense.value <= dense.high).all() and (dense.patients == 6).all()
    )
    assert list(dense.columns) == list(M.evaluate(table(), n_boot=5).set_index(['class', 'metric']).columns)


@pytest.mark.parametrize(
    'spoil,words',
    [
        (lambda t: t.drop(columns='patient'), "'patient'"),
        (lambda t: t.drop(columns='cm_1_2'), 'cm_1_2'),
        (lambda t: t[['patient']], 'cm_0_0'),
        (lambda t: t.iloc[:0], 'empty'),
        (lambda t: t.assign(cm_0_0=t.cm_0_0.where(t.index != 3)), r'row\(s\) 3'),
        (lambda t: t.assign(patient=t.patient.where(t.index != 5)), r'no patient in row\(s\) 5'),
    ],
)
def test_bad_segmentation_tables_are_named(spoil, words):
    with pytest.raises(TableError, match=words):
        M.evaluate_seg(spoil(seg_table()[1]), DENSE)


def test_names_must_fit():
    with pytest.raises(ValueError, match='4 names for 7'):
        M.evaluate_seg(seg_table()[1], SPARSE)
