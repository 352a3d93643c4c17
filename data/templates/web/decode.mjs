// A file to grey frames at the model's rate, decoded by the browser: the frames that lus_fastai.video samples.

import { greyOfColours, spreadOfColours, STRETCHED } from './images.mjs';

const EARLY = 0.001; // stamps are often rounded to the millisecond
const NOMINAL = 0.04; // seconds of a frame where a file does not say

const UNPLAYABLE =
  'This browser cannot play it: MP4, WebM, GIF and images are known everywhere. The command lus_predict reads more.';

export class ClipFault extends Error {}

// The rule that decides which frames to keep: the first at or after each multiple of 1 / rate seconds.
export function rateRule(rate) {
  let due = 0;
  return {
    due: () => due,
    keep(t) {
      if (t + EARLY < due) return false;
      due = (Math.floor((t + EARLY) * rate) + 1) / rate;
      return true;
    },
  };
}

const COLOURED = [0, 10, 20]; // frames of a video that are looked at in colour, as colour_share does

// ---- pixels ----

// The colours of anything that a canvas can draw.
function drawnColours(source, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
}

// A picture: its grey, and a function that says how colourful each pixel is.
function pictureOf(rgba, width, height) {
  return { grey: greyOfColours(rgba), spread: () => spreadOfColours(rgba), width, height };
}

const drawnPicture = (source, width, height) => pictureOf(drawnColours(source, width, height), width, height);

// The bytes of a VideoFrame, without padding: rows of its first plane.
async function firstPlane(frame, bytesPerPixel) {
  const { width, height } = frame.visibleRect;
  const buffer = new Uint8Array(frame.allocationSize());
  const [{ offset, stride }] = await frame.copyTo(buffer);
  const out = new Uint8Array(width * height * bytesPerPixel);
  for (let r = 0; r < height; r++) {
    const start = offset + r * stride;
    out.set(buffer.subarray(start, start + width * bytesPerPixel), r * width * bytesPerPixel);
  }
  return { bytes: out, width, height };
}

// Ultrasound is grey, so the luma plane is the image; video range is stretched to full range.
async function lumaOf(frame) {
  const { bytes, width, height } = await firstPlane(frame, 1);
  const grey = frame.colorSpace.fullRange ? bytes : bytes.map((v) => STRETCHED[v]);
  return { grey, spread: () => spreadOfColours(drawnColours(frame, width, height)), width, height };
}

// The colours of a decoded image, exact where the browser gives the bytes.
async function greyOfImage(frame) {
  if (!['RGBA', 'RGBX', 'BGRA', 'BGRX'].includes(frame.format)) {
    return drawnPicture(frame, frame.displayWidth, frame.displayHeight);
  }
  const { bytes, width, height } = await firstPlane(frame, 4);
  for (let i = 0; i < bytes.length; i += 4) {
    if (frame.format[0] === 'B') [bytes[i], bytes[i + 2]] = [bytes[i + 2], bytes[i]];
    if (frame.format[3] === 'X') bytes[i + 3] = 255;
  }
  return pictureOf(bytes, width, height);
}

// ---- stills and animations ----

// Which kind of file it is, by its first bytes and not by its name.
function typeOf(bytes) {
  const text = String.fromCharCode(...bytes.subarray(0, 12));
  if (text.startsWith('GIF8')) return 'image/gif';
  if (text.startsWith('\x89PNG')) return 'image/png';
  if (text.startsWith('\xff\xd8\xff')) return 'image/jpeg';
  if (text.startsWith('BM')) return 'image/bmp';
  if (text.startsWith('RIFF') && text.slice(8) === 'WEBP') return 'image/webp';
  if (String.fromCharCode(...bytes.subarray(128, 132)) === 'DICM') return 'application/dicom';
  return 'video/mp4';
}

