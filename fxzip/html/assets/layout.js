"use strict";
// Modules as a tree over the nodes, and a layout of what is open: every open module is laid out by dagre on its own,
// as a box of its parent, so that the time grows with the largest module and boxes never overlap.

const PAD = 14, TITLE = 20, SEP = "\u0000";

function buildTree(nodes) {
  const root = { id: "", name: "", children: new Map(), leaves: [], parent: null, depth: 0 };
  const groups = new Map([["", root]]), leaves = new Map();
  for (const node of nodes) {
    let at = root;
    const path = [...(node.task ? ["⟨" + node.task + "⟩"] : []), ...(node.module ? node.module.split(".") : [])];
    for (const part of path) {
      const id = at.id ? at.id + SEP + part : part;
      if (!groups.has(id)) {
        groups.set(id, { id, name: part, children: new Map(), leaves: [], parent: at, depth: at.depth + 1 });
        at.children.set(id, groups.get(id));
      }
      at = groups.get(id);
    }
    const leaf = { node, id: node.name, parent: at };
    at.leaves.push(leaf);
    leaves.set(node.name, leaf);
  }
  flatten(root, groups);
  count(root);
  return { root, groups, leaves };
}

// A module of one child is no box of its own: its name goes to the child.
function flatten(group, groups) {
  for (const child of [...group.children.values()]) {
    flatten(child, groups);
    if (child.children.size + child.leaves.length > 1) continue;
    group.children.delete(child.id);
    groups.delete(child.id);
    for (const inner of child.children.values()) {
      inner.name = child.name + "." + inner.name;
      inner.parent = group;
      group.children.set(inner.id, inner);
    }
    for (const leaf of child.leaves) {
      leaf.prefix = child.name.startsWith("⟨") ? "" : child.name + (leaf.prefix ? "." + leaf.prefix : "");
      leaf.parent = group;
      group.leaves.push(leaf);
    }
  }
}

function count(group) {
  group.all = [...group.leaves];
  for (const child of group.children.values()) group.all.push(...count(child));
  group.order = Math.min(...group.all.map(l => l.node.index));
  return group.all;
}

// The outermost closed module around a leaf, or the leaf.
function shown(leaf, open) {
  let found = leaf;
  for (let at = leaf.parent; at && at.id !== ""; at = at.parent) if (!open.has(at.id)) found = at;
  return found;
}

// Opens modules breadth first while the picture stays small.
function firstLook(tree, most) {
  const open = new Set();
  let size = tree.root.children.size + tree.root.leaves.length;
  const queue = [...tree.root.children.values()].sort((a, b) => a.order - b.order);
  while (queue.length) {
    const level = queue.splice(0, queue.length);
    const grown = level.reduce((n, g) => n + g.children.size + g.leaves.length - 1, size);
    if (grown > most) break;
    size = grown;
    for (const group of level) { open.add(group.id); queue.push(...group.children.values()); }
  }
  return open;
}

// Positions of every visible element and bends of every visible edge.
function layout(tree, open, sizeOf) {
  const edges = new Map(); // "source SEP SEP target" -> {source, target}
  for (const leaf of tree.leaves.values()) {
    const target = shown(leaf, open);
    for (const name of leaf.node.inputs) {
      const source = tree.leaves.has(name) ? shown(tree.leaves.get(name), open) : null;
      if (source && source !== target) edges.set(source.id + SEP + SEP + target.id, { source, target });
    }
  }
  const inside = new Map(); // group id -> edges whose ends meet there first
  for (const edge of edges.values()) {
    const above = new Map();
    for (let at = edge.source, below = null; at; below = at, at = at.parent) above.set(at, below);
    let at = edge.target, below = null;
    while (!above.has(at)) { below = at; at = at.parent; }
    edge.from = above.get(at); edge.to = below;
    if (!inside.has(at.id)) inside.set(at.id, []);
    inside.get(at.id).push(edge);
  }
  const boxes = new Map();
  const place = group => {
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 22, ranksep: 26, edgesep: 14, marginx: 0, marginy: 0 });
    graph.setDefaultEdgeLabel(() => ({}));
    const children = [...group.children.values(), ...group.leaves].sort((a, b) => order(a) - order(b));
    for (const child of children) {
      const box = child.all && open.has(child.id) ? place(child) : { ...sizeOf(child), inner: [] };
      boxes.set(child.id, box);
      graph.setNode(child.id, { width: box.width, height: box.height });
    }
    for (const edge of inside.get(group.id) || []) graph.setEdge(edge.from.id, edge.to.id);
    dagre.layout(graph);
    const whole = graph.graph();
    const nested = group.id !== "";
    const box = {
      width: Math.max(whole.width, nested ? path(group).length * 7 + 30 : 0) + (nested ? 2 * PAD : 0),
      height: whole.height + (nested ? 2 * PAD + TITLE : 0), children: [],
    };
    const left = (box.width - whole.width) / 2, top = nested ? PAD + TITLE : 0;
    for (const child of children) {
      const at = graph.node(child.id);
      box.children.push({ child, x: at.x + left, y: at.y + top }); // centres, from the box's corner
    }
    box.routes = (inside.get(group.id) || []).map(edge => ({
      edge, points: graph.edge(edge.from.id, edge.to.id).points.map(p => ({ x: p.x + left, y: p.y + top })),
    }));
    return box;
  };
  const centres = new Map(), result = [];
  const settle = (box, x, y) => { // x, y: the box's corner
    for (const { child, x: cx, y: cy } of box.children) {
      centres.set(child.id, { x: x + cx, y: y + cy });
      const inner = boxes.get(child.id);
      if (inner.children) settle(inner, x + cx - inner.width / 2, y + cy - inner.height / 2);
    }
    for (const { edge, points } of box.routes)
      result.push({ ...edge, points: points.map(p => ({ x: x + p.x, y: y + p.y })) });
  };
  settle(place(tree.root), 0, 0);
  return { centres, edges: result, boxes };
}

const path = group => group.id.split(SEP).join(".");
const order = item => item.all ? item.order : item.node.index;
