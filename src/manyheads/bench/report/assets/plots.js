// The plots. Each section has panels, drawn by Plotly; texts and lines inside take their colour from the style sheet.

const DRAWN = new Set();
const WAITING = [];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif';
const PAPER = { width: 690, panel: 335, shrink: 0.82 };
const MOST_PANELS = 24;
const MOST_LINES = 40;
const UNFOLDED = new Set();
const TOUCH = matchMedia("(pointer: coarse)").matches;
const CONFIG = {
  responsive: true,
  displaylogo: false,
  displayModeBar: TOUCH ? false : "hover",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
};

/** Makes room for a plot; it is drawn when all panels beside it are there, so that each knows its width. */
function draw(container, title, traces, layout) {
  const plot = el("div", { class: "plot", role: "img", "aria-label": `${title}. Its numbers are in the table of all rows.` });
  container.append(el("figure", { class: "panel" }, title ? el("h3", {}, title) : null, plot));
  const base = {
    autosize: true,
    height: 260,
    margin: { l: 12, r: 14, t: 10, b: 12 },
    font: { family: FONT, size: 12, color: "#808890" },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    hovermode: "closest",
    hoverlabel: { font: { family: FONT, size: 12 }, align: "left" },
    dragmode: TOUCH ? false : "zoom",
  };
  WAITING.push([plot, traces, { ...base, ...layout }]);
}

function drawWaiting() {
  for (const [plot, traces, layout] of WAITING.splice(0)) {
    Plotly.newPlot(plot, traces, layout, CONFIG);
    plot.dataset.height = layout.height;
    plot.on("plotly_click", ({ points }) => {
      const index = points[0] && points[0].customdata;
      if (index !== undefined) openRow(index);
    });
    DRAWN.add(plot);
  }
}

function points(items, x, y, more = {}) {
  return {
    type: "scatter",
    mode: "markers",
    x: items.map(x),
    y: items.map(y),
    customdata: items.map(({ index }) => index),
    text: items.map(hover),
    hovertemplate: "%{text}<extra></extra>",
    marker: marker(items),
    name: items[0].row.provider,
    ...more,
  };
}

/** Ticks at round numbers: powers of ten, or 1-2-5 steps where there are few of them. */
function logAxis(values, title, { format = number, pad = 0.08, ticks = null } = {}) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (low === high) [low, high] = [low / 2, high * 2];
  const decades = Math.log10(high / low);
  const steps = decades > (NARROW ? 1.3 : 2.2) ? [1] : decades > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  const every = decades > 8 ? 2 : 1;
  const range = [Math.log10(low) - pad * Math.max(decades, 0.3), Math.log10(high) + pad * Math.max(decades, 0.3)];
  let found = ticks || [];
  if (!ticks) {
    for (let power = Math.floor(range[0]); power <= Math.ceil(range[1]); power++) {
      if (power % every === 0) found.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(3))));
    }
    found = found.filter((value) => Math.log10(value) >= range[0] && Math.log10(value) <= range[1]);
  }
  return {
    type: "log",
    range,
    tickmode: "array",
    tickvals: found,
    ticktext: found.map((value) => format(value)),
    title: { text: title, standoff: 8 },
    automargin: true,
    zeroline: false,
    ticks: "outside",
    ticklen: 3,
  };
}

function linearAxis(title, format) {
  return { title: { text: title, standoff: 8 }, automargin: true, zeroline: true, rangemode: "tozero", tickformat: format };
}

