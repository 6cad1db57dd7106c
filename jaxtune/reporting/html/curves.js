"use strict";
// Draws every figure with data-chart:
// {title, noisy, series: [{name, x: steps, y: numbers or null, marked, hidden}]}. Only what is noisy
// is smoothed; marked shows every point, hidden is off until the reader turns it on.
// One view (first step, last step) and one cursor (a step) are shared by all charts. What comes from
// the data is only ever put into text nodes and numbers.
(() => {
  const HEIGHT = 210, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 22;
  const said = document.getElementById("said");
  const whole = document.getElementById("whole");
  const smooth = document.getElementById("smooth");
  const charts = [...document.querySelectorAll("[data-chart]")].map(build);
  if (!charts.length) return;
  const steps = charts.flatMap((chart) => chart.series.flatMap((line) => [line.x[0], line.x.at(-1)]));
  const full = { lo: Math.min(...steps), hi: Math.max(...steps) };
  if (full.lo < full.hi * 0.05) full.lo = 0;
  if (full.lo === full.hi) { full.lo -= 1; full.hi += 1; }
  let view = { ...full }, cursor = null;

  function node(parent, name, attributes, text) {
    const made = document.createElementNS(parent.namespaceURI, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function build(figure, index) {
    const { title, noisy, series } = JSON.parse(figure.dataset.chart);
    const svg = figure.querySelector("svg");
    const chart = { title, noisy, svg, series, log: false, frame: null, drag: null };
    series.forEach((line) => { line.on = !line.hidden; });
    const head = figure.querySelector("figcaption");
    chart.step = node(head, "span", { class: "at" });
    if (series.some((line) => line.y.some((value) => value > 0))) {
      const log = node(head, "button", { type: "button", "aria-pressed": "false",
        "aria-label": `log scale: ${title}` }, "log");
      log.onclick = () => {
        chart.log = !chart.log;
        log.setAttribute("aria-pressed", chart.log);
        draw(chart);
      };
    }
    const legend = figure.querySelector(".legend");
    series.forEach((line, number) => {
      const button = node(legend, "button", { type: "button", "aria-pressed": line.on,
        class: `s${number % 6}` });
      node(button, "i", { class: line.marked ? "dot" : "" });
      node(button, "span", {}, line.name);
      line.value = node(button, "b", {});
      button.onclick = () => {
        line.on = !line.on;
        button.setAttribute("aria-pressed", line.on);
        draw(chart);
      };
    });
    svg.removeAttribute("aria-hidden");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "application");
    svg.setAttribute("aria-label", `${title} by step. Arrow keys read values, plus and minus zoom.`);
    listen(chart);
    return chart;
  }

  // -- scales -------------------------------------------------------------------------------------

  function ticks(lo, hi, count) {
    const rough = (hi - lo) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
    const found = [];
    for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) found.push(i * step + 0); // no -0
    return found;
  }

  function logTicks(lo, hi) {
    const found = [];
    const parts = hi / lo < 30 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(Math.log10(hi / lo) / 6));
    for (let p = Math.floor(Math.log10(lo)); p <= Math.ceil(Math.log10(hi)); p++)
      for (const m of parts) {
        const value = m * 10 ** p;
        if (p % every === 0 && value >= lo && value <= hi) found.push(value);
      }
    return found.length > 1 ? found : ticks(lo, hi, 5);
  }

  function short(value) {
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e7))
      return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return String(+value.toPrecision(4));
  }

  function nearest(line, step) {
    let lo = 0, hi = line.x.length - 1;
    while (hi - lo > 1) {
      const mid = (lo + hi) >> 1;
      if (line.x[mid] <= step) lo = mid; else hi = mid;
    }
    return step - line.x[lo] <= line.x[hi] - step ? lo : hi;
  }

  // Exponential moving average, freed of its start at 0; gaps stay gaps.
  function smoothed(chart, line) {
    const keep = +smooth.value;
    if (!keep || !chart.noisy || line.marked || line.y.length < 3) return null;
    let mean = 0, share = 0;
    return line.y.map((value) => {
      if (value === null) return null;
      mean = keep * mean + (1 - keep) * value;
      share = keep * share + (1 - keep);
      return mean / share;
    });
  }

  // -- drawing ------------------------------------------------------------------------------------

  function draw(chart) {
    const { svg } = chart, width = Math.max(200, svg.clientWidth);
    const values = chart.series.filter((line) => line.on).flatMap((line) =>
      [...line.y, ...(smoothed(chart, line) ?? [])].filter((value, i) => drawable(chart, value)
        && line.x[i % line.x.length] >= view.lo && line.x[i % line.x.length] <= view.hi));
    let lo = Infinity, hi = -Infinity;
    for (const value of values) { if (value < lo) lo = value; if (value > hi) hi = value; }
    if (!values.length) { lo = chart.log ? 0.1 : 0; hi = 1; }
    if (chart.log) {
      const pad = lo === hi ? 2 : (hi / lo) ** 0.05;
      lo /= pad; hi *= pad;
    } else {
      const pad = lo === hi ? Math.abs(lo) * 0.1 || 1 : (hi - lo) * 0.05;
      lo = lo >= 0 && lo < (hi - lo) * 0.3 ? 0 : lo - pad;
      hi += pad;
    }
    const scale = chart.log ? Math.log : (value) => value;
    const x = (step) => LEFT + (step - view.lo) / (view.hi - view.lo) * (width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - (scale(value) - scale(lo)) / (scale(hi) - scale(lo))
      * (HEIGHT - TOP - BOTTOM);
    chart.frame = { width, x, y };

    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    for (const value of chart.log ? logTicks(lo, hi) : ticks(lo, hi, 5)) {
      node(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
      node(svg, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
    }
    for (const step of ticks(view.lo, view.hi, width / 90).filter(Number.isInteger)) {
      const at = x(step);
      node(svg, "line", { class: "tick", x1: at, x2: at, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 });
      node(svg, "text", { x: at, y: HEIGHT - 5, "text-anchor": "middle" }, step.toLocaleString("en"));
    }
    // An inner svg cuts off what lies outside of the view.
    const box = [LEFT, 0, width - LEFT - RIGHT + 4, HEIGHT - BOTTOM + 4];
    const inner = node(svg, "svg", { x: box[0], y: box[1], width: box[2], height: box[3],
      viewBox: box.join(" ") });
    chart.series.forEach((line, number) => {
      if (!line.on) return;
      const fair = smoothed(chart, line), kind = `line s${number % 6}`;
      curve(inner, chart, line.x, line.y, fair ? `${kind} faint` : kind);
      if (fair) curve(inner, chart, line.x, fair, kind);
      const lone = line.y.filter((value) => value !== null).length === 1; // no line shows it
      if (line.marked || lone) line.x.forEach((step, i) => {
        if (drawable(chart, line.y[i]) && step >= view.lo && step <= view.hi)
          node(inner, "circle", { class: `s${number % 6}`, cx: x(step), cy: y(line.y[i]), r: 3 });
      });
    });
    chart.marks = node(svg, "g", {});
    point(chart);
  }

  const drawable = (chart, value) => value !== null && (!chart.log || value > 0);

  // Thousands of points become the first, lowest, highest and last of each pixel column.
  function curve(parent, chart, xs, ys, kind) {
    const { x, y } = chart.frame;
    let path = "", pen = "M", column = null, low, high, last;
    const put = (px, py) => { path += `${pen}${px.toFixed(1)} ${py.toFixed(1)}`; pen = "L"; };
    const close = () => {
      if (column === null) return;
      if (low !== high) { put(column, low); put(column, high); }
      put(column, last);
      column = null;
    };
    const first = Math.max(0, nearest({ x: xs }, view.lo) - 1);
    for (let i = first; i < xs.length; i++) {
      if (!drawable(chart, ys[i])) { close(); pen = "M"; continue; }
      const px = Math.round(x(xs[i]) * 2) / 2, py = y(ys[i]);
      if (px !== column) { close(); column = px; low = high = py; put(px, py); }
      low = Math.min(low, py); high = Math.max(high, py); last = py;
      if (xs[i] > view.hi) break;
    }
    close();
    if (path) node(parent, "path", { class: kind, d: path });
  }

  // The cursor's line and dots, and the numbers in the legend: the last ones where there is none.
  function point(chart) {
    chart.marks.replaceChildren();
    const { x, y } = chart.frame;
    chart.step.textContent = cursor === null ? "" : `step ${cursor.toLocaleString("en")}`;
    if (cursor !== null) node(chart.marks, "line",
      { class: "cursor", x1: x(cursor), x2: x(cursor), y1: TOP, y2: HEIGHT - BOTTOM });
    chart.series.forEach((line, number) => {
      const i = cursor === null ? line.x.length - 1 : nearest(line, cursor);
      const value = line.y[i];
      const elsewhere = cursor !== null && line.x[i] !== cursor ? ` at ${line.x[i]}` : "";
      line.value.textContent = (value === null ? "\u2013" : short(value)) + elsewhere;
      if (cursor !== null && line.on && drawable(chart, value) && line.x[i] >= view.lo && line.x[i] <= view.hi)
        node(chart.marks, "circle", { class: `s${number % 6} at`, cx: x(line.x[i]), cy: y(value), r: 4 });
    });
    if (chart.drag && chart.drag.from !== chart.drag.to) {
      const [a, b] = [x(chart.drag.from), x(chart.drag.to)];
      node(chart.marks, "rect", { class: "drag", x: Math.min(a, b), width: Math.abs(a - b), y: TOP,
        height: HEIGHT - TOP - BOTTOM });
    }
  }

  // -- what the reader does -----------------------------------------------------------------------

  function show(lo, hi) {
    lo = Math.max(full.lo, lo); hi = Math.min(full.hi, hi);
    if (hi - lo < 2) return;
    view = { lo, hi };
    whole.disabled = lo === full.lo && hi === full.hi;
    charts.forEach(draw);
  }

  function move(step) {
    cursor = step;
    charts.forEach(point);
  }

  function leading(chart) {
    return chart.series.filter((line) => line.on).sort((a, b) => b.x.length - a.x.length)[0];
  }

  function under(chart, event) {
    const box = chart.svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) * chart.frame.width / box.width - LEFT)
      / (chart.frame.width - LEFT - RIGHT);
    return view.lo + Math.min(1, Math.max(0, share)) * (view.hi - view.lo);
  }

  function listen(chart) {
    const { svg } = chart;
    svg.onpointerdown = (event) => {
      if (event.button) return;
      svg.setPointerCapture(event.pointerId);
      const step = under(chart, event);
      chart.drag = { from: step, to: step };
    };
    svg.onpointermove = (event) => {
      const step = under(chart, event), line = leading(chart);
      if (chart.drag) chart.drag.to = step;
      if (line) move(line.x[nearest(line, step)]);
    };
    svg.onpointerup = () => {
      const drag = chart.drag;
      chart.drag = null;
      if (!drag) return;
      const { x } = chart.frame;
      if (Math.abs(x(drag.from) - x(drag.to)) > 8)
        show(Math.min(drag.from, drag.to), Math.max(drag.from, drag.to));
      else point(chart);
    };
    svg.onpointercancel = () => { chart.drag = null; move(null); };
    svg.onpointerleave = () => { if (!chart.drag) move(null); };
    svg.ondblclick = () => show(full.lo, full.hi);
    svg.onblur = () => move(null);
    svg.onkeydown = (event) => {
      const line = leading(chart);
      if (!line || event.ctrlKey || event.metaKey || event.altKey) return;
      const last = line.x.length - 1;
      const i = nearest(line, cursor ?? view.lo), jump = event.shiftKey ? 10 : 1;
      const middle = cursor ?? (view.lo + view.hi) / 2, half = (view.hi - view.lo) / 2;
      const keys = {
        ArrowLeft: () => read(chart, line, cursor === null ? last : i - jump),
        ArrowRight: () => read(chart, line, cursor === null ? 0 : i + jump),
        Home: () => read(chart, line, 0),
        End: () => read(chart, line, last),
        "+": () => show(middle - half / 2, middle + half / 2),
        "=": () => show(middle - half / 2, middle + half / 2),
        "-": () => show(middle - half * 2, middle + half * 2),
        Escape: () => { move(null); show(full.lo, full.hi); },
      };
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    };
  }

  // Moves the cursor to a point, brings it into view, and says what stands there.
  function read(chart, line, i) {
    const step = line.x[Math.min(line.x.length - 1, Math.max(0, i))];
    const width = view.hi - view.lo;
    if (step < view.lo) show(step, step + width);
    if (step > view.hi) show(step - width, step);
    move(step);
    said.textContent = `step ${step}: ` + chart.series.filter((other) => other.on).map((other) =>
      `${other.name} ${other.value.textContent}`).join(", ");
  }

  whole.onclick = () => show(full.lo, full.hi);
  smooth.oninput = () => charts.forEach(draw);
  document.querySelector(".controls").hidden = false;
  let width = null;
  function fit() {
    const now = charts[0].svg.clientWidth;
    if (now !== width) { width = now; charts.forEach(draw); }
  }
  fit(); // at once: an observer is first called when a frame is painted
  new ResizeObserver(fit).observe(charts[0].svg);
})();
