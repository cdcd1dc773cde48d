"use strict";
// Looks up what Python priced, and shows it. Every figure is a text from Python; numbers are read from it for the axes alone.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const state = { model: "", phase: "", window: null, rtt: 0, rate: 0 };
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = {};
const MAP_KEY = "+ is this link, ◇ a measured network, with the largest error of the latencies that were priced without it; click to go there";
const CLOSE_TO = { ITL: ["its own compute", "local, too, takes its compute and no more, and a decode step computes the same in all modes"], TTFT: ["local", "by the ratio to local"] };
const FAR = 8; // times the middle mode: farther ones stand below the chart
const SHORT = "[0.123 to 0.123]".length;

const view = () => data.views.find((each) => each.model === state.model && each.phase === state.phase);
const link = () => state.rtt * data.rates.length + state.rate;
const spaced = (text) => text.replace(/([a-zA-Z]+)$/, " $1");
const numbers = (text) => (text.match(/-?[\d,]*\.?\d+/g) || []).map((each) => Number(each.replaceAll(",", "")));
const textOf = (series, source) => (series.texts[source].length === 1 ? series.texts[source][0] : series.texts[source][link()]);

/** Each mode once: over the chosen window if it has one. */
function shown() {
  const chosen = view().series.filter((each) => each.window === state.window);
  return view().series.filter((each) => each.window === null).map((each) => chosen.find((other) => other.mode === each.mode) || each);
}

function mapHere() {
  return view().maps.find((each) => each.window === state.window) || { lowest: [], nearest: [] };
}

// The state, in controls and in the address

function fill(select, values, texts) {
  select.replaceChildren(...values.map((value, index) => new Option(texts ? texts[index] : value, value)));
}

function choose(wanted) {
  const missing = [];
  const pick = (name, offered, otherwise) => {
    const given = wanted[name];
    if (given === undefined || given === null || given === "") return otherwise;
    if (offered.includes(given)) return given;
    missing.push(`${name} ${given} (shown: ${otherwise})`);
    return otherwise;
  };
  state.model = pick("model", data.views.map((each) => each.model), data.views[0].model);
  const phases = data.views.filter((each) => each.model === state.model).map((each) => each.phase);
  state.phase = pick("phase", phases, (data.views.find((each) => each.model === state.model && each.metric === "ITL") || view0(phases)).phase);
  const windows = view().windows.map(String);
  const window = pick("window", ["recorded", ...windows], "recorded");
  state.window = window === "recorded" ? null : Number(window);
  state.rtt = data.rtts.indexOf(pick("rtt", data.rtts, data.first[0]));
  state.rate = data.rates.indexOf(pick("rate", data.rates, data.first[1]));
  at("moved").textContent = missing.length ? `This page does not have ${missing.join(", ")}.` : "";
  at("moved").hidden = missing.length === 0;
  showControls(phases, windows);
}

const view0 = (phases) => ({ phase: phases[0] });

function showControls(phases, windows) {
  fill(at("model"), [...new Set(data.views.map((each) => each.model))]);
  fill(at("phase"), phases);
  fill(at("window"), ["recorded", ...windows], ["as recorded", ...windows.map((each) => `${each} tokens a call`)]);
  at("window").disabled = windows.length === 0;
  at("model").value = state.model;
  at("phase").value = state.phase;
  at("window").value = state.window === null ? "recorded" : String(state.window);
  for (const [name, values] of [["rtt", data.rtts], ["rate", data.rates]]) {
    at(name).max = values.length - 1;
    at(name).value = state[name];
    at(name).setAttribute("aria-valuetext", spaced(values[state[name]]));
    at(`${name}-text`).textContent = spaced(values[state[name]]);
  }
}

const wanted = () => ({
  model: state.model, phase: state.phase, window: state.window === null ? "recorded" : String(state.window),
  rtt: data.rtts[state.rtt], rate: data.rates[state.rate],
});

function change(changes) {
  choose({ ...wanted(), ...changes });
  history.replaceState(null, "", `#${new URLSearchParams(wanted())}`);
  show();
}

