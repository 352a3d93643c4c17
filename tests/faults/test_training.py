"Training under faults: kills, full disks, interrupts, learners sent between processes; schedules and tuning."

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from stills import write_still

from lus_fastai.train import cross_validation as training

SETUP = '''
import os, signal, sys
import numpy as np, pandas as pd, torch
from functools import partial
from fastai.vision.all import Learner, OptimWrapper, CrossEntropyLossFlat, Callback
from lus_fastai.core import CLASSES, seed_all
from lus_fastai.data.store import FrameStore
from lus_fastai.data.loaders import frame_dls
from lus_fastai.data.augment import GareAugment
from lus_fastai.models.unet import unet
from lus_fastai.models.classifiers import seg_to_cls, BackboneClassifier
from lus_fastai.models.backbones import create_backbone
from lus_fastai.data.folds import Folds, patient_folds
from lus_fastai.train.callbacks import AutoPrecision, EpochEnd, PlateauLR, CosineLR, OneCycleLR, EpochSeed
from lus_fastai.train.callbacks import Checkpoint, fit_resumable, ClassProbs, TrainingSettings
from lus_fastai.train.cross_validation import cross_validate, last_epoch, fold_history
from lus_fastai.train.fine_tuning import fine_tune_learner, fine_tune
from lus_fastai.models.transfer import copy_weights, load_weights, discriminative_lrs, stages
torch.set_num_threads(1)

def setup(folder):
    store = FrameStore(folder/'store')
    folds = patient_folds(store.frames, 3)
    def data(train, valid):
        return frame_dls(store, train, valid, bs=4, batch_tfms=[GareAugment()])
    def build(dls):
        adam = partial(OptimWrapper, opt=torch.optim.Adam)
        return Learner(dls, seg_to_cls(unet(4, width=2)), loss_func=CrossEntropyLossFlat(), opt_func=adam)
    return store.frames, folds, data, build

def cv(build, folds, data, path, epochs=1, **settings):
    "A small cross-validation."
    settings = TrainingSettings(epochs, **settings)
    return cross_validate(build, folds, settings, data=data, collect=ClassProbs(), path=path)

def kill_in(learn, frames, batch):
    "Kill this process in a training batch of a Learner that validates on these frames."
    # a hook, because a callback would make it another run
    if set(learn.dls.valid.items.patient) != set(frames.patient): return learn
    seen = []
    def count(module, args):
        if module.training: seen.append(1)
        if len(seen) == batch: os.kill(os.getpid(), signal.SIGKILL)
    learn.model.register_forward_pre_hook(count)
    return learn
'''
exec(SETUP)


def stills(folder, patients=9, size=(32, 32)):
    "A folder of small noise images, one class brighter than the next, and its clip table."
    rng, rows = np.random.default_rng(0), []
    for p in range(patients):
        for i in range(3):
            image = (rng.random(size) * (80 + 70 * (p % 3))).astype(np.uint8)
            rows.append(write_still(folder / f'p{p}_{i}.png', image, CLASSES[p % 3], f'p{p}'))
    return pd.DataFrame(rows)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')
    (folder / 'images').mkdir()
    FrameStore.build(stills(folder / 'images'), folder / 'store', size=(32, 32), workers=0)
    return folder


