"use strict";
// The page is a list without this script. It adds the map, and a view of each picture. Names reach the
// page only as text: nothing here makes HTML of them.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const numbers = text => new Uint32Array(bytes(text).buffer);

const clusterOf = numbers(data.cluster);
const confidence = bytes(data.confidence);
const classOf = data.classes ? numbers(data.label) : null;
const analysed = data.map ? numbers(data.map.places) : new Uint32Array();
const shown = numbers(data.shown);
const near = numbers(data.near);
const second = numbers(data.second);
const rowOfShown = new Map(Array.from(shown, (place, row) => [place, row]));
const NONE = 0xffffffff;

const clusterName = k => data.titles[k];
const className = place => classOf && classOf[place] !== NONE ? data.classes[classOf[place]] : null;
const link = place => byId("i" + place);
const nameOf = place => {
  const own = link(place);
  return own ? own.firstChild.alt : "picture " + (place + 1) + " of " + clusterOf.length;
};

function element(kind, text, parent) {
  const made = document.createElement(kind);
  if (text) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A thumbnail that opens the view of a picture; its text where the page has no thumbnail.
function thumbnail(place) {
  const own = link(place);
  if (!own) return element("bdi", nameOf(place));
  const made = element("a");
  made.className = "ref";
  made.href = "#i" + place;
  const image = element("img", "", made);
  image.src = own.firstChild.src;
  image.alt = own.firstChild.alt;
  image.title = own.firstChild.title;
  return made;
}

// ---- The view of one picture ----

const view = byId("view");
let viewed = null;

function open(place) {
  const own = link(place);
  if (!own) return;
  viewed = place;
  byId("view-picture").src = own.firstChild.src;
  byId("view-picture").alt = nameOf(place);
  byId("view-name").textContent = nameOf(place);
  const list = byId("view-facts");
  list.replaceChildren();
  const fact = (term, text) => text && (element("dt", term, list), element("dd", text, list));
  fact("Cluster", clusterName(clusterOf[place]).replace(/^cluster /, ""));
  fact("Confidence", (confidence[place] / 255).toFixed(2));
  const row = rowOfShown.get(place);
  if (second.length && second[row] !== NONE) fact("Second-best cluster", clusterName(second[row]).replace(/^cluster /, ""));
  fact("Class", className(place));
  const strip = byId("view-near");
  strip.replaceChildren();
  const each = shown.length ? near.length / shown.length : 0;
  for (const other of near.slice(row * each, (row + 1) * each)) {
    if (other !== NONE) strip.append(thumbnail(other));
  }
  byId("view-near-title").hidden = !strip.firstChild;
  if (!view.open) view.showModal();
}

function step(by) {
  const own = link(viewed).closest("section");
  const all = Array.from(own.querySelectorAll("a.p"), a => Number(a.id.slice(1)));
  open(all[(all.indexOf(viewed) + by + all.length) % all.length]);
}

document.addEventListener("click", event => {
  const target = event.target.closest("a.p, a.ref");
  if (target && link(Number(target.hash.slice(2)))) {
    event.preventDefault();
    open(Number(target.hash.slice(2)));
  }
});
byId("view-close").onclick = () => view.close();
byId("view-back").onclick = () => step(-1);
byId("view-next").onclick = () => step(1);
view.addEventListener("click", event => event.target === view && view.close());
view.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});

// Links of the lists become thumbnails.
for (const listed of document.querySelectorAll("ul.list a.ref")) {
  const own = link(Number(listed.hash.slice(2)));
  if (own) {
    const image = element("img");
    image.src = own.firstChild.src;
    image.alt = "";
    image.loading = "lazy";
    listed.prepend(image);
  }
}

// ---- The map ----

if (data.map) drawMap();

