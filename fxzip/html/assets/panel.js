// The text beside the graph: what is selected. Every name goes through textContent.

function make(tag, attributes, ...children) {
  const found = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "style") Object.assign(found.style, value); else found.setAttribute(key, value);
  }
  found.append(...children.filter(c => c !== null && c !== undefined));
  return found;
}

const link = (kind, name, text) => make("a", { href: `#${kind}=${encodeURIComponent(name)}` }, text || name);
const known = v => v !== null && v !== undefined;
const figure = v => known(v) ? v.toFixed(3) : "–";
const power = v => !known(v) ? "–" : v === 0 ? "0" : v >= 0.001 ? v.toPrecision(3) : v.toExponential(1);
const commas = parts => parts.flatMap((p, i) => i ? [", ", p] : [p]);
const swatch = index => make("span", { class: "swatch", style: { background: spaceColour(index) } });

// Blue below zero, white or black at zero, orange above.
function heat(value) {
  if (value === null) return [128, 128, 128, 60];
  const zero = isDark() ? [28, 31, 36] : [255, 255, 255], end = value < 0 ? [33, 102, 172] : isDark() ? [253, 160, 60] : [200, 70, 10];
  const t = Math.min(1, Math.abs(value)) ** 0.8;
  return [0, 1, 2].map(k => Math.round(zero[k] + t * (end[k] - zero[k]))).concat(255);
}

function paint(canvas, width, height, at) {
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) image.data.set(heat(at(x, y)), 4 * (y * width + x));
  context.putImageData(image, 0, 0);
  return canvas;
}

function heatMap(map, caption, tasks) {
  const bytes = atob(map.values);
  const canvas = paint(make("canvas", { role: "img", "aria-label": caption }), map.side, map.side, (x, y) => {
    const code = bytes.charCodeAt(y * map.side + x);
    return code === 255 ? null : code / 100 - 1;
  });
  canvas.addEventListener("mousemove", e => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [e.clientX - box.left, e.clientY - box.top].map(v => Math.min(map.side - 1, Math.max(0, Math.floor(v / box.width * map.side))));
    const code = bytes.charCodeAt(y * map.side + x);
    canvas.title = `${tasks[0]} ${y} · ${tasks[1]} ${x}: ${code === 255 ? "unknown" : (code / 100 - 1).toFixed(2)}`;
  });
  const few = map.side < map.total ? `${map.side} of ${map.total} features` : `${map.total} features`;
  return make("figure", {}, canvas, make("figcaption", {}, caption, make("br"), few));
}

function meter(rows) {
  return make("div", { class: "meter" }, ...rows.flatMap(([name, value, colour]) => [
    make("span", {}, name),
    make("div", {}, make("i", { style: { width: `${100 * Math.max(0, Math.min(1, value || 0))}%`, background: colour } })),
    make("span", {}, figure(value)),
  ]));
}

function spacePanel(space, data, graph) {
  const parents = space.parents.length ? make("p", {}, "Blocks given by ", ...commas(space.parents.map(p => link("space", p))), ".") : null;
  const maps = space.own && space.matched ? [
    make("div", { class: "maps" },
      heatMap(space.own, "in the models' own order", data.tasks), heatMap(space.matched, "as merged, best first", data.tasks)),
    make("div", { class: "scale" }, "−1", paint(make("canvas"), 101, 1, x => (x - 50) / 50), "1"),
    make("p", { class: "note" }, `Correlation of features of ${data.tasks[0]} (rows) with those of ${data.tasks[1]} (columns); grey: none on one side.`),
  ] : [make("p", { class: "note" }, "Similarities were not measured for this space.")];
  const nodes = data.nodes.filter(n => n.spaces.includes(space.name));
  return [
    make("h3", {}, swatch(space.index), `Space ${space.name}`),
    make("p", {}, `${space.structure} features; ${space.width_in.join(" + ")} → ${space.width} merged.`), parents,
    known(space.quality) || known(space.baseline) ? make("p", {}, "Mean correlation of what is averaged:") : null,
    known(space.quality) || known(space.baseline) ? meter([["matched", space.quality, "var(--good)"], ["in order", space.baseline, "var(--bad)"]]) : null,
    ...maps,
    make("p", {}, make("b", {}, `${space.tied.length} tied axes`)),
    make("ul", {}, ...space.tied.map(t => make("li", {}, make("code", {}, t)))),
    make("p", {}, make("b", {}, `On ${nodes.length} values`)),
    make("ul", {}, ...nodes.slice(0, 60).map(n => make("li", {}, link("node", n.name)))),
  ];
}

function nodePanel(node, data, graph) {
  const spaces = node.spaces.map(s => graph.spaces.get(s)).filter(Boolean);
  const readers = data.nodes.filter(n => n.inputs.includes(node.name));
  const fits = data.layers.filter(l => l.task === node.task && (l.node === node.name || `${l.node}_${node.task}` === node.name));
  const row = (title, ...content) => content.length ? make("p", {}, make("b", {}, title + " "), ...content) : null;
  return [
    make("h3", {}, `%${node.name}`),
    make("p", {}, make("code", {}, `${node.call} : ${node.type || "–"}`)),
    row("State", node.state + (node.task ? ` (${node.task})` : "")),
    node.module ? row("Module", make("code", {}, node.module)) : null,
    spaces.length ? row("Spaces", ...spaces.flatMap(s => [swatch(s.index), " ", link("space", s.name), " "])) : null,
    ...fits.map(f => row("Error", `${power(f.before)} before solve, ${power(f.after)} after`)),
    node.inputs.length ? row("Reads", ...commas(node.inputs.map(n => link("node", n)))) : null,
    readers.length ? row("Read by", ...commas(readers.map(n => link("node", n.name)))) : null,
    node.parameters.length ? row("Parameters", ...commas(node.parameters.map(p => make("code", {}, p)))) : null,
    node.line ? row("Your code", make("code", {}, node.line)) : null,
  ];
}

function groupPanel(group, data, graph) {
  const spaces = [...new Set(group.all.flatMap(l => l.node.spaces))].map(s => graph.spaces.get(s)).filter(Boolean);
  const states = {};
  for (const leaf of group.all) states[leaf.node.state] = (states[leaf.node.state] || 0) + 1;
  return [
    make("h3", {}, path(group)),
    make("p", {}, `${group.all.length} nodes: ` + Object.entries(states).map(([s, n]) => `${n} ${s}`).join(", ") + "."),
    spaces.length ? make("p", {}, make("b", {}, "Spaces "), ...spaces.flatMap(s => [swatch(s.index), " ", link("space", s.name), "  "])) : null,
  ];
}

function emptyPanel(data) {
  const states = {};
  for (const n of data.nodes) {
    const state = n.state.split(":")[0];
    states[state] = (states[state] || 0) + 1;
  }
  return [
    make("h3", {}, "Nothing selected"),
    make("p", {}, `${data.nodes.length} nodes: ` + Object.entries(states).map(([s, n]) => `${n} ${s}`).join(", ") + `; ${data.spaces.length} spaces.`),
    make("p", {}, "Click a node, a module, or a space below: everything tied to a space lights up."),
    make("ul", {}, ...data.spaces.slice(0, 40).map(s => make("li", {}, link("space", s.name), ` ${s.structure}, correlation ${figure(s.quality)}`))),
  ];
}
