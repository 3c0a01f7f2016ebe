"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const colours = ["#3b7ddd", "#e0662f", "#2f9e5b", "#c2459b", "#8a6d1d", "#6f5bd6", "#c9363e", "#1797a6", "#7b8794", "#a0522d"];
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const marks = ["circle", "square", "diamond", "triangle-up", "x"];
  const colour = (group) => colours[group % colours.length];
  const mark = (group) => marks[group % marks.length];
  for (const chip of document.querySelectorAll("[data-group]")) chip.style.background = colour(+chip.dataset.group);

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const size = (entries) => { let most = -Infinity, least = Infinity; for (const v of entries) { if (v > most) most = v; if (v < least) least = v; } return [least, most]; };
  const numbers = (typed) => new Float64Array(Uint8Array.from(atob(typed.bdata), (c) => c.charCodeAt(0)).buffer);

  function layout(more) {
    const axis = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true, title: { standoff: 8 } };
    const made = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest", dragmode: false,
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", size: 12, color: css("--text") },
      margin: { l: 48, r: 10, t: 8, b: 40 }, hoverlabel: { align: "left" },
    };
    for (const [name, value] of Object.entries(more)) made[name] = /^[xy]axis/.test(name) ? { ...axis, ...value, title: { ...axis.title, ...value.title } } : value;
    return made;
  }
  const options = { responsive: true, displayModeBar: false };
  const drawn = [];
  function draw(id, traces, more) {
    const element = document.getElementById(id);
    if (!element) return;
    drawn.push([element, traces, more]);
    Plotly.newPlot(element, traces(), layout(more()), options);
  }

  const units = { items: ["items", "~s", ""], seconds: ["seconds", "", " s"], bytes: ["bytes", ".3~s", "B"] };
  const all = data.curves.flatMap((c) => [c.training, c.held_out]).filter(Boolean).flatMap((p) => Array.from(numbers(p.objective)));
  const [least, most] = size(all.length ? all : [0, 1]);
  const room = (most - least || Math.abs(most) || 1) * 0.05;
  const yRange = [least - room, most + room];
  const both = data.curves.some((c) => c.held_out);
  const nthOfGroup = data.curves.map((c, place) => data.curves.slice(0, place).filter((other) => other.group === c.group).length);
  for (const [id, [unit, format, suffix]] of Object.entries(units)) {
    const line = (curve, place, points, held) => ({
      type: "scatter", x: points[id], y: points.objective, customdata: points.version,
      mode: held ? "lines+markers" : (points.objective.bdata.length < 24 ? "lines+markers" : "lines"),
      line: { color: colour(curve.group), width: held ? 2.5 : 1.3, dash: dashes[nthOfGroup[place] % dashes.length] },
      marker: { size: held ? 7 : 4, symbol: mark(curve.group) }, opacity: held || !both ? 1 : 0.55, name: data.labels[curve.group],
      hovertemplate: `<b>${escaped(data.labels[curve.group])}</b>, seed ${curve.seed}${curve.turn ? ", " + escaped(curve.turn) : ""}<br>${held ? "held out" : "training"} %{y:.4f}<br>%{x:${format || ".3~f"}}${suffix}${id === "items" ? " items" : ""}, version %{customdata}<extra></extra>`,
    });
    draw(id, () => data.curves.flatMap((curve, place) => [
      curve.training && line(curve, place, curve.training, false), curve.held_out && line(curve, place, curve.held_out, true),
    ].filter(Boolean)), () => ({
      xaxis: { title: { text: unit }, rangemode: "tozero", nticks: 6, ...(format ? { tickformat: format } : {}), ticksuffix: id === "bytes" ? "B" : "" },
      yaxis: { range: yRange },
      shapes: data.target === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.target, y1: data.target, line: { color: css("--soft"), width: 1, dash: "dot" } }],
      annotations: data.target === null ? [] : [{ xref: "paper", x: 0.01, xanchor: "left", y: data.target, yanchor: "bottom", text: "target", showarrow: false, font: { size: 11, color: css("--soft") } }],
    }));
  }
  function escaped(text) { return text.replace(/&/g, "&amp;").replace(/</g, "&lt;"); }

  const states = [["computing", "--computing"], ["communicating", "--communicating"], ["evaluating", "--evaluating"], ["waiting", "--waiting"]];
  data.strips.forEach((strip, place) => {
    draw(`strip-${place}`, () => [
      ...states.map(([state, name], number) => ({
        type: "heatmap", z: strip.states[number], x0: strip.cell_s / 2, dx: strip.cell_s, y: strip.workers.map((worker) => `worker ${worker}`),
        colorscale: [[0, css(name)], [1, css(name)]], showscale: false, hoverongaps: false, ygap: 3, zsmooth: false,
        hovertemplate: `%{y}, %{x:.2f} s<br>${state}, version %{z}<extra></extra>`,
      })),
      { type: "scatter", mode: "markers", x: strip.events.map((e) => e[1]), y: strip.events.map((e) => `worker ${strip.workers[e[0]]}`),
        text: strip.events.map((e) => wrapped(escaped(e[2]))), marker: { symbol: "diamond", size: 10, color: "#d1242f", line: { color: css("--ground"), width: 1 } },
        hovertemplate: "%{y}, %{x:.2f} s<br>%{text}<extra></extra>" },
    ], () => ({
      xaxis: { range: [0, data.longest_s], ticksuffix: " s", showgrid: false, nticks: 7 },
      yaxis: { autorange: "reversed", showgrid: false, type: "category", fixedrange: true, ticks: "" }, margin: { l: 70, r: 10, t: 6, b: 30 },
    }));
  });
  function wrapped(text) { return text.replace(/(.{1,60})(\s+|$)/g, "$1<br>"); }

  draw("staleness", () => data.staleness.map((each, group) => ({
    type: "bar", name: data.labels[group], marker: { color: colour(group) }, width: undefined,
    x: each.shares.map((_, bar) => bar * each.width + (each.width - 1) / 2), y: each.shares,
    customdata: each.shares.map((_, bar) => each.width === 1 ? `${bar}` : `${bar * each.width} to ${(bar + 1) * each.width - 1}`),
    hovertemplate: `<b>${escaped(data.labels[group])}</b><br>staleness %{customdata}: %{y:.1%} of contributions<br>${escaped(each.why)}<extra></extra>`,
  })), () => ({
    xaxis: { title: { text: "staleness (versions)" }, rangemode: "tozero", nticks: 12 }, yaxis: { tickformat: ".0%", title: { text: "contributions" } }, bargap: 0.15,
    shapes: data.staleness.flatMap((each, group) => each.bound === null ? [] : [{ type: "line", x0: each.bound + 0.5, x1: each.bound + 0.5, yref: "paper", y0: 0, y1: 1, line: { color: colour(group), width: 2, dash: "dash" } }]),
  }));

  const mib = (bytes) => bytes === null ? null : bytes / 1048576;
  draw("memory", () => ["nothing_recomputed_bytes", "budget_bytes", "predicted_bytes", "measured_bytes"].map((name, number) => ({
    type: "bar", name: ["nothing recomputed", "budget", "predicted", "measured"][number], x: data.memory.map((each) => data.labels[each.group]),
    y: data.memory.map((each) => mib(each[name])), hovertemplate: `%{x}<br>${["nothing recomputed", "budget", "predicted", "measured"][number]} %{y:.1f} MiB<extra></extra>`,
    marker: { color: ["#7b8794", "#c69026", "#3b7ddd", "#2f9e5b"][number] },
  })), () => ({ showlegend: true, legend: { orientation: "h", y: 1.15 }, xaxis: {}, yaxis: { title: { text: "MiB" }, rangemode: "tozero" } }));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [element, traces, more] of drawn) Plotly.react(element, traces(), layout(more()), options);
  });
  document.documentElement.dataset.drawn = String(drawn.length);
})();