def run(folder, code, **env):
    return subprocess.run(
        [
            sys.executable,
            '-c',
            SETUP + 'from pathlib import Path\nfolder = Path(sys.argv[1])\n' + textwrap.dedent(code),
            str(folder),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )


def test_a_kill_in_the_second_fold_then_resumed_equals_an_unbroken_run(made, tmp_path):
    frames, folds, data, build = setup(made)
    whole = cv(
        build, folds, data, epochs=3, path=tmp_path / 'whole', select='best', watch='score', patience=1
    )
    code = f'''
        frames, folds, data, build = setup(folder)
        def killed(dls): return kill_in(build(dls), folds.test(1), len(dls.train) + 3)
        how = dict(epochs=3, path={str(tmp_path / 'broken')!r}, select='best', watch='score', patience=1)
        cv(killed, folds, data, **how)
    '''
    assert run(made, code).returncode == -signal.SIGKILL
    assert (tmp_path / 'broken/fold0/predictions.pt').exists() and not (
        tmp_path / 'broken/fold1/predictions.pt'
    ).exists()
    assert Checkpoint(tmp_path / 'broken/fold1/checkpoint.pt').epochs_done() == 1
    resumed = cv(
        build, folds, data, epochs=3, path=tmp_path / 'broken', select='best', watch='score', patience=1
    )
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    pd.testing.assert_frame_equal(
        *(fold_history(tmp_path / name).drop(columns='seconds') for name in ('whole', 'broken')),
        check_exact=True,
    )


@pytest.mark.parametrize('select', ['last', 'inner', 'best'])
def test_cut_off_between_the_last_checkpoint_and_the_predictions(made, tmp_path, select, monkeypatch):
    frames, folds, data, build = setup(made)

    def run(name):
        return cv(build, folds, data, epochs=2, path=tmp_path / name, select=select)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, '_check_history', stop)
        with pytest.raises(KeyboardInterrupt):
            run('cut')
    assert (
        Checkpoint(tmp_path / 'cut/fold0/checkpoint.pt').epochs_done() == 2
        and not (tmp_path / 'cut/fold0/predictions.pt').exists()
    )
    pd.testing.assert_frame_equal(run('cut'), run('whole'), check_exact=True)
    pd.testing.assert_frame_equal(
        last_epoch(folds, tmp_path / 'cut'), last_epoch(folds, tmp_path / 'whole'), check_exact=True
    )
    pd.testing.assert_frame_equal(
        *(fold_history(tmp_path / n).drop(columns='seconds') for n in ('cut', 'whole')), check_exact=True
    )


def test_a_fit_without_an_epoch_left_gives_the_trained_weights(made, tmp_path):
    frames, folds, data, build = setup(made)

    def fit():
        learn = build(data(folds.train(0), folds.test(0)))
        with learn.no_bar(), learn.no_logging():
            fit_resumable(learn, 1, 1e-3, tmp_path / 'c.pt')
        return learn.model.state_dict()

    first, again = fit(), fit()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_last_one_whole(made, tmp_path):
    "The limit on a file's size stands for the full disk: the kernel refuses the write in the same place."
    code = f'''
        import resource
        frames, folds, data, build = setup(folder)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path({str(tmp_path / 'c.pt')!r})
        class Fill(Callback):
            def before_epoch(self):
                if self.epoch == 2:
                    limits = path.stat().st_size // 2, resource.RLIM_INFINITY
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        learn = build(data(folds.train(0), folds.test(0)))
        with learn.no_bar(), learn.no_logging(): fit_resumable(learn, 4, 1e-3, path, cbs=[Fill()])
    '''
    done = run(made, code)
    assert (
        done.returncode != 0
        and 'checkpoint of epoch 3 could not be written' in done.stderr
        and 'run again to resume' in done.stderr
    )
    assert Checkpoint(tmp_path / 'c.pt').epochs_done() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'c.pt']


def test_a_checkpoint_that_is_cut_short_is_named(made, tmp_path):
    frames, folds, data, build = setup(made)
    (tmp_path / 'c.pt').write_bytes(b'PK\x03\x04 cut')
    learn = build(data(folds.train(0), folds.test(0)))
    with pytest.raises(ValueError, match='c.pt is no checkpoint'):
        fit_resumable(learn, 1, 1e-3, tmp_path / 'c.pt')


