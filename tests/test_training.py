"Training under faults: killed processes, full disks, interrupts, and learners that travel between processes."
import json, os, signal, subprocess, sys, textwrap
import numpy as np, pandas as pd, pytest, torch
from PIL import Image

SETUP = '''
import os, signal, sys
import numpy as np, pandas as pd, torch
from functools import partial
from fastai.vision.all import Learner, OptimWrapper, CrossEntropyLossFlat, Callback
from lus_fastai.core import *
from lus_fastai.clips import FrameStore
from lus_fastai.data import *
from lus_fastai.augment import GareAugment
from lus_fastai.models import *
from lus_fastai.folds import patient_folds
from lus_fastai.training import *
torch.set_num_threads(1)

def setup(folder):
    store = FrameStore(folder/'store')
    folds = patient_folds(store.frames, 3)
    def data(train, valid): return frame_dls(store, train, valid, bs=4, batch_tfms=[GareAugment()])
    def build(dls): return Learner(dls, seg_to_cls(unet(4, width=2)), loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.Adam))
    return store.frames, folds, data, build
'''
exec(SETUP)

def stills(folder, patients=9, size=(32, 32)):
    "A folder of small noise pictures, one class brighter than the next, and its clip table."
    rng, rows = np.random.default_rng(0), []
    for p in range(patients):
        for i in range(3):
            path = folder/f'p{p}_{i}.png'
            Image.fromarray((rng.random(size) * (80 + 70 * (p % 3))).astype(np.uint8)).save(path)
            rows.append(dict(path=str(path), kind='image', label=CLASSES[p % 3], patient=f'p{p}', source='made', probe='convex'))
    return pd.DataFrame(rows)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')
    (folder/'pictures').mkdir()
    FrameStore.build(stills(folder/'pictures'), folder/'store', size=(32, 32), workers=0)
    return folder

def run(folder, code, **env):
    return subprocess.run([sys.executable, '-c', SETUP + 'from pathlib import Path\nfolder = Path(sys.argv[1])\n' + textwrap.dedent(code), str(folder)],
                          capture_output=True, text=True, env={**os.environ, **env}, timeout=300)

def test_a_kill_in_the_second_fold_then_resumed_equals_an_unbroken_run(made, tmp_path):
    frames, folds, data, build = setup(made)
    whole = cross_validate(build, frames, folds, data=data, collect=ClassProbs(), epochs=3, path=tmp_path/'whole', select='best', patience=1)
    code = f'''
        frames, folds, data, build = setup(folder)
        fits = []
        class Kill(Callback):
            def before_batch(self):
                if self.training and self.epoch == 1 and self.iter == 2: os.kill(os.getpid(), signal.SIGKILL)
        def killed(dls):
            fits.append(1)
            learn = build(dls)
            if len(fits) == 2: learn.add_cb(Kill())
            return learn
        cross_validate(killed, frames, folds, data=data, collect=ClassProbs(), epochs=3, path={str(tmp_path/'broken')!r}, select='best', patience=1)
    '''
    assert run(made, code).returncode == -signal.SIGKILL
    assert (tmp_path/'broken/fold0/predictions.pt').exists() and not (tmp_path/'broken/fold1/predictions.pt').exists()
    assert Checkpoint(tmp_path/'broken/fold1/checkpoint.pt').epochs_done() == 1
    resumed = cross_validate(build, frames, folds, data=data, collect=ClassProbs(), epochs=3, path=tmp_path/'broken', select='best', patience=1)
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    pd.testing.assert_frame_equal(*(fold_history(tmp_path/name).drop(columns='seconds') for name in ('whole', 'broken')), check_exact=True)

def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_last_one_whole(made, tmp_path):
    "The limit on a file's size stands for the full disk: the kernel refuses the write in the same place."
    code = f'''
        import resource
        frames, folds, data, build = setup(folder)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path({str(tmp_path/'c.pt')!r})
        class Fill(Callback):
            def before_epoch(self):
                if self.epoch == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, resource.RLIM_INFINITY))
        learn = build(data(frames[folds != 0], frames[folds == 0]))
        with learn.no_bar(), learn.no_logging(): fit_resumable(learn, 4, 1e-3, path, cbs=[Fill()])
    '''
    done = run(made, code)
    assert done.returncode != 0 and 'checkpoint of epoch 3 could not be written' in done.stderr and 'run again to resume' in done.stderr
    assert Checkpoint(tmp_path/'c.pt').epochs_done() == 2
    assert [p.name for p in tmp_path.iterdir()] == ['c.pt']

def test_a_checkpoint_that_is_cut_short_is_named(made, tmp_path):
    frames, folds, data, build = setup(made)
    (tmp_path/'c.pt').write_bytes(b'PK\x03\x04 cut')
    learn = build(data(frames[folds != 0], frames[folds == 0]))
    with pytest.raises(ValueError, match='c.pt is no checkpoint'): fit_resumable(learn, 1, 1e-3, tmp_path/'c.pt')