/** Short forms of a number for an axis: no more digits than the tick has. */
function tick(value) {
  if (value >= 1e4 || value < 1e-3) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

const share = (value) => `${Number((100 * value).toPrecision(3))}%`;

function empty(place, text) {
  clear(place);
  place.append(el("p", { class: "empty" }, text));
}

function clear(place) {
  for (const plot of place.querySelectorAll(".plot")) {
    Plotly.purge(plot);
    DRAWN.delete(plot);
  }
  place.replaceChildren();
}

// Speed by length

const QUANTITIES = {
  median_ms: [
    "time",
    "ms per call, log",
    tick,
    "Lower is faster. Vertical bars show the spread (20th to 80th percentile). A line that climbs two decades while length climbs one is quadratic growth.",
  ],
  gflops: ["GFLOP/s of visible pairs", "GFLOP/s, log", tick, "Higher is faster."],
  of_matrix_rate: ["share of the matrix rate", "of the matrix rate, log", share, "Higher is faster; 100% is the rate of a plain matrix product."],
  ratio: [
    "speed-up over the fastest other (green rows)",
    "speed-up, log",
    (v) => `${tick(v)}×`,
    "Higher is faster; the dashed line is the fastest other provider. Rows whose gate is not green have no speed-up.",
  ],
};

function setting({ row }) {
  const parts = (row.shape || "").split("x");
  const shape = parts.length === 4 ? `${parts[0] === "1" ? "" : `batch ${parts[0]}, `}${parts[1]} heads × ${parts[3]}` : "";
  const threads = row.threads ? `${row.threads} thread${row.threads === 1 ? "" : "s"}` : "";
  const device = row.device && row.device !== "cpu" ? row.device : "";
  const cache = row.cache === "cold" ? "cold cache" : "";
  return [row.phase, row.dtype, shape, row.input, device, threads, cache].filter(Boolean).join(" · ");
}

/** Masks that were drawn from several histograms of lengths at one length are shown apart. */
const APART = new Set(
  [...groupBy(ROWS.filter(({ row }) => row.lengths && row.length), ({ row, name }) => `${name} ${row.length}`).values()]
    .filter((items) => unique(items.map(({ row }) => row.lengths)).length > 1)
    .map(([{ name }]) => name),
);
const facet = ({ row, name }) => (APART.has(name) && row.lengths ? `${name}, ${row.lengths}` : name);

function drawLengths() {
  const place = byId("lengths-body");
  const all = ROWS.filter(({ row, name }) => row.median_ms > 0 && row.length && name && !row.bar);
  if (!all.length) return empty(place, "No row has both a time and a length.");
  const settings = [...groupBy(all, setting)].sort((a, b) => b[1].length - a[1].length);
  const chosen = settings.find(([key]) => key === STATE.setting) || settings[0];
  const known = Object.keys(QUANTITIES).filter((field) => chosen[1].some(({ row }) => row[field] > 0));
  const field = known.includes(STATE.y) ? STATE.y : known[0];
  const change = (key) => (value) => (remember("lengths", { [key]: value }), drawLengths());
  byId("lengths-controls").replaceChildren(
    choice("Setting", settings.map(([key, items]) => [key, `${key} (${items.length} rows)`]), chosen[0], change("setting")),
    choice("Show", known.map((key) => [key, QUANTITIES[key][0]]), field, change("y")),
  );
  byId("direction").textContent = QUANTITIES[field][3];
  const items = chosen[1].filter(({ row }) => row[field] > 0);
  legend(place.parentElement.querySelector("[data-legend]"), items);
  clear(place);
  const lengths = unique(items.map(({ row }) => row.length)).sort((a, b) => a - b);
  const seen = visible(items);
  if (!seen.length) return empty(place, "Every provider is hidden.");
  const facets = [...groupBy(seen, facet)];
  if (lengths.length === 1) {
    place.append(el("p", { class: "how" }, `This setting has one length only, ${lengths[0].toLocaleString("en")} tokens.`));
    dots(place, "", seen, { field, axis: QUANTITIES[field][1], format: QUANTITIES[field][2], category: facet });
    return drawWaiting();
  }
  const panels = el("div", { class: "panels" });
  place.append(panels);
  const low = field === "median_ms" ? ({ row }) => row.p20_ms ?? row.median_ms : ({ row }) => row[field];
  const high = field === "median_ms" ? ({ row }) => row.p80_ms ?? row.median_ms : ({ row }) => row[field];
  const bounds = [...items.map(low), ...items.map(high), ...(field === "ratio" ? [1] : [])].filter((v) => v > 0);
  for (const [mask, found] of folded(place, "lengths", facets, MOST_PANELS, drawLengths)) {
    const traces = [...groupBy(found, ({ row }) => row.provider).values()].map((group) => {
      const line = [...group].sort((a, b) => a.row.length - b.row.length);
      const spread = {
        type: "data",
        symmetric: false,
        array: line.map(({ row }) => (row.p80_ms === undefined ? 0 : row.p80_ms - row.median_ms)),
        arrayminus: line.map(({ row }) => (row.p20_ms === undefined ? 0 : row.median_ms - row.p20_ms)),
        thickness: 1.2,
        width: 3,
      };
      const once = unique(line.map(({ row }) => row.length)).length === line.length;
      return points(line, ({ row }) => row.length, ({ row }) => row[field], {
        mode: once ? "lines+markers" : "markers",
        line: { color: STYLE[line[0].row.provider].color, width: 2 },
        ...(field === "median_ms" ? { error_y: spread } : {}),
      });
    });
    draw(panels, mask, traces, {
      height: 240,
      xaxis: logAxis(lengths, "tokens", { format: tokens, pad: 0.12, ticks: thinned(lengths) }),
      yaxis: logAxis(bounds, QUANTITIES[field][1], { format: QUANTITIES[field][2] }),
      shapes: field === "ratio" ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { dash: "dash", width: 1.5, color: "#808890" } }] : [],
    });
  }
  drawWaiting();
}

