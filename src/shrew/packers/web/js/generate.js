// One answer: read the prompt in pieces, then a token at a time, as text that is never cut inside a character.

import { Sampler } from "./sampler.js";

/** How much of the end of `text` could be the beginning of one of `stops`. */
function beginning(text, stops) {
  let most = 0;
  for (const stop of stops) {
    for (let size = Math.min(stop.length - 1, text.length); size > most; size--) {
      if (text.endsWith(stop.slice(0, size))) most = size;
    }
  }
  return most;
}

/**
 * Yields {text, count, token} and at the end {finish, usage}.
 * @param model Model; @param ids the prompt's tokens; @param settings temperature, top_k, top_p, seed, max_tokens, stop
 * @param stopped a function: whether to end now
 */
export async function* generate(model, tokenizer, ids, settings, stopped = () => false) {
  const { context, eos, vocabulary } = model.manifest;
  if (!ids.length) throw new Error("The prompt is empty; write something first.");
  if (ids.length >= context) throw new Error(`The text has ${ids.length} tokens, and this model holds ${context}; shorten it.`);
  if (ids.some((id) => id >= vocabulary)) throw new Error("The text has a token that this model does not know.");
  const most = Math.min(settings.max_tokens ?? context, context - ids.length);
  const stops = settings.stop ?? [];
  const sampler = new Sampler(settings);
  const stream = tokenizer.stream(ids);
  model.reserve(ids.length + most);
  const cached = model.rewind(ids);
  const usage = (completion) => ({ prompt_tokens: ids.length, completion_tokens: completion, cached_tokens: cached });

  let logits = null;
  for (let at = cached; at < ids.length; ) {
    if (stopped()) return yield { finish: "stopped", usage: usage(0) };
    const size = model.room(ids.length - at);
    logits = await model.call(ids.slice(at, at + size), at + size === ids.length);
    at += size;
    yield { text: "", count: 0, read: at };
  }

  let held = ""; // may be the beginning of a stop string
  for (let count = 1; ; count++) {
    const token = sampler.pick(logits);
    const ended = eos.includes(token);
    held += ended ? stream.end() : stream.push(token);
    const at = stops.map((stop) => held.indexOf(stop)).filter((found) => found >= 0);
    const last = count === most || stopped();
    if (ended || at.length || last) {
      if (!ended && last) held += stream.end();
      yield { text: at.length ? held.slice(0, Math.min(...at)) : held, count, token };
      const finish = ended || at.length ? "stop" : stopped() ? "stopped" : "length";
      return yield { finish, usage: usage(count) };
    }
    const kept = beginning(held, stops);
    yield { text: held.slice(0, held.length - kept), count, token };
    held = held.slice(held.length - kept);
    logits = await model.call([token], true);
  }
}
