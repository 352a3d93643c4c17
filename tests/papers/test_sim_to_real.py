"From the phantom to real clips: geometry, roughening, areas, agreement, and the run end to end."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import TensorImage, TensorMask
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lus_fastai.core import MaskSet
from lus_fastai.data.fan import FanError, common_fan, phantom_fan
from lus_fastai.data.sources import index_source, manifest
from lus_fastai.models.backbones import create_backbone
from lus_fastai.papers import sim_to_real
from lus_fastai.papers.sim_to_real import (
    LINES,
    TRANSBOUND,
    DomainRandomization,
    LineLoss,
    LineNet,
    SimSettings,
    agreement,
    clip_features,
    contrast_channels,
    difference_to_before,
    fine_tuned_scores,
    line_areas,
    line_look,
    line_weights,
    linear_probe_scores,
    plain_scores,
    plot_agreement,
    polar_clips,
    polar_phantom,
    randomize_patient,
    reproduce,
    scores_before,
    transbound_frames,
    tuning_patients,
)
from lus_fastai.runs import read_results
from lus_fastai.stats.bootstrap import auc, patient_interval, spearman
from lus_fastai.synth.phantom import draw_patient, phantom_clip
from lus_fastai.train import cross_validation as training
from lus_fastai.video import write_video

TRAINED = 'network, fine-tuned', 'photographs, linear probe'  # rows that learn from the experts' answers


@pytest.fixture(scope='module')
def frames():
    return polar_phantom(4, (48, 24), 2, seed=3)


def test_the_fan_of_a_phantom_is_where_its_frames_are_lit():
    p = draw_patient(5, None, 'convex')
    c, fan = phantom_clip(p, 0, 1, (96, 96)), phantom_fan(p, (96, 96))
    assert (fan.mask() != (c.fan[0] > 0)).mean() < 0.01


def test_polar_phantom(frames):
    assert (
        isinstance(frames, MaskSet)
        and frames.names == LINES
        and len(frames) == 8
        and frames.images.shape == (8, 48, 24)
    )
    again = polar_phantom(4, (48, 24), 2, seed=3)
    assert (frames.images == again.images).all() and (frames.masks == again.masks).all()
    assert (
        polar_phantom(2, (48, 24), 2, seed=3).images == frames.images[:4]
    ).all()  # more patients do not change the first
    assert not (polar_phantom(2, (48, 24), 2, seed=4).images == frames.images[:4]).all()
    shown = frames.masks.any((2, 3)).reshape(4, 2, 3).any(1)
    assert (frames.table['a_lines'][::2] == shown[:, 0]).all() and (
        frames.table['b_lines'][::2] == shown[:, 1]
    ).all()


def test_vary_leaves_the_patient_and_takes_apart_what_belongs_together():
    drawn = [randomize_patient(draw_patient(i, None, 'convex'), np.random.default_rng(i)) for i in range(300)]
    assert {p.seed for p in drawn} == set(range(300)) and {p.label for p in drawn} == {'covid', 'pneumonia'}
    a, b = np.array([(p.alines, p.blines) for p in drawn]).T
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.2
    assert randomize_patient(draw_patient(1, None, 'convex'), np.random.default_rng(1)) == randomize_patient(
        draw_patient(1, None, 'convex'), np.random.default_rng(1)
    )
    with pytest.raises(ValueError, match='linear probe'):
        phantom_fan(draw_patient(1, None, 'linear'))


def test_b_lines_stand_upright_and_a_lines_lie():
    m = polar_phantom(12, (48, 24), 1, seed=1).masks
    for k, tall in ((0, False), (1, True)):
        _height, _width = m[:, k].any(2).sum(1), m[:, k].any(1).sum(1)
        seen = m[:, k].any((1, 2))
        run = np.array([x.sum(0).max() for x in m[seen, k]]), np.array([x.sum(1).max() for x in m[seen, k]])
        assert seen.any() and (run[0].mean() > 20) == tall


