"use strict";
const texts = JSON.parse(document.getElementById("stages")?.textContent ?? "[]");

function path(cells, columns) {
  return cells.map((cell) => `M${cell % columns} ${Math.floor(cell / columns)}h1v1h-1z`).join("");
}

function place(cell, columns) {
  return `row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}`;
}

const samples = [...document.querySelectorAll(".sample")].map((sample) => {
  const stage = sample.querySelector(".stage");
  const token = sample.querySelector(".token");
  const said = sample.querySelector(".stage-text");
  const overlays = [...sample.querySelectorAll("[data-stage]")];
  const groups = JSON.parse(sample.querySelector(".groups")?.textContent ?? "[]");
  const marks = sample.querySelector(".marks");
  const columns = Number(marks?.dataset.columns);
  let tokens = [];

  function choose() {
    const members = tokens[token.value - 1]?.[1] ?? [];
    const owner = tokens[token.value - 1]?.[0];
    marks.querySelector(".chosen").setAttribute("d", path(members, columns));
    for (const each of marks.querySelectorAll(".owner, .owner-in")) {
      each.setAttribute("d", owner === undefined ? "" : path([owner], columns));
    }
    const text =
      owner === undefined
        ? "none chosen"
        : `token at ${place(owner, columns)}: ${members.length} ${members.length === 1 ? "patch" : "patches"}`;
    sample.querySelector(".token-text").textContent = text;
    token.setAttribute("aria-valuetext", text);
  }

  function show(index) {
    stage.value = index;
    said.textContent = texts[index];
    stage.setAttribute("aria-valuetext", texts[index]);
    for (const overlay of overlays) {
      overlay.toggleAttribute("hidden", Number(overlay.dataset.stage) !== index);
    }
    if (!groups.length) return;
    const members = new Map();
    groups[index].forEach((owner, cell) => members.set(owner, [...(members.get(owner) ?? []), cell]));
    tokens = [...members].sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
    token.max = tokens.length;
    token.value = 0;
    choose();
  }

  stage.addEventListener("input", () => show(Number(stage.value)));
  if (groups.length) {
    token.addEventListener("input", choose);
    sample.querySelector(".frame").addEventListener("click", (event) => {
      const box = marks.ownerSVGElement.getBoundingClientRect();
      const view = marks.ownerSVGElement.viewBox.baseVal;
      const row = Math.floor((((event.clientY - box.top) / box.height) * view.height) / Number(marks.dataset.high));
      const column = Math.floor((((event.clientX - box.left) / box.width) * view.width) / Number(marks.dataset.wide));
      const owner = groups[Number(stage.value)][row * columns + column];
      token.value = tokens.findIndex((each) => each[0] === owner) + 1;
      choose();
    });
  }
  show(Number(stage.value));
  return show;
});

const all = document.getElementById("all");
all?.addEventListener("input", () => {
  all.setAttribute("aria-valuetext", texts[Number(all.value)]);
  document.getElementById("all-text").textContent = texts[Number(all.value)];
  for (const show of samples) show(Number(all.value));
});
