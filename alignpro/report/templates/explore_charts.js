"use strict";
// Text from files only ever becomes a text node. What cannot be seen, or would turn text around, is spelled out.
const visible = s => s.replace(/(?![\n\t])[\p{C}\p{Zl}\p{Zp}]/gu, c => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
function fill(node, attributes, children) {
  for (const [k, v] of Object.entries(attributes || {})) if (v !== null && v !== undefined) node.setAttribute(k, v);
  node.append(...children);
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const shorten = (text, n) => {
  text = visible(text).split(/\s+/).join(" ").trim();
  if (text.length <= n) return text;
  const tail = Math.floor((n - 1) * 2 / 5);
  return text.slice(0, n - 1 - tail).trimEnd() + "…" + text.slice(text.length - tail).trimStart();
};

// Told apart with every common colour blindness; hatching and labels say the same.
/* palette */
// A bound that at ρ* repeats another (or the gap) has no name here, and is not drawn.
const FORMS = { trained: null, trained_tight: null, kl_ceiling: null, theorem1: "Theorem 1", span: "span", tight: "tight", barycentre: "barycentre", combined: "combined", law: "laws of rewards", two_point: "two points", beta_tanh: "β, tanh", beta_only: "β only", kl_only: "KL only", induced: "induced", induced_law: "induced, laws", ceiling: "ceiling", drift: "drift", mirror: "mirror" };
const form = b => FORMS[b.name] ?? b.name;
const WAYS = { none: "no prompter", sft: "ρ_sft", star: "ρ*", best: "best prompter", rlhf: "π*, RLHF" };
const CURVES = [["gap", "gap", { stroke: GREEN, "stroke-width": 3 }], ["theorem1", "Theorem 1", { stroke: BLUE, "stroke-width": 2 }], ["barycentre", "barycentre", { stroke: PURPLE, "stroke-width": 2, "stroke-dasharray": "7 4" }], ["ceiling", "ceiling, from below", { stroke: ORANGE, "stroke-width": 2, "stroke-dasharray": "2 3" }]];
const PARTS = { model: SKY, prompt_shift: PURPLE };

let start, about, now, swept = null, unit = 1;
const minus = text => text.replaceAll("-", "−");
function num(v, digits = 3) { // reward units: `digits` decimals of the instance's own scale
  if (v === null) return "not finite";
  const places = digits - Math.floor(Math.log10(unit) + 1e-9);
  if (v !== 0 && places > digits + 3 && Math.abs(v) < 1000 * unit || Math.abs(v) >= 1e7) return minus(v.toExponential(digits - 1));
  const text = v.toFixed(Math.min(Math.max(0, places), 12));
  return /^-[0.]*$/.test(text) ? text.slice(1) : minus(text);
}
const nats = v => v === null ? "not finite" : v !== 0 && v < 0.001 ? minus(v.toExponential(1)) : v.toFixed(3);
const prob = v => v > 0 && v < 0.0005 ? minus(v.toExponential(0)) : v.toFixed(3);
const plain = v => String(Number(v.toPrecision(3)));
const token = new URLSearchParams(location.search).get("token") || "";

async function ask(route, parameters, more) {
  let reply;
  try { reply = await fetch("/api/" + route + "?" + new URLSearchParams(parameters), { ...more, headers: { Authorization: "token " + token } }); } catch (error) { throw error.name === "AbortError" ? error : new Error("The server does not answer; start alignpro explore again."); }
  if (!reply.ok) throw new Error((await reply.json()).error);
  return reply;
}
const api = async (route, parameters, more) => (await ask(route, parameters, more)).json();
function fail(error) {
  $("error").textContent = visible(error.message);
  $("error").hidden = false;
  for (const id of ["beta", "lam", "x", "k", "y", "seed"]) $(id).setAttribute("aria-invalid", error.message.startsWith(id + " "));
}
function fine() {
  if (!$("error").hidden) fail({ message: "" });
  $("error").hidden = true;
}

// --- charts: drawn at the width they have, again whenever that changes
function svg(id, height, label, ...children) {
  const plot = $(id).querySelector(".plot"), width = Math.max(plot.clientWidth, 240);
  plot.replaceChildren(s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...children));
  point(id);
}
const widthOf = id => Math.max($(id).querySelector(".plot").clientWidth, 240);
const line = (x1, y1, x2, y2, cls, more) => s("line", { x1, y1, x2, y2, class: cls, ...more });
const text = (x, y, t, cls, anchor) => s("text", { x, y, class: cls, "text-anchor": anchor }, ...Array.isArray(t) ? t : [t]);
// "ρ_sft" of our own labels with its subscript lowered; a text from a file never passes here.
const sunk = label => label.split(/_(sft|F)/).map((part, i) => i % 2 ? s("tspan", { dy: 3, "font-size": "80%" }, part) : i ? s("tspan", { dy: -3 }, part || "\u200b") : part);
const lowered = label => label.split(/_(sft|F)/).map((part, i) => i % 2 ? h("sub", {}, part) : part);
const rect = (x, y, width, height, more) => s("rect", { x, y, width: Math.max(width, 0), height, ...more });
let patterns = 0;
function hatch(colour, back) { // [its definition, how to refer to it]
  const id = "hatch" + patterns++;
  return [s("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, rect(0, 0, 5, 5, { fill: back }), rect(0, 0, 2, 5, { fill: colour })), `url(#${id})`];
}
function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough) || power, found = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return step > 0 && found.length < 50 ? [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))] : [[], 0];
}
const widest = (marks, places) => 7 * Math.max(...marks.map(v => tick(v, places).length), 3);
const tick = (v, places) => Math.abs(v) >= 1e7 || places > 6 ? minus(v.toExponential(1)) : minus(v.toFixed(places)).replace(/^−(0\.?0*)$/, "$1");
function table(id, head, rows) {
  $(id).querySelector("table").replaceChildren(
    h("thead", {}, h("tr", {}, ...head.map(c => h("th", { scope: "col" }, ...lowered(c))))),
    h("tbody", {}, ...rows.map(([first, ...rest]) => h("tr", {}, h("th", { scope: "row", class: "t" }, ...Array.isArray(first) ? first : [visible(first)]), ...rest.map(c => h("td", {}, c))))));
}
const padded = ([low, high]) => { const pad = 0.06 * (high - low) || 0.5 * unit; return [low - pad, high + pad]; };

