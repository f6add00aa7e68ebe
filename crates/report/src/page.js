"use strict";
// The page is a list without this script. It adds the map, and a view of each picture. Names reach the
// page only as text: nothing here makes HTML of them.
//
// A page that `assort view` serves has no pictures in it. There `served` is what the page says about its server,
// and numbers, names and pictures are fetched when they are seen.

const byId = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const numbers = text => new Uint32Array(bytes(text).buffer);
const NONE = 0xffffffff;

let data = JSON.parse(byId("data").textContent);
const served = data.served;
let clusterOf, confidence, classOf = null, analysed = new Uint32Array(), mapX, mapY;
let shown, near, second, rowOfShown;

function readPage() {
  clusterOf = numbers(data.cluster);
  confidence = bytes(data.confidence);
  if (data.classes) classOf = numbers(data.label);
  if (data.map) {
    analysed = numbers(data.map.places);
    [mapX, mapY] = [data.map.x, data.map.y].map(text => new Uint16Array(bytes(text).buffer));
  }
  [shown, near, second] = [data.shown, data.near, data.second].map(numbers);
  rowOfShown = new Map(Array.from(shown, (place, row) => [place, row]));
}

const clusterName = k => data.titles[k];
const className = place => classOf && classOf[place] !== NONE ? data.classes[classOf[place]] : null;
const link = place => byId("i" + place);

// Names that the server has sent, by place.
const names = new Map();

// The source of a picture's thumbnail, and its name; null where the page has none.
function thumbnailOf(place) {
  if (served) {
    return { src: `thumbnail/${served.set}/${place}`, name: nameOf(place), title: nameOf(place) };
  }
  const own = link(place);
  return own && { src: own.firstChild.src, name: own.firstChild.alt, title: own.firstChild.title };
}

function nameOf(place) {
  const own = served ? null : link(place);
  const name = own ? own.firstChild.alt : names.get(place);
  return name || "picture " + (place + 1) + " of " + clusterOf.length;
}

