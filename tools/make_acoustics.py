"""Reference numbers for the acoustics of the phantom, from k-Wave and PyMUST

    pip install k-wave-python pymust
    OMP_NUM_THREADS=1 python tools/make_acoustics.py data/acoustics.json

Two independent simulators of other people say where the echoes of the pleura come from, how strong they are,
and how wide a point becomes in an image. The tests compare the phantom with the numbers in the file and need
neither simulator. Units are mm, MHz, microseconds and dB unless a name says otherwise.
"""

import json
import platform
import sys
import time
import urllib.request
import warnings
from datetime import date
from importlib.metadata import version

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq, least_squares
from scipy.signal import hilbert


def _offline(*args, **kwargs):
    "Instead of a download: k-Wave fetches compiled solvers when it is imported, which are not used here."
    raise TimeoutError('no download')


def import_kwave():
    "The parts of k-Wave that are used, imported without a download."
    urllib.request.urlretrieve = _offline
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from kwave.kgrid import kWaveGrid
        from kwave.kmedium import kWaveMedium
        from kwave.ksensor import kSensor
        from kwave.ksource import kSource
        from kwave.kspaceFirstOrder import kspaceFirstOrder
    return kWaveGrid, kWaveMedium, kSensor, kSource, kspaceFirstOrder


# Part 1: echoes between the pleura and the probe, one-dimensional

SOUND = 1540.0  # m/s in soft tissue
STEP = 0.0125  # mm, grid
BACKING, LUNG = 4.0, 6.0  # mm of probe and of lung in the grid
ORDERS = 4
MEDIA = dict(  # speed of sound in m/s, density in kg/m3
    probe=(1540.0, 3000.0), tissue=(1540.0, 1000.0), lung=(600.0, 150.0)
)


def reflection(media, other):
    "Reflection coefficient of pressure for a wave in tissue that meets another medium."
    (c1, r1), (c2, r2) = media['tissue'], media[other]
    return (c2 * r2 - c1 * r1) / (c2 * r2 + c1 * r1)


def pulse(f, cycles, dt):
    "A Gaussian pulse of `cycles` periods within half its height, sampled every dt; and the time of its peak."
    sigma = cycles / f / 2.355
    t = np.arange(0, 8 * sigma, dt)
    return np.exp(-0.5 * ((t - 4 * sigma) / sigma) ** 2) * np.cos(2 * np.pi * f * (t - 4 * sigma)), 4 * sigma


def simulate_wall(media, depth, f, cycles, alpha, power):
    "Pressure at the face of the probe over time: t in microseconds from the peak of the pulse, and p."
    Grid, Medium, Sensor, Source, solve = import_kwave()
    face, wall, n = (round(x / STEP) for x in (BACKING, depth, BACKING + depth + LUNG))
    layer = np.repeat(['probe', 'tissue', 'lung'], [face, wall, n - face - wall])
    c, rho = (np.array([media[x][i] for x in layer]) for i in (0, 1))
    grid = Grid([n], [STEP * 1e-3])
    dt = 0.2 * STEP * 1e-3 / SOUND
    grid.setTime(int((2 * (ORDERS + 0.6) * depth * 1e-3 / SOUND + 16e-6 / f) / dt), dt)
    medium = Medium(sound_speed=c, density=rho)
    if alpha:
        medium.alpha_coeff, medium.alpha_power = np.where(layer == 'tissue', alpha, 0.0), power
        medium.alpha_mode = 'no_dispersion'
    at = np.zeros(n)
    at[face] = 1
    source = Source()
    wave, peak = pulse(f, cycles, dt * 1e6)
    source.p_mask, source.p = at, wave[None]
    p = solve(grid, medium, source, Sensor(mask=at, record=['p']), backend='python', quiet=True)['p']
    p = np.asarray(p).reshape(-1)
    return np.arange(len(p)) * dt * 1e6 - peak, p


def tone(t, p, f, centre, half):
    "Amplitude at frequency f of the part of p within `half` microseconds of `centre`."
    near = abs(t - centre) < half
    window = np.cos(np.pi / 2 * (t[near] - centre) / half) ** 2
    return abs((p[near] * window * np.exp(-2j * np.pi * f * t[near])).sum())


def peak_at(t, envelope, centre, half):
    "Index, time and height of the highest sample around a time; the time is refined by a parabola."
    near = np.flatnonzero(abs(t - centre) < half)
    i = near[envelope[near].argmax()]
    a, b, c = envelope[i - 1 : i + 2]
    return t[i] + (t[1] - t[0]) * 0.5 * (a - c) / (a - 2 * b + c), b


