// The speed-error plane: what sparse mechanisms lose against dense attention, and what they gain.

const LOSSES = {
  error: ["error of the output", "norm of the error ÷ norm of dense attention, log", ({ row }) => row.error_norm],
  weight: ["weight that is not kept", "share of dense attention's weight left out, log", ({ row }) => 1 - row.mass],
  keys: ["heaviest keys that are not kept", "share of the heaviest keys left out, log", ({ row }) => 1 - row.recall],
};

function drawPlane() {
  const place = byId("plane-body");
  const key = place.parentElement.querySelector("[data-legend]");
  const all = ROWS.filter(({ row }) => row.speed > 0 && row.error_norm !== undefined && !row.bar);
  if (!all.length) {
    key.replaceChildren();
    return empty(place, "This run measured no sparse mechanism; they are the suite “sparse”.");
  }
  const known = Object.keys(LOSSES).filter((name) => all.some((item) => LOSSES[name][2](item) > 0));
  if (!known.length) {
    key.replaceChildren();
    return empty(place, "Nothing was lost.");
  }
  const chosen = known.includes(STATE.lost) ? STATE.lost : known[0];
  const [, axis, at] = LOSSES[chosen];
  byId("plane-controls").replaceChildren(
    choice("Across", known.map((name) => [name, LOSSES[name][0]]), chosen, (value) => (remember("plane", { lost: value }), drawPlane())),
  );
  const items = all.filter((item) => at(item) > 0);
  legend(key, items);
  clear(place);
  const panels = el("div", { class: "panels wide" });
  place.append(panels);
  const dense = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { dash: "dash", width: 1.5, color: "#808890" } };
  const speeds = [1, ...items.map(({ row }) => row.speed)];
  for (const [name, found] of groupBy(visible(items), ({ row }) => row.case)) {
    const { row } = found[0];
    const traces = [...groupBy(found, (item) => item.row.provider).values()].map((group) => {
      const line = [...group].sort((a, b) => (a.row.area || 0) - (b.row.area || 0));
      return points(line, at, (item) => item.row.speed, { mode: "lines+markers", line: { color: STYLE[line[0].row.provider].color, width: 1.5 } });
    });
    draw(panels, [name, row.input].filter(Boolean).join(": "), traces, {
      height: 360,
      xaxis: logAxis(items.map(at), axis, { format: chosen === "error" ? tick : share }),
      yaxis: logAxis(speeds, "times as fast as dense, log", { format: (v) => `${tick(v)}×` }),
      shapes: [dense],
    });
  }
  drawWaiting();
  const none = all.length - items.length;
  if (none) place.append(el("p", { class: "how" }, `${none} row${none === 1 ? " loses" : "s lose"} nothing on this axis and ${none === 1 ? "has" : "have"} no place on it; see the table.`));
}
