// What /metrics tells, as tiles and live plots.

import { metrics, slo, traces } from "./api.js";

const EVERY_MS = 2000;
const POINTS = 150; // five minutes
const NEWEST = 12; // requests
const MIB = 2 ** 20;

// Prometheus's text format → [{name, labels, value}].
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)$/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

const total = (samples, name, labels = {}) =>
  samples
    .filter((each) => each.name === name && Object.entries(labels).every(([key, value]) => each.labels[key] === value))
    .reduce((sum, each) => sum + each.value, 0);

// The level-th quantile of a histogram, by linear interpolation in its bucket as Prometheus's histogram_quantile.
export function quantile(samples, name, level) {
  const buckets = new Map();
  for (const each of samples.filter((each) => each.name === `${name}_bucket`)) {
    const edge = each.labels.le === "+Inf" ? Infinity : Number(each.labels.le);
    buckets.set(edge, (buckets.get(edge) ?? 0) + each.value);
  }
  const edges = [...buckets.keys()].sort((a, b) => a - b);
  const all = buckets.get(Infinity) ?? 0;
  if (!all) return null;
  let [before, below] = [0, 0];
  for (const edge of edges) {
    const count = buckets.get(edge);
    if (count >= level * all) {
      if (edge === Infinity) return before;
      return before + ((edge - before) * (level * all - below)) / Math.max(count - below, 1e-9);
    }
    [before, below] = [edge, count];
  }
  return before;
}

export class Dashboard {
  constructor(onError) {
    this.onError = onError;
    this.series = new Map();
    this.last = null;
    this.timer = null;
  }

