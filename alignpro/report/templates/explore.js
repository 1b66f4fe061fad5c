// --- what the controls ask for, what is drawn, and whether these are the same
const CHARTS = ["rewards", "frontier", "sweep", "bounds", "rewrites", "responses"], FIELDS = ["x", "k", "y", "seed"];
const isUpload = name => (name || "").startsWith("upload-"), isFile = name => name === "file" || isUpload(name);
const same = (a, b) => ["source", ...FIELDS].every(name => String(a[name] ?? "") === String(b[name] ?? ""));
const say = of => isFile(of.source) ? shorten(start.files[of.source] ?? of.source, 40) : `${of.source} ${of.x} × ${of.k} × ${of.y}, seed ${of.seed}`;
let source = {}, pending = null, since = 0, late = false, wrong = false;
function mark() { // old numbers are told from new ones, in sight
  const seconds = Math.round((performance.now() - since) / 1000);
  const words = pending ? `Computing ${say(pending)}${seconds > 1 ? `, ${seconds} s` : ""}…${now && !same(pending, source) ? ` Old numbers: of ${say(source)}` : ""}`
    : late ? `Computing… Old numbers: of β ${plain(now.beta)}, λ ${plain(now.lam)}` : wrong ? `Not computed${now ? `; the numbers are of ${say(source)}, β ${plain(now.beta)}, λ ${plain(now.lam)}` : ""}`
    : now && !same(chosen(), source) ? `Changed: press Show. The numbers are of ${say(source)}` : "";
  if ($("stale").textContent !== words) $("stale").textContent = words;
  $("stale").hidden = !words;
  $("results").classList.toggle("old", Boolean(pending || late || wrong));
}
setInterval(() => pending && mark(), 500);

