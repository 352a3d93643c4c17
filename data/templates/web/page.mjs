// The page: a clip comes in, an answer and what speaks for it go on the screen.

import { readClip, readSprite } from './decode.mjs';
import { findFan, fanMask, FanError, FAN_FRAMES } from './fan.mjs';
import { fanCutter, resize } from './images.mjs';
import { pooled, likelyClasses, doubts, spreadPositions } from './answer.mjs';
import { runNetwork, startNetwork } from './network.mjs';
import {
  element,
  drawBars,
  drawFrame,
  maskCanvas,
  beamAt,
  drawMMode,
  drawChart,
  drawLegend,
  frameAt,
  percent,
} from './views.mjs';

const $ = (id) => document.getElementById(id);
const facts = JSON.parse($('facts').textContent);
const names = [...facts.classes, ...facts.findings];
const STRIP = { rate: 12, frames: 120, pixels: 1e8 }; // of the M-mode: what moves fast needs more columns
const state = { clip: null, now: 0, beam: 0.4, output: 0, playing: null, ticket: 0 };

// Let the browser draw what was just said.
const breathe = () => new Promise((done) => setTimeout(done, 0));

async function say(text) {
  $('status').textContent = text;
  await breathe();
}

// ---- from a clip to an answer ----

// The clip cut to its fan, and each frame as the network takes it.
function prepare(clip) {
  const { prep } = facts;
  const fan = prep.fan ? findFan(clip.frames.slice(0, FAN_FRAMES), clip.width, clip.height) : null;
  const cutter = fanCutter(fan, clip.width, clip.height);
  const cuts = clip.frames.map(cutter.cut);
  const images = cuts.map((x) => resize(x, cutter.width, cutter.height, prep.size, prep.size));
  const whole = { kind: 'linear', near: 0, far: clip.height, left: 0, right: clip.width }; // where no fan is used
  const mask = fan && fanMask(fan).mask;
  const inside = fan ? cutter.cut(mask) : new Uint8Array(cuts[0].length).fill(1);
  const cover = maskCanvas(inside, cutter.width, cutter.height);
  return { fan: fan ?? whole, mask, cutter, cuts, images, cover };
}

// The network's outputs of some frames, put where they belong.
async function look(known, images, rows) {
  const out = await runNetwork(
    rows.map((i) => images[i]),
    facts.prep.size,
  );
  rows.forEach((i, k) => {
    known.logits[i] = out.logits[k];
    known.rows[i] = pooled([out.logits[k]], facts).classes;
    if (out.features) known.features[i] = out.features[k];
    if (out.maps) known.maps[i] = out.maps.rows[k];
  });
  known.side = out.maps?.side;
}

// The answer of the frames that the model takes of a clip.
function conclude(clip, { fan, mask }, known, used) {
  const p = pooled(
    used.map((i) => known.logits[i]),
    facts,
  );
  const likely = likelyClasses(p.classes, facts);
  const vectors = used.map((i) => known.features[i]);
  const seen = { frames: used.length, vectors, fan, mask, spreads: clip.spreads };
  return { p, likely, ...doubts(seen, likely, facts) };
}

async function analyse(clip, ticket) {
  const current = () => ticket === state.ticket;
  await say('Looking for the fan…');
  let prepared;
  try {
    prepared = prepare(clip);
  } catch (e) {
    if (!(e instanceof FanError)) throw e;
    return showRefusal(clip, `No fan was found: ${e.message}.`);
  }
  const n = clip.frames.length;
  const used = spreadPositions(n, facts.prep.frames);
  const blank = () => Array(n).fill(null);
  const known = { logits: blank(), rows: blank(), features: blank(), maps: blank(), side: 0 };
  await say('Starting the network…');
  await startNetwork();
  await say('The network looks at the clip…');
  await look(known, prepared.images, used);
  if (!current()) return;
  Object.assign(state, { clip, strip: clip, prepared, known, used, now: used[0], output: 0 });
  showAnswer(clip, conclude(clip, prepared, known, used));
  const rest = known.rows.flatMap((row, i) => (row ? [] : [i]));
  for (let i = 0; i < rest.length; i += 4) {
    await say(`The other frames, for the curve: ${i} of ${rest.length}…`);
    await look(known, prepared.images, rest.slice(i, i + 4));
    if (!current()) return;
    draw();
  }
}

