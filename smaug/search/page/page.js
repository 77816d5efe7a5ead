// The page asks its own server for hits, pictures and videos, by number, and nobody else for anything.
"use strict";

const form = document.getElementById("form");
const text = document.getElementById("text");
const windows = document.getElementById("windows");
const status = document.getElementById("status");
const list = document.getElementById("hits");
let asked = 0; // an answer to an older question is thrown away

function say(words, wrong = false) {
  status.textContent = words;
  status.classList.toggle("error", wrong);
}

// Text goes in as text, so a file may be called anything.
function make(tag, className, words) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (words !== undefined) element.textContent = words;
  return element;
}

async function reasonOf(address) {
  try {
    const answer = await fetch(address, { headers: { Range: "bytes=0-0" } });
    if (answer.ok) return "";
    return (await answer.json()).error;
  } catch {
    return "the server does not answer; is it still running?";
  }
}

function play(hit, screen, note) {
  const place = make("div", "screen");
  screen.replaceWith(place);
  if (hit.picture) {
    const picture = make("img");
    picture.alt = hit.file;
    picture.addEventListener("error", async () => {
      picture.src = `thumbnail/${hit.row}`;
      note.textContent = (await reasonOf(`file/${hit.row}`)) || "This browser cannot show the file itself.";
    }, { once: true });
    picture.src = `file/${hit.row}`;
    place.append(picture);
    return;
  }
  const video = make("video");
  video.controls = video.autoplay = video.playsInline = true;
  video.preload = "metadata";
  video.poster = `thumbnail/${hit.row}`;
  video.setAttribute("aria-label", `${hit.file}, ${hit.when}`);
  let instead = false;
  async function preview() {
    if (instead) {
      note.textContent = (await reasonOf(`preview/${hit.row}`)) || "This browser cannot play the preview.";
      return;
    }
    instead = true;
    const reason = await reasonOf(`file/${hit.row}`);
    if (reason) {
      note.textContent = reason;
      return;
    }
    note.textContent = "This browser cannot play the file; this is a preview of the window: its middle square, without sound.";
    video.src = `preview/${hit.row}`;
  }
  video.addEventListener("error", preview);
  video.addEventListener("play", () => {
    for (const other of document.querySelectorAll("video")) if (other !== video) other.pause();
  });
  video.addEventListener("loadedmetadata", () => {
    if (!video.videoWidth) preview(); // it plays the sound alone
    else if (!instead && hit.start > 0) video.currentTime = hit.start;
  });
  video.src = `file/${hit.row}`;
  place.append(video);
  video.focus();
}

function card(hit, number) {
  const item = make("li");
  const screen = make("button", hit.picture ? "screen picture" : "screen");
  screen.type = "button";
  screen.setAttribute("aria-label", `${number}: play ${hit.file}, ${hit.when}`);
  const picture = make("img");
  picture.alt = "";
  picture.loading = number > 8 ? "lazy" : "eager";
  const note = make("p", "note");
  note.setAttribute("role", "status");
  picture.addEventListener("error", async () => {
    note.textContent = (await reasonOf(picture.src)) || "There is no picture of it.";
  });
  picture.src = `thumbnail/${hit.row}`;
  screen.append(picture);
  screen.addEventListener("click", () => play(hit, screen, note));
  const about = make("div", "about");
  const facts = make("div", "facts");
  facts.append(make("span", "", hit.when), make("span", "", `score ${hit.score.toFixed(3)}`));
  about.append(make("div", "file", hit.file), facts, note);
  item.append(screen, about);
  return item;
}

async function search() {
  const words = text.value.trim();
  const mine = ++asked;
  list.replaceChildren();
  if (!words) {
    say("");
    return;
  }
  say("Searching ...");
  const query = new URLSearchParams({ q: words });
  if (windows.checked) query.set("windows", "1");
  let hits, unknown;
  try {
    const answer = await fetch(`search?${query}`);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    ({ hits, unknown } = found);
  } catch (error) {
    if (mine === asked) say(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message, true);
    return;
  }
  if (mine !== asked) return;
  const note = unknown.length ? ` The model does not know: ${unknown.join(", ")}.` : "";
  say((hits.length ? `The ${hits.length} best, best first. A score only ranks: something is best even for what no clip shows.` : "Nothing was found.") + note);
  list.replaceChildren(...hits.map((hit, place) => card(hit, place + 1)));
}

function fromAddress() {
  const query = new URLSearchParams(location.search);
  text.value = query.get("q") || "";
  windows.checked = query.get("windows") === "1";
  search();
}

function ask() {
  const query = new URLSearchParams({ q: text.value });
  if (windows.checked) query.set("windows", "1");
  history.pushState(null, "", `?${query}`);
  search();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
windows.addEventListener("change", () => text.value.trim() && ask());
window.addEventListener("popstate", fromAddress);
fromAddress();
