// Small numerical pieces that give what NumPy and SciPy give, to the last bit where that matters.

export const f32 = Math.fround;

// Python's round: a half goes to the even neighbour.
export function roundEven(v) {
  const low = Math.floor(v);
  if (v - low !== 0.5) return Math.round(v);
  return low % 2 ? low + 1 : low;
}

export function minMax(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const v of values) {
    if (v < low) low = v;
    if (v > high) high = v;
  }
  return [low, high];
}

export function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// Quantile of 32-bit numbers with linear interpolation.
export function quantile(values, q) {
  const sorted = Float32Array.from(values).sort();
  const at = (sorted.length - 1) * q;
  const k = Math.floor(at);
  const a = sorted[k];
  const b = sorted[Math.min(k + 1, sorted.length - 1)];
  const step = f32(b - a);
  const t = at - k;
  return f32(t < 0.5 ? a + step * t : b - step * (1 - t));
}

export function median(values) {
  const sorted = Float64Array.from(values).sort();
  const k = sorted.length >> 1;
  return sorted.length % 2 ? sorted[k] : (sorted[k - 1] + sorted[k]) / 2;
}

// NumPy's pairwise sum of 32-bit numbers: the order of the additions decides the last bits.
export function sum32(x, start = 0, n = x.length) {
  if (n < 8) {
    let total = 0;
    for (let i = 0; i < n; i++) total = f32(total + x[start + i]);
    return total;
  }
  if (n <= 128) {
    const r = Array.from(x.subarray(start, start + 8));
    let i = 8;
    for (; i < n - (n % 8); i += 8) for (let j = 0; j < 8; j++) r[j] = f32(r[j] + x[start + i + j]);
    const left = f32(f32(r[0] + r[1]) + f32(r[2] + r[3]));
    let total = f32(left + f32(f32(r[4] + r[5]) + f32(r[6] + r[7])));
    for (; i < n; i++) total = f32(total + x[start + i]);
    return total;
  }
  const half = (n >> 1) - ((n >> 1) % 8);
  return f32(sum32(x, start, half) + sum32(x, start + half, n - half));
}

// Rows of a simplex in the order of their values; equal ones keep their order.
function sortSimplex(points, values) {
  const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b] || a - b);
  const p = order.map((i) => points[i]);
  const v = order.map((i) => values[i]);
  order.forEach((_, i) => {
    points[i] = p[i];
    values[i] = v[i];
  });
}

const spread = (points, values, xtol, ftol) =>
  points.slice(1).every((p) => p.every((v, j) => Math.abs(v - points[0][j]) <= xtol)) &&
  values.slice(1).every((v) => Math.abs(values[0] - v) <= ftol);

// Which point replaces the worst one of a simplex, and its value; null where the simplex is to shrink.
function better(f, points, values) {
  const n = points.length - 1;
  const worst = points[n];
  const middle = worst.map((_, j) => points.slice(0, n).reduce((s, p) => s + p[j], 0) / n);
  const along = (a, b) => middle.map((m, j) => a * m + b * worst[j]);
  const mirrored = along(2, -1);
  const value = f(mirrored);
  if (value < values[0]) {
    const further = along(3, -2);
    const there = f(further);
    return there < value ? [further, there] : [mirrored, value];
  }
  if (value < values[n - 1]) return [mirrored, value];
  const nearer = value < values[n] ? along(1.5, -0.5) : along(0.5, 0.5);
  const there = f(nearer);
  return (value < values[n] ? there <= value : there < values[n]) ? [nearer, there] : null;
}

// The method of Nelder and Mead as scipy.optimize.minimize has it.
export function nelderMead(fun, start, steps, maxCalls, tol) {
  const points = [start, ...steps.map((s, k) => start.map((v, j) => (j === k ? v + s : v)))];
  let calls = 0;
  const enough = {};
  const f = (p) => {
    if (calls >= maxCalls) throw enough;
    calls += 1;
    return fun(p);
  };
  const values = points.map(f);
  sortSimplex(points, values);
  while (calls < maxCalls && !spread(points, values, 10 * tol, tol)) {
    try {
      const found = better(f, points, values);
      if (found) [points[points.length - 1], values[values.length - 1]] = found;
      for (let j = 1; !found && j < points.length; j++) {
        points[j] = points[j].map((v, i) => points[0][i] + 0.5 * (v - points[0][i]));
        values[j] = f(points[j]);
      }
    } catch (e) {
      if (e !== enough) throw e;
    }
    sortSimplex(points, values);
  }
  return { x: points[0], fun: values[0] };
}