function drawRewards() {
  const W = widthOf("rewards"), left = 98, right = W - 12, row = 30, top = 8, names = Object.keys(WAYS), r = now.rewards;
  const [low, high] = padded(about.axis), at = v => left + (v - low) / (high - low) * (right - left), H = top + names.length * row + 26;
  const few = Math.floor((right - left) / (widest(...ticks(low, high, 5)) + 14)), out = [], [marks, places] = ticks(low, high, Math.max(1, Math.min(few, 7))), base = top + names.length * row;
  for (const v of marks) out.push(line(at(v), top, at(v), base, "grid"), text(at(v), base + 16, tick(v, places), "q s", "middle"));
  out.push(line(at(r.rlhf), top, at(r.rlhf), base, "ink", { "stroke-dasharray": "4 3" }));
  names.forEach((name, i) => {
    const y = top + (i + .5) * row, v = r[name], x = at(v), colour = { sft: ORANGE, star: GREEN }[name];
    out.push(text(0, y + 4, sunk(WAYS[name])));
    if (name === "star") {
      out.push(line(x, y, at(r.rlhf), y, "", { stroke: GREEN, "stroke-width": 4, "stroke-opacity": .5 }));
      if (Math.abs(at(r.rlhf) - x) > 110) out.push(text((x + at(r.rlhf)) / 2, y - 5, "gap " + num(now.gap), "s halo", "middle"));
    }
    out.push(name === "best" ? s("path", { d: `M${x - 6} ${y + 5}h12l-6 -11z`, class: "solid" }) : name === "rlhf" ? rect(x - 5, y - 5, 10, 10, { class: "solid" }) : s("circle", { cx: x, cy: y, r: 5.5, ...(colour ? { fill: colour } : { class: "hollow" }) }));
    const before = name === "star" ? v <= r.rlhf : x > (left + right) / 2; // away from the line of the gap
    const fits = before ? x - left > 56 : right - x > 56;
    out.push(text(before === fits ? x - 11 : x + 11, y + 4, num(v), "halo", before === fits ? "end" : "start"));
  });
  values.rewards = names.map((name, i) => ({ x: at(r[name]), y: top + (i + .5) * row, row, text: `${WAYS[name]}: J = ${num(r[name], 5)}, ${num(r.rlhf - r[name], 5)} below π*` }));
  svg("rewards", H, "Expected rewards: " + names.map(n => `${WAYS[n]} ${num(r[n])}`).join(", ") + `. Gap ${num(now.gap)}.`, ...out);
  table("rewards", ["policy", "J", "J(π*) − J"], names.map(n => [lowered(WAYS[n]), num(r[n], 5), num(r.rlhf === null || r[n] === null ? null : r.rlhf - r[n], 5)]));
}

