// --- values of a chart, one by one: by pointer on the chart, by keyboard on the line below it
const values = {}, at_mark = {}; // per chart: its marks in its own coordinates; which of them is pointed at
function point(id, i = at_mark[id]) {
  const plot = $(id).querySelector(".plot"), strip = $(id).querySelector(".read"), all = values[id] || [];
  plot.querySelector(".tip")?.remove();
  plot.querySelectorAll("g.point").forEach(old => old.remove());
  at_mark[id] = i = i === undefined || !all.length ? undefined : Math.min(Math.max(i, 0), all.length - 1);
  if (!strip || !all.length) return;
  const one = all[i ?? 0];
  for (const [name, value] of [["valuemin", 1], ["valuemax", all.length], ["valuenow", (i ?? 0) + 1], ["valuetext", one.text]]) strip.setAttribute("aria-" + name, value);
  strip.textContent = i === undefined ? "Values: point at the chart, or use the arrow keys here." : one.text;
  if (i === undefined) return;
  const svg = plot.querySelector("svg"), W = svg.viewBox.baseVal.width, H = svg.viewBox.baseVal.height, g = s("g", { class: "point" });
  if (one.row) { const from = one.row < 40 ? one.y - one.row / 2 : one.y - 22; g.append(rect(0, from, W, one.row, { class: "cursor" })); svg.prepend(g); }
  else { g.append(line(one.x, 0, one.x, H - 40, "cursor"), s("circle", { cx: one.x, cy: one.y, r: 4, class: "cursor" })); svg.append(g); }
  const tip = h("div", { class: "tip", "aria-hidden": "true" }, one.text);
  plot.append(tip); // beside the mark, and inside the chart
  const below = one.y + 14 + tip.offsetHeight < H || one.y < tip.offsetHeight + 14;
  tip.style.left = Math.min(Math.max(one.x - tip.offsetWidth / 2, 0), Math.max(W - tip.offsetWidth, 0)) + "px";
  tip.style.top = (below ? one.y + (one.row ? one.row / 2 : 12) : one.y - tip.offsetHeight - (one.row ? one.row / 2 : 12)) + "px";
}
function readable(id) {
  const plot = $(id).querySelector(".plot"), strip = h("div", { class: "read", role: "slider", tabindex: 0, "aria-label": "Values, one by one: " + $("h-" + id).textContent });
  plot.after(strip);
  const nearest = event => {
    const box = plot.querySelector("svg").getBoundingClientRect(), all = values[id] || [];
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const far = m => m.row ? Math.abs(m.y - y) : Math.abs(m.x - x);
    if (all.length) point(id, all.reduce((best, m, i) => far(m) < far(all[best]) ? i : best, 0));
  };
  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse" && document.activeElement !== strip) { at_mark[id] = undefined; point(id); } });
  strip.addEventListener("focus", () => { if (strip.matches(":focus-visible")) point(id, at_mark[id] ?? 0); });
  strip.addEventListener("blur", () => { at_mark[id] = undefined; point(id); });
  strip.addEventListener("keydown", event => {
    const last = values[id].length - 1, i = at_mark[id] ?? -1, to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, PageDown: i + 10, PageUp: i - 10, Home: 0, End: last }[event.key];
    if (event.key === "Escape") { at_mark[id] = undefined; point(id); }
    if (to === undefined) return;
    event.preventDefault();
    point(id, Math.min(Math.max(to, 0), last));
  });
}

