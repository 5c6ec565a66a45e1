// The table of all rows: sort, filter, choose columns, copy as CSV, open a row. Its state lives in the address.

const PAGE = 250;
const WHAT = "what";
const DEFAULT_COLUMNS = NARROW
  ? [WHAT, "provider", "median_ms", "ratio", "score", "length", "dtype", "gate"]
  : [WHAT, "length", "dtype", "provider", "score", "score_unit", "median_ms", "spread", "ratio", "baseline", "gate", "error", "gflops", "of_matrix_rate", "peak_mib", "phase", "remark"];
const BAR_COLUMNS = ["bar", "target", "measured", "verdict", "note"];

/** Columns that are put together from fields; every other column is a field as it is. */
const COMPOSED = {
  [WHAT]: {
    label: "mask or case",
    about: "The name of the mask, else of the case.",
    text: ({ row, name }) => (row.suite === "masks" && name ? facet({ row, name }) : `${row.suite}: ${row.case}`),
    title: ({ row }) => `case = ${row.case}`,
  },
  spread: {
    label: "spread, ms",
    about: "From the 20th to the 80th percentile of the rounds.",
    text: ({ row }) => (row.p20_ms === undefined ? "" : `${number(row.p20_ms)}–${number(row.p80_ms)}`),
    title: ({ row }) => (row.p20_ms === undefined ? "" : `p20_ms = ${row.p20_ms}, p80_ms = ${row.p80_ms}`),
    value: ({ row }) => (row.p20_ms === undefined ? undefined : row.p80_ms - row.p20_ms),
  },
  ratio: {
    label: "speed-up",
    about: DATA.fields.ratio,
    text: ({ row }) => (row.ratio === undefined ? "" : row.baseline === row.provider ? "baseline" : `${number(row.ratio)}×`),
    title: ({ row }) => (row.ratio === undefined ? "" : `ratio = ${row.ratio}`),
    value: ({ row }) => row.ratio,
    field: true,
  },
  remark: {
    label: "remark",
    about: "Why nothing was measured, or what else a reader must know.",
    text: ({ row }) => [row.status === "measured" ? "" : row.status, row.reason, row.noisy ? "noisy" : "", row.note].filter(Boolean).join("; "),
    title: () => "",
  },
};

const LABELS = {
  median_ms: "ms",
  baseline: "over",
  of_matrix_rate: "of matrix rate",
  of_copy_rate: "of copy rate",
  of_exp_rate: "of exp rate",
  gflops: "GFLOP/s",
  peak_mib: "MiB",
  length: "tokens",
  overhead_us: "overhead, us",
  mass: "weight kept",
  recall: "top keys kept",
  selection: "choosing",
  speed: "over dense",
};

const present = Object.keys(DATA.fields).filter((field) => ROWS.some(({ row }) => row[field] !== undefined));
const COLUMNS = unique([...Object.keys(COMPOSED), ...present]).map((key) => ({
  key,
  label: (COMPOSED[key] || {}).label || LABELS[key] || key.replace(/_/g, " "),
  about: (COMPOSED[key] || {}).about || DATA.fields[key],
  numeric: key === "spread" || ROWS.some(({ row }) => typeof row[key] === "number"),
  text: COMPOSED[key] ? COMPOSED[key].text : ({ row }) => shown(key, row[key]),
  title: COMPOSED[key] ? COMPOSED[key].title : ({ row }) => (row[key] === undefined ? "" : `${key} = ${row[key]}`),
  value: (COMPOSED[key] || {}).value || (COMPOSED[key] ? COMPOSED[key].text : ({ row }) => row[key]),
}));
const columnOf = (key) => COLUMNS.find((column) => column.key === key);

/** Filters by equality; the text of each is what people choose from. */
const FILTERS = [
  ["suite", "Suite", ({ row }) => row.suite],
  ["mask", "Mask", (item) => (item.row.bar ? "" : item.name || "")],
  ["length", "Tokens", ({ row }) => (row.length === undefined ? "" : String(row.length))],
  ["dtype", "Dtype", ({ row }) => row.dtype || ""],
  ["phase", "Phase", ({ row }) => row.phase],
  ["provider", "Provider", ({ row }) => row.provider],
  ["gate", "Gate", ({ row }) => row.gate],
  ["status", "Status", ({ row }) => row.status],
  ["noisy", "Noise", ({ row }) => (row.noisy ? "noisy" : "steady")],
];

