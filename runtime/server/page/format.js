/** Figures as people read them. */

/** A count or a rate: 7, 3.4, 128, 12.5k. */
export function figure(value) {
  if (value >= 10_000) return `${figure(value / 1000)}k`;
  return value < 10 ? String(Number(value.toFixed(1))) : String(Math.round(value));
}

/** A time in seconds: 850 µs, 12 ms, 1.5 s. */
export function duration(seconds) {
  if (seconds >= 1) return `${figure(seconds)} s`;
  return seconds >= 0.001 || seconds === 0 ? `${figure(seconds * 1000)} ms` : `${Math.round(seconds * 1e6)} µs`;
}

/** A share between 0 and 1, in percent. */
export const percent = (share) => `${Math.round(share * 100)}%`;

/** A count with its noun: 1 token, 2,048 tokens. */
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