/** The first of many; a button draws the others. */
function folded(place, key, items, most, redraw) {
  if (items.length <= most || UNFOLDED.has(key)) return items;
  const button = el("button", { type: "button", onclick: () => (UNFOLDED.add(key), redraw()) }, `Draw the other ${items.length - most}`);
  place.append(el("p", {}, button));
  return items.slice(0, most);
}

/** Lengths that are far enough apart for their names to stand side by side. */
function thinned(lengths) {
  const span = Math.log(lengths[lengths.length - 1] / lengths[0]);
  const kept = [lengths[lengths.length - 1]];
  for (const length of [...lengths].reverse()) {
    if (Math.log(kept[kept.length - 1] / length) > span / 6) kept.push(length);
  }
  return kept.reverse();
}

// Speed and error

const ERRORS = {
  limit: ["error over what the gate allows", "largest error ÷ what the gate allows, log", ({ row }) => row.error / row.error_limit],
  norm: ["relative error (norm)", "norm of the error ÷ norm of the result, log", ({ row }) => row.error_norm],
};

function drawErrors() {
  const place = byId("errors-body");
  const all = ROWS.filter(({ row }) => row.gflops > 0 && row.error !== undefined && !row.bar);
  if (!all.length) return empty(place, "No row has both a rate and an error.");
  const known = Object.keys(ERRORS).filter((key) => all.some((item) => ERRORS[key][2](item) > 0 && Number.isFinite(ERRORS[key][2](item))));
  if (!known.length) return empty(place, "Every error is exactly 0.");
  const chosen = known.includes(STATE.x) ? STATE.x : known[0];
  const [, axis, at] = ERRORS[chosen];
  byId("errors-controls").replaceChildren(
    choice("Across", known.map((key) => [key, ERRORS[key][0]]), chosen, (value) => (remember("errors", { x: value }), drawErrors())),
  );
  const items = all.filter((item) => at(item) > 0 && Number.isFinite(at(item)));
  legend(place.parentElement.querySelector("[data-legend]"), items);
  const panels = el("div", { class: "panels wide" });
  clear(place);
  place.append(panels);
  const xs = [...items.map(at), ...(chosen === "limit" ? [1, 2] : [])];
  const gate = { type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { dash: "dash", width: 1.5, color: "#808890" } };
  const sign = { x: 0, y: 1, yref: "paper", text: "gate", showarrow: false, bgcolor: "#fff", xanchor: "left", yanchor: "top", xshift: 4 };
  for (const [dtype, found] of groupBy(visible(items), ({ row }) => row.dtype || "")) {
    const traces = [...groupBy(found, ({ row }) => row.provider).values()].map((group) => points(group, at, ({ row }) => row.gflops));
    draw(panels, dtype, traces, {
      height: 360,
      xaxis: logAxis(xs, axis, { format: tick }),
      yaxis: logAxis(items.map(({ row }) => row.gflops), "GFLOP/s of visible pairs, log", { format: tick }),
      ...(chosen === "limit" ? { shapes: [gate], annotations: [sign] } : {}),
    });
  }
  drawWaiting();
  const zero = all.length - items.length;
  if (zero) place.append(el("p", { class: "how" }, `${zero} row${zero === 1 ? " has" : "s have"} an error of exactly 0 or none on this scale and no place on a logarithmic axis; see the table.`));
}

