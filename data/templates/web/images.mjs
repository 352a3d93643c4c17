// From the pixels of a browser to the frames that the network sees, to the last grey level.

import { fanMask } from './fan.mjs';

// RGBA bytes to grey as Pillow does it; what is transparent is black, as outside the fan.
export function greyOfColours(rgba) {
  const out = new Uint8Array(rgba.length / 4);
  for (let i = 0, j = 0; j < out.length; i += 4, j++) {
    const a = rgba[i + 3];
    const channel = (v) => (a === 255 ? v : Math.round((v * a) / 255));
    out[j] =
      (channel(rgba[i]) * 19595 + channel(rgba[i + 1]) * 38470 + channel(rgba[i + 2]) * 7471 + 32768) >> 16;
  }
  return out;
}

// How colourful each pixel is: the strongest of red, green and blue less the weakest.
export function spreadOfColours(rgba) {
  const out = new Uint8Array(rgba.length / 4);
  for (let i = 0, j = 0; j < out.length; i += 4, j++) {
    const [r, g, b] = [rgba[i], rgba[i + 1], rgba[i + 2]];
    out[j] = Math.max(r, g, b) - Math.min(r, g, b);
  }
  return out;
}

// Luma of video range, 16 to 235, stretched to 0..255.
export const STRETCHED = Uint8Array.from({ length: 256 }, (_, v) => {
  const x = (v - 16) * (255 / 219);
  const low = Math.floor(x);
  return Math.min(255, Math.max(0, x - low === 0.5 ? low + (low % 2) : Math.round(x)));
});

// Weights of the input pixels that each output pixel is made of: a triangle, as wide as the output pixel.
function triangleWeights(from, to) {
  const scale = from / to;
  const width = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - width + 0.5));
    const last = Math.min(from, Math.trunc(centre + width + 0.5));
    const raw = [];
    for (let j = first; j < last; j++) {
      raw.push(Math.max(0, 1 - Math.abs((j - centre + 0.5) * (1 / width))));
    }
    const total = raw.reduce((a, b) => a + b, 0);
    return { first, weights: raw.map((v) => Math.trunc(0.5 + (v / total) * (1 << 22))) };
  });
}

// Grey bytes with each column resized.
function resizeDown(x, width, height, newHeight) {
  if (newHeight === height) return x;
  const out = new Uint8Array(width * newHeight);
  triangleWeights(height, newHeight).forEach(({ first, weights }, r) => {
    for (let c = 0; c < width; c++) {
      let sum = 1 << 21;
      for (let j = 0; j < weights.length; j++) sum += x[(first + j) * width + c] * weights[j];
      out[r * width + c] = sum >> 22;
    }
  });
  return out;
}

// Grey bytes with each row resized.
function resizeAcross(x, width, height, newWidth) {
  if (newWidth === width) return x;
  const out = new Uint8Array(newWidth * height);
  triangleWeights(width, newWidth).forEach(({ first, weights }, c) => {
    for (let r = 0; r < height; r++) {
      let sum = 1 << 21;
      for (let j = 0; j < weights.length; j++) sum += x[r * width + first + j] * weights[j];
      out[r * newWidth + c] = sum >> 22;
    }
  });
  return out;
}

// Grey bytes at another size, antialiased as by the BILINEAR of Pillow 13: whole numbers between the two
// passes, and columns first where the height shrinks more than twice as much as the width.
export function resize(x, width, height, newWidth, newHeight) {
  if (height > newHeight && height - newHeight > 2 * (width - newWidth)) {
    return resizeAcross(resizeDown(x, width, height, newHeight), width, newHeight, newWidth);
  }
  return resizeDown(resizeAcross(x, width, height, newWidth), newWidth, height, newHeight);
}

// A function that cuts frames to a fan's box, black outside the fan; without a fan they stay whole.
export function fanCutter(fan, width, height) {
  if (!fan) return { width, height, top: 0, left: 0, cut: (x) => x };
  const { mask, box } = fanMask(fan);
  const [w, h] = [box.right - box.left, box.bottom - box.top];
  const cut = (x) => {
    const out = new Uint8Array(w * h);
    for (let r = 0; r < h; r++) {
      for (let c = 0; c < w; c++) {
        const i = (r + box.top) * width + c + box.left;
        out[r * w + c] = mask[i] ? x[i] : 0;
      }
    }
    return out;
  };
  return { width: w, height: h, top: box.top, left: box.left, cut };
}
