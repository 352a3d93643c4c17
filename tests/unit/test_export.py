"ONNX files: the whole network against PyTorch, and what is refused."

import json
import sys

import numpy as np
import onnx
import pytest
import torch

from lus_fastai import export
from lus_fastai.core import CLASSES
from lus_fastai.data.fetching import FetchError
from lus_fastai.models.stages import StageClassifier, StageFeatures, class_maps
from lus_fastai.predict import ClipModel, ClipPrep, ModelFileError


def stage_model(stages=(0,), size=64, nets=1):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = [
            StageClassifier(StageFeatures('tf_efficientnet_lite0', stages, weights=None), 3)
            for _ in range(nets)
        ]
    return ClipModel(made, CLASSES, ClipPrep(size=size))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return export.export_onnx(stage_model(nets=2), tmp_path_factory.mktemp('onnx') / 'small.onnx')


@pytest.mark.slow
def test_all_stages_at_full_size(tmp_path):
    model = stage_model((0, 1, 2, 3), 224)
    there = export.load_onnx(export.export_onnx(model, tmp_path / 'whole.onnx'))
    net = model.nets[0]
    with torch.no_grad():
        for n in (1, 2, 5):
            x = torch.rand(n, 1, 224, 224)
            features = (net.features(x) + net.features(x.flip(-1))) / 2
            seen = there.nets[0].run(x)
            for name, here in dict(logits=net(x), maps=class_maps(net, x), features=features).items():
                np.testing.assert_allclose(seen[name], here.numpy(), atol=1e-4)


def test_an_ensemble_gives_means(small):
    model, there = stage_model(nets=2), export.load_onnx(small)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    assert np.allclose(there.frame_logits(images), model.frame_logits(images), atol=1e-4)
    assert np.allclose(there.heat(images, 'covid'), model.heat(images, 'covid'), atol=1e-4)
    with pytest.raises(ValueError, match='outputs are'):
        there.heat(images, 'gallstone')


def test_the_file_is_the_same_each_time(small, tmp_path):
    again = export.export_onnx(stage_model(nets=2), tmp_path / 'again.onnx')
    assert again.read_bytes() == small.read_bytes()


def test_a_file_of_another_kind_or_version_is_refused(small, tmp_path):
    graph = onnx.load(small)
    note = next(p for p in graph.metadata_props if p.key == 'lus_fastai')
    note.value = json.dumps(dict(json.loads(note.value), format=99))
    onnx.save(graph, tmp_path / 'newer.onnx')
    with pytest.raises(ModelFileError, match='newer.onnx has format 99'):
        export.load_onnx(tmp_path / 'newer.onnx')
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / 'bare.onnx')
    with pytest.raises(ModelFileError, match='a network, but no model'):
        export.load_onnx(tmp_path / 'bare.onnx')


def test_a_missing_extra_is_named(small, tmp_path, monkeypatch):
    for module, call in (
        ('onnxscript', lambda: export.export_onnx(stage_model(), tmp_path / 'a.onnx')),
        ('onnxruntime', lambda: export.load_onnx(small)),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf'{module}.*pip install lus_fastai\[onnx\]'):
            call()
    assert not (tmp_path / 'a.onnx').exists()


def test_another_package_than_the_known_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('LUS_HOME', str(tmp_path))
    monkeypatch.setattr(export, '_npm_pack', lambda name, folder: b'something else')
    with pytest.raises(FetchError, match='another onnxruntime-web@'):
        export.web_runtime()
    assert not list(tmp_path.rglob('*.wasm'))


def test_a_wrong_folder_of_the_runtime(tmp_path):
    with pytest.raises(FileNotFoundError, match='dist'):
        export.web_page(stage_model(), tmp_path / 'page.html', tmp_path)
    assert not (tmp_path / 'page.html').exists()
