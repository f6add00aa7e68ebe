
// ---- The page of `assort view` ----

// Pictures of a cluster that are fetched at once.
const PAGE = 120;

async function get(path, options) {
  const answer = await fetch(path, options).catch(() => {
    throw new Error("The server has ended. Start `assort view` again and open the address that it prints.");
  });
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
  return answer;
}

function showError(error) {
  byId("trouble").hidden = false;
  byId("trouble-text").textContent = error.message;
}

async function readAssignment() {
  const buffer = await (await get("assignment")).arrayBuffer(), count = served.pictures;
  clusterOf = new Uint32Array(buffer, 0, count);
  confidence = new Uint8Array(buffer, 4 * count, count);
}

async function readServer() {
  const map = served.mapped ? get("map/" + served.set) : null;
  const classes = data.classes ? get("classes/" + served.set) : null;
  await readAssignment();
  if (classes) classOf = new Uint32Array(await (await classes).arrayBuffer());
  if (map) {
    const buffer = await (await map).arrayBuffer(), count = served.mapped;
    analysed = new Uint32Array(buffer, 0, count);
    mapX = new Uint16Array(buffer, 4 * count, count);
    mapY = new Uint16Array(buffer, 6 * count, count);
  }
}

async function fetchPicture(place) {
  const about = await (await get("picture/" + place)).json();
  names.set(place, about.name);
  about.near.forEach(([other, name]) => names.set(other, name));
  return { ...about, near: about.near.map(([other]) => other) };
}

// Asks for the name of a picture once the pointer rests on it.
let still = null;
function whenStill(place, then) {
  clearTimeout(still);
  still = setTimeout(() => fetchPicture(place).then(then, showError), 60);
}

// At the end of each figure is an element that asks for the next pictures when it comes into view.
const ends = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) fill(entry.target);
}, { rootMargin: "500px" });

function watch(parent) {
  for (const figure of parent.querySelectorAll("figure[data-cluster]")) {
    if (figure.querySelector(".more")) continue;
    const end = element("span", "", figure);
    end.className = "more";
    end.dataset.next = figure.dataset.from;
    reserve(figure, end);
    ends.observe(end);
  }
}

// The place that the next pictures will take, so that the page does not jump when they come.
function reserve(figure, end) {
  const count = Math.min(PAGE, figure.dataset.to - end.dataset.next);
  const across = Math.max(1, Math.floor((figure.clientWidth || 1100) / 84));
  end.style.height = Math.ceil(count / across) * 84 + "px";
}

async function fill(end) {
  const figure = end.parentElement, from = Number(end.dataset.next);
  const last = Number(figure.dataset.to), to = Math.min(last, from + PAGE);
  ends.unobserve(end);
  try {
    const found = await (await get(`members/${figure.dataset.cluster}/${from}/${to}`)).json();
    const made = document.createDocumentFragment();
    for (const [place, name, score] of found) {
      names.set(place, name);
      const own = element("a", "", made);
      own.className = "p";
      own.id = "i" + place;
      own.href = "#i" + place;
      own.classList.toggle("selected", selected.has(place));
      image({ ...thumbnailOf(place), title: `${name}, score ${score}` }, own);
    }
    end.before(made);
    end.dataset.next = to;
    reserve(figure, end);
    if (to < last) ends.observe(end);
    else end.remove();
  } catch (error) {
    showError(error);
  }
}

// ---- Corrections ----

const selected = new Set();
let anchor = null, isSelecting = false, isBusy = false;

// The sections of clusters as the server sent them, so that an edit replaces those that it changes and no other.
const sent = new Map();
const remember = parent => parent.querySelectorAll("main section[id]").forEach(own => sent.set(own.id, own.outerHTML));

const isMark = number => number >= served.found;
const title = number => data.titles[data.clusters.indexOf(number)];

function fillChoice(choice, but) {
  choice.replaceChildren();
  data.clusters.forEach((number, k) => {
    if (!isMark(number) && number !== but) element("option", data.titles[k], choice).value = number;
  });
}

