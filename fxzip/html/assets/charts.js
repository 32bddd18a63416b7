// Chart.js drawings. A click on a point selects what it stands for.

let charts = [];

function options(extra) {
  const soft = textColour("soft"), line = textColour("line"), ink = textColour("ink");
  const axis = (title, more) => ({ title: { display: !!title, text: title, color: soft }, ticks: { color: soft, ...(more || {}).ticks }, grid: { color: line, drawTicks: false }, border: { color: line }, ...more });
  return { axis, base: {
    responsive: true, maintainAspectRatio: false, animation: false, interaction: { mode: "nearest", intersect: false, axis: "x" },
    plugins: { legend: { align: "end", labels: { color: ink, usePointStyle: true, boxHeight: 7 } } }, ...extra } };
}

function none(id) {
  document.getElementById(id).parentElement.hidden = true;
  document.getElementById(id + "-none").hidden = false;
}

const selecting = kind => (event, found, chart) => {
  if (found.length) location.hash = `#${kind}=${encodeURIComponent(chart.data.names[found[0].index])}`;
};

function qualityChart(data) {
  const rows = data.spaces.filter(s => known(s.quality) || known(s.baseline));
  if (!rows.length) return none("quality");
  const { axis, base } = options({ onClick: selecting("space") });
  const names = rows.map(s => s.name), good = textColour("good"), bad = textColour("bad");
  charts.push(new Chart(document.getElementById("quality"), {
    type: "line", data: { labels: names, names, datasets: [
      { label: "as matched", data: rows.map(s => s.quality), borderColor: good, backgroundColor: good, pointRadius: 3.5, borderWidth: 1.5 },
      { label: "in the models' own order", data: rows.map(s => s.baseline), borderColor: bad, backgroundColor: bad, pointRadius: 3, borderWidth: 1.2, borderDash: [4, 3], pointStyle: "rect" },
    ] },
    options: { ...base, scales: { x: axis("space, by depth", { ticks: { maxRotation: 0, autoSkip: true, color: textColour("soft") } }), y: axis("mean correlation", { suggestedMin: 0, suggestedMax: 1 }) } },
  }));
}

function layerChart(data) {
  const rows = data.layers.filter(l => known(l.before) && known(l.after));
  document.getElementById("layer-details").hidden = !data.layers.length;
  if (!rows.length) return none("layers");
  const { axis, base } = options({ onClick: selecting("fit") });
  const title = l => l.task ? `${l.node} (${l.task})` : l.node;
  const floor = v => Math.max(v, 1e-8); // a log axis has no zero
  const good = textColour("good"), bad = textColour("bad"), soft = textColour("line");
  charts.push(new Chart(document.getElementById("layers"), {
    data: { labels: rows.map(title), names: rows.map(l => JSON.stringify([l.node, l.task])), datasets: [
      { type: "line", label: "before solve", data: rows.map(l => floor(l.before)), showLine: false, pointRadius: 4, borderColor: bad, backgroundColor: "transparent", borderWidth: 1.8 },
      { type: "line", label: "after solve", data: rows.map(l => floor(l.after)), showLine: false, pointRadius: 4, borderColor: good, backgroundColor: good },
      { type: "bar", label: "change", data: rows.map(l => [floor(Math.min(l.before, l.after)), floor(Math.max(l.before, l.after))]), backgroundColor: soft, barThickness: 2 },
    ] },
    options: { ...base, scales: {
      x: axis("", { ticks: { color: textColour("soft"), maxRotation: 60, autoSkip: true, autoSkipPadding: 6, callback(v) { const t = this.getLabelForValue(v); return t.length > 18 ? "…" + t.slice(-17) : t; } }, grid: { display: false } }),
      y: axis("relative squared error", { type: "logarithmic", ticks: { color: textColour("soft"), callback: v => Math.abs(Math.log10(v) % 1) < 1e-6 ? (v >= 0.01 ? String(v) : v.toExponential(0)) : "" } }) },
      plugins: { ...base.plugins, tooltip: { filter: item => item.dataset.type === "line", callbacks: { label: i => `${i.dataset.label}: ${power(i.raw)}` } }, legend: { ...base.plugins.legend, labels: { ...base.plugins.legend.labels, filter: i => i.text !== "change" } } } },
  }));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["layer", "operator", "before", "after"].map(t => make("th", {}, t)))),
    make("tbody", {}, ...data.layers.map(l => make("tr", {}, make("th", {}, title(l)), make("td", {}, l.kind), make("td", {}, power(l.before)), make("td", {}, power(l.after))))));
  document.getElementById("layer-table").replaceChildren(table);
}

function frontierChart(data) {
  if (!data.frontier.length) return none("frontier");
  const { axis, base } = options({ interaction: { mode: "nearest", intersect: false } });
  const given = data.frontier.every(p => known(p.measured)), link = textColour("link");
  const kept = p => given ? p.measured : 1 - p.drift.reduce((a, b) => a + b, 0) / p.drift.length;
  const names = { id: "names", afterDatasetsDraw(chart) {
    const brush = chart.ctx, points = chart.getDatasetMeta(0).data;
    brush.fillStyle = textColour("ink"); brush.font = "12px system-ui"; brush.textAlign = "center";
    points.forEach((p, i) => brush.fillText(data.frontier[i].name, p.x, p.y + (p.y > chart.chartArea.bottom - 24 ? -10 : 18)));
  } };
  charts.push(new Chart(document.getElementById("frontier"), {
    type: "line", data: { datasets: [{ label: "merges", data: data.frontier.map(p => ({ x: p.cost, y: kept(p) })), borderColor: link, backgroundColor: link, pointRadius: 4, borderWidth: 1.5 }] },
    options: { ...base, layout: { padding: { right: 24 } }, scales: { x: axis("FLOPs, times one network", { type: "linear", grace: "8%" }), y: axis(given ? "measured" : "1 − drift of the outputs", { grace: "12%" }) },
      plugins: { legend: { display: false }, tooltip: { callbacks: { title: i => data.frontier[i[0].dataIndex].name } } } },
    plugins: [names],
  }));
}

function drawCharts(data) {
  charts.forEach(c => c.destroy());
  charts = [];
  qualityChart(data); layerChart(data); frontierChart(data);
}