def test_roughen_moves_images_and_masks_alike(frames):
    x, y = (
        TensorImage(torch.from_numpy(frames.images[:, None] / 255.0).float()),
        TensorMask(torch.from_numpy(frames.masks).float()),
    )
    tfm = DomainRandomization()

    def run(seed):
        torch.manual_seed(seed)
        return tfm((x.clone(), y.clone()), split_idx=0)

    (a, p), (b, q), (c, _) = run(1), run(1), run(2)
    assert torch.equal(a, b) and torch.equal(p, q) and not torch.equal(a, c)
    assert a.shape == x.shape and p.shape == y.shape and 0 <= a.min() and a.max() <= 1
    for i in range(len(x)):  # each mask is a part of the true one, or of its mirror image
        assert any((torch.Tensor(p[i]) <= z).all() for z in (torch.Tensor(y[i]), torch.Tensor(y[i]).flip(-1)))
    dark = TensorImage(torch.zeros_like(x))
    assert torch.Tensor(tfm((dark, y), split_idx=0)[0]).max() == 0  # outside the screen stays black
    assert torch.equal(tfm((x, y), split_idx=1)[0], x)  # only training batches


def test_gain_cancels(frames):
    x = torch.from_numpy(frames.images[:, None] / 255.0).float()
    a, b = contrast_channels(x * 0.9), contrast_channels(x * 0.6)
    assert a.shape == (8, 3, 48, 24) and (a - b).abs().mean() < 0.1 * a.abs().mean()
    assert torch.isfinite(contrast_channels(torch.zeros(1, 1, 48, 24))).all()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_areas_are_means(n, k, seed):
    p = np.random.default_rng(seed).random((n, k, 3, 4, 5)).astype(np.float32)
    out = line_areas(p)
    assert list(out)[:3] == list(LINES) and np.allclose(
        out[list(LINES)].to_numpy(), p.mean(4).mean(3).mean(1), atol=1e-5
    )
    assert (
        out.to_numpy().min() >= 0
        and out.to_numpy().max() <= 1
        and (out['B-lines below'] >= p[:, :, 1, -1:].mean((1, 2, 3)) - 1e-5).all()
    )


def test_areas_by_hand():
    p = np.zeros((2, 2, 3, 4, 5))
    p[1, 0, 1, :, 0] = 1  # a fifth of one of two frames
    assert (
        np.allclose(line_areas(p)['B-line'], [0, 0.1])
        and np.allclose(line_areas(p)['B-lines below'], [0, 0.2])
        and (line_areas(p)[['A-line', 'pleura', 'A-lines steady']] == 0).all().all()
    )
    p[1, :, 0, 1], p[0, 0, 0, 1] = 0.6, 0.4  # a quarter of both frames; one that is not certain
    assert np.allclose(line_areas(p)['A-lines steady'], [0, 0.25]) and np.allclose(
        line_areas(p)['A-line'], [0.05, 0.15]
    )
    for wrong in (np.zeros((2, 3, 4, 5)), np.zeros((2, 2, 4, 4, 5))):
        with pytest.raises(ValueError, match='prob is'):
            line_areas(wrong)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
@settings(max_examples=30, deadline=None)
def test_auc_is_that_of_scikit_learn(rows):
    from sklearn.metrics import roc_auc_score

    truth, score = np.array([t for t, _ in rows]), np.array([s for _, s in rows])
    if truth.all() or not truth.any():
        assert np.isnan(auc(truth, score))
    else:
        assert auc(truth, score) == pytest.approx(roc_auc_score(truth, score))


def test_spearman_is_that_of_scipy():
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(0).integers(0, 4, (2, 40))
    assert spearman(x, y) == pytest.approx(spearmanr(x, y)[0]) and np.isnan(spearman([1, 1], [1, 2]))
    with pytest.raises(ValueError, match='inconsistent'):
        auc([0, 1], [1])


