// The server's API: models, metrics, and an answer as it is made.

let key = sessionStorage.getItem("key");

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(given) {
  key = given;
  sessionStorage.setItem("key", given);
}

async function request(path, options = {}) {
  const headers = { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...options.headers };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `the server answers with ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON: the status has to do
  }
  throw new Refused(response.status, message);
}

export async function models() {
  return (await (await request("v1/models")).json()).data;
}

export async function metrics() {
  return (await request("metrics")).text();
}

// The newest requests, and where their time went.
export async function traces(limit) {
  return (await (await request(`traces?limit=${limit}`)).json()).data;
}

// Which requests met the latency that their class wants.
export async function slo() {
  return (await request("slo")).json();
}

// Calls onText with each piece; returns {tier, finish, usage, firstMs, seconds}.
export async function answer(body, signal, onText) {
  const started = performance.now();
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const about = { tier: response.headers.get("x-edge-glm-tier") ?? "local", finish: null, usage: null, firstMs: null };
  for await (const event of events(response.body)) {
    if (event.error) throw new Refused(500, event.error.message);
    if (event.usage) about.usage = event.usage;
    if (event.edge_glm?.tier) about.tier = event.edge_glm.tier;
    for (const choice of event.choices ?? []) {
      if (choice.delta?.content) {
        about.firstMs ??= performance.now() - started;
        onText(choice.delta.content);
      }
      if (choice.finish_reason) about.finish = choice.finish_reason;
    }
  }
  about.seconds = (performance.now() - started) / 1000;
  return about;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}