function drawFrontier() {
  const W = widthOf("frontier"), H = 224, [low, high] = padded(about.axis), [ys, py] = ticks(low, high, 6), left = 10 + widest(ys, py), right = W - 12, top = 10, base = H - 40, f = about.frontier;
  const far = Math.max(...f.kl, 1e-9) * 1.06;
  const x = v => left + v / far * (right - left), y = v => base - (v - low) / (high - low) * (base - top);
  const out = [], [xs, px] = ticks(0, far, W < 420 ? 4 : 6), kl = now.kl, j = now.rewards.star;
  for (const v of ys) out.push(line(left, y(v), right, y(v), "grid"), text(left - 6, y(v) + 4, tick(v, py), "q s", "end"));
  for (const v of xs) out.push(text(x(v), base + 16, tick(v, px), "q s", "middle"));
  out.push(line(left, base, right, base, "axis"), text((left + right) / 2, H - 6, sunk("E KL(ρ‖ρ_sft), nats"), "q s", "middle"));
  const star = now.rewards.rlhf, above = y(star) > top + 18;
  out.push(line(left, y(star), right, y(star), "ink", { "stroke-dasharray": "4 3" }), text(right, y(star) + (above ? -5 : 14), "J(π*) " + num(star), "s halo", "end"));
  const none = now.rewards.none;
  out.push(line(left, y(none), right, y(none), "quietline", { "stroke-dasharray": "1 4" }), text(right - (Math.abs(y(none) - y(star)) < 18 ? 150 : 0), y(none) - 4, "no prompter", "q s halo", "end"));
  out.push(s("polyline", { points: f.kl.map((k, i) => `${x(k)},${y(f.reward[i])}`).join(" "), fill: "none", stroke: GREEN, "stroke-width": 2.5 }));
  // The tangent, of slope λ, some 50 px each way.
  const dx = 1 / (right - left) * far, dy = now.lam * dx, steep = Math.hypot(1, dy / (high - low) * (base - top)), reach = 46 / steep;
  const px0 = x(kl), py0 = y(j), back = Math.min(reach, px0 - left), on = Math.min(reach, right - px0);
  out.push(line(px0 - back, y(j - back * dy), px0 + on, y(j + on * dy), "ink", { "stroke-width": 1.2 }));
  out.push(s("circle", { cx: x(0), cy: y(now.rewards.sft), r: 5.5, fill: ORANGE }), text(x(0) + 11, y(now.rewards.sft) + 4, sunk("ρ_sft"), "s halo"));
  out.push(s("path", { d: `M${px0} ${py0 - 8}l8 8l-8 8l-8 -8z`, fill: GREEN, class: "hollow" }));
  const leftward = px0 > right - 110;
  out.push(text(px0 + (leftward ? -12 : 12), py0 + 17, `ρ* ${num(j)}`, "b halo", leftward ? "end" : "start"));
  const along = f.kl.map((k, i) => ({ x: x(k), y: y(f.reward[i]), text: `λ = ${plain(f.lam[i])}: KL ${nats(k)} nats, J(ρ*) = ${num(f.reward[i], 5)}` })).reverse();
  values.frontier = [{ x: px0, y: py0, text: `this λ = ${plain(now.lam)}: KL ${nats(kl)} nats, J(ρ*) = ${num(j, 5)}` }, ...along];
  svg("frontier", H, `Frontier: at KL 0 the reward is ${num(now.rewards.sft)}; at this λ ρ* has KL ${nats(kl)} nats and reward ${num(j)}; the best prompter has ${num(now.rewards.best)}. J(π*) is ${num(star)}.`, ...out);
  const every = f.lam.map((l, i) => [plain(l), nats(f.kl[i]), num(f.reward[i], 5)]).filter((_, i) => i % 10 === 0);
  table("frontier", ["λ", "KL, nats", "J(ρ*)"], [["this λ: " + plain(now.lam), nats(kl), num(j, 5)], ...every]);
}

