"Detection: boxes, items, the network's count and weights, average precision, training and resuming."

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.core import TableError, seed_all
from lus_fastai.models.backbones import create_backbone
from lus_fastai.models.classifiers import BackboneClassifier
from lus_fastai.models.transfer import param_count, save_weights
from lus_fastai.train.detection import (
    FEW_OBJECTS,
    DetectItems,
    DetectLog,
    WarmupStepLR,
    _coco,
    boxes_from_masks,
    busi_items,
    chen_split,
    detect_dls,
    detect_learner,
    detection_ap,
    detection_losses,
    fit_anchors,
    flip_target,
    load_detections,
    mask_rcnn,
    phantom_items,
    predict_detections,
    train_detector,
)

TINY = dict(
    channels=1,
    size=(64, 64),
    width=32,
    anchors=(8, 16, 32, 48, 64),
    **{
        **FEW_OBJECTS,
        'box_batch_size_per_image': 16,
        'rpn_post_nms_top_n_train': 50,
        'rpn_post_nms_top_n_test': 20,
        'box_detections_per_img': 5,
    },
)


def made(n=6, size=48, empty=(), seed=0):
    "Images with a bright rectangle each; those in `empty` have none."
    rng, images, masks = np.random.default_rng(seed), [], []
    for i in range(n):
        m = np.zeros((0 if i in empty else 1, size, size), bool)
        y, x = rng.integers(4, 20, 2)
        m[:, y : y + 18, x : x + 16] = True
        images.append((rng.integers(0, 60, (size, size)) + 150 * m.any(0)).astype(np.uint8))
        masks.append(m)
    return DetectItems(
        pd.DataFrame(dict(label='x', patient=[f'p{i}' for i in range(n)])),
        images,
        masks,
        [np.ones(len(m), int) for m in masks],
        ('thing',),
    )


def one_image(boxes, scores=None, size=40, labels=None):
    masks = np.zeros((len(boxes), size, size), bool)
    for m, (x0, y0, x1, y1) in zip(masks, boxes):
        m[y0:y1, x0:x1] = True
    return dict(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.ones(len(boxes), int) if labels is None else np.array(labels),
        masks=masks,
        **({} if scores is None else dict(scores=np.array(scores, float))),
    )


def value(table, level, metric, cls='all'):
    return table.set_index(['level', 'class', 'metric']).loc[(level, cls, metric), 'value']


# boxes and items


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 11), st.integers(1, 5), st.integers(1, 5)), max_size=4
    )
)
def test_box_is_the_drawn_rectangle_and_flips_with_it(rects):
    boxes = [(x, y, min(x + w, 12), min(y + h, 10)) for y, x, h, w in rects]
    m = np.zeros((len(boxes), 10, 12), bool)
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        m[k, y0:y1, x0:x1] = True
    got, kept = boxes_from_masks(m)
    assert kept.all() and np.array_equal(got, np.array(boxes, np.float32).reshape(-1, 4))
    x, y = (
        torch.rand(1, 10, 12),
        dict(boxes=torch.from_numpy(got), masks=torch.from_numpy(m.astype(np.uint8))),
    )
    fx, fy = flip_target(x, y)
    assert np.array_equal(boxes_from_masks(fy['masks'])[0], fy['boxes'].numpy())
    bx, by = flip_target(fx, fy)
    assert torch.equal(bx, x) and all(torch.equal(by[k], y[k]) for k in y)


def test_an_object_without_area_is_dropped_and_counted():
    items = DetectItems(
        pd.DataFrame(dict(label=['x'], patient=['p'])),
        [np.zeros((8, 8), np.uint8)],
        [np.stack([np.zeros((8, 8), bool), np.eye(8, dtype=bool)])],
        [np.array([1, 1])],
        ('thing',),
    )
    assert (
        items.dropped == 1
        and len(items.labels[0]) == len(items.boxes[0]) == len(items.masks[0]) == 1
        and '1 objects without area dropped' in repr(items)
    )


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(masks=[np.zeros((1, 8, 9), bool)]), 'masks of shape'),
        (dict(labels=[np.array([2])]), 'has labels'),
        (dict(labels=[np.array([0])]), 'has labels'),
        (dict(images=[]), 'one of each'),
    ],
)
def test_items_that_do_not_fit_together(change, says):
    good = dict(
        table=pd.DataFrame(dict(label=['x'], patient=['p'])),
        images=[np.zeros((8, 8), np.uint8)],
        masks=[np.ones((1, 8, 8), bool)],
        labels=[np.array([1])],
        names=('thing',),
    )
    DetectItems(**good)
    with pytest.raises(ValueError, match=says):
        DetectItems(**{**good, **change})


