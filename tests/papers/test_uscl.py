"The reproduction of Chen 2021 on a tiny phantom: resumable, and no downstream clip is ever pretrained on."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lus_fastai.core import CLASSES, LeakError
from lus_fastai.models.backbones import create_backbone
from lus_fastai.papers import uscl
from lus_fastai.runs import differences_table, read_results, results_table, trainings_table

TINY = uscl.UsclSettings(
    backbones=('resnet18',),
    size=64,
    max_frames=2,
    bs=8,
    steps=4,
    probe_every=2,
    folds=2,
    tune_epochs=1,
    queue=16,
    budgets=(1,),
    doses=(1, 2),
    core=('random', 'ImageNet', 'SimCLR', 'USCL'),
    rivals=('FixMatch',),
    ablated=('both',),
    detected=('random', 'USCL'),
    detect_epochs=1,
    detect_size=64,
    detect_seeds=(0,),
    patients=6,
    seeds=(0, 1),
)
FIRST = replace(TINY, parts=('core',), policies=('last 3',), seeds=(0,))


@pytest.fixture(scope='module', autouse=True)
def no_imagenet():
    "Weights of ImageNet may be on one machine and not on another; here they are on none."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uscl, 'imagenet_available', lambda name: False)
        yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp('uscl')
    return home, uscl.reproduce('phantom', out=home / 'results', cache=home, settings=TINY)


@pytest.fixture(scope='module')
def results(run):
    return read_results(run[1].with_suffix('.json'))


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    home = tmp_path_factory.mktemp('store')
    return uscl.frame_store(uscl.clip_table('phantom', TINY, home), TINY, home)


def test_everything_is_in_the_results(run, results):
    t = results_table(results)
    assert set(t.protocol) == set(uscl.PROTOCOLS)
    assert set(t.table) == {'comparison', 'budgets', 'curve', 'conflict', 'detection'}
    names = 'random', 'SimCLR', 'USCL', *map(uscl.dose_start, (1, 2)), 'FixMatch', 'both', uscl.label_start(1)
    rows = t[(t.table == 'comparison') & (t.protocol == 'probe')].row
    assert set(rows) == {uscl.PIXELS, *(f'ResNet-18: {n}' for n in names)}
    assert set(t[t.protocol == 'all'].row) == {f'ResNet-18: {n}' for n in ('random', 'SimCLR', 'USCL')}
    assert set(t[t.table == 'budgets'].column) == {'3 clips', 'all clips'}
    assert t.theirs.isna().all()
    assert any('Grad-CAM' in x for x in results['not_run'])
    assert 'ResNet-18 from ImageNet (no weights on this machine)' in results['not_run']
    page = run[1].read_text()
    assert 'Similarity conflict' in page and str(run[0]) not in page


def test_every_training_is_judged_and_named_by_its_seed(run, results):
    t = trainings_table(results)
    assert all(name.removesuffix('-best').endswith(('-s0', '-s1')) for name in t.index)
    assert {'probe', 'last 3', 'last 3, best', 'all', 'detection'} <= set(t.protocol)
    kept = {f.name.removesuffix('.csv.gz') for f in (run[0] / 'results' / 'uscl-phantom').iterdir()}
    assert {'probe-pixels-8x8-s0', 'probe-ResNet-18-USCL-s1'} <= kept
    assert {n for n in t.index if n.startswith('tuned')} <= kept


def test_rows_are_compared_by_paired_differences_over_both_seeds(results):
    d = differences_table(results)
    one = d[(d.a == 'ResNet-18: USCL') & (d.b == 'ResNet-18: SimCLR') & (d.column == 'accuracy')]
    t = results_table(results)
    t = t[(t.table == 'comparison') & (t.column == 'accuracy')].set_index(['protocol', 'row']).ours
    assert set(one.protocol) == {'probe', 'last 3', 'last 3, best', 'all', 'all, best'}
    for r in one.itertuples():
        assert r.value == pytest.approx(t[r.protocol, r.a] - t[r.protocol, r.b])
        assert list(r.trainings) == [2, 2]
    assert (d[d.b.str.endswith('last epoch')].value >= 0).all()
    assert {'same clip', 'box AP', 'mask AP', 'accuracy, 3 clips'} <= set(d.column)


