// From logits to the next token, as shrew.runtime.sampling does it: temperature, top-k, top-p, one draw a token.

import { Random } from "./random.js";

const NEUTRAL = { temperature: 1, top_k: 0, top_p: 1 };

export class Sampler {
  constructor(settings = {}) {
    this.settings = { ...NEUTRAL, ...settings };
    this.random = new Random(settings.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]);
  }

  /** The next token of a Float32Array of logits. */
  pick(logits) {
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    if (!Number.isFinite(logits[best])) throw new Error("The model gave no usable probabilities here.");
    if (this.settings.temperature === 0) return best;
    const { ids, p } = this.likely(logits, logits[best]);
    let total = 0;
    for (const share of p) total += share;
    let left = this.random.next() * total;
    let chosen = 0;
    for (let i = 0; i < ids.length; i++) {
      if (p[i] > 0) chosen = i;
      left -= p[i];
      if (left < 0) break;
    }
    return ids[chosen];
  }

  /** The tokens that may be drawn and what each weighs, from logits whose largest is `most`. */
  likely(logits, most) {
    const { top_k, top_p } = this.settings;
    const temperature = Math.max(this.settings.temperature, 1e-6);
    let ids = Array.from(logits.keys());
    const weight = Float64Array.from(logits, (logit) => Math.exp((logit - most) / temperature));
    if (top_k > 0 && top_k < ids.length) {
      const least = logits.slice().sort()[logits.length - top_k];
      ids = ids.filter((id) => logits[id] >= least);
    }
    if (top_p < 1) {
      let total = 0;
      for (const id of ids) total += weight[id];
      // what is lighter than its part of the rest cannot be within the share
      ids = ids.filter((id) => weight[id] >= ((1 - top_p) * total) / ids.length).sort((a, b) => weight[b] - weight[a] || a - b);
      let sum = 0;
      const end = ids.findIndex((id) => (sum += weight[id]) >= top_p * total);
      if (end >= 0) ids.length = end + 1;
    }
    return { ids, p: ids.map((id) => weight[id]) };
  }
}