def under_first(x):
    "Levels in dB over the first."
    return [round(float(20 * np.log10(y / x[0])), 3) for y in x]


def echoes(depth, f, cycles, alpha=0.0, power=1.0, **other):
    "Places (multiples of the depth) and levels (dB over the first) of the pleura's echoes, with the law."
    media = dict(MEDIA, **other)
    t, p = simulate_wall(media, depth, f, cycles, alpha, power)
    envelope, period = abs(hilbert(p)), 2 * depth / SOUND * 1e3
    found = [peak_at(t, envelope, m * period, 0.4 * period) for m in range(1, ORDERS + 1)]
    tones = [tone(t, p, f, at, 0.45 * period) for at, _ in found]
    pleura, probe = reflection(media, 'lung'), reflection(media, 'probe')
    bounce, loss = 20 * np.log10(abs(pleura * probe)), 2 * alpha * f**power * depth / 10
    level = under_first(tones)
    return dict(
        depth_mm=depth,
        frequency_mhz=f,
        cycles=cycles,
        alpha_db_cm_mhz=alpha,
        power=power if alpha else None,
        reflection_pleura=round(pleura, 4),
        reflection_probe=round(probe, 4),
        multiples_of_depth=[round(float(at / period), 4) for at, _ in found],
        level_db_envelope=under_first([height for _, height in found]),
        level_db_at_frequency=level,
        law_db=[round(float(m * (bounce - loss)), 3) for m in range(ORDERS)],
        per_order_db=dict(
            measured=round(level[-1] / (ORDERS - 1), 3),
            law=round(float(bounce - loss), 3),
            of_reflections=round(float(bounce), 3),
            of_absorption=round(float(-loss), 3),
        ),
    )


def worst(runs, key):
    "Largest difference between measured levels and the law, dB per order."
    return round(
        max(abs(a - b) / m for r in runs for m, a, b in zip((1, 2, 3), r[key][1:], r['law_db'][1:])), 3
    )


def kwave_part():
    "All runs of k-Wave."
    runs = [echoes(d, 3.0, 2) for d in (12.0, 20.0)]
    runs += [
        echoes(12.0, 3.0, 2, lung=(340.0, 300.0), probe=(1540.0, 1500.0)),
        echoes(12.0, 3.0, 2, lung=(600.0, 60.0)),
    ]
    runs += [echoes(d, 3.0, 6, 0.5) for d in (12.0, 20.0)]
    runs += [echoes(12.0, 3.0, 6, 1.0), echoes(12.0, 2.0, 6, 0.5), echoes(12.0, 4.0, 6, 0.5)]
    near, far = runs[4], runs[5]
    slope = (far['per_order_db']['measured'] - near['per_order_db']['measured']) / (
        far['depth_mm'] - near['depth_mm']
    )
    return dict(
        about='1-D; the pulse starts and is recorded at the face of the probe; levels in dB over echo 1',
        law='dB per order: 20 log10(R_pleura R_probe) - 2 alpha frequency^power depth',
        media={k: dict(speed_m_s=c, density_kg_m3=r) for k, (c, r) in MEDIA.items()},
        grid_mm=STEP,
        runs=runs,
        absorption_db_per_mm=dict(
            about='from the two depths at .5 dB/cm/MHz, 3 MHz: what the interfaces do cancels',
            measured=round(slope, 4),
            law=-2 * 0.5 * 3 / 10,
        ),
        worst=dict(
            place=round(
                max(abs(x / m - 1) for r in runs for m, x in enumerate(r['multiples_of_depth'], 1)), 5
            ),
            db_per_order_at_frequency=worst(runs, 'level_db_at_frequency'),
            db_per_order_envelope=worst(runs, 'level_db_envelope'),
        ),
    )


# Part 2: the width of a point in the image