function drawSweep() {
  const W = widthOf("sweep"), H = 250, top = 12, base = H - 42, rows = swept ? swept.rows : [], u = now.span || unit;
  const all = rows.flatMap(r => [r.gap, r.theorem1, r.barycentre, r.ceiling]).filter(v => v !== null);
  const [low, high] = padded([Math.max(Math.min(0, now.gap, ...all), -u), Math.min(Math.max(now.gap, ...all), 2.25 * u)]), [ys, py] = ticks(low, high, 6), left = 10 + widest(ys, py), right = W - 12;
  const [from, to] = [Math.log10(about.low), Math.log10(about.high)], x = lam => left + (Math.log10(lam) - from) / (to - from) * (right - left), y = v => base - (v - low) / (high - low) * (base - top);
  const out = [s("defs", {}, s("clipPath", { id: "inside" }, rect(left, top - 2, right - left, base - top + 4)))];
  for (const v of ys) out.push(line(left, y(v), right, y(v), "grid"), text(left - 6, y(v) + 4, tick(v, py), "q s", "end"));
  for (let e = Math.ceil(from - 1e-9); e <= to + 1e-9; e++) out.push(line(x(10 ** e), base, x(10 ** e), base + 4, "axis"), text(x(10 ** e), base + 17, plain(10 ** e), "q s", "middle"));
  out.push(line(left, base, right, base, "axis"), text((left + right) / 2, H - 6, "λ, reward units, logarithmic", "q s", "middle"));
  if (u < high) out.push(line(left, y(u), right, y(u), "quietline", { "stroke-dasharray": "5 4" }), text(right, y(u) - 5, "span: vacuous from here", "q s halo", "end"));
  for (const [name, , attributes] of CURVES) {
    const points = rows.filter(r => r[name] !== null).map(r => `${x(r.lam)},${y(r[name])}`).join(" ");
    out.push(s("polyline", { points, fill: "none", "clip-path": "url(#inside)", ...attributes }));
  }
  const here = Math.min(Math.max(x(now.lam), left), right), rightward = here > right - 130;
  out.push(line(here, top, here, base, "ink", { "stroke-dasharray": "2 3" }), s("path", { d: `M${here} ${y(now.gap) - 7}l7 7l-7 7l-7 -7z`, fill: GREEN, class: "hollow" }), text(here + (rightward ? -11 : 11), y(now.gap) - 8, "gap " + num(now.gap), "b halo", rightward ? "end" : "start"));
  const tell = r => `gap ${num(r.gap, 4)}, J(ρ*) ${num(r.star, 4)}, KL ${nats(r.kl)} nats; ` + CURVES.slice(1).map(([name, label]) => `${label} ${num(r[name], 4)}`).join(", ");
  values.sweep = rows.map(r => ({ x: x(r.lam), y: Math.min(Math.max(y(r.gap), top), base), text: `λ = ${plain(r.lam)}: ${tell(r)}` }));
  const least = rows.length ? rows.reduce((a, b) => b.gap < a.gap ? b : a) : null;
  svg("sweep", H, (least ? `Over λ from ${plain(rows[0].lam)} to ${plain(rows.at(-1).lam)} the gap goes from ${num(rows[0].gap)} to ${num(rows.at(-1).gap)}, Theorem 1’s right side from ${num(rows[0].theorem1)} to ${num(rows.at(-1).theorem1)}. ` : "The sweep is being computed. ") + `At this λ, ${plain(now.lam)}, the gap is ${num(now.gap)}.`, ...out);
  const old = swept && swept.beta !== now.beta, part = swept && rows.length < swept.parts * swept.each;
  $("sweep").classList.toggle("old", Boolean(old));
  $("about-sweep").textContent = !swept ? "Computing…" : old ? `Old curves: of β = ${plain(swept.beta)}; those of this β follow when the sliders rest.` : part ? `Computing: ${rows.length} of ${swept.parts * swept.each} values of λ.` : `${rows.length} values of λ. The lowest gap among them is ${num(least.gap)}, at λ = ${plain(least.lam)}.`;
  table("sweep", ["λ", "gap", "J(ρ*)", "KL, nats", ...CURVES.slice(1).map(([, label]) => label)], rows.map(r => [plain(r.lam), num(r.gap, 5), num(r.star, 5), nats(r.kl), ...CURVES.slice(1).map(([name]) => num(r[name], 5))]));
}

