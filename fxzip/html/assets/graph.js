// The graph on screen: elements from the layout, colours from spaces and states, what is lit and what is selected.

function textColour(name) { // a CSS variable of this theme, as the browser resolves it
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = hex(getComputedStyle(probe).color);
  probe.remove();
  return found;
}

const pen = document.createElement("canvas").getContext("2d");

function hex(colour) { // #rrggbb, as cytoscape wants the colours of a gradient
  pen.fillStyle = colour;
  return pen.fillStyle;
}

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function spaceColour(index) { // neighbours differ by the golden angle
  const hue = (205 + index * 137.508) % 360;
  return hex(isDark() ? `hsl(${hue}, 38%, 36%)` : `hsl(${hue}, 62%, 80%)`);
}

class Graph {
  constructor(data, holder, onSelect) {
    this.data = data;
    this.holder = holder;
    this.onSelect = onSelect;
    this.spaces = new Map(data.spaces.map((s, i) => [s.name, { ...s, index: i }]));
    data.nodes.forEach((n, i) => { n.index = i; });
    this.tree = buildTree(data.nodes);
    this.open = firstLook(this.tree, 20);
    this.cursor = null;
    this.lit = null;
    this.cy = cytoscape({
      container: holder, elements: [], style: this.style(), minZoom: 0.04, maxZoom: 2.5, autoungrabify: true,
      boxSelectionEnabled: false, textureOnViewport: data.nodes.length > 150,
    });
    this.cy.on("tap", "node", e => this.tapped(e.target));
    this.cy.on("tap", e => { if (e.target === this.cy) onSelect(null); });
    holder.addEventListener("keydown", e => this.key(e));
    this.draw();
    this.home();
  }

  style() {
    const ink = textColour("ink"), soft = textColour("soft"), edge = textColour("edge"), link = textColour("link");
    return [
      { selector: "node", style: {
        shape: "round-rectangle", width: "data(width)", height: "data(height)", label: "data(label)", color: ink,
        "font-family": "ui-monospace, DejaVu Sans Mono, monospace", "font-size": 10.5, "line-height": 1.25,
        "text-valign": "center", "text-halign": "center", "text-wrap": "wrap", "text-max-width": 400,
        "background-color": "data(colour)", "border-width": 1, "border-color": edge, "min-zoomed-font-size": 5 } },
      { selector: "node.private", style: { "border-style": "dashed", "border-width": 2, "border-color": soft } },
      { selector: "node.frozen", style: { "border-width": 2.5, "border-color": textColour("bad") } },
      { selector: "node.closed", style: {
        "border-style": "double", "border-width": 4, "font-weight": 600, "background-fill": "linear-gradient",
        "background-gradient-direction": "to-right", "background-gradient-stop-colors": "data(stripes)" } },
      { selector: ":parent", style: {
        "background-color": textColour("soft"), "background-opacity": 0.07, "border-color": edge, "border-width": 1,
        "text-valign": "top", "text-margin-y": -3, "font-weight": 600, color: soft, padding: PAD, "font-size": 11 } },
      { selector: "edge", style: {
        width: 1.3, "line-color": edge, "target-arrow-color": edge, "target-arrow-shape": "triangle",
        "arrow-scale": 0.75, "curve-style": "straight" } },
      { selector: "edge.bent", style: {
        "curve-style": "round-segments", "segment-weights": "data(weights)", "segment-distances": "data(distances)",
        "segment-radii": 14, "edge-distances": "node-position" } },
      { selector: ".dim", style: { opacity: 0.3 } },
      { selector: "node.lit", style: { "border-width": 3, "border-style": "solid", "border-color": link } },
      { selector: "node.cursor", style: { "underlay-color": link, "underlay-opacity": 0.35, "underlay-padding": 5 } },
      { selector: ":parent.cursor", style: { "underlay-opacity": 0, "border-width": 2.5, "border-color": link } },
    ];
  }

  label(leaf) {
    const n = leaf.node;
    const stem = n.module.replaceAll(".", "_") + "_";
    let name = n.name.startsWith(stem) ? n.name.slice(stem.length) : n.name;
    if (leaf.prefix) name = leaf.prefix + (/^[a-z]+_?[a-z_]*\d*$/.test(name) ? "." + name : "");
    const plain = s => s.toLowerCase().replace(/[^a-z]/g, "");
    const first = plain(name).includes(plain(n.call)) ? name : name + " · " + n.call;
    return n.type ? first + "\n" + n.type : first;
  }

  sizeOf(item) {
    const label = item.all ? path(item) : this.label(item);
    const longest = Math.max(...label.split("\n").map(l => l.length), item.all ? 14 : 0);
    return { width: Math.max(70, longest * 6.4 + 22), height: label.includes("\n") || item.all ? 40 : 28 };
  }

