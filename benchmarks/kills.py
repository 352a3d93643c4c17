"""Kill a store build, a cross-validation, a pretraining and a report at random moments, and resume each.

What is resumed must have the bytes of what was never broken; only durations may differ.

python benchmarks/kills.py [KIND ...] [--kills 20] [--seed 0]
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import CrossEntropyLossFlat, Learner, OptimWrapper

from lus_fastai.core import read_table
from lus_fastai.data.augment import GareAugment
from lus_fastai.data.folds import patient_folds
from lus_fastai.data.loaders import frame_dls
from lus_fastai.data.pairs import pair_dls
from lus_fastai.data.store import FrameStore
from lus_fastai.models.classifiers import seg_to_cls
from lus_fastai.models.unet import unet
from lus_fastai.papers import gare
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.train.callbacks import ClassProbs, TrainingSettings
from lus_fastai.train.contrastive import USCL, pretrain
from lus_fastai.train.cross_validation import cross_validate

# Processes start at once, everything imported, from one that has trained nothing: torch cannot fork later.
_SERVER = multiprocessing.get_context('forkserver')
_SERVER.set_forkserver_preload(['__main__', 'benchmarks.kills'])


# ---- what is killed: functions (material, an empty folder or one that a killed process left)


def make_material(
    folder,  # an empty one
):
    "Clips of six phantom patients, and their frames."
    table = phantom_dataset(folder / 'phantom', patients=6, clips=2, n=8, size=(96, 96))
    FrameStore.build(table, folder / 'store', size=(32, 32), max_frames=4, workers=0)


def _store(workers, material, folder):
    table = read_table(material / 'phantom' / 'clips.csv')
    FrameStore.build(table, folder, size=(48, 48), max_frames=8, workers=workers)


def _folds(material, folder):
    store = FrameStore(material / 'store')

    def data(train, valid):
        return frame_dls(store, train, valid, bs=4, batch_tfms=[GareAugment()])

    def build(dls):
        adam = partial(OptimWrapper, opt=torch.optim.Adam)
        return Learner(dls, seg_to_cls(unet(7, width=2)), loss_func=CrossEntropyLossFlat(), opt_func=adam)

    folds, settings = patient_folds(store.frames, 2), TrainingSettings(3)
    cross_validate(build, folds, settings, data=data, collect=ClassProbs(), path=folder)


class Tiny(torch.nn.Sequential):
    "A backbone of 8 features."

    n_features = 8


def _pretraining(material, folder):
    store = FrameStore(material / 'store')
    torch.manual_seed(0)
    net = [torch.nn.Conv2d(1, 4, 5, 4), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3, 2)]
    backbone = Tiny(*net, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    pretrain(USCL(), pair_dls(store, store.frames, bs=4), backbone, 4, folder, warm=1, dim=8)


def _report(material, folder):
    few = {f'{part}_{k}': n for part in ('seg', 'cls') for k, n in (('patients', 6), ('frames', 3))}
    few |= dict(seg_epochs=1, patient_epochs=1, cls_epochs=1, seeds=(0,), parts=('core',))
    tiny = gare.GareSettings(size=(48, 48), width=2, **few)
    gare.reproduce(quick=True, out=folder / 'out', cache=folder / 'cache', settings=tiny)


KINDS = {
    'store': partial(_store, 0),
    'store-workers': partial(_store, 2),
    'folds': _folds,
    'pretraining': _pretraining,
    'report': _report,
}


# ---- when


class Moment(NamedTuple):
    "When to kill: at a share of the processor time, or before or after a change to a folder."

    share: float = float('inf')  # of the time that the whole work takes
    change: int = -1  # number of a rename, removal or new folder
    after: bool = False  # after it, else before


NEVER = Moment()


def draw_moments(
    changes: int,  # that the work makes
    n: int = 20,  # how many
    seed: int = 0,  # another one, other moments
) -> list:  # of Moment, by time and by change in turn
    "Random moments, the same for the same seed."
    rng = np.random.default_rng(seed)
    by_time = [Moment(share=x) for x in rng.random(n)]
    by_change = [Moment(change=int(k), after=bool(a)) for k, a in rng.integers([changes, 2], size=(n, 2))]
    return [(by_change if k % 2 else by_time)[k] for k in range(n)]


def _watch(moment, count):
    "Count the changes that this process makes to folders, and kill it at the one that is meant."
    me = os.getpid()

    def watched(call):
        def change(*args, **kwargs):
            with count.get_lock():
                number, count.value = count.value, count.value + (os.getpid() == me)
            meant = os.getpid() == me and number == moment.change
            if meant and not moment.after:
                os.kill(me, signal.SIGKILL)
            done = call(*args, **kwargs)
            if meant:
                os.kill(me, signal.SIGKILL)
            return done

        return change

    for name in ('replace', 'unlink', 'mkdir', 'rmdir'):
        setattr(os, name, watched(getattr(os, name)))


def _in_process(work, folder, moment, count):
    "What the process does."
    warnings.simplefilter('ignore')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _watch(moment, count)
    work(folder)


def run(
    work,  # function (folder)
    folder,  # where
    moment: Moment = NEVER,  # when to kill it
    whole: float = 0.0,  # processor seconds of the whole work
) -> tuple:  # exit code, processor seconds, changes to folders
    "Do a work in a process of its own, and kill it at a moment."
    count, seconds = _SERVER.Value('i', 0), 0.0
    process = _SERVER.Process(target=_in_process, args=(work, folder, moment, count))
    process.start()
    while process.is_alive():
        seconds = max(seconds, _seconds_of(process.pid))
        if seconds >= moment.share * whole > 0:
            process.kill()
        process.join(0.002)
    return process.exitcode, seconds, count.value


def _seconds_of(pid):
    "Processor seconds of another process; 0 where it is gone."
    try:
        return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) gives
    except OSError:
        return 0.0


# ---- whether it is the same


_DURATIONS = r'"hours": [0-9.e-]+|(?:training hours</t.>\s*<td[^>]*|time in training</dt>\s*<dd)>[^<]*'


def _timeless(path):
    "The bytes of a file without how long something took."
    if path.name == 'history.csv':
        return pd.read_csv(path, dtype=str).drop(columns='seconds').to_csv().encode()
    if path.name == 'finished.json':
        return b'finished' if set(json.loads(path.read_text())) == {'seconds'} else path.read_bytes()
    if path.suffix in ('.json', '.html'):
        return re.sub(_DURATIONS, '', path.read_text()).encode()
    return path.read_bytes()


def contents(
    folder,  # what a work left
) -> dict:  # relative name -> bytes
    "All files but locks; of stores of clips that were made in the folder, only the pixels: clips have times."
    out = {}
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name == '.lock' or '/stores/' in name and path.suffix in ('.csv', '.json'):
            continue
        if '/stores/' in name:  # named after the times of the clips
            name = re.sub('-[0-9a-f]{12}', '', name)
        out[name] = _timeless(path)
    return out


def differences(
    a: dict,  # from contents
    b: dict,  # from contents
) -> list:  # of names
    "The files that are not in both, or not the same."
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


# ---- both


def kill_and_resume(
    work,  # function (folder)
    folder,  # an empty one, used again and again
    draw=draw_moments,  # function (number of changes that the work makes) -> list of Moment
) -> list:  # of (Moment, names of files that differ), one for each kill
    "Kill a work, resume it, and compare; for each moment from the start."
    code, seconds, changes = run(work, folder)
    assert code == 0, 'the work fails without a kill'
    whole, out = contents(folder), []
    print(f'  unbroken: {seconds:.1f} s of processor time, {changes} changes, {len(whole)} files', flush=True)
    for moment in draw(changes):
        while True:
            shutil.rmtree(folder)
            folder.mkdir()
            if (code := run(work, folder, moment, seconds)[0]) == -signal.SIGKILL:
                break
            assert code == 0, f'the work fails before its kill at {moment}'
            moment = moment._replace(share=moment.share * 0.9, change=moment.change - 1)  # came too late
        code, *_ = run(work, folder)
        out.append((moment, differences(whole, contents(folder)) if code == 0 else [f'exit code {code}']))
    return out


def main():
    "All kinds, or those that are named."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('kinds', nargs='*', metavar='KIND', help=', '.join(KINDS))
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.kinds) - {*KINDS}:
        parser.error(f"no kind {sorted(unknown)}; there is: {', '.join(KINDS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        material, wrong = Path(place) / 'material', 0
        run(make_material, material)
        for name in args.kinds or KINDS:
            folder = Path(place) / name
            folder.mkdir()
            draw = partial(draw_moments, n=args.kills, seed=args.seed)
            found = kill_and_resume(partial(KINDS[name], material), folder, draw)
            for moment, files in found:
                if files:
                    print(f'  {name}: {moment}: {", ".join(files)}', flush=True)
            same = sum(not files for _, files in found)
            wrong += len(found) - same
            print(f'{name}: {len(found)} kills, resumed identical {same} of {len(found)}', flush=True)
    return int(wrong > 0)


if __name__ == '__main__':
    sys.exit(main())
