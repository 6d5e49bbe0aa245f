// The interactive part of the hero page: attention maps of one text, and the loss impact of every
// head.
//
// A map has a row a query (a position that looks) and a column a key (a position that is looked
// at). The page carries for each map the attention of the lower triangle, row by row, and for each
// key the length of what its value writes.

const data = JSON.parse(document.getElementById("data").textContent);
const tokens = data.tokens;
const nTokens = tokens.length;

const strip = document.getElementById("strip");
const tell = document.getElementById("tell");
const leaveOutFirst = document.getElementById("leave_out_first");
const weightByValue = document.getElementById("weight_by_value");
const logarithmic = document.getElementById("logarithmic");

// A whole number of pixels a cell, about 768 for a map, so that no cell is blurred.
const pixelsPerCell = Math.max(1, Math.round(768 / nTokens));
const MARK = "#d55e00";
const DECADES = 4; // of the logarithmic colour scale

// Viridis at six places, as red, green, blue.
const VIRIDIS = [
  [68, 1, 84],
  [65, 68, 135],
  [42, 120, 142],
  [34, 168, 132],
  [122, 209, 81],
  [253, 231, 37],
];

let choice = null; // {query, key}: what is spoken of
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

/** Three significant digits; "?" where there is no number. */
function showNumber(value) {
  return value == null ? "?" : value.toPrecision(3);
}

function limit(value, low, high) {
  return Math.max(low, Math.min(high, value));
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

// ------------------------------------------------------------------ the maps

/** A panel of the data as a map: numbers, the canvas that is seen, a hidden one, a pixel a cell. */
function makeMap(panel) {
  const box = addElement("div", document.getElementById("maps"));
  addElement("strong", box, panel.name);
  const canvas = addElement("canvas", box);
  canvas.width = nTokens * pixelsPerCell;
  canvas.height = nTokens * pixelsPerCell;
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

/** Draws a map, and a frame around the row of the chosen query and the column of the chosen key. */
function drawMap(map) {
  const context = map.canvas.getContext("2d");
  const side = nTokens * pixelsPerCell;
  context.clearRect(0, 0, side, side);
  context.imageSmoothingEnabled = false;
  context.drawImage(map.cells, 0, 0, side, side);
  if (choice) {
    context.strokeStyle = MARK;
    context.lineWidth = Math.max(2, pixelsPerCell / 8);
    context.strokeRect(0, choice.query * pixelsPerCell, side, pixelsPerCell);
    context.strokeRect(choice.key * pixelsPerCell, 0, pixelsPerCell, side);
  }
}

/** Shades the tokens by what the chosen query of the first map looks at. */
function shadeStrip() {
  [...strip.children].forEach((element, position) => {
    const isKey = position <= choice.query;
    const share = isKey ? maps[0].shown[choice.query * nTokens + position] / largest : 0;
    element.style.background = isKey ? `rgba(0, 114, 178, ${0.7 * share})` : "";
    const isChosen = position === choice.query || position === choice.key;
    element.classList.toggle("chosen", isChosen);
  });
}

/** Says the numbers of the chosen query and key. */
function tellChoice() {
  const { query, key } = choice;
  const numbers = maps.map((map) => `${map.name} ${showNumber(map.shown[query * nTokens + key])}`);
  const place = `query ${query} ${letterOf(query)}, key ${key} ${letterOf(key)}`;
  tell.textContent = `${place}: ${numbers.join("; ")}`;
}

function showChoice() {
  maps.forEach(drawMap);
  if (choice) {
    shadeStrip();
    tellChoice();
  }
}

/** After a control was changed. */
function showAll() {
  maps.forEach(computeShown);
  largest = 1e-9; // never a division by zero
  for (const map of maps) {
    largest = map.shown.reduce((most, value) => Math.max(most, value), largest);
  }
  maps.forEach(colourCells);
  showChoice();
}

// ------------------------------------------------------------------ pointer and keyboard

/** Speaks of a query and a key; a query looks at nothing that comes after it. */
function choose(query, key) {
  choice = { query, key: Math.min(key, query) };
  showChoice();
}

function point(query, key) {
  if (!held) {
    choose(query, key);
  }
}

function click(query, key) {
  held = !held;
  choose(query, key);
}

/** The [query, key] under the pointer. */
function cellUnderPointer(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.width) * nTokens);
  const column = Math.floor(((event.clientX - box.left) / box.width) * nTokens);
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
  choose(limit(query + step[0], 0, nTokens - 1), limit(key + step[1], 0, nTokens - 1));
}

/** The text of a token. Where several make one letter the last has it, the others are empty. */
function letterOf(position) {
  return tokens.slice(position).find((text) => text !== "");
}

/** The text, a token an element. */
function addTokens() {
  tokens.forEach((token, position) => {
    const element = addElement("span", strip, token);
    element.addEventListener("pointerenter", () => point(position, position));
    element.addEventListener("click", () => click(position, position));
  });
}

function listen() {
  for (const control of [leaveOutFirst, weightByValue, logarithmic]) {
    control.addEventListener("change", showAll);
  }
  for (const map of maps) {
    map.canvas.addEventListener("pointermove", (event) => point(...cellUnderPointer(event)));
    map.canvas.addEventListener("click", (event) => click(...cellUnderPointer(event)));
    map.canvas.addEventListener("keydown", moveChoice);
  }
}

// ------------------------------------------------------------------ the loss impact of every head

/** A cell of the table of heads, which says its numbers when it is pointed at. */
function addHead(row, head, largestImpact) {
  const cell = addElement("td", row);
  const [red, green, blue] = viridis(head.delta / largestImpact);
  cell.style.background = `rgb(${red}, ${green}, ${blue})`;
  cell.classList.toggle("studied", head.studied);
  cell.tabIndex = 0;
  const tellHead = () => {
    const interval = `95 % [${showNumber(head.ci_lo)}, ${showNumber(head.ci_hi)}]`;
    const impact = `${showNumber(head.delta)} nats a token, ${interval}, rank ${head.rank}`;
    tell.textContent = `${head.run} L${head.layer}H${head.head}: ${impact}`;
  };
  for (const kind of ["pointerenter", "click", "focus"]) {
    cell.addEventListener(kind, tellHead);
  }
}

/** A table a run, a row a layer, a cell a head. */
function addHeads() {
  const largestImpact = Math.max(...data.grid.map((head) => head.delta), 1e-9);
  for (const run of new Set(data.grid.map((head) => head.run))) {
    const box = addElement("div", document.getElementById("heads"));
    addElement("strong", box, `${run}: loss impact of every head (rows: layers)`);
    const frame = addElement("div", box);
    frame.className = "scroll";
    const table = addElement("table", frame);
    const heads = data.grid.filter((head) => head.run === run);
    for (const layer of new Set(heads.map((head) => head.layer))) {
      const row = addElement("tr", table);
      heads
        .filter((head) => head.layer === layer)
        .forEach((head) => addHead(row, head, largestImpact));
    }
  }
}

const maps = data.panels.map(makeMap);
addTokens();
addHeads();
listen();
showAll();
