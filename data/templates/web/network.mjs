// The network, run by ONNX Runtime Web from bytes that are in this page.

// The bytes of an embedded part of the page: base64 of gzip.
async function unpacked(id) {
  const text = document.getElementById(id).textContent.trim();
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

let starting = null; // a promise of the runtime and the session, made once

async function start() {
  const script = new Blob([await unpacked('runtime-script')], { type: 'text/javascript' });
  const address = URL.createObjectURL(script);
  const ort = await import(address);
  URL.revokeObjectURL(address);
  Object.assign(ort.env.wasm, { numThreads: 1, proxy: false, wasmBinary: await unpacked('runtime-wasm') });
  ort.env.logLevel = 'error';
  const session = await ort.InferenceSession.create(await unpacked('network'), {
    executionProviders: ['wasm'],
  });
  return { ort, session };
}

export const startNetwork = () => (starting ??= start());

// Rows of n numbers each.
const rowsOf = (tensor, n) =>
  Array.from({ length: n }, (_, i) => {
    const each = tensor.data.length / n;
    return Array.from(tensor.data.subarray(i * each, (i + 1) * each));
  });

// Logits of grey frames (Uint8Array each, size x size); maps and features where the network has them.
export async function runNetwork(frames, size) {
  const { ort, session } = await startNetwork();
  const n = frames.length;
  const pixels = new Float32Array(n * size * size);
  frames.forEach((x, k) => x.forEach((v, i) => (pixels[k * size * size + i] = v / 255)));
  const out = await session.run({ frames: new ort.Tensor('float32', pixels, [n, 1, size, size]) });
  const maps = out.maps && { rows: rowsOf(out.maps, n), side: out.maps.dims[3] };
  return { logits: rowsOf(out.logits, n), features: out.features && rowsOf(out.features, n), maps };
}
