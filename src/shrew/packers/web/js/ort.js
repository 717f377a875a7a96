// ONNX Runtime's WebAssembly build, driven through its C functions (the ones that onnxruntime-web's own JavaScript calls).
//
// Why not that JavaScript: its `run` copies every input into the WebAssembly heap and every output out of it, and a
// model's state (the KV cache) is both at every token. Here state lives in the heap, and past and next of a cache are
// bound to the same bytes, as the packed graph expects.

const TYPES = { float32: { code: 1, bytes: 4 }, int64: { code: 7, bytes: 8 } };
const CPU = 1; // OrtMemoryInfo: the WebAssembly heap
const ERRORS = 3; // the least that is worth a line in the console
const ALL_OPTIMIZATIONS = 99;

/** Threads that pay off for so many bytes of weights: one, unless the page is isolated (COOP and COEP), where
 * WebAssembly may share memory, and the model is large enough to be worth waking anyone for. */
export function usefulThreads(bytes) {
  if (!globalThis.crossOriginIsolated || bytes < 2 ** 26) return 1;
  return Math.max(1, Math.min(4, Math.floor(navigator.hardwareConcurrency / 2)));
}

/** A block of the WebAssembly heap that holds one tensor. Freed by `free`. */
class Tensor {
  constructor(wasm, type, shape) {
    this.wasm = wasm;
    this.type = type;
    this.shape = shape;
    this.size = shape.reduce((a, b) => a * b, 1);
    this.bytes = this.size * TYPES[type].bytes;
    this.at = wasm._malloc(Math.max(this.bytes, 16)) >>> 0;
    if (!this.at) throw new Error("The browser has no memory left for this model.");
    const stack = wasm.stackSave();
    const dims = wasm.stackAlloc(Math.max(4 * shape.length, 4));
    shape.forEach((size, i) => wasm.setValue(dims + 4 * i, size, "i32"));
    this.handle = wasm._OrtCreateTensor(TYPES[type].code, this.at, this.bytes, dims, shape.length, CPU);
    wasm.stackRestore(stack);
    if (!this.handle) throw new Error(lastError(wasm));
  }

  zero() {
    this.wasm.HEAPU8.fill(0, this.at, this.at + this.bytes);
    return this;
  }

  /** int64 values from numbers below 2^53. */
  set(values) {
    const words = this.wasm.HEAP32;
    values.forEach((value, i) => {
      words[this.at / 4 + 2 * i] = value | 0;
      words[this.at / 4 + 2 * i + 1] = Math.floor(value / 2 ** 32);
    });
    return this;
  }

  /** A copy of float32 values: the heap may move when it grows. */
  floats() {
    return new Float32Array(this.wasm.HEAPU8.slice(this.at, this.at + this.bytes).buffer);
  }

  free() {
    this.wasm._OrtReleaseTensor(this.handle);
    this.wasm._free(this.at);
  }
}

function lastError(wasm) {
  const stack = wasm.stackSave();
  const at = wasm.stackAlloc(8);
  wasm._OrtGetLastError(at, at + 4);
  const code = wasm.getValue(at, "i32");
  const text = wasm.getValue(at + 4, "*");
  wasm.stackRestore(stack);
  return `ONNX Runtime: ${text ? wasm.UTF8ToString(text) : "unknown error"} (code ${code})`;
}

function text(wasm, string) {
  const bytes = wasm.lengthBytesUTF8(string) + 1;
  const at = wasm._malloc(bytes);
  wasm.stringToUTF8(string, at, bytes);
  return at;
}

/** A loaded graph. `run` takes and gives tensors made by `tensor`; names are looked up once. */
export class Graph {
  /**
   * @param factory the default export of onnxruntime-web's ort-wasm-simd-threaded.mjs
   * @param graph Uint8Array of model.onnx; @param weights {name: Uint8Array} its external data
   */
  static async create(factory, { graph, weights, threads = 1, locateFile, binary }) {
    const options = { numThreads: threads };
    if (locateFile) options.locateFile = locateFile;
    if (binary) options.wasmBinary = binary;
    const wasm = await factory(options);
    const check = (code) => {
      if (code !== 0) throw new Error(lastError(wasm));
    };
    check(wasm._OrtInit(threads, ERRORS));
    const empty = text(wasm, "");
    const settings = wasm._OrtCreateSessionOptions(ALL_OPTIMIZATIONS, true, true, 0, false, 0, empty, ERRORS, 0, 0);
    if (!settings) throw new Error(lastError(wasm));
    // An idle worker that spins takes the core that the page needs.
    const config = { "session.intra_op.allow_spinning": "0", "session.use_device_allocator_for_initializers": "1" };
    for (const [key, value] of Object.entries(config)) {
      check(wasm._OrtAddSessionConfigEntry(settings, text(wasm, key), text(wasm, value)));
    }
    for (const [name, bytes] of Object.entries(weights)) wasm.mountExternalData(name, bytes);
    const at = wasm._malloc(graph.byteLength);
    wasm.HEAPU8.set(graph, at >>> 0);
    const handle = await wasm._OrtCreateSession(at, graph.byteLength, settings);
    wasm.unmountExternalData();
    wasm._free(at);
    wasm._OrtReleaseSessionOptions(settings);
    if (!handle) throw new Error(lastError(wasm));
    return new Graph(wasm, handle);
  }

  constructor(wasm, handle) {
    this.wasm = wasm;
    this.handle = handle;
    this.names = new Map();
  }

  tensor(type, shape) {
    return new Tensor(this.wasm, type, shape);
  }

  name(string) {
    if (!this.names.has(string)) this.names.set(string, text(this.wasm, string));
    return this.names.get(string);
  }

  /** Run the graph once; `inputs` and `outputs` are {name: Tensor}, and outputs are written in place. */
  async run(inputs, outputs) {
    const { wasm } = this;
    const stack = wasm.stackSave();
    const list = (items) => {
      const at = wasm.stackAlloc(4 * items.length);
      items.forEach((item, i) => wasm.setValue(at + 4 * i, item, "*"));
      return at;
    };
    const given = Object.entries(inputs);
    const asked = Object.entries(outputs);
    try {
      const code = await wasm._OrtRun(
        this.handle,
        list(given.map(([name]) => this.name(name))),
        list(given.map(([, tensor]) => tensor.handle)),
        given.length,
        list(asked.map(([name]) => this.name(name))),
        asked.length,
        list(asked.map(([, tensor]) => tensor.handle)),
        0,
      );
      if (code !== 0) throw new Error(lastError(wasm));
    } finally {
      wasm.stackRestore(stack);
    }
  }
}