// Words and tables

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function answer() {
  const token = view().metric === "ITL" ? "a token" : "a first token";
  const of = (mode) => shown().find((each) => each.mode === mode);
  const parts = [`Over ${spaced(data.rtts[state.rtt])} and ${spaced(data.rates[state.rate])} the distance costs ${token} `];
  view().ends.forEach((mode, index) => {
    const gap = textOf(of(mode), "gap_ms");
    const reason = of(mode).reasons.worker_compute_ms;
    parts.push(index ? " and " : "", numbers(gap).length ? element("strong", `${gap} ms`) : `an unknown time (${reason})`, ` with ${mode}`);
  });
  const local = shown().find((each) => each.local);
  const total = local && textOf(local, view().metric === "ITL" ? "itl_ms" : "ttft_ms").split(" ")[0];
  parts.push(total && numbers(total).length ? `; locally it takes ${total} ms. ` : ". ");
  parts.push(...cheapest());
  at("answer").replaceChildren(...(view().ends.length ? parts : ["No remote mode was run: nothing crosses a link."]));
}

/** The sentence on the map's mode at this link, or on the nearest one. */
function cheapest() {
  const rung = mapHere().lowest[link()];
  const near = mapHere().nearest[link()];
  const bound = `${data.within} of ${CLOSE_TO[view().metric][0]}`;
  if (rung === undefined) return [];
  if (rung !== null) return [`The cheapest knowledge within ${bound}: `, element("strong", view().ladder[rung].mode), ` (${view().ladder[rung].adds}).`];
  return [`No mode of the ladder comes within ${bound}`, ...(near ? ["; the nearest is ", element("strong", view().ladder[near.rung].mode), `, ${near.above} above it.`] : ["."])];
}

/** An interval in a table: a line breaks before it, and inside a long one behind its "to". */
const unbroken = (bracket) => (bracket.length > SHORT ? bracket.replace(" to ", "\u00a0to ") : bracket.replaceAll(" ", "\u00a0"));

/** A table with a row header; numbers of notes stand behind texts that have a reason. */
function table(id, columns, rows) {
  const reasons = [];
  const head = element("tr", "");
  head.append(...columns.map((column) => Object.assign(element("th", column.label, column.numeric ? "number" : ""), { scope: "col" })));
  const body = rows.map((row) => {
    const line = element("tr", "", row.local ? "local" : "");
    columns.forEach((column, index) => {
      const reason = row.reasons && row.reasons[column.source];
      if (reason && !reasons.includes(reason)) reasons.push(reason);
      const text = row.texts[column.source].replace(/\[.*\]/, unbroken);
      const cell = element(index ? "td" : "th", text + (reason ? `\u00a0(${reasons.indexOf(reason) + 1})` : ""), column.numeric ? "number" : "");
      if (!index) cell.scope = "row";
      line.append(cell);
    });
    return line;
  });
  const parts = [document.createElement("thead"), document.createElement("tbody")];
  parts[0].append(head);
  parts[1].append(...body);
  at(id).replaceChildren(...parts);
  if (at(`${id}-notes`)) at(`${id}-notes`).replaceChildren(...reasons.map((reason) => element("li", reason)));
}

function rowOf(series, columns) {
  const texts = Object.fromEntries(columns.map(({ source }) => [source, source === "mode" ? series.mode : textOf(series, source)]));
  return { local: series.local, reasons: series.reasons, texts };
}

function tables() {
  table("priced", data.columns.priced, shown().map((each) => rowOf(each, data.columns.priced)));
  table("parts", data.columns.parts, shown().map((each) => rowOf(each, data.columns.parts)));
  table("measured", data.columns.measured, view().measured);
  at("map-rate").textContent = spaced(data.rates[state.rate]);
  const columns = [{ source: "rtt", label: "round trip" }, { source: "rung", label: "cheapest knowledge" }];
  const along = view().maps.length ? data.rtts.map((rtt, index) => [rtt, cheapestText(index * data.rates.length + state.rate)]) : [];
  const runs = along.filter(([, rung], index) => index === 0 || rung !== along[index - 1][1]);
  table("map-table", columns, runs.map(([rtt, rung]) => {
    const last = along.findIndex(([each, other], index) => index >= along.findIndex(([start]) => start === rtt) && other !== rung);
    const until = along[(last < 0 ? along.length : last) - 1][0];
    return { texts: { rtt: rtt === until ? spaced(rtt) : `${spaced(rtt)} to ${spaced(until)}`, rung } };
  }));
}

const nameOf = (rung) => (rung === null ? data.none : view().ladder[rung].mode);