// More frames for the M-mode than the network needs; where that fails, those that are there will do.
async function refineStrip(load, ticket) {
  const { clip } = state;
  const most = Math.min(STRIP.frames, Math.floor(STRIP.pixels / (clip.width * clip.height)));
  if (clip.frames.length < 2 || most <= clip.frames.length) return;
  await say('More frames for the M-mode…');
  const fine = await load(STRIP.rate, most, () => {}).catch(() => clip);
  if (ticket !== state.ticket || fine.frames.length <= clip.frames.length) return;
  state.strip = fine;
  $('mmode-end').textContent = `${fine.times.at(-1).toFixed(1)} s`;
  draw();
}

// Everything that can go wrong ends as a sentence.
async function open(load) {
  const ticket = ++state.ticket;
  const started = performance.now();
  stop();
  document.body.dataset.state = 'busy';
  for (const id of ['fault', 'answer', 'views']) $(id).hidden = true;
  try {
    await say('Reading the clip…');
    const tell = (count) => ($('status').textContent = `Reading the clip: ${count} frames…`);
    const clip = await load(facts.prep.rate, facts.prep.max_frames, tell);
    if (ticket !== state.ticket) return;
    await analyse(clip, ticket);
    document.body.dataset.seconds = (performance.now() - started) / 1000;
    if (state.clip === clip) await refineStrip(load, ticket);
  } catch (e) {
    if (ticket === state.ticket) showFault(e);
  }
  if (ticket !== state.ticket) return;
  await say('');
  document.body.dataset.state = 'done';
}

// ---- what is said ----

function showFault(e) {
  $('fault').textContent = `This clip cannot be shown. ${e.message}`;
  $('fault').hidden = false;
}

function describeClip(clip) {
  const n = clip.frames.length;
  const seconds = n > 1 ? ` over ${clip.times[n - 1].toFixed(1)} seconds` : '';
  const size = `${clip.width} × ${clip.height} pixels`;
  return `${clip.name}: ${n} sampled frame${n > 1 ? 's' : ''}${seconds}, ${size}. ${clip.note}`;
}

function showRefusal(clip, reason) {
  $('clip-name').textContent = describeClip(clip);
  $('answer-title').textContent = 'I do not know';
  $('answer-text').textContent = 'This clip was refused, so there are no probabilities.';
  $('reasons').replaceChildren(element('li', {}, reason));
  $('numbers').hidden = true;
  $('answer').hidden = false;
}

// The sentence under the answer.
function verdict(answer) {
  const level = `${Math.round(100 * facts.level)} %`;
  if (answer.refused.length) return 'This clip was refused: its numbers mean nothing.';
  if (answer.likely.length > 1) return 'More than one class cannot be ruled out.';
  const p = percent(Math.max(...answer.p.classes));
  if (!facts.scores) return `The likeliest class, with a probability of ${p}.`;
  return `The only class that is left at a level of ${level}, with a probability of ${p}.`;
}

function showAnswer(clip, answer) {
  const sure = answer.likely.length === 1 && !answer.refused.length;
  const k = facts.classes.length;
  const few = state.used.length;
  $('clip-name').textContent = describeClip(clip);
  $('answer-title').textContent = sure ? answer.likely[0] : 'I do not know';
  $('answer-text').textContent = verdict(answer);
  $('reasons').replaceChildren(...[...answer.refused, ...answer.cautions].map((s) => element('li', {}, s)));
  drawBars($('classes'), facts.classes, answer.p.classes, answer.likely);
  drawBars($('signs'), facts.findings, answer.p.signs, []);
  $('signs-part').hidden = names.length === k;
  $('numbers').classList.toggle('refused', answer.refused.length > 0);
  $('numbers-text').textContent =
    `The probabilities add up to one. They ${few > 1 ? `are of ${few} frames spread over the clip` : 'are of its frame'}; ` +
    `guessing among ${k} classes would give ${percent(1 / k)} each. Bold: the classes in the set.`;
  for (const id of ['numbers', 'answer', 'views']) $(id).hidden = false;
  showViews(answer);
}

function showViews(answer) {
  const { clip, known } = state;
  const likeliest = answer.p.classes.indexOf(Math.max(...answer.p.classes));
  state.output = likeliest;
  $('map-controls').hidden = !known.side;
  $('frame-text').textContent = known.side
    ? 'The clip, cut to the fan. Orange is what speaks for the chosen class, blue what speaks against it: with a ' +
      'constant they add up exactly to what the network says of this frame. The yellow line is the beam.'
    : 'The clip, cut to the fan. The yellow line is the beam.';
  const choice = (name, i) => {
    const input = element('input', { type: 'radio', name: 'output', value: i });
    input.checked = i === likeliest;
    input.addEventListener('change', () => {
      state.output = i;
      draw();
    });
    return element('label', {}, input, element('span', {}, name));
  };
  $('outputs').replaceChildren($('outputs').firstElementChild, ...names.map(choice));
  $('scrubber').max = clip.frames.length - 1;
  $('mmode-start').textContent = '0 s';
  $('mmode-end').textContent = clip.frames.length > 1 ? `${clip.times.at(-1).toFixed(1)} s` : '';
  $('play').disabled = $('scrubber').disabled = clip.frames.length < 2;
  drawLegend($('legend'), facts.classes);
  draw();
}

