// A packed causal model: its states, and one call of its graph. The contract is that of `shrew pack --to onnx`:
// inputs tokens, start, wanted and past.NAME; outputs logits and next.NAME.

const STEP = 256; // caches grow by so many positions

/** The state of one sequence. A cache is written in place; a recurrent state has two buffers that take turns. */
export class Model {
  constructor(graph, manifest) {
    this.graph = graph;
    this.manifest = manifest;
    this.capacity = 0;
    this.seen = []; // the tokens that the state has taken in
    this.states = [];
    this.rewindable = manifest.states.every((state) => state.kind === "cache");
    this.start = graph.tensor("int64", [1]);
    this.logits = graph.tensor("float32", [1, manifest.vocabulary]);
    this.nothing = { wanted: graph.tensor("int64", [0]), logits: graph.tensor("float32", [0, manifest.vocabulary]) };
    this.last = graph.tensor("int64", [1]);
  }

  /** Room for `positions` tokens; what was cached is dropped when it has to grow. */
  reserve(positions) {
    if (positions > this.manifest.context) {
      throw new Error(`This model reads at most ${this.manifest.context} tokens, and ${positions} are asked for.`);
    }
    if (positions <= this.capacity) return;
    this.states.forEach((state) => state.buffers.forEach((buffer) => buffer.free()));
    this.capacity = Math.min(this.manifest.context, Math.ceil(positions / STEP) * STEP);
    this.states = this.manifest.states.map(({ name, kind, dtype, shape }) => {
      const sizes = [1, ...shape.map((size) => (size === "capacity" ? this.capacity : size))];
      const buffers = Array.from({ length: kind === "cache" ? 1 : 2 }, () => this.graph.tensor(dtype, sizes).zero());
      return { name, buffers };
    });
    this.seen = [];
  }

  /** Keep what the state shares with `tokens`, so that only the rest has to be read; returns how many are kept. */
  rewind(tokens) {
    let same = 0;
    while (same < this.seen.length && same < tokens.length - 1 && this.seen[same] === tokens[same]) same++;
    if (same < this.seen.length && !this.rewindable) same = 0;
    if (same === 0) this.states.forEach((state) => state.buffers.forEach((buffer) => buffer.zero()));
    this.seen.length = same;
    return same;
  }

  /** Take in `tokens` (as many as one call may hold); the logits after the last of them if `wanted`. */
  async call(tokens, wanted) {
    const { graph } = this;
    const given = graph.tensor("int64", [1, tokens.length]).set(tokens);
    const asked = wanted ? this.last.set([tokens.length - 1]) : this.nothing.wanted;
    const inputs = { tokens: given, wanted: asked };
    if (this.manifest.takes_start) inputs.start = this.start.set([this.seen.length]);
    const outputs = { logits: wanted ? this.logits : this.nothing.logits };
    for (const { name, buffers } of this.states) {
      inputs[`past.${name}`] = buffers[0];
      outputs[`next.${name}`] = buffers[buffers.length - 1];
    }
    try {
      await graph.run(inputs, outputs);
    } finally {
      given.free();
    }
    this.states.forEach(({ buffers }) => buffers.reverse());
    this.seen.push(...tokens);
    return wanted ? this.logits.floats() : null;
  }

  /** How many of `left` tokens the next call may take: at most a chunk, never across a multiple of `align`. */
  room(left) {
    const { chunk, align } = this.manifest;
    return Math.min(left, chunk, align ? align - (this.seen.length % align) : chunk);
  }
}