def test_fastais_own_optimiser_resumes_too(made, tmp_path):
    frames, folds, data, _ = setup(made)

    def fit(path, epochs):
        seed_all(0)
        learn = Learner(
            data(folds.train(0), folds.test(0)),
            seg_to_cls(unet(4, width=2)),
            loss_func=CrossEntropyLossFlat(),
        )
        with learn.no_bar(), learn.no_logging():
            fit_resumable(learn, epochs, 1e-3, path)
        return learn.model.state_dict()

    whole = fit(tmp_path / 'whole.pt', 3)
    fit(tmp_path / 'parts.pt', 1)
    parts = fit(tmp_path / 'parts.pt', 3)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_an_interrupt_and_a_second_fit_leave_no_hooks(made):
    frames, folds, data, build = setup(made)

    class Interrupt(Callback):
        def after_pred(self):
            raise KeyboardInterrupt

    learn = build(data(folds.train(0), folds.test(0)))
    learn.add_cb(AutoPrecision())
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, cbs=Interrupt())
        learn.fit(1)
    assert len(learn.model._forward_hooks) == len(learn.model._forward_pre_hooks) == 0
    assert not torch.is_autocast_enabled('cpu')


def test_callbacks_survive_lr_find_get_preds_validate_and_summary(made, tmp_path):
    frames, folds, data, build = setup(made)
    learn = build(data(folds.train(0), folds.test(0)))
    learn.path = tmp_path  # lr_find writes there
    plateau, cosine = PlateauLR(lambda l: 1.0, patience=0), CosineLR()
    checkpoint = Checkpoint(tmp_path / 'c.pt', [plateau])
    learn.add_cbs([AutoPrecision(), EpochSeed(1), plateau, checkpoint, cosine])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
        assert not (tmp_path / 'c.pt').exists() and plateau.wait == 0
        learn.summary()
        learn.validate()
        preds, targs = learn.get_preds()
        assert preds.shape == (len(folds.test(0)), 3) and not (tmp_path / 'c.pt').exists()
        learn.fit(1)
    assert checkpoint.epochs_done() == 1


def test_an_exported_learner_predicts_the_same_in_a_fresh_process(made, tmp_path):
    frames, folds, data, build = setup(made)
    learn = build(data(folds.train(0), folds.test(0)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=AutoPrecision('fp32'))
        here = learn.get_preds(dl=learn.dls.test_dl(folds.test(0).drop(columns='label')))[0]
    learn.export(tmp_path / 'learner.pkl')
    code = f'''
        from fastai.vision.all import load_learner
        learn = load_learner({str(tmp_path / 'learner.pkl')!r})
        frames, folds, *_ = setup(folder)
        held_out = learn.dls.test_dl(folds.test(0).drop(columns='label'))
        with learn.no_bar(): preds = learn.get_preds(dl=held_out)[0]
        print(preds.tolist())
    '''
    done = run(made, code)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout.strip().splitlines()[-1]), here.tolist(), atol=1e-6)


def test_same_seed_same_result_and_another_seed_another(made, tmp_path):
    frames, folds, data, build = setup(made)
    one, two, other = (
        cv(build, folds, data, epochs=1, path=tmp_path / name, seed=s)
        for name, s in (('a', 3), ('b', 3), ('c', 4))
    )
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not np.allclose(one.p_covid, other.p_covid)


def test_the_inner_choice_never_sees_the_held_out_patients(made, tmp_path):
    frames, folds, data, build = setup(made)
    seen = []

    def watched(train, valid):
        seen.append((set(train.patient), set(valid.patient)))
        return data(train, valid)

    cv(build, folds, watched, epochs=1, path=tmp_path / 'inner', select='inner')
    assert len(seen) == 4  # the first fold's also for the claim
    for k, (train, valid) in zip([0, 0, 1, 2], seen):
        held_out = set(folds.test(k).patient)
        assert train and valid and not train & valid and not (train | valid) & held_out


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(select='test'), "select is 'last'"),
        (dict(epochs=0), 'at least 1'),
        (dict(schedule='step'), "schedule is 'constant', 'plateau', 'cosine' or 'one-cycle'"),
        (dict(watch='f1'), "watch is 'train_loss', 'valid_loss' or 'score'"),
    ],
)
def test_wrong_arguments_are_named(made, tmp_path, change, message):
    frames, folds, data, build = setup(made)
    with pytest.raises(ValueError, match=message):
        cv(build, folds, data, path=tmp_path, **change)
    with pytest.raises(ValueError, match='at least two folds'):
        cv(build, Folds(folds.table, [0] * len(folds.table)), data, path=tmp_path)


# never the wrong run


