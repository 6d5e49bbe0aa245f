"use strict";

/** Switches between light and dark; until then the page follows the system. */
function switchTheme() {
  const root = document.documentElement;
  const systemTheme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = root.dataset.theme || systemTheme;
  root.dataset.theme = theme === "dark" ? "light" : "dark";
}

document.getElementById("theme").addEventListener("click", switchTheme);
