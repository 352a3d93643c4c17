// What the search for the fan needs of scipy.ndimage, with the same treatment of borders.
// An image is { data, width, height }; a mask is one whose data is a Uint8Array of 0 and 1.

export function image(data, width, height) {
  return { data, width, height };
}

export function mapPixels(x, Kind, rule) {
  return image(
    Kind.from({ length: x.data.length }, (_, i) => rule(i)),
    x.width,
    x.height,
  );
}

// Least or greatest value in a window of each row, then of each column. A border that mirrors the image
// adds no value that is not in the window already, so the window is cut off there.
function windowFilter(x, before, after, better) {
  const { width: w, height: h } = x;
  const rows = x.data.slice();
  const out = x.data.slice();
  const run = (from, to, start, step, count) => {
    for (let i = 0; i < count; i++) {
      const last = Math.min(count - 1, i + after);
      let best = from[start + Math.max(0, i - before) * step];
      for (let j = Math.max(0, i - before) + 1; j <= last; j++) {
        const v = from[start + j * step];
        if (better(v, best)) best = v;
      }
      to[start + i * step] = best;
    }
  };
  for (let r = 0; r < h; r++) run(x.data, rows, r * w, 1, w);
  for (let c = 0; c < w; c++) run(rows, out, c, w, h);
  return image(out, w, h);
}

const smaller = (a, b) => a < b;
const greater = (a, b) => a > b;

export const maximumFilter = (x, radius) => windowFilter(x, radius, radius, greater);
const minimumFilter = (x, radius) => windowFilter(x, radius, radius, smaller);

// The image less its opening by a square: what is brighter than all around and thinner than the square.
export function whiteTophat(x, size) {
  const radius = (size - 1) / 2;
  const opened = maximumFilter(minimumFilter(x, radius), radius);
  return mapPixels(x, Uint8Array, (i) => x.data[i] - opened.data[i]);
}

export const dilateSquare = (mask, radius) => maximumFilter(mask, radius);

// Opening by 2 x 2 pixels: the union of all such squares that are in the mask.
export function openBySquare2(mask) {
  const { data, width: w, height: h } = mask;
  const out = new Uint8Array(data.length);
  for (let r = 1; r < h; r++) {
    for (let c = 1; c < w; c++) {
      const i = r * w + c;
      if (data[i] && data[i - 1] && data[i - w] && data[i - w - 1]) {
        out[i] = out[i - 1] = out[i - w] = out[i - w - 1] = 1;
      }
    }
  }
  return image(out, w, h);
}

// One step of growth to the four neighbours.
function grow(mask) {
  const { data, width: w, height: h } = mask;
  const out = data.slice();
  for (let r = 0; r < h; r++) {
    for (let c = 0; c < w; c++) {
      const i = r * w + c;
      if (!data[i]) continue;
      if (c) out[i - 1] = 1;
      if (c < w - 1) out[i + 1] = 1;
      if (r) out[i - w] = 1;
      if (r < h - 1) out[i + w] = 1;
    }
  }
  return image(out, w, h);
}

// Closing by the diamond of this radius; beyond the border the mask goes on as it is at the border.
export function closeByDiamond(mask, radius) {
  const { width: w, height: h } = mask;
  const wide = w + 2 * radius;
  const high = h + 2 * radius;
  const inside = (v, n) => Math.min(Math.max(v - radius, 0), n - 1);
  let x = image(new Uint8Array(wide * high), wide, high);
  for (let r = 0; r < high; r++) {
    for (let c = 0; c < wide; c++) x.data[r * wide + c] = mask.data[inside(r, h) * w + inside(c, w)];
  }
  for (let k = 0; k < radius; k++) x = grow(x);
  x = mapPixels(x, Uint8Array, (i) => 1 - x.data[i]);
  for (let k = 0; k < radius; k++) x = grow(x); // the complement grows: the mask shrinks
  const out = new Uint8Array(w * h);
  for (let r = 0; r < h; r++) {
    for (let c = 0; c < w; c++) out[r * w + c] = 1 - x.data[(r + radius) * wide + c + radius];
  }
  return image(out, w, h);
}

// Connected components, numbered from 1 in the order of their first pixels, with area and bounding box.
export function components(mask, corners) {
  const { data, width: w, height: h } = mask;
  const label = new Int32Array(data.length);
  const parts = [{ area: 0, top: 0, bottom: 0, left: 0, right: 0 }]; // 0 is the background
  const stack = [];
  for (let first = 0; first < data.length; first++) {
    if (!data[first] || label[first]) continue;
    const part = { area: 0, top: h, bottom: 0, left: w, right: 0 };
    label[first] = parts.length;
    stack.push(first);
    while (stack.length) {
      const i = stack.pop();
      const r = Math.floor(i / w);
      const c = i - r * w;
      part.area += 1;
      part.top = Math.min(part.top, r);
      part.bottom = Math.max(part.bottom, r + 1);
      part.left = Math.min(part.left, c);
      part.right = Math.max(part.right, c + 1);
      for (let dr = -1; dr <= 1; dr++) {
        for (let dc = -1; dc <= 1; dc++) {
          if (!corners && dr && dc) continue;
          const j = i + dr * w + dc;
          if (r + dr < 0 || r + dr >= h || c + dc < 0 || c + dc >= w) continue;
          if (data[j] && !label[j]) {
            label[j] = parts.length;
            stack.push(j);
          }
        }
      }
    }
    parts.push(part);
  }
  return { label: image(label, w, h), parts };
}
