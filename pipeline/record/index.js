// Sorts and filters the table of runs, and plots any metric against any setting. Without it the table is all there.
"use strict";
const data = JSON.parse(document.getElementById("runs").textContent);
const get = (id) => document.getElementById(id);
const table = get("table"), body = table.tBodies[0], lines = [...body.rows];
const SVG = "http://www.w3.org/2000/svg", LEFT = 64, RIGHT = 16, TOP = 12, BOTTOM = 40;
const INFINITE = { Infinity: Infinity, "-Infinity": -Infinity };
let visible = lines.map((_, row) => row);

const column = (name) => data.columns.findIndex((one) => one.name === name);
const cell = (row, number) => (number < 0 ? data.names[row] : data.cells[row][number]);
const finite = (value) => typeof value === "number" && Number.isFinite(value);

function short(value) {
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  for (const [factor, suffix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= Math.max(factor, 1e4)) return Number((value / factor).toPrecision(4)) + suffix;
  return size && size < 1e-3 ? value.toExponential(3).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4)));
}

// --- the table

function sort(head) {
  const number = Number(head.dataset.column);
  const known = number < 0 ? {} : data.columns[number];
  const first = known.better === "higher" ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  table.querySelectorAll("[aria-sort]").forEach((one) => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const rows = lines.map((_, row) => row).sort((a, b) => {
    const [one, two] = [cell(a, number), cell(b, number)].map((value) => INFINITE[value] ?? value);
    if (one === null || two === null) return (one === null) - (two === null); // what has none comes last
    const numbers = typeof one === "number" && typeof two === "number";
    return sign * (numbers ? one - two : String(one).localeCompare(String(two), "en", { numeric: true }));
  });
  body.append(...rows.map((row) => lines[row]));
}

// "optimizer.lr > 1e-4 and state = finished" compares; other words have to stand somewhere in the row.
function condition(text) {
  const parts = text.split(/\s+and\s+|,\s*/).filter((part) => part.trim());
  return parts.map((part) => {
    const found = part.match(/^\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.+?)\s*$/);
    const [, name, sign, given] = found ?? [];
    const number = name === "run" ? -1 : column(name), unknown = number < 0 && name !== "run";
    if (!found || (unknown && sign === "=")) // "seed=2" is a part of a name
      return (row) => part.toLowerCase().trim().split(/\s+/).every((word) => words[row].includes(word));
    if (unknown) throw new Error(`no run has ${name}`);
    const plain = given.replace(/^["'](.*)["']$/, "$1"), wanted = Number(plain);
    return (row) => {
      const value = cell(row, number);
      if (value === null) return sign === "!=";
      const numbers = typeof value === "number" && !Number.isNaN(wanted);
      const [a, b] = numbers ? [value, wanted] : [String(value), plain];
      return { "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "!=": a !== b }[sign] ?? a === b;
    };
  });
}

const words = data.names.map((name, row) => [name, ...data.cells[row].filter((v) => v !== null)].join(" ").toLowerCase());

function filter() {
  const count = get("count");
  count.classList.remove("wrong");
  let tests;
  try {
    tests = condition(get("filter").value);
  } catch (error) {
    count.textContent = error.message;
    count.classList.add("wrong");
    return;
  }
  const state = document.querySelector(".chips .on")?.dataset.state;
  if (state !== undefined) tests.push((row) => cell(row, column("state")) === state);
  visible = lines.map((_, row) => row).filter((row) => tests.every((test) => test(row)));
  const kept = new Set(visible);
  lines.forEach((line, row) => (line.hidden = !kept.has(row)));
  count.textContent = `${visible.length.toLocaleString("en")} of ${lines.length.toLocaleString("en")}`;
  draw();
}

// --- the plot

function element(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

// From values to a part of the axis, 0 to 1, and the values that are marked. Texts stand side by side.
function axis(values) {
  const different = [...new Set(values)];
  if (different.some((value) => typeof value !== "number")) {
    different.sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
    return { place: (value) => (different.indexOf(value) + 0.5) / different.length, ticks: different, texts: true };
  }
  different.sort((a, b) => a - b);
  let low = different[0], high = different[different.length - 1];
  const log = low > 0 && high / low >= 20;
  const to = log ? Math.log10 : (value) => value;
  const pad = (to(high) - to(low)) * 0.06 || Math.abs(to(high)) * 0.05 || 0.5;
  low = to(low) - pad;
  high = to(high) + pad;
  const place = (value) => (to(value) - low) / (high - low);
  if (different.length <= 7) return { place, ticks: different, log };
  if (log) {
    const ticks = [];
    for (let power = Math.ceil(low); power <= high; power += Math.ceil((high - low) / 7)) ticks.push(10 ** power);
    return { place, ticks, log };
  }
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * (1 - 1e-9));
  const ticks = [];
  for (let k = Math.ceil(low / unit); k * unit <= high; k += 1) ticks.push(Number((k * unit).toPrecision(12)));
  return { place, ticks };
}

// Runs as points; those that only their seeds tell apart and that share x and colour as one, mean and standard error.
function points(x, y, colour) {
  const groups = new Map();
  for (const row of visible) {
    const [at, value] = [cell(row, x), cell(row, y)];
    if (at === null || (typeof at === "number" && !Number.isFinite(at)) || !finite(value)) continue;
    const kind = colour < 0 ? null : cell(row, colour);
    const key = get("gather").checked ? JSON.stringify([data.series[row], at, kind]) : row;
    if (!groups.has(key)) groups.set(key, { x: at, kind, rows: [], values: [] });
    groups.get(key).rows.push(row);
    groups.get(key).values.push(value);
  }
  return [...groups.values()].map((group) => {
    const n = group.values.length, mean = group.values.reduce((a, b) => a + b, 0) / n;
    const square = group.values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    return { ...group, mean, error: n > 1 ? Math.sqrt(square / (n - 1) / n) : 0 };
  });
}

// A colour for each of a few values, from one to the other for many.
function colours(found) {
  const kinds = [...new Set(found.map((point) => point.kind))].filter((kind) => kind !== null);
  kinds.sort((a, b) => (finite(a) && finite(b) ? a - b : String(a).localeCompare(String(b))));
  const few = kinds.length <= 6;
  const of = (kind) => {
    const at = kinds.indexOf(kind);
    if (at < 0) return "var(--soft)";
    return few ? `var(--c${at + 1})` : `color-mix(in oklab, var(--c2) ${(100 * at) / (kinds.length - 1)}%, var(--c1))`;
  };
  const shown = few ? kinds : [kinds[0], kinds[kinds.length - 1]];
  get("legend").replaceChildren(
    ...shown.map((kind) => {
      const one = document.createElement("span");
      one.style.setProperty("--s", of(kind));
      one.textContent = short(kind);
      return one;
    }),
  );
  return (kind) => (kind === null ? "var(--c1)" : of(kind));
}

function draw() {
  const plot = get("plot"), tip = plot.querySelector(".tip");
  plot.querySelectorAll("svg, .none").forEach((old) => old.remove());
  tip.hidden = true;
  const [x, y, colour] = ["x", "y", "colour"].map((id) => Number(get(id).value));
  const found = points(x, y, colour);
  const paint = colours(found);
  plot.dataset.points = found.length;
  if (!found.length) {
    const none = document.createElement("p");
    none.className = "none";
    none.textContent = "No run has both.";
    plot.append(none);
    return;
  }
  const { clientWidth: width, clientHeight: height } = plot;
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, plot);
  svg.setAttribute("aria-label", `${data.columns[y].name} against ${data.columns[x].name}`);
  const across = axis(found.map((point) => point.x));
  const up = axis(found.flatMap((point) => [...point.values, point.mean - point.error, point.mean + point.error]));
  const left = (value) => LEFT + across.place(value) * (width - LEFT - RIGHT);
  const top = (value) => height - BOTTOM - up.place(value) * (height - TOP - BOTTOM);
  for (const tick of up.ticks) {
    element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: top(tick), y2: top(tick) }, svg);
    element("text", { x: LEFT - 8, y: top(tick) + 4, "text-anchor": "end" }, svg).textContent = short(tick);
  }
  const room = (width - LEFT - RIGHT) / across.ticks.length / 6.5;
  for (const tick of across.ticks) {
    element("line", { class: "grid", x1: left(tick), x2: left(tick), y1: TOP, y2: height - BOTTOM }, svg);
    const text = short(tick), name = text.length > room ? text.slice(0, Math.max(2, room - 1)) + "\u2026" : text;
    element("text", { x: left(tick), y: height - BOTTOM + 16, "text-anchor": "middle" }, svg).textContent = name;
  }
  const named = (number, scale) => data.columns[number].name + (scale.log ? " (log)" : "");
  element("text", { class: "title", x: (LEFT + width - RIGHT) / 2, y: height - 4, "text-anchor": "middle" }, svg).textContent = named(x, across);
  element("text", { class: "title", x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${(height - BOTTOM + TOP) / 2}) rotate(-90)` }, svg).textContent = named(y, up);
  for (const kind of new Set(found.map((point) => point.kind))) {
    const line = path(found.filter((point) => point.kind === kind), left, top);
    if (line) element("path", { class: "joined", style: `--s: ${paint(kind)}`, d: line }, svg);
  }
  for (const point of found) {
    const style = `--s: ${paint(point.kind)}`, place = left(point.x);
    if (point.values.length > 1) {
      point.values.forEach((value) => element("circle", { class: "faint", style, cx: place, cy: top(value), r: 3 }, svg));
      const [a, b] = [point.mean - point.error, point.mean + point.error].map(top);
      element("path", { class: "bars", style, d: `M${place} ${a}V${b}M${place - 4} ${a}h8M${place - 4} ${b}h8` }, svg);
    }
    const dot = element("circle", { style, cx: place, cy: top(point.mean), r: 5 }, svg);
    dot.addEventListener("pointerenter", () => show(dot, point, x, y, tip, width));
    dot.addEventListener("pointerleave", () => (dot.classList.remove("near"), (tip.hidden = true)));
    dot.addEventListener("click", () => pick(point.rows));
  }
}

// A line through what has one colour, where there is one point at each place, as in a sweep.
function path(found, left, top) {
  const places = new Set(found.map((point) => point.x));
  if (places.size < 2 || places.size < found.length || found.some((point) => !finite(point.x))) return "";
  const along = [...found].sort((a, b) => a.x - b.x);
  return "M" + along.map((point) => `${left(point.x)} ${top(point.mean)}`).join("L");
}

function show(dot, point, x, y, tip, width) {
  dot.classList.add("near");
  const few = point.rows.slice(0, 4).map((row) => data.names[row]);
  if (point.rows.length > 4) few.push(`and ${point.rows.length - 4} more`);
  const error = point.error ? ` \u00b1 ${short(point.error)} (n = ${point.values.length})` : "";
  tip.textContent = [...few, `${data.columns[y].name}: ${short(point.mean)}${error}`, `${data.columns[x].name}: ${short(point.x)}`].join("\n");
  const [left, top] = [Number(dot.getAttribute("cx")), Number(dot.getAttribute("cy"))];
  tip.style.cssText = left > width / 2 ? `right: ${width - left + 12}px; top: ${top}px` : `left: ${left + 12}px; top: ${top}px`;
  tip.hidden = false;
}

function pick(rows) {
  lines.forEach((line, row) => line.classList.toggle("picked", rows.includes(row)));
  lines[rows[0]].scrollIntoView({ block: "center" });
}

// --- the controls

function choices() {
  const results = [...data.columns.keys()].filter((n) => data.columns[n].numeric && data.columns[n].kind !== "setting");
  const settings = [...data.columns.keys()].filter((n) => data.columns[n].kind === "setting");
  const option = (n) => new Option(n < 0 ? "nothing" : data.columns[n].name, n);
  const good = ["result", "metric"].map((kind) => results.find((n) => data.columns[n].kind === kind && data.columns[n].better));
  const free = settings.filter((n) => data.columns[n].name !== "run.seed");
  const numeric = free.find((n) => data.columns[n].numeric) ?? free[0] ?? settings[0] ?? column("step");
  get("y").append(...results.map(option));
  get("x").append(...settings.map(option), ...results.map(option));
  get("colour").append(option(-1), ...settings.map(option), option(column("state")));
  get("y").value = good.find((n) => n !== undefined) ?? results[0];
  get("x").value = numeric;
  get("colour").value = free.find((n) => n !== numeric) ?? -1;
  for (const id of ["x", "y", "colour", "gather"]) get(id).addEventListener("change", draw);
}

function chooser() {
  const box = get("chooser").querySelector("div");
  data.columns.forEach(({ name }, number) => {
    const cells = [table.tHead.rows[0].cells[number + 1], ...lines.map((line) => line.cells[number + 1])];
    const label = document.createElement("label"), tick = document.createElement("input");
    tick.type = "checkbox";
    tick.checked = !cells[0].hidden;
    tick.addEventListener("change", () => cells.forEach((one) => (one.hidden = !tick.checked)));
    label.append(tick, name);
    box.append(label);
  });
}

for (const head of table.tHead.rows[0].cells) head.querySelector("button").addEventListener("click", () => sort(head));
for (const chip of document.querySelectorAll(".chips .state"))
  chip.addEventListener("click", () => {
    const on = chip.classList.contains("on");
    document.querySelectorAll(".chips .on").forEach((other) => other.classList.remove("on"));
    chip.classList.toggle("on", !on);
    filter();
  });
document.querySelectorAll("section[hidden]").forEach((section) => (section.hidden = false));
get("filter").addEventListener("input", filter);
addEventListener("resize", draw);
choices();
chooser();
filter();
document.documentElement.dataset.ready = "yes";
