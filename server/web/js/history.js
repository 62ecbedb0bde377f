// What /stats said over the last minutes, and the rates and quantiles that follow from it.

export const NUM_POINTS = 120;
const WINDOW = 30; // points over which quantiles are taken

export class History {
  #points = [];

  add(engine, time) {
    const last = this.#points.at(-1);
    if (last && last.engine.stats.num_steps > engine.stats.num_steps) this.#points = []; // it has started again
    this.#points.push({ engine, time });
    if (this.#points.length > NUM_POINTS + 1) this.#points.shift();
  }

  get latest() {
    return this.#points.at(-1)?.engine;
  }

  /** Values of a gauge. */
  gauge(read) {
    return this.#points.map(({ engine }) => read(engine));
  }

  /** Growth of a counter per second, between each two points. */
  rate(read) {
    return this.#points.slice(1).map((point, i) => {
      const before = this.#points[i];
      return (read(point.engine) - read(before.engine)) / (point.time - before.time);
    });
  }

  /** At each point the quantile of what a histogram saw in the window before it; NaN if nothing. */
  quantile(name, share) {
    return this.#points.slice(1).map((point, i) => {
      const before = this.#points[Math.max(0, i + 1 - WINDOW)];
      return quantile(point.engine.histograms[name], before.engine.histograms[name], share);
    });
  }

  /** The latest of these quantiles, or that since the engine's start if nothing has come since. */
  latestQuantile(name, share) {
    const [bounds, counts] = this.latest.histograms[name];
    const ever = quantile([bounds, counts], [bounds, counts.map(() => 0)], share);
    return this.quantile(name, share).filter(Number.isFinite).at(-1) ?? ever;
  }
}

function quantile([bounds, counts], [, before], share) {
  const seen = counts.map((count, i) => count - before[i]);
  let left = share * seen.reduce((sum, count) => sum + count, 0);
  if (!left) return NaN;
  for (let i = 0; i < bounds.length; i++) {
    if (seen[i] >= left) {
      const low = i ? bounds[i - 1] : 0;
      return low + ((bounds[i] - low) * left) / seen[i];
    }
    left -= seen[i];
  }
  return bounds.at(-1);
}
