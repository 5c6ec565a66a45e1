// Quality: for each task the score of every trained model by mechanism, and how its loss fell.

const TRAINED = ROWS.filter(({ row }) => row.suite === "quality" && row.score !== undefined && row.phase === "train");

function drawQuality() {
  const place = byId("quality-body");
  const key = place.parentElement.querySelector("[data-legend]");
  if (!TRAINED.length) {
    key.replaceChildren();
    return empty(place, "This run trained no models; they are the suite “quality”.");
  }
  legend(key, TRAINED);
  clear(place);
  for (const [task, all] of groupBy(TRAINED, ({ row }) => row.task)) {
    const items = visible(all);
    if (!items.length) continue;
    const { row } = all[0];
    const better = row.better === "higher" ? "right" : "left";
    place.append(el("h3", {}, task), el("p", { class: "how" }, `${row.input}. ${unique(all.map((item) => item.row.seed)).length} models of each mechanism, ${row.steps.toLocaleString("en")} steps.`));
    const panels = el("div", { class: "panels wide" });
    place.append(panels);
    dots(panels, `${row.score_unit} (further ${better} is better)`, items, { field: "score", axis: row.score_unit, format: null, zero: false, category: (item) => item.row.provider });
    const learned = items.filter((item) => item.row.curve);
    if (!learned.length) continue;
    const traces = [...groupBy(learned, (item) => item.row.provider).values()].flatMap((group) => group.map(lossLine));
    draw(panels, "training loss", traces, {
      xaxis: { ...linearAxis("share of the steps", ".0%"), range: [0, 1] },
      yaxis: linearAxis("loss"),
    });
  }
  drawWaiting();
}

/** The loss of one model over the steps; its points know their row. */
function lossLine(item) {
  const { curve, provider } = item.row;
  return {
    type: "scatter",
    mode: "lines",
    x: curve.map((_, i) => (i + 0.5) / curve.length),
    y: curve,
    customdata: curve.map(() => item.index),
    text: hover(item),
    hovertemplate: "%{text}<extra></extra>",
    line: { color: STYLE[provider].color, width: 1.5 },
    name: provider,
  };
}
