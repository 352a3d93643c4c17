// From the outputs of the network to an answer: probabilities, the set of diagnoses, reasons to refuse.
// The model's facts are those that lus_fastai.export writes.

import { roundEven } from './numbers.mjs';

export function softmax(logits) {
  const most = Math.max(...logits);
  const powers = logits.map((v) => Math.exp(v - most));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((v) => v / total);
}

const sigmoid = (v) => 1 / (1 + Math.exp(-v));

function meanOf(rows) {
  return rows[0].map((_, j) => rows.reduce((sum, row) => sum + row[j], 0) / rows.length);
}

// Probabilities of the classes from their logits, made modest by the temperature.
const cooled = (logits, facts) => softmax(logits.map((v) => v / facts.temperature));

// Probabilities of one frame, or of a clip from the rows of its frames: of the classes, and of each sign.
export function pooled(rows, facts) {
  const k = facts.classes.length;
  if (facts.pooling === 'logits') {
    const mean = meanOf(rows);
    return { classes: cooled(mean.slice(0, k), facts), signs: mean.slice(k).map(sigmoid) };
  }
  const mean = meanOf(rows.map((row) => softmax(row.slice(0, k))));
  const logits = mean.map((v) => Math.log(Math.max(v, 1e-12)));
  return { classes: cooled(logits, facts), signs: meanOf(rows.map((row) => row.slice(k).map(sigmoid))) };
}

// The classes that the answer holds, the likeliest first: all that known patients of the class do not rule out.
export function likelyClasses(p, facts) {
  const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a] || a - b);
  const names = (indices) => indices.map((i) => facts.classes[i]);
  if (!facts.scores) return names(order.slice(0, 1));
  const inside = (i) => {
    const known = facts.scores[facts.classes[i]];
    const worse = known.filter((s) => s >= 1 - p[i] - 1e-9).length;
    return (worse + 1) / (known.length + 1) > 1 - facts.level + 1e-9;
  };
  const likely = order.filter(inside);
  return names(likely.length ? likely : order); // none fits: it may be any
}

// Length of what the known directions leave of a clip's standardised features.
function strangeness(vectors, { mean, scale, known }) {
  const z = meanOf(vectors).map((v, i) => (v - mean[i]) * scale[i]);
  const along = known[0].map((_, k) => z.reduce((sum, v, i) => sum + v * known[i][k], 0));
  const rest = z.map((v, i) => v - along.reduce((sum, a, k) => sum + a * known[i][k], 0));
  return Math.sqrt(rest.reduce((sum, v) => sum + v * v, 0));
}

// Whether a fan is unlike those of convex probes on lungs: straight, very wide or narrow, too near or far.
function oddFan(fan) {
  if (fan?.kind !== 'convex') return true;
  const angle = (fan.right - fan.left) / 2;
  const near = fan.near / fan.far;
  return !(angle >= 12 && angle <= 50 && near >= 0.12 && near <= 0.6);
}

// Share of the pixels in the fan that have a colour, of the most colourful of some frames.
function colourShare(spreads, mask) {
  const share = (spread) => {
    const seen = mask ? spread.filter((_, i) => mask[i]) : spread;
    return seen.filter((v) => v > 60).length / seen.length;
  };
  return Math.max(0, ...spreads.map(share));
}

// Reasons to refuse a clip, and reasons for caution: every check of a clip is in this one place.
// seen: how many frames the network saw, their features, the fan and its mask, the colours of the clip.
export function doubts({ frames, vectors, fan, mask, spreads }, likely, facts) {
  const refused = [];
  const cautions = [];
  const coloured = colourShare(spreads, mask);
  if (coloured > 0.02) {
    refused.push(`${Math.round(100 * coloured)} % of it is coloured: a photograph, or colour Doppler.`);
  }
  if (facts.familiar) {
    const far = strangeness(vectors, facts.familiar);
    const odd = oddFan(fan);
    const limit = odd ? facts.familiar.limit_odd : facts.familiar.limit;
    if (far > limit) {
      const beyond = `${far.toFixed(1)} from the training clips, the limit is ${limit.toFixed(1)}`;
      refused.push(
        `Unlike lungs: ${beyond}${odd ? ', and its fan is not that of a convex probe on a lung' : ''}.`,
      );
    }
  }
  if (likely.length > 1) {
    cautions.push(`At ${Math.round(100 * facts.level)} % it may be any of ${likely.join(', ')}.`);
  }
  if (frames < 2) {
    cautions.push('A single frame: nothing moves, so sliding and artefacts cannot be judged.');
  }
  return { refused, cautions };
}

// Positions spread evenly over a clip, the first and the last among them.
export function spreadPositions(count, n) {
  const few = Math.min(count, n);
  const step = few > 1 ? (count - 1) / (few - 1) : 0;
  return [...new Set(Array.from({ length: few }, (_, k) => roundEven(k * step)))];
}