function drawBounds() {
  const W = widthOf("bounds"), narrow = W < 560, left = narrow ? 0 : 134, right = W - (narrow ? 8 : 150), row = narrow ? 46 : 27, top = 30, list = now.bounds.filter(b => FORMS[b.name] !== null);
  const terms = b => Object.entries(b.terms).map(([k, v]) => `${v < 0 ? "− " : "+ "}${num(v === null ? v : Math.abs(v), 4)} ${k.replace("_", " ")}`).join(" ");
  const u = now.span || unit, ends = [], parts = [];
  for (const b of list) {
    const terms = Object.entries(b.terms);
    parts.push(terms);
    ends.push(b.rhs, terms.reduce((sum, [, v]) => sum + Math.max(v, 0), 0));
  }
  // Only so far: one right side far outside must not flatten the rest.
  const low = Math.max(-u, Math.floor(Math.min(0, now.gap, ...ends) / u * 4) * u / 4), high = Math.min(2.25 * u, Math.ceil(Math.max(u, now.gap, ...ends) / u * 4 + .01) * u / 4);
  const inside = v => Math.min(Math.max(v, low), high), at = v => left + (inside(v) - low) / (high - low) * (right - left);
  const H = top + list.length * row + 24, base = top + list.length * row + 2, [marks, places] = ticks(low, high, W < 420 ? 4 : 8);
  const [pattern, hatched] = hatch(INK, PAPER), out = [s("defs", {}, pattern)], notes = []; // notes: over the lines
  for (const v of marks) out.push(line(at(v), top, at(v), base, "grid"), text(at(v), base + 16, tick(v, places), "q s", "middle"));
  out.push(line(at(0), top, at(0), base, "axis"));
  const said = [];
  list.forEach((b, i) => {
    const y = top + i * row + (narrow ? 20 : 4), tall = 17, lower = b.relation === ">=";
    const verdict = b.verdict !== "holds" ? b.verdict : b.vacuous ? "vacuous" : "";
    if (lower && list[i - 1].relation !== ">=") out.push(line(0, y - (narrow ? 16 : 4), W, y - (narrow ? 16 : 4), "grid"));
    notes.push(text(0, narrow ? y - 4 : y + 13, form(b) + (lower ? ", from below" : ""), b.name === "theorem1" ? "b halo" : "halo"));
    let to = 0;
    for (const [name, v] of parts[i]) if (v > 0) {
      out.push(rect(at(to), y, at(to + v) - at(to), tall, { fill: PARTS[name] || (name === "policies" || lower ? GREEN : SKY), stroke: INK, "stroke-width": .5 }));
      to += v;
    }
    for (const [, v] of parts[i]) if (v < 0) {
      out.push(rect(at(to + v), y + tall / 2, at(to) - at(to + v), tall / 2, { fill: hatched, stroke: INK, "stroke-width": .8 }));
      to += v;
    }
    const beyond = b.rhs > high ? " ▸" : b.rhs < low ? " ◂" : "";
    if (b.rhs !== null) out.push(line(at(b.rhs), y - 2, at(b.rhs), y + tall + 2, "ink", { "stroke-width": 3.5 }));
    const value = b.rhs === null ? "" : (lower ? "≥ " : "≤ ") + num(b.rhs) + beyond, words = verdict ? [value + " ", s("tspan", { class: "v" }, verdict)] : value;
    notes.push(narrow ? text(W, y - 4, words, "halo", "end") : text(right + 8, y + 13, words));
    said.push(`${form(b)}: gap ${lower ? "at least" : "at most"} ${num(b.rhs)}${verdict ? ", " + verdict : ""}`);
  });
  const g = at(now.gap), v = at(u), swap = v - g < 150 && v - g > -150;
  out.push(line(g, top - 6, g, base, "", { stroke: GREEN, "stroke-width": 2 }), line(v, top - 6, v, base, "ink", { "stroke-dasharray": "5 4" }));
  out.push(text(Math.min(Math.max(g, 40), W - 40), swap ? top - 20 : top - 10, "gap " + num(now.gap), "b halo", "middle"));
  out.push(text(Math.min(Math.max(v, 92), W - 92), top - (swap ? 8 : 10), `span ${num(u)}: vacuous from here`, "s halo", "middle"), ...notes);
  values.bounds = list.map((b, i) => ({ x: at(b.rhs ?? 0), y: top + i * row + (narrow ? 28 : 12), row, text: `${form(b)}: gap ${num(now.gap, 4)} ${b.relation === ">=" ? "≥" : "≤"} ${num(b.rhs, 5)}${b.vacuous ? ", vacuous" : ""}, ${b.verdict}; ${terms(b) || "no terms"}` }));
  svg("bounds", H, `The gap is ${num(now.gap)}. ${said.join("; ")}.`, ...out);
  table("bounds", ["bound", "terms", "right side", "slack", "gap / right side", "verdict", "vacuous"], list.map(b => [form(b) + (b.relation === ">=" ? ", from below" : ""), terms(b), num(b.rhs, 5), num(b.slack, 5), b.relation === "<=" && b.rhs > 0 && now.gap > 0 ? (100 * now.gap / b.rhs).toFixed(1) + "%" : "–", b.verdict, b.vacuous ? "yes" : "no"]));
  const i = now.identity, e = v => v === null ? " + not finite" : v < 0 ? " − " + num(-v, 4) : " + " + num(v, 4);
  $("identity").replaceChildren(...lowered(`Exactly: gap ${num(now.gap, 4)} = β Jeff(π*, π_F) ${num(i.model, 4)}${e(i.shift)} (R of the prompt itself less ρ_sft’s mean R)${e(-i.prompter)} (λ Jeff(ρ*, ρ_sft)). Theorem 1 has r_max = ${num(now.r_max, 4)}; the other forms have each prompt’s own span.`));
}