def made_with(dls, width=2, opt=torch.optim.Adam, weight=None, **options):
    return Learner(
        dls,
        seg_to_cls(unet(4, width=width)),
        loss_func=CrossEntropyLossFlat(weight=weight),
        opt_func=partial(OptimWrapper, opt=opt, **options),
    )


def frozen(dls):
    learn = made_with(dls)
    for p in list(learn.model.parameters())[:4]:
        p.requires_grad_(False)
    return learn


CHANGES = {
    'network ': partial(made_with, width=3),
    'optimiser .*Adam.* -> .*SGD': partial(made_with, opt=torch.optim.SGD),
    'optimiser .* -> .*eps=0.001': partial(made_with, eps=1e-3),
    'loss ': partial(made_with, weight=torch.tensor([1.0, 2, 3])),
    'trains ': frozen,
}


@pytest.fixture(scope='module')
def finished(made, tmp_path_factory):
    frames, folds, data, build = setup(made)
    folder = tmp_path_factory.mktemp('finished')
    return folder, cv(build, folds, data, epochs=1, path=folder)


@pytest.mark.parametrize('what', CHANGES)
def test_another_network_optimiser_or_loss_is_not_answered_by_a_finished_run(made, finished, what):
    frames, folds, data, _ = setup(made)
    with pytest.raises(ValueError, match=f'holds another run \\(.*{what}'):
        cv(CHANGES[what], folds, data, epochs=1, path=finished[0])


def test_other_batches_labels_or_pixels_are_not_answered_by_a_finished_run(made, finished, tmp_path):
    frames, folds, data, build = setup(made)
    store = FrameStore(made / 'store')

    def run(data, frames=frames):
        return cv(build, Folds(frames, folds.fold), data, path=finished[0])

    with pytest.raises(ValueError, match='bs 4 -> 3'):
        run(lambda a, b: frame_dls(store, a, b, bs=3, batch_tfms=[GareAugment()]))
    with pytest.raises(ValueError, match=r'\(transforms .*GareAugment'):
        run(lambda a, b: frame_dls(store, a, b, bs=4))
    labels = frames.label.copy()
    labels.iloc[[0, -1]] = labels.iloc[[-1, 0]].to_numpy()
    with pytest.raises(ValueError, match=r'\(frames \w+ -> \w+\)'):
        run(data, frames.assign(label=labels))

    class Inverted:
        folder, masks, frames = store.folder, None, store.frames
        images = 255 - np.asarray(store.images)

        def __len__(self):
            return len(self.images)

    with pytest.raises(ValueError, match=r'\(frames \w+ -> \w+\)'):
        run(
            lambda a, b: frame_dls(Inverted(), a, b, bs=4, batch_tfms=[GareAugment()]),
            frames.drop(columns='store'),
        )


def test_the_same_code_in_another_process_makes_the_same_claim(made, finished):
    code = f'''
        frames, folds, data, build = setup(folder)
        torch.manual_seed(5)
        path = {str(finished[0])!r}
        oof = cv(build, folds, data, epochs=1, path=path)
        print(oof.p_covid.sum())
    '''
    done = run(made, code, PYTHONHASHSEED='7')
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.strip().splitlines()[-1]) == pytest.approx(float(finished[1].p_covid.sum()))


def test_other_weights_at_the_start_are_another_run_and_drawn_ones_are_not(made, tmp_path):
    frames, folds, data, _ = setup(made)
    start = seg_to_cls(unet(4, width=2)).state_dict()

    def run(weights):
        def build(dls):
            learn = made_with(dls)
            learn.model.load_state_dict({k: v for k, v in weights.items() if 'bottleneck' in k}, strict=False)
            return learn

        return cv(build, folds, data, epochs=1, path=tmp_path)

    first = run(start)
    pd.testing.assert_frame_equal(run(start), first, check_exact=True)
    with pytest.raises(ValueError, match=r'\(loaded \w+ -> \w+\)'):
        run({k: v + 1 for k, v in start.items()})


