"Targets: clip tables, files of models and of weights, results, and what a training leaves."

import numpy as np
import pandas as pd
import torch
from harness import TARGETS, Target
from PIL import Image

from lus_fastai.core import TableError, read_table, save_state, shipped_folder, write_table
from lus_fastai.data.store import FrameStore
from lus_fastai.models.backbones import create_backbone
from lus_fastai.models.classifiers import BackboneClassifier
from lus_fastai.models.transfer import load_weights, save_weights
from lus_fastai.predict import ClipPrep, ModelFileError, load_model, save_model
from lus_fastai.runs import differences_table, read_results, results_table, trainings_table
from lus_fastai.train.callbacks import Checkpoint


def table_seeds(folder):
    "As a person types it, as the package writes it, and with text of other scripts."
    head = 'path,kind,label,patient,source,probe,age\n'
    typed = head + ''.join(f'a{i}.mp4,video,covid,p{i},"Rome, IT",convex,{i}\n' for i in range(5))
    rows = [
        dict(path=f'/x/{k}.png', kind='image', label=k, patient=k, source='s', probe='=1') for k in 'é漢𝄞'
    ]
    write_table(pd.DataFrame(rows).assign(mask=None, n=[1.5, np.nan, -2]), folder / 't.csv')
    written = (folder / 't.csv').read_bytes()
    return [('table.csv', typed.encode()), ('table.csv', written), ('table.csv', b'\xef\xbb\xbf' + written)]


def network():
    "A small classifier."
    torch.manual_seed(0)
    return BackboneClassifier(create_backbone('test_resnet', 1), 2)


def model_seeds(folder):
    "A model of one network."
    parts = dict(classes=('a', 'b'), prep=ClipPrep(size=32, fan=False))
    save_model(network(), folder / 'm.safetensors', **parts)
    return [('model.safetensors', (folder / 'm.safetensors').read_bytes())]


def weights_seeds(folder):
    "Safetensors and PyTorch's own format (its old one first reserves whatever memory a file asks for)."
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    save_weights(net, folder / 'w.safetensors')
    torch.save(net.state_dict(), folder / 'w.pth')
    return [(f.name, f.read_bytes()) for f in (folder / 'w.safetensors', folder / 'w.pth')]


def results_seeds(folder):
    "The two smallest results that ship."
    files = sorted(shipped_folder('results').glob('*.json'), key=lambda f: f.stat().st_size)
    return [('results.json', f.read_bytes()) for f in files[:2]]


def read_every_table(path):
    "Results, and the tables that are made of them."
    results = read_results(path)
    for table in (results_table, trainings_table, differences_table):
        table(results)


def checkpoint_seeds(folder):
    "A checkpoint of two numbers."
    save_state(dict(epoch=1, model=dict(w=torch.rand(2)), opt={}, callbacks=[]), folder / 'c.pt')
    return [('c.pt', (folder / 'c.pt').read_bytes())]


def read_checkpoint(path):
    "As a fit does that goes on."
    assert Checkpoint(path).epochs_done() == 1  # never another number


def meta_seeds(folder):
    "What a store says of itself; its other files lie beside it."
    one = dict(kind='image', label='a', patient='p', source='s', probe='c')
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / 'a.png')
    table = pd.DataFrame([dict(one, path=str(folder / 'a.png'))])
    store = FrameStore.build(table, folder.parent, size=(8, 8), workers=0)
    return [('meta.json', (store.folder / 'meta.json').read_bytes())]


def read_store(path):
    "Open the store of a folder, and look at its pixels."
    if path.name != 'meta.json':  # a whole file is tried under another name
        return
    try:
        store = FrameStore(path.parent)
        store.verify()
        assert store.size == (8, 8) and len(store) == 1  # never another shape
    except (ValueError, FileNotFoundError) as e:
        assert str(path.parent) in str(e)  # the store is named
        raise ValueError(path.name) from e


TARGETS['table'] = Target(table_seeds, read_table, (TableError,))
TARGETS['model'] = Target(model_seeds, load_model, (ModelFileError,))
TARGETS['weights'] = Target(weights_seeds, load_weights, (ValueError,))
TARGETS['results'] = Target(results_seeds, read_every_table, (ValueError,))
TARGETS['checkpoint'] = Target(checkpoint_seeds, read_checkpoint, (ValueError,))
TARGETS['store'] = Target(meta_seeds, read_store, (ValueError,))