function drawBars(id, first, second, colour, what) {
  const bars = now[id], rows = [...bars.rows], W = widthOf(id), left = 0, right = W - 52;
  if (bars.more.count) rows.push({ label: null, ...bars.more });
  const row = 52, H = rows.length * row + 6, [pattern, hatched] = hatch(ORANGE, PAPER), out = [s("defs", {}, pattern)];
  const at = v => left + v * (right - left), name = r => r.label === null ? `${r.count} more, summed` : r.label;
  rows.forEach((r, i) => {
    const y = i * row, value = r.label === null ? "" : `${what} ${num(r.reward)}`, room = Math.floor((W - 8 * value.length - 8) / (r.own ? 7.9 : 6.9)) - (r.own ? 11 : 0);
    out.push(text(0, y + 14, shorten(name(r), room) + (r.own ? " (x itself)" : ""), r.own ? "b" : ""), text(W, y + 14, value, "q", "end"));
    out.push(rect(left, y + 20, Math.max(at(r.base) - left, 1), 10, { fill: hatched, stroke: ORANGE }), rect(left, y + 33, Math.max(at(r.tilted) - left, 1), 10, { fill: colour }));
    out.push(text(at(r.base) + 6, y + 29, prob(r.base), "q s"), text(at(r.tilted) + 6, y + 42, prob(r.tilted), "s b"));
  });
  values[id] = rows.map((r, i) => ({ x: at(r.tilted), y: i * row + 24, row, text: `${shorten(name(r), 200)}${r.own ? " (x itself)" : ""}: ${first} ${prob(r.base)} → ${second} ${prob(r.tilted)}${r.label === null ? "" : `, ${what} = ${num(r.reward, 4)}`}` }));
  const said = rows.map(r => `${shorten(name(r), 60)}: ${first} ${prob(r.base)}, ${second} ${prob(r.tilted)}`);
  svg(id, H, `Probabilities, highest reward first. ${said.join("; ")}.`, ...out);
  table(id, [id === "rewrites" ? "rewrite" : "response", what, first, second], rows.map(r => [name(r) + (r.own ? " (x itself)" : ""), r.label === null ? "–" : num(r.reward, 4), prob(r.base), prob(r.tilted)]));
}