def test_the_released_backbone_loads_and_has_its_card(run, results):
    (weights,) = (run[0] / 'results' / 'release').glob('*.safetensors')
    card = weights.with_suffix('.md').read_text()
    assert weights.name.startswith(uscl.best_start(results, TINY).folder.lower())
    split = results['protocols']['probe']['split_hash']
    assert split in card and weights.name in card and str(run[0]) not in card
    assert create_backbone('resnet18', weights=weights).pretrained


def test_a_second_run_trains_nothing(run, results):
    home, page = run
    files = [f for f in uscl.run_folder(TINY, 'phantom', home).rglob('*') if f.is_file()]
    before = {f: f.stat().st_mtime_ns for f in files if f.parent.name != 'claims'}
    again = uscl.reproduce('phantom', out=home / 'again', cache=home, settings=TINY)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert read_results(again.with_suffix('.json'))['cells'] == results['cells']


def test_the_core_alone_names_what_was_not_run(run, results):
    home, _ = run
    assert uscl.run_folder(FIRST, 'phantom', home) == uscl.run_folder(TINY, 'phantom', home)
    page = uscl.reproduce('phantom', out=home / 'core', cache=home, settings=FIRST)
    core = read_results(page.with_suffix('.json'))
    left = ' '.join(core['not_run'])
    assert all(part in left for part in ('doses', 'rivals (FixMatch)', 'ablation', 'labels', 'detection'))
    assert 'core (supervised, ImageNet -> USCL)' in left and 'fine-tuning of the core (all)' in left
    assert {*core['protocols']} == {'probe', 'last 3', 'last 3, best'}
    assert {c['row'] for c in core['cells']} < {c['row'] for c in results['cells']}
    with pytest.raises(ValueError, match='need the core'):
        uscl.reproduce(settings=replace(TINY, parts=('doses',)))


def test_a_pretraining_that_was_stopped_ends_as_one_that_was_not(store, tmp_path, monkeypatch):
    start = uscl.Start('resnet18', 'USCL')
    uscl.pretrain_start(start, store, tmp_path / 'whole', TINY)
    embed, calls = uscl.embed, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(*args)

    monkeypatch.setattr(uscl, 'embed', stop)
    with pytest.raises(KeyboardInterrupt):
        uscl.pretrain_start(start, store, tmp_path / 'stopped', TINY)
    assert (tmp_path / 'stopped' / 'checkpoint.pt').exists()
    uscl.pretrain_start(start, store, tmp_path / 'stopped', TINY)
    names = sorted(f.name for f in (tmp_path / 'whole').glob('features-*.npy'))
    assert names == ['features-2.npy', 'features-4.npy']
    for name in names:
        a, b = (np.load(tmp_path / f / name) for f in ('whole', 'stopped'))
        assert np.array_equal(a, b)


@pytest.mark.parametrize('name', ['supervised', 'SimCLR', 'USCL', 'FixMatch', 'SimCLR, 2 frames a clip'])
def test_pretraining_sees_clips_from_elsewhere_alone(store, name):
    items = uscl.pair_loaders(name, store, TINY).train.dataset
    frames = store.frames.set_index('row')
    assert not frames.loc[items.rows.numpy(), 'downstream'].any()
    assert items.classes == list(uscl.FINDINGS) and not set(items.classes) & set(CLASSES)


def test_a_patient_of_both_tables_is_an_error(store):
    class Shared:
        frames = store.frames.assign(patient='one')

    with pytest.raises(LeakError):
        uscl.pretraining_frames(Shared())


def test_a_budget_is_so_many_clips_of_each_class(store):
    dls = uscl.pair_loaders(uscl.label_start(2), store, TINY)
    target = dls.train.dataset.target.numpy()
    clips = {(int(c), int(k)) for c, k in zip(_clip_numbers(dls), target.argmax(1)) if target[c].sum() >= 0}
    labelled = {c for c, row in zip(_clip_numbers(dls), target) if row.sum()}
    classes = pd.Series([k for c, k in clips if c in labelled]).value_counts()
    there = uscl.pretraining_frames(store).drop_duplicates('clip').label.value_counts()
    assert classes.to_dict() == {
        i: min(2, there.get(c, 0)) for i, c in enumerate(uscl.FINDINGS) if c in there
    }


