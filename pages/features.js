"use strict";

// One feature at a time, the order of the index, and what the tokens' values are.

const sections = [...document.querySelectorAll(".feature")];
const headings = [...document.querySelectorAll(".index th[aria-sort]")];
const body = document.querySelector(".index tbody");

/** The features' addresses (#f12) in the order of the index. */
function addresses() {
  return [...body.querySelectorAll("a")].map((link) => link.getAttribute("href"));
}

/** Leads each feature to its neighbours in the index; the first and the last have only one. */
function linkNeighbours() {
  const order = addresses();
  order.forEach((address, place) => {
    const section = document.querySelector(address);
    const steps = { previous: order[place - 1], next: order[place + 1] };
    for (const [name, target] of Object.entries(steps)) {
      const link = section.querySelector(`nav .${name}`);
      link.href = target || "#index";
      link.hidden = !target;
    }
  });
}

/** Shows the feature of the page's address, the first one if there is none. */
function showFeature() {
  const asked = sections.find((section) => `#${section.id}` === location.hash);
  const shown = asked || sections.find((section) => !section.hidden) || sections[0];
  for (const section of sections) {
    section.hidden = section !== shown;
  }
  for (const row of body.rows) {
    row.classList.toggle("shown", row.querySelector("a").hash === `#${shown.id}`);
  }
  if (asked) {
    asked.scrollIntoView();
  }
}

/** Goes to a neighbour, and keeps the keyboard on the link that led there. */
function step(event) {
  const name = event.target.className;
  const target = document.querySelector(event.target.hash);
  event.preventDefault();
  location.hash = event.target.hash;
  showFeature();
  const links = [...target.querySelectorAll("nav a")];
  const same = links.find((link) => link.className === name && !link.hidden);
  (same || links.find((link) => !link.hidden)).focus({ preventScroll: true });
}

/** Value of a row in a column; what has none counts as the smallest. */
function valueIn(row, column) {
  const text = row.cells[column].dataset.value;
  return text === "" || text === "nan" ? -Infinity : Number(text);
}

/** Sorts the index by a column: first the largest on top, then the smallest. */
function sortBy(heading) {
  const column = heading.cellIndex;
  const startsUp = column < 2; // place and number of the feature
  const was = heading.getAttribute("aria-sort");
  const isUp = was === "none" ? startsUp : was === "descending";
  for (const other of headings) {
    other.setAttribute("aria-sort", "none");
  }
  heading.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  const sign = isUp ? 1 : -1;
  const rows = [...body.rows];
  rows.sort((a, b) => sign * (valueIn(a, column) - valueIn(b, column)) || 0);
  body.append(...rows);
  linkNeighbours();
}

/** Says the value of a token that is pointed at, or all values of a line that has the focus. */
function tell(section, element) {
  const line = element.closest(".context");
  if (!line) {
    return;
  }
  const tokens = element === line ? [...line.querySelectorAll("span[title]")] : [element];
  const values = tokens.filter((token) => token.title).map((token) => {
    return `“${token.textContent}” ${token.title}`;
  });
  if (values.length) {
    section.querySelector(".tell").textContent = values.join(", ");
  }
}

for (const heading of headings) {
  heading.querySelector("button").addEventListener("click", () => sortBy(heading));
}
for (const section of sections) {
  for (const link of section.querySelectorAll("nav .previous, nav .next")) {
    link.addEventListener("click", step);
  }
  for (const kind of ["mouseover", "click", "focusin"]) {
    section.addEventListener(kind, (event) => tell(section, event.target));
  }
}
addEventListener("hashchange", showFeature);
linkNeighbours();
for (const section of sections.slice(1)) {
  section.hidden = true;
}
showFeature();
