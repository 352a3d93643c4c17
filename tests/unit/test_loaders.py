"The store whose pixels are read, one image in `learn.predict`, fastai's conveniences on frames and masks."

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (
    ClassificationInterpretation,
    CrossEntropyLossFlat,
    Learner,
    SegmentationInterpretation,
)
from PIL import Image
from stills import write_still
from torch import nn

from lus_fastai.core import CLASSES, DENSE, MaskSet, TableError
from lus_fastai.data.audit import audit
from lus_fastai.data.loaders import ReadFrame, TensorDense, TensorFrame, as_frame, frame_dls, mask_dls
from lus_fastai.data.pairs import pair_dls
from lus_fastai.data.store import FrameStore, open_store, store_rows
from lus_fastai.explain.embeddings import features
from lus_fastai.explain.sanity_checks import only_outside
from lus_fastai.video import ClipError


def darker(frames, row, outside=0):
    return frames // 2


@pytest.fixture(scope='module')
def twins(tmp_path_factory):
    "Two stores of stills with the same table but for their folder: the same row numbers, other pixels."
    folder, stores = tmp_path_factory.mktemp('twins'), []
    for name, grey in (('a', 10), ('b', 110)):
        rows = []
        for i in range(6):
            x = np.full((20, 24), grey + 10 * i, np.uint8)
            rows.append(write_still(folder / f'{name}{i}.png', x, CLASSES[i % 3], f'p{i}', mask=i % 7))
        stores.append(FrameStore.build(pd.DataFrame(rows), folder / name, size=(20, 24), workers=0))
    return stores


def dls_of(store, target='label', **kwargs):
    return frame_dls(store, store.frames[:4], store.frames[4:], target, bs=3, device='cpu', **kwargs)


def first(dl):
    return (255 * dl.one_batch()[0][:, 0, 0, 0]).round().tolist()


class Net(nn.Module):
    "Logits from the mean grey, one vector an image or one a pixel."

    def __init__(self, n, pixels=False):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.pixels = nn.Conv2d(1, n, 1), pixels

    def forward(self, x):
        x = self.last(x[:, :1])
        return x if self.pixels else x.mean((2, 3))


def learner(store, target='label', **kwargs):
    n, loss = (3, CrossEntropyLossFlat()) if target == 'label' else (len(DENSE), CrossEntropyLossFlat(axis=1))
    return Learner(dls_of(store, target, **kwargs), Net(n, target != 'label'), loss_func=loss)


def test_rows_are_read_from_their_own_store(twins):
    a, b = twins
    dls = dls_of(a, 'dense')
    assert first(dls.test_dl(b.frames[:3])) == [110, 120, 130]
    mixed = pd.concat([b.frames[4:5], a.frames[:1], b.frames[:1]])
    x, y = dls.test_dl(mixed, with_labels=True).one_batch()
    assert (255 * x[:, 0, 0, 0]).round().tolist() == [150, 10, 110] and y[:, 0, 0].tolist() == [4, 0, 0]
    by_row = b.frames[:3].drop(columns='store')  # without the column, rows count in the own store
    assert first(dls.test_dl(by_row)) == [10, 20, 30]
    assert first(dls.test_dl(b.frames[1:2].iloc[[0]])) == [120]


def test_a_moved_store_is_the_same_and_one_built_again_is_not(twins, tmp_path):
    a, _ = twins
    shutil.copytree(a.folder, tmp_path / 'copy')
    copy = FrameStore(tmp_path / 'copy')
    assert store_rows(a.frames, copy).tolist() == list(range(6)) and copy.id != a.id
    old = copy.frames
    again = FrameStore.build(
        a.frames.drop_duplicates('clip')[::-1], tmp_path / 'copy', size=(20, 24), workers=0
    )
    with pytest.raises(TableError, match='6 of 6 rows are of the store'):
        store_rows(old, again)
    assert store_rows(old, a).tolist() == list(range(6))  # still the same content there
    with pytest.raises(TableError, match='before it was built again'):
        open_store(old['store'].iloc[0])
    dls = dls_of(again)
    shutil.rmtree(tmp_path / 'copy')
    lost = pd.concat([twins[1].frames[:1].assign(store=str(tmp_path / 'copy/images-0123456789ab.u8'))])
    with pytest.raises(TableError, match='cannot be opened'):
        dls.test_dl(lost).one_batch()


