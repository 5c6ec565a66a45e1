// Targets, refusals, versions, permalinks, dialogs, and the start of it all.

const VERDICTS = ["met", "missed", "not measured"];

function drawTargets() {
  const place = byId("targets-body");
  const bars = ROWS.filter(({ row }) => row.verdict);
  if (!bars.length) {
    place.replaceChildren(el("p", { class: "empty" }, "This run judged no targets; they are the suite “targets”."));
    return;
  }
  const only = VERDICTS.includes(STATE.verdict) ? STATE.verdict : null;
  const count = (verdict) => bars.filter(({ row }) => row.verdict === verdict).length;
  const buttons = [null, ...VERDICTS].filter((verdict) => !verdict || count(verdict)).map((verdict) =>
    el(
      "button",
      {
        type: "button",
        class: `tally ${(verdict || "all").replace(/ /g, "-")}`,
        "aria-pressed": String(only === verdict),
        onclick: () => (remember("targets", { verdict }), drawTargets()),
      },
      el("b", {}, String(verdict ? count(verdict) : bars.length)),
      ` ${verdict || "targets"}`,
    ),
  );
  const groups = groupBy(bars, ({ row }) => row.bar.split(": ").slice(0, -1).join(": ") || row.bar);
  const body = [...groups].map(([promise, items]) => targetGroup(promise, items, only, Boolean(only) || groups.size <= 5));
  const openAll = el("button", { type: "button", class: "link", onclick: () => openGroups(place, openAll) }, "Open all");
  place.replaceChildren(
    el("div", { class: "tallies", role: "group", "aria-label": "Show only" }, ...buttons, openAll),
    el("div", { class: "groups" }, ...body.filter(Boolean)),
  );
}

function openGroups(place, button) {
  const groups = [...place.querySelectorAll("details")];
  const open = groups.some((group) => !group.open);
  for (const group of groups) group.open = open;
  button.textContent = open ? "Close all" : "Open all";
}

/** A promise on one line: a mark for each of its measurements, and how many are met; the table is behind it. */
function targetGroup(promise, items, only, open) {
  const wanted = items.filter(({ row }) => !only || row.verdict === only);
  if (!wanted.length) return null;
  const met = items.filter(({ row }) => row.verdict === "met").length;
  const marks = items.map(({ row }) => el("i", { class: row.verdict.replace(/ /g, "-") }));
  const measured = items.filter(({ row }) => row.measured !== undefined).length;
  const tone = met === items.length ? "met" : measured ? "missed" : "unmeasured";
  const head = ["", "measured", "target", "how far", "verdict", "note"];
  const table = el(
    "table",
    { class: "targets" },
    el("thead", {}, el("tr", {}, ...head.map((text, i) => el("th", { scope: "col", class: i === 1 || i === 2 ? "number" : "" }, text)))),
    el("tbody", {}, ...wanted.map((item) => targetLine(item, promise))),
  );
  const strip = el("span", { class: "strip", "aria-hidden": "true" }, ...marks);
  const single = `${found(items[0].row)}, target ${asked(items[0].row)}`;
  const score = !measured ? "not measured" : items.length > 1 ? `${met} of ${items.length} met` : single;
  const title = el("summary", {}, el("span", { class: "promise" }, promise), strip, el("span", { class: `score ${tone}` }, score));
  return el("details", { class: "group", open }, title, el("div", { class: "scroll" }, table));
}

const asked = (row) => row.target.replace(">=", "≥").replace("<=", "≤");

/** The measured number with the unit of the target. */
function found(row) {
  const [unit] = row.target.match(/[a-zA-Z%].*$/) || [""];
  return row.measured === undefined ? "" : `${number(row.measured)}${unit && unit[0] !== "x" ? ` ${unit}` : unit}`;
}

function targetLine({ row, index }, promise) {
  const part = row.bar.startsWith(`${promise}: `) ? row.bar.slice(promise.length + 2) : "";
  const exact = row.measured === undefined ? "" : `measured = ${row.measured}`;
  return el(
    "tr",
    { "data-row": index, tabindex: "0", onclick: () => openRow(index), onkeydown: (event) => onRowKey(event, index) },
    el("th", { scope: "row" }, part || "as a whole"),
    el("td", { class: "number", title: exact, "data-field": "measured" }, found(row)),
    el("td", { class: "number" }, asked(row)),
    el("td", { class: "meter" }, meter(row)),
    el("td", {}, badge(row.verdict)),
    el("td", { class: "note" }, row.note || ""),
  );
}