def test_two_processes_on_one_folder_and_a_lock_that_ends_with_its_process(made, tmp_path):
    code = f'''
        frames, folds, data, build = setup(folder)
        class Slow(Callback):
            def before_batch(self):
                print('training', flush=True)
                import time; time.sleep(60)
        def slow(dls): return build(dls)
        import lus_fastai.train.cross_validation as T
        T.AutoPrecision = lambda precision: Slow()
        path = {str(tmp_path / 'run')!r}
        cv(build, folds, data, epochs=1, path=path)
    '''
    first = subprocess.Popen(
        [
            sys.executable,
            '-c',
            SETUP + 'from pathlib import Path\nfolder = Path(sys.argv[1])\n' + textwrap.dedent(code),
            str(made),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == 'training\n'
        frames, folds, data, build = setup(made)

        def here():
            return cv(build, folds, data, epochs=1, path=tmp_path / 'run')

        with pytest.raises(BlockingIOError, match='another process works in .*run: wait until it is done'):
            here()
        assert not list((tmp_path / 'run').rglob('checkpoint.pt'))
    finally:
        first.kill()
        first.wait()
    whole = cv(build, folds, data, epochs=1, path=tmp_path / 'whole')
    pd.testing.assert_frame_equal(here(), whole, check_exact=True)


def test_a_checkpoint_of_another_epoch_is_never_skipped_in_silence(made, tmp_path, monkeypatch):
    frames, folds, data, build = setup(made)

    def learner():
        return build(data(folds.train(0), folds.test(0)))

    def fit(learn, epochs):
        with learn.no_bar(), learn.no_logging():
            fit_resumable(learn, epochs, 1e-3, tmp_path / 'c.pt')

    fit(learner(), 3)
    with pytest.raises(ValueError, match='has 3 epochs behind it, this fit goes on after 2'):
        fit(learner(), 2)
    monkeypatch.setattr(
        Checkpoint, 'epochs_done', lambda self: 2
    )  # as if another process had gone on since it was asked
    with pytest.raises(ValueError, match='has 3 epochs behind it, this fit goes on after 2'):
        fit(learner(), 4)
    (tmp_path / 'c.pt').unlink()
    with pytest.raises(ValueError, match='has 0 epochs behind it, this fit goes on after 2'):
        fit(learner(), 4)


def test_predictions_after_a_fit_leave_the_weights_alone(made, tmp_path):
    frames, folds, data, build = setup(made)
    learn = build(data(folds.train(0), folds.test(0)))
    learn.add_cb(Checkpoint(tmp_path / 'c.pt'))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        with torch.no_grad():
            list(learn.model.parameters())[-2].fill_(7)
        learn.get_preds()
    assert any((p == 7).all() for p in learn.model.parameters())


def test_a_history_with_a_gap_is_not_read(made, finished, tmp_path):
    frames, folds, data, build = setup(made)
    shutil.copytree(finished[0], tmp_path / 'run')
    gap = r'fold1 has a history of the epochs \[1\], not of all 1'
    for text, said in (
        ('fold,epoch\n', 'fold1.history.csv is damaged'),
        ('epoch,score,seconds\n1,0.5,2\n', gap),
    ):
        (tmp_path / 'run/fold1/history.csv').write_text(text)
        for read in (
            lambda: cv(build, folds, data, epochs=1, path=tmp_path / 'run'),
            lambda: last_epoch(folds, tmp_path / 'run'),
        ):
            with pytest.raises(ValueError, match=said):
                read()
    with pytest.raises(ValueError, match='other frames or folds'):
        last_epoch(Folds(folds.table, (folds.fold + 1) % 3), finished[0])


@pytest.mark.parametrize('part', ['training', 'validation', 'logits'])
def test_an_epoch_that_is_no_number_names_fold_and_epoch_and_leaves_the_one_before(made, tmp_path, part):
    frames, folds, data, build = setup(made)

    class Blow(Callback):
        order = 1

        def after_pred(self):
            if self.epoch == 2 and self.training and part == 'training':
                self.learn.pred = self.pred * float('nan')
            if self.epoch == 2 and not self.training and part == 'logits':
                self.learn.pred = self.pred * float('nan')

        def after_loss(self):
            if self.epoch == 2 and not self.training and part == 'validation':
                self.learn.loss = self.loss * float('inf')

    def broken(dls):
        return [learn := build(dls), learn.add_cb(Blow())][0]

    message = (
        r'fold0, epoch 2: the network gives NaN'
        if part == 'logits'
        else f'fold0: the {part} loss of epoch 2 is (nan|inf)'
    )
    for _again in range(2):
        with pytest.raises(ValueError, match=message):
            cv(broken, folds, data, epochs=4, path=tmp_path, select='best')
        assert (
            Checkpoint(tmp_path / 'fold0/checkpoint.pt').epochs_done() == 2
            and not (tmp_path / 'fold0/predictions.pt').exists()
        )
    assert all(v.isfinite().all() for v in load_weights(tmp_path / 'fold0/model.safetensors').values())


# schedules


@pytest.mark.parametrize('warm', [0, 2, 10])
def test_the_cosine_is_torchs_own_stepped_after_each_epoch_from_warm_on(made, warm):
    frames, folds, data, build = setup(made)
    rates, epochs = [], 6

    class Rates(EpochEnd):
        def end_epoch(self):
            rates.append(self.opt.hypers[0]['lr'])

    learn = build(data(frames[:2], frames[2:4]))
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 0.1, cbs=[CosineLR(warm), Rates()])
        assert rates[0] == 0.1
        learn.fit(1, 0.2, cbs=[CosineLR(warm), Rates()])  # a second fit starts from its own rate
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    schedule, expected = torch.optim.lr_scheduler.CosineAnnealingLR(opt, max(1, epochs - warm)), []
    for epoch in range(epochs):
        expected.append(opt.param_groups[0]['lr'])
        opt.step()
        if epoch >= warm:
            schedule.step()
    assert rates == pytest.approx(expected + [0.2])


def test_the_cosine_bends_each_groups_own_rate_and_a_resumed_fit_is_on_the_right_one(made, tmp_path):
    frames, folds, data, _ = setup(made)

    def fit(path, stop=None):
        class Stop(Callback):
            def before_epoch(self):
                if self.epoch == stop:
                    raise KeyboardInterrupt

        seed_all(0)
        rates, net = [], seg_to_cls(unet(4, width=2))

        class Rates(EpochEnd):
            def end_epoch(self):
                rates.append([h['lr'] for h in self.opt.hypers])

        learn = Learner(
            data(folds.train(0), folds.test(0)),
            net,
            loss_func=CrossEntropyLossFlat(),
            opt_func=partial(OptimWrapper, opt=torch.optim.Adam),
            splitter=stages,
        )
        with learn.no_bar(), learn.no_logging():
            try:
                fit_resumable(
                    learn,
                    4,
                    [g['lr'] for g in discriminative_lrs(net, 0.1, 0.5)],
                    path,
                    cbs=[CosineLR(1), Rates(), Stop()],
                )
            except KeyboardInterrupt:
                pass
        return rates, learn.model.state_dict()

    whole, weights = fit(tmp_path / 'whole.pt')
    first, _ = fit(tmp_path / 'parts.pt', stop=2)
    second, resumed = fit(tmp_path / 'parts.pt')
    assert len(first) == len(second) == 2 and first + second == whole
    assert np.allclose(np.array(whole) / np.array(whole[0]), np.array([1, 1, 0.75, 0.25])[:, None])
    assert whole[0][-1] == 0.1 and whole[0][-2] == 0.05
    assert all(torch.equal(weights[k], resumed[k]) for k in weights)


def test_one_cycle_resumed_in_the_middle_of_an_epoch_equals_an_unbroken_fit_and_rests_in_lr_find(
    made, tmp_path
):
    frames, folds, data, build = setup(made)

    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 2 and self.iter == 1:
                raise KeyboardInterrupt

    def fit(path, *cbs):
        seed_all(0)
        learn = build(data(folds.train(0), folds.test(0)))
        with learn.no_bar(), learn.no_logging():
            fit_resumable(learn, 4, 0.01, path, cbs=[OneCycleLR(), *cbs])
        return learn.model.state_dict()

    whole = fit(tmp_path / 'whole.pt')
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / 'parts.pt', Stop())
    resumed = fit(tmp_path / 'parts.pt')
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    learn = build(data(folds.train(0), folds.test(0)))
    learn.path = tmp_path  # lr_find writes there
    learn.add_cb(OneCycleLR())
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(1e-6, 1e-2, num_it=5, show_plot=False)
    assert np.all(np.diff(learn.recorder.lrs) > 0)


