
// ---- The page of `assort view` ----

// Pictures of a cluster that are fetched at once.
const PAGE = 120;

async function get(path) {
  const answer = await fetch(path).catch(() => {
    throw new Error("The server has ended. Start `assort view` again and open the address that it prints.");
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

function complain(error) {
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
  still = setTimeout(() => fetchPicture(place).then(then, complain), 60);
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
      image({ ...thumbnailOf(place), title: `${name}, score ${score}` }, own);
    }
    end.before(made);
    end.dataset.next = to;
    reserve(figure, end);
    if (to < last) ends.observe(end);
    else end.remove();
  } catch (error) {
    complain(error);
  }
}

byId("trouble-close").onclick = () => { byId("trouble").hidden = true; };
if (served.mapped) byId("map").hidden = false;
watch(document);
readServer().then(start).catch(complain);
