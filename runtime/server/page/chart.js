/** A chart of lines over the last two minutes, drawn as SVG. */

const SVG = "http://www.w3.org/2000/svg";
/** What a chart shows, in seconds. */
export const WINDOW_S = 120;
const HEIGHT = 78;
const MARGIN = { top: 7, right: 8, bottom: 20, left: 56 };

/**
 * @typedef {object} Series
 * @property {string} name what a reader calls it
 * @property {(sample: object) => ?number} value null where there is none
 *
 * @typedef {object} ChartOptions
 * @property {string} title
 * @property {string} unit shown beside the title; empty where the figures carry theirs
 * @property {(value: number) => string} format
 * @property {number} least the smallest top of the axis
 * @property {Series[]} series at most two
 */

export class Chart {
  #options;
  #element = document.createElement("figure");
  #svg = makeSvg("svg", { role: "img" });
  #legends;

  /** @param {ChartOptions} options */
  constructor(options) {
    this.#options = options;
    this.#element.className = "chart";
    this.#legends = options.series.map((series) => makeLegend(series.name));
    this.#element.append(this.#caption(), this.#svg);
  }

  get element() {
    return this.#element;
  }

  /**
   * Draw samples, the oldest first.
   * @param {{time: number}[]} samples `time` in seconds
   */
  draw(samples) {
    const lines = this.#options.series.map((series) => samples.map((sample) => [sample.time, series.value(sample)]));
    const values = lines.flatMap((line) => line.map(([, value]) => value ?? 0));
    const top = roundUp(Math.max(this.#options.least, ...values));
    const width = this.#svg.clientWidth || 320;
    const scale = makeScale(width, top, samples.at(-1)?.time ?? 0);
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#svg.setAttribute("aria-label", this.#describe(lines));
    this.#svg.replaceChildren(...this.#axes(scale, width, top), ...lines.flatMap((line, index) => drawLine(line, scale, index)));
    lines.forEach((line, index) => {
      this.#legends[index].lastElementChild.textContent = this.#text(line.at(-1)?.[1]);
    });
  }

  #caption() {
    const caption = document.createElement("figcaption");
    const title = document.createElement("h3");
    title.textContent = this.#options.title;
    if (this.#options.unit) {
      const unit = document.createElement("small");
      unit.textContent = ` ${this.#options.unit}`;
      title.append(unit);
    }
    caption.append(title, ...this.#legends);
    return caption;
  }

  #axes(scale, width, top) {
    const ticks = [0, top / 2, top].map((value) => ({ value, y: scale.y(value) }));
    const right = width - MARGIN.right;
    return [
      ...ticks.map(({ y }) => makeSvg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y })),
      ...ticks
        .filter(({ value }) => value !== top / 2)
        .map(({ value, y }) => makeText(this.#options.format(value), { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" })),
      makeText(`${WINDOW_S / 60} min ago`, { x: MARGIN.left, y: HEIGHT - 4 }),
      makeText("now", { x: right, y: HEIGHT - 4, "text-anchor": "end" }),
    ];
  }

  #text(value) {
    return value === null || value === undefined ? "–" : this.#options.format(value);
  }

  /** The chart in words, for those who don't see it. */
  #describe(lines) {
    const { title, unit, series } = this.#options;
    const parts = lines.map((line, index) => {
      const known = line.map(([, value]) => value).filter((value) => value !== null);
      if (known.length === 0) return `${series[index].name}: no data yet`;
      return `${series[index].name}: now ${this.#text(line.at(-1)[1])}, highest ${this.#text(Math.max(...known))}`;
    });
    return `${title}${unit && `, ${unit}`}, last ${WINDOW_S / 60} minutes. ${parts.join(". ")}.`;
  }
}

function makeLegend(name) {
  const legend = document.createElement("p");
  const label = document.createElement("span");
  label.textContent = name;
  const value = document.createElement("b");
  value.textContent = "–";
  legend.append(label, " ", value);
  return legend;
}

/** The next of 1, 2, 4, 5, 10 times a power of ten: halves of these are short figures. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 5, 10].find((step) => step * power >= value * 0.999);
}

function makeScale(width, top, now) {
  const right = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  return {
    x: (time) => right - ((now - time) / WINDOW_S) * (right - MARGIN.left),
    y: (value) => bottom - (value / top) * (bottom - MARGIN.top),
    bottom,
  };
}

/** The runs of a line that have values, each as a path; the first series also as an area. */
function drawLine(line, scale, index) {
  return runs(line).flatMap((run) => {
    const points = run.map(([time, value]) => `${scale.x(time).toFixed(1)},${scale.y(value).toFixed(1)}`);
    const [first, last] = [run[0], run.at(-1)].map(([time]) => scale.x(time).toFixed(1));
    const path = makeSvg("path", { class: `line series-${index}`, d: `M${points.join("L")}${run.length === 1 ? "h0.1" : ""}` });
    if (index > 0) return [path];
    const area = makeSvg("path", { class: "area", d: `M${first},${scale.bottom}L${points.join("L")}L${last},${scale.bottom}Z` });
    return [area, path];
  });
}

function runs(line) {
  const found = [];
  line.forEach((point, index) => {
    if (point[1] === null) return;
    if (index === 0 || line[index - 1][1] === null) found.push([]);
    found.at(-1).push(point);
  });
  return found;
}

function makeSvg(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  return element;
}

function makeText(text, attributes) {
  const element = makeSvg("text", attributes);
  element.textContent = text;
  return element;
}
