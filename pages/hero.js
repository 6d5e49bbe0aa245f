// The interactive part of the hero page: pieces of text, every head, attention maps of one text.
//
// A map has a row a query (a position that looks) and a column a key (a position that is looked
// at). The page carries for each map the attention of the lower triangle, row by row, and for each
// key the length of what its value writes.

const data = JSON.parse(document.getElementById("data").textContent);
const tokens = data.tokens;
const nTokens = tokens.length;

const leaveOutFirst = document.getElementById("leave_out_first");
const weightByValue = document.getElementById("weight_by_value");
const logarithmic = document.getElementById("logarithmic");
const scoreChoice = document.getElementById("score");

const MARK = "#d55e00";
const DECADES = 3; // of the logarithmic colour scale
const drawing = document.getElementById("heads"); // of every head

// Viridis at six places, as red, green, blue.
const VIRIDIS = [
  [68, 1, 84],
  [65, 68, 135],
  [42, 120, 142],
  [34, 168, 132],
  [122, 209, 81],
  [253, 231, 37],
];

let choice = null; // {query, key}: what is spoken of on the maps
let printing = false; // on paper ink is black, in either scheme
let held = false; // a click holds the choice until the next click
let largest; // of all cells of all maps: one colour scale, so that the maps can be compared

// ------------------------------------------------------------------ small things

/** Adds an element to a parent. Text is set as text: a token is never markup. */
function addElement(tag, parent, text = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

/** The same of a drawing. */
function addShape(tag, parent, attributes, text = "") {
  const shape = document.createElementNS(drawing.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) {
    shape.setAttribute(name, value);
  }
  shape.textContent = text;
  parent.append(shape);
  return shape;
}

/** Three significant digits; "?" where there is no number. */
function showNumber(value) {
  return value == null ? "?" : String(Number(value.toPrecision(3)));
}

/** A share in per cent. */
function showPercent(share) {
  return `${showNumber(100 * share)} %`;
}

function limit(value, low, high) {
  return Math.max(low, Math.min(high, value));
}

/** Calls `move(steps)` for the arrow keys left and right on an element. */
function onArrows(element, move) {
  element.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (steps) {
      event.preventDefault(); // or the page scrolls
      move(steps);
    }
  });
}

/** Viridis at a share between 0 and 1, as [red, green, blue]. */
function viridis(share) {
  const place = limit(share, 0, 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const weight = place - below;
  return VIRIDIS[below].map((low, channel) => {
    const high = VIRIDIS[below + 1][channel];
    return low + weight * (high - low);
  });
}

/** 16 bits as a half-precision float: 5 bits exponent, 10 bits mantissa. No number has a sign. */
function halfToNumber(bits) {
  const exponent = (bits >> 10) & 31;
  const mantissa = bits & 1023;
  if (exponent === 0) {
    return mantissa * 2 ** -24;
  }
  return (1024 + mantissa) * 2 ** (exponent - 25);
}

/** Base64 of half-precision floats as numbers. */
function decodeHalves(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return Float32Array.from(new Uint16Array(bytes.buffer), halfToNumber);
}

// ------------------------------------------------------------------ pieces of text

/** A piece of text: says what the chosen token costs, and underlines what was looked at. */
function makePiece(paragraph, piece) {
  const spans = [...paragraph.querySelectorAll("span")];
  const tell = document.getElementById("tell_text");
  let chosen = piece.delta.indexOf(Math.max(...piece.delta));

  const choose = (place) => {
    chosen = limit(place, 0, spans.length - 1);
    document.querySelectorAll(".piece span").forEach((span) => {
      span.classList.remove("chosen", "looked_at");
    });
    spans[chosen].classList.add("chosen");
    const looked = piece.keys[chosen].map(([key, token, share]) => {
      const span = spans[key - piece.start]; // none, where the piece begins later
      if (span && share >= 0.05) {
        span.classList.add("looked_at");
      }
      return `${token} ${showPercent(share)}`;
    });
    const delta = piece.delta[chosen];
    const cost = `${showNumber(Math.abs(delta))} nats ${delta > 0 ? "more" : "less"} without the head`;
    const token = spans.slice(chosen).find((span) => span.textContent !== "");
    tell.textContent = looked.length
      ? `“${token.textContent}” costs ${cost}. Looked at: ${looked.join(", ")}.`
      : "Nothing comes before this token.";
  };

  spans.forEach((span, place) => {
    span.addEventListener("pointerenter", () => choose(place));
    span.addEventListener("click", () => choose(place));
  });
  paragraph.addEventListener("focus", () => choose(chosen));
  onArrows(paragraph, (steps) => choose(chosen + steps));
}

// ------------------------------------------------------------------ every head

const WIDTH = 640; // as the drawing says itself
const HEIGHT = 360;
const LEFT = 66; // of the frame, for the numbers of the axis
const BOTTOM = 46;

/** Round numbers between two ends, about n of them. */
function ticks(low, high, n) {
  const rough = (high - low) / n;
  const decade = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * decade).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) {
    found.push(i * step);
  }
  return found;
}

