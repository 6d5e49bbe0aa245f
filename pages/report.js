// The tables of every head's loss impact: which mode is shown, and what a head says when it is
// pointed at.

/** Shows the tables of one mode of ablation. */
function showMode(grid, mode) {
  for (const button of grid.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.show === mode));
  }
  for (const table of grid.querySelectorAll(".heat")) {
    table.hidden = table.dataset.mode !== mode;
  }
}

/** Says the numbers of the head that is pointed at or has the focus. */
function tellHead(grid, cell) {
  if (cell.dataset.tell) {
    grid.querySelector(".tell").textContent = cell.dataset.tell;
  }
}

for (const grid of document.querySelectorAll(".grid")) {
  for (const button of grid.querySelectorAll("button")) {
    button.addEventListener("click", () => showMode(grid, button.dataset.show));
  }
  grid.addEventListener("mouseover", (event) => tellHead(grid, event.target));
  grid.addEventListener("focusin", (event) => tellHead(grid, event.target));
}

/** Opens what is closed while the page is printed. */
function openForPrint() {
  for (const part of document.querySelectorAll("details:not([open])")) {
    part.open = true;
    part.dataset.closed = "";
  }
}

/** Closes it again. */
function closeAfterPrint() {
  for (const part of document.querySelectorAll("details[data-closed]")) {
    part.open = false;
    delete part.dataset.closed;
  }
}

addEventListener("beforeprint", openForPrint);
addEventListener("afterprint", closeAfterPrint);
