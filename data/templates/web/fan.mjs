// The fan of a clip, found as lus_fastai.data.fan finds it: the notebook on the fan explains each step.

import { f32, roundEven, minMax, argmax, quantile, median, sum32, nelderMead } from './numbers.mjs';
import {
  image,
  mapPixels,
  maximumFilter,
  whiteTophat,
  dilateSquare,
  openBySquare2,
  closeByDiamond,
  components,
} from './morphology.mjs';

const BLACK = 0.25; // cost of covering a black pixel
const STRETCH = 0.1; // weight of log(aspect) squared
const OFF_CENTRE = 0.015; // a fan this far off the middle is moved there
const FOR_CENTRE = 0.0065; // if its score falls by less than this
const MAX_FRAMES = 16;
const LONG = 200; // cells along the longer side
export const FAN_FRAMES = 12; // of the sampled frames, so many are looked at

export class FanError extends Error {}

// ---- evidence ----

// Means over f x f pixels as 32-bit numbers; the last cells are filled up by repeating the edge.
function blocks(x, f) {
  const w = Math.ceil(x.width / f);
  const h = Math.ceil(x.height / f);
  const out = new Float32Array(w * h);
  for (let r = 0; r < h * f; r++) {
    const row = Math.min(r, x.height - 1) * x.width;
    const cells = Math.floor(r / f) * w;
    for (let c = 0; c < w * f; c++) {
      out[cells + Math.floor(c / f)] += x.data[row + Math.min(c, x.width - 1)];
    }
  }
  return image(
    out.map((v) => v / (f * f)),
    w,
    h,
  );
}

// Whether the clip shows motion: without it, a pixel that does not change says nothing.
function moves(brightest, change) {
  const above = (minMax(brightest.data)[0] + 8) & 255;
  const lit = change.data.filter((_, i) => brightest.data[i] > above);
  return lit.length > 0 && median(lit) > 4;
}

const half = (x, k) => {
  const w = Math.ceil(x.width / k);
  const h = Math.ceil(x.height / k);
  const out = image(new Uint8Array(w * h), w, h);
  for (let r = 0; r < h; r++)
    for (let c = 0; c < w; c++) out.data[r * w + c] = x.data[r * k * x.width + c * k];
  return out;
};

// Of every component: pixels in the ring around it, how many of them are dark, and its brightest level.
function darkAround(label, n, core, darkest) {
  const level = new Uint8Array(n + 1);
  label.data.forEach((k, i) => {
    if (darkest.data[i] > level[k]) level[k] = darkest.data[i];
  });
  const owner = maximumFilter(label, 4);
  const grown = dilateSquare(core, 2);
  const around = new Float64Array(n + 1);
  const dark = new Float64Array(n + 1);
  owner.data.forEach((k, i) => {
    if (k === 0 || grown.data[i]) return;
    around[k] += 1;
    if (darkest.data[i] < 0.65 * level[k]) dark[k] += 1;
  });
  return { around, dark, level };
}

// Thin bright strokes on dark, still if anything moves: writing.
function strokes(brightest, darkest, moving) {
  const long = Math.max(darkest.width, darkest.height);
  const hat = whiteTophat(darkest, 2 * Math.max(3, roundEven(long / 60)) + 1);
  const still = (i) => !moving || brightest.data[i] - darkest.data[i] <= 6;
  const core = mapPixels(hat, Uint8Array, (i) => (hat.data[i] > 40 && still(i) ? 1 : 0));
  const { label, parts } = components(core, true);
  const n = parts.length - 1;
  if (n === 0) return core;
  const { around, dark, level } = darkAround(label, n, core, darkest);
  const good = parts.map((p, k) => {
    const longest = Math.max(p.bottom - p.top, p.right - p.left);
    const short = longest <= Math.max(12, 0.22 * long) && around[k] > 0;
    const onDark = dark[k] >= (moving ? 0.85 : 0.9) * around[k] && level[k] > (moving ? 90 : 150);
    return k > 0 && short && onDark && p.area > 1 ? 1 : 0;
  });
  return mapPixels(label, Uint8Array, (i) => good[label.data[i]]);
}

// Which cells of f x f pixels hold strokes, looked for on a finer grid: they are a few pixels wide.
function strokesInCells(brightest, darkest, moving, f) {
  const k = Math.max(1, Math.floor(f / 2));
  const ink = strokes(half(brightest, k), half(darkest, k), moving);
  const at = (i) => {
    const r = Math.floor(i / brightest.width);
    return ink.data[Math.floor(r / k) * ink.width + Math.floor((i - r * brightest.width) / k)];
  };
  const cells = blocks(mapPixels(brightest, Uint8Array, at), f);
  return mapPixels(cells, Uint8Array, (i) => (cells.data[i] > 0 ? 1 : 0));
}

