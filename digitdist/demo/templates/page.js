// Draws what is done on the paper, and shows what the server answers about it.
"use strict";

const find = (id) => document.getElementById(id);
const paper = find("paper");
const PEN = 1 / 14; // of the paper's side: the stroke of a digit that fills most of it is about as thick as MNIST's
const SENT = 224, MARGIN = 16; // pixels of a drawing's side as it is sent, and around it: what touches a rim is taken for dirt
const MAX_BYTES = Number(document.body.dataset.maxBytes);

// What was done, in order: a stroke {points}, a picture {file, image}, or a clearing {}. Undo takes back the last.
const done = [];
let stroke = null; // the one that is being drawn

/** What is on the paper: a picture, or strokes; either may be missing. */
function onPaper() {
  let first = done.length;
  while (first > 0 && done[first - 1].points) first--;
  const strokes = done.slice(first), last = done[first - 1];
  return { picture: last && last.file && !strokes.length ? last : null, strokes };
}

/** Draws strokes on a canvas without any other ink, so that it is no photograph whose paper would have to be found. */
function draw(canvas, strokes, margin) {
  const context = canvas.getContext("2d"), side = canvas.width - 2 * margin;
  context.setTransform(side, 0, 0, side, margin, margin);
  Object.assign(context, { lineWidth: PEN, lineCap: "round", lineJoin: "round" });
  for (const { points } of strokes) {
    context.beginPath();
    context.moveTo(points[0][0], points[0][1] + 1e-3); // a line without any length would not be drawn
    for (const point of points) context.lineTo(...point);
    context.stroke();
  }
}

function paint() {
  const { picture, strokes } = onPaper(), image = picture && picture.image;
  paper.width = paper.width; // clears it
  paper.classList.toggle("picture", Boolean(image));
  draw(paper, strokes, 0);
  if (image) {
    const { width, height } = image, scale = 1 / Math.max(width, height); // of the paper's side
    paper.getContext("2d").drawImage(image, (1 - scale * width) / 2, (1 - scale * height) / 2, scale * width, scale * height);
  }
  const hint = find("hint");
  hint.hidden = Boolean(strokes.length || image);
  hint.textContent = picture ? `${picture.file.name}, which this browser cannot show` : hint.dataset.empty;
  find("undo").disabled = !done.length;
  find("clear").disabled = !picture && !strokes.length;
}

/** The drawing as a picture to be sent. */
function drawing(strokes) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SENT + 2 * MARGIN;
  draw(canvas, strokes, MARGIN);
  return new Promise((resolve) => canvas.toBlob(resolve));
}

/** The answer about what is on the paper: null where there is nothing, {error} where there can be none. */
async function ask() {
  const { picture, strokes } = onPaper();
  if (!picture && !strokes.length) return null;
  const content = picture ? picture.file : await drawing(strokes);
  if (content.size > MAX_BYTES) return { error: `the picture is larger than ${MAX_BYTES >> 20} MiB` };
  try {
    const type = { "Content-Type": "application/octet-stream" };
    return await (await fetch("predict", { method: "POST", headers: type, body: content })).json();
  } catch {
    return { error: "there is no answer; is the command that serves this page still running?" };
  }
}

let asking = false, changed = false;

/** Shows what is on the paper now, and what the server says of it: one question at a time, the last one always. */
async function change() {
  paint();
  changed = true;
  if (asking) return;
  busy(true);
  while (changed) {
    changed = false;
    show(await ask());
  }
  busy(false);
}

function busy(yes) {
  asking = yes;
  find("prediction").setAttribute("aria-busy", yes); // a screen reader waits for the end of it
}

function show(answer) {
  const { error = "", probabilities = [], image = null, neighbours = [] } = answer || {};
  find("message").textContent = error && `No prediction: ${error}`;
  const rows = [...find("bars").rows], best = probabilities.indexOf(Math.max(...probabilities));
  rows.forEach((row, number) => {
    const known = number < probabilities.length;
    row.className = number === best ? "best" : "";
    row.querySelector(".bar").style.width = `${known ? 100 * probabilities[number] : 0}%`;
    row.querySelector(".percent").textContent = known ? percent(probabilities[number]) : "";
  });
  find("verdict").textContent = answer ? "No prediction" : find("verdict").dataset.empty;
  if (best >= 0) {
    find("verdict").textContent = `${rows[best].querySelector("th").textContent}, ${percent(probabilities[best])}`;
    keepInView(rows[best]);
  }
  tile(find("seen").parentElement, image, "What the network sees of the drawing");
  document.querySelectorAll("#neighbours figure").forEach((figure, number) => {
    const one = neighbours[number];
    tile(figure, one && one.image, one && `Training image ${one.index}: ${one.class}`);
    const label = document.createElement("b"), caption = figure.querySelector("figcaption");
    label.textContent = one ? one.class : "\u00a0";
    caption.replaceChildren(label, one ? one.cosine.toFixed(3) : "\u00a0");
  });
}

/** Shows an image in a figure, or none. */
function tile(figure, image, text) {
  const shown = figure.querySelector("img");
  figure.className = image ? "" : "empty";
  if (image) shown.src = image;
  else shown.removeAttribute("src");
  shown.alt = image ? text : "";
  figure.title = image ? text : "";
}

/** Scrolls the list of classes, where it is a long one, not the page. */
function keepInView(row) {
  const list = find("scroll"), top = row.offsetTop, end = top + row.offsetHeight;
  if (top < list.scrollTop || end > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
}

const percent = (probability) => `${(100 * probability).toFixed(1)} %`;

/** Where the pointer is, in parts of the paper's sides. */
function place(event) {
  const box = paper.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

paper.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  paper.setPointerCapture(event.pointerId); // a stroke goes on where it leaves the paper
  if (onPaper().picture) done.push({});
  stroke = { points: [place(event)] };
  done.push(stroke);
  change();
});
paper.addEventListener("pointermove", (event) => {
  if (!stroke || !event.isPrimary) return;
  const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  stroke.points.push(...(events.length ? events : [event]).map(place));
  change();
});
for (const end of ["pointerup", "pointercancel"]) paper.addEventListener(end, (event) => event.isPrimary && (stroke = null));

function undo() {
  stroke = null;
  if (done.pop()) change();
}

find("undo").addEventListener("click", undo);
find("clear").addEventListener("click", () => done.push({}) && change());
find("upload").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // the same file may be chosen again
  if (!file) return;
  const image = file.size > MAX_BYTES ? null : await createImageBitmap(file).catch(() => null);
  done.push({ file, image });
  change();
});
document.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.shiftKey || event.key !== "z") return;
  event.preventDefault();
  undo();
});
paint();
show(null);
