/** Live figures: asks for /stats each second while the page is visible, and draws what it says. */

import { Chart, WINDOW_S } from "./chart.js";
import { counted, duration, figure, percent } from "./format.js";

const PERIOD_MS = 1000;
const RETRY_MS = 3000;
/** Shares of hits are those of this many seconds: single requests would make them jump. */
const SHARE_WINDOW_S = 30;

const CHARTS = [
  {
    title: "Throughput", unit: "tokens/s", format: figure, least: 10,
    series: [{ name: "generated", value: (sample) => sample.throughput }],
  },
  {
    title: "Requests", unit: "", format: figure, least: 4,
    series: [
      { name: "running", value: (sample) => sample.stats.running },
      { name: "waiting", value: (sample) => sample.stats.waiting },
    ],
  },
  {
    title: "First token", unit: "", format: duration, least: 0.01,
    series: [{ name: "median", value: (sample) => sample.stats.ttft_p50_s }],
  },
  {
    title: "Time per token", unit: "", format: duration, least: 0.001,
    series: [{ name: "median", value: (sample) => sample.stats.tpot_p50_s }],
  },
  {
    title: "KV cache", unit: "", format: percent, least: 1,
    series: [{ name: "in use", value: (sample) => sample.stats.kv_usage }],
  },
  {
    title: "Cache hits", unit: "", format: percent, least: 1,
    series: [
      { name: "prefix", value: (sample) => sample.prefixShare },
      { name: "result", value: (sample) => sample.resultShare },
    ],
  },
];

export class Monitor {
  #api;
  #onState;
  #samples = [];
  #timer = 0;
  #round = 0; // what an earlier round hears is not heeded
  #charts = CHARTS.map((options) => new Chart(options));
  #totals = document.getElementById("totals");

  /**
   * @param {Api} api
   * @param {(stats: ?object, error: ?ApiError) => void} onState told the newest figures, or why there are none
   */
  constructor(api, onState) {
    this.#api = api;
    this.#onState = onState;
    document.getElementById("charts").append(...this.#charts.map((chart) => chart.element));
    document.addEventListener("visibilitychange", () => this.restart());
    addEventListener("resize", () => this.draw());
  }

  /** Ask now, and each second from now on while the page is visible. */
  restart() {
    clearTimeout(this.#timer);
    this.#round += 1;
    if (document.visibilityState === "visible") this.#poll(this.#round);
  }

  draw() {
    for (const chart of this.#charts) chart.draw(this.#samples);
  }

  async #poll(round) {
    const ask = this.#api.getJson("stats");
    const [stats, error] = await ask.then((answer) => [answer, null], (failure) => [null, failure]);
    if (round !== this.#round) return;
    if (stats) this.#take(stats);
    this.#onState(stats, error);
    this.#timer = setTimeout(() => this.restart(), error ? RETRY_MS : PERIOD_MS);
  }

  #take(stats) {
    const before = this.#samples.at(-1);
    if (before && stats.uptime_s < before.stats.uptime_s) this.#samples = []; // the server was started anew
    this.#samples = this.#samples.filter((sample) => stats.uptime_s - sample.time <= WINDOW_S);
    this.#samples.push(derive(stats, this.#samples));
    this.draw();
    this.#totals.textContent = describeTotals(stats);
  }
}

/**
 * A sample of the charts: what /stats says, and rates from the differences of its counters.
 * @param {object} stats
 * @param {object[]} samples those before it
 */
function derive(stats, samples) {
  const last = samples.at(-1)?.stats;
  const start = samples.find((sample) => stats.uptime_s - sample.time <= SHARE_WINDOW_S)?.stats;
  return {
    time: stats.uptime_s,
    stats,
    throughput: last ? ratio(stats, last, "generated_tokens", "uptime_s") : null,
    prefixShare: start ? ratio(stats, start, "prefix_hit_tokens", "prefix_query_tokens") : null,
    resultShare: start ? ratio(stats, start, "result_hits", "result_lookups") : null,
  };
}

/** How much one counter rose for each step of another; null where that stood still. */
function ratio(now, before, counter, base) {
  const rise = now[base] - before[base];
  return rise > 0 ? (now[counter] - before[counter]) / rise : null;
}

function describeTotals(stats) {
  const minutes = Math.floor(stats.uptime_s / 60);
  const up = minutes < 1 ? "less than a minute" : minutes < 120 ? counted(minutes, "minute") : counted(Math.floor(minutes / 60), "hour");
  const parts = [
    `Since the start, ${up} ago: ${counted(stats.generated_tokens, "token")} generated`,
    `${counted(stats.prompt_tokens, "token")} of prompts`,
    counted(stats.preemptions, "preemption"),
  ];
  return `${parts.join(", ")}.`;
}