// What covering each cell gains: seen, black, or 0 where it is writing. null when nothing is seen.
function evidence(top, change, ink, level, moving) {
  const r = Math.max(2, roundEven(Math.max(top.width, top.height) / 55));
  const above = f32(level);
  const bright = mapPixels(top, Uint8Array, (i) => (top.data[i] > above && !ink.data[i] ? 1 : 0));
  const { label, parts } = components(openBySquare2(closeByDiamond(bright, r)), false);
  if (parts.length === 1) return null;
  const still = new Float64Array(parts.length);
  label.data.forEach((k, i) => {
    if (change.data[i] < 3) still[k] += 1;
  });
  const most = Math.max(...parts.map((p) => p.area));
  const writing = parts.map((p, k) => {
    if (k === 0) return false;
    const rigid = moving && still[k] / p.area > 0.7 && p.right - p.left < top.width / 3;
    return p.area < 0.1 * most || rigid;
  });
  const gain = (i) => {
    const k = label.data[i];
    if (writing[k] || (ink.data[i] && k === 0)) return 0;
    return (k > 0 ? 1 : 0) - BLACK;
  };
  return mapPixels(top, Float64Array, gain);
}

// ---- score and search ----

// Start, end and sum of the stretch with the greatest sum.
function bestRun(gain) {
  const n = gain.length;
  const total = new Float64Array(n + 1);
  for (let i = 0; i < n; i++) total[i + 1] = total[i] + gain[i];
  let least = Infinity;
  let most = -Infinity;
  let end = 0;
  total.forEach((v, i) => {
    least = Math.min(least, v);
    if (v - least > most) [most, end] = [v - least, i];
  });
  let start = 0;
  for (let i = 1; i <= end; i++) if (total[i] < total[start]) start = i;
  return [start, end, total[end] - total[start]];
}

// Scores of shapes over a map of gains; lengths in heights of the map, columns in widths.
class Search {
  constructor(gain) {
    this.gain = gain;
    const positive = gain.data.filter((v) => v > 0);
    this.best = positive instanceof Float32Array ? sum32(positive) : positive.reduce((a, b) => a + b, 0);
    this.columns = Float64Array.from({ length: gain.width }, (_, i) => (i + 0.5) / gain.width);
    this.rows = Float64Array.from({ length: gain.height }, (_, i) => (i + 0.5) / gain.height);
    this.ratio = gain.width / gain.height;
  }

  // Slope and radius of each cell as seen from an apex, NaN where it is beside or above it.
  polar(p) {
    const { width: w, height: h } = this.gain;
    const scale = this.ratio * Math.exp(-p[2]);
    const lift = Math.exp(p[1]);
    const slope = new Float64Array(w * h).fill(NaN);
    const radius = new Float64Array(w * h);
    const range = { slope: -Infinity, near: Infinity, far: -Infinity };
    for (let r = 0; r < h; r++) {
      const y = this.rows[r] - 1 + lift;
      if (!(y > 0.02)) continue;
      for (let c = 0; c < w; c++) {
        const x = Math.abs(this.columns[c] - p[0]) * scale;
        if (!(x < 2 * y)) continue;
        const i = r * w + c;
        slope[i] = x / y;
        radius[i] = Math.sqrt(x * x + y * y);
        if (slope[i] > range.slope) range.slope = slope[i];
        if (radius[i] < range.near) range.near = radius[i];
        if (radius[i] > range.far) range.far = radius[i];
      }
    }
    return { slope, radius, range };
  }

  // Score, slope of the sides and both radii of the best sector, in n bins.
  sector(p, n) {
    const { slope, radius, range } = this.polar(p);
    if (range.slope === -Infinity) return { score: 0, shape: null };
    const ds = (range.slope + 1e-6) / n;
    const dr = (range.far - range.near + 1e-6) / n;
    const within = new Float64Array(n * n); // gains by radius, of all slopes up to each
    for (let i = 0; i < slope.length; i++) {
      if (slope[i] !== slope[i]) continue;
      within[Math.trunc(slope[i] / ds) * n + Math.trunc((radius[i] - range.near) / dr)] += this.gain.data[i];
    }
    for (let i = n; i < n * n; i++) within[i] += within[i - n];
    let side = n - 1;
    for (let k = 0; k < 4; k++) {
      const [a, b] = bestRun(within.subarray(side * n, side * n + n));
      const sums = Float64Array.from({ length: n }, (_, s) => {
        let total = 0;
        for (let i = s * n + a; i < s * n + b; i++) total += within[i];
        return total;
      });
      side = argmax(sums);
    }
    const [a, b, gain] = bestRun(within.subarray(side * n, side * n + n));
    if (b <= a) return { score: 0, shape: null };
    return { score: gain / this.best, shape: [(side + 1) * ds, range.near + a * dr, range.near + b * dr] };
  }

