// How a row looks in every plot: colour and symbol of its provider, hollow when noisy, a cross when its gate is red.

const HIDDEN = new Set();
const STYLE = DATA.styles;

const SHAPES = {
  circle: "M8 3a5 5 0 1 1 0 10a5 5 0 1 1 0-10z",
  square: "M3.5 3.5h9v9h-9z",
  diamond: "M8 2l6 6-6 6-6-6z",
  "triangle-up": "M8 2.5l6 10.5H2z",
  "triangle-down": "M8 13.5l6-10.5H2z",
  pentagon: "M8 2l6 4.5-2.3 7H4.3L2 6.5z",
  hexagram: "M8 1l2 3.5h4L12 8l2 3.5h-4L8 15l-2-3.5H2L4 8 2 4.5h4z",
  star: "M8 1.5l1.8 4.3 4.7.4-3.6 3 1.1 4.6L8 11.3l-4 2.5 1.1-4.6-3.6-3 4.7-.4z",
  bowtie: "M2.5 3v10L8 8l5.5 5V3L8 8z",
};

function icon(provider) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[STYLE[provider].symbol]);
  path.setAttribute("fill", STYLE[provider].color);
  svg.append(path);
  return svg;
}

function who(provider) {
  return STYLE[provider] ? el("span", { class: "who" }, icon(provider), provider) : provider;
}

function symbolOf(row) {
  const symbol = STYLE[row.provider].symbol;
  if (row.gate === "red") return "x";
  if (row.gate === "lossy") return `${symbol}-open-dot`;
  return row.noisy ? `${symbol}-open` : symbol;
}

function marker(items) {
  return {
    color: STYLE[items[0].row.provider].color,
    symbol: items.map(({ row }) => symbolOf(row)),
    size: 9,
    opacity: 0.85,
    line: { color: STYLE[items[0].row.provider].color, width: 1.5 },
  };
}

/** One legend for all panels of a section; a click on a provider hides it in every plot of the page. */
function legend(place, items) {
  const providers = unique(items.map(({ row }) => row.provider));
  const marks = [];
  if (items.some(({ row }) => row.noisy)) marks.push("hollow: noisy");
  if (items.some(({ row }) => row.gate === "red")) marks.push("×: gate is red");
  if (items.some(({ row }) => row.gate === "lossy")) marks.push("dotted: lossy");
  place.replaceChildren(
    ...providers.map((provider) =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": HIDDEN.has(provider) ? "false" : "true",
          title: HIDDEN.has(provider) ? `Show ${provider}` : `Hide ${provider}`,
          onclick: () => {
            if (!HIDDEN.delete(provider)) HIDDEN.add(provider);
            remember(place.closest("section").id, { hide: [...HIDDEN].join("|") });
            drawPlots();
          },
        },
        icon(provider),
        provider,
      ),
    ),
    ...(marks.length ? [el("span", { class: "marks" }, marks.join(" · "))] : []),
  );
}

const visible = (items) => items.filter(({ row }) => !HIDDEN.has(row.provider));

/** Text inside a plot is a little markup of its own. */
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function hover({ row, name }) {
  const lines = [`<b>${plain(row.provider)}</b>  ${plain(name || row.case)}`];
  const facts = [row.phase, row.dtype, row.shape || (row.length ? `N = ${row.length}` : "")];
  lines.push(facts.filter(Boolean).map(plain).join(" · "));
  if (row.median_ms !== undefined) {
    const spread = row.p20_ms === undefined ? "" : ` (${number(row.p20_ms)} to ${number(row.p80_ms)})`;
    lines.push(`${number(row.median_ms)} ms${spread}${row.noisy ? ", noisy" : ""}`);
  }
  if (row.gflops !== undefined) {
    const share = row.of_matrix_rate === undefined ? "" : `, ${percent(row.of_matrix_rate)} of the matrix rate`;
    lines.push(`${number(row.gflops)} GFLOP/s${share}`);
  }
  if (row.ratio !== undefined && row.baseline !== row.provider) lines.push(`${number(row.ratio)}× ${plain(row.baseline)}`);
  if (row.rate !== undefined) lines.push(`${number(row.rate)} ${plain(row.rate_unit || "/s")}`);
  if (row.overhead_us !== undefined) lines.push(`${shown("overhead_us", row.overhead_us)} us above the bare call`);
  if (row.speed !== undefined) lines.push(`${plain(row.setting || "")}: ${number(row.speed)}× dense, keeps ${percent(row.area)} of the pairs, ${percent(row.mass)} of the weight`);
  if (row.score !== undefined) lines.push(`${number(row.score)} ${plain(row.score_unit)}, seed ${row.seed}`);
  if (row.peak_mib !== undefined) lines.push(`${number(row.peak_mib)} MiB`);
  if (row.error !== undefined) lines.push(`error ${number(row.error)}, gate ${row.gate}`);
  return lines.join("<br>");
}