def test_busi_items_from_files(tmp_path):
    from PIL import Image

    def write(name, x):
        Image.fromarray(x).save(tmp_path / name)
        return str(tmp_path / name)

    x = np.full((20, 30), 90, np.uint8)
    a, b, black = np.zeros((3, 20, 30), np.uint8)
    a[2:6, 3:9] = 255
    b[10:15, 20:25] = 255
    (tmp_path / 'broken.png').write_bytes(b'no image')
    rows = [
        ('one.png', [write('a.png', a), write('b.png', b)]),
        ('two.png', [write('black.png', black)]),
        ('three.png', []),
        ('four.png', [write('small.png', a[:10])]),
    ]
    table = pd.DataFrame(
        [dict(path=write(n, x), label='benign', patient=n, lesions=l) for n, l in rows]
        + [dict(path=str(tmp_path / 'broken.png'), label='benign', patient='e', lesions=[])]
    )
    items = busi_items(table)
    assert (
        [len(l) for l in items.labels] == [2, 0, 0]
        and items.dropped == 1
        and np.array_equal(items.boxes[0], [[3, 2, 9, 6], [20, 10, 25, 15]])
    )
    assert (
        sorted(Path(p).name for p in items.skipped) == ['broken.png', 'four.png']
        and 'another size' in items.skipped[str(tmp_path / 'four.png')]
    )
    assert list(items.table['patient']) == ['one.png', 'two.png', 'three.png']
    with pytest.raises(TableError, match='lesions'):
        busi_items(table.drop(columns='lesions'))


def test_phantom_items(phantom_table):
    items = phantom_items(phantom_table, frames=2)
    assert (
        len(items) == 2 * len(phantom_table)
        and {1} <= set(np.concatenate(items.labels)) <= {1, 2}
        and all(m.sum((1, 2)).min() >= 20 for m in items.masks if len(m))
    )
    only = phantom_items(phantom_table, frames=1, names=('consolidation',))
    assert only.names == ('consolidation',) and len(only) == len(phantom_table)
    with pytest.raises(ValueError, match='names are of'):
        phantom_items(phantom_table, names=('A-line',))


def test_chen_split_is_the_authors():
    torch.manual_seed(1)
    order = torch.randperm(163).tolist()
    train, test = chen_split(163)
    assert (train.tolist(), test.tolist()) == (order[:-50], order[-50:])
    with pytest.raises(ValueError, match='50 of 50'):
        chen_split(50)


def test_batches():
    items = made(5)
    dls = detect_dls(items, [0, 1, 2], np.array([False, False, False, True, True]), bs=2, device='cpu')
    assert [len(b[0]) for b in dls.train] == [2] and [b[1].tolist() for b in dls.valid] == [[3, 4]]
    for bad, says in (([], 'names no item'), (np.array([True]), 'mask of 1 for 5'), ([5], 'names item 5')):
        with pytest.raises(ValueError, match=says):
            detect_dls(items, bad, [0])


# the network


def test_counts_of_the_paper():
    model = mask_rcnn()
    assert param_count(model) == dict(trainable=30_749_211, frozen=157_504, total=30_906_715)
    assert [type(m) for m in model.modules() if 'BatchNorm' in type(m).__name__] == [
        torch.nn.BatchNorm2d
    ] * 20
    assert param_count(mask_rcnn(trainable='all'))['frozen'] == 0
    assert all(not p.requires_grad for p in mask_rcnn(trainable='heads').backbone.body.parameters())


@pytest.mark.parametrize('have, want', [(1, 3), (3, 1)])
def test_a_pretrained_backbone_through_any_stem_and_way(tmp_path, have, want):
    net = BackboneClassifier(create_backbone('resnet18', have), 3)
    with torch.no_grad():
        net.backbone.bn1.running_mean.uniform_()
    save_weights(net, tmp_path / 'net.safetensors')
    save_weights(net.backbone, tmp_path / 'backbone.safetensors')
    x, _outs = torch.rand(1, 1, 64, 64), []
    with torch.no_grad():
        net.eval()
        want_map = net.backbone.layer4(
            net.backbone.layer3(
                net.backbone.layer2(
                    net.backbone.layer1(
                        net.backbone.maxpool(
                            net.backbone.relu(
                                net.backbone.bn1(net.backbone.conv1(x.expand(-1, have, -1, -1)))
                            )
                        )
                    )
                )
            )
        )
        for model in (
            mask_rcnn(channels=want, weights=tmp_path / 'net.safetensors'),
            mask_rcnn(channels=want, weights=tmp_path / 'backbone.safetensors'),
            mask_rcnn(net, channels=want),
            mask_rcnn(channels=want, weights=net.backbone.state_dict()),
        ):
            assert model.channels == want
            torch.testing.assert_close(
                model.eval().backbone.body(x.expand(-1, want, -1, -1))['3'], want_map, rtol=1e-3, atol=1e-4
            )
    assert (
        len(mask_rcnn(channels=want, weights=net).account.loaded) == 120
        and net.backbone.conv1.in_channels == have
    )