/** How far a measurement is from its target, in factors of two; the verdict itself is the file's. */
function meter(row) {
  const parts = row.target.match(/^(>=|<=)\s*([-+.\deE]+)/);
  if (row.measured === undefined || !parts) return null;
  const [better, target] = [parts[1] === ">=", Number(parts[2])];
  const factor = better ? row.measured / target : target / row.measured;
  const far = row.measured <= 0 ? (better ? -2 : 2) : Math.max(-2, Math.min(2, Math.log2(factor)));
  const width = Math.max(Math.abs(far) * 25, 1);
  const bar = el("span", { class: `fill ${row.verdict}`, style: `width:${width}%;left:${far < 0 ? 50 - width : 50}%` });
  const side = row.verdict === "met" ? "on the good side" : "on the bad side";
  return el("span", { class: "track", role: "img", "aria-label": `${side} of the target by a factor of ${number(2 ** Math.abs(far))}${Math.abs(far) === 2 ? " or more" : ""}` }, bar);
}

function drawRefused() {
  const place = byId("refused-body");
  const items = ROWS.filter(({ row }) => row.status !== "measured");
  if (!items.length) {
    place.replaceChildren(el("p", { class: "empty" }, "Nothing was refused and nothing failed."));
    return;
  }
  const groups = groupBy(items, ({ row }) => JSON.stringify([row.provider, row.status, row.reason]));
  const lines = [...groups.values()].map((group) => {
    const { row } = group[0];
    const cases = el("ul", {}, ...group.map((item) => el("li", {}, el("button", { type: "button", class: "link", onclick: () => openRow(item.index) }, `${item.row.suite}/${item.row.case}`))));
    const word = `${group.length} case${group.length === 1 ? "" : "s"}`;
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, who(row.provider)),
      el("td", {}, badge(row.status)),
      el("td", { class: "reason" }, row.reason),
      el("td", {}, el("details", {}, el("summary", {}, word), cases)),
    );
  });
  const head = el("tr", {}, ...["provider", "what", "reason", "where"].map((text) => el("th", { scope: "col" }, text)));
  place.replaceChildren(el("div", { class: "scroll" }, el("table", { class: "small" }, el("thead", {}, head), el("tbody", {}, ...lines))));
}

function drawVersions() {
  const known = groupBy(ROWS.filter(({ row }) => row.version), ({ row }) => `${row.provider} ${row.version}`);
  if (known.size) byId("versions").replaceChildren(el("p", {}, `Providers: ${[...known.keys()].join(", ")}.`));
}

function permalinks() {
  for (const heading of document.querySelectorAll("main section > h2")) {
    const id = heading.parentElement.id;
    heading.append(el("a", { class: "permalink", href: `#${id}`, "aria-label": `Link to ${heading.textContent}` }, "#"));
  }
}

function dialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  for (const button of document.querySelectorAll("button.zoom")) {
    button.addEventListener("click", () => {
      const caption = button.parentElement.querySelector("figcaption").cloneNode(true);
      byId("zoom-body").replaceChildren(button.querySelector("svg").cloneNode(true), caption);
      byId("zoom-dialog").showModal();
    });
  }
  const copyCommand = byId("copy-command");
  copyCommand.addEventListener("click", () => copy(byId("command").textContent, copyCommand));
}

function paper() {
  let opened = [];
  let printing = false;
  const change = (on) => {
    if (on === printing) return; // a browser may say it twice: as an event and as a media query
    printing = on;
    if (on) opened = [...document.querySelectorAll("main details:not([open]):not(#columns)")];
    for (const details of opened) details.open = on;
    onPaper(on);
  };
  addEventListener("beforeprint", () => change(true));
  addEventListener("afterprint", () => change(false));
  matchMedia("print").addEventListener("change", (event) => change(event.matches));
}

function drawAll() {
  HIDDEN.clear();
  for (const provider of (STATE.hide || "").split("|").filter(Boolean)) HIDDEN.add(provider);
  drawTargets();
  drawPlots();
  buildControls();
  drawTable();
  drawRefused();
  drawVersions();
}

function goTo(section) {
  const target = section && byId(section);
  if (target) target.scrollIntoView();
}

permalinks();
dialogs();
paper();
const first = readAddress();
drawAll();
goTo(first);
addEventListener("hashchange", () => {
  if (!location.hash.includes("?")) return; // a link inside the page: what was chosen stays
  const section = readAddress();
  drawAll();
  goTo(section);
});
document.documentElement.dataset.ready = "yes";
