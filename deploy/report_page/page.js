"use strict";
// Sorts, filters and folds the table of layers, opens a layer, and switches between light and dark. No other script is loaded.
(() => {
  const root = document.documentElement, themes = document.getElementById("theme");
  themes?.addEventListener("click", () => {
    const dark = getComputedStyle(root).colorScheme.trim() === "dark" ||
      (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    root.dataset.theme = dark ? "light" : "dark";
  });
  const table = document.getElementById("layers");
  if (!table) return;
  const blocks = [...table.tBodies].map((body) => ({
    body, head: body.querySelector("tr.block"), layers: [...body.querySelectorAll("tr.layer")], open: false }));
  const layers = blocks.flatMap((block) => block.layers.map((row) => ({
    row, block, text: row.dataset.text.toLowerCase(), state: row.dataset.state, detail: null })));
  const sorted = document.createElement("tbody");
  table.append(sorted);
  const search = document.getElementById("search"), states = document.getElementById("states"), count = document.getElementById("count"), unfold = document.getElementById("unfold");
  let order = null;

  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), state = states.value;
    const filtered = words.length > 0 || state !== "";
    let shown = 0;
    for (const layer of layers) {
      const fits = (state === "" || layer.state === state) && words.every((word) => layer.text.includes(word));
      layer.row.hidden = !fits || !(filtered || order || layer.block.open);
      if (layer.detail) layer.detail.hidden = layer.row.hidden;
      shown += fits;
    }
    for (const block of blocks) {
      if (!block.head) continue;
      block.head.hidden = order !== null || (filtered && !block.layers.some((row) => !row.hidden));
      const button = block.head.querySelector("button");
      button.setAttribute("aria-expanded", String(block.open || filtered));
      button.disabled = filtered;
    }
    count.textContent = `${shown} of ${layers.length} layers`;
    unfold.disabled = filtered || order !== null;
  };
  const place = (layer, into) => { into.append(layer.row); if (layer.detail) into.append(layer.detail); };
  const sort = (key, heading) => {
    const first = heading.classList.contains("n");  // the largest number, or the first name
    const down = order?.key === key ? !order.down : first;
    const back = order?.key === key && order.down !== first;
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    order = back ? null : { key, down };
    if (order === null) { for (const layer of layers) place(layer, layer.block.body); show(); return; }
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numbers = heading.classList.contains("n"), compare = new Intl.Collator("en", { numeric: true }).compare;
    [...layers].sort((a, b) => {
      const x = a.row.dataset[key], y = b.row.dataset[key];
      if (!x || !y) return !x - !y;
      return (numbers ? x - y : compare(x, y)) * (down ? -1 : 1);
    }).forEach((layer) => place(layer, sorted));
    show();
  };
  const open = (layer) => {
    if (layer.detail) { layer.detail.remove(); layer.detail = null; layer.button.setAttribute("aria-expanded", "false"); return; }
    const cell = document.createElement("td");
    cell.colSpan = table.tHead.rows[0].cells.length;
    cell.append(document.getElementById(layer.row.dataset.detail).content.cloneNode(true));
    layer.detail = document.createElement("tr");
    layer.detail.className = "detail";
    layer.detail.append(cell);
    layer.row.after(layer.detail);
    layer.button.setAttribute("aria-expanded", "true");
  };
  for (const block of blocks) block.head?.querySelector("button").addEventListener("click", () => { block.open = !block.open; show(); });
  for (const layer of layers) {
    layer.button = layer.row.querySelector("button");
    layer.button.addEventListener("click", () => open(layer));
  }
  for (const heading of table.querySelectorAll("thead th[data-key]"))
    heading.querySelector("button").addEventListener("click", () => sort(heading.dataset.key, heading));
  search.addEventListener("input", show);
  states.addEventListener("change", show);
  unfold.addEventListener("click", () => {
    const all = !blocks.every((block) => block.open);
    for (const block of blocks) block.open = all;
    show();
  });
  const jump = () => {
    const layer = layers.find((one) => `#${one.row.id}` === location.hash);
    if (!layer) return;
    search.value = ""; states.value = ""; layer.block.open = true; show();
    if (!layer.detail) open(layer);
    layer.row.scrollIntoView({ block: "center" });
    layer.button.focus({ preventScroll: true });
  };
  addEventListener("hashchange", jump);
  for (const link of document.querySelectorAll("a[data-layer]"))
    link.addEventListener("click", () => { if (link.hash === location.hash) jump(); });
  const graph = document.getElementById("graph");
  if (graph) {
    const svg = graph.querySelector("svg"), width = Number(svg.dataset.width);
    let zoom = Math.min(1, graph.clientWidth / width);
    const apply = () => { svg.style.width = `${width * zoom}px`; };
    for (const [name, by] of [["zoom-in", 1.25], ["zoom-out", 0.8]])
      document.getElementById(name).addEventListener("click", () => { zoom = Math.min(4, Math.max(0.1, zoom * by)); apply(); });
    const heat = document.getElementById("heat");
    heat?.addEventListener("click", () => heat.setAttribute("aria-pressed", String(graph.classList.toggle("heat"))));
    apply();
  }
  const closed = [];  // on paper nothing can be opened
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not([open])")) { one.open = true; closed.push(one); }
    for (const row of table.querySelectorAll("tr.layer[hidden]")) { row.hidden = false; }
  });
  addEventListener("afterprint", () => { for (const one of closed.splice(0)) one.open = false; show(); });
  table.classList.add("live");
  show();
  jump();
})();