/** Ends of an axis: all values with a margin, and 0. */
function axisOf(values) {
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  const margin = 0.06 * (high - low) || 1;
  return { low: low < 0 ? low - margin : low, high: high + margin };
}

/** The heads that have the chosen score, in its order: head and value. */
function headsWithScore(name) {
  const scored = data.scores.filter((score) => score.score === name && score.value != null);
  const value = new Map(scored.map((score) => [nameOf(score), score.value]));
  return data.grid
    .filter((head) => value.has(nameOf(head)))
    .map((head) => ({ head, value: value.get(nameOf(head)) }))
    .sort((one, other) => one.value - other.value);
}

function nameOf(head) {
  return `${head.run} L${head.layer}H${head.head}`;
}

/** Whether a score is a share (of the attention, or of the largest possible): in per cent. */
function isShare(name) {
  return !data.no_shares.includes(name);
}

function showScore(name, value) {
  return value != null && isShare(name) ? showPercent(value) : showNumber(value);
}

/** Says all that is known of a head, and how to study it. */
function tellHead(head) {
  const isMissing = head.ci_lo == null || head.ci_hi == null; // too few documents
  const ends = `[${showNumber(1000 * head.ci_lo)}, ${showNumber(1000 * head.ci_hi)}]`;
  const interval = isMissing ? "(no interval)" : ends;
  const impact = `${showNumber(1000 * head.delta)} millinats a token ${interval}, rank ${head.rank}`;
  const scores = data.scores
    .filter((score) => nameOf(score) === nameOf(head))
    .map(({ score, value }) => `${score} ${showScore(score, value)}`);
  const flags = `--run ${head.run} --force_layer ${head.layer} --force_head ${head.head}`;
  const tell = document.getElementById("tell_heads");
  tell.textContent = `${nameOf(head)}: ${impact}; ${scores.join(", ")}. Study it with ${flags}.`;
}

/** Lines and numbers of the two axes. */
function drawAxes(svg, x, y, labels) {
  const frame = { x1: LEFT, x2: WIDTH - 8, y1: HEIGHT - BOTTOM, y2: 8 };
  for (const value of ticks(x.low, x.high, 6)) {
    const attributes = { x: x.place(value), y: frame.y1 + 17, "text-anchor": "middle" };
    addShape("text", svg, attributes, showNumber(value));
  }
  for (const value of ticks(y.low, y.high, 6)) {
    const attributes = { x: LEFT - 6, y: y.place(value) + 4, "text-anchor": "end" };
    addShape("text", svg, attributes, showNumber(value));
    const line = { x1: frame.x1, x2: frame.x2, y1: y.place(value), y2: y.place(value) };
    addShape("line", svg, { ...line, class: value === 0 ? "zero" : "grid" });
  }
  const middle = (frame.x1 + frame.x2) / 2;
  addShape("text", svg, { x: middle, y: HEIGHT - 8, "text-anchor": "middle" }, labels.x);
  const up = { x: -(frame.y1 + frame.y2) / 2, y: 20, "text-anchor": "middle" };
  addShape("text", svg, { ...up, transform: "rotate(-90)" }, labels.y);
}

/** The mark of a head: a circle, for the heads of another run a square. */
function addMark(svg, head, x, y) {
  const isFirstRun = head.run === data.run;
  // The arms have the colours that they have in every figure
  const isControl = head.run === "control" || (!isFirstRun && head.run !== "adaptive");
  const arm = isControl ? "control" : "adaptive";
  const attributes = isFirstRun
    ? { cx: x, cy: y, r: 6, class: arm }
    : { x: x - 5, y: y - 5, width: 10, height: 10, class: arm };
  const mark = addShape(isFirstRun ? "circle" : "rect", svg, attributes);
  mark.classList.toggle("studied", head.studied);
  mark.setAttribute("aria-label", nameOf(head));
  return mark;
}