  // Score and [top, bottom, left, right], in cells.
  rectangle() {
    const { data, width: w, height: h } = this.gain;
    let [top, bottom, left, right, gain] = [0, h, 0, w, 0];
    for (let k = 0; k < 4; k++) {
      const columns = new Float64Array(w);
      for (let r = top; r < bottom; r++) for (let c = 0; c < w; c++) columns[c] += data[r * w + c];
      [left, right] = bestRun(columns);
      const rows = new Float64Array(h);
      for (let r = 0; r < h; r++) for (let c = left; c < right; c++) rows[r] += data[r * w + c];
      [top, bottom, gain] = bestRun(rows);
    }
    return { score: gain / this.best, box: [top, bottom, left, right] };
  }
}

// What is minimized over apex and aspect: minus the score, and a little weight on the aspect.
const loss = (search, n) => (p) => STRETCH * p[2] * p[2] - search.sector(p, n).score;

// Apex and aspect of the best sector on a coarse map: a grid, then two descents.
function coarseFit(search) {
  const f = loss(search, 64);
  const starts = [];
  for (const x of [0.3, 0.4, 0.5, 0.6, 0.7]) {
    for (const q of [-0.1, 0.1, 0.3, 0.5, 0.75, 1.05, 1.5]) starts.push([f([x, q, 0]), x, q, 0]);
  }
  starts.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  const ends = starts.slice(0, 2).map((s) => nelderMead(f, s.slice(1), [0.05, 0.12, 0.12], 100, 1e-4));
  return (ends[1].fun < ends[0].fun ? ends[1] : ends[0]).x;
}

function fitSector(gain) {
  const fine = new Search(gain);
  const k = Math.max(1, roundEven(Math.max(gain.width, gain.height) / 64));
  const start = coarseFit(new Search(blocks(gain, k)));
  const score = loss(fine, 240);
  const last = nelderMead(score, start, [0.01, 0.03, 0.04], 80, 2e-5);
  let p = last.x;
  if (Math.abs(p[0] - 0.5) > OFF_CENTRE) {
    const centred = (q) => score([0.5, q[1], q[2]]);
    const middle = nelderMead(centred, [0.5, p[1], p[2]], [0.001, 0.05, 0.06], 80, 2e-5);
    if (middle.fun < last.fun + FOR_CENTRE) p = [0.5, middle.x[1], middle.x[2]];
  }
  return { score: -last.fun, apex: p, shape: fine.sector(p, 240).shape };
}

// ---- the choice ----

function convexFan(size, width, height, apex, [slope, near, far]) {
  const angle = (Math.atan(slope) * 180) / Math.PI;
  const place = { x: apex[0] * width, y: (1 - Math.exp(apex[1])) * height, aspect: Math.exp(apex[2]) };
  return {
    kind: 'convex',
    ...size,
    near: near * height,
    far: far * height,
    left: -angle,
    right: angle,
    ...place,
  };
}

function linearFan(size, [top, bottom, l, r], wide, f) {
  const [least, most] = [Math.min(l, wide - r), Math.max(l, wide - r)];
  const fills = least === 0 && most > 0 && most < 0.04 * wide; // the width on one side, and all but on the other
  const [left, right] = fills ? [0, wide] : [l, r];
  const depths = { near: top * f, far: Math.min(bottom * f, size.height) };
  const rest = { x: 0, y: 0, aspect: 1 };
  return {
    kind: 'linear',
    ...size,
    ...depths,
    left: left * f,
    right: Math.min(right * f, size.width),
    ...rest,
  };
}

// The sector if it beats the rectangle by a margin, else the rectangle.
function bestFan(gain, size, f, margin) {
  const { score, apex, shape } = fitSector(gain);
  const rectangle = new Search(gain).rectangle();
  if (shape && score > rectangle.score + margin) {
    return convexFan(size, gain.width * f, gain.height * f, apex, shape);
  }
  return linearFan(size, rectangle.box, gain.width, f);
}

