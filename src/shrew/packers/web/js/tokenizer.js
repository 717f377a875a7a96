// Text to tokens and back, with the same tokens as Hugging Face's tokenizers. What is read here was compiled by
// `shrew pack`: patterns are JavaScript's, classes of characters are spelled out, and every step is one of a few kinds.

const utf8 = new TextEncoder();
const lossy = new TextDecoder("utf-8", { ignoreBOM: true });
const strict = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

// GPT-2's way to write any byte as a visible character.
const BYTE_LETTERS = (() => {
  const letters = new Array(256);
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const visible = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    letters[byte] = String.fromCharCode(visible ? byte : next++);
  }
  return letters;
})();
const LETTER_BYTES = new Map(BYTE_LETTERS.map((letter, byte) => [letter, byte]));

const WORD_END = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]$/u;
const WORD_START = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]/u;
const SPACE_END = /\p{White_Space}*$/u;
const SPACE_START = /^\p{White_Space}*/u;

const wellFormed = (text) => text.replace(/[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]/g, (found) => (found.length > 1 ? found : "\ufffd"));
const visible = (text) => Array.from(utf8.encode(text), (byte) => BYTE_LETTERS[byte]).join("");

/** The steps of a normalizer, one function from text to text. */
function normalizer(steps) {
  const functions = steps.map((step) => {
    if (step.kind === "form") return (text) => text.normalize(step.form);
    if (step.kind === "letters") return (text) => Array.from(text, (letter) => step.letters[letter] ?? letter).join("");
    if (step.kind === "prepend") return (text) => text && step.text + text;
    if (step.kind === "bytes") return visible;
    const pattern = new RegExp(step.pattern, "gu");
    return (text) => text.replace(pattern, () => step.text);
  });
  return (text) => functions.reduce((now, next) => next(now), text);
}

/** The matches of a pattern and what lies between them, in order: [start, end, matched]. */
function spans(pattern, text) {
  const found = [];
  let last = 0;
  for (const match of text.matchAll(pattern)) {
    if (match.index > last) found.push([last, match.index, false]);
    found.push([match.index, match.index + match[0].length, true]);
    last = match.index + match[0].length;
  }
  if (last < text.length) found.push([last, text.length, false]);
  return found;
}

const joined = {
  removed: (found) => found.filter(([, , match]) => !match),
  isolated: (found) => found,
  contiguous: (found) => merged(found, (left, right) => left[2] === right[2]),
  mergedwithprevious: (found) => merged(found, (left, right) => right[2] && !left[2]),
  mergedwithnext: (found) => merged([...found].reverse(), (left, right) => right[2] && !left[2], true).reverse(),
};

/** Neighbours that belong together become one; a run never takes in two matches unless it is `contiguous`. */
function merged(found, together, backwards = false) {
  const kept = [];
  let before = null;
  for (const span of found) {
    if (before && together(before, span)) {
      if (backwards) kept.at(-1)[0] = span[0];
      else kept.at(-1)[1] = span[1];
    } else {
      kept.push([...span]);
    }
    before = span;
  }
  return kept;
}

/** One step of a pre-tokenizer: pieces in, pieces out. A piece is {text, first}: whether it begins the whole text. */
function splitter(step) {
  if (step.kind === "bytes") return (piece) => [{ ...piece, text: visible(piece.text) }];
  if (step.kind === "space") return ({ text, first }) => [{ text: text.startsWith(" ") ? text : ` ${text}`, first }];
  if (step.kind === "metaspace") {
    return ({ text, first }) => {
      const marked = text.replaceAll(" ", step.mark);
      const wanted = step.prepend === "always" || (step.prepend === "first" && first);
      return [{ text: wanted && !marked.startsWith(step.mark) ? step.mark + marked : marked, first }];
    };
  }
  const pattern = new RegExp(step.pattern, "gu");
  const join = joined[step.behavior];
  return ({ text, first }) => {
    const found = spans(pattern, text);
    if (step.invert) found.forEach((span) => (span[2] = !span[2]));
    return join(found).map(([start, end]) => ({ text: text.slice(start, end), first: first && start === 0 }));
  };
}

