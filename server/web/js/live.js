// The live view: what each engine does right now and did in the last two minutes.

import { getJson } from "./api.js";
import { drawBlocks, drawLines } from "./charts.js";
import { el, seconds, short } from "./dom.js";
import { History, NUM_POINTS } from "./history.js";

const INTERVAL_MS = 1000;
const TTFT = "time_to_first_token_seconds";
const ITL = "inter_token_latency_seconds";

export class LiveView {
  #engines = new Map();
  #isShown = false;
  #timer = null;

  constructor(element) {
    this.element = element;
    this.note = el("p.hint", { role: "status" }, "Waiting for the engine …");
    element.append(this.note);
    document.addEventListener("visibilitychange", () => this.#poll());
    addEventListener("resize", () => this.#draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  setShown(isShown) {
    this.#isShown = isShown;
    this.#poll();
  }

  /** Ask once a second while somebody can see it. */
  async #poll() {
    clearTimeout(this.#timer);
    if (!this.#isShown || document.hidden) return;
    try {
      const { engines } = await getJson("/stats");
      this.#take(engines);
      this.note.hidden = true;
    } catch (error) {
      this.note.textContent = error.message;
      this.note.hidden = false;
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#poll(), INTERVAL_MS);
  }

  #take(engines) {
    const names = new Set();
    for (const engine of engines) {
      const name = `${engine.model} ${engine.engine}`;
      names.add(name);
      if (!this.#engines.has(name)) {
        this.#engines.set(name, new EngineCard(engine));
        this.element.append(this.#engines.get(name).element);
      }
      this.#engines.get(name).add(engine, performance.now() / 1000);
    }
    for (const [name, card] of this.#engines) {
      if (names.has(name)) continue;
      card.element.remove();
      this.#engines.delete(name);
    }
    for (const card of this.#engines.values()) card.setAlone(this.#engines.size === 1);
  }

  #draw() {
    if (this.#isShown) for (const card of this.#engines.values()) card.draw();
  }
}

class EngineCard {
  #history = new History();

  constructor(engine) {
    this.state = el("span.state");
    this.number = el("span.faint", {}, `engine ${engine.engine}`);
    this.figures = Object.fromEntries(FIGURES.map(({ name }) => [name, el("strong", {}, "–")]));
    this.charts = CHARTS.map((chart) => el("canvas.chart", { role: "img", "aria-label": chart.title }));
    this.blocks = el("canvas.blocks", { role: "img", "aria-label": "KV blocks" });
    this.blocksNote = el("p.faint");
    this.batch = el("div.batch");
    this.batchNote = el("p.faint");
    this.element = el(
      "section.engine",
      {},
      el("h2", {}, engine.model, " ", this.number, this.state),
      el("div.figures-row", {}, ...FIGURES.map(({ name, label }) => el("div.figure", {}, el("span", {}, label), this.figures[name]))),
      el("div.grid", {}, ...CHARTS.map((chart, i) => card(chart.title, chart.legend, this.charts[i]))),
      el("div.grid.two", {}, card("KV blocks", BLOCK_LEGEND, this.blocks, this.blocksNote), card("Batch", BATCH_LEGEND, this.batch, this.batchNote)),
    );
  }

  setAlone(isAlone) {
    this.number.hidden = isAlone;
  }

  add(engine, time) {
    this.state.textContent = engine.state;
    this.state.dataset.state = engine.state;
    if (!engine.live) return;
    this.#history.add(engine, time);
    this.draw();
  }

  draw() {
    const history = this.#history;
    if (!history.latest) return;
    for (const { name, show } of FIGURES) {
      const text = show(history);
      this.figures[name].textContent = text;
      this.figures[name].parentElement.hidden = text === null;
    }
    CHARTS.forEach(({ lines, format }, i) => drawLines(this.charts[i], lines(history), { numPoints: NUM_POINTS, format }));
    this.#drawBlocks(history.latest);
    this.#drawBatch(history.latest);
  }

  #drawBlocks({ live, stats }) {
    drawBlocks(this.blocks, live.blocks);
    const used = stats.num_kv_blocks - stats.num_free_kv_blocks;
    const sample = live.blocks_step > 1 ? `; the map shows 1 of ${live.blocks_step}` : "";
    this.blocksNote.textContent = `${short(used)} of ${short(stats.num_kv_blocks)} blocks in use${sample}`;
  }

  #drawBatch({ live, stats, max_num_seqs }) {
    const longest = Math.max(1, ...live.sequences.map(([prompt, output]) => prompt + output));
    this.batch.replaceChildren(...live.sequences.slice(0, 24).map((sequence) => sequenceBar(sequence, longest)));
    const decoding = stats.num_running - live.num_prefilling;
    this.batchNote.textContent =
      `${stats.num_running} of at most ${max_num_seqs} sequences: ${decoding} decode, ${live.num_prefilling} in their prompt; ` +
      `${stats.num_waiting} wait`;
  }
}

function card(title, legend, ...children) {
  const marks = legend.map(([name, text]) => el("span.mark", { "data-color": name }, text));
  return el("div.card", {}, el("h3", {}, title, el("span.legend", {}, ...marks)), ...children);
}

/** A sequence as a bar: prompt, output, and what of the prompt is still to be computed. */
function sequenceBar([prompt, output, computed], longest) {
  const part = (name, tokens) => {
    const made = el(`span.${name}`);
    made.style.width = `${(tokens / longest) * 100}%`;
    return made;
  };
  const done = Math.min(prompt, computed);
  const title = `${prompt} prompt tokens, ${output} generated`;
  return el("div.sequence", { title }, part("prompt", done), part("todo", prompt - done), part("output", output));
}

/** Mean of the last five seconds: steady enough to read. */
const recent = (values) => {
  const found = values.slice(-5);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : NaN;
};
const generated = (history) => history.rate((engine) => engine.counters.generation_tokens);
const prompts = (history) => history.rate((engine) => engine.counters.prompt_tokens);
const used = ({ stats }) => 1 - stats.num_free_kv_blocks / stats.num_kv_blocks;

const FIGURES = [
  { name: "rate", label: "Output tokens/s", show: (h) => short(recent(generated(h))) },
  { name: "ttft", label: "First token, p50", show: (h) => seconds(h.latestQuantile(TTFT, 0.5)) },
  { name: "late", label: "First token, p95", show: (h) => seconds(h.latestQuantile(TTFT, 0.95)) },
  { name: "itl", label: "Between tokens", show: (h) => seconds(h.latestQuantile(ITL, 0.5)) },
  { name: "running", label: "Running", show: (h) => short(h.latest.stats.num_running) },
  { name: "waiting", label: "Waiting", show: (h) => short(h.latest.stats.num_waiting) },
  { name: "cache", label: "KV cache in use", show: (h) => `${short(used(h.latest) * 100)} %` },
  { name: "hits", label: "Prefix cache hits", show: (h) => hitShare(h.latest.counters) },
  { name: "gpu", label: "GPU busy", show: ({ latest: { gpus } }) => (gpus.length ? `${short(mean(gpus) * 100)} %` : null) },
];

const mean = (gpus) => gpus.reduce((sum, gpu) => sum + gpu.utilization, 0) / gpus.length;

function hitShare({ prompt_tokens: all, prompt_tokens_cached: cached }) {
  return all ? `${short((cached / all) * 100)} %` : "–";
}

const CHARTS = [
  { title: "Tokens per second", legend: [["accent", "generated"], ["second", "prompt"]], lines: (h) => [generated(h), prompts(h)], format: short },
  {
    title: "Time to first token",
    legend: [["accent", "p50"], ["second", "p95"]],
    lines: (h) => [h.quantile(TTFT, 0.5), h.quantile(TTFT, 0.95)],
    format: seconds,
  },
  {
    title: "Sequences",
    legend: [["accent", "running"], ["second", "waiting"]],
    lines: (h) => [h.gauge((e) => e.stats.num_running), h.gauge((e) => e.stats.num_waiting)],
    format: short,
  },
  { title: "KV cache in use", legend: [["accent", "share of blocks"]], lines: (h) => [h.gauge((e) => used(e) * 100)], format: (v) => `${short(v)} %` },
];
const BLOCK_LEGEND = [["block-used", "in use"], ["block-shared", "shared"], ["block-cached", "cached"], ["block-empty", "empty"]];
const BATCH_LEGEND = [["second", "prompt"], ["todo", "to compute"], ["accent", "generated"]];