function showState(text) {
  byId("selected-count").textContent = selected.size ? `${selected.size} selected` : "";
  byId("with-selected").hidden = !selected.size;
  byId("undo").disabled = !served.undo;
  byId("saved").textContent = text || (served.corrected ? "All corrections are saved" : "No corrections yet");
  for (const own of document.querySelectorAll("a.p, a.ref")) {
    own.classList.toggle("selected", selected.has(Number(own.hash.slice(2))));
  }
  showSelected();
}

// Whether the picture in the view is selected.
function showSelected() {
  byId("view-select").setAttribute("aria-pressed", selected.has(viewed));
}

function toggle(place) {
  if (!selected.delete(place)) selected.add(place);
  anchor = place;
  showState();
}

// Selects from the picture that was touched last to this one, where both are in one section.
function extend(place) {
  const section = link(place) && link(place).closest("section.cluster");
  const all = section ? Array.from(section.querySelectorAll("a.p"), own => Number(own.id.slice(1))) : [];
  const [from, to] = [all.indexOf(anchor), all.indexOf(place)].sort((a, b) => a - b);
  if (from < 0) return toggle(place);
  all.slice(from, to + 1).forEach(other => selected.add(other));
  anchor = place;
  showState();
}

document.addEventListener("click", event => {
  const target = event.target.closest("a.p, a.ref");
  if (!target || !(isSelecting || event.ctrlKey || event.metaKey || event.shiftKey)) return;
  event.preventDefault();
  event.stopPropagation();
  const place = Number(target.hash.slice(2));
  if (event.shiftKey) extend(place);
  else toggle(place);
}, true);

document.addEventListener("keydown", event => {
  const isTyping = event.target.closest("input, select, textarea");
  const target = event.target.closest("a.p, a.ref");
  if (event.key === " " && target) {
    const place = Number(target.hash.slice(2));
    if (event.shiftKey) extend(place);
    else toggle(place);
  } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !isTyping) {
    if (served.undo) edit("undo");
  } else if (event.key === "Escape" && selected.size && !document.querySelector("dialog[open]")) {
    selected.clear();
    showState();
  } else return;
  event.preventDefault();
});

