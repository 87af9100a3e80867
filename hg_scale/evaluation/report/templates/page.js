// Shows the values of the curves under the pointer; everything else works without it.
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const round = (v) => {
  for (const [unit, size] of [["E", 1e18], ["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e4]])
    if (Math.abs(v) >= size) return (v / (unit === "k" ? 1e3 : size)).toPrecision(3) + unit;
  if (v !== 0 && Math.abs(v) < 1e-3) return v.toExponential(2);
  return Math.abs(v) >= 100 ? v.toFixed(0) : String(+v.toPrecision(4));
};
const nearest = (xs, x) => {
  let best = -1;
  xs.forEach((v, i) => {
    if (v !== null && (best < 0 || Math.abs(v - x) < Math.abs(xs[best] - x))) best = i;
  });
  return best;
};
const names = { tokens: "tokens", steps: "step", compute: "FLOPs", hours: "hours" };

for (const frame of document.querySelectorAll(".frame")) {
  const hit = document.createElement("div"), line = document.createElement("div"), tip = document.createElement("div");
  hit.className = "hit"; line.className = "cursor"; tip.className = "tip";
  line.hidden = tip.hidden = true;
  hit.append(line, tip); frame.append(hit);
  const leave = () => { line.hidden = tip.hidden = true; };
  const move = (event) => {
    const plot = [...frame.querySelectorAll(".plot")].find((p) => getComputedStyle(p).display !== "none");
    const box = hit.getBoundingClientRect(), part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const axis = plot.dataset.axis, key = plot.dataset.chart, spec = figures.specs[key];
    const scale = +plot.dataset.scale, x = part * plot.dataset.high, table = document.createElement("table");
    figures.runs.forEach((run, number) => {
      const i = nearest(run.x[axis], x), j = nearest(run.vx[axis], x);
      const over = i < 0 || x - run.x[axis][i] > 0.03 * plot.dataset.high; // the run ended before
      const value = over ? null : run.y[key][i];
      const seen = !spec.validation || j < 0 ? null : run.vy[spec.validation][j];
      if (value === null && seen === null) return;
      const row = table.insertRow(), name = row.insertCell(), swatch = document.createElement("span");
      swatch.className = "swatch run" + (number % 8);
      name.append(swatch, figures.names[number]);
      row.insertCell().textContent = value === null ? "" : round(value * spec.factor);
      if (spec.validation)
        row.insertCell().textContent = seen === null ? "" : "validation " + round(seen * spec.factor) + " at " + (axis === "hours" ? (run.vx[axis][j] * scale).toFixed(1) : round(run.vx[axis][j]));
    });
    tip.replaceChildren((scale > 1 ? "minutes" : names[axis]) + " " + (axis === "hours" ? (x * scale).toFixed(1) : round(x)), table);
    line.hidden = tip.hidden = false;
    line.style.left = 100 * part + "%";
    const right = part * box.width > box.width - tip.offsetWidth - 14;
    tip.style.left = Math.max(-40, part * box.width + (right ? -tip.offsetWidth - 12 : 12)) + "px";
  };
  hit.addEventListener("pointermove", move);
  hit.addEventListener("pointerdown", move);
  hit.addEventListener("pointerleave", leave);
}