// --- the address holds what is shown: it can be kept, sent on and gone back to
let control = null, when = 0;
function remember(by) {
  clearTimeout(noting);
  settle = null;
  // A step back undoes one control's turn, not each of its notches.
  const state = new URLSearchParams({ ...source, beta: $("beta").value, lam: $("lam").value, prompt: $("prompt").value || 0 });
  if ($("filter").value) state.set("find", $("filter").value);
  if (found.length && found[at] !== 0) state.set("at", found[at]);
  const hash = "#" + state, replace = by === null || (by === control && by !== "show" && performance.now() - when < 2000);
  [control, when] = [by, performance.now()];
  if (hash !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", location.pathname + location.search + hash);
}
function asked() { // what the address says, on top of what the command said
  const said = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return { ...start.start, prompt: 0, find: "", at: 0, ...said };
}
function put(of) { // the controls of the instance
  $("source").value = of.source;
  if ($("source").value !== of.source) { $("source").value = start.start.source; throw new Error(`source ${shorten(of.source, 40)}: is not here` + (isUpload(of.source) ? "; upload it again" : "; choose one of the list")); }
  for (const name of FIELDS) $(name).value = of[name] ?? start.start[name];
  describe();
}
async function restore() {
  clearTimeout(noting);
  settle = null;
  try {
    const of = asked();
    put(of);
    if ($("filter").value !== of.find || (found.length && String(found[at]) !== String(of.at))) { $("filter").value = of.find; find(of.at); }
    if (!same(chosen(), source)) return await take(chosen(), of);
    taking?.abort();
    taking = pending = null;
    for (const name of ["beta", "lam"]) set(name, of[name] ?? plain(about[name]));
    $("prompt").value = of.prompt;
    await move();
  } catch (error) { fail(error); }
}
addEventListener("popstate", restore);

// --- moving
let busy = false, again = false, telling, moved;
async function move(by) {
  moved ??= performance.now();
  again = true;
  clearTimeout(resting); // no sweep begins meanwhile
  if (by) settle = by;
  if (busy) return; // the newest position is asked for as soon as the answer under way is here
  busy = true;
  const slow = setTimeout(() => { late = Boolean(now); mark(); }, 250);
  while (again) {
    again = false;
    try {
      const of = source, solved = await api("solve", { ...of, beta: $("beta").value, lam: $("lam").value, prompt: $("prompt").value || 0 });
      if (of !== source) { again = true; continue; } // another instance has come since
      now = solved;
      wrong = false;
      fine();
      draw();
      performance.clearMeasures("move");
      performance.measure("move", { start: moved });
    } catch (error) { wrong = true; fail(error); }
  }
  clearTimeout(slow);
  busy = late = false;
  moved = undefined;
  mark();
  if (settle && !wrong) { clearTimeout(noting); noting = setTimeout(() => remember(settle), 250); } // not each notch: browsers allow few
  clearTimeout(telling); // a screen reader hears where one stopped, not every step
  telling = setTimeout(() => { if (now && $("error").hidden) $("said").textContent = `β ${plain(now.beta)}, λ ${plain(now.lam)}: gap ${num(now.gap)}; Theorem 1 ${now.bounds[0].verdict}, right side ${num(now.bounds[0].rhs)}${now.bounds[0].vacuous ? ", vacuous" : ""}.`; }, 700);
  rest();
}
let settle = null, noting;
function set(name, value) {
  $(name).value = value;
  if ($(name).value > 0) $(name + "-slider").value = Math.log10($(name).value);
  $(name + "-slider").setAttribute("aria-valuetext", $(name).value);
}
for (const name of ["beta", "lam"]) {
  const slider = $(name + "-slider"), box = $(name);
  slider.addEventListener("input", () => { box.value = plain(10 ** slider.value); slider.setAttribute("aria-valuetext", box.value); move(name); });
  box.addEventListener("input", () => { set(name, box.value); move(name); });
}
$("prompt").addEventListener("change", () => move("prompt"));

// --- the sweep: in parts, while the sliders rest, so that no move waits for it
let resting;
function rest() {
  clearTimeout(resting);
  if (now && !pending) resting = setTimeout(sweep, 350);
}
async function sweep() {
  if (busy || pending || wrong || !about) return; // `move` and `take` call again
  const of = source, beta = now.beta;
  if (swept && swept.of === of && swept.beta === beta && swept.next >= about.parts) return;
  let rows = [], part = 0;
  if (swept && swept.of === of && swept.beta === beta) [rows, part] = [swept.rows, swept.next];
  try {
    for (; part < about.parts; part++) {
      const some = (await api("sweep", { ...of, beta, part })).rows;
      if (of !== source || beta !== now.beta) return rest();
      rows = [...rows, ...some].sort((a, b) => a.lam - b.lam);
      swept = { of, beta, rows, next: part + 1, parts: about.parts, each: some.length };
      drawSweep();
      if (busy || pending) return;
    }
  } catch (error) { if (of === source && !pending) fail(error); }
}

// --- instances
let taking = null;
async function take(wanted, at = {}, by = null) {
  taking?.abort(); // the last asked for is the one that is shown
  const mine = taking = new AbortController();
  pending = wanted; since = performance.now();
  clearTimeout(noting);
  fine();
  mark();
  $("said").textContent = `Computing ${say(wanted)}…`;
  $("controls").setAttribute("aria-busy", "true");
  try {
    const got = await api("instance", wanted, { signal: mine.signal }), first = !about;
    if (mine !== taking) return;
    const alike = about && about.beta === got.beta;
    about = got; source = wanted; unit = about.beta * 10; swept = null;
    fine();
    for (const name of ["beta", "lam"]) {
      const slider = $(name + "-slider");
      slider.min = Math.log10(about.low); slider.max = Math.log10(about.high);
      const kept = at[name] === undefined && !first && alike && $(name).value > 0 ? $(name).value : plain(about[name]);
      set(name, at[name] || kept);
    }
    $("prompt").replaceChildren(...about.prompts.map((label, i) => h("option", { value: i }, `${i + 1}. ${shorten(label, 60)}, P = ${plain(about.p[i])}`)));
    $("prompt").value = at.prompt ?? 0;
    if (!$("prompt").value) $("prompt").value = 0;
    await move();
    if (mine === taking) remember(by);
  } catch (error) { if (mine === taking) fail(error); }
  if (mine !== taking) return;
  taking = pending = null;
  $("controls").removeAttribute("aria-busy");
  mark();
  rest();
}
function chosen() {
  const name = $("source").value;
  return isFile(name) ? { source: name } : { source: name, x: $("x").value, k: $("k").value, y: $("y").value, seed: $("seed").value };
}
function describe() {
  const name = $("source").value;
  $("sizes").hidden = isFile(name);
  $("about-source").textContent = name === "file" ? "The instance that the command named." : isUpload(name) ? "Your file, kept while the server runs." : start.families[name];
}
function sources() {
  const chosen = $("source").value;
  const option = ([value, label]) => h("option", { value }, label);
  $("source").replaceChildren(...Object.entries(start.files).map(([key, name]) => option([key, shorten(name, 40)])), ...Object.keys(start.families).map(name => option([name, "random: " + name])));
  if (chosen) $("source").value = chosen;
}
for (const name of ["source", ...FIELDS]) $(name).addEventListener("input", () => { describe(); mark(); });
$("controls").addEventListener("submit", event => { event.preventDefault(); take(chosen(), {}, "show"); });
$("reset").addEventListener("click", () => {
  put(start.start);
  take(chosen(), { beta: start.start.beta ?? "", lam: start.start.lam ?? "" }, "show");
});
$("upload").addEventListener("change", async () => {
  const [file] = $("upload").files;
  if (!file) return;
  try {
    if (file.size > 2 ** 26) throw new Error(`${shorten(file.name, 40)}: has ${file.size.toLocaleString("en")} bytes; keep it to ${(2 ** 26).toLocaleString("en")}`);
    $("said").textContent = "Sending " + shorten(file.name, 40);
    const { source: key, name } = await api("upload", { name: file.name }, { method: "POST", body: await file.arrayBuffer() });
    start.files[key] = name;
    sources();
    put({ source: key });
    await take(chosen(), {}, "show");
  } catch (error) { fail(error); }
  $("upload").value = ""; // the same file, mended, can be sent again
});
const telling_all = () => ({ command: commands()[0], source, ...now, about, sweep: swept && { beta: swept.beta, rows: swept.rows } });
$("save-data").addEventListener("click", () => now && save(called("numbers") + ".json", JSON.stringify(telling_all(), null, 1), "application/json"));
$("save-npz").addEventListener("click", async () => {
  try { if (now) save(called("instance").replace(/-beta.*-instance$/, "") + ".npz", await (await ask("npz", source)).blob()); } catch (error) { fail(error); }
});
$("save-command").addEventListener("click", () => now && save(called("commands") + ".sh", commands().join("\n") + "\n", "text/x-shellscript"));
$("copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(commands().join("\n")); $("said").textContent = $("copy").textContent = "Copied"; }
  catch { getSelection().selectAllChildren($("command")); $("said").textContent = "Selected; press Ctrl-C"; }
  setTimeout(() => $("copy").textContent = "Copy", 2000);
});