PITCH, COUNT = 1.0, 128  # elements a wavelength apart
F_TX = 3.5  # focal length over transmit aperture
BANDWIDTH = 70  # percent, 6 dB, transmit and receive together
AT = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # depth over focal length
PROBES = dict(
    linear=dict(frequency=8.0, focus=20.0, radius=None), convex=dict(frequency=3.5, focus=60.0, radius=60.0)
)
OTHERS = {  # never used for fitting
    'linear 5 MHz': dict(frequency=5.0, focus=30.0, radius=None, f_tx=2.5),
    'convex 2.6 MHz': dict(frequency=2.6, focus=40.0, radius=34.0, f_tx=3.0),
    'linear tapered': dict(frequency=8.0, focus=20.0, radius=None, taper=True),
    'convex tapered': dict(frequency=3.5, focus=60.0, radius=60.0, taper=True),
}
RECEIVE = {  # f-number of the receive aperture, which grows with depth, and its window
    'rect f/2': (2.0, 'rect'),
    'rect f/2.5': (2.5, 'rect'),
    'rect f/3': (3.0, 'rect'),
    'hann f/1.5': (1.5, 'hann'),
    'hann f/2': (2.0, 'hann'),
}


class Array:
    "A probe of PyMUST with a beam along its axis, focused at one depth."

    def __init__(self, frequency, focus, radius, f_tx=F_TX, bandwidth=BANDWIDTH, taper=False):
        import pymust

        self.wave, self.focus, self.radius, self.f = SOUND / frequency / 1e3, focus, radius, frequency
        p = self.param = pymust.utils.Param()
        p.fc, p.c, p.Nelements, p.bandwidth, p.TXnow = frequency * 1e6, SOUND, COUNT, bandwidth, 1
        p.pitch = PITCH * self.wave * 1e-3
        p.kerf, p.fs = 0.1 * p.pitch, 8 * p.fc
        p.radius = np.inf if radius is None else radius * 1e-3
        x, z, _, _ = p.getElementPositions()
        self.x, self.z = x.ravel() * 1e3, z.ravel() * 1e3
        self.top = self.z.max()  # z of the middle of the probe's face
        self.arc = (np.arange(COUNT) - (COUNT - 1) / 2) * PITCH * self.wave  # mm along the face
        self.aperture = focus / f_tx
        p.TXapodization = self.overlap(self.aperture)[None]
        if taper:  # to nothing over the outer half, which calms the ripples before the focus
            outer = np.clip(4 * abs(self.arc) / self.aperture - 1, 0, 1)
            p.TXapodization = p.TXapodization * np.cos(np.pi / 2 * outer) ** 2
        active = p.TXapodization[0] > 1e-6
        far = self.distance(0.0, focus)
        delays = (far[active].max() - far) / SOUND * 1e3  # microseconds
        self.arrival = far[active].max() / SOUND * 1e3  # when the wave is at the focus
        self.delays = np.where(active, np.maximum(delays, 0), np.nan)[None] * 1e-6

    def place(self, lateral, depth):
        "x and z (mm) of a point at a depth under the face and a lateral distance (along the arc if convex)."
        if self.radius is None:
            return lateral, depth
        angle, r = lateral / (self.radius + depth), self.radius + depth
        return r * np.sin(angle), r * np.cos(angle) - self.radius + self.top

    def distance(self, lateral, depth):
        "From every element to a point, mm."
        x, z = self.place(lateral, depth)
        return np.hypot(self.x - x, self.z - z)

    def overlap(self, length):
        "Share of every element that is within an aperture, so that apertures need not be whole elements."
        return np.clip((length / 2 - abs(self.arc)) / (PITCH * self.wave) + 0.5, 0, 1)

    def window(self, depth, f_rx, shape):
        "Weight of every element on receive, and the f-number that the length of the probe allows."
        length = min(depth / f_rx, COUNT * PITCH * self.wave)
        weight = self.overlap(length)
        if shape == 'hann':
            weight = weight * np.cos(np.pi * np.clip(self.arc / length, -0.5, 0.5)) ** 2
        return weight, depth / length

    def record(self, lateral, depth):
        "Frequencies in MHz and the conjugate spectrum of what each element receives from one scatterer."
        import pymust

        x, z = self.place(lateral, depth)
        xz1 = (np.array([[v]]) for v in (x * 1e-3, z * 1e-3, 1.0))
        _, s = pymust.simus(*xz1, self.delays.copy(), self.param.copy(), pymust.utils.Options())
        return np.linspace(0, 2 * self.f, len(s)), s.conj()

    def beamform(self, record, depth, weight, tau):
        "Envelope on the axis at times tau (microseconds) around the depth: delay and sum, exact delays."
        f, s = record
        t0 = self.arrival + (depth - self.focus) / SOUND * 1e3
        delay = t0 + self.distance(0.0, depth) / SOUND * 1e3
        keep = weight > 0
        beam = (weight[keep] * s[:, keep] * np.exp(2j * np.pi * f[:, None] * delay[keep])).sum(1)
        return abs(np.exp(2j * np.pi * tau[:, None] * f) @ beam), (f, abs(beam))


