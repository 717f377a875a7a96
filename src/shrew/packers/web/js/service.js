// Keeps the page, so that it opens without a network; the model is kept by the worker that loads it.

const VERSION = "VERSION";
const SHELL = ["SHELL"];
const PREFIX = `shrew-page ${new URL("./", self.location).pathname}`; // one for each folder of a site
const CACHE = `${PREFIX} ${VERSION}`;
// With these the page may use threads. They are on what this worker answers, so from the second visit on.
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

self.addEventListener("install", (event) => {
  const fresh = SHELL.map((path) => new Request(path, { cache: "reload" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(fresh)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  const old = async () => {
    for (const name of await caches.keys()) if (name.startsWith(`${PREFIX} `) && name !== CACHE) await caches.delete(name);
    await self.clients.claim();
  };
  event.waitUntil(old());
});

async function answer(request) {
  const kept = await (await caches.open(CACHE)).match(request, { ignoreSearch: request.mode === "navigate" });
  if (!kept) return fetch(request);
  const headers = new Headers(kept.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  return new Response(kept.body, { status: kept.status, headers });
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === self.location.origin) event.respondWith(answer(request));
});
