// Small charts on canvases, sharp on every screen, in the page's colours.

const COLORS = ["--accent", "--second", "--third"];

/** A canvas's context in CSS pixels, cleared. */
function prepare(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(canvas);
  return { context, width, height, color: (name) => style.getPropertyValue(name).trim(), font: style.fontFamily };
}

/** Lines over time, newest at the right. `lines`: arrays of numbers, NaN where there is none. */
export function drawLines(canvas, lines, { numPoints, format }) {
  const { context, width, height, color, font } = prepare(canvas);
  const top = niceCeiling(Math.max(...lines.flat().filter(Number.isFinite), 0));
  const x = (i, line) => width - ((line.length - 1 - i) / (numPoints - 1)) * width;
  const y = (value) => height - 2 - (value / top) * (height - 18);
  context.strokeStyle = color("--line");
  context.fillStyle = color("--faint");
  context.font = `11px ${font}`;
  for (const share of [0.5, 1]) {
    context.beginPath();
    context.moveTo(0, Math.round(y(top * share)) + 0.5);
    context.lineTo(width, Math.round(y(top * share)) + 0.5);
    context.stroke();
    context.fillText(format(top * share), 2, y(top * share) - 4);
  }
  lines.forEach((line, k) => {
    context.strokeStyle = context.fillStyle = color(COLORS[k]);
    for (const [from, to] of runs(line)) drawRun(context, line, from, to, x, y, height);
  });
}

function drawRun(context, line, from, to, x, y, height) {
  const trace = () => {
    for (let i = from; i < to; i++) context.lineTo(x(i, line), y(line[i]));
  };
  context.globalAlpha = 0.12;
  context.beginPath();
  context.moveTo(x(from, line), height);
  trace();
  context.lineTo(x(to - 1, line), height);
  context.fill();
  context.globalAlpha = 1;
  context.lineWidth = 2;
  context.lineJoin = "round";
  context.beginPath();
  trace();
  if (to - from === 1) context.arc(x(from, line), y(line[from]), 1, 0, 7);
  context.stroke();
  context.lineWidth = 1;
}

/** [from, to) of each stretch of finite numbers. */
function* runs(line) {
  for (let i = 0; i < line.length; i++) {
    if (!Number.isFinite(line[i])) continue;
    const from = i;
    while (Number.isFinite(line[i])) i++;
    yield [from, i];
  }
}

function niceCeiling(value) {
  if (value <= 0) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 7.5, 10].map((n) => n * unit).find((n) => n >= value);
}

/** One square per character of `blocks`; see LiveView in cupy_engine/messages.py. */
export function drawBlocks(canvas, blocks) {
  const width = canvas.clientWidth;
  const size = width / Math.ceil(width / (blocks.length > 512 ? 11 : 15));
  const perRow = Math.round(width / size);
  canvas.style.height = `${Math.ceil(blocks.length / perRow) * size}px`;
  const { context, color } = prepare(canvas);
  const fills = { ".": color("--block-empty"), c: color("--block-cached"), 1: color("--block-used") };
  [...blocks].forEach((mark, i) => {
    context.fillStyle = fills[mark] ?? color("--block-shared");
    context.beginPath();
    context.roundRect((i % perRow) * size + 1, Math.floor(i / perRow) * size + 1, size - 2, size - 2, 2);
    context.fill();
  });
}