def half_width(x, y, level=0.5):
    "Where a profile that starts at x=0 first falls to `level` of its start."
    y = CubicSpline(x, np.asarray(y) / y[0])
    fine = np.linspace(x[0], x[-1], 2000)
    below = np.flatnonzero(y(fine) < level)
    if not len(below):
        raise ValueError('the profile is too short')
    i = below[0]
    return brentq(lambda u: float(y(u)) - level, fine[i - 1], fine[i])


def full_width(x, y, level=0.5):
    "Full width around the maximum of a profile, and the place of the maximum."
    i = int(np.argmax(y))
    up, down = half_width(x[i:] - x[i], y[i:], level), half_width(x[i] - x[i::-1], y[i::-1], level)
    return up + down, x[i]


def transmit_width(probe, depth):
    "Full width of the transmitted beam at -6 dB (RMS pressure), wavelengths."
    import pymust

    side = np.linspace(0, 2.0 * probe.wave * F_TX + 0.75 * probe.aperture, 121)
    xz = [np.array(v)[None] * 1e-3 for v in zip(*(probe.place(x, depth) for x in side))]
    rms = pymust.pfield(xz[0], None, xz[1], probe.delays.copy(), probe.param.copy())[0]
    rms = np.asarray(rms).ravel()
    below = np.flatnonzero(rms < 0.5 * rms.max())
    i = below[below > rms.argmax()][0]
    edge = np.interp(0.5 * rms.max(), rms[[i, i - 1]], side[[i, i - 1]])
    return 2 * edge / probe.wave


def scan(probe, depth, places=22):
    "Two-way widths of a point at one depth for every receive aperture, in wavelengths; 1 place: axial only."
    side = np.linspace(0, 4.2, 22)[:places] * probe.wave
    records = [probe.record(x, depth) for x in side]
    tau = np.linspace(-5, 5, 401) / probe.f
    rows = {}
    for name, (f_rx, shape) in RECEIVE.items():
        weight, f_there = probe.window(depth, f_rx, shape)
        axial, (f, spectrum) = probe.beamform(records[0], depth, weight, tau)
        width, late = full_width(tau, axial)
        band, middle = full_width(f, spectrum)
        profile = [probe.beamform(r, depth, weight, np.array([late]))[0][0] for r in records]
        rows[name] = dict(
            f_rx=f_there,
            lateral=2 * half_width(side, profile) / probe.wave if places > 1 else 0.0,
            axial=width * probe.f / 2,
            late=late * probe.f / 2,
            bandwidth=band / probe.f,
        )
    return rows


def measure(name, **setting):
    "Widths of one probe at all depths: one row a depth and receive aperture."
    probe, rows = Array(**setting), []
    for u in AT:
        depth = u * probe.focus
        sent = transmit_width(probe, depth)
        for receive, row in scan(probe, depth).items():
            row = dict(z_over_focus=u, z_mm=depth, transmit=sent, **row)
            rows.append(dict(probe=name, receive=receive, **{k: round(float(v), 3) for k, v in row.items()}))
    return rows


def law(z, focus, f_tx, wave, f_rx, k, g, k_r):
    "Two-way lateral width at -6 dB in mm; depth z, focus and wave in mm; k_r equals k without a window."
    aperture = focus / f_tx
    sent = np.hypot(k * wave * f_tx, g * aperture * (1 - z / focus))
    received = k_r * wave * f_rx
    return 1 / np.sqrt(sent**-2 + received**-2)


def predict(row, k, g, k_r):
    "The law for a row, wavelengths."
    s = {**PROBES, **OTHERS}[row['probe']]
    wave = SOUND / s['frequency'] / 1e3
    return law(row['z_mm'], s['focus'], s.get('f_tx', F_TX), wave, row['f_rx'], k, g, k_r) / wave


def fit(rows, constants, start):
    "Constants by least squares on ratios; `constants` makes (k, g, k_r) of the vector that is fitted."

    def residual(v):
        return [np.log(predict(r, *constants(v)) / r['lateral']) for r in rows]

    return [round(float(x), 3) for x in constants(least_squares(residual, start, bounds=(0.05, 5)).x)]


def compare(rows, constants):
    "Measured against law for every row."
    table = []
    for r in rows:
        x = predict(r, *constants)
        table.append({**r, 'law': round(float(x), 3), 'error': round(float(x / r['lateral'] - 1), 3)})
    return table