  start() {
    if (this.timer === null) {
      this.timer = setInterval(() => this.update(), EVERY_MS);
      this.update();
    }
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  async update() {
    let samples, newest, objectives;
    try {
      [samples, newest, objectives] = await Promise.all([metrics().then(parse), traces(NEWEST), slo()]);
    } catch (error) {
      this.onError(error);
      return;
    }
    const now = performance.now() / 1000;
    const made = total(samples, "edge_glm_tokens_total", { kind: "completion" });
    const rate = this.last === null ? 0 : Math.max(made - this.last.made, 0) / (now - this.last.now);
    this.last = { made, now };
    const ms = (name, level) => {
      const found = quantile(samples, name, level);
      return found === null ? null : found * 1000;
    };
    const [first, each] = ["edge_glm_time_to_first_token_seconds", "edge_glm_time_per_output_token_seconds"];
    const kv = total(samples, "edge_glm_kv_cache_tokens");
    const memory = total(samples, "process_resident_memory_bytes");
    const budget = total(samples, "edge_glm_memory_budget_bytes");
    const reused = total(samples, "edge_glm_tokens_total", { kind: "prompt_cached" });
    const computed = total(samples, "edge_glm_tokens_total", { kind: "prompt" });
    this.tiles([
      ["Memory", `${(memory / MIB).toFixed(0)} MiB`, budget ? `of a budget of ${(budget / MIB).toFixed(0)} MiB` : "no budget"],
      ["At work", total(samples, "edge_glm_requests_running"), `${total(samples, "edge_glm_requests_waiting")} waiting`],
      ["KV cache", share(total(samples, "edge_glm_kv_cache_running_tokens"), kv), `of ${kv.toLocaleString()} tokens at work`],
      ["Kept prefixes", total(samples, "edge_glm_prefix_cache_tokens").toLocaleString(), `tokens; ${share(reused, reused + computed)} of prompts reused`],
      ["First token, P50", shown(ms(first, 0.5)), `P95 ${shown(ms(first, 0.95))}`],
      ["A token, P50", shown(ms(each, 0.5)), `P95 ${shown(ms(each, 0.95))}`],
    ]);
    this.plot("Tokens a second", rate, (value) => value.toFixed(1));
    this.plot("Requests at work", total(samples, "edge_glm_requests_running"), (value) => value.toFixed(0));
    this.plot("Memory, MiB", memory / MIB, (value) => value.toFixed(0));
    this.tiers(samples);
    this.objectives(objectives.classes);
    this.requests(newest);
  }

  objectives(classes) {
    document.getElementById("targets").hidden = !classes.length;
    const wants = (each) => [["first token", each.wanted_ttft_ms], ["all", each.wanted_total_ms]]
      .filter(([, limit]) => limit !== null).map(([name, limit]) => `${name} ${shown(limit)}`).join(", ");
    fill("slo", classes.map((each) => [
      each.class,
      wants(each),
      each.requests,
      share(each.met, each.requests),
      Object.entries(each.missed).map(([reason, count]) => `${reason} ${count}`).join(", "),
    ]));
  }

  tiles(rows) {
    document.getElementById("tiles").replaceChildren(
      ...rows.map(([name, value, more]) => {
        const tile = document.createElement("div");
        tile.className = "card";
        for (const [tag, text] of [["span", name], ["b", String(value)], ["span", more]]) {
          const part = document.createElement(tag);
          part.textContent = text;
          tile.append(part);
        }
        return tile;
      }),
    );
  }

  plot(name, value, format) {
    const points = this.series.get(name) ?? [];
    points.push(value);
    if (points.length > POINTS) points.shift();
    this.series.set(name, points);
    let card = document.querySelector(`#plots [data-name="${name}"]`);
    if (!card) {
      card = document.createElement("div");
      card.className = "card";
      card.dataset.name = name;
      card.innerHTML = '<span></span><svg viewBox="0 0 149 60" preserveAspectRatio="none" role="img"><line x1="0" x2="149" y1="59.5" y2="59.5"/><polyline/></svg>';
      document.getElementById("plots").append(card);
    }
    const most = Math.max(...points, 1e-9);
    const start = POINTS - points.length;
    const drawn = points.map((each, index) => `${start + index},${(59 - (each / most) * 57).toFixed(1)}`);
    card.querySelector("polyline").setAttribute("points", drawn.join(" "));
    card.querySelector("span").textContent = `${name}: ${format(value)}, at most ${format(most)}`;
    card.querySelector("svg").setAttribute("aria-label", `${name} over the last five minutes`);
  }

  requests(newest) {
    const legend = document.getElementById("parts");
    legend.replaceChildren(...(newest.length ? kinds({}).map(([kind], index) => swatch(kind, index)) : ["Nothing has been asked yet."]));
    fill("requests", newest.map((each) => [
      new Date(each.started * 1000).toLocaleTimeString(),
      `${each.path}${each.status === 200 ? "" : ` (${each.status})`}`,
      each.prompt_tokens === undefined ? "" : `${each.prompt_tokens} + ${each.completion_tokens}`,
      each.ms.total.toFixed(0),
      bar(each.ms),
    ]));
  }

  tiers(samples) {
    const rows = new Map();
    for (const { name, labels, value } of samples) {
      if (name !== "edge_glm_generations_total" || !labels.tier) continue;
      const row = rows.get(labels.tier) ?? [0, 0, 0];
      row[labels.outcome === "error" ? 2 : labels.outcome === "cancelled" ? 1 : 0] += value;
      rows.set(labels.tier, row);
    }
    fill("tiers", [...rows].map(([tier, counts]) => [tier, ...counts]));
  }
}

// What is shown of a request: its parts, joined to a few kinds.
const KINDS = [
  ["waiting", ["queue", "wait", "load", "batch"]],
  ["prompt", ["template", "tokenize", "prefix lookup", "prefill"]],
  ["answer", ["decode", "sample", "detokenize"]],
  ["elsewhere", ["upstream"]],
];

export function kinds(ms) {
  const of = (kind) => Object.entries(ms).filter(([part]) => kind.includes(part.startsWith("upstream") ? "upstream" : part));
  const named = KINDS.map(([kind, parts]) => [kind, of(parts).reduce((sum, [, value]) => sum + value, 0)]);
  const all = Object.entries(ms).reduce((sum, [part, value]) => (part === "total" ? sum : sum + value), 0);
  return [...named, ["the rest", Math.max(all - named.reduce((sum, [, value]) => sum + value, 0), 0)]];
}

export function fill(id, rows) {
  document.querySelector(`#${id} tbody`).replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      for (const cell of cells) row.insertCell().append(cell instanceof Node ? cell : String(cell));
      return row;
    }),
  );
}

function swatch(kind, index) {
  const part = document.createElement("span");
  part.className = `swatch part${index}`;
  part.textContent = kind;
  return part;
}

function bar(ms) {
  const shares = kinds(ms);
  const all = Math.max(shares.reduce((sum, [, value]) => sum + value, 0), 1e-9);
  const whole = document.createElement("span");
  whole.className = "bar";
  whole.setAttribute("role", "img");
  whole.setAttribute("aria-label", shares.map(([kind, value]) => `${kind} ${value.toFixed(0)} ms`).join(", "));
  whole.title = Object.entries(ms).map(([part, value]) => `${part} ${value.toFixed(1)} ms`).join("\n");
  shares.forEach(([, value], index) => {
    const part = document.createElement("span");
    part.className = `part${index}`;
    part.style.width = `${(100 * value) / all}%`;
    whole.append(part);
  });
  return whole;
}

const share = (part, whole) => `${whole ? Math.round((100 * part) / whole) : 0} %`;
const shown = (value) => (value === null ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);
