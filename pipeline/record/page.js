// Moving over one chart shows that moment in all charts. Without this script the page is the same, with last values.
"use strict";
const data = JSON.parse(document.getElementById("curves").textContent);
const plots = [...document.querySelectorAll(".linked .plot")].map((plot) => ({
  plot,
  outputs: [...plot.parentElement.querySelectorAll("output")].map((output) => ({ output, last: output.textContent })),
  marks: [],
}));

function short(value) {
  const size = Math.abs(value);
  for (const [factor, suffix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= Math.max(factor, 1e4)) return Number((value / factor).toPrecision(4)) + suffix;
  return size && size < 1e-3 ? value.toExponential(3).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4)));
}

function mark(plot, kind, left, bottom) {
  const node = document.createElement("i");
  node.className = kind;
  node.style.left = left * 100 + "%";
  if (bottom !== undefined) node.style.bottom = bottom * 100 + "%";
  plot.append(node);
  return node;
}

function clear() {
  for (const one of plots) {
    one.marks.forEach((node) => node.remove());
    one.marks = [];
    one.outputs.forEach(({ output, last }) => (output.textContent = last));
  }
}

function show(index, hovered) {
  clear();
  const left = data.x[index] / data.x[data.x.length - 1];
  for (const { plot, outputs, marks } of plots) {
    const low = Number(plot.dataset.low), high = Number(plot.dataset.high);
    marks.push(mark(plot, "cross", left));
    if (plot === hovered) {
      const label = mark(plot, left > 0.5 ? "moment flip" : "moment", left);
      label.textContent = `step ${data.step[index].toLocaleString("en")}`;
      marks.push(label);
    }
    outputs.forEach(({ output }, number) => {
      const value = data.series[output.dataset.series][index];
      output.textContent = value === null ? "\u2013" : "percent" in plot.dataset ? (value * 100).toPrecision(3) + "%" : short(value);
      if (value === null) return;
      const part = "log" in plot.dataset ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      marks.push(mark(plot, "dot s" + (number + 1), left, part));
    });
  }
}

for (const { plot } of plots) {
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const last = data.x.length - 1;
    const x = ((event.clientX - box.left) / box.width) * data.x[last];
    let index = data.x.findIndex((value) => value >= x);
    if (index < 0) index = last;
    if (index > 0 && x - data.x[index - 1] < data.x[index] - x) index -= 1;
    show(index, plot);
  });
  plot.addEventListener("pointerleave", clear);
}

const dialog = document.querySelector("dialog");
for (const image of document.querySelectorAll(".shots img"))
  image.addEventListener("click", () => {
    dialog.replaceChildren(image.cloneNode());
    dialog.showModal();
  });
dialog.addEventListener("click", () => dialog.close());
document.documentElement.dataset.ready = "yes";
