const data = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon2", "cross"];
const narrow = window.matchMedia("(max-width: 40rem)");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const chosen = { x: data.x.find((axis) => axis.key === "bytes_read") || data.x[0], y: data.y[0] };

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

/* Numbers for people; three digits, as in the table. */
const three = (value) => (value >= 99.95 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
function scaled(value, units) {
  const [unit, scale] = units.find(([, scale]) => Math.abs(value) >= scale * 0.9995) || units[units.length - 1];
  return `${three(value / scale)} ${unit}`;
}
const FORMATS = {
  percent: (value) => `${three(100 * value)} %`,
  bytes: (value) => scaled(value, [["GB", 1e9], ["MB", 1e6], ["KB", 1e3], ["B", 1]]),
  seconds: (value) => scaled(value, [["s", 1], ["ms", 1e-3], ["µs", 1e-6]]),
  plain: (value) => three(value),
};

/* Round positions between two numbers: 1, 2, 5 times powers of ten, or even steps where the range is short. */
function ticks(low, high, log) {
  const found = [];
  if (log) {
    const steps = high / low > 2000 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) found.push(step * 10 ** power);
  } else {
    const rough = (high - low) / 6 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

function scaleOf(values, format, title, edge) {
  const low = Math.min(...values), high = Math.max(...values);
  const log = low > 0 && high / low > 4;
  const pad = log ? (high / low) ** edge : (high - low || high || 1) * edge;
  const [from, to] = log ? [low / pad, high * pad] : [Math.max(low - pad, low >= 0 ? -pad / 2 : -Infinity), high + pad];
  const positions = ticks(Math.max(from, log ? from : low - pad), to, log);
  return {
    title: { text: title, standoff: 12 }, type: log ? "log" : "linear", range: log ? [Math.log10(from), Math.log10(to)] : [from, to],
    tickvals: positions, ticktext: positions.map(format), gridcolor: color("line"), zeroline: false, automargin: true,
    linecolor: color("muted"), fixedrange: narrow.matches,
  };
}

function points() {
  const both = (point) => [chosen.x.key, chosen.y.key].every((key) => point[key] !== null && point[key] !== undefined);
  return data.methods.map((method) => ({
    ...method, points: method.points.filter(both).sort((a, b) => a[chosen.x.key] - b[chosen.x.key]),
  })).filter((method) => method.points.length);
}

/* The points that no other point beats in both directions, from cheap to dear. */
function front(all) {
  const { key, lower } = chosen.y, better = (a, b) => (lower ? a < b : a > b);
  const sorted = [...all].sort((a, b) => a[chosen.x.key] - b[chosen.x.key] || (better(a[key], b[key]) ? -1 : 1));
  return sorted.reduce((kept, point) => (!kept.length || better(point[key], kept[kept.length - 1][key]) ? [...kept, point] : kept), []);
}

function traces(methods, best, show) {
  const x = (point) => point[chosen.x.key], y = (point) => point[chosen.y.key];
  const lines = methods.map((method) => {
    const number = Number(method.style), known = !Number.isNaN(number), tint = color(known ? `m${number % 8}` : method.style);
    const symbol = SYMBOLS[(number + Math.floor(number / 8)) % 8]; // the ninth method has the first colour, but not its symbol
    const short = method.name.length > 28 ? `${method.name.slice(0, 27)}…` : method.name;
    return {
      name: escape(short), x: method.points.map(x), y: method.points.map(y), mode: "lines+markers",
      text: method.points.map((point) => escape(point.budget)),
      customdata: method.points.map((point) => [show.x(x(point)), show.y(y(point))]),
      hovertemplate: `<b>${escape(method.name)}</b> %{text}<br>%{customdata[1]}<br>%{customdata[0]}<extra></extra>`,
      line: { color: tint, width: 2, dash: method.style === "random" ? "dot" : "solid" },
      marker: { color: tint, size: method.style === "dense" ? 15 : 9, symbol: known ? symbol : method.style === "dense" ? "star" : "x", line: { color: color("paper"), width: 1 } },
    };
  });
  const wide = {
    name: "Pareto front", x: best.map(x), y: best.map(y), mode: "lines", hoverinfo: "skip",
    line: { color: color("front"), width: 9, shape: "hv" }, opacity: 0.65,
  };
  return [wide, ...lines];
}

function draw() {
  const methods = points(), all = methods.flatMap((method) => method.points), best = front(all);
  const share = chosen.y.share, show = { x: FORMATS[chosen.x.format], y: FORMATS[share ? "percent" : "plain"] };
  const yaxis = scaleOf(all.map((point) => point[chosen.y.key]), show.y, narrow.matches ? chosen.y.name : chosen.y.title, 0.08);
  if (share) Object.assign(yaxis, { type: "linear", range: [-0.04, 1.06], tickvals: [0, 0.2, 0.4, 0.6, 0.8, 1], ticktext: ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"] });
  if (chosen.y.lower) yaxis.range.reverse();
  const dense = methods.find((method) => method.style === "dense");
  const layout = {
    xaxis: scaleOf(all.map((point) => point[chosen.x.key]), show.x, chosen.x.title, 0.06), yaxis,
    paper_bgcolor: color("paper"), plot_bgcolor: color("paper"), hovermode: "closest", dragmode: narrow.matches ? false : "zoom",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("ink") },
    hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"), font: { color: color("ink") }, align: "left" },
    margin: { l: 60, r: 16, t: 12, b: 56 },
    legend: narrow.matches ? { orientation: "h", x: 0, y: -0.2, yanchor: "top" } : { x: 1.02, y: 0.94, traceorder: "normal" } /* below the buttons */,
    shapes: dense ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: dense.points[0][chosen.y.key], y1: dense.points[0][chosen.y.key], line: { color: color("muted"), width: 1.5, dash: "dash" }, layer: "between" }] : [],
  };
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]], displayModeBar: narrow.matches ? false : "hover" };
  Plotly.react("plot", traces(methods, best, show), layout, config);
  const marked = new Set(best.map((point) => String(point.number)));
  for (const row of document.querySelectorAll("#table tbody tr")) row.classList.toggle("front", marked.has(row.dataset.number));
}

function choices(letter) {
  const box = document.getElementById(`choose-${letter}`);
  for (const axis of data[letter]) {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: letter, checked: axis === chosen[letter] });
    input.addEventListener("change", () => { chosen[letter] = axis; draw(); });
    label.append(input, axis.name);
    box.append(label);
  }
}

function sortBy(button) {
  const head = button.closest("th"), body = document.querySelector("#table tbody");
  const column = [...head.parentNode.children].indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => row.children[column].dataset.sort;
  const compare = (a, b) => {
    const reference = b.classList.contains("reference") - a.classList.contains("reference");
    if (reference || value(a) === value(b)) return reference || a.dataset.number - b.dataset.number;
    if (value(a) === "" || value(b) === "") return value(a) === "" ? 1 : -1; // what was not measured comes last
    return (up ? 1 : -1) * (column ? value(a) - value(b) : value(a).localeCompare(value(b)));
  };
  body.append(...[...body.children].sort(compare));
}

choices("x");
choices("y");
for (const button of document.querySelectorAll("#table thead button")) button.addEventListener("click", () => sortBy(button));
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
if (chosen.x) draw();