// The machine's limits

function drawLimits() {
  const place = byId("limits-body");
  const { matrix, copy: bandwidth, exp_rate: exps } = DATA.limits;
  const all = ROWS.filter(({ row }) => row.gflops > 0 && row.of_copy_rate > 0 && row.dtype && matrix[row.dtype] && !row.bar);
  if (!bandwidth || !all.length) {
    return empty(place, "There are no rows with a rate, or the file holds no measured limits to compare them with.");
  }
  legend(place.parentElement.querySelector("[data-legend]"), all);
  const panels = el("div", { class: "panels wide" });
  clear(place);
  place.append(panels);
  // bytes over time is the row's share of the copy bandwidth; operations over bytes follow
  const intensity = ({ row }) => row.gflops / (row.of_copy_rate * bandwidth);
  for (const [dtype, group] of groupBy(all, ({ row }) => row.dtype)) {
    const top = matrix[dtype];
    const ridge = top / bandwidth;
    const left = Math.min(ridge / 20, ...group.map((item) => intensity(item) / 2));
    const right = Math.max(ridge * 4, ...group.map((item) => intensity(item) * 2));
    const roofs = [
      roof("copy bandwidth", [left, ridge], [left * bandwidth, top], "solid"),
      roof("matrix product rate", [ridge, right], [top, top], "solid"),
    ];
    const signs = [
      sign(left * 1.4, left * 1.4 * bandwidth, `copy ${number(bandwidth)} GB/s`, { yanchor: "top", xshift: 10 }),
      sign(left, top, `matrix ${number(top)} GFLOP/s`, { yanchor: "bottom" }),
    ];
    roofs.push(roof("matrix product rate", [left, ridge], [top, top], "dot", 1));
    const tops = [top];
    const each = exps ? common(group.map(({ row }) => perExponential(row, exps))) : null;
    if (each) {
      const ceiling = exps * each;
      tops.push(ceiling);
      roofs.push(roof("exponentials", [left, right], [ceiling, ceiling], "dash"));
      signs.push(sign(left, ceiling, `exp ${number(exps)} G/s × ${number(each)} FLOP`, { yanchor: ceiling > top ? "bottom" : "top" }));
      if (ceiling > top) signs[1].yanchor = "top";
    }
    const shownItems = visible(group);
    const traces = [...groupBy(shownItems, ({ row }) => row.provider).values()].map((found) => points(found, intensity, ({ row }) => row.gflops));
    const ys = [...tops, ...group.map(({ row }) => row.gflops), left * bandwidth * 2];
    draw(panels, dtype, [...roofs, ...traces], {
      height: 380,
      xaxis: logAxis([left, right], "FLOP per byte of q, k, v and result, log", { format: tick, pad: 0 }),
      yaxis: logAxis(ys, "GFLOP/s, log", { format: tick }),
      annotations: signs,
    });
  }
  drawWaiting();
}

/** Operations for each exponential: from the row's own share where it has one, else of a forward call. */
function perExponential(row, exps) {
  const found = row.of_exp_rate > 0 ? row.gflops / (row.of_exp_rate * exps) : row.phase === "forward" ? row.flops / row.pairs : NaN;
  return Number(found.toPrecision(6));
}

function roof(name, x, y, dash, width = 2) {
  return { type: "scatter", mode: "lines", x, y, name, hovertemplate: `${name}<extra></extra>`, line: { color: "#808890", width, dash } };
}