def test_weights_of_another_architecture_are_named():
    for other, names in (('resnet34', 'layer1.2'), ('resnet50', 'layer1.0.conv1.weight')):
        with pytest.raises(ValueError, match='(?s)another architecture.*' + names):
            mask_rcnn(weights=create_backbone(other, 3))
    with pytest.raises(ValueError, match='do not fit'):
        mask_rcnn(weights=dict(a=torch.zeros(1)))
    part = {
        k: v for k, v in create_backbone('resnet18', 3).state_dict().items() if not k.startswith('layer4.1.')
    }
    with pytest.raises(ValueError, match=r'(?s)another architecture.*layer4\.1\.conv1'):
        mask_rcnn(weights=part)


@pytest.mark.parametrize('name', ['resnet50', 'tf_efficientnet_lite0', 'convnext_atto'])
def test_timm_bodies(name):
    net = create_backbone(name, 1)
    model = mask_rcnn(net, n_classes=2, **{**TINY, 'channels': None}).eval()
    assert model.channels == 1 and 0 < sum(
        not p.requires_grad for p in model.backbone.body.parameters()
    ) < len(list(model.backbone.body.parameters()))
    with torch.no_grad():
        sizes = {k: tuple(v.shape[1:]) for k, v in model.backbone(torch.rand(1, 1, 64, 64)).items()}
    assert sizes == {'0': (32, 16, 16), '1': (32, 8, 8), '2': (32, 4, 4), '3': (32, 2, 2), 'pool': (32, 1, 1)}
    assert len(mask_rcnn(name, weights=net, **TINY).account.loaded) == len(net.state_dict())


@pytest.mark.parametrize(
    'args, says',
    [
        (dict(trainable='some'), 'trainable is'),
        (dict(channels=2), 'channels is'),
        (dict(anchors=(8,)), 'five sizes'),
        (dict(backbone='vit_tiny_patch16_224'), 'four scales'),
        (dict(backbone='resnot18'), 'nearest'),
        (dict(backbone=torch.nn.Conv2d(3, 3, 3)), 'four scales'),
        (dict(backbone=create_backbone('resnet18'), weights='imagenet'), 'goes with a'),
    ],
)
def test_bad_arguments(args, says):
    with pytest.raises(ValueError, match=says):
        mask_rcnn(**args)


# average precision


def test_ap_by_hand():
    truth = [one_image([(0, 0, 10, 10), (20, 20, 30, 30)])]
    for scores, precision in (([0.9, 0.4], 1.0), ([0.4, 0.9], 0.5)):
        ap = detection_ap(truth, [one_image([(1, 0, 11, 10), (0, 25, 10, 35)], scores)], n_boot=0)
        for level in ('box', 'mask'):
            np.testing.assert_allclose(
                [value(ap, level, m) for m in ('AP', 'AP50', 'AP75')],
                np.array([0.7, 1, 1]) * precision * 51 / 101,
                atol=1e-12,
            )
    perfect, none = one_image([(0, 0, 10, 10), (20, 20, 30, 30)], [0.3, 0.2]), one_image([], [])
    assert (
        np.allclose(detection_ap(truth, [perfect], n_boot=0)['value'], 1)
        and (detection_ap(truth, [none], n_boot=0)['value'] == 0).all()
    )
    assert detection_ap([one_image([])], [perfect], n_boot=0)['value'].isna().all()