/** Impact of every head against the chosen score. */
function drawHeads() {
  drawing.replaceChildren();
  const name = scoreChoice.value;
  const found = headsWithScore(name);
  if (!found.length) {
    return;
  }
  const scale = isShare(name) ? 100 : 1;
  const label = isShare(name) ? `${name} (%)` : name;
  const x = axisOf(found.map(({ value }) => scale * value));
  const y = axisOf(found.map(({ head }) => 1000 * head.delta));
  x.place = (v) => LEFT + ((v - x.low) / (x.high - x.low)) * (WIDTH - 8 - LEFT);
  y.place = (v) => HEIGHT - BOTTOM - ((v - y.low) / (y.high - y.low)) * (HEIGHT - BOTTOM - 8);
  drawAxes(drawing, x, y, { x: label, y: "impact (millinats a token)" });
  const marks = found.map(({ head, value }) =>
    addMark(drawing, head, x.place(scale * value), y.place(1000 * head.delta)),
  );
  // One stop of the Tab key for all: the arrow keys move on, in the order of the score.
  const choose = (place) => {
    const next = limit(place, 0, marks.length - 1);
    marks.forEach((mark, other) => mark.setAttribute("tabindex", other === next ? 0 : -1));
    marks.forEach((mark, other) => mark.classList.toggle("chosen", other === next));
    tellHead(found[next].head);
    return marks[next];
  };
  marks.forEach((mark, place) => {
    mark.addEventListener("pointerenter", () => choose(place));
    mark.addEventListener("click", () => choose(place));
    onArrows(mark, (steps) => choose(place + steps).focus());
  });
  choose(found.findIndex(({ head }) => nameOf(head) === data.hero));
  const runs = [...new Set(found.map(({ head }) => head.run))];
  const signs = runs.map((run) => {
    return `${run === data.run ? "● " : "■ "}${run}`;
  });
  document.getElementById("runs").textContent = signs.join("   ");
}

function addScores() {
  for (const name of new Set(data.scores.map((score) => score.score))) {
    addElement("option", scoreChoice, name).value = name;
  }
  scoreChoice.addEventListener("change", drawHeads);
}

// ------------------------------------------------------------------ the maps

/** A panel of the data as a map: numbers, the canvas that is seen, a hidden one, a pixel a cell. */
function makeMap(panel) {
  const box = addElement("div", document.getElementById("maps"));
  addElement("strong", box, panel.name);
  const canvas = addElement("canvas", box);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `attention map of ${panel.name}; arrow keys move the choice`);
  const cells = document.createElement("canvas");
  cells.width = nTokens;
  cells.height = nTokens;
  return {
    name: panel.name,
    attention: decodeHalves(panel.a), // lower triangle, row by row
    valueNorm: decodeHalves(panel.w), // one number a key
    shown: new Float32Array(nTokens * nTokens), // what the controls ask for; 0 after the query
    canvas,
    cells,
    margin: 0, // left and below, for the tokens
  };
}

/** Fills `shown` of a map by what the controls ask for. */
function computeShown(map) {
  const firstKey = leaveOutFirst.checked ? 1 : 0;
  map.shown.fill(0);
  let rowStart = 0; // of this query in the lower triangle
  for (let query = 0; query < nTokens; query++) {
    // Without the first position, the rest of a row is scaled to add up to 1 again.
    let rowSum = 1;
    if (leaveOutFirst.checked) {
      const row = map.attention.subarray(rowStart + firstKey, rowStart + query + 1);
      rowSum = row.reduce((sum, weight) => sum + weight, 0) || 1;
    }
    for (let key = firstKey; key <= query; key++) {
      const weight = map.attention[rowStart + key] / rowSum;
      const factor = weightByValue.checked ? map.valueNorm[key] : 1;
      map.shown[query * nTokens + key] = weight * factor;
    }
    rowStart += query + 1;
  }
}

/** Colours the hidden canvas of a map, a pixel a cell; above the diagonal it stays clear. */
function colourCells(map) {
  const context = map.cells.getContext("2d");
  const image = context.createImageData(nTokens, nTokens);
  for (let query = 0; query < nTokens; query++) {
    for (let key = 0; key <= query; key++) {
      const cell = query * nTokens + key;
      const share = map.shown[cell] / largest;
      const place = logarithmic.checked ? 1 + Math.log10(share + 1e-9) / DECADES : share;
      image.data.set([...viridis(place), 255], 4 * cell);
    }
  }
  context.putImageData(image, 0, 0);
}

/** Draws a map as large as it is seen: its cells, the tokens on both axes, and a frame around the
 * row of the chosen query and the column of the chosen key. */
