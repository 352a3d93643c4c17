"A swapped order of classes, channels or codes: everywhere the right answer, or an error that shows both."

import copy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import CrossEntropyLossFlat, Learner, OptimWrapper
from torch import nn

from lus_fastai.core import CLASSES, SPARSE, TableError
from lus_fastai.data.folds import Folds, patient_folds
from lus_fastai.data.loaders import frame_dls
from lus_fastai.explain.attribution import saliency, seg_target
from lus_fastai.explain.feature_visualization import maximise_class, show_class_images
from lus_fastai.explain.occlusion import EXPLAINERS, explain_clip
from lus_fastai.explain.sanity_checks import deletion_insertion
from lus_fastai.models.backbones import create_backbone
from lus_fastai.models.classifiers import seg_to_cls
from lus_fastai.models.transfer import copy_weights, load_weights, name_outputs, save_weights
from lus_fastai.models.unet import unet
from lus_fastai.stats import calibration as C
from lus_fastai.stats import classification as M
from lus_fastai.stats.curves import pr_curve, roc
from lus_fastai.stats.figures import plot_confusion
from lus_fastai.toys import toy_predictions
from lus_fastai.train.callbacks import ClassProbs, PixelCounts, TrainingSettings, predict_table
from lus_fastai.train.cross_validation import cross_validate, last_epoch
from lus_fastai.train.fine_tuning import fine_tune, fine_tune_learner
from lus_fastai.widgets import Explainer

SWAPPED = CLASSES[::-1]
adam = partial(OptimWrapper, opt=torch.optim.Adam)


class Answers(nn.Module):
    "A network whose outputs always mean the same: the last number of the class it answers is large."

    def __init__(self, code, n=3):
        super().__init__()
        self.conv = nn.Conv2d(1, n, 1)
        nn.init.zeros_(self.conv.weight)
        with torch.no_grad():
            self.conv.bias.copy_(10.0 * (torch.arange(n) == code))

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def always(name):
    "Builds Learners of a network that always answers this class, whatever its number is, and hardly learns."

    def build(dls):
        return Learner(
            dls, Answers(list(dls.vocab).index(name)), loss_func=CrossEntropyLossFlat(), opt_func=adam
        )

    return build


def run(store, path, classes, collect=None, name='regular'):
    def data(a, b):
        return frame_dls(store, a, b, classes=classes, bs=8)

    settings, folds = TrainingSettings(1, lr=1e-9), patient_folds(store.frames, 2)
    return cross_validate(
        always(name), folds, settings, data=data, collect=collect or ClassProbs(), path=path
    )


# --- training


def test_a_network_that_answers_regular_says_so_under_any_order(phantom_store, tmp_path):
    for i, classes in enumerate((CLASSES, SWAPPED)):
        oof = run(phantom_store, tmp_path / str(i), classes)
        assert (oof.p_regular > 0.99).all() and (M.predicted(oof) == 'regular').all()
        assert (last_epoch(Folds(phantom_store.frames, oof.fold), tmp_path / str(i)).p_regular > 0.99).all()
        weights = load_weights(tmp_path / str(i) / 'fold0' / 'model.safetensors')
        assert weights.classes == classes and weights['conv.bias'].argmax() == classes.index('regular')


def test_names_in_another_order_are_refused_before_anything_is_trained(phantom_store, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"\['covid', 'pneumonia', 'regular'\], the DataLoaders \['regular', 'pneumonia', 'covid'\]",
    ):
        run(phantom_store, tmp_path / 'a', SWAPPED, ClassProbs(CLASSES))
    assert not (tmp_path / 'a').exists()


def test_a_finished_run_is_not_read_under_another_order(phantom_store, tmp_path):
    run(phantom_store, tmp_path, CLASSES)
    with pytest.raises(ValueError, match="columns .*p_covid.* -> .*p_regular"):
        run(phantom_store, tmp_path, SWAPPED)


def test_a_label_without_a_name_is_refused_before_anything_is_trained(phantom_store, tmp_path):
    frames = phantom_store.frames.assign(label=phantom_store.frames.label.replace('regular', 'normal'))

    def blind(a, b):
        return frame_dls(phantom_store, a.replace('normal', 'regular'), b.replace('normal', 'regular'), bs=8)

    for data in (blind, lambda a, b: frame_dls(phantom_store, a, b, bs=8)):
        with pytest.raises(TableError, match=r"\['normal'\]"):
            cross_validate(
                always('regular'),
                patient_folds(frames, 2),
                TrainingSettings(1),
                data=data,
                collect=ClassProbs(),
                path=tmp_path / 'x',
            )
    assert not (tmp_path / 'x').exists()