def direct(truth, found, iou):
    "pycocotools as its own manual calls it, through JSON."
    from pycocotools import mask as M
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rle(m):
        r = M.encode(np.asfortranarray(m.astype(np.uint8)))
        return dict(size=r['size'], counts=r['counts'].decode())

    anns, res = [], []
    for i, (t, f) in enumerate(zip(truth, found)):
        for d, out in ((t, anns), (f, res)):
            for k, (b, m, l) in enumerate(zip(d['boxes'].tolist(), d['masks'], d['labels'].tolist())):
                out.append(
                    dict(
                        id=len(out) + 1,
                        image_id=i,
                        category_id=l,
                        bbox=[b[0], b[1], b[2] - b[0], b[3] - b[1]],
                        area=float(m.sum()),
                        iscrowd=0,
                        segmentation=rle(m),
                        **({'score': float(d['scores'][k])} if 'scores' in d else {}),
                    )
                )
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(
            json.dumps(
                dict(
                    images=[dict(id=i, height=40, width=40) for i in range(len(truth))],
                    categories=[dict(id=1), dict(id=2)],
                    annotations=anns,
                )
            )
        )
        gt.createIndex()
        e = COCOeval(gt, gt.loadRes(json.loads(json.dumps(res))), iou)
        e.evaluate()
        e.accumulate()
        e.summarize()
    return e.stats[:3]


def random_images(seed, n=12):
    rng, truth, found = np.random.default_rng(seed), [], []
    for _ in range(n):
        k = rng.integers(0, 4)
        at = rng.integers(0, 25, (k, 2))
        wh = rng.integers(5, 14, (k, 2))
        boxes = np.concatenate([at, at + wh], 1)
        truth.append(one_image(boxes.tolist(), labels=rng.integers(1, 3, k)))
        near = np.clip(boxes[rng.random(k) < 0.8] + rng.integers(-2, 3, (1, 4)), 0, 40)
        noise = rng.integers(0, 25, (2, 2))
        noise = np.concatenate([noise, noise + 8], 1)
        both = [b for b in [*near.tolist(), *noise.tolist()] if b[2] > b[0] and b[3] > b[1]]
        found.append(one_image(both, rng.random(len(both)).round(1), labels=rng.integers(1, 3, len(both))))
    return truth, found


@pytest.mark.parametrize('seed', range(4))
def test_ap_is_that_of_pycocotools(seed):
    truth, found = random_images(seed)
    ap = detection_ap(truth, found, ('a', 'b'), n_boot=0)
    for level, iou in (('box', 'bbox'), ('mask', 'segm')):
        np.testing.assert_allclose(
            [value(ap, level, m) for m in ('AP', 'AP50', 'AP75')], direct(truth, found, iou), atol=1e-12
        )
        np.testing.assert_allclose(
            np.nanmean([value(ap, level, 'AP', c) for c in 'ab']), value(ap, level, 'AP'), atol=0.02
        )


def test_interval_resamples_patients():
    truth, found = random_images(5)
    who = np.arange(12) // 3
    a, b = detection_ap(truth, found, ('a', 'b'), who, 200), detection_ap(truth, found, ('a', 'b'), who, 200)
    pd.testing.assert_frame_equal(a, b)
    assert (
        (a['patients'] == 4).all()
        and (a['low'] <= a['value'] + 1e-9).mean() > 0.8
        and (a['high'] >= a['value'] - 1e-9).mean() > 0.8
    )
    draws = np.random.default_rng(0).multinomial(
        4, [0.25] * 4, size=3
    )  # one draw, taken literally: images repeated
    from lus_fastai.train.detection import _matches, _weighted_ap

    truth, found = (
        [dict(t, labels=np.ones(len(t['labels']), int)) for t in truth],
        [
            dict(f, labels=np.ones(len(f['labels']), int), scores=np.arange(len(f['labels'])) * 100.0 + i)
            for i, f in enumerate(found)
        ],
    )
    got = _weighted_ap(
        *next(_matches([_coco(t) for t in truth], [_coco(f) for f in found], ('a',), 'box')),
        draws[:, who].astype(float),
    ).mean(0)
    for d, ap in zip(draws, got):
        again = np.repeat(np.arange(12), d[who])
        np.testing.assert_allclose(
            ap, direct([truth[i] for i in again], [found[i] for i in again], 'bbox')[0], atol=2e-3
        )


def test_what_average_precision_refuses():
    a = one_image([(0, 0, 5, 5)], [0.5])
    for args, says in (
        (([a], []), '1 targets and findings of 0'),
        (([a], [one_image([(0, 0, 5, 5)])]), 'need scores'),
        (([a], [a], ('x',), ['p', 'q']), '2 patients for 1'),
        (([a], [dict(a, labels=np.array([]))]), '1 boxes, 0 labels'),
    ):
        with pytest.raises(ValueError, match=says):
            detection_ap(*args)


# training


