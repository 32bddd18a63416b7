// Wiring: the address says what is selected (#space=s3, #node=add, #group=…), so every selection is a link.

const root = document.documentElement, byId = id => document.getElementById(id);
addEventListener("error", e => { root.dataset.error = e.message; });
const data = JSON.parse(byId("data").textContent);
let graph = null;

function select(what, stay) {
  const kind = what ? Object.keys(what)[0] : "", name = what ? what[kind] : "";
  const hash = what ? `#${kind}=${encodeURIComponent(name)}` : "#";
  if (location.hash !== hash) history.replaceState(null, "", hash);
  show(kind, name, stay);
}

function show(kind, name, stay) {
  const found = graph && (kind === "space" ? graph.spaces.get(name) : kind === "node" ? (graph.tree.leaves.get(name) || {}).node : kind === "group" ? graph.tree.groups.get(name) : null);
  const make = found && { space: spacePanel, node: nodePanel, group: groupPanel }[kind];
  if (graph) graph.light(kind === "space" && found ? name : null);
  if (graph && !found) graph.move(null, false);
  byId("panel").replaceChildren(...(make ? make(found, data, graph) : emptyPanel(data)).filter(Boolean));
  byId("panel").scrollTop = 0;
  for (const row of byId("space-table").querySelectorAll("tbody tr")) {
    const its = row.querySelector("[data-space]");
    row.classList.toggle("on", kind === "space" && !!its && its.dataset.space === name);
  }
  if (graph && found && kind === "node" && !stay && graph.cursor !== "n:" + name) graph.reveal(name);
  root.dataset.selected = found ? `${kind}=${name}` : "";
  root.dataset.lit = graph ? String(graph.cy.nodes(".lit").length) : "0";
}

function route() {
  const [kind, name] = location.hash.slice(1).split("=").map(decodeURIComponent);
  if (kind === "fit") { // a point of the layer chart: the node of that layer
    const [layer, task] = JSON.parse(name);
    return select({ node: graph && graph.tree.leaves.has(`${layer}_${task}`) ? `${layer}_${task}` : layer });
  }
  show(kind, name);
}

function find(text) {
  const wanted = text.trim().replace(/^%/, "");
  if (!wanted) return;
  if (graph.spaces.has(wanted)) return select({ space: wanted });
  const near = data.nodes.find(n => n.name === wanted) || data.nodes.find(n => n.name.includes(wanted) || (n.module + "." + n.call).includes(wanted));
  if (near) select({ node: near.name });
}

function recolour() {
  if (graph) graph.recolour();
  drawCharts(data);
  route();
}

function begin() {
  if (data.nodes.length) {
    graph = new Graph(data, byId("graph"), select);
    byId("expand").onclick = () => graph.openAll(true);
    byId("collapse").onclick = () => graph.openAll(false);
    byId("fit").onclick = () => graph.cy.fit(undefined, 16);
    byId("zoom-in").onclick = () => graph.zoomBy(1.25);
    byId("zoom-out").onclick = () => graph.zoomBy(0.8);
    byId("find").onchange = e => find(e.target.value);
    byId("names").append(...[...data.spaces, ...data.nodes].slice(0, 2000).map(n => make("option", { value: n.name })));
  } else {
    byId("graph-section").replaceChildren(make("h2", {}, "Graph"), make("p", { class: "note" }, "Not there: the report of this merge was written before fxzip kept the graph."), make("aside", { id: "panel", hidden: "" }));
  }
  drawCharts(data);
  byId("theme").onclick = () => { root.dataset.theme = isDark() ? "light" : "dark"; recolour(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  addEventListener("hashchange", route);
  for (const row of byId("space-table").querySelectorAll("[data-space]")) {
    const space = graph && graph.spaces.get(row.dataset.space);
    if (space) row.before(make("span", { class: "swatch", style: { background: spaceColour(space.index), marginRight: ".45rem" } }));
    row.addEventListener("click", () => byId("graph-section").scrollIntoView({ block: "nearest" }));
  }
  route();
  root.dataset.ready = "true";
}

begin();