def test_predict_table_compares_its_names_with_the_dataloader(phantom_store):
    dls = frame_dls(
        phantom_store, phantom_store.frames[:8], phantom_store.frames[8:12], classes=SWAPPED, bs=4
    )
    assert predict_table(Answers(0), dls.valid, ClassProbs()).argmax(1).tolist() == [0] * 4
    with pytest.raises(ValueError, match='leave them out'):
        predict_table(Answers(0), dls.valid, ClassProbs(CLASSES))


def test_codes_and_outputs_must_be_as_many_as_are_counted(phantom_store, tmp_path):
    frames = phantom_store.frames

    def segment(target, outputs, n):
        def build(dls):
            return Learner(dls, unet(outputs, width=2), loss_func=CrossEntropyLossFlat(axis=1), opt_func=adam)

        return cross_validate(
            build,
            patient_folds(frames, 2),
            TrainingSettings(1),
            data=lambda a, b: frame_dls(phantom_store, a, b, target, bs=8),
            collect=PixelCounts(n),
            path=tmp_path / 's',
        )

    with pytest.raises(ValueError, match='counts 4 codes, the masks of the DataLoaders have 7'):
        segment('dense', 4, 4)
    with pytest.raises(ValueError, match='counts 7 codes, the masks of the DataLoaders have 4'):
        segment('sparse', 7, 7)
    with pytest.raises(ValueError, match='PixelCounts has 7 names, the network 4 outputs'):
        segment('dense', 4, 7)
    assert not list(tmp_path.rglob('checkpoint.pt')) and not list(tmp_path.rglob('predictions.pt'))