function sign(x, y, text, more) {
  return { x: Math.log10(x), y: Math.log10(y), text, showarrow: false, xanchor: "left", xshift: 4, bgcolor: "#fff", borderpad: 1, font: { size: 11 }, ...more };
}

/** The most frequent finite value. */
function common(values) {
  const counts = groupBy(values.filter(Number.isFinite), (value) => value);
  return [...counts].sort((a, b) => b[1].length - a[1].length).map(([value]) => value)[0] || null;
}

// Memory, overhead, packing

const MORE = [
  ["peak_mib", "Peak memory of one call beyond inputs and results", "MiB, log", tick],
  ["rate", "Items per second", "items per second, log", tick],
  ["overhead_us", "Time above the bare call", "microseconds", null],
];

function drawMore() {
  const place = byId("more-body");
  clear(place);
  const used = [];
  for (const [field, title, axis, format] of MORE) {
    const items = ROWS.filter(({ row }) => row[field] !== undefined && !row.bar);
    if (!items.length) continue;
    used.push(...items);
    const unit = field === "rate" ? common(items.map(({ row }) => row.rate_unit)) || items[0].row.rate_unit : null;
    const panels = el("div", { class: "panels one" });
    place.append(panels);
    const better = field === "rate" ? "further right is better" : "further left is better";
    dots(panels, `${title} (${better})`, visible(items), { field, axis: unit ? `${unit}, log` : axis, format, category: work });
  }
  const key = place.parentElement.querySelector("[data-legend]");
  if (!used.length) {
    key.replaceChildren();
    return empty(place, "This file has no rows about memory, overhead or packing.");
  }
  legend(key, unique(used));
  drawWaiting();
}

function work({ row, name }) {
  if (row.suite === "overhead" || row.suite === "packing") return row.case;
  return [name || row.case, row.length ? tokens(row.length) : "", row.phase === "forward" ? "" : row.phase].filter(Boolean).join(", ");
}

/** One line for each piece of work, one point for each row. */
function dots(place, title, items, { field, axis, format, category, zero = true }) {
  if (!items.length) return;
  const names = folded(place, title, unique(items.map(category)), MOST_LINES, drawPlots);
  items = items.filter((item) => names.includes(category(item)));
  const lines = names.map((name) => wrapped(name, NARROW ? 18 : 34));
  const height = 70 + names.length * (11 + 15 * Math.max(...lines.map((line) => line.length)));
  const log = format && items.every(({ row }) => row[field] > 0);
  const traces = [...groupBy(items, ({ row }) => row.provider).values()].map((group) =>
    points(group, ({ row }) => row[field], (item) => names.indexOf(category(item))),
  );
  draw(place, title, traces, {
    height,
    xaxis: log ? logAxis(items.map(({ row }) => row[field]), axis, { format }) : { ...linearAxis(axis.replace(", log", "")), ...(zero ? {} : { rangemode: "normal" }) },
    yaxis: {
      tickmode: "array",
      tickvals: names.map((_, i) => i),
      ticktext: lines.map((line) => line.map(plain).join("<br>")),
      range: [names.length - 0.4, -0.6],
      ticklabelstandoff: 6,
      automargin: true,
      zeroline: false,
    },
  });
}

function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(text.length > width ? /(?<=[ -])/ : /$^/)) {
    if (lines[lines.length - 1] && (lines[lines.length - 1] + word).trimEnd().length > width) lines.push("");
    lines[lines.length - 1] += word;
  }
  return lines.map((line) => line.trimEnd());
}

function drawPlots() {
  drawLengths();
  drawErrors();
  drawLimits();
  drawPlane();
  drawMore();
  drawQuality();
}

/** On paper the plots have the width of a page; afterwards that of the window again. */
function onPaper(paper) {
  for (const plot of DRAWN) {
    const width = plot.closest(".panels:not(.one)") ? PAPER.panel : PAPER.width;
    const height = Number(plot.dataset.height);
    Plotly.relayout(plot, paper ? { width, height: PAPER.shrink * height, autosize: false } : { width: null, height, autosize: true });
  }
}