// Brightest and darkest value of each pixel, of at most some frames spread over the clip.
function extremes(frames, width, height) {
  if (Math.min(width, height) < 24) {
    throw new FanError(`frames of ${width}x${height} pixels are too small to find a fan in`);
  }
  const count = Math.min(frames.length, MAX_FRAMES);
  const step = (frames.length - 1) / Math.max(1, count - 1);
  const few = Array.from({ length: count }, (_, k) => frames[roundEven(k * step)]);
  const brightest = image(few[0].slice(), width, height);
  const darkest = image(few[0].slice(), width, height);
  for (const x of few.slice(1)) {
    for (let i = 0; i < x.length; i++) {
      if (x[i] > brightest.data[i]) brightest.data[i] = x[i];
      if (x[i] < darkest.data[i]) darkest.data[i] = x[i];
    }
  }
  const [low, high] = minMax(brightest.data);
  if (high - low < 8)
    throw new FanError('every pixel has nearly the same grey: a single colour shows no fan');
  return { brightest, darkest };
}

// Which cells have their centre outside the fan, as gains.
function outsideGains(fan, gain, f) {
  const out = [];
  for (let r = 0; r < gain.height; r++) {
    for (let c = 0; c < gain.width; c++) {
      if (!isInside(fan, c * f + 0.5 * f, r * f + 0.5 * f)) out.push(gain.data[r * gain.width + c]);
    }
  }
  return out;
}

// The fan of grey frames (Uint8Array each): { kind, width, height, near, far, left, right, x, y, aspect }.
export function findFan(frames, width, height) {
  const { brightest, darkest } = extremes(frames, width, height);
  const f = Math.ceil(Math.max(width, height) / LONG); // side of a cell
  const difference = mapPixels(brightest, Uint8Array, (i) => brightest.data[i] - darkest.data[i]);
  const top = blocks(brightest, f);
  const change = blocks(difference, f);
  const moving = frames.length > 2 && moves(brightest, difference);
  const ink = strokesInCells(brightest, darkest, moving, f);
  const black = quantile(top.data, 0.02);
  let found = null;
  for (const above of black === 0 ? [0.5, 2.5, 6, 12] : [2.5, 6, 12]) {
    const gain = evidence(top, change, ink, black + above, moving);
    if (gain === null || !gain.data.some((v) => v > 0)) continue;
    const fan = bestFan(gain, { width, height }, f, above < 6 ? 0.004 : 0.015);
    const outside = outsideGains(fan, gain, f);
    const litOutside = outside.filter((v) => v > 0).length / outside.length;
    if (above < 1 && (outside.length / gain.data.length < 0.02 || litOutside > 0.03)) continue;
    if (above < 6 || fan.kind === 'convex') found = fan;
    if (fan.kind === 'convex' || gain.data.filter((v) => v > 0).length / gain.data.length < 0.93) break;
  }
  if (found === null) throw new FanError('nothing differs from the background');
  return found;
}

// ---- geometry ----

// Depth and beam of a point, each 0..1 inside the fan.
export function coordinates(fan, px, py) {
  if (fan.kind === 'convex') {
    const dx = (px - fan.x) / fan.aspect;
    const dy = py - fan.y;
    const angle = Math.atan2(dx, dy) * (180 / Math.PI);
    const depth = (Math.sqrt(dx * dx + dy * dy) - fan.near) / (fan.far - fan.near);
    return [depth, (angle - fan.left) / (fan.right - fan.left)];
  }
  return [(py - fan.near) / (fan.far - fan.near), (px - fan.left) / (fan.right - fan.left)];
}

// The point at a depth and beam.
export function pointAt(fan, depth, beam) {
  const radius = fan.near + depth * (fan.far - fan.near);
  if (fan.kind === 'linear') return [fan.left + beam * (fan.right - fan.left), radius];
  const angle = ((fan.left + beam * (fan.right - fan.left)) * Math.PI) / 180;
  return [fan.x + fan.aspect * radius * Math.sin(angle), fan.y + radius * Math.cos(angle)];
}

export function isInside(fan, px, py) {
  const [depth, beam] = coordinates(fan, px, py);
  return depth >= 0 && depth <= 1 && beam >= 0 && beam <= 1;
}

// The pixels inside a fan, and the smallest box around them.
export function fanMask(fan) {
  const { width: w, height: h } = fan;
  const mask = new Uint8Array(w * h);
  const box = { top: h, bottom: 0, left: w, right: 0 };
  for (let r = 0; r < h; r++) {
    for (let c = 0; c < w; c++) {
      if (!isInside(fan, c + 0.5, r + 0.5)) continue;
      mask[r * w + c] = 1;
      box.top = Math.min(box.top, r);
      box.bottom = Math.max(box.bottom, r + 1);
      box.left = Math.min(box.left, c);
      box.right = Math.max(box.right, c + 1);
    }
  }
  if (box.bottom === 0) throw new FanError('the fan is outside its image');
  return { mask, box };
}
