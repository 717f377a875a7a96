// The model in a thread of its own, so that the page stays alive: loads it, then answers one request at a time.

import { generate } from "./generate.js";
import { Model } from "./model.js";
import { Graph, usefulThreads } from "./ort.js";
import { renderer } from "./template.js";
import { Tokenizer } from "./tokenizer.js";

const HERE = new URL("./", self.location);
const CACHE = `shrew-model ${HERE.pathname}`; // one for each folder of a site
const RUNTIME = "vendor/onnxruntime/ort-wasm-simd-threaded";
const PATIENCE = 20000; // ms for the helpers of a threaded runtime to start

let model, tokenizer, render, stops;
let current = 0; // the request that runs; another number stops it

/** Let messages in: without this, a loop that never waits would not hear that it is to stop. */
const channel = new MessageChannel();
const breathe = () => new Promise((resolve) => {
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(null);
});

/** A file of the folder, checked against its hash, and kept for the next time. */
async function load(path, { bytes, sha256 }, progress) {
  const url = new URL(`${path}?${sha256.slice(0, 16)}`, HERE);
  const cache = await self.caches?.open(CACHE).catch(() => null);
  let response = await cache?.match(url);
  const kept = Boolean(response);
  response ??= await fetch(url).catch(() => {
    throw new Error("The model cannot be loaded: there is no network, and it was not loaded before.");
  });
  if (!response.ok) throw new Error(`${path} cannot be loaded (status ${response.status}); copy the folder again.`);
  let content = new Uint8Array(bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes) throw new Error(`${path} is longer than what was packed; copy the folder again.`);
    content.set(value, at);
    at += value.length;
    progress(value.length);
  }
  const digest = at === bytes && self.crypto.subtle ? await crypto.subtle.digest("SHA-256", content) : null;
  const found = digest && Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (at < bytes || (found && found !== sha256)) {
    await cache?.delete(url);
    throw new Error(`${path} is not what was packed (${at < bytes ? "it is cut off" : "its hash differs"}); load the page again.`);
  }
  // a full disk only means that the page needs the network again
  if (!kept) await cache?.put(url, new Response(content, { headers: { "Content-Length": String(bytes) } })).catch(() => {});
  return content;
}

/** Drop what an earlier version of the folder left. */
async function tidy(files) {
  const cache = await self.caches?.open(CACHE).catch(() => null);
  const known = new Set(Object.entries(files).map(([path, { sha256 }]) => new URL(`${path}?${sha256.slice(0, 16)}`, HERE).href));
  for (const request of (await cache?.keys()) ?? []) if (!known.has(request.url)) await cache.delete(request);
}

async function opened(parts) {
  const { default: factory } = await import(new URL(`${RUNTIME}.mjs`, HERE));
  const size = Object.values(parts.weights).reduce((sum, bytes) => sum + bytes.length, 0);
  const threads = usefulThreads(size);
  const begin = (count) => Graph.create(factory, { ...parts, threads: count });
  if (threads === 1) return begin(1);
  const late = new Promise((resolve) => setTimeout(resolve, PATIENCE));
  return (await Promise.race([begin(threads).catch(() => null), late])) ?? begin(1);
}

async function open() {
  const manifest = await (await fetch(new URL("web.json", HERE))).json();
  const weights = manifest.weights.map((name) => `model/${name}`);
  const wanted = [`${RUNTIME}.wasm`, "model/tokenizer.json", "model/chat.json", "model/model.onnx", ...weights];
  const total = wanted.reduce((sum, path) => sum + manifest.files[path].bytes, 0);
  let loaded = 0;
  const progress = (bytes) => {
    loaded += bytes;
    const words = `Loading: ${(loaded / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB.`;
    postMessage({ kind: "progress", words, share: loaded / total });
  };
  const parts = {};
  for (const path of wanted) parts[path] = await load(path, manifest.files[path], progress);
  await tidy(manifest.files);
  postMessage({ kind: "progress", words: "Starting the model …", share: 1 });
  const read = (path) => JSON.parse(new TextDecoder().decode(parts[path]));
  const chat = read("model/chat.json");
  const { Template } = chat.template ? await import(new URL("vendor/jinja/index.js", HERE)) : {};
  render = renderer(chat, Template);
  stops = chat.stop;
  tokenizer = new Tokenizer(read("model/tokenizer.json"));
  const made = await opened({
    binary: parts[`${RUNTIME}.wasm`],
    graph: parts["model/model.onnx"],
    weights: Object.fromEntries(manifest.weights.map((name) => [name, parts[`model/${name}`]])),
  });
  model = new Model(made, manifest);
  const { name, context, vocabulary } = manifest;
  return { id: name, context, vocabulary, chat: Boolean(chat.template), facts: [`${(total / 1e6).toFixed(1)} MB`] };
}

async function answer(id, { mode, messages, prompt, settings }) {
  const chat = mode === "chat";
  const ids = tokenizer.encode(chat ? render(messages) : prompt, !chat);
  const stop = chat ? stops : [];
  for await (const piece of generate(model, tokenizer, ids, { ...settings, stop }, () => current !== id)) {
    postMessage({ kind: "piece", id, piece });
    await breathe();
  }
  postMessage({ kind: "done", id });
}

let queue = Promise.resolve();
self.onmessage = ({ data: { kind, id, request } }) => {
  if (kind === "stop") {
    if (current === id) current = 0;
    return;
  }
  if (kind === "generate") current = id;
  const work = kind === "open" ? async () => postMessage({ kind: "ready", model: await open() }) : () => answer(id, request);
  queue = queue.then(work).catch((error) => postMessage({ kind: "failed", id, message: error.message ?? String(error) }));
};