def test_intervals_are_over_patients():
    rng = np.random.default_rng(0)
    truth, score = np.tile([0, 1], 50), rng.normal(size=100) + np.tile([0, 1], 50)
    many, few = (patient_interval(auc, truth, score, np.arange(100) // n, 300) for n in (1, 20))
    assert many[0] == few[0] == auc(truth, score) and many[1] < many[0] < many[2]
    assert patient_interval(auc, truth, score, np.arange(100) // 20, 300) == few
    assert np.isnan(patient_interval(auc, truth, score, np.zeros(100))[1:]).all()
    copies = patient_interval(auc, np.tile(truth, 4), np.tile(score, 4), np.tile(np.arange(100), 4), 300)
    assert copies[2] - copies[1] == pytest.approx(
        many[2] - many[1]
    )  # more clips of the same patients make nothing surer


def test_agreement_signs_and_missing_labels():
    t = pd.DataFrame(
        dict(
            patient=list('abcdef'),
            a_lines=[1, 1, 1, 0, 0, np.nan],
            b_lines=[0, 0, 0, 1, 1, 1],
            severity=[0, 0, 1, 2, 3, 3],
        )
    )
    s = pd.DataFrame(
        {
            'A-lines steady': [3, 3, 3, 1, 1, 9],
            'B-lines below': [0, 0, 1, 2, 3, 3],
            'brightness below': [0.1, 0.1, 0.1, 0.5, 0.5, 0.5],
        }
    )
    out = agreement(s, t, 50).set_index(['finding', 'score'])
    assert out.loc[('a_lines', 'network'), 'value'] == 1 and out.loc[('a_lines', 'network'), 'clips'] == 5
    assert (
        out.loc[('a_lines', 'darkness below'), 'value'] == 1
        and out.loc[('b_lines', 'brightness below'), 'value'] == 1
    )
    assert out.loc[('severity', 'network'), 'value'] == pytest.approx(1)
    with pytest.raises(ValueError, match='row per clip'):
        agreement(s.iloc[:2], t)


def test_plain_scores_see_what_they_are_named_for():
    x = np.full((4, 2, 96, 32), 20, np.uint8)
    x[1, :, :, 15:17], x[2, :, 20::16], x[3, :, 60:] = 200, 200, 100
    p = plain_scores(x)
    assert (
        p['streaks'].idxmax() == 1
        and p['repeats'].idxmax() == 2
        and p['share below'].idxmax() == 3
        and np.isfinite(plain_scores(0 * x).to_numpy()).all()
    )


def test_loss_of_lines_is_that_of_a_loop():
    rng, masks = (
        np.random.default_rng(0),
        np.random.default_rng(1).random((6, 3, 8, 5)) < [[[[0.2]], [[0.1]], [[0.5]]]],
    )
    weights = line_weights(masks)
    np.testing.assert_allclose(
        weights[:, 1] / weights[:, 0], [np.sqrt(1 / m.mean() - 1) for m in masks.swapaxes(0, 1)], rtol=1e-5
    )
    np.testing.assert_allclose(weights.mean(1), 1, rtol=1e-6)
    z, y = rng.normal(size=(2, 3, 8, 5)), masks[:2]
    entropy, dice = [], []
    for k in range(3):
        w = np.where(y[:, k], weights[k, 1], weights[k, 0])
        p = 1 / (1 + np.exp(-z[:, k]))
        entropy.append((w * -np.where(y[:, k], np.log(p), np.log(1 - p))).sum() / w.sum())
        dice.append((2 * (p * y[:, k]).sum() + 1) / (p.sum() + y[:, k].sum() + 1))
    logits = torch.tensor(z, requires_grad=True)
    loss = LineLoss(weights)(logits, torch.from_numpy(y).float())
    assert loss.item() == pytest.approx(np.mean(entropy) + 1 - np.mean(dice), rel=1e-5)
    loss.backward()
    assert (logits.grad.numpy()[y] < 0).all() and np.isfinite(
        logits.grad
    ).all()  # more of a line where one is
    none = line_weights(np.zeros((1, 3, 4, 4), bool))
    assert (none[:, 1] == 0).all() and torch.isfinite(
        LineLoss(none)(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    )


def test_agreement_is_averaged_over_trainings():
    t = pd.DataFrame(dict(patient=list('aabbcc'), b_lines=[0, 1, 0, 1, 0, 1]))
    one, two = (
        pd.DataFrame({'B-lines below': x, 'streaks': range(6)})
        for x in ([0, 1, 0, 1, 0, 1], [0, 1, 2, 1, 2, 3])
    )
    both = agreement([one, two], t, 60).set_index('score')
    alone = [agreement(x, t, 60).set_index('score') for x in (one, two)]
    assert both.loc['network', 'value'] == pytest.approx(np.mean([x.loc['network', 'value'] for x in alone]))
    assert both.loc['streaks'].equals(alone[0].loc['streaks'])  # what is not trained is as it was
    with pytest.raises(ValueError, match='got 6, 5 and 6'):
        agreement([one, two[:5]], t)


def before(values, part='test'):
    return pd.DataFrame(
        {'part': part, 'B-lines below': values, 'A-lines steady': values[::-1]}, list('abcdef')
    )


def test_difference_to_before_is_of_the_same_clips():
    clips = pd.DataFrame(
        dict(
            clip=list('fedcba'),
            patient=list('zzyyxx'),
            part='test',
            b_lines=[1, 0, 1, 0, 1, 0],
            a_lines=[1.0, 0, 1, 0, np.nan, np.nan],
        )
    )
    x = np.arange(6.0)
    same = [pd.DataFrame({'B-lines below': x[::-1], 'A-lines steady': x})]  # the clips are in another order
    got = difference_to_before(same, clips, [before(x)], 50)
    assert got['b_lines'][:4] == got['a_lines'][:4] == (0, 0, 0, 1)
    better = [pd.DataFrame({'B-lines below': clips['b_lines'], 'A-lines steady': x})] * 2
    got = difference_to_before(better, clips, [before(x)], 50)
    expected = 1 - auc(clips['b_lines'], x[::-1])
    assert got['b_lines'].value == pytest.approx(expected) and got['a_lines'].value == 0
    assert difference_to_before(same, clips[1:], [before(x)]) == {}  # one clip could not be read
    assert difference_to_before(same, clips.assign(part='held out'), [before(x)]) == {}


def test_scores_before_are_of_all_clips_of_the_collection():
    trainings, listed = scores_before(), manifest('blues')
    names = {Path(p).stem for p in listed['path'] if p.endswith('.mp4')}
    assert len(trainings) == 3
    for t in trainings:
        assert (
            t.index.is_unique
            and set(t.index) <= names
            and t['part'].value_counts().to_dict() == dict(test=156, tuning=85)
        )
        assert (
            ((t[['B-lines below', 'A-lines steady']] >= 0) & (t[['B-lines below', 'A-lines steady']] <= 1))
            .all()
            .all()
        )


def test_a_look_at_masks_by_hand():
    masks, prob = np.zeros((3, 2, 4, 5), bool), np.zeros((3, 2, 4, 5))
    masks[0, 0, 0], masks[1, 0, 2:] = (
        True,
        True,
    )  # nothing of the first kind in the third frame, none of the second
    prob[0, 0, 0, 1:] = 0.7
    prob[1, 0, 1, 1] = 0.9  # beside the mask
    inside = np.ones((4, 5), bool)
    inside[:, 0] = False
    got = line_look(prob, masks, inside)
    assert got['frames'].tolist() == [2, 0] and got['pointing'].tolist() == [0.5, 0]
    assert got['Dice'].tolist() == [0.5, 0] and got['chance'].tolist() == [(4 / 16 + 8 / 16) / 2, 0]
    prob[0, 0, 3, 0] = 1  # outside the fan nothing counts
    assert all((a == b).all() for a, b in zip(got.values(), line_look(prob, masks, inside).values()))


def test_frames_of_transbound_are_unrolled_with_their_masks(tmp_path):
    p = draw_patient(5, None, 'convex')
    clip, fan = phantom_clip(p, 0, 1, (128, 128)), phantom_fan(p, (128, 128))
    depth = fan.coordinates(np.arange(128) + 0.5, np.arange(128)[:, None] + 0.5)[0]
    masks = fan.mask() & (np.abs(depth - 0.5) < 0.03)
    for top, x in (('images', clip.frames[0]), ('masks', masks)):
        (tmp_path / 'transbound' / top).mkdir(parents=True)
        Image.fromarray(x).save(tmp_path / 'transbound' / top / '1.png')
    frames, drawn, inside = transbound_frames(index_source('transbound', tmp_path), (48, 24))
    assert frames.shape == (1, 48, 24) and drawn.shape == (1, 3, 48, 24) and inside.shape == (48, 24)
    assert (drawn[:, 2] == drawn[:, :2].any(1)).all() and not drawn[0, 0].any() and inside.mean() > 0.7
    middle = np.flatnonzero(drawn[0, 1].any(1))
    assert 20 <= middle.min() <= middle.max() <= 28  # one line, half-way down


def test_tuning_patients_are_a_seeded_part():
    t = pd.DataFrame(dict(patient=[f'p{i}' for i in range(12) for _ in range(i + 1)]))
    a = tuning_patients(t, 4)
    assert t[a == 'tuning'].patient.nunique() == 4 and not set(t[a == 'tuning'].patient) & set(
        t[a == 'test'].patient
    )
    assert (a == tuning_patients(t.sample(frac=1, random_state=0), 4).sort_index()).all() and (
        a != tuning_patients(t, 4, seed=1)
    ).any()
    for n in (0, 12):
        with pytest.raises(ValueError, match='of 12 patients'):
            tuning_patients(t, n)


def test_clips_that_cannot_be_read_are_left_out(tmp_path):
    p = draw_patient(5, None, 'convex')
    c = phantom_clip(p, 0, 3, (128, 128))
    write_video(tmp_path / 'good.mp4', c.frames, c.rate)
    (tmp_path / 'bad.mp4').write_bytes(b'no film')
    t = pd.DataFrame(dict(path=[str(tmp_path / 'bad.mp4'), str(tmp_path / 'good.mp4')], patient=['a', 'b']))
    fan = common_fan(t)
    assert fan.kind == 'convex' and fan.size == (128, 128)
    x, left, bad = polar_clips(t, fan, (48, 24), frames=5, rate=100)
    assert x.shape == (1, 5, 48, 24) and left['patient'].tolist() == ['b'] and bad[0][0].endswith('bad.mp4')
    assert (x[0, 2] == x[0, 4]).all()  # a short clip repeats its last frame
    with pytest.raises(FanError, match='no convex fan'):
        common_fan(t[:1])


def test_from_end_to_end_on_the_phantom(tmp_path):
    s = SimSettings(size=(48, 16), clips=10, width=2, epochs=1, bs=8, trainings=2, held_out=6)
    report = reproduce('phantom', out=tmp_path / 'a', cache=tmp_path / 'h', settings=s)
    first = read_results(tmp_path / 'a' / 'sim-to-real-phantom.json')
    reproduce('phantom', out=tmp_path / 'b', cache=tmp_path / 'other', settings=s)
    second = read_results(tmp_path / 'b' / 'sim-to-real-phantom.json')
    assert (
        first['cells'] == second['cells']
        and list(first['protocols']) == ['held out']
        and first['protocols']['held out']['patients'] == 6
    )
    assert {c['table'] for c in first['cells']} == {
        'B-lines, AUC',
        'A-lines, AUC',
        'severity, Spearman',
        'area by severity',
        'each training',
    }
    assert first['seeds'] == [0, 1] and {
        c['row'] for c in first['cells'] if c['table'] == 'each training'
    } == {'seed 0', 'seed 1'}

    def value(table, row, column):
        return next(
            c['ours'] for c in first['cells'] if (c['table'], c['row'], c['column']) == (table, row, column)
        )

    each = [value('each training', f'seed {k}', 'B-lines, AUC') for k in (0, 1)]
    assert value('B-lines, AUC', 'network', 'value') == pytest.approx(np.mean(each))
    page = report.read_text()
    assert 'Agreement with experts' in page and str(tmp_path) not in page
    with pytest.raises(ValueError, match="'phantom' or 'real'"):
        reproduce('blues')
    with pytest.raises(ValueError, match='no table'):
        plot_agreement(first, 'C-lines')


def test_from_end_to_end_on_a_folder_of_clips(tmp_path, capsys):
    folder, rows = tmp_path / 'data', []
    (folder / 'blues' / 'lus_videos').mkdir(parents=True)
    for i in range(1, 7):
        for k, point in enumerate(('L1', 'R1')):
            name = f'patient_{i}_{point}.mp4'
            write_video(
                folder / 'blues' / 'lus_videos' / name,
                phantom_clip(draw_patient(i, None, 'convex'), k, 4, (160, 160)).frames,
                4,
            )
            rows.append(
                (name, i % 4, k if i < 4 else '', (i + k) % 2)
            )  # A-lines: answers for three patients only
    (folder / 'blues' / 'lus_videos' / 'patient_6_R1.mp4').write_bytes(b'no video')
    pd.DataFrame(rows, columns=['video_file', 'Severity Score', 'A-lines', 'B-lines']).to_csv(
        folder / 'blues' / 'severity.csv', index=False
    )
    pd.DataFrame(dict(patient_id=range(1, 7), cov_test=[1, 0] * 3)).to_csv(
        folder / 'blues' / 'clinical_variables.csv', index=False
    )
    s = SimSettings(size=(48, 16), clips=10, width=2, epochs=1, bs=8, trainings=1, tuning=2, n_frames=2)
    for i in (1, 2):  # frames with polygons beside the clips
        frame = phantom_clip(draw_patient(i, None, 'convex'), 0, 1, (128, 128)).frames[0]
        polygons = np.zeros((128, 128), bool)
        polygons[40:44, 50:80] = polygons[80:86, 50:80] = True
        for top, x in (('images', frame), ('masks', polygons)):
            (folder / 'transbound' / top).mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(folder / 'transbound' / top / f'{i}.png')

    def run(**kw):
        return read_results(
            reproduce(
                'real', out=tmp_path / 'out', cache=tmp_path / 'home', settings=s, folder=folder, **kw
            ).with_suffix('.json')
        )

    whole, said = run(), capsys.readouterr().out
    assert 'patient_6_R1.mp4' in said and 'A-lines: answers for 3 patient(s)' in said
    looked = whole['protocols'].pop('TransBound')
    assert looked['frames'] == 2 and 'not a proof' in looked['description']
    look = {(c['row'], c['column']): c for c in whole['cells'] if c['table'] == 'TransBound'}
    assert {r for r, _ in look} == set(TRANSBOUND) and all(c['interval'] is None for c in look.values())
    assert 0 < look['pleura', 'chance']['ours'] < look['either', 'chance']['ours'] < 0.1
    assert {k: v['patients'] for k, v in whole['protocols'].items()} == dict(tuning=2, test=4) and sum(
        v['clips'] for v in whole['protocols'].values()
    ) == 11
    assert (
        {c['table'] for c in whole['cells'] if c['row'] == 'network, fine-tuned'}
        == {c['table'] for c in whole['cells'] if c['row'] == 'photographs, linear probe'}
        == {'B-lines, AUC'}
    )
    shown = run(test=False)  # while one tunes: not a word of the others
    assert list(shown['protocols']) == ['tuning'] and not any(c['row'] in TRAINED for c in shown['cells'])

    def same(r):
        return [c for c in r['cells'] if c['protocol'] == 'tuning' and c['row'] not in TRAINED]

    assert same(shown) == same(whole)


def test_real_clips_need_a_folder(monkeypatch):
    monkeypatch.delenv('LUS_DATA', raising=False)
    with pytest.raises(ValueError, match='LUS_DATA'):
        reproduce('real')


def test_fine_tuned_scores_come_from_networks_that_have_not_seen_the_patient(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 90, (13, 2, 32, 16)).astype(np.uint8)
    table = pd.DataFrame(dict(patient=[f'p{i // 2}' for i in range(13)], b_lines=[0.0, 1.0] * 6 + [np.nan]))
    frames[1::2, :, :, 6:10] = 250  # a column of light where the answer is yes
    seen, real = [], sim_to_real.cross_validate
    monkeypatch.setattr(
        sim_to_real,
        'cross_validate',
        lambda build, folds, settings, **kw: (
            seen.append(folds.prove().fold.groupby(folds.table['patient']).nunique().max())
            or real(build, folds, settings, **kw)
        ),
    )
    torch.manual_seed(0)
    lines = LineNet(4)
    before = [p.clone() for p in lines.parameters()]
    got = fine_tuned_scores(lines, frames, table, 'b_lines', tmp_path / 'a', folds=3, epochs=20, lr=0.02)
    assert seen == [1] and np.isnan(got[12]) and auc(table.b_lines[:12], got[:12]) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, lines.parameters()))  # what it starts from stays
    np.testing.assert_array_equal(
        fine_tuned_scores(lines, frames, table, 'b_lines', tmp_path / 'b', folds=3, epochs=20, lr=0.02), got
    )
    monkeypatch.setattr(training, 'fit_resumable', None)
    np.testing.assert_array_equal(
        fine_tuned_scores(lines, frames, table, 'b_lines', tmp_path / 'a', folds=3, epochs=20, lr=0.02), got
    )  # a finished run is read, not repeated


def test_linear_probe_scores_come_from_a_regression_that_has_not_seen_the_patient():
    rng = np.random.default_rng(0)
    answers, patients = rng.integers(0, 2, 60).astype(float), np.repeat([f'p{i}' for i in range(15)], 4)
    table = pd.DataFrame(dict(patient=patients, b_lines=answers))
    known = np.concatenate([rng.normal(size=(60, 5)), answers[:, None]], 1)
    got = linear_probe_scores(known, table, 'b_lines')
    assert auc(answers, got) > 0.95
    table.loc[7, 'b_lines'] = np.nan  # no answer for this one
    got = linear_probe_scores(known, table, 'b_lines')
    assert np.isnan(got[7]) and np.isfinite(np.delete(got, 7)).all()
    whose = pd.DataFrame(dict(patient=patients, b_lines=np.repeat(rng.permutation([0.0, 1.0] * 8)[:15], 4)))
    knows = (patients[:, None] == np.unique(patients)).astype(
        float
    )  # who it is, and the answer depends on nothing else: of others nothing can be said
    got = linear_probe_scores(knows, whose, 'b_lines')
    for f in np.unique(got.round(9)):
        assert whose.patient[got.round(9) == f].nunique() >= 3  # all patients of a fold look the same
    assert (
        linear_probe_scores(known, whose.assign(b_lines=1.0), 'b_lines') == 0
    ).all()  # no 'no' to learn from


def test_a_clips_features_are_the_means_of_its_frames(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3, 2, 64, 64)).astype(np.uint8)
    x = clip_features(frames, tmp_path / 'x.npz')
    assert x.shape == (3, 1280) and x.dtype == np.float32
    net = create_backbone('tf_efficientnet_lite0', 3, weights='imagenet').eval()
    with torch.no_grad():
        direct = net((torch.from_numpy(frames[1]).float()[:, None].expand(-1, 3, -1, -1) / 255 - 0.5) / 0.5)
    np.testing.assert_allclose(x[1], direct.mean(0).numpy(), atol=1e-5)
    np.testing.assert_array_equal(clip_features(frames, tmp_path / 'x.npz'), x)
    same = clip_features(np.repeat(frames[:, :1], 2, 1))
    np.testing.assert_allclose(same[1], clip_features(frames[:, :1])[1], atol=1e-5)


def test_without_imagenet_weights_there_are_no_features(monkeypatch, tmp_path, capsys):
    from types import SimpleNamespace

    monkeypatch.setattr(sim_to_real, 'create_backbone', lambda *a, **kw: SimpleNamespace(pretrained=False))
    assert clip_features(np.zeros((1, 1, 32, 32), np.uint8)) is None
    out = reproduce(
        'phantom',
        out=tmp_path,
        cache=tmp_path,
        settings=SimSettings(clips=10, width=2, epochs=1, trainings=1, held_out=8),
    )
    assert capsys.readouterr().out.count("pip install 'lus_fastai[imagenet]'") == 2
    assert {c['row'] for c in read_results(out.with_suffix('.json'))['cells'] if c['row'] in TRAINED} == {
        'network, fine-tuned'
    }
