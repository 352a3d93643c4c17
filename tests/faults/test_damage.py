"Damaged or foreign files of models, checkpoints and runs: each is refused by name, and nothing is unpickled."

import json
import os
import pickle
import zipfile

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from lus_fastai.core import load_state, save_csv, save_state, shipped_folder, write_json
from lus_fastai.data.folds import patient_folds
from lus_fastai.models.transfer import load_weights
from lus_fastai.predict import ModelFileError, load_model
from lus_fastai.runs import claim_folder, read_results
from lus_fastai.train.callbacks import Checkpoint
from lus_fastai.train.cross_validation import fold_history, last_epoch

COLUMNS = ['p_a', 'p_b']
REFUSED = (ValueError, OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError)


@pytest.fixture
def run(tmp_path):
    "The folder of a finished cross-validation of two folds and two epochs, and its folds."
    frames = pd.DataFrame(dict(patient=list('aabbccdd'), label=list('xyxyxyxy'), path=list('12345678')))
    folds = patient_folds(frames, 2)
    for k in folds.numbers:
        folder, n = tmp_path / f'fold{k}', len(folds.test(k))
        history = dict(epoch=range(2), train_loss=1.0, valid_loss=1.0, score=0.5, lr=0.1, seconds=1.0)
        save_csv(pd.DataFrame(history), folder / 'history.csv')
        save_state(dict.fromkeys(('picked', 'last'), torch.rand(n, 2)), folder / 'predictions.pt')
    write_json(tmp_path / 'run.json', dict(split=folds.hash, columns=COLUMNS, epochs=2))
    return tmp_path, folds


def flipped(data, at):
    "Bytes with one bit turned."
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_every_turned_bit_and_every_cut_in_a_state_is_noticed(tmp_path):
    "A bit may turn where nothing is kept (a date, padding): then all values are as before."
    save_state(dict(epoch=1, x=torch.arange(40.0)), tmp_path / 's.pt')
    whole, same = (tmp_path / 's.pt').read_bytes(), 0
    for at in range(0, len(whole), 7):
        (tmp_path / 's.pt').write_bytes(flipped(whole, at))
        try:
            state = load_state(tmp_path / 's.pt')
        except Exception:
            continue
        same += 1
        assert state['epoch'] == 1 and torch.equal(state['x'], torch.arange(40.0)), at
    assert same < len(range(0, len(whole), 7))
    for end in range(0, len(whole) - 1, 97):
        (tmp_path / 's.pt').write_bytes(whole[:end])
        with pytest.raises(REFUSED):
            load_state(tmp_path / 's.pt')


@pytest.mark.parametrize('damage', ['flip', 'cut', 'list', 'other', 'empty'])
def test_damaged_predictions_are_named(run, damage):
    path, folds = run
    file = path / 'fold1' / 'predictions.pt'
    assert len(last_epoch(folds, path)) == 8
    data = file.read_bytes()
    at = data.index(b'/data/0') + 80
    if damage in ('list', 'other'):
        save_state([1, 2] if damage == 'list' else dict(last=torch.rand(3, 2)), file)
    else:
        file.write_bytes(dict(flip=flipped(data, at), cut=data[: len(data) // 2], empty=b'')[damage])
    with pytest.raises(ValueError, match=r'fold1/predictions\.pt .*delete that folder to train it again'):
        last_epoch(folds, path)


@pytest.mark.parametrize(
    'text', ['', 'epoch,score\n0,1\n', 'epoch,score,seconds\n0,1,x\n', 'a\x00', 'e,e\n1,1']
)
def test_a_damaged_history_is_named(run, text):
    path, folds = run
    (path / 'fold0' / 'history.csv').write_text(text)
    for read in (lambda: last_epoch(folds, path), lambda: fold_history(path)):
        with pytest.raises(ValueError, match=r'fold0/history\.csv'):
            read()


@pytest.mark.parametrize('text', ['', '{"split": ', '[]', '{}', '3', '\xff'])
def test_a_damaged_claim_is_named(run, text):
    path, folds = run
    (path / 'run.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match=r'run\.json'):
        last_epoch(folds, path)
    with pytest.raises(ValueError, match=r'run\.json|holds another run'):
        claim_folder(path, dict(split='x'))


@pytest.mark.parametrize('state', [[1, 2], dict(epoch=1), torch.rand(3), None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, state):
    save_state(state, tmp_path / 'c.pt')
    with pytest.raises(ValueError, match=r'c\.pt is no checkpoint .*delete it to start this fit anew'):
        Checkpoint(tmp_path / 'c.pt').epochs_done()


@pytest.mark.parametrize(
    'held', [[torch.rand(2)], torch.rand(2), dict(epoch=3), dict(state=dict(w=1)), None, 7]
)
def test_weights_that_are_no_dictionary_of_tensors_are_named(tmp_path, held):
    torch.save(held, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=r'w\.pth holds no weights .*no dictionary of tensors'):
        load_weights(tmp_path / 'w.pth')


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_weights_that_are_no_numbers_are_named(tmp_path, bad, name):
    weights = {'a.weight': torch.zeros(3), 'b.bias': torch.tensor([1.0, bad]), 'n': torch.tensor(3)}
    (save_file if name.endswith('.safetensors') else torch.save)(weights, tmp_path / name)
    with pytest.raises(ValueError, match=rf'{name} holds no weights .*NaN or infinite numbers in b\.bias'):
        load_weights(tmp_path / name)


def test_what_a_model_file_says_is_checked_before_it_is_built(tmp_path):
    from safetensors import safe_open

    whole = shipped_folder('data') / 'weights' / 'pocus.safetensors'
    with safe_open(whole, 'pt') as f:
        facts, tensors = json.loads(f.metadata()['lus_fastai']), {k: f.get_tensor(k) for k in f.keys()}
    networks = facts['networks']
    for change in (
        dict(networks=None),
        dict(networks=[]),
        dict(networks=[dict(networks[0], outputs=10**9)]),
        dict(networks=[dict(networks[0], name='no such network')]),
        dict(networks=[dict(networks[0], name=['x'])]),
        dict(prep=dict(facts['prep'], size=10**6)),
        dict(prep=dict(facts['prep'], size='x')),
        dict(prep=dict(secret=1)),
        dict(classes=3),
        dict(temperature='x'),
        dict(limits=[1]),
    ):
        text = json.dumps({**facts, **change})
        save_file(tensors, tmp_path / 'm.safetensors', dict(lus_fastai=text))
        with pytest.raises(ModelFileError, match=r'm\.safetensors'):
            load_model(tmp_path / 'm.safetensors')


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


@pytest.mark.parametrize(
    'name', ['w.pth', 'w.pkl', 'w.safetensors', 'w.pt', 'w.bin', 'w.json', 'w.npz', 'w.zip']
)
def test_a_pickle_is_refused_under_any_name(tmp_path, name):
    Evil.path, file = str(tmp_path / 'ran'), tmp_path / name
    readers = (load_weights, load_model, load_state, lambda p: Checkpoint(p).epochs_done(), read_results)
    for write in (lambda x: file.write_bytes(pickle.dumps(x)), lambda x: torch.save(x, file)):
        for held in (Evil(), dict(w=Evil()), [Evil()]):
            write(held)
            for read in readers:
                with pytest.raises(REFUSED):
                    read(file)
    assert not (tmp_path / 'ran').exists()
