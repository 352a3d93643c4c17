"Speckle filters: against PyWavelets and scikit-image, and on images that no filter may harm."

from dataclasses import replace

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_wavelet

from lus_fastai.data import despeckling as module
from lus_fastai.data.despeckling import DESPECKLE, contrast_to_noise, despeckle, psnr, speckle_index, ssim
from lus_fastai.synth.phantom import draw_patient, phantom_clip

each_method = pytest.mark.parametrize('method', DESPECKLE)


@pytest.fixture(scope='module')
def frames():
    return phantom_clip(
        replace(draw_patient(2, 'covid', 'linear'), smoothing=0.0, persistence=0.0), 0, 3, (96, 80)
    ).frames  # no machine has smoothed them


def by_loop(x, rule, levels):
    "One image (h, w) float64, by PyWavelets, with everything spelled out."
    coeffs = pywt.wavedec2(np.log1p(x), 'db4', 'symmetric', levels)
    size = np.sort(abs(coeffs[-1][2]).ravel())
    size = size[size > 1e-6]
    sigma = size[len(size) // 2] / 0.6744897501960817 if len(size) else 0.0
    out = [coeffs[0]]
    for bands in coeffs[1:]:
        t = [
            sigma**2 / np.sqrt(max((b**2).mean() - sigma**2, 1e-12))
            if rule == 'bayes'
            else sigma * np.sqrt(2 * np.log(x.size))
            for b in bands
        ]
        out.append(tuple(np.sign(b) * np.maximum(abs(b) - t, 0) for b, t in zip(bands, t)))
    return np.clip(np.expm1(pywt.waverec2(out, 'db4', 'symmetric'))[: x.shape[0], : x.shape[1]], 0, 1)


@pytest.mark.parametrize('rule', ['bayes', 'universal'])
@pytest.mark.parametrize('size', [(96, 80), (75, 61)])
def test_wavelet_is_what_a_loop_by_pywavelets_gives(frames, rule, size):
    x = np.random.default_rng(0).random((3, *size)) * 0.3 + frames[:, : size[0], : size[1]] / 255 * 0.7
    ours = despeckle(x, threshold=rule)
    assert ours.dtype == np.float64 and np.allclose(ours, [by_loop(i, rule, 3) for i in x], atol=2e-5)
    assert np.abs(ours - x).max() > 0.01


def test_wavelet_is_scikit_images(frames):
    x = np.random.default_rng(1).random((2, 64, 64)) * 0.5 + 0.2
    theirs = [
        np.expm1(
            denoise_wavelet(np.log1p(i), wavelet='db4', method='BayesShrink', mode='soft', wavelet_levels=3)
        )
        for i in x
    ]
    assert np.allclose(despeckle(x), theirs, atol=2e-4)  # medians of an even number


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_transform_is_inverted_and_is_pywavelets(h, w, n):
    x = torch.from_numpy(np.random.default_rng(h * 41 + w).random((n, h, w)))
    p, q = module._split(x)
    smooth, detail = pywt.dwt(x.numpy(), 'db4', 'symmetric', axis=1)
    assert np.allclose(p * module._SCALE, smooth) and np.allclose(q * module._SCALE, detail)
    assert torch.allclose(module._merge(p, q, h) * module._SCALE**2, x)


@pytest.mark.parametrize('levels', [1, 2, 3, 5])
def test_no_threshold_gives_the_image_back(monkeypatch, levels):
    monkeypatch.setattr(module, '_noise', lambda band: torch.zeros(len(band), 1, 1))
    x = torch.rand(2, 230, 226)
    assert torch.allclose(module.wavelet_filter(x, levels=levels), x, atol=2e-5)


@each_method
@pytest.mark.parametrize('grey', [0, 1, 77, 255])
def test_a_plain_image_stays(method, grey):
    assert (despeckle(np.full((2, 30, 41), grey, np.uint8), method) == grey).all()


@each_method
def test_what_goes_in_comes_out(frames, method):
    many = despeckle(frames, method)
    assert many.dtype == np.uint8 and many.shape == frames.shape and (many != frames).any()
    for i in range(3):
        assert np.array_equal(
            despeckle(frames[i], method), many[i]
        )  # an image does not depend on its neighbours
    floats = despeckle((frames / 255).astype(np.float32), method)
    assert (
        floats.dtype == np.float32
        and abs(floats * 255 - many).max() <= 0.51
        and 0 <= floats.min()
        and floats.max() <= 1
    )
    tensor = despeckle(torch.from_numpy(frames.copy()), method)
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), many)
    assert np.array_equal(despeckle(np.repeat(frames[:1], 17, 0), method)[16], many[0])  # more than one chunk


