// numpy's generator (SeedSequence, PCG64, random), so that a seed draws the same numbers here as in `shrew serve`.

const U32 = 0xffffffff;
const U64 = (1n << 64n) - 1n;
const U128 = (1n << 128n) - 1n;
const MULTIPLIER = (2549297995355413924n << 64n) + 4865540595714422341n;

/** The four 64-bit words that numpy's SeedSequence makes of an integer seed. */
function words(seed) {
  const entropy = [];
  let left = BigInt(seed);
  do {
    entropy.push(Number(left & 0xffffffffn));
    left >>= 32n;
  } while (left > 0n);
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value = (value ^ constant) >>> 0;
    constant = Math.imul(constant, 0x931e8875) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mix = (x, y) => {
    const result = (Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715)) >>> 0;
    return (result ^ (result >>> 16)) >>> 0;
  };
  const pool = Array.from({ length: 4 }, (_, i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++) for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  for (let from = 4; from < entropy.length; from++) for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(entropy[from]));
  constant = 0x8b51f9dd;
  const state = Array.from({ length: 8 }, (_, i) => {
    let value = (pool[i % 4] ^ constant) >>> 0;
    constant = Math.imul(constant, 0x58f38ded) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return BigInt((value ^ (value >>> 16)) & U32 >>> 0) & 0xffffffffn;
  });
  return Array.from({ length: 4 }, (_, i) => state[2 * i] | (state[2 * i + 1] << 32n));
}

export class Random {
  /** @param seed an integer of 0 or more */
  constructor(seed) {
    const [high, low, incrementHigh, incrementLow] = words(seed);
    this.increment = ((((incrementHigh << 64n) | incrementLow) << 1n) | 1n) & U128;
    this.state = 0n;
    this.step();
    this.state = (this.state + ((high << 64n) | low)) & U128;
    this.step();
  }

  step() {
    this.state = (this.state * MULTIPLIER + this.increment) & U128;
  }

  /** A number of [0, 1). */
  next() {
    this.step();
    const value = ((this.state >> 64n) ^ this.state) & U64;
    const turn = this.state >> 122n;
    const turned = ((value >> turn) | (value << ((64n - turn) & 63n))) & U64;
    return Number(turned >> 11n) / 2 ** 53;
  }
}