function element(kind, text, parent) {
  const made = document.createElement(kind);
  if (text) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function image(found, parent) {
  const made = element("img", "", parent);
  made.loading = "lazy";
  made.onload = () => made.classList.toggle("small", made.naturalWidth <= 80);
  made.src = found.src;
  made.alt = found.name;
  made.title = found.title;
  return made;
}

// A thumbnail that opens the view of a picture; its text where the page has no thumbnail.
function thumbnail(place) {
  const found = thumbnailOf(place);
  if (!found) return element("bdi", nameOf(place));
  const made = element("a");
  made.className = "ref";
  made.href = "#i" + place;
  image(found, made);
  return made;
}

// ---- The view of one picture ----

const view = byId("view");
let viewed = null;

function open(place) {
  const found = thumbnailOf(place);
  if (!found) return;
  viewed = place;
  byId("view-picture").src = served ? `full/${served.set}/${place}` : found.src;
  byId("view-picture").alt = nameOf(place);
  byId("view-name").textContent = nameOf(place);
  if (served) {
    fillView(place, null, [], null);
    fetchPicture(place).then(about => viewed === place && fillView(place, about.second, about.near, about), showError);
  } else {
    const row = rowOfShown.get(place), each = shown.length ? near.length / shown.length : 0;
    const best = second.length && second[row] !== NONE ? second[row] : null;
    fillView(place, best, Array.from(near.slice(row * each, (row + 1) * each)).filter(other => other !== NONE));
  }
  if (!view.open) view.showModal();
}

function fillView(place, secondBest, others) {
  byId("view-picture").alt = nameOf(place);
  byId("view-name").textContent = nameOf(place);
  const list = byId("view-facts");
  list.replaceChildren();
  const fact = (term, text) => text && (element("dt", term, list), element("dd", text, list));
  fact("Cluster", clusterName(clusterOf[place]).replace(/^cluster /, ""));
  fact("Confidence", (confidence[place] / 255).toFixed(2));
  fact("Second-best cluster", secondBest !== null && clusterName(secondBest));
  fact("Class", className(place));
  const strip = byId("view-near");
  strip.replaceChildren(...others.map(thumbnail));
  byId("view-near-title").hidden = !strip.firstChild;
  if (served) showSelected();
}

function step(by) {
  if (served) {
    fetchPicture(viewed).then(about => open(by < 0 ? about.previous : about.next), showError);
    return;
  }
  const own = link(viewed).closest("section");
  const all = Array.from(own.querySelectorAll("a.p"), a => Number(a.id.slice(1)));
  open(all[(all.indexOf(viewed) + by + all.length) % all.length]);
}

document.addEventListener("click", event => {
  const target = event.target.closest("a.p, a.ref");
  const place = target && Number(target.hash.slice(2));
  if (target && thumbnailOf(place)) {
    event.preventDefault();
    open(place);
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
function fillLists(parent) {
  for (const listed of parent.querySelectorAll("ul.list a.ref")) {
    const place = Number(listed.hash.slice(2)), found = thumbnailOf(place);
    if (found && !listed.querySelector("img")) {
      names.set(place, listed.textContent);
      const made = image({ ...found, name: "" });
      made.title = listed.textContent;
      listed.prepend(made);
    }
  }
}

// ---- The map ----

// Points that are painted between two looks at the clock, and milliseconds of painting in a frame.
const AT_ONCE = 2000, BUDGET = 25;

function drawMap() {
  const canvas = byId("map-canvas");
  const context = canvas.getContext("2d");
  const tip = byId("tip");
  let zoom = 1, panX = 0, panY = 0, width = 0, height = 0;
  let only = new Set(), lasso = null, isLasso = false, chosen = null, by = "cluster", hovered = -1;
  byId("map").hidden = false;

  // The points are painted pixel by pixel on a canvas of their own: 100,000 of them take some milliseconds, and
  // what follows the pointer is drawn above them.
  const points = document.createElement("canvas");
  let arePointsDue = true, painting = null;

  // Golden angle: neighbouring numbers get different hues.
  const hue = k => [(k * 137.508 + 210) % 360, 62 + (k * 7) % 30, [50, 44, 62][k % 3]];
  const colour = k => k === NONE ? "gray" : `hsl(${hue(k)[0]} ${hue(k)[1]}% ${hue(k)[2]}%)`;
  const group = row => by === "class" ? classOf[analysed[row]] : clusterOf[analysed[row]];
  const isOn = row => (!only.size || only.has(group(row))) && (!chosen || chosen.has(row));

  // Positions are in 0..65535; the map is square.
  const side = () => Math.min(width, height) - 24;
  const screenX = row => width / 2 + panX + (mapX[row] / 65535 - .5) * side() * zoom;
  const screenY = row => height / 2 + panY + (mapY[row] / 65535 - .5) * side() * zoom;

  let isDue = false;
  const redraw = () => {
    if (!isDue) requestAnimationFrame(() => { isDue = false; paint(); });
    isDue = true;
  };
  const redrawPoints = () => { arePointsDue = true; redraw(); };

  // Paints the points as they are now. Yields from time to time, so that the page answers meanwhile; the last
  // painting stays until this one is complete.
  let size = 2, inside = [];
  function* paintPoints(ratio) {
    const count = analysed.length, scale = side() * zoom;
    const [left, top] = [width / 2 + panX - scale / 2, height / 2 + panY - scale / 2];
    const [wide, high] = [canvas.width, canvas.height], [right, bottom] = [width + 20, height + 20];
    const nextSize = Math.max(2, Math.min(9, 60 / Math.sqrt(count) * Math.sqrt(zoom) + 1));
    const extent = Math.max(1, Math.round(nextSize * ratio));
    const pixels = new Uint32Array(wide * high), on = [], packed = new Map();
    const square = (row, value) => {
      const x = Math.round((left + mapX[row] / 65535 * scale - nextSize / 2) * ratio);
      const y = Math.round((top + mapY[row] / 65535 * scale - nextSize / 2) * ratio);
      const [from, to] = [Math.max(0, x), Math.min(wide, x + extent)];
      for (let line = Math.max(0, y); line < Math.min(high, y + extent); line++) {
        if (from < to) pixels.fill(value, line * wide + from, line * wide + to);
      }
    };
    // Points that are not chosen come first, below the others.
    for (const areOn of only.size || chosen ? [false, true] : [true]) {
      for (let row = 0; row < count; row++) {
        if (row % AT_ONCE === AT_ONCE - 1) yield;
        const x = left + mapX[row] / 65535 * scale, y = top + mapY[row] / 65535 * scale;
        if (x < -20 || y < -20 || x > right || y > bottom || isOn(row) !== areOn) continue;
        if (!areOn) {
          square(row, pack(128, 128, 128, 64));
          continue;
        }
        on.push(row);
        const key = group(row);
        if (!packed.has(key)) packed.set(key, key === NONE ? pack(128, 128, 128, 255) : pack(...rgb(...hue(key)), 255));
        square(row, packed.get(key));
      }
    }
    [points.width, points.height, size, inside] = [wide, high, nextSize, on];
    points.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), wide, high), 0, 0);
  }

  function paint() {
    const ratio = devicePixelRatio || 1;
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (wide !== width || high !== height || canvas.width !== Math.round(wide * ratio)) {
      [width, height] = [wide, high];
      [canvas.width, canvas.height] = [Math.round(wide * ratio), Math.round(high * ratio)];
      arePointsDue = true;
    }
    if (!canvas.width || !canvas.height) return;
    if (arePointsDue && !painting) {
      arePointsDue = false;
      painting = paintPoints(ratio);
    }
    const until = performance.now() + BUDGET;
    while (painting && performance.now() < until) {
      if (painting.next().done) painting = null;
    }
    if (painting || arePointsDue) redraw();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(points, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
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
    const found = thumbnailOf(analysed[row]);
    if (!found) return;
    let image = loaded.get(row);
    if (!image) {
      image = new Image();
      image.onload = redraw;
      image.src = found.src;
      if (loaded.size > 1000) loaded.clear();
      loaded.set(row, image);
    }
    if (!image.complete || !image.naturalWidth) return;
    const factor = 44 / Math.max(image.naturalWidth, image.naturalHeight);
    const w = image.naturalWidth * factor, h = image.naturalHeight * factor;
    context.drawImage(image, screenX(row) - w / 2, screenY(row) - h / 2, w, h);
    context.strokeStyle = colour(group(row));
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
      const found = thumbnailOf(place);
      if (found) element("img", "", tip).src = found.src;
      const name = element("bdi", nameOf(place), tip);
      if (served && !names.has(place)) whenStill(place, () => { name.textContent = nameOf(place); });
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
    redrawPoints();
  }

  function reset() {
    [zoom, panX, panY] = [1, 0, 0];
    redrawPoints();
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
      const [lastX, lastY] = lasso[lasso.length - 1];
      if (Math.hypot(x - lastX, y - lastY) > 3) lasso.push([x, y]);
      redraw();
    } else if (start && (start[4] || Math.hypot(x - start[0], y - start[1]) > 4)) {
      start[4] = true;
      [panX, panY] = [start[2] + x - start[0], start[3] + y - start[1]];
      redrawPoints();
    }
  };
  canvas.onpointerup = event => {
    pointers.delete(event.pointerId);
    if (lasso && lasso.length > 2) {
      choose(within(lasso));
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
    redrawPoints();
  };

  // The even-odd rule.
  function within(line) {
    const found = new Set(), [xs, ys] = [0, 1].map(a => line.map(at => at[a]));
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    for (let row = 0; row < analysed.length; row++) {
      const x = screenX(row), y = screenY(row);
      if (x < left || x > right || y < top || y > bottom) continue;
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
    redrawPoints();
  }

  function tell() {
    const rows = [];
    for (let row = 0; row < analysed.length; row++) if (isOn(row)) rows.push(row);
    const isFiltered = chosen || only.size;
    byId("chosen").hidden = !isFiltered;
    byId("chosen-count").textContent = isFiltered ? `${rows.length} of ${analysed.length} pictures chosen` : "";
    const strip = byId("chosen-strip");
    strip.replaceChildren();
    const pictured = [];
    for (let i = 0; isFiltered && i < rows.length && pictured.length <= 60; i++) {
      if (thumbnailOf(analysed[rows[i]])) pictured.push(analysed[rows[i]]);
    }
    pictured.slice(0, 60).forEach(place => strip.append(thumbnail(place)));
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
        redrawPoints();
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

  return {
    // Clusters or their names have changed.
    refresh() {
      only = new Set();
      fillLegend();
      choose(null);
    },
    // The places of the pictures that a line or the legend has chosen.
    chosenPlaces: () => {
      const rows = [];
      for (let row = 0; (chosen || only.size) && row < analysed.length; row++) if (isOn(row)) rows.push(row);
      return rows.map(row => analysed[row]);
    },
  };
}

// A colour as the bytes red, green and blue: CSS Color Module Level 4, section 7.1.
function rgb(hue, saturation, lightness) {
  const [s, l] = [saturation / 100, lightness / 100];
  const channel = n => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (l - s * Math.min(l, 1 - l) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

// A pixel of an image, whose bytes are in this order; all machines with a browser are little-endian.
const pack = (red, green, blue, alpha) => (alpha << 24 | blue << 16 | green << 8 | red) >>> 0;

let plot = null;

function start() {
  fillLists(document);
  if (analysed.length) plot = drawMap();
}

if (!served) {
  readPage();
  start();
}