// ---- what is drawn ----

// The map of the chosen output for a frame, and the greatest value of the clip's maps.
function chosenMap(known, i) {
  const each = known.side * known.side;
  const part = (row) => row.slice(state.output * each, (state.output + 1) * each);
  const all = known.maps.filter((row) => row).map(part);
  const most = Math.max(1e-9, ...all.map((m) => m.reduce((a, v) => Math.max(a, Math.abs(v)), 0)));
  return { map: known.maps[i] && part(known.maps[i]), most };
}

function draw() {
  if (!state.clip || $('views').hidden) return;
  const { clip, prepared, known, used, now, beam } = state;
  const { fan, cutter, cover } = prepared;
  const shown = known.side ? chosenMap(known, now) : { map: null, most: 1 };
  const opacity = $('opacity').value / 100;
  drawFrame($('frame'), {
    grey: prepared.cuts[now],
    cutter,
    fan,
    cover,
    side: known.side,
    ...shown,
    opacity,
    beam,
  });
  drawChart($('chart'), { times: clip.times, rows: known.rows, names: facts.classes, used, now });
  drawMMode($('mmode'), state.strip, fan, beam, clip.times[now]);
  $('scrubber').value = now;
  $('beam').value = 100 * beam;
  const moment = `${now + 1} of ${clip.frames.length}, ${clip.times[now].toFixed(2)} s`;
  $('moment').textContent = moment;
  $('scrubber').setAttribute('aria-valuetext', moment);
  const words = known.rows[now]
    ? facts.classes.map((c, k) => `${c} ${percent(known.rows[now][k])}`).join(', ')
    : '';
  $('frame').setAttribute('aria-label', `Frame ${moment}${words && `: ${words}`}`);
}

function goTo(frame) {
  if (!state.clip) return;
  state.now = Math.min(state.clip.frames.length - 1, Math.max(0, frame));
  draw();
}

function stop() {
  clearInterval(state.playing);
  state.playing = null;
  $('play').textContent = 'Play';
  $('play').setAttribute('aria-pressed', 'false');
}

function play() {
  if (state.playing) return stop();
  const { times, frames } = state.clip;
  const pause = (1000 * times.at(-1)) / Math.max(1, frames.length - 1);
  state.playing = setInterval(() => goTo((state.now + 1) % frames.length), Math.max(60, pause));
  $('play').textContent = 'Stop';
  $('play').setAttribute('aria-pressed', 'true');
}

// ---- controls ----

const openFile = (file) => file && open((rate, most, tell) => readClip(file, rate, most, tell));

$('file').addEventListener('change', (event) => {
  openFile(event.target.files[0]);
  event.target.value = ''; // the same file may be chosen again
});
$('phantom').addEventListener('click', () => open((rate, most) => readSprite(facts.phantom, rate, most)));
$('play').addEventListener('click', play);
$('scrubber').addEventListener('input', (event) => goTo(Number(event.target.value)));
$('opacity').addEventListener('input', draw);
$('beam').addEventListener('input', (event) => {
  state.beam = event.target.value / 100;
  draw();
});
$('frame').addEventListener('click', (event) => {
  state.beam = beamAt($('frame'), state.prepared.cutter, state.prepared.fan, event);
  draw();
});
$('chart').addEventListener('click', (event) => goTo(frameAt($('chart'), state.clip.times, event)));
addEventListener('resize', draw);
addEventListener('keydown', (event) => {
  if (!state.clip || event.target.closest('input, button, label')) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) goTo(state.now + step);
});

addEventListener('dragover', (event) => {
  event.preventDefault();
  document.body.classList.add('dropping');
});
addEventListener('dragleave', (event) => {
  if (!event.relatedTarget) document.body.classList.remove('dropping');
});
addEventListener('drop', (event) => {
  event.preventDefault();
  document.body.classList.remove('dropping');
  openFile(event.dataTransfer.files[0]);
});

document.body.dataset.state = 'ready';