/** Added tokens found in text as a whole, before it is split: the longest of those that begin first. */
class Added {
  constructor(tokens, content) {
    this.tokens = new Map();
    for (const token of tokens) this.tokens.set(content(token), token);
    const names = [...this.tokens.keys()].filter(Boolean).sort((a, b) => b.length - a.length);
    this.pattern = names.length ? new RegExp(names.map((name) => name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|"), "gu") : null;
  }

  /** [{text, at} | {id}], in order. */
  split(text) {
    const found = [];
    let last = 0;
    for (const match of this.pattern ? text.matchAll(this.pattern) : []) {
      const token = this.tokens.get(match[0]);
      let start = match.index;
      let end = start + match[0].length;
      if (token.single_word && (WORD_END.test(text.slice(0, start)) || WORD_START.test(text.slice(end)))) continue;
      if (token.lstrip) start = Math.max(start - SPACE_END.exec(text.slice(0, start))[0].length, last);
      if (token.rstrip) end += SPACE_START.exec(text.slice(end))[0].length;
      if (last < start) found.push({ text: text.slice(last, start), at: last });
      found.push({ id: token.id });
      last = end;
    }
    if (last < text.length) found.push({ text: text.slice(last), at: last });
    return found;
  }
}

/** A queue of merges: the lowest rank first, then the leftmost. Each entry is one number, rank * SIZE + place. */
class Queue {
  constructor() {
    this.heap = [];
  }

  push(value) {
    const { heap } = this;
    let at = heap.push(value) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (heap[parent] <= value) break;
      heap[at] = heap[parent];
      at = parent;
    }
    heap[at] = value;
  }

  pop() {
    const { heap } = this;
    const top = heap[0];
    const value = heap.pop();
    if (heap.length) {
      let at = 0;
      for (;;) {
        let child = 2 * at + 1;
        if (child >= heap.length) break;
        if (child + 1 < heap.length && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= value) break;
        heap[at] = heap[child];
        at = child;
      }
      heap[at] = value;
    }
    return top;
  }
}

const SIZE = 2 ** 26; // longest piece, in symbols
const CACHED = 10000; // pieces whose tokens are remembered

class Merges {
  constructor(spec) {
    this.spec = spec;
    this.ids = new Map();
    spec.tokens.forEach((token, id) => token !== null && this.ids.set(token, id));
    this.width = spec.tokens.length;
    this.ranks = new Map(spec.merges.map(([left, right], rank) => [left * this.width + right, rank]));
    this.bytes = Array.from({ length: 256 }, (_, byte) => this.ids.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`));
    this.cache = new Map();
  }

  encode(piece) {
    let found = this.cache.get(piece);
    if (!found) {
      const whole = this.spec.ignore_merges ? this.ids.get(piece) : undefined;
      found = whole === undefined ? this.merge(this.symbols(piece)) : [whole];
      if (this.cache.size >= CACHED) this.cache.clear();
      if (piece.length < 256) this.cache.set(piece, found);
    }
    return found;
  }

  /** The tokens of single characters; for unknown ones their bytes, or the unknown token. */
  symbols(piece) {
    const { byte_fallback, unknown, fuse_unknown } = this.spec;
    const found = [];
    let waiting = false; // an unknown token that the next unknown character may join
    for (const letter of piece) {
      const id = this.ids.get(letter);
      if (id !== undefined) {
        if (waiting) found.push(unknown);
        waiting = false;
        found.push(id);
        continue;
      }
      if (byte_fallback) {
        const bytes = Array.from(utf8.encode(letter), (byte) => this.bytes[byte]);
        if (!bytes.includes(undefined)) {
          found.push(...bytes);
          continue;
        }
      }
      if (unknown !== null) {
        if (waiting && !fuse_unknown) found.push(unknown);
        waiting = true;
      }
    }
    if (waiting) found.push(unknown);
    return found;
  }

  /** Join neighbours by rank until none are left; `ids` is used up. */
  merge(ids) {
    const count = ids.length;
    const before = Int32Array.from(ids, (_, i) => i - 1);
    const after = Int32Array.from(ids, (_, i) => (i + 1 < count ? i + 1 : -1));
    const queue = new Queue();
    const consider = (left) => {
      const right = left < 0 ? -1 : after[left];
      if (right < 0) return;
      const rank = this.ranks.get(ids[left] * this.width + ids[right]);
      if (rank !== undefined) queue.push(rank * SIZE + left);
    };
    for (let i = 0; i + 1 < count; i++) consider(i);
    while (queue.heap.length) {
      const entry = queue.pop();
      const left = entry % SIZE;
      const right = ids[left] < 0 ? -1 : after[left];
      const [a, b, both] = this.spec.merges[Math.floor(entry / SIZE)];
      if (right < 0 || ids[left] !== a || ids[right] !== b) continue; // merged meanwhile
      ids[left] = both;
      ids[right] = -1;
      after[left] = after[right];
      if (after[left] >= 0) before[after[left]] = left;
      consider(before[left]);
      consider(left);
    }
    return ids.filter((id) => id >= 0);
  }
}

/** One step of a decoder: strings of tokens in, strings out. */
function decoder(step) {
  if (step.kind === "bytes") {
    return (tokens) => {
      const bytes = tokens.flatMap((token) => {
        const found = Array.from(token, (letter) => LETTER_BYTES.get(letter));
        return found.includes(undefined) ? [...utf8.encode(token)] : found;
      });
      return [lossy.decode(new Uint8Array(bytes))];
    };
  }
  if (step.kind === "fuse") return (tokens) => [tokens.join("")];
  if (step.kind === "fallback") return fromBytes;
  if (step.kind === "metaspace") {
    const first = step.prepend === "never" ? " " : "";
    return (tokens) => tokens.map((token, i) => token.replaceAll(step.mark, i ? " " : first));
  }
  if (step.kind === "strip") {
    return (tokens) => tokens.map((token) => {
      const letters = Array.from(token);
      let start = 0;
      while (start < step.start && letters[start] === step.letter) start++;
      let end = letters.length;
      while (letters.length - end < step.stop && letters[end - 1] === step.letter) end--;
      return letters.slice(start, Math.max(start, end)).join("");
    });
  }
  const pattern = new RegExp(step.pattern, "gu");
  return (tokens) => tokens.map((token) => token.replace(pattern, () => step.text));
}

/** Runs of <0xAB> become the characters that they spell, or one replacement character a byte. */
function fromBytes(tokens) {
  const found = [];
  let bytes = [];
  const flush = () => {
    if (!bytes.length) return;
    try {
      found.push(strict.decode(new Uint8Array(bytes)));
    } catch {
      found.push(...bytes.map(() => "\ufffd"));
    }
    bytes = [];
  };
  for (const token of tokens) {
    const match = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
    if (match) {
      bytes.push(parseInt(match[1], 16));
    } else {
      flush();
      found.push(token);
    }
  }
  flush();
  return found;
}

export class Tokenizer {
  /** @param spec what `shrew pack --to web` wrote to tokenizer.json */
  constructor(spec) {
    this.spec = spec;
    this.normalize = normalizer(spec.normalizer);
    this.steps = spec.splits.map(splitter);
    this.merges = new Merges(spec);
    this.raw = new Added(spec.added.filter((token) => !token.normalized), (token) => token.content);
    this.normal = new Added(spec.added.filter((token) => token.normalized), (token) => this.normalize(token.content));
    this.added = new Map(spec.added.map((token) => [token.id, token]));
    this.decoders = spec.decoder.map(decoder);
  }

  /** The tokens of a text; half of a surrogate pair is read as U+FFFD. `special` adds what the model expects around it. */
  encode(text, special = true) {
    const ids = [];
    for (const part of this.raw.split(wellFormed(text))) {
      if (part.id !== undefined) {
        ids.push(part.id);
        continue;
      }
      for (const piece of this.normal.split(this.normalize(part.text))) {
        if (piece.id !== undefined) {
          ids.push(piece.id);
          continue;
        }
        let pieces = [{ text: piece.text, first: part.at === 0 && piece.at === 0 }];
        for (const step of this.steps) pieces = pieces.flatMap(step);
        for (const { text: symbols } of pieces) for (const id of this.merges.encode(symbols)) ids.push(id);
      }
    }
    return special ? [...this.spec.before, ...ids, ...this.spec.after] : ids;
  }

  /** The text of tokens, without special ones; incomplete characters are U+FFFD. */
  decode(ids, skipSpecial = true) {
    let tokens = [];
    for (const id of ids) {
      const added = this.added.get(id);
      const token = added ? added.text : this.spec.tokens[id];
      if (token != null && !(skipSpecial && added?.special)) tokens.push(token);
    }
    for (const step of this.decoders) tokens = step(tokens);
    return tokens.join(this.spec.joiner);
  }

  /** Text as tokens come, never half a character; `context` are the tokens before. */
  stream(context = []) {
    // The end of `ids` that is decoded alike without what stands before it; a cut through the bytes of a character, or
    // before the first text, would spoil what follows.
    const end = (ids) => {
      const whole = this.decode(ids);
      const tail = [8, 16, 32].map((count) => ids.slice(-count));
      return tail.find((some) => {
        const text = this.decode(some);
        return text && whole.endsWith(text) && !text.startsWith("\ufffd");
      }) ?? ids;
    };
    let window = end(context);
    let told = this.decode(window);
    const take = (whole) => {
      const text = this.decode(window);
      // what may still become a character waits; so many tokens never do
      const sure = whole || window.length > 256 ? text : text.replace(/\ufffd+$/, "");
      const fresh = sure.slice(told.length);
      if (sure === text) window = end(window);
      told = sure === text ? this.decode(window) : told + fresh;
      return fresh;
    };
    return {
      push: (id) => {
        window = [...window, id];
        return take(false);
      },
      end: () => take(true),
    };
  }
}