def test_fine_tune_under_both_orders_gives_columns_by_name(phantom_store, tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone('resnet18')
    learn = fine_tune_learner(
        frame_dls(phantom_store, phantom_store.frames[:8], phantom_store.frames[8:16], classes=SWAPPED, bs=4),
        backbone,
    )
    assert learn.model.classes == SWAPPED and learn.model[0].mean == [0.5]
    other = copy.deepcopy(backbone)
    other.normalize = [0.4], [0.2]
    assert fine_tune_learner(learn.dls, other).model[0].std == [0.2]
    frames = phantom_store.frames
    normal = Folds(frames.assign(label=frames.label.replace('regular', 'normal')), np.arange(len(frames)) % 2)
    with pytest.raises(TableError, match=r"\['normal'\]"):
        fine_tune(backbone, phantom_store, folds=normal, path=tmp_path / 'f')
    assert not (tmp_path / 'f' / 'folds').exists()


# --- weights


def test_weights_of_another_order_do_not_load_and_change_nothing(tmp_path):
    ours, theirs = Answers(0), Answers(1)
    name_outputs(ours, CLASSES)
    name_outputs(theirs, SWAPPED)
    save_weights(ours, tmp_path / 'w.safetensors')
    before = theirs.conv.bias.detach().clone()
    for source in (ours, tmp_path / 'w.safetensors', load_weights(tmp_path / 'w.safetensors')):
        with pytest.raises(
            ValueError,
            match=r"\['regular', 'pneumonia', 'covid'\], not \['covid', 'pneumonia', 'regular'\]: "
            "the same classes in another order",
        ):
            copy_weights(source, theirs)
    assert torch.equal(theirs.conv.bias, before)
    save_weights(Answers(0), tmp_path / 'unnamed.safetensors')
    copy_weights(tmp_path / 'unnamed.safetensors', theirs)  # as ever
    assert theirs.conv.bias.argmax() == 0 and theirs.classes == SWAPPED


def test_the_names_stay_behind_where_the_last_layer_does():
    ours, four = seg_to_cls(unet(7, width=2), 3), seg_to_cls(unet(7, width=2), 4)
    name_outputs(ours, CLASSES)
    copy_weights(ours, four)
    assert not hasattr(four, 'classes')
    with pytest.raises(ValueError, match='name one twice'):
        name_outputs(four, 'abca')


# --- scores, calibration, figures


def table(classes=CLASSES):
    preds, chances = toy_predictions(12), [f'p_{c}' for c in CLASSES]
    return preds.drop(columns=chances).join(preds[[f'p_{c}' for c in classes]])


def test_every_score_of_a_table_is_the_same_under_another_order_of_its_columns():
    a, b = table(), table(SWAPPED)

    def same(f, keys):
        x, y = (f(t).sort_values(keys).reset_index(drop=True) for t in (a, b))
        pd.testing.assert_frame_equal(x, y[x.columns])

    same(lambda t: M.evaluate(t, n_boot=50), ['level', 'class', 'metric'])
    same(lambda t: M.vote(t, 'patient', 'majority'), ['patient'])
    same(lambda t: M.classification_report(t).rename_axis('class').reset_index(), ['class'])
    for curve in (roc, pr_curve):
        same(lambda t, curve=curve: curve(t, n_boot=50)[1], ['class'])
    same(lambda t: C.calibrate(t)[0], ['patient', 'frame'])
    assert C.ece(a) == pytest.approx(C.ece(b))


def test_names_beside_a_table_are_compared_and_a_figure_takes_the_tables_own():
    with pytest.raises(ValueError, match='leave the names out'):
        M.classification_report(table(SWAPPED), CLASSES)
    with pytest.raises(ValueError, match='leave the names out'):
        plot_confusion(table(SWAPPED), CLASSES)
    axes = [plot_confusion(table(classes)).axes[0] for classes in (CLASSES, SWAPPED)]
    assert [[t.get_text() for t in ax.get_xticklabels()] for ax in axes] == [list(CLASSES), list(SWAPPED)]
    counts = [[int(t.get_text()) for t in ax.texts[::2]] for ax in axes]
    assert counts[0] == counts[1][::-1]


def test_the_metrics_of_a_segmenter_name_the_codes_of_the_masks(phantom_store):
    dls = frame_dls(phantom_store, phantom_store.frames[:8], phantom_store.frames[8:12], 'sparse', bs=4)

    def validate(names):
        learn = Learner(
            dls, unet(4, width=2), loss_func=CrossEntropyLossFlat(axis=1), metrics=M.seg_metrics(names)
        )
        with learn.no_bar(), learn.no_logging():
            return learn.validate()

    assert len(validate(SPARSE)) == 7
    with pytest.raises(
        ValueError,
        match="name the codes .*'background', 'pleura'.*, the DataLoaders .*'pleura', 'background'",
    ):
        validate(SPARSE[::-1])


# --- what is shown and explained


def named(classes):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    order = [CLASSES.index(c) for c in classes]
    with torch.no_grad():
        net[-1].weight.copy_(net[-1].weight[order].clone())
        net[-1].bias.copy_(net[-1].bias[order].clone())
    name_outputs(net, classes)
    return net


@pytest.mark.parametrize('method', list(EXPLAINERS))
def test_a_class_is_explained_by_name_whatever_its_number(method):
    frames = (torch.rand(2, 16, 16) * 255).byte()
    maps = []
    for classes in (CLASSES, SWAPPED):
        torch.manual_seed(1)
        maps.append(explain_clip(named(classes), frames, method, target='covid')[0])
    assert np.abs(maps[0]).max() > 0
    np.testing.assert_allclose(*maps, atol=1e-6)


def test_names_of_codes_of_frames_and_in_deletion_and_imagination():
    a, b, x = named(CLASSES), named(SWAPPED), torch.rand(2, 1, 16, 16)
    assert torch.allclose(
        saliency(a, x, ['covid', 'regular']), saliency(b, x, ['covid', 'regular']), atol=1e-6
    )
    assert saliency(a, x, ['covid', 'regular']).sub(saliency(b, x, [0, 2])).abs().max() > 1e-6
    curves = [deletion_insertion(m, x, np.ones((2, 16, 16)), 'covid', steps=2)[0].probability for m in (a, b)]
    np.testing.assert_allclose(*curves, atol=1e-6)
    images = [maximise_class(m, ['covid', 'regular'], (16, 16), 1, steps=2)[0] for m in (a, b)]
    assert torch.allclose(*images, atol=1e-5)
    seg = unet(4, width=2)
    name_outputs(seg, SPARSE)
    assert torch.equal(saliency(seg, x, seg_target('pleura')), saliency(seg, x, 2))
    with pytest.raises(ValueError, match=r"\['normal'\] is not among the classes"):
        saliency(a, x, 'normal')
    with pytest.raises(ValueError, match='does not say what its outputs mean'):
        saliency(unet(4, width=2), x, 'pleura')


def test_whoever_names_a_models_outputs_otherwise_is_refused(phantom_table):
    with pytest.raises(ValueError, match='in another order'):
        Explainer(named(SWAPPED), phantom_table, CLASSES, size=(32, 32))
    with pytest.raises(ValueError, match='pass classes='):
        Explainer(Answers(0), phantom_table, size=(32, 32))
    assert Explainer(named(SWAPPED), phantom_table, size=(32, 32)).classes == SWAPPED
    with pytest.raises(ValueError, match='in another order'):
        show_class_images(named(SWAPPED), (16, 16), CLASSES, channels=1)
    with pytest.raises(ValueError, match='give their names'):
        show_class_images(Answers(0), (16, 16), channels=1)