async function edit(change) {
  if (isBusy) return;
  isBusy = true;
  byId("trouble").hidden = true;
  byId("saved").textContent = "Saving…";
  try {
    const body = JSON.stringify({ revision: served.revision, edit: change });
    const answer = await get("edit", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    await answer.text();
    selected.clear();
    await refresh();
  } catch (error) {
    if (error.status === 409) await refresh().catch(() => {});
    showError(error);
    showState("Not saved");
  } finally {
    isBusy = false;
  }
}

// Fetches the page and replaces what has changed.
async function refresh() {
  const fresh = new DOMParser().parseFromString(await (await get("./")).text(), "text/html");
  data = JSON.parse(fresh.getElementById("data").textContent);
  Object.assign(served, data.served);
  await readAssignment();
  const top = Array.from(document.querySelectorAll("section.cluster")).find(own => own.getBoundingClientRect().bottom > 0);
  const before = top && top.getBoundingClientRect().top;
  byId("clusters").replaceChildren(...Array.from(fresh.getElementById("clusters").childNodes, replaced));
  for (const id of ["duplicates", "outliers", "disagreements"]) {
    const [own, other] = [byId(id), fresh.getElementById(id)];
    if (own && other && sent.get(id) !== other.outerHTML) own.replaceWith(replaced(other));
  }
  document.querySelector("header").replaceWith(fresh.querySelector("header"));
  const moved = top && byId(top.id);
  if (moved) scrollBy({ top: moved.getBoundingClientRect().top - before, behavior: "instant" });
  if (plot) plot.refresh();
  showState();
}

// What is on the page already, where nothing has changed; else the new element.
function replaced(fresh) {
  const own = fresh.id && byId(fresh.id);
  if (own && sent.get(fresh.id) === fresh.outerHTML) return own;
  if (fresh.id) sent.set(fresh.id, fresh.outerHTML);
  const made = document.importNode(fresh, true);
  if (made.nodeType !== Node.ELEMENT_NODE) return made;
  const details = [own, made].map(section => section && section.querySelector("details"));
  if (details[0] && details[1]) details[1].open = details[0].open;
  fillLists(made);
  watch(made);
  decorate(made);
  return made;
}

// Adds the buttons of a cluster.
function decorate(parent) {
  const sections = parent.matches && parent.matches("section.cluster") ? [parent] : parent.querySelectorAll("section.cluster");
  for (const section of sections) {
    const number = Number(section.id.slice(1));
    if (isMark(number)) continue;
    const tools = element("div", "");
    tools.className = "tools";
    const button = (text, then) => {
      const made = element("button", text, tools);
      made.type = "button";
      made.setAttribute("aria-label", `${text} ${title(number)}`);
      made.onclick = then;
    };
    button("Rename", () => askName(number));
    button("Merge", () => askPartner(number));
    if (served.merged.includes(number)) button("Split again", () => edit({ unmerge: { cluster: number } }));
    section.querySelector("h3").after(tools);
  }
}

let asked = null;

function askName(number) {
  asked = number;
  byId("rename-title").textContent = `Name of cluster ${number}`;
  byId("rename-name").value = served.names[data.clusters.indexOf(number)] || "";
  byId("rename").showModal();
}

function askPartner(number) {
  asked = number;
  byId("merge-title").textContent = `Merge “${title(number)}” with`;
  fillChoice(byId("merge-with"), number);
  byId("merge").showModal();
}

function rename() {
  const name = byId("rename-name").value.trim();
  byId("rename").close();
  edit({ rename: { cluster: asked, name: name || null } });
}

byId("rename-save").onclick = rename;
byId("rename-name").onkeydown = event => event.key === "Enter" && rename();
byId("rename-cancel").onclick = () => byId("rename").close();
byId("merge-save").onclick = () => {
  const other = Number(byId("merge-with").value);
  byId("merge").close();
  edit({ merge: { clusters: [asked, other] } });
};
byId("merge-cancel").onclick = () => byId("merge").close();
byId("select").onclick = event => {
  isSelecting = !isSelecting;
  event.currentTarget.setAttribute("aria-pressed", isSelecting);
};
function addButton(id, text, parent) {
  const made = element("button", text, parent);
  [made.id, made.type] = [id, "button"];
}
addButton("select-chosen", "Select these", byId("chosen").querySelector(".tools"));
addButton("view-select", "Select", view.querySelector(".tools"));
byId("select-chosen").onclick = () => {
  plot.chosenPlaces().forEach(place => selected.add(place));
  showState();
};
byId("view-select").onclick = () => toggle(viewed);
byId("deselect").onclick = () => { selected.clear(); showState(); };
byId("move").onclick = () => {
  fillChoice(byId("move-to"));
  byId("move-title").textContent = `Move ${selected.size === 1 ? "this picture" : `these ${selected.size} pictures`} to`;
  byId("move-dialog").showModal();
};
byId("move-save").onclick = () => {
  byId("move-dialog").close();
  edit({ move: { places: Array.from(selected), cluster: Number(byId("move-to").value) } });
};
byId("move-cancel").onclick = () => byId("move-dialog").close();
byId("mark-wrong").onclick = () => edit({ mark: { places: Array.from(selected), mark: "wrong" } });
byId("mark-outlier").onclick = () => edit({ mark: { places: Array.from(selected), mark: "outlier" } });
byId("unmark").onclick = () => edit({ unmark: { places: Array.from(selected) } });
byId("undo").onclick = () => edit("undo");

byId("trouble-close").onclick = () => { byId("trouble").hidden = true; };
if (served.mapped) byId("map").hidden = false;
remember(document);
decorate(document);
watch(document);
showState();
readServer().then(start).catch(showError);