// --- rollouts
let found = [], at = 0;
function answers(draw) {
  const text = draw.rewrite === null ? h("p", { class: "quiet" }, "answers the prompt itself, without a rewrite") : h("blockquote", { class: "t" }, visible(draw.rewrite));
  return [text, h("ul", {}, ...draw.answers.map(a => h("li", {}, h("b", {}, minus(a.reward.toFixed(3))), " ", h("span", { class: a.text === null ? "quiet" : "t" }, a.text === null ? "refused" : visible(a.text)))))];
}
function card(arm) {
  const [first, ...rest] = arm.draws, out = [h("h3", { class: "t" }, visible(arm.arm))];
  if (!first) return h("div", { class: "card" }, ...out, h("p", { class: "quiet" }, "nothing for this prompt"));
  out.push(h("p", { class: "quiet t" }, `mean reward ${minus(arm.mean.toFixed(3))} over ${arm.answers} answer${arm.answers === 1 ? "" : "s"}; ${visible(arm.prompters.map(p => shorten(p, 60)).join(", "))}`), ...answers(first));
  if (rest.length) out.push(h("details", {}, h("summary", {}, `${rest.length} more rewrite${rest.length === 1 ? "" : "s"}`), ...rest.flatMap(answers)));
  return h("div", { class: "card" }, ...out);
}
async function read() {
  $("previous").disabled = at <= 0;
  $("next").disabled = at >= found.length - 1;
  $("place").textContent = found.length ? `${at + 1} of ${found.length}` : "no prompt has it";
  if (!found.length) { $("rollout-prompt").textContent = ""; $("arms").replaceChildren(); return; }
  const wanted = found[at], one = await api("rollout", { at: wanted });
  if (found[at] !== wanted) return; // someone has turned on since
  $("rollout-prompt").textContent = visible(one.x);
  $("arms").replaceChildren(...one.arms.map(card));
}
async function find(wanted) {
  try {
    const text = $("filter").value, positions = (await api("find", { text })).found;
    if (text !== $("filter").value) return; // or typed on
    found = positions;
    at = Math.max(0, found.indexOf(Number(wanted ?? 0)));
    await read();
    if (wanted === undefined) remember("find");
  } catch (error) { fail(error); }
}
const turn = by => () => { at = Math.min(Math.max(at + by, 0), found.length - 1); read().then(() => remember("turn")).catch(fail); };
$("previous").addEventListener("click", turn(-1));
$("next").addEventListener("click", turn(1));
let typing;
$("filter").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => find(), 200); });

async function begin() {
  try {
    start = await api("start", {});
    sources();
    for (const id of CHARTS) { readable(id); savable(id); }
    legends();
    const of = asked();
    let strange = null;
    try { put(of); } catch (error) { strange = error; put(start.start); }
    if (start.rollouts) {
      const r = start.rollouts;
      $("about-rollouts").textContent = visible(`${r.file}: ${r.prompts} prompts; frozen model ${r.frozen}; reward ${r.reward_model}, in [${r.range.join(", ")}]; ${r.sampling}`);
      $("reader").hidden = false;
      $("filter").value = of.find;
      find(of.at);
    }
    await take(chosen(), of);
    if (strange) fail(strange);
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  } catch (error) { fail(error); }
}
begin();