function drawMap(map) {
  const seen = map.canvas.clientWidth;
  if (!seen) {
    return; // closed
  }
  const sharp = window.devicePixelRatio || 1;
  map.canvas.width = seen * sharp;
  map.canvas.height = seen * sharp;
  const context = map.canvas.getContext("2d");
  context.scale(sharp, sharp);
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = printing ? "#000" : getComputedStyle(map.canvas).color;
  const widths = tokens.map((token) => context.measureText(token).width);
  map.margin = Math.min(Math.max(...widths) + 6, seen / 4);
  const side = seen - map.margin;
  const cell = side / nTokens;
  context.imageSmoothingEnabled = false;
  context.drawImage(map.cells, map.margin, 0, side, side);
  drawTokens(context, map.margin, side, cell);
  if (choice) {
    context.strokeStyle = MARK;
    context.lineWidth = Math.max(1.5, cell / 8);
    context.strokeRect(map.margin, choice.query * cell, side, cell);
    context.strokeRect(map.margin + choice.key * cell, 0, cell, side);
  }
}

/** The tokens left of the rows and below the columns; every second, third, ... where they are
 * many. */
function drawTokens(context, margin, side, cell) {
  const every = Math.ceil(11 / cell);
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (let place = 0; place < nTokens; place += every) {
    context.fillText(tokens[place], margin - 4, (place + 0.5) * cell, margin - 4);
    context.save();
    context.translate(margin + (place + 0.5) * cell, side + 4);
    context.rotate(-Math.PI / 2);
    context.fillText(tokens[place], 0, 0, margin - 4);
    context.restore();
  }
}

/** Says the numbers of the chosen query and key. */
function tellChoice() {
  const { query, key } = choice;
  const show = weightByValue.checked ? showNumber : showPercent;
  const numbers = maps.map((map) => `${map.name} ${show(map.shown[query * nTokens + key])}`);
  const place = `At “${letterOf(query)}” (${query}) on “${letterOf(key)}” (${key})`;
  document.getElementById("tell_map").textContent = `${place}: ${numbers.join("; ")}`;
}

function showChoice() {
  maps.forEach(drawMap);
  if (choice) {
    tellChoice();
  }
}

/** After a control was changed. */
function showMaps() {
  maps.forEach(computeShown);
  largest = 1e-9; // never a division by zero
  for (const map of maps) {
    largest = map.shown.reduce((most, value) => Math.max(most, value), largest);
  }
  const show = weightByValue.checked ? showNumber : showPercent;
  const least = logarithmic.checked ? largest / 10 ** DECADES : 0;
  const orLess = logarithmic.checked ? " or less" : "";
  document.getElementById("least").textContent = show(least) + orLess;
  document.getElementById("most").textContent = show(largest);
  maps.forEach(colourCells);
  showChoice();
}

/** Speaks of a query and a key; a query looks at nothing that comes after it. */
function chooseCell(query, key) {
  choice = { query, key: Math.min(key, query) };
  showChoice();
}

/** The [query, key] under the pointer. */
function cellUnderPointer(event, map) {
  const box = map.canvas.getBoundingClientRect();
  const cell = (box.width - map.margin) / nTokens;
  const row = Math.floor((event.clientY - box.top) / cell);
  const column = Math.floor((event.clientX - box.left - map.margin) / cell);
  return [limit(row, 0, nTokens - 1), limit(column, 0, nTokens - 1)];
}

/** Arrow keys on a map: up and down another query, left and right another key. */
function moveChoice(event) {
  const steps = {
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
  };
  const step = steps[event.key];
  if (!step) {
    return;
  }
  event.preventDefault(); // or the page scrolls
  const { query, key } = choice || { query: 0, key: 0 };
  chooseCell(limit(query + step[0], 0, nTokens - 1), limit(key + step[1], 0, nTokens - 1));
}

/** The text of a token. Where several make one letter the last has it, the others are empty. */
function letterOf(position) {
  return tokens.slice(position).find((text) => text !== "");
}

function listenToMaps() {
  for (const control of [leaveOutFirst, weightByValue, logarithmic]) {
    control.addEventListener("change", showMaps);
  }
  for (const map of maps) {
    map.canvas.addEventListener("pointermove", (event) => {
      if (!held) {
        chooseCell(...cellUnderPointer(event, map));
      }
    });
    map.canvas.addEventListener("click", (event) => {
      held = !held;
      chooseCell(...cellUnderPointer(event, map));
    });
    map.canvas.addEventListener("keydown", moveChoice);
  }
  // Their size and the colour of their letters follow the page.
  window.addEventListener("resize", showChoice);
  document.getElementById("map").addEventListener("toggle", showChoice);
  document.getElementById("theme").addEventListener("click", showChoice);
  for (const moment of ["beforeprint", "afterprint"]) {
    window.addEventListener(moment, () => {
      printing = moment === "beforeprint";
      showChoice();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showChoice);
}

document.querySelectorAll(".piece").forEach((paragraph, i) => makePiece(paragraph, data.windows[i]));
addScores();
drawHeads();
const maps = data.panels.map(makeMap);
listenToMaps();
showMaps();