def _clip_numbers(dls):
    "The clip of each row of the items' labels."
    items = dls.train.dataset
    return np.repeat(np.arange(len(items.clips)), items.count.numpy())


@pytest.mark.parametrize('k', [1, 2])
def test_a_batch_has_so_many_frames_of_each_clip(store, k):
    dl = uscl.pair_loaders(uscl.dose_start(k), store, TINY).train
    order = np.array(list(dl.get_idxs()))
    counts = np.unique(dl.dataset.clip_of.numpy()[order[:8]], return_counts=True)[1]
    assert counts.tolist() == [k] * (8 // k)


def test_weights_of_consistency_follow_the_steps():
    weights = {n: uscl.method_of(n).make(uscl.DEFAULT).weight for n in ('Pi-model', 'temporal ensembling')}
    share = uscl.DEFAULT.steps / uscl.PAPER_STEPS
    assert weights == pytest.approx({'Pi-model': 100 * share, 'temporal ensembling': 30 * share})
    assert uscl.method_of('Pi-model').make(uscl.PAPER).weight == 100


def test_a_probe_learns_from_other_patients_alone(store):
    folds = uscl.downstream_folds(store, TINY)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(folds.table), 5)) + folds.table.label.map(CLASSES.index).to_numpy()[:, None]
    found = uscl.probe(x, folds)
    changed = x.copy()
    changed[(folds.fold == 0).to_numpy()] += 100  # of the test: the model must not move
    again = uscl.probe(changed, folds)
    columns = [f'p_{c}' for c in CLASSES]
    assert np.allclose(found[columns].sum(axis=1), 1)
    assert not np.allclose(found[columns], again[columns])
    model = uscl._fit_probe(x[(folds.fold != 0).to_numpy()], folds.table.label[folds.fold != 0].to_numpy(str))
    want = model.predict_proba(changed[(folds.fold == 0).to_numpy()])
    order = [list(model.classes_).index(c) for c in CLASSES]
    assert np.allclose(again.loc[folds.fold == 0, columns], want[:, order])


def test_cosines_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4))
    frames = pd.DataFrame(
        dict(clip=list('aaabbbccddee'), patient=list('111111223344'), label=list('xxxxxxxxyyyy'))
    )
    found = uscl.frame_cosines(x, frames)
    c = x - x.mean(0)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    for i, a in frames.iterrows():
        kinds = {k: [] for k in uscl.KINDS}
        for j, b in frames.iterrows():
            same = [a[c] == b[c] for c in ('clip', 'patient', 'label')]
            kind = next((k for k, s in zip(uscl.KINDS, same) if s), uscl.KINDS[3])
            if i != j:
                kinds[kind].append(c[i] @ c[j])
        want = [np.mean(v) if v else np.nan for v in kinds.values()]
        assert np.allclose(found.loc[i, list(uscl.KINDS)].astype(float), want, equal_nan=True)


def test_grad_cam_of_a_small_map_is_an_error(store):
    start = uscl.Start('resnet18', 'random')
    with pytest.raises(ValueError, match='2x2: Grad-CAM needs 7x7'):
        uscl.tuned_attention(start, store, {}, 'nowhere', TINY)


def test_real_pretraining_sees_blues_alone(real_data):
    table = uscl.clip_table('real', uscl.DEFAULT)
    clips = table.assign(clip=table['path'], row=0, frame=0, time=0.0)

    class Clips:
        frames = clips

    rest, own = uscl.pretraining_frames(Clips()), clips[clips.downstream]
    assert set(rest.source) == {'blues'} and len(rest) == 241 and rest.patient.nunique() == 42
    assert len(own) == 117 and set(own.label) == set(CLASSES) and 'blues' not in set(own.source)
    assert rest.label.value_counts().to_dict() == {
        'A- and B-lines': 101,
        'A-lines': 68,
        'B-lines': 53,
        'neither': 19,
    }
    test = uscl.detect_test(uscl.detect_items('real'))
    assert ((~test).sum(), test.sum()) == (292, 145)