async function animationFrames(decoder, coloured, rule, clip, maxFrames, tell) {
  const count = decoder.tracks.selectedTrack.frameCount;
  let time = 0;
  for (let k = 0; k < count && (clip.frames.length < maxFrames || k <= coloured.at(-1)); k++) {
    const { image: frame } = await decoder.decode({ frameIndex: k });
    const sampled = clip.frames.length < maxFrames && rule.keep(time);
    const picture = sampled || coloured.includes(k) ? await greyOfImage(frame) : null;
    if (coloured.includes(k)) clip.spreads.push(picture.spread());
    if (sampled) {
      addFrame(clip, picture, time);
      tell(clip.frames.length);
    }
    time += frame.duration ? frame.duration / 1e6 : NOMINAL;
    frame.close();
  }
}

// The frames of an animated image; false where it is a still, or where this browser cannot take it apart.
async function readAnimation(bytes, type, rule, clip, maxFrames, tell) {
  if (typeof ImageDecoder === 'undefined' || !(await ImageDecoder.isTypeSupported(type))) {
    if (type === 'image/gif') clip.note = 'This browser shows only the first frame of an animation.';
    return false;
  }
  const exact = { colorSpaceConversion: 'none', premultiplyAlpha: 'none' };
  const decoder = new ImageDecoder({ data: bytes, type, preferAnimation: true, ...exact });
  try {
    await decoder.tracks.ready;
    await decoder.completed;
    if (decoder.tracks.selectedTrack.frameCount < 2) return false;
    const coloured = type === 'image/gif' ? COLOURED : [0]; // Python reads a GIF as a video
    await animationFrames(decoder, coloured, rule, clip, maxFrames, tell);
    return true;
  } finally {
    decoder.close();
  }
}

async function readStill(blob, clip) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' });
  const picture = drawnPicture(bitmap, bitmap.width, bitmap.height);
  addFrame(clip, picture, 0);
  clip.spreads.push(picture.spread());
}

// ---- video ----

const happens = (target, event, seconds) =>
  new Promise((yes, no) => {
    const timer = setTimeout(() => no(new ClipFault('The browser gave up on decoding it.')), 1000 * seconds);
    const end = (then) => () => {
      clearTimeout(timer);
      then();
    };
    target.addEventListener(event, end(yes), { once: true });
    target.addEventListener(
      'error',
      end(() => no(new ClipFault(UNPLAYABLE))),
      { once: true },
    );
  });

// The frame that a video shows: its time, its length, and a function that gives its grey.
function shownFrame(video) {
  const { videoWidth: w, videoHeight: h } = video;
  const drawn = async () => drawnPicture(video, w, h);
  if (typeof VideoFrame === 'undefined') return { time: video.currentTime, length: NOMINAL, grey: drawn };
  const frame = new VideoFrame(video);
  const rect = frame.visibleRect;
  const turned = frame.rotation || (w !== h && rect?.width === h && rect.height === w);
  const planar = /^(I4|NV12)/.test(frame.format ?? '') && !/P1|A/.test(frame.format);
  const grey = async () => (planar && !turned ? lumaOf(frame) : drawn());
  const length = (frame.duration || 1e6 * NOMINAL) / 1e6;
  return { time: frame.timestamp / 1e6, length, grey, close: () => frame.close() };
}

// The frame at a time. A busy browser says that it is there before it shows it, so it is waited for.
async function videoFrameAt(video, time) {
  const done = happens(video, 'seeked', 20);
  video.currentTime = time;
  await done;
  for (let tries = 0; tries < 40; tries++) {
    const frame = shownFrame(video);
    if (frame.time <= time + EARLY && time < frame.time + 1.5 * frame.length) return frame;
    frame.close?.();
    await new Promise((go) => setTimeout(go, 25));
  }
  return shownFrame(video);
}