def test_fastais_own_optimiser_resumes_too(made, tmp_path):
    frames, folds, data, _ = setup(made)
    def fit(path, epochs):
        seed_all(0)
        learn = Learner(data(frames[folds != 0], frames[folds == 0]), seg_to_cls(unet(4, width=2)), loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): fit_resumable(learn, epochs, 1e-3, path)
        return learn.model.state_dict()
    whole = fit(tmp_path/'whole.pt', 3)
    fit(tmp_path/'parts.pt', 1)
    parts = fit(tmp_path/'parts.pt', 3)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)

def test_an_interrupt_and_a_second_fit_leave_no_hooks(made):
    frames, folds, data, build = setup(made)
    class Interrupt(Callback):
        def after_pred(self): raise KeyboardInterrupt
    learn = build(data(frames[folds != 0], frames[folds == 0]))
    learn.add_cb(AutoPrecision())
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Interrupt())
        learn.fit(1)
    assert len(learn.model._forward_hooks) == len(learn.model._forward_pre_hooks) == 0
    assert not torch.is_autocast_enabled('cpu')

def test_callbacks_survive_lr_find_get_preds_validate_and_summary(made, tmp_path):
    frames, folds, data, build = setup(made)
    learn = build(data(frames[folds != 0], frames[folds == 0]))
    learn.path = tmp_path                          # lr_find writes there
    plateau = PlateauLR(lambda l: 1., patience=0)
    checkpoint = Checkpoint(tmp_path/'c.pt', [plateau])
    learn.add_cbs([AutoPrecision(), EpochSeed(1), plateau, checkpoint])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
        assert not (tmp_path/'c.pt').exists() and plateau.wait == 0
        learn.summary()
        learn.validate()
        preds, targs = learn.get_preds()
        assert preds.shape == (int((folds == 0).sum()), 3) and not (tmp_path/'c.pt').exists()
        learn.fit(1)
    assert checkpoint.epochs_done() == 1

def test_an_exported_learner_predicts_the_same_in_a_fresh_process(made, tmp_path):
    frames, folds, data, build = setup(made)
    learn = build(data(frames[folds != 0], frames[folds == 0]))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=AutoPrecision('fp32'))
        here = learn.get_preds(dl=learn.dls.test_dl(frames[folds == 0].drop(columns='label')))[0]
    learn.export(tmp_path/'learner.pkl')
    code = f'''
        from fastai.vision.all import load_learner
        learn = load_learner({str(tmp_path/'learner.pkl')!r})
        frames, folds, *_ = setup(folder)
        with learn.no_bar(): preds = learn.get_preds(dl=learn.dls.test_dl(frames[folds == 0].drop(columns='label')))[0]
        print(preds.tolist())
    '''
    done = run(made, code)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout.strip().splitlines()[-1]), here.tolist(), atol=1e-6)

def test_same_seed_same_result_and_another_seed_another(made, tmp_path):
    frames, folds, data, build = setup(made)
    one, two, other = (cross_validate(build, frames, folds, data=data, collect=ClassProbs(), epochs=1, path=tmp_path/name, seed=s) for name, s in (('a', 3), ('b', 3), ('c', 4)))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not np.allclose(one.p_covid, other.p_covid)

def test_the_inner_choice_never_sees_the_held_out_patients(made, tmp_path):
    frames, folds, data, build = setup(made)
    seen = []
    def watched(train, valid):
        seen.append((set(train.patient), set(valid.patient)))
        return data(train, valid)
    cross_validate(build, frames, folds, data=watched, collect=ClassProbs(), epochs=1, path=tmp_path/'inner', select='inner')
    for k, (train, valid) in enumerate(seen):
        held_out = set(frames[folds == k].patient)
        assert train and valid and not train & valid and not (train | valid) & held_out

@pytest.mark.parametrize('change, message', [(dict(select='test'), "select is 'last'"), (dict(epochs=0), 'at least 1')])
def test_wrong_arguments_are_named(made, tmp_path, change, message):
    frames, folds, data, build = setup(made)
    with pytest.raises(ValueError, match=message): cross_validate(build, frames, folds, **{**dict(data=data, collect=ClassProbs(), epochs=1, path=tmp_path), **change})
    with pytest.raises(ValueError, match='at least two folds'): cross_validate(build, frames, folds * 0, data=data, collect=ClassProbs(), epochs=1, path=tmp_path)

@pytest.mark.gpu
def test_the_same_on_a_gpu(made, tmp_path):
    frames, folds, _, build = setup(made)
    store = FrameStore(made/'store')
    cpu, gpu = (cross_validate(build, frames, folds, data=lambda t, v: frame_dls(store, t, v, bs=4, device=d), collect=ClassProbs(), epochs=2, path=tmp_path/d, precision='fp32') for d in ('cpu', 'cuda'))
    np.testing.assert_allclose(cpu.p_covid, gpu.p_covid, atol=1e-3)
    auto = cross_validate(build, frames, folds, data=lambda t, v: frame_dls(store, t, v, bs=4, device='cuda'), collect=ClassProbs(), epochs=2, path=tmp_path/'auto')
    np.testing.assert_allclose(cpu.p_covid, auto.p_covid, atol=3e-2)
