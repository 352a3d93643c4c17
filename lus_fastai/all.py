"The public surface in one import: fastai's vision names, then every module of lus_fastai (ours win where a name is in both)."
import fastai.vision.all as _fastai
from fastai.vision.all import *
from lus_fastai.core import *
from lus_fastai.phantom import *
from lus_fastai.standins import *
from lus_fastai.sources import *
from lus_fastai.clips import *
from lus_fastai.folders import *
from lus_fastai.folds import *
from lus_fastai.preprocess import *
from lus_fastai.despeckling import *
from lus_fastai.data import *
from lus_fastai.augment import *
from lus_fastai.models import *
from lus_fastai.transfer import *
from lus_fastai.contrastive import *
from lus_fastai.semisup import *
from lus_fastai.detect import *
from lus_fastai.metrics import *
from lus_fastai.calibration import *
from lus_fastai.overlap import *
from lus_fastai.losses import *
from lus_fastai.training import *
from lus_fastai.rotation import *
from lus_fastai.explain import *
from lus_fastai.imagine import *
from lus_fastai.distrust import *
from lus_fastai.embed import *
from lus_fastai.report import *
from lus_fastai.widgets import *
from lus_fastai.cli import *
from lus_fastai.papers import gare
from lus_fastai.papers import cheng_lam
from lus_fastai.papers import arora
from lus_fastai.papers import uscl
from lus_fastai.papers import merand
from lus_fastai.papers import sim_to_real
from lus_fastai import core as _core
from lus_fastai import phantom as _phantom
from lus_fastai import standins as _standins
from lus_fastai import sources as _sources
from lus_fastai import clips as _clips
from lus_fastai import folders as _folders
from lus_fastai import folds as _folds
from lus_fastai import preprocess as _preprocess
from lus_fastai import despeckling as _despeckling
from lus_fastai import data as _data
from lus_fastai import augment as _augment
from lus_fastai import models as _models
from lus_fastai import transfer as _transfer
from lus_fastai import contrastive as _contrastive
from lus_fastai import semisup as _semisup
from lus_fastai import detect as _detect
from lus_fastai import metrics as _metrics
from lus_fastai import calibration as _calibration
from lus_fastai import overlap as _overlap
from lus_fastai import losses as _losses
from lus_fastai import training as _training
from lus_fastai import rotation as _rotation
from lus_fastai import explain as _explain
from lus_fastai import imagine as _imagine
from lus_fastai import distrust as _distrust
from lus_fastai import embed as _embed
from lus_fastai import report as _report
from lus_fastai import widgets as _widgets
from lus_fastai import cli as _cli

_modules = (_core, _phantom, _standins, _sources, _clips, _folders, _folds, _preprocess, _despeckling, _data, _augment, _models, _transfer, _contrastive,
            _semisup, _detect, _metrics, _calibration, _overlap, _losses, _training, _rotation, _explain, _imagine, _distrust, _embed, _report, _widgets, _cli)
_ours = [name for module in _modules for name in module.__all__] + ['gare', 'cheng_lam', 'arora', 'uscl', 'merand', 'sim_to_real']  # a paper is a module: gare.reproduce(), gare.PROTOCOLS
_shadowed = {'models'}  # fastai's name for torchvision.models; `lus_fastai.models` is our module, so a star import brings neither

__all__ = list(dict.fromkeys(_ours + [name for name in vars(_fastai) if not name.startswith('_') and name not in _shadowed]))