def learner(items, valid=(4, 5), **kwargs):
    seed_all(0)
    return detect_learner(
        detect_dls(items, [0, 1, 2, 3], list(valid), device='cpu'),
        mask_rcnn(trainable='all', **{**TINY, **kwargs}),
    )


def quiet(learn):
    learn.no_bar().__enter__()
    learn.no_logging().__enter__()
    return learn


def test_validation_loss_moves_nothing():
    items = made()
    learn = learner(items)
    model, (x, _, y) = learn.model.train(), learn.dls.valid.one_batch()
    model.backbone.body.eval()
    before, modes, state = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    a, b = detection_losses(model, x, y), detection_losses(model, x, y)
    assert set(a) == {
        'loss_classifier',
        'loss_box_reg',
        'loss_mask',
        'loss_objectness',
        'loss_rpn_box_reg',
    } and all(torch.equal(a[k], b[k]) for k in a)
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and modes == [m.training for m in model.modules()]
        and torch.equal(state, torch.get_rng_state())
    )
    loss = quiet(learn).validate()
    assert abs(loss[0] - float(sum(a.values()))) < 1e-5 and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )


def test_it_learns_and_an_image_without_lesion_takes_part():
    learn = quiet(learner(made(8, empty=(1, 5)), valid=(5, 6, 7)))
    first = learn.validate()[0]
    learn.fit(8, 0.01)
    assert learn.recorder.values[-1][0] < 0.8 * first and all(
        torch.isfinite(p).all() for p in learn.model.parameters()
    )
    found = predict_detections(learn.model, learn.dls.valid)
    assert (
        [set(d) for d in found] == [{'boxes', 'labels', 'scores', 'masks'}] * 3
        and found[0]['masks'].shape[1:] == (48, 48)
        and learn.model.training is False
    )


@pytest.mark.slow
def test_it_finds_discs_and_bars_in_images_it_has_not_seen(tmp_path):
    rng, (y, x), drawn = np.random.default_rng(0), np.mgrid[:96, :96], []
    for _ in range(60):
        image, masks, labels = rng.normal(60, 15, (96, 96)), [], []
        for _ in range(rng.integers(1, 3)):
            label, (cy, cx), r = int(rng.integers(1, 3)), rng.uniform(20, 76, 2), rng.uniform(9, 16)
            m = (
                (y - cy) ** 2 + (x - cx) ** 2 < r * r
                if label == 1
                else (abs(y - cy) < 0.5 * r) & (abs(x - cx) < 1.3 * r)
            )
            if not any((m & other).any() for other in masks):
                image[m] = rng.normal(190, 15, m.sum())
                masks.append(m)
                labels.append(label)
        drawn.append((image.clip(0, 255).astype(np.uint8), np.stack(masks), labels))
    items = DetectItems(
        pd.DataFrame(dict(label='shapes', patient=[str(i) for i in range(60)])),
        *map(list, zip(*drawn)),
        ('disc', 'bar'),
    )
    ap = train_detector(
        None,
        items,
        range(40),
        range(40, 60),
        tmp_path,
        epochs=8,
        every=6,
        bs=4,
        lr=1e-3,
        opt='adam',
        size=(96, 96),
        width=32,
        channels=1,
        trainable='all',
        **FEW_OBJECTS,
    )
    ap = ap[ap.metric == 'AP50'].set_index(['level', 'class'])['value']
    assert len(ap) == 6 and ap.min() > 0.7  # boxes and masks, all, discs, bars


def test_images_without_any_lesion_train_alone():
    learn = quiet(learner(made(6, empty=range(6))))
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][:2]).all() and np.isnan(learn.recorder.values[-1][2:]).all()


def test_the_optimiser_is_torchs_sgd_and_the_rate_warms_and_steps():
    from fastai.vision.all import Callback, DataLoader, DataLoaders, Learner

    rates, data = [], [(torch.rand(2), torch.rand(1)) for _ in range(4)]

    class Rates(Callback):
        order = 65

        def before_batch(self):
            if self.training:
                rates.append(self.opt.hypers[-1]['lr'])

    small = Learner(
        DataLoaders(DataLoader(data, bs=2, num_workers=0), DataLoader(data, bs=2, num_workers=0)),
        torch.nn.Linear(2, 1),
        torch.nn.functional.mse_loss,
        cbs=[WarmupStepLR(2), Rates()],
    )
    quiet(small).fit(5, 0.005)
    np.testing.assert_allclose(rates, [5e-6] + [0.005] * 3 + [0.0005] * 4 + [5e-5] * 2)
    learn = learner(made())
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    v = torch.nn.Parameter(w.detach().clone())
    ours, theirs = (
        learn.opt_func([w], lr=0.1, wd=5e-4),
        torch.optim.SGD([v], lr=0.1, momentum=0.9, weight_decay=5e-4),
    )
    for _ in range(4):
        for p, o in ((w, ours), (v, theirs)):
            (p**3).sum().backward()
            o.step()
            o.zero_grad()
    torch.testing.assert_close(w, v)