  colourOf(node) {
    const space = node.spaces.map(s => this.spaces.get(s)).find(Boolean);
    return space && node.state === "merged" ? spaceColour(space.index) : textColour("plain");
  }

  classesOf(node) {
    return node.state.startsWith("frozen") ? "frozen" : node.state === "per model" ? "private" : "";
  }

  draw() {
    const found = layout(this.tree, this.open, item => this.sizeOf(item)), elements = [];
    const nested = item => item.parent && item.parent.id !== "" ? "g:" + item.parent.id : undefined;
    const add = group => {
      for (const child of group.children.values()) {
        if (this.open.has(child.id)) {
          elements.push({ data: { id: "g:" + child.id, parent: nested(child), label: path(child), colour: "#888", width: 10, height: 10 } });
          add(child);
        } else elements.push(this.closed(child, nested(child), found.centres.get(child.id)));
      }
      for (const leaf of group.leaves) elements.push({
        data: { id: "n:" + leaf.id, parent: nested(leaf), label: this.label(leaf), colour: this.colourOf(leaf.node), ...this.sizeOf(leaf) },
        position: found.centres.get(leaf.id), classes: this.classesOf(leaf.node) });
    };
    add(this.tree.root);
    const id = item => (item.all ? "g:" : "n:") + item.id;
    found.edges.forEach((e, i) => elements.push({
      data: { id: "e:" + i, source: id(e.source), target: id(e.target), ...this.bends(e, found.centres) },
      classes: e.points.length > 3 ? "bent" : "" }));
    this.cy.batch(() => { this.cy.elements().remove(); this.cy.add(elements); });
    this.relight();
  }

  closed(group, parent, position) {
    const tints = [...new Set(group.all.map(l => this.colourOf(l.node)))].slice(0, 8);
    const states = new Set(group.all.map(l => this.classesOf(l.node)));
    const classes = ["closed", states.has("frozen") ? "frozen" : states.size === 1 && states.has("private") ? "private" : ""];
    const label = `${path(group)}\n${group.all.length} nodes`;
    return { data: { id: "g:" + group.id, parent, label, colour: tints[0], stripes: (tints.length > 1 ? tints : [tints[0], tints[0]]).join(" "), ...this.sizeOf(group) },
      position, classes: classes.join(" ").trim() };
  }

  // dagre's route, as cytoscape wants it: along and across the line between the two centres.
  bends(edge, centres) {
    if (edge.points.length <= 3) return {};
    const a = centres.get(edge.source.id), b = centres.get(edge.target.id);
    const dx = b.x - a.x, dy = b.y - a.y, square = dx * dx + dy * dy || 1, length = Math.sqrt(square);
    const inner = edge.points.slice(1, -1);
    return {
      weights: inner.map(p => ((p.x - a.x) * dx + (p.y - a.y) * dy) / square),
      distances: inner.map(p => ((p.y - a.y) * dx - (p.x - a.x) * dy) / length * -1 * -1),
    };
  }

  home() { // all of it if that can be read, else its beginning
    this.cy.resize();
    this.cy.fit(undefined, 16);
    const least = 0.62;
    if (this.cy.zoom() < least && this.cy.nodes().length) {
      const box = this.cy.elements().boundingBox();
      const zoom = Math.max(this.cy.zoom(), Math.min(least, (this.cy.width() - 24) / Math.max(box.w, 1)));
      this.cy.zoom(Math.max(zoom, 0.35));
      const top = this.cy.nodes().filter(n => !n.isParent()).min(n => n.position("y")).ele;
      this.cy.pan({ x: this.cy.width() / 2 - top.position("x") * this.cy.zoom(), y: 20 - box.y1 * this.cy.zoom() });
    }
  }

  toggle(id) {
    if (this.open.has(id)) { for (const g of [...this.open]) if (g === id || g.startsWith(id + SEP)) this.open.delete(g); }
    else this.open.add(id);
    const before = this.cy.$id("g:" + id).renderedPosition();
    this.draw();
    const now = this.cy.$id("g:" + id).renderedPosition();
    if (before && now) this.cy.panBy({ x: before.x - now.x, y: Math.max(before.y, 60) - this.topOf("g:" + id) });
    this.move("g:" + id, false);
  }

  topOf(id) { return this.cy.$id(id).renderedBoundingBox({ includeLabels: false }).y1; }

  openAll(all) {
    this.open = all ? new Set([...this.tree.groups.keys()].filter(g => g)) : new Set();
    this.draw();
    this.home();
  }

  reveal(name) { // open what hides a node, and centre it
    const leaf = this.tree.leaves.get(name);
    if (!leaf) return;
    const hidden = shown(leaf, this.open) !== leaf;
    for (let at = leaf.parent; at && at.id !== ""; at = at.parent) this.open.add(at.id);
    if (hidden) this.draw();
    this.move("n:" + name, true);
  }

