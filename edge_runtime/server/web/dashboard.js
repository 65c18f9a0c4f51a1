// What /metrics tells, as tiles and live plots.

import { metrics } from "./api.js";

const EVERY_MS = 2000;
const POINTS = 150; // five minutes
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
    let samples;
    try {
      samples = parse(await metrics());
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

export function fill(id, rows) {
  document.querySelector(`#${id} tbody`).replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      for (const text of cells) row.insertCell().textContent = String(text);
      return row;
    }),
  );
}

const share = (part, whole) => `${whole ? Math.round((100 * part) / whole) : 0} %`;
const shown = (value) => (value === null ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);