def test_stores_made_otherwise_are_refused(twins, tmp_path):
    a, b = twins
    table = b.frames.drop_duplicates('clip')

    def other(name, table=table, **kwargs):
        return FrameStore.build(table, tmp_path / name, **{**dict(size=(20, 24), workers=0), **kwargs}).frames

    dls, dense = dls_of(a), dls_of(a, 'dense')
    with pytest.raises(TableError, match='are 10x12, those of .* 20x24'):
        dls.test_dl(other('small', size=(10, 12))).one_batch()
    with pytest.raises(TableError, match='prepared by .*darker, those of .* not prepared'):
        dls.test_dl(other('dark', prepare=darker)).one_batch()
    bare = other('bare', table.drop(columns='mask'))
    assert first(dense.test_dl(bare[:1])) == [110]  # no masks wanted
    with pytest.raises(TableError, match='holds no masks'):
        dense.test_dl(bare, with_labels=True).one_batch()
    holes = pd.concat([a.frames[:1], b.frames[:1].drop(columns='store')])
    with pytest.raises(TableError, match="'store' is empty in 1 of 2 rows"):
        dls.test_dl(holes).one_batch()


def test_everything_that_takes_a_store_and_a_table_compares_them(twins):
    a, b = twins
    net, set_ = Net(3), MaskSet(a.images, np.ones((6, 1, 20, 24), bool), ('x',), a.frames)
    view = only_outside(a, np.zeros((20, 24), bool))
    for wrong in (
        lambda: features(net, a, b.frames, layer='last'),
        lambda: pair_dls(a, b.frames, device='cpu', bs=2),
        lambda: audit(b.frames, store=a),
        lambda: ReadFrame(view).keys(b.frames),
        lambda: mask_dls(set_, [0, 1], [2], device='cpu').test_dl(a.frames).one_batch(),
    ):
        with pytest.raises(TableError, match='of 6 rows are of the store'):
            wrong()
    assert len(ReadFrame(view).keys(a.frames)) == 6
    x = mask_dls(set_, [3, 1], [2], device='cpu', notes=False, channels=1).valid.one_batch()[0]
    assert (255 * x[0, 0, 0, 0]).round() == 30  # rows of a set count in the set
    # an array has no name: rows count in it
    array = features(net, np.array(b.images), b.frames[:2], layer='last')
    np.testing.assert_array_equal(array, features(net, b, b.frames[:2], layer='last'))


def test_the_column_is_not_on_disk_and_costs_a_byte_a_row(twins):
    a, _ = twins
    assert 'store' not in pd.read_csv(next(a.folder.glob('frames-*.csv')))
    assert a.frames['store'].memory_usage(deep=True, index=False) < 1000
    with pytest.raises(TableError, match="column 'store'"):
        FrameStore.build(
            a.frames[['path', 'kind', 'label', 'patient', 'source', 'probe', 'store']],
            a.folder / 'no',
            workers=0,
        )


@pytest.mark.parametrize('channels', (1, 3))
def test_predict_takes_whatever_holds_an_image(twins, tmp_path, channels):
    a, b = twins
    learn = learner(a, channels=channels)
    row, frame = b.frames.iloc[2], b[2]
    with torch.no_grad():
        expected = learn.model(torch.full((1, channels, 20, 24), 130 / 255)).softmax(1)[0]
    Image.fromarray(np.full((40, 48), 130, np.uint8)).save(tmp_path / 'large.png')
    items = dict(
        row=row,
        frame=frame,
        rgb=np.repeat(frame[..., None], 3, 2),
        tensor=torch.tensor(frame),
        chw=torch.tensor(frame)[None],
        typed=TensorFrame(torch.tensor(frame)[None]),
        pil=Image.fromarray(frame),
        colour=Image.fromarray(frame).convert('RGB'),
        path=tmp_path / 'large.png',
        text=str(tmp_path / 'large.png'),
        larger=np.full((33, 71), 130, np.uint8),
    )
    for name, item in items.items():
        with learn.no_bar():
            label, number, probs = learn.predict(item)
        torch.testing.assert_close(torch.Tensor(probs), expected, msg=name)
        assert label == learn.dls.vocab[int(number)] == learn.dls.vocab[int(expected.argmax())]
    with learn.no_bar():
        shown, *_ = learn.predict(frame, with_input=True)
        assert shown.shape == (channels, 20, 24)
        assert len(learn.get_preds(dl=learn.dls.test_dl([frame, row, tmp_path / 'large.png', frame]))[0]) == 4


def test_predict_gives_a_mask(twins, tmp_path):
    a, _ = twins
    learn = learner(a, 'dense')
    for item in (a.frames.iloc[1], a[1], a.frames['path'][1]):
        with learn.no_bar():
            mask, codes, probs = learn.predict(item)
        assert type(mask) is TensorDense
        assert mask.shape == codes.shape == (20, 24) and probs.shape == (7, 20, 24)
        assert torch.equal(torch.Tensor(mask), torch.Tensor(probs).argmax(0).float())
        assert abs(float(probs.sum(0).mean()) - 1) < 1e-5


