// The backend of the page (see ui.js) that runs the model in this browser.

const listeners = new Map(); // request: what to do with its messages
let worker;
let count = 0;

function begin() {
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => listeners.get(data.id)?.(data);
  worker.onerror = (event) => {
    event.preventDefault();
    for (const tell of listeners.values()) tell({ kind: "failed", message: "This browser cannot run the model; use a current one." });
  };
}

function open(report) {
  if (worker) worker.terminate();
  begin();
  const { promise, resolve, reject } = Promise.withResolvers?.() ?? deferred();
  listeners.set(undefined, (data) => {
    if (data.kind === "progress") report(data.words, data.share);
    if (data.kind === "ready") resolve({ models: [data.model], about: "Runs in this browser. Nothing that you write leaves this device." });
    if (data.kind === "failed") reject(new Error(data.message));
  });
  worker.postMessage({ kind: "open" });
  return promise;
}

function deferred() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}

async function* generate(request, signal) {
  const id = ++count;
  const waiting = [];
  let wake = () => {};
  listeners.set(id, (data) => {
    waiting.push(data);
    wake();
  });
  const stop = () => worker.postMessage({ kind: "stop", id });
  signal.addEventListener("abort", stop);
  worker.postMessage({ kind: "generate", id, request });
  try {
    for (;;) {
      while (!waiting.length) await new Promise((resolve) => (wake = resolve));
      const { kind, piece, message } = waiting.shift();
      if (kind === "failed") throw new Error(message);
      if (kind === "done") return;
      yield piece;
    }
  } finally {
    signal.removeEventListener("abort", stop);
    listeners.delete(id);
    stop();
  }
}

// Without a secure context (https or localhost) there are none; the page then needs the network each time.
navigator.serviceWorker?.register("service.js").catch(() => {});
globalThis.start({ keyed: false, open, generate });
