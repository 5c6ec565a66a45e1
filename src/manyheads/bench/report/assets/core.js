"use strict";
// Data, number formatting, small DOM helpers and the state that lives in the address. Everything on the page is
// built from DATA.rows, which are the rows of the results file, unchanged.

const DATA = JSON.parse(document.getElementById("data").textContent);
const ROWS = DATA.rows.map((row, index) => ({ index, row, name: DATA.names[index] }));
const NARROW = matchMedia("(max-width: 640px)").matches;
const INTEGERS = new Set(["length", "rounds", "unique_tiles", "pairs", "flops", "seed", "threads", "parameters", "steps"]);
const SHARES = new Set(["of_matrix_rate", "of_copy_rate", "of_exp_rate", "density", "area", "waste", "mass", "recall", "selection"]);

function number(value, digits = 3) {
  if (value === null || value === undefined) return "";
  const x = Number(value);
  const size = Math.abs(x);
  if (x === 0) return "0";
  if (size < 1e-4 || size >= 1e6) return x.toExponential(digits - 1);
  if (size >= 10 ** (digits - 1)) return Math.round(x).toLocaleString("en");
  return x.toPrecision(digits);
}

function percent(value) {
  if (value === null || value === undefined) return "";
  return `${(100 * value).toFixed(value >= 0.1 ? 0 : 1)}%`;
}

/** Tokens with k = 1,024, as lengths are chosen. */
function tokens(n) {
  if (n < 1024) return String(n);
  const [unit, letter] = n < 1048576 ? [1024, "k"] : [1048576, "M"];
  return `${Number((n / unit).toFixed(n % unit && n < 10 * unit ? 1 : 0))}${letter}`;
}

/** A field as people read it; `title` elsewhere keeps the exact value. */
function shown(field, value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (SHARES.has(field)) return percent(value);
  if (INTEGERS.has(field)) return Number(value).toLocaleString("en");
  if (field === "agreement") return Number(value).toFixed(6);
  if (field === "overhead_us") return (value > 0 ? "+" : "") + Number(value).toFixed(1);
  return typeof value === "number" ? number(value) : String(value);
}

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Text that may break after an underscore. */
function breakable(text) {
  const parts = String(text).split("_");
  return parts.flatMap((part, i) => (i < parts.length - 1 ? [`${part}_`, el("wbr")] : [part]));
}

const byId = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) {
    const at = key(item);
    if (!groups.has(at)) groups.set(at, []);
    groups.get(at).push(item);
  }
  return groups;
}

/** A labelled <select>; `options` are [value, text] pairs. */
function choice(label, options, value, onchange) {
  const select = el("select", { onchange: () => onchange(select.value), "aria-label": label });
  for (const [key, text] of options) select.append(el("option", { value: key, selected: key === value }, text));
  return el("label", {}, el("span", {}, label), select);
}

async function copy(text, button) {
  const before = button.textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "offscreen" });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  button.textContent = done ? "Copied" : "Copying is not allowed here";
  setTimeout(() => (button.textContent = before), 1500);
}

// The address holds the section and what was chosen: "#rows?provider=flex&sort=median_ms".

const STATE = {};

function readAddress() {
  const [section, query] = location.hash.slice(1).split("?");
  for (const key of Object.keys(STATE)) delete STATE[key];
  for (const [key, value] of new URLSearchParams(query || "")) STATE[key] = value;
  return section;
}

function remember(section, changes) {
  for (const [key, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") delete STATE[key];
    else STATE[key] = String(value);
  }
  const query = new URLSearchParams(STATE).toString();
  try {
    history.replaceState(null, "", `#${section}${query ? `?${query}` : ""}`);
  } catch {
    // a page shown inside another may not change its address; everything else works
  }
}

// One row in full.

function openRow(index) {
  const { row, name } = ROWS[index];
  byId("row-title").textContent = row.bar || `${row.provider} · ${name || row.case}`;
  const list = el("dl", { class: "fields" });
  for (const [field, value] of Object.entries(row)) {
    list.append(
      el(
        "div",
        { title: DATA.fields[field] || "" },
        el("dt", {}, field),
        el("dd", { "data-field": field }, String(value)),
        el("dd", { class: "about" }, DATA.fields[field] || ""),
      ),
    );
  }
  byId("row-body").replaceChildren(list);
  byId("row-dialog").showModal();
}