def off(table):
    "Worst and root-mean-square relative error."
    e = np.array([r['error'] for r in table])
    return dict(worst=round(float(abs(e).max()), 3), rms=round(float(np.sqrt((e**2).mean())), 3))


def named(rows, probes, shape):
    "Rows of some probes and one receive window."
    return [r for r in rows if r['probe'] in probes and r['receive'].startswith(shape)]


def judge(rows, constants, shape):
    "Errors of the law with its constants, by probe; OTHERS were not fitted."
    errors = {p: off(compare(named(rows, [p], shape), constants)) for p in (*PROBES, *OTHERS)}
    fitted = off(compare(named(rows, PROBES, shape), constants))
    return dict(zip(('k', 'g', 'k_r'), constants), fitted=fitted, by_probe=errors)


def axial_part():
    "Axial width at the focus of the linear probe for several bandwidths."
    rows = []
    for percent in (50, 60, 70, 80, 100):
        probe = Array(**PROBES['linear'], bandwidth=percent)
        row = scan(probe, probe.focus, 1)['rect f/2.5']
        share = row['axial'] * percent / 100
        rows.append(dict(probe_bandwidth=percent / 100, echo_bandwidth=row['bandwidth'], axial=row['axial']))
        rows[-1]['axial_times_probe_bandwidth'] = share
    return [{k: round(float(v), 3) for k, v in r.items()} for r in rows]


def psf_part():
    "All runs of PyMUST and the law that is fitted to them."
    rows = [r for name, s in {**PROBES, **OTHERS}.items() for r in measure(name, **s)]
    rect = fit(named(rows, PROBES, 'rect'), lambda v: (v[0], v[1], v[0]), (1.2, 0.5))
    free = fit(named(rows, PROBES, 'rect'), tuple, (1.2, 0.5, 1.2))
    hann = fit(named(rows, PROBES, 'hann'), lambda v: (rect[0], rect[1], v[0]), (2.0,))
    table = compare(named(rows, (*PROBES, *OTHERS), 'rect'), rect)
    return dict(
        about='widths in wavelengths (1.54 / MHz mm): full width of the envelope at half its amplitude; '
        'a scatterer moves sideways (along the arc at its depth for a convex probe) past one focused beam, '
        'received by delay and sum with dynamic focus; transmit: full width at -6 dB of the RMS pressure; '
        'late: where the axial peak is, in wavelengths of depth; error: law over measured minus 1',
        setting=dict(
            speed_m_s=SOUND,
            elements=COUNT,
            pitch_wavelengths=PITCH,
            f_tx=F_TX,
            transmit_window='rect, unless taper is set: then its outer half falls to nothing as cos^2',
            bandwidth_percent=BANDWIDTH,
            pulse_periods=1,
            probes={**PROBES, **OTHERS},
            receive={k: dict(f_rx=f, window=w) for k, (f, w) in RECEIVE.items()},
        ),
        law=dict(
            lateral='w = (w_t^-2 + w_r^-2)^-1/2, w_t^2 = (k wave f_tx)^2 + (g aperture (1 - z / focus))^2, '
            'aperture = focus / f_tx, w_r = k_r wave f_rx, in mm; f_rx is at least z / length of the probe',
            rect=judge(rows, rect, 'rect'),
            rect_with_k_r_free=judge(rows, free, 'rect'),
            hann_with_k_and_g_of_rect=judge(rows, hann, 'hann'),
            axial='about k_a wave, see axial',
            k_a=round(float(np.median([r['axial'] for r in named(rows, PROBES, 'rect')])), 3),
            k_a_range=[f(r['axial'] for r in named(rows, PROBES, 'rect')) for f in (min, max)],
        ),
        axial=axial_part(),
        rows=table + compare(named(rows, (*PROBES, *OTHERS), 'hann'), hann),
    )


def main(out):
    "Make all numbers and write them."
    start = time.time()
    result = dict(
        command=f'OMP_NUM_THREADS=1 python tools/make_acoustics.py {out}',
        date=str(date.today()),
        versions=dict(
            python=platform.python_version(),
            **{name: version(name) for name in ('k-wave-python', 'pymust', 'numpy', 'scipy')},
        ),
        echoes=kwave_part(),
        psf=psf_part(),
    )
    result['seconds'] = round(time.time() - start)
    with open(out, 'w') as f:
        json.dump(result, f, indent=1)
        f.write('\n')


if __name__ == '__main__':
    main(sys.argv[1])