  tapped(element) {
    const id = element.id();
    if (id.startsWith("g:")) { this.toggle(id.slice(2)); this.onSelect({ group: id.slice(2) }); }
    else { this.move(id, false); this.onSelect({ node: id.slice(2) }); }
  }

  light(space) {
    this.lit = space ? this.spaces.get(space) : null;
    this.relight();
    const lit = this.cy.nodes(".lit"), box = this.cy.extent();
    const seen = n => n.position("x") > box.x1 && n.position("x") < box.x2 && n.position("y") > box.y1 && n.position("y") < box.y2;
    if (lit.length && !lit.some(seen)) this.cy.center(lit.first());
  }

  litLeaf(leaf) {
    const names = this.litNames;
    return leaf.node.spaces.includes(this.lit.name) || leaf.node.parameters.some(p => names.has(p));
  }

  relight() {
    this.cy.batch(() => {
      this.cy.elements().removeClass("lit dim");
      if (!this.lit) return;
      this.litNames = new Set(this.lit.tied.map(t => t.split("[")[0]));
      this.cy.nodes().forEach(n => {
        const id = n.id().slice(2);
        const leaves = n.id().startsWith("n:") ? [this.tree.leaves.get(id)] : this.tree.groups.get(id).all;
        const on = leaves.some(l => this.litLeaf(l));
        if (!n.isParent()) n.addClass(on ? "lit" : "dim");
      });
      this.cy.edges().forEach(e => { if (e.connectedNodes(".dim").length) e.addClass("dim"); });
    });
  }

  recolour() { this.cy.style(this.style()); this.draw(); this.move(this.cursor, false); }

  move(id, centre) {
    this.cy.nodes().removeClass("cursor");
    const node = id ? this.cy.$id(id) : this.cy.collection();
    this.cursor = node.length ? id : null;
    node.addClass("cursor");
    if (!node.length) return;
    if (centre && this.cy.zoom() < 0.5) this.cy.zoom(0.8);
    const at = node.renderedPosition();
    if (centre || at.x < 30 || at.y < 30 || at.x > this.cy.width() - 30 || at.y > this.cy.height() - 30) this.cy.center(node);
  }

  key(event) {
    const step = { ArrowDown: "down", ArrowUp: "up", ArrowLeft: "left", ArrowRight: "right" }[event.key];
    const zoom = { "+": 1.25, "=": 1.25, "-": 0.8 }[event.key];
    if (step) this.walk(step);
    else if (zoom) this.zoomBy(zoom);
    else if (event.key === "0") this.cy.fit(undefined, 16);
    else if (event.key === "Escape") this.onSelect(null);
    else if ((event.key === "Enter" || event.key === " ") && this.cursor) this.act(event.key);
    else return;
    event.preventDefault();
  }

  act(key) {
    const name = this.cursor.slice(2);
    if (this.cursor.startsWith("g:")) { if (key === "Enter") this.toggle(name); this.onSelect({ group: name }); return; }
    const space = this.tree.leaves.get(name).node.spaces.find(s => this.spaces.has(s));
    this.onSelect(key === " " && space ? { space } : { node: name });
  }

  walk(step) {
    const at = this.cursor ? this.cy.$id(this.cursor) : this.cy.collection();
    if (!at.length) { const first = this.cy.nodes().filter(n => !n.isParent()).min(n => n.position("y")).ele; this.move(first.id(), false); this.show(first.id()); return; }
    const from = at.position(), down = step === "down";
    let near = step === "down" ? at.outgoers("node") : step === "up" ? at.incomers("node") : this.cy.nodes();
    const side = p => step === "left" ? p.x < from.x - 5 && Math.abs(p.y - from.y) < 60 : p.x > from.x + 5 && Math.abs(p.y - from.y) < 60;
    if (step === "left" || step === "right") near = near.filter(n => !n.isParent() && side(n.position()));
    else if (!near.length || at.isParent()) near = this.cy.nodes().filter(n => !n.isParent() && (down ? n.position("y") > from.y + 5 : n.position("y") < from.y - 5));
    if (!near.length) return;
    const next = near.min(n => Math.hypot(n.position("x") - from.x, n.position("y") - from.y)).ele;
    this.move(next.id(), false);
    this.show(next.id());
  }

  show(id) { this.onSelect(id.startsWith("g:") ? { group: id.slice(2) } : { node: id.slice(2) }, true); }

  zoomBy(factor) {
    this.cy.zoom({ level: this.cy.zoom() * factor, renderedPosition: { x: this.cy.width() / 2, y: this.cy.height() / 2 } });
  }
}