// Walk from one wanted time to the next; where the frame shown is too early, the one behind it is taken.
async function videoFrames(video, rule, clip, maxFrames, tell) {
  let frame = shownFrame(video);
  const start = frame.time;
  let last = -1;
  while (clip.frames.length < maxFrames) {
    if (frame.time - start + EARLY < rule.due()) {
      const next = frame.time + 1.5 * frame.length;
      frame.close?.();
      if (next > video.duration + frame.length) return;
      frame = await videoFrameAt(video, Math.min(next, video.duration));
    }
    const time = frame.time - start;
    if (time <= last) break;
    last = time;
    if (rule.keep(time)) {
      addFrame(clip, await frame.grey(), time);
      tell(clip.frames.length);
    }
    frame.close?.();
    if (rule.due() + start > video.duration) return;
    frame = await videoFrameAt(video, rule.due() + start + EARLY / 2);
  }
  frame.close?.();
}

// The colours of some frames, by their numbers: the first one's length says when the others are shown.
async function videoColours(video, { time: start, length }, clip) {
  for (const k of COLOURED) {
    const time = start + k * length;
    if (k && time + length / 2 > start + video.duration) return;
    const frame = await videoFrameAt(video, time + EARLY / 2);
    clip.spreads.push((await frame.grey()).spread());
    frame.close?.();
  }
}

async function readVideo(blob, rule, clip, maxFrames, tell) {
  const video = document.createElement('video');
  const url = URL.createObjectURL(blob);
  Object.assign(video, { muted: true, playsInline: true, preload: 'auto' });
  try {
    const ready = happens(video, 'loadeddata', 20);
    video.src = url;
    await ready;
    if (!video.videoWidth) throw new ClipFault('It holds no picture.');
    const first = shownFrame(video);
    first.close?.();
    await videoFrames(video, rule, clip, maxFrames, tell);
    await videoColours(video, first, clip);
  } finally {
    video.removeAttribute('src');
    video.load();
    URL.revokeObjectURL(url);
  }
}

// ---- any file ----

function addFrame(clip, { grey, width, height }, time) {
  if (clip.frames.length && (width !== clip.width || height !== clip.height)) {
    throw new ClipFault(`Its frames change from ${clip.width}x${clip.height} to ${width}x${height} pixels.`);
  }
  Object.assign(clip, { width, height });
  clip.frames.push(grey);
  clip.times.push(time);
}

// The sampled frames of a file: { name, width, height, frames, times, spreads, note }; ClipFault with a sentence.
export async function readClip(file, rate, maxFrames, tell) {
  const clip = { name: file.name, width: 0, height: 0, frames: [], times: [], spreads: [], note: '' };
  if (!file.size) throw new ClipFault('The file is empty.');
  const bytes = new Uint8Array(await file.arrayBuffer());
  const type = typeOf(bytes);
  if (type === 'application/dicom')
    throw new ClipFault('Browsers do not read DICOM: the command lus_predict does.');
  const blob = new Blob([bytes], { type: type.startsWith('image') ? type : file.type || type });
  const rule = rateRule(rate);
  try {
    if (type === 'video/mp4') await readVideo(blob, rule, clip, maxFrames, tell);
    else if (!(await readAnimation(bytes, type, rule, clip, maxFrames, tell))) await readStill(blob, clip);
  } catch (e) {
    if (e instanceof ClipFault) throw e;
    throw new ClipFault('It is damaged, or this browser does not know its format.');
  }
  if (!clip.frames.length) throw new ClipFault('It holds no frame.');
  return clip;
}

// The built-in clip, sampled like any other: its frames stand below one another in a single image.
export async function readSprite({ name, image: address, times }, rate, maxFrames) {
  const picture = new Image();
  picture.src = address;
  await picture.decode();
  const { grey, width, height: whole } = drawnPicture(picture, picture.naturalWidth, picture.naturalHeight);
  const clip = { name, width: 0, height: 0, frames: [], times: [], spreads: [], note: '' };
  const height = whole / times.length;
  const rule = rateRule(rate);
  times.forEach((time, k) => {
    if (clip.frames.length === maxFrames || !rule.keep(time)) return;
    addFrame(clip, { grey: grey.slice(k * width * height, (k + 1) * width * height), width, height }, time);
  });
  return clip;
}