/** The map's mode at a link; or the nearest one, with `distance` also how far it is. */
function cheapestText(place, distance = false) {
  const near = mapHere().nearest[place];
  return nameOf(mapHere().lowest[place]) + (near ? `; nearest ${nameOf(near.rung)}${distance ? `, ${near.above} above` : ""}` : "");
}

// Charts

const PLACES = { itl: ["itl", "itl_ms"], ttft: ["ttft", "ttft_ms"], "rate-chart": ["rate", "tokens_per_s"], bytes: ["bytes", "payload_bytes_per_token"] };

/** Rows for a chart, and those that it leaves out, with the reason: no value, 0 on the log axis, or so far from the others that it hides them. */
function intervals(source) {
  const bytes = source === "payload_bytes_per_token";
  const rows = shown().map((each) => {
    const text = textOf(each, source);
    const [value, low = value, high = value] = numbers(text);
    return { mode: each.mode, kind: each.local || (bytes && each.window === null) ? "measured" : "priced", text, value, low, high, reason: each.reasons[source] };
  });
  const known = rows.filter((row) => row.value !== undefined);
  const sorted = known.map((row) => row.value).sort((one, other) => one - other);
  const most = bytes ? Infinity : FAR * sorted[Math.floor(sorted.length / 2)];
  const drawn = known.filter((row) => row.value <= most && (row.value > 0 || !bytes));
  return [drawn, rows.filter((row) => !drawn.includes(row)).map((row) => ({ mode: row.mode, reason: row.value === undefined ? row.reason || "no value" : row.text }))];
}

function breakdown() {
  const rows = shown().flatMap((each) =>
    Object.entries(data.breakdown).map(([source, part], order) => ({ mode: each.mode, part, order, ms: numbers(textOf(each, source))[0], text: `${textOf(each, source)} ms` })));
  const missing = shown().filter((each) => !numbers(textOf(each, "worker_compute_ms")).length);
  const below = rows.filter((row) => row.ms < 0).map((row) => ({ mode: row.mode, reason: `${row.part} is below 0, ${row.text}` }));
  return [rows.filter((row) => row.ms > 0), [...missing.map((each) => ({ mode: each.mode, reason: each.reasons.worker_compute_ms })), ...below]];
}

function tellMissing(id, rows) {
  const reasons = [...new Set(rows.map((row) => row.reason))];
  at(`${id}-off`).textContent = reasons.map((reason) => {
    const modes = rows.filter((row) => row.reason === reason).map((row) => row.mode);
    return modes.length === shown().length ? `Nothing to show: ${reason}.` : `Not shown: ${modes.join(", ")} (${reason}).`;
  }).join(" ");
}

function mapRows() {
  const { lowest } = mapHere();
  return {
    rows: data.cells.map((cell, index) => ({ ...cell, rung: nameOf(lowest[index]), cheapest: cheapestText(index, true), place: index })),
    measured: view().points.filter((each) => each.rtt !== null),
    here: [{ rtt: numbers(data.rtts[state.rtt])[0], rate: Math.sqrt(data.cells[link()].bottom * data.cells[link()].top) }],
  };
}

/** The library's look: of the page's colours, with as many columns of the legend as fit. */
function look(columns) {
  const style = getComputedStyle(document.body);
  const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name));
  const axis = { labelColor: text, titleColor: text, gridColor: line, tickColor: line, domainColor: line, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return { background: "transparent", font: style.fontFamily, view: { stroke: null }, axis, legend: { labelColor: text, labelFontSize: 12, columns } };
}

async function embed(id, spec, sets) {
  const height = spec.height || data.row * (new Set(sets.rows.map((row) => row.mode)).size + 1);
  const columns = Math.max(1, Math.floor((at(id).clientWidth - 130) / 125));
  const key = JSON.stringify([id === "map" ? [state.model, state.phase] : height, columns, dark.matches]);
  if (charts[id] && charts[id].key === key) return charts[id].view;
  const shades = dark.matches && PLACES[id] ? Object.entries(data.on_dark) : [];
  const shaded = JSON.parse(shades.reduce((text, [light, other]) => text.replaceAll(light, other), JSON.stringify(spec)));
  const options = { actions: false, renderer: "svg", config: look(columns), tooltip: { theme: dark.matches ? "dark" : "light" } };
  charts[id] = { key, view: vegaEmbed(at(id), { ...shaded, height, datasets: sets }, options).then((made) => made.view) };
  if (id === "map") (await charts[id].view).addEventListener("click", (_, item) => {
    if (item && item.datum && item.datum.place !== undefined) change({ rtt: item.datum.rtt, rate: item.datum.rate });
  });
  return charts[id].view;
}

