"The public surface in one import: fastai's vision names, then every module of lus_fastai (ours win where a name is in both)."
from fastai.vision.all import *
from lus_fastai.core import *
from lus_fastai.video import *
from lus_fastai.plot import *
from lus_fastai.toys import *
from lus_fastai.runs import *
from lus_fastai.stats.bootstrap import *
from lus_fastai.stats.classification import *
from lus_fastai.stats.curves import *
from lus_fastai.stats.segmentation import *
from lus_fastai.stats.calibration import *
from lus_fastai.stats.conformal import *
from lus_fastai.stats.figures import *
from lus_fastai.synth.phantom import *
from lus_fastai.synth.shapes import *
from lus_fastai.synth.radiographs import *
from lus_fastai.data.store import *
from lus_fastai.data.folds import *
from lus_fastai.data.audit import *
from lus_fastai.data.fetching import *
from lus_fastai.data.readers import *
from lus_fastai.data.sources import *
from lus_fastai.data.mask_sets import *
from lus_fastai.data.folders import *
from lus_fastai.data.fan import *
from lus_fastai.data.dicom import *
from lus_fastai.synth.motion import *
from lus_fastai.data.realism import *
from lus_fastai.data.despeckling import *
from lus_fastai.data.loaders import *
from lus_fastai.data.augment import *
from lus_fastai.train.distributed import *
from lus_fastai.data.pairs import *
from lus_fastai.models.transfer import *
from lus_fastai.models.backbones import *
from lus_fastai.models.unet import *
from lus_fastai.models.segmenters import *
from lus_fastai.models.classifiers import *
from lus_fastai.models.stages import *
from lus_fastai.train.losses import *
from lus_fastai.train.callbacks import *
from lus_fastai.train.cross_validation import *
from lus_fastai.train.fold_models import *
from lus_fastai.train.fine_tuning import *
from lus_fastai.train.clip_heads import *
from lus_fastai.train.segmentation import *
from lus_fastai.train.contrastive import *
from lus_fastai.train.semi_supervised import *
from lus_fastai.train.detection import *
from lus_fastai.explain.attribution import *
from lus_fastai.explain.occlusion_cache import *
from lus_fastai.explain.occlusion import *
from lus_fastai.explain.feature_visualization import *
from lus_fastai.explain.sanity_checks import *
from lus_fastai.explain.embeddings import *
from lus_fastai.predict import *
from lus_fastai.export import *
from lus_fastai.report import *
from lus_fastai.clip_report import *
from lus_fastai.widgets import *
from lus_fastai.cli import *
from lus_fastai.papers import experiment, gare, cheng_lam, arora, uscl, merand, sim_to_real, pocus_model  # a paper is a module

_shadowed = {'models'}  # fastai's name for torchvision.models; `lus_fastai.models` is our package: a star import brings neither

__all__ = [name for name in globals() if not name.startswith('_') and name not in _shadowed]