let shownRows = PAGE;

function columnsShown() {
  const asked = (STATE.cols || "").split(",").filter((key) => columnOf(key));
  if (asked.length) return asked;
  const bars = STATE.rows === "targets" ? BAR_COLUMNS : DEFAULT_COLUMNS;
  return bars.filter((key) => columnOf(key) && (present.includes(key) || (COMPOSED[key] && !COMPOSED[key].field)));
}

function filtered() {
  const words = (STATE.q || "").toLowerCase().split(/\s+/).filter(Boolean);
  const kind = STATE.rows || "measurements";
  const found = ROWS.filter((item) => {
    const { row, name } = item;
    if (kind === "measurements" ? row.bar : kind === "targets" ? !row.bar : false) return false;
    if (FILTERS.some(([key, , get]) => STATE[key] !== undefined && STATE[key] !== get(item))) return false;
    if (!words.length) return true;
    const text = [name, ...Object.values(row).filter((value) => typeof value === "string")].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  return sorted(found);
}

function sorted(items) {
  const [key, direction] = (STATE.sort || "").split(":");
  const column = columnOf(key);
  if (!column) return items;
  const sign = direction === "desc" ? -1 : 1;
  const blank = (value) => value === undefined || value === null || value === "";
  return [...items].sort((a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (blank(x) || blank(y)) return blank(x) - blank(y) || a.index - b.index;
    const order = column.numeric ? Number(x) - Number(y) : String(x).localeCompare(String(y), "en", { numeric: true });
    return sign * order || a.index - b.index;
  });
}

function drawTable() {
  const columns = columnsShown().map(columnOf);
  const items = filtered();
  if (items.length <= 1.6 * PAGE) shownRows = Math.max(shownRows, items.length);
  const [sortKey, sortDirection] = (STATE.sort || "").split(":");
  const head = el("tr");
  for (const column of columns) {
    const direction = column.key === sortKey ? (sortDirection === "desc" ? "descending" : "ascending") : null;
    const arrow = direction === "descending" ? " ▼" : direction ? " ▲" : "";
    const button = el("button", { type: "button", title: column.about, onclick: () => sortBy(column.key) }, column.label + arrow);
    head.append(el("th", { scope: "col", class: column.numeric ? "number" : "", "aria-sort": direction, "data-field": column.key }, button));
  }
  byId("table").tHead.replaceChildren(head);
  byId("table").tBodies[0].replaceChildren(...items.slice(0, shownRows).map((item) => line(item, columns)));
  const total = ROWS.length;
  byId("rows-count").textContent = total ? `${items.length.toLocaleString("en")} of ${total.toLocaleString("en")} rows` : "The file has no rows.";
  const left = items.length - shownRows;
  byId("rows-more").replaceChildren(
    ...(left > 0
      ? [
          el("button", { type: "button", onclick: () => ((shownRows += 5 * PAGE), drawTable()) }, `Show ${Math.min(left, 5 * PAGE)} more`),
          el("button", { type: "button", onclick: () => ((shownRows = Infinity), drawTable()) }, `Show all ${items.length}`),
        ]
      : []),
  );
  for (const [key] of FILTERS) {
    const select = byId(`filter-${key}`);
    if (select) select.value = STATE[key] ?? "*";
  }
}

function line(item, columns) {
  const { row, index } = item;
  const tone = row.status !== "measured" ? "refused" : row.gate === "red" || row.verdict === "missed" ? "bad" : row.noisy ? "noisy" : "";
  const cells = columns.map((column) => {
    const text = column.text(item);
    const content = column.key === "provider" ? who(text) : column.key === "gate" || column.key === "verdict" ? badge(text) : text;
    const nodes = column.key === WHAT ? breakable(text) : [content];
    return el("td", { class: column.numeric ? "number" : column.key === WHAT ? "what" : "", title: column.title(item), "data-field": column.key }, ...nodes);
  });
  return el("tr", { class: tone, tabindex: "0", "data-row": index, onclick: () => openRow(index), onkeydown: (event) => onRowKey(event, index) }, ...cells);
}

function badge(text) {
  const sign = { green: "✓", red: "✗", lossy: "≈", met: "✓", missed: "✗", "not measured": "–" }[text];
  return el("span", { class: `badge ${text.replace(/ /g, "-")}` }, sign ? `${sign} ${text}` : text);
}

function onRowKey(event, index) {
  const moves = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" };
  if (event.key === "Enter" || event.key === " ") openRow(index);
  else if (moves[event.key]) event.currentTarget[moves[event.key]]?.focus();
  else return;
  event.preventDefault();
}

function sortBy(key) {
  const [before, direction] = (STATE.sort || "").split(":");
  const next = before !== key ? `${key}:asc` : direction === "asc" ? `${key}:desc` : null;
  remember("rows", { sort: next });
  drawTable();
  byId("table").tHead.querySelector(`[data-field="${key}"] button`).focus();
}

function csv() {
  const columns = columnsShown().map(columnOf);
  const quote = (value) => (/[",\n\r]/.test(value) ? `"${value.replace(/"/g, '""')}"` : value);
  const exact = ({ key, text }, item) => (COMPOSED[key] && !COMPOSED[key].field ? text(item) : item.row[key] ?? "");
  const lines = filtered().map((item) => columns.map((column) => quote(String(exact(column, item)))).join(","));
  return [columns.map((column) => column.key).join(","), ...lines].join("\n") + "\n";
}

function chooseFilter(key, value) {
  shownRows = PAGE;
  remember("rows", { [key]: value === "*" ? null : value });
  drawTable();
}

function buildControls() {
  const form = byId("rows-controls");
  form.addEventListener("submit", (event) => event.preventDefault());
  const search = el("input", { type: "search", id: "filter-q", placeholder: "words in any field", value: STATE.q || "", "aria-label": "Search" });
  search.addEventListener("input", () => chooseFilter("q", search.value.trim() || "*"));
  const kinds = [["measurements", "measurements"], ["targets", "verdicts of targets"], ["all", "all"]];
  const parts = [el("label", { class: "wide" }, el("span", {}, "Search"), search)];
  if (ROWS.some(({ row }) => row.bar)) {
    parts.push(choice("Rows", kinds, STATE.rows || "measurements", (value) => chooseFilter("rows", value === "measurements" ? "*" : value)));
  }
  for (const [key, label, get] of FILTERS) {
    const values = unique(ROWS.map(get));
    if (values.length < 2) continue;
    if (values.every((value) => value === "" || Number.isFinite(Number(value)))) values.sort((a, b) => a - b);
    const options = values.filter(Boolean).map((value) => [value, key === "length" ? Number(value).toLocaleString("en") : value]);
    const select = choice(label, [["*", "all"], ...options], STATE[key] ?? "*", (value) => chooseFilter(key, value));
    select.querySelector("select").id = `filter-${key}`;
    parts.push(select);
  }
  form.replaceChildren(...parts, columnChooser(), actions());
}

function columnChooser() {
  const list = el("div", { class: "columns" });
  const shownKeys = new Set(columnsShown());
  for (const column of COLUMNS) {
    const box = el("input", { type: "checkbox", checked: shownKeys.has(column.key), onchange: () => toggleColumn(column.key, box.checked) });
    list.append(el("label", { title: column.about }, box, column.label));
  }
  return el("details", { id: "columns" }, el("summary", {}, "Columns"), list);
}

function toggleColumn(key, on) {
  const asked = new Set(columnsShown());
  if (on) asked.add(key);
  else asked.delete(key);
  const ordered = [...new Set([...DEFAULT_COLUMNS, ...COLUMNS.map((column) => column.key)])].filter((each) => asked.has(each) && columnOf(each));
  remember("rows", { cols: ordered.join(",") });
  drawTable();
}

function actions() {
  const copyButton = el("button", { type: "button", id: "copy-csv", onclick: () => copy(csv(), copyButton) }, "Copy as CSV");
  const reset = el("button", { type: "button", id: "reset", onclick: resetTable }, "Reset");
  return el("div", { class: "actions" }, copyButton, reset);
}

function resetTable() {
  for (const key of ["q", "rows", "sort", "cols", ...FILTERS.map(([name]) => name)]) delete STATE[key];
  shownRows = PAGE;
  remember("rows", {});
  buildControls();
  drawTable();
}