async function draw(id, spec, sets) {
  at(id).hidden = !sets || Object.values(sets)[0].length === 0;
  if (at(id).hidden) return;
  const chart = await embed(id, spec, sets);
  for (const [name, rows] of Object.entries(sets)) chart.data(name, rows);
  await chart.resize().runAsync();
}

async function drawAll() {
  const jobs = [];
  for (const [id, [name, source]] of Object.entries(PLACES)) {
    const [drawn, missing] = intervals(source);
    tellMissing(id, missing);
    jobs.push(draw(id, data.charts[name], { rows: drawn }));
  }
  const [drawn, missing] = breakdown();
  tellMissing("breakdown", missing);
  jobs.push(draw("breakdown", data.charts.breakdown, { rows: drawn }));
  at("map-figure").hidden = view().maps.length === 0;
  at("map-off").textContent = view().points.filter((each) => each.rtt === null).map((each) => `Not on the map: ${each.network} (${each.reason}).`).join(" ");
  if (view().maps.length) jobs.push(draw("map", view().map_chart, mapRows()));
  await Promise.all(jobs);
}

function show() {
  const [to, why] = CLOSE_TO[view().metric];
  at("within").textContent = `${data.within} of ${to}`;
  at("map-note").textContent = `${why}; ${MAP_KEY}`;
  const command = `semgap price ${data.directory}/ --rtt ${data.rtts[state.rtt]} --rate ${data.rates[state.rate]}` + (state.window === null ? "" : ` --window ${state.window}`);
  at("command").replaceChildren(...command.split(" --").flatMap((part, index) => (index ? [" ", element("span", `--${part}`)] : [part]))); // breaks between options
  at("words").replaceChildren(...[...data.words, ...view().words].map((word) => element("li", word)));
  answer();
  tables();
  document.body.dataset.drawn = "";
  drawAll().then(() => { document.body.dataset.drawn = `${state.rtt},${state.rate}`; });
}

// CSV

function csv() {
  const split = data.columns.priced.concat(data.columns.parts).filter((column) => column.source !== "mode");
  const names = split.flatMap(({ csv: name, numeric }) => (numeric ? [name, `${name}_low`, `${name}_high`] : [name]));
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const lines = shown().map((each) => {
    const cells = split.flatMap(({ source, numeric }) => {
      const text = textOf(each, source);
      return numeric ? [0, 1, 2].map((index) => numbers(text)[index] ?? "") : [text];
    });
    const reason = [...new Set(Object.values(each.reasons))].join("; ");
    return [state.model, state.phase, data.rtts[state.rtt], data.rates[state.rate], each.mode, each.local ? "measured" : "priced", each.window ?? (each.recorded > 1 ? each.recorded : ""), ...cells, reason];
  });
  const head = ["model", "phase", "rtt", "rate", "mode", "kind", "window", ...names, "reasons"];
  return [head, ...lines].map((line) => line.map((value) => quoted(String(value))).join(",")).join("\n") + "\n";
}

function download() {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  anchor.download = `semgap-${state.phase}-${data.rtts[state.rtt]}-${data.rates[state.rate]}.csv`;
  anchor.click();
  URL.revokeObjectURL(anchor.href);
}

// Start

function restore() {
  choose(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
  show();
}

at("about").textContent = Object.entries(data.about).map(([name, text]) => `${name} ${text}`).join(" · ");
if (data.views.length === 0) {
  for (const id of ["shown", "controls", "command", "csv"]) at(id).hidden = true;
  document.querySelector(".same").hidden = document.querySelector(".key").hidden = true;
  at("answer").textContent = data.words.join(" ");
  document.body.dataset.drawn = "nothing";
} else {
  for (const name of ["model", "phase", "window"]) at(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
  for (const [name, values] of [["rtt", data.rtts], ["rate", data.rates]]) {
    at(name).addEventListener("input", (event) => change({ [name]: values[Number(event.target.value)] }));
  }
  at("csv").addEventListener("click", download);
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", restore);
  dark.addEventListener("change", show);
  addEventListener("resize", show);
  restore();
}