def test_resumes_bit_for_bit(tmp_path):
    items, args = made(), dict(epochs=2, trainable='all', device='cpu', **TINY)
    whole = train_detector(None, items, [0, 1, 2, 3], [4, 5], tmp_path / 'whole', **args)

    class Stop(Exception):
        pass

    end = DetectLog.end_epoch

    def stop(self):
        end(self)
        self.stop = self.epoch == 1 and (_ for _ in ()).throw(Stop('here'))

    DetectLog.end_epoch = stop
    try:
        with pytest.raises(Stop):
            train_detector(None, items, [0, 1, 2, 3], [4, 5], tmp_path / 'parts', **args)
    finally:
        DetectLog.end_epoch = end
    assert (tmp_path / 'parts' / 'checkpoint.pt').exists()
    parts = train_detector(None, items, [0, 1, 2, 3], [4, 5], tmp_path / 'parts', **args)
    pd.testing.assert_frame_equal(whole, parts)
    a, b = (pd.read_csv(tmp_path / n / 'history.csv').drop(columns='seconds') for n in ('whole', 'parts'))
    pd.testing.assert_frame_equal(a, b)
    assert list(a['epoch']) == [0, 1]
    fa, fb = (load_detections(tmp_path / n, items) for n in ('whole', 'parts'))
    assert set(fa) == {4, 5} and all(np.array_equal(fa[i][k], fb[i][k]) for i in fa for k in fa[i])
    assert not (tmp_path / 'parts' / 'checkpoint.pt').exists()
    pd.testing.assert_frame_equal(
        train_detector(None, items, [0, 1, 2, 3], [4, 5], tmp_path / 'parts', **args).astype(
            {'patients': 'int64'}
        ),
        parts,
        check_dtype=False,
    )
    with pytest.raises(ValueError, match='lr 0.005 -> 0.01'):
        train_detector(None, items, [0, 1, 2, 3], [4, 5], tmp_path / 'parts', lr=0.01, **args)


def test_anchors_are_fitted_to_the_training_images_alone(tmp_path):
    items = made(6)  # rectangles of 16 x 18
    tall = DetectItems(
        items.table,
        items.images,
        [np.pad(np.ones((1, 40, 10), bool), ((0, 0), (4, 4), (19, 19)))] * 6,
        [np.ones(1, int)] * 6,
        ('thing',),
    )
    assert fit_anchors(tall, [0, 1], (24, 24)) == dict(anchors=(10.0,) * 5, ratios=(4.0,) * 3)
    mixed = DetectItems(items.table, items.images, items.masks[:4] + tall.masks[4:], items.labels, ('thing',))
    assert fit_anchors(mixed, [0, 1, 2, 3], (48, 48)) == dict(anchors=(16.97,) * 5, ratios=(1.12,) * 3)
    with pytest.raises(ValueError, match='none of the 2'):
        fit_anchors(made(2, empty=(0, 1)), [0, 1])


def test_an_unknown_optimiser():
    with pytest.raises(ValueError, match="opt is 'sgd' or 'adam'"):
        detect_learner(detect_dls(made(), [0, 1], [2], device='cpu'), mask_rcnn(**TINY), opt='lion')


def test_a_loss_that_is_not_finite_stops():
    learn = quiet(learner(made()))
    with torch.no_grad():
        learn.model.roi_heads.box_head.fc6.bias.fill_(float('inf'))
    with pytest.raises(FloatingPointError, match='epoch 0, batch 0: lower the learning rate'):
        learn.fit(1)


def test_classes_of_model_and_items_agree():
    with pytest.raises(ValueError, match='n_classes=2'):
        learner(made(), n_classes=4)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    ap = train_detector(
        None,
        made(8, empty=(1,)),
        range(6),
        [6, 7],
        tmp_path,
        epochs=3,
        trainable='all',
        device='cuda',
        **TINY,
    )
    assert set(ap['metric']) == {'AP', 'AP50', 'AP75'} and ap['value'].between(0, 1).all()