def test_predict_refuses_what_it_would_have_to_guess(twins, phantom_table, tmp_path):
    a, b = twins
    learn = learner(a)

    def fails(item, error, match, learn=learn):
        with learn.no_bar(), pytest.raises(error, match=match):
            learn.predict(item)

    fails(a[0] / 255, TypeError, 'this one is float64: of floats')
    fails(torch.full((1, 20, 24), float('nan')), TypeError, 'torch.float32|float32')
    fails(np.zeros((2, 3, 20, 24), np.uint8), ValueError, r'this one \(2, 3, 20, 24\)')
    fails(np.zeros((0, 24), np.uint8), ValueError, r'\(0, 24\)')
    fails(phantom_table.path[0], ClipError, 'it is a clip, .*sample_clip')
    fails(tmp_path / 'none.png', ClipError, 'no such file')
    (tmp_path / 'text.png').write_text('no image')
    fails(tmp_path / 'text.png', ClipError, 'it is no image')
    fails(a.frames.iloc[0].drop('row'), TableError, "a column 'row'")
    dark = FrameStore.build(
        a.frames.drop_duplicates('clip'), tmp_path / 'dark', size=(20, 24), workers=0, prepare=darker
    )
    prepared = learner(dark)
    fails(a.frames['path'][0], TableError, 'prepared by .*darker, which needs a row', prepared)
    with prepared.no_bar():
        torch.testing.assert_close(prepared.predict(dark[3])[2], prepared.predict(dark.frames.iloc[3])[2])
    fails(a[0], TableError, 'changes its frames', learner(only_outside(a, np.zeros((20, 24), bool))))


def test_grey_is_pillows():
    x = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    grey = np.asarray(Image.fromarray(x).convert('L'))
    for item in (x, torch.tensor(x).permute(2, 0, 1), Image.fromarray(x)):
        np.testing.assert_array_equal(as_frame(item), grey)
    see_through = np.dstack([x, np.zeros((5, 6), np.uint8)])
    assert not as_frame(see_through).any() and not as_frame(Image.fromarray(see_through)).any()


@pytest.mark.slow
def test_an_exported_learner_predicts_in_a_fresh_process_even_without_its_store(twins, tmp_path):
    a, b = twins
    shutil.copytree(a.folder, tmp_path / 'gone')
    for target in ('label', 'dense'):
        learn = learner(FrameStore(tmp_path / 'gone'), target)
        with learn.no_bar():
            here = [learn.predict(x)[2].tolist() for x in (b[2], b.frames.iloc[3])]
        learn.export(tmp_path / f'{target}.pkl')
        shutil.move(tmp_path / 'gone', tmp_path / 'away')
        code = f'''
            import json, sys
            sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]!r}
            from fastai.vision.all import load_learner
            from lus_fastai.data.store import FrameStore
            learn, b = load_learner({str(tmp_path / f'{target}.pkl')!r}), FrameStore({str(b.folder)!r})
            with learn.no_bar():
                found = [learn.predict(x)[2].tolist() for x in (b[2], b.frames.iloc[3])]
            print(json.dumps(found))
            try:
                with learn.no_bar(): learn.predict(b.frames.iloc[0].drop('store'))
            except FileNotFoundError as e: print(e)
        '''
        done = subprocess.run(
            [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=200
        )
        shutil.move(tmp_path / 'away', tmp_path / 'gone')
        assert done.returncode == 0, done.stderr
        *_, numbers, said = [line for line in done.stdout.splitlines() if line.strip()]
        np.testing.assert_allclose(json.loads(numbers), here, atol=1e-6)
        assert 'holds no finished frame store' in said


def test_fastais_conveniences_on_frames_and_masks(twins, tmp_path):
    for target in ('label', 'dense'):
        learn = learner(twins[0], target)
        learn.path = tmp_path
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        with learn.no_bar(), learn.no_logging():
            assert learn.lr_find(num_it=20, show_plot=False).valley > 0
            assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
            learn.fit(1, 0.1)
            learn.dls.show_batch(max_n=2)
            assert len(plt.gcf().axes) == 2 and all(ax.images for ax in plt.gcf().axes)
            learn.show_results(max_n=2)
            assert sum(len(ax.images) > 0 for ax in plt.gcf().axes) >= 2
            found = (
                ClassificationInterpretation if target == 'label' else SegmentationInterpretation
            ).from_learner(learn)
            assert len(found.top_losses(2)[0]) == 2
            if target == 'label':
                assert found.confusion_matrix().sum() == 2
                found.plot_confusion_matrix()
            found.plot_top_losses(2)
        plt.close('all')