# fine-tuning

TUNE = TrainingSettings(1, lr=0.01, schedule='cosine')


def halves(store):
    return patient_folds(store.frames, 2)


@pytest.fixture(scope='module')
def backbone():
    seed_all(0)
    return create_backbone('resnet18')


@pytest.fixture(scope='module')
def tuned(phantom_store, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tuned')
    return folder, fine_tune(backbone, phantom_store, TUNE, folds=halves(phantom_store), path=folder, bs=8)


def test_fine_tune_predicts_every_frame_by_a_network_that_has_not_seen_the_patient(phantom_store, tuned):
    folder, oof = tuned
    assert oof.index.equals(phantom_store.frames.index) and np.allclose(
        oof[[f'p_{c}' for c in CLASSES]].sum(axis=1), 1, atol=1e-5
    )
    assert not set(oof[oof.fold == 0].patient) & set(oof[oof.fold == 1].patient)
    assert fold_history(folder / 'folds').lr.tolist() == [0.01, 0.01]


def test_fine_tune_moves_what_trains_and_nothing_else(backbone, tuned):
    before, after = backbone.state_dict(), load_weights(tuned[0] / 'folds/fold1/model.safetensors')
    moved = {
        k.removeprefix('backbone.')
        for k, v in after.items()
        if k.startswith('backbone.') and not torch.equal(v, before[k.removeprefix('backbone.')])
    }
    assert {k for k in moved if 'running' not in k and 'num_batches' not in k} == {
        f'layer4.1.{k}'
        for k in ('conv1.weight', 'bn1.weight', 'bn1.bias', 'conv2.weight', 'bn2.weight', 'bn2.bias')
    }
    assert 'bn1.running_mean' in moved  # frozen, and yet in training mode
    assert all(p.requires_grad and p.grad is None for p in backbone.parameters()) and backbone.training


def test_backbone_classifier_reads_the_weights_and_gives_the_same_logits(phantom_store, backbone, tuned):
    learn = fine_tune_learner(
        frame_dls(phantom_store, phantom_store.frames[:8], phantom_store.frames[8:16], bs=4), backbone
    )
    net = BackboneClassifier(create_backbone('resnet18'))
    for model in (net, learn.model):
        copy_weights(tuned[0] / 'folds/fold0/model.safetensors', model, strict=True)
    x = torch.rand(2, 1, 64, 64)
    assert torch.equal(net.eval()(x), learn.model.eval()(x))
    assert sum(p.numel() for p in learn.model.parameters() if p.requires_grad) == 4_722_179


def test_a_killed_fine_tune_resumes_to_the_same_result(phantom_store, backbone, tuned, tmp_path):
    torch.save(backbone.state_dict(), tmp_path / 'backbone.pt')
    code = f'''
        import lus_fastai.train.fine_tuning as training
        made = training.fine_tune_learner
        store = FrameStore({str(phantom_store.folder)!r})
        folds = patient_folds(store.frames, 2)
        def killed(*args, **kwargs): return kill_in(made(*args, **kwargs), folds.test(1), 2)
        training.fine_tune_learner = killed
        backbone = create_backbone('resnet18', weights={str(tmp_path / 'backbone.pt')!r})
        path = {str(tmp_path / 'run')!r}
        tune = TrainingSettings(1, lr=0.01, schedule='cosine')
        fine_tune(backbone, store, tune, folds=folds, path=path, bs=8)
    '''
    done = run(tmp_path, code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / 'run/folds/fold0/predictions.pt').exists() and not (
        tmp_path / 'run/folds/fold1/predictions.pt'
    ).exists()
    again = fine_tune(backbone, phantom_store, TUNE, folds=halves(phantom_store), path=tmp_path / 'run', bs=8)
    pd.testing.assert_frame_equal(
        again, tuned[1], check_exact=True
    )  # equal to the unbroken run in another folder, so deterministic too


class Tiny(torch.nn.Module):
    "A backbone of three channels that notes what it is given."

    n_features = 2

    def __init__(self, seen):
        super().__init__()
        self.conv, self.seen = torch.nn.Conv2d(3, 2, 3), seen

    def forward(self, x):
        self.seen.append((x.shape[1:], float(x.min()), float(x.max())))
        return self.conv(x).mean((2, 3))

    def __deepcopy__(self, memo):
        new = Tiny(self.seen)
        new.load_state_dict(self.state_dict())
        return new


def test_fine_tune_gives_the_backbone_its_channels_scaled_and_needs_no_folder(phantom_table, tmp_path):
    seen = []
    store = FrameStore.build(phantom_table, tmp_path / 'store', size=(32, 48), max_frames=2)
    oof = fine_tune(Tiny(seen), store, TUNE, last='head', folds=halves(store), factor=0.5)
    assert len(oof) == 2 * len(phantom_table) and oof.fold.tolist() == halves(store).fold.tolist()
    shapes, low, high = zip(*seen)
    assert set(shapes) == {(3, 32, 48)} and min(low) == -2 and 0 < max(high) <= 2  # frames of 0..1, scaled


def test_another_backbone_or_policy_is_not_mixed_into_a_folder(phantom_store, backbone, tuned):
    folder, oof = tuned
    with pytest.raises(ValueError, match='policy last 3 -> head'):
        fine_tune(backbone, phantom_store, TUNE, last='head', folds=halves(phantom_store), path=folder, bs=8)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        other.layer1[0].conv1.weight[0] += 1
    with pytest.raises(ValueError, match='backbone .* -> '):
        fine_tune(other, phantom_store, TUNE, folds=halves(phantom_store), path=folder, bs=8)
    pd.testing.assert_frame_equal(
        fine_tune(backbone, phantom_store, TUNE, folds=halves(phantom_store), path=folder, bs=8),
        oof,
        check_exact=True,
    )  # finished: only read


def test_bad_input_to_fine_tune_is_named_before_anything_is_trained(phantom_store, backbone, tmp_path):
    frames = phantom_store.frames
    elsewhere = Folds(frames.set_axis(range(1000, 1000 + len(frames))), np.arange(len(frames)) % 2)
    for change, message in (
        (dict(backbone=torch.nn.Flatten()), 'no n_features'),
        (dict(last=0), 'n is 1 to 21'),
        (dict(last=22), 'has 21 weight layers'),
        (dict(last='some'), 'policy is one of'),
        (dict(factor=2.0), 'factor must be'),
        (dict(store=frames), 'FrameStore.build, not a DataFrame'),
        (dict(folds=elsewhere), 'not of the store'),
    ):
        with pytest.raises(ValueError, match=message):
            fine_tune(**{**dict(backbone=backbone, store=phantom_store, path=tmp_path / 'x'), **change})
    assert not (tmp_path / 'x').exists()


@pytest.mark.gpu
def test_the_same_on_a_gpu(made, tmp_path):
    frames, folds, _, build = setup(made)
    store = FrameStore(made / 'store')
    cpu, gpu = (
        cv(
            build,
            folds,
            lambda t, v, d=d: frame_dls(store, t, v, bs=4, device=d),
            epochs=2,
            path=tmp_path / d,
            precision='fp32',
        )
        for d in ('cpu', 'cuda')
    )
    np.testing.assert_allclose(cpu.p_covid, gpu.p_covid, atol=1e-3)
    auto = cv(
        build,
        folds,
        lambda t, v: frame_dls(store, t, v, bs=4, device='cuda'),
        epochs=2,
        path=tmp_path / 'auto',
    )
    np.testing.assert_allclose(cpu.p_covid, auto.p_covid, atol=3e-2)