function drawMap() {
  const xs = new Uint16Array(bytes(data.map.x).buffer);
  const ys = new Uint16Array(bytes(data.map.y).buffer);
  const canvas = byId("map-canvas");
  const context = canvas.getContext("2d");
  const tip = byId("tip");
  let zoom = 1, panX = 0, panY = 0, width = 0, height = 0;
  let only = new Set(), lasso = null, isLasso = false, chosen = null, by = "cluster", hovered = -1;
  byId("map").hidden = false;

  // Golden angle: neighbouring numbers get different hues.
  const colour = k => `hsl(${(k * 137.508 + 210) % 360} ${62 + (k * 7) % 30}% ${[50, 44, 62][k % 3]}%)`;
  const group = row => by === "class" ? classOf[analysed[row]] : clusterOf[analysed[row]];
  const isOn = row => (!only.size || only.has(group(row))) && (!chosen || chosen.has(row));

  // Positions are in 0..65535; the map is square.
  const side = () => Math.min(width, height) - 24;
  const screenX = row => width / 2 + panX + (xs[row] / 65535 - .5) * side() * zoom;
  const screenY = row => height / 2 + panY + (ys[row] / 65535 - .5) * side() * zoom;

  let isDue = false;
  const redraw = () => {
    if (!isDue) requestAnimationFrame(() => { isDue = false; paint(); });
    isDue = true;
  };

  function paint() {
    const ratio = devicePixelRatio || 1;
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const size = Math.max(2, Math.min(9, 60 / Math.sqrt(analysed.length) * Math.sqrt(zoom) + 1));
    const groups = new Map();
    const inside = [];
    for (let row = 0; row < analysed.length; row++) {
      const x = screenX(row), y = screenY(row);
      if (x < -20 || y < -20 || x > width + 20 || y > height + 20) continue;
      const key = isOn(row) ? group(row) : -1;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(x, y);
      if (key !== -1) inside.push(row);
    }
    for (const key of Array.from(groups.keys()).sort((a, b) => a - b)) {
      context.fillStyle = key === -1 ? "rgb(128 128 128 / .25)" : key === NONE ? "gray" : colour(key);
      const places = groups.get(key);
      for (let i = 0; i < places.length; i += 2) {
        context.fillRect(places[i] - size / 2, places[i + 1] - size / 2, size, size);
      }
    }
    if (zoom > 3 && inside.length <= 150) inside.forEach(paintPicture);
    if (hovered >= 0) {
      context.strokeStyle = getComputedStyle(canvas).color;
      context.lineWidth = 2;
      context.strokeRect(screenX(hovered) - size, screenY(hovered) - size, 2 * size, 2 * size);
    }
    if (lasso && lasso.length > 1) {
      context.strokeStyle = getComputedStyle(canvas).color;
      context.setLineDash([4, 4]);
      context.beginPath();
      lasso.forEach(([x, y], i) => i ? context.lineTo(x, y) : context.moveTo(x, y));
      context.stroke();
      context.setLineDash([]);
    }
  }

  const loaded = new Map();
  function paintPicture(row) {
    const own = link(analysed[row]);
    if (!own) return;
    let image = loaded.get(row);
    if (!image) {
      image = new Image();
      image.onload = redraw;
      image.src = own.firstChild.src;
      loaded.set(row, image);
    }
    if (!image.complete || !image.naturalWidth) return;
    const factor = 44 / Math.max(image.naturalWidth, image.naturalHeight);
    const w = image.naturalWidth * factor, h = image.naturalHeight * factor;
    context.drawImage(image, screenX(row) - w / 2, screenY(row) - h / 2, w, h);
    context.strokeStyle = group(row) === NONE ? "gray" : colour(group(row));
    context.lineWidth = 2;
    context.strokeRect(screenX(row) - w / 2, screenY(row) - h / 2, w, h);
  }

  function nearest(x, y) {
    let best = -1, least = 15 * 15;
    for (let row = 0; row < analysed.length; row++) {
      const distance = (screenX(row) - x) ** 2 + (screenY(row) - y) ** 2;
      if (distance < least && isOn(row)) [best, least] = [row, distance];
    }
    return best;
  }

  function hover(x, y) {
    hovered = nearest(x, y);
    tip.hidden = hovered < 0;
    if (hovered >= 0) {
      const place = analysed[hovered];
      tip.replaceChildren();
      const own = link(place);
      if (own) element("img", "", tip).src = own.firstChild.src;
      element("bdi", nameOf(place), tip);
      const parts = [clusterName(clusterOf[place]), className(place)].filter(Boolean);
      element("div", parts.join(", "), tip);
      tip.style.left = Math.max(0, Math.min(x + 14, width - 210)) + "px";
      tip.style.top = (y > height / 2 ? Math.max(0, y - tip.offsetHeight - 10) : y + 14) + "px";
    }
    redraw();
  }

  function zoomBy(factor, x = width / 2, y = height / 2) {
    const next = Math.max(.8, Math.min(200, zoom * factor));
    panX = x - width / 2 - (x - width / 2 - panX) * next / zoom;
    panY = y - height / 2 - (y - height / 2 - panY) * next / zoom;
    zoom = next;
    redraw();
  }

  function reset() {
    [zoom, panX, panY] = [1, 0, 0];
    redraw();
  }

  const pointers = new Map();
  let start = null, spread = 0;
  const distance = () => {
    const [a, b] = Array.from(pointers.values());
    return Math.hypot(a[0] - b[0], a[1] - b[1]);
  };
  canvas.onpointerdown = event => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    start = [event.offsetX, event.offsetY, panX, panY, false];
    lasso = (isLasso || event.shiftKey) && pointers.size === 1 ? [[event.offsetX, event.offsetY]] : null;
    if (pointers.size === 2) spread = distance();
  };
  canvas.onpointermove = event => {
    const [x, y] = [event.offsetX, event.offsetY];
    if (!pointers.has(event.pointerId)) return hover(x, y);
    pointers.set(event.pointerId, [x, y]);
    if (pointers.size === 2) {
      zoomBy(distance() / spread, x, y);
      spread = distance();
      start[4] = true;
    } else if (lasso) {
      lasso.push([x, y]);
      redraw();
    } else if (start && (start[4] || Math.hypot(x - start[0], y - start[1]) > 4)) {
      start[4] = true;
      [panX, panY] = [start[2] + x - start[0], start[3] + y - start[1]];
      redraw();
    }
  };
  canvas.onpointerup = event => {
    pointers.delete(event.pointerId);
    if (lasso && lasso.length > 2) {
      choose(inside(lasso));
    } else if (start && !start[4]) {
      hover(event.offsetX, event.offsetY);
      if (hovered >= 0) open(analysed[hovered]);
    }
    lasso = null;
    redraw();
  };
  canvas.onpointercancel = event => { pointers.delete(event.pointerId); lasso = null; };
  canvas.onpointerleave = () => { hovered = -1; tip.hidden = true; redraw(); };
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.onkeydown = event => {
    const pan = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (pan) [panX, panY] = [panX + pan[0], panY + pan[1]];
    else if (event.key === "+" || event.key === "=") zoomBy(1.5);
    else if (event.key === "-") zoomBy(1 / 1.5);
    else if (event.key === "0") reset();
    else if (event.key === "Escape") choose(null);
    else if (event.key === "Enter") {
      const row = nearest(width / 2, height / 2);
      if (row >= 0) open(analysed[row]);
    } else return;
    event.preventDefault();
    redraw();
  };

  // The even-odd rule.
  function inside(line) {
    const found = new Set();
    for (let row = 0; row < analysed.length; row++) {
      const x = screenX(row), y = screenY(row);
      let isIn = false;
      for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
        const [xi, yi] = line[i], [xj, yj] = line[j];
        if ((yi > y) !== (yj > y) && x < (xj - xi) * (y - yi) / (yj - yi) + xi) isIn = !isIn;
      }
      if (isIn && isOn(row)) found.add(row);
    }
    return found;
  }

  function choose(rows) {
    chosen = rows && rows.size ? rows : null;
    tell();
    redraw();
  }

  function tell() {
    const rows = [];
    for (let row = 0; row < analysed.length; row++) if (isOn(row)) rows.push(row);
    const isFiltered = chosen || only.size;
    byId("chosen").hidden = !isFiltered;
    byId("chosen-count").textContent = isFiltered ? `${rows.length} of ${analysed.length} pictures chosen` : "";
    const strip = byId("chosen-strip");
    strip.replaceChildren();
    const pictured = isFiltered ? rows.filter(row => link(analysed[row])) : [];
    pictured.slice(0, 60).forEach(row => strip.append(thumbnail(analysed[row])));
    if (pictured.length > 60) element("p", `and ${rows.length - 60} more`, strip);
  }

  function fillLegend() {
    const legend = byId("legend");
    legend.replaceChildren();
    const names = by === "class" ? data.classes : data.clusters.map((_, k) => clusterName(k));
    names.forEach((name, k) => {
      const button = element("button", "", legend);
      button.type = "button";
      element("i", "", button).style.background = colour(k);
      element("bdi", name, button);
      button.setAttribute("aria-pressed", "false");
      button.onclick = () => {
        if (!only.delete(k)) only.add(k);
        button.setAttribute("aria-pressed", only.has(k));
        tell();
        redraw();
      };
    });
  }

  byId("zoom-in").onclick = () => zoomBy(1.5);
  byId("zoom-out").onclick = () => zoomBy(1 / 1.5);
  byId("zoom-reset").onclick = reset;
  byId("lasso").onclick = event => {
    isLasso = !isLasso;
    event.currentTarget.setAttribute("aria-pressed", isLasso);
  };
  byId("colour").hidden = !classOf;
  byId("colour").onclick = event => {
    by = by === "class" ? "cluster" : "class";
    event.currentTarget.textContent = by === "class" ? "Colour by cluster" : "Colour by class";
    only = new Set();
    fillLegend();
    choose(null);
  };
  byId("clear").onclick = () => {
    only = new Set();
    fillLegend();
    choose(null);
  };
  if (classOf) byId("colour").click();
  else fillLegend();
  new ResizeObserver(redraw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