// --- what is taken away: numbers, figures, the instance, the commands
function save(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type })), a = h("a", { href: url, download: name });
  document.body.append(a);
  a.click();
  a.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
  $("said").textContent = "Saved " + name;
}
const called = what => ["alignpro", source.source === "file" || isUpload(source.source) ? shorten(start.files[source.source], 40).replace(/\.npz$/, "") : `${source.source}-${source.x}x${source.k}x${source.y}-seed${source.seed}`, `beta${plain(now.beta)}`, `lam${plain(now.lam)}`, what].join("-").replace(/[^\p{L}\p{N}._-]+/gu, "_");
const quoted = path => { path = visible(path).replace(/^-/, "./-"); return /^[\p{L}\p{N}._\/~+=:,@%-]+$/u.test(path) ? path : "'" + path.replaceAll("'", "'\\''") + "'"; };
function commands() {
  const at = `--beta ${now.beta} --lam ${now.lam}`, file = source.source === "file" ? start.path : isUpload(source.source) ? start.files[source.source] : null;
  if (file !== null) return [`alignpro explore ${quoted(file)} ${at}`, `alignpro solve ${quoted(file)} ${at} --bounds all`];
  return [`alignpro explore --family ${source.source} --shape ${source.x} ${source.k} ${source.y} --seed ${source.seed} ${at}`, "# the numbers, of the instance saved here:", `alignpro solve ${quoted(called("instance").replace(/-beta.*-instance$/, "") + ".npz")} ${at} --bounds all`];
}
const CELLS = { // full precision, as the server said it
  rewards: () => [["policy", "J"], ...Object.entries(now.rewards)],
  frontier: () => [["lam", "kl_nats", "reward"], ...about.frontier.lam.map((lam, i) => [lam, about.frontier.kl[i], about.frontier.reward[i]])],
  sweep: () => [["lam", "gap", "j_rho_star", "kl_nats", "theorem1", "barycentre", "ceiling"], ...(swept ? swept.rows : []).map(r => [r.lam, r.gap, r.star, r.kl, r.theorem1, r.barycentre, r.ceiling])],
  bounds: () => [["bound", "relation", "right_side", "slack", "verdict", "vacuous", "terms"], ...now.bounds.map(b => [b.name, b.relation, b.rhs, b.slack, b.verdict, b.vacuous, Object.entries(b.terms).map(([k, v]) => `${k} ${v}`).join("; ")])],
  rewrites: () => bars("rewrites", "rewrite", "rho_sft", "rho_star"),
  responses: () => bars("responses", "response", "pi_F", "pi_star"),
};
const bars = (id, what, first, second) => [[what, "reward", first, second, "x_itself"], ...now[id].rows.map(r => [r.label, r.reward, r.base, r.tilted, r.own]), ...(now[id].more.count ? [[`${now[id].more.count} more, summed`, null, now[id].more.base, now[id].more.tilted, false]] : [])];
// A stranger's text must not become a formula of the spreadsheet that opens it, which may part cells at another mark.
const cell = v => v === null || v === undefined ? "" : typeof v !== "string" ? String(v) : `"${visible(v).replace(/(^|[;,|\t\r\n])(\s*)(?=[=+\-@＝＋－＠])/g, "$1$2'").replace(/^[\t\r]/, "'$&").replaceAll('"', '""')}"`;
const csv = id => CELLS[id]().map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";
const flat = node => [...node.childNodes].map(n => n.tagName === "SUB" ? "_" + n.textContent : n.nodeType === 3 ? n.data : "").join("");
const DRAWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin", "paint-order", "font-size", "font-weight", "font-family"];
function figure(id) { // [the SVG as text, its width, its height], in the colours of a light page
  const plot = $(id).querySelector(".plot"), drawn = plot.querySelector("svg").cloneNode(true), W = drawn.viewBox.baseVal.width, H = drawn.viewBox.baseVal.height;
  drawn.querySelectorAll("g.point").forEach(g => g.remove());
  const legend = s("g", {}), light = h("div", { class: "light unseen" }, drawn);
  plot.append(light);
  let x = 0, y = H + 14;
  for (const item of $(id).querySelectorAll(".legend li")) {
    const label = flat(item), wide = 42 + 7 * label.length;
    if (x > 0 && x + wide > W) { x = 0; y += 20; }
    legend.append(s("g", { transform: `translate(${x} ${y})` }, ...item.querySelector("svg").cloneNode(true).childNodes, text(30, 10, sunk(label))));
    x += wide;
  }
  drawn.append(legend);
  const tall = legend.childNodes.length ? y + 20 : H;
  for (const node of drawn.querySelectorAll("text, tspan, line, rect, circle, path, polyline")) {
    const style = getComputedStyle(node);
    for (const name of DRAWN) node.setAttribute(name, style.getPropertyValue(name));
    node.removeAttribute("class");
  }
  const paper = getComputedStyle(light).getPropertyValue("--page"), title = flat($("h-" + id)), under = `${say(source)}, β = ${plain(now.beta)}, λ = ${plain(now.lam)}`;
  const ink = getComputedStyle(light).getPropertyValue("--ink"), font = getComputedStyle(document.body).fontFamily;
  light.remove();
  const pad = 16, head = 44, set = (y, size, weight, ...words) => s("text", { x: 0, y, fill: ink, "font-family": font, "font-size": size, "font-weight": weight }, ...words);
  const box = { width: W + 2 * pad, height: tall + 2 * pad + head }, at = { x: -pad, y: -pad - head };
  const whole = s("svg", { ...box, viewBox: `${at.x} ${at.y} ${box.width} ${box.height}`, role: "img" }, s("title", {}, `${title}; ${under}`), s("desc", {}, drawn.getAttribute("aria-label")),
    s("rect", { ...at, ...box, fill: paper }), set(-34, "13px", 600, ...sunk(title)), set(-16, "11.5px", 400, shorten(under, Math.floor(W / 6.2))), ...drawn.childNodes);
  return [new XMLSerializer().serializeToString(whole), box.width, box.height];
}
async function picture(id) {
  const [text, width, height] = figure(id), image = new Image(), canvas = h("canvas", { width: 2 * width, height: 2 * height });
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  await image.decode();
  canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}
function savable(id) {
  const title = $("h-" + id).textContent, button = (label, what, act) => { const b = h("button", { type: "button", "aria-label": `Save as ${label}: ${title}` }, label); b.addEventListener("click", () => now && Promise.resolve(act()).catch(fail)); return b; };
  $(id).querySelector("details").append(h("p", { class: "save" }, "Save: ",
    button("SVG", id, () => save(called(id) + ".svg", figure(id)[0], "image/svg+xml")),
    button("PNG", id, async () => save(called(id) + ".png", await picture(id))),
    button("CSV", id, () => save(called(id) + ".csv", csv(id), "text/csv"))));
}
