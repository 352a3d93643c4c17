// What is drawn: bars, the frame with its map, the probability over time, and the M-mode strip.

import { coordinates, pointAt } from './fan.mjs';

const FOR = [230, 97, 1];
const AGAINST = [43, 123, 186];
const DASHES = ['', '7 4', '2 4', '10 3 2 3', '1 3']; // lines differ by more than their colour

export const colourOf = (k) => `var(--c${k % 5})`;
export const percent = (p) => `${(100 * p).toFixed(p > 0.0995 || p < 0.0005 ? 0 : 1)} %`;

export function element(name, attributes, ...children) {
  const svg = ['svg', 'polyline', 'line', 'circle', 'text'].includes(name);
  const e = svg ? document.createElementNS('http://www.w3.org/2000/svg', name) : document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

export function drawBars(list, names, values, likely) {
  const bar = (name, k) => {
    const style = `--p:${values[k]};--c:${colourOf(k)}`;
    const kind = likely.includes(name) ? 'likely' : '';
    const parts = [element('b', {}, name), element('i', { style }), element('span', {}, percent(values[k]))];
    return element('li', { 'data-name': name, 'data-value': values[k], class: kind }, ...parts);
  };
  list.replaceChildren(...names.map(bar));
}

// ---- the frame ----

const newCanvas = (width, height) => Object.assign(document.createElement('canvas'), { width, height });

function greyCanvas(grey, width, height) {
  const canvas = newCanvas(width, height);
  const pixels = new ImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer); // opaque, and the same value in all three colours
  for (let i = 0; i < words.length; i++) words[i] = 0xff000000 | (grey[i] * 0x010101);
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

// Orange where a class is seen, blue where something speaks against it, as strong as the greatest of the clip.
function mapCanvas(map, side, most) {
  const canvas = newCanvas(side, side);
  const pixels = new ImageData(side, side);
  map.forEach((v, i) => {
    const strength = Math.min(1, Math.abs(v) / most);
    pixels.data.set([...(v > 0 ? FOR : AGAINST), Math.round(255 * strength)], 4 * i);
  });
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

// A canvas that covers the pixels where a mask is 1.
export function maskCanvas(mask, width, height) {
  const canvas = newCanvas(width, height);
  const pixels = new ImageData(width, height);
  mask.forEach((v, i) => (pixels.data[4 * i + 3] = 255 * v));
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

function drawBeam(context, cutter, fan, beam) {
  const [near, far] = [0, 1].map((depth) => pointAt(fan, depth, beam));
  context.lineWidth = Math.max(1, cutter.width / 220);
  context.setLineDash([4 * context.lineWidth, 3 * context.lineWidth]);
  context.strokeStyle = '#f0e442';
  context.beginPath();
  context.moveTo(near[0] - cutter.left, near[1] - cutter.top);
  context.lineTo(far[0] - cutter.left, far[1] - cutter.top);
  context.stroke();
}

// A cut frame with a map over it (null for none) and the chosen beam.
export function drawFrame(canvas, { grey, cutter, fan, cover, map, side, most, opacity, beam }) {
  const { width, height } = cutter;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext('2d');
  context.drawImage(greyCanvas(grey, width, height), 0, 0);
  if (map && opacity > 0) {
    const layer = newCanvas(width, height);
    const paint = layer.getContext('2d');
    paint.imageSmoothingQuality = 'high';
    paint.drawImage(mapCanvas(map, side, most), 0, 0, width, height);
    paint.globalCompositeOperation = 'destination-in';
    paint.drawImage(cover, 0, 0);
    context.globalAlpha = opacity;
    context.drawImage(layer, 0, 0);
    context.globalAlpha = 1;
  }
  drawBeam(context, cutter, fan, beam);
}

// The beam at a point of the drawn frame, 0 (left) to 1.
export function beamAt(canvas, cutter, fan, event) {
  const box = canvas.getBoundingClientRect();
  const scale = Math.min(box.width / cutter.width, box.height / cutter.height);
  const x = (event.clientX - box.left - (box.width - cutter.width * scale) / 2) / scale + cutter.left;
  const y = (event.clientY - box.top - (box.height - cutter.height * scale) / 2) / scale + cutter.top;
  return Math.min(1, Math.max(0, coordinates(fan, x, y)[1]));
}

// ---- M-mode ----

// Grey between pixels, 0 outside the image.
function greyAt(x, width, height, px, py) {
  const [c, r] = [Math.floor(px - 0.5), Math.floor(py - 0.5)];
  const [u, v] = [px - 0.5 - c, py - 0.5 - r];
  const at = (row, col) => (row < 0 || col < 0 || row >= height || col >= width ? 0 : x[row * width + col]);
  const above = (1 - u) * at(r, c) + u * at(r, c + 1);
  return (1 - v) * above + v * ((1 - u) * at(r + 1, c) + u * at(r + 1, c + 1));
}

// One beam over time: a column for each frame, the probe at the top; a line marks the time shown.
export function drawMMode(canvas, clip, fan, beam, now) {
  const depths = 256;
  const n = clip.frames.length;
  const strip = new Uint8Array(n * depths);
  for (let d = 0; d < depths; d++) {
    const [x, y] = pointAt(fan, (d + 0.5) / depths, beam);
    clip.frames.forEach((frame, k) => (strip[d * n + k] = greyAt(frame, clip.width, clip.height, x, y)));
  }
  const wide = Math.ceil(960 / n); // pixels of a column
  Object.assign(canvas, { width: n * wide, height: depths });
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  context.drawImage(greyCanvas(strip, n, depths), 0, 0, canvas.width, depths);
  const distance = clip.times.map((t) => Math.abs(t - now));
  const column = distance.indexOf(Math.min(...distance));
  context.fillStyle = '#f0e442';
  context.fillRect((column + 0.5) * wide - 1.5, 0, 3, depths);
}

// ---- probability over time ----

const MARGIN = { left: 38, right: 10, top: 8, bottom: 24 };

export function chartX(svg, times) {
  const width = svg.getBoundingClientRect().width - MARGIN.left - MARGIN.right;
  const length = Math.max(times[times.length - 1], 1e-6);
  return { at: (t) => MARGIN.left + (times.length > 1 ? t / length : 0.5) * width, length, width };
}

// The frame whose time is nearest to where the chart was clicked.
export function frameAt(svg, times, event) {
  const x = event.clientX - svg.getBoundingClientRect().left;
  const { at } = chartX(svg, times);
  const distance = times.map((t) => Math.abs(at(t) - x));
  return distance.indexOf(Math.min(...distance));
}

// rows: probabilities of each frame, null where they are not known yet.
export function drawChart(svg, { times, rows, names, used, now }) {
  const { width, height } = svg.getBoundingClientRect();
  const { at, length } = chartX(svg, times);
  const y = (p) => MARGIN.top + (1 - p) * (height - MARGIN.top - MARGIN.bottom);
  const line = (x1, y1, x2, y2, kind) => element('line', { x1, y1, x2, y2, class: kind });
  const label = (x, top, text, anchor) => element('text', { x, y: top, 'text-anchor': anchor }, text);
  const parts = [0, 0.5, 1].flatMap((p) => [
    line(MARGIN.left, y(p), width - MARGIN.right, y(p), 'grid'),
    label(MARGIN.left - 6, y(p) + 4, `${100 * p} %`, 'end'),
  ]);
  parts.push(label(at(0), height - 6, '0 s', 'start'));
  if (times.length > 1) parts.push(label(at(length), height - 6, `${length.toFixed(1)} s`, 'end'));
  names.forEach((_, k) => {
    const known = times.map((t, i) => [at(t), rows[i] && y(rows[i][k])]).filter(([, v]) => v !== null);
    const style = `stroke:${colourOf(k)};stroke-dasharray:${DASHES[k % DASHES.length] || 'none'}`;
    parts.push(element('polyline', { points: known.map((p) => p.join(',')).join(' '), style }));
    for (const i of used) {
      if (rows[i])
        parts.push(element('circle', { cx: at(times[i]), cy: y(rows[i][k]), r: 4, fill: colourOf(k) }));
    }
  });
  parts.push(line(at(times[now]), MARGIN.top, at(times[now]), height - MARGIN.bottom, 'now'));
  svg.replaceChildren(...parts);
}

export function drawLegend(list, names) {
  const item = (name, k) => {
    const style = `stroke:${colourOf(k)};stroke-width:3;stroke-dasharray:${DASHES[k % DASHES.length] || 'none'}`;
    const sample = element('svg', { width: 30, height: 10, 'aria-hidden': 'true' });
    sample.append(element('line', { x1: 0, y1: 5, x2: 30, y2: 5, style }));
    return element('li', {}, sample, name);
  };
  list.replaceChildren(...names.map(item));
}