function legends() {
  const swatch = (attributes, pattern) => s("svg", { viewBox: "0 0 24 12", "aria-hidden": "true" }, ...(pattern ? [s("defs", {}, pattern)] : []), rect(0, 1, 24, 10, attributes));
  const item = (label, attributes, pattern) => h("li", {}, swatch(attributes, pattern), ...lowered(label));
  const bars = (id, first, second, colour) => { const [p, fillWith] = hatch(ORANGE, PAPER); $(id).querySelector(".legend").replaceChildren(item(first + ", above", { fill: fillWith, stroke: ORANGE }, p), item(second + ", below it", { fill: colour })); };
  bars("rewrites", "ρ_sft", "ρ* at this λ", GREEN);
  bars("responses", "π_F(·|x)", "π* at this β", BLUE);
  const [p, fillWith] = hatch(INK, PAPER);
  $("legend-sweep").replaceChildren(...CURVES.map(([, label, attributes]) => h("li", {}, s("svg", { viewBox: "0 0 24 12", "aria-hidden": "true" }, s("line", { x1: 0, y1: 6, x2: 24, y2: 6, ...attributes })), label)));
  $("legend-bounds").replaceChildren(item("model: TV(π*, π_F), or a bound on it", { fill: SKY }), item("+ prompt shift: TV(π_F(x), π_F(x′))", { fill: PURPLE }), item("one other term", { fill: GREEN }), item("what is subtracted", { fill: fillWith, stroke: INK }, p), h("li", {}, s("svg", { viewBox: "0 0 24 12", "aria-hidden": "true" }, line(12, 0, 12, 12, "ink", { "stroke-width": 4 })), "right side"));
}

function draw() {
  if (!now) return;
  patterns = 100;
  const theorem = now.bounds[0], keys = [
    ["key-gap", num(now.gap), now.gap < 0 ? "ρ* outperforms π*" : `of a span of ${num(now.span)}`],
    ["key-theorem", theorem.verdict, `right side ${num(theorem.rhs)}${theorem.vacuous ? ", vacuous" : ""}`],
    ["key-ceiling", num(now.ceiling.supported), (now.ceiling.supported > 0 ? "out of prompting’s reach" : "some prompter matches π*") + (now.ceiling.anywhere < now.ceiling.supported ? `; ${num(now.ceiling.anywhere)} over all K rewrites` : "")],
    ["key-kl", nats(now.kl), `nats; KL(π*‖π_F) ${nats(now.model_kl)}`]];
  for (const [id, value, note] of keys) $(id).replaceChildren(value, h("small", {}, ...lowered(note)));
  $("key-theorem").className = ["holds", "violated"].includes(theorem.verdict) ? theorem.verdict : "";
  $("glance").replaceChildren(`gap ${num(now.gap)}; Theorem 1: ≤ ${num(theorem.rhs)}${theorem.vacuous ? ", vacuous" : ""}`);
  drawRewards(); drawFrontier(); drawSweep(); drawBounds();
  drawBars("rewrites", "ρ_sft", "ρ*", GREEN, "R");
  drawBars("responses", "π_F", "π*", BLUE, "r");
  $("command").textContent = commands().join("\n");
  document.documentElement.dataset.shown = `${now.beta} ${now.lam} ${now.prompt}`;
}