@each_method
@settings(max_examples=8, deadline=None)
@given(h=st.integers(1, 20), w=st.integers(1, 20), seed=st.integers(0, 9))
def test_any_size_stays_within_range(method, h, w, seed):
    x = np.random.default_rng(seed).random((h, w), dtype=np.float32)
    if method == 'nlm' and min(h, w) < 8:
        return  # its patches want some room
    y = despeckle(x, method)
    assert y.shape == x.shape and np.isfinite(y).all() and y.min() >= 0 and y.max() <= 1


def test_the_input_is_not_touched(frames):
    x = frames / np.float32(255)
    before = x.copy()
    for method in DESPECKLE:
        despeckle(x, method)
    assert np.array_equal(x, before)


@each_method
def test_speckle_goes_and_edges_stay(method):
    rng = np.random.default_rng(2)
    clean = np.where(np.arange(64) < 32, 0.2, 0.6) + np.zeros((64, 1))
    x = np.clip(clean * (1 + 0.2 * rng.standard_normal((64, 64))), 0, 1)
    y, left = despeckle(x, method), np.arange(64) < 32
    assert psnr(y, clean) > psnr(x, clean) + 2 and speckle_index(
        y, left & np.ones((64, 1), bool)
    ) < speckle_index(x, left & np.ones((64, 1), bool))
    assert abs(y[:, :26].mean() - 0.2) < 0.02 and abs(y[:, 38:].mean() - 0.6) < 0.03


def test_black_corners_are_no_noise():
    rng = np.random.default_rng(3)
    x = rng.random((64, 64)) * 0.4 + 0.3
    half = np.zeros((64, 160))
    half[:, :64] = x
    assert (
        abs(despeckle(half)[8:56, 8:48] - half[8:56, 8:48]).mean()
        > 0.5 * abs(despeckle(x)[8:56, 8:48] - x[8:56, 8:48]).mean()
    )


@pytest.mark.parametrize(
    'x, method, kw, error, words',
    [
        (np.zeros((2, 3, 8, 8)), 'wavelet', {}, ValueError, r'\(2, 3, 8, 8\)'),
        (np.zeros((0, 8, 8)), 'wavelet', {}, ValueError, 'shape'),
        (np.zeros((8, 8), int), 'lee', {}, ValueError, 'uint8 or float'),
        (np.full((8, 8), np.nan), 'tv', {}, ValueError, 'NaN'),
        (np.full((8, 8), 128.0), 'wavelet', {}, ValueError, '128'),
        (torch.full((8, 8), -0.1), 'wavelet', {}, ValueError, '-0.1'),
        (np.zeros((8, 8)), 'wiener', {}, ValueError, 'wavelet, median'),
        (np.zeros((8, 8)), 'wavelet', dict(threshold='sure'), ValueError, 'universal'),
        (np.zeros((8, 8)), 'wavelet', dict(levels=0), ValueError, 'levels'),
        (np.zeros((8, 8)), 'median', dict(size=4), ValueError, 'odd'),
        (np.zeros((8, 8)), 'srad', dict(rate=0.3), ValueError, 'rate'),
        (np.zeros((8, 8)), 'srad', dict(rate=0), ValueError, 'rate'),
        (np.zeros((8, 8)), 'median', dict(levels=3), TypeError, 'levels'),
    ],
)
def test_bad_input_is_named(x, method, kw, error, words):
    with pytest.raises(error, match=words):
        despeckle(x, method, **kw)


def test_scores_are_scikit_images(frames):
    quiet = despeckle(frames, 'median')
    for i in range(3):
        assert np.isclose(psnr(quiet, frames)[i], peak_signal_noise_ratio(frames[i], quiet[i]))
        assert np.isclose(ssim(quiet, frames)[i], structural_similarity(frames[i], quiet[i]))
    assert psnr(frames[0], frames[0]) == np.inf and ssim(frames[0], frames[0] / 255) == pytest.approx(1)


def test_contrast_to_noise_by_hand():
    x = np.array([[0.2, 0.4, 0.6, 0.6]])
    inside = np.array([[True, True, False, False]])
    assert contrast_to_noise(x, inside, ~inside) == pytest.approx(0.3 / 0.1)
    assert contrast_to_noise(x * 0, inside, ~inside) == 0
    with pytest.raises(ValueError, match='outside'):
        contrast_to_noise(x, inside, ~inside & inside)
    with pytest.raises(ValueError, match='bool'):
        contrast_to_noise(x, inside.astype(int), ~inside)


@pytest.mark.gpu
def test_the_wavelet_runs_where_the_tensor_is(frames):
    x = torch.from_numpy(frames.copy())
    y = despeckle(x.cuda())
    assert y.is_cuda and (y.cpu().int() - despeckle(x).int()).abs().max() <= 1
