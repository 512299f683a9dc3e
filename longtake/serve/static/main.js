// The page: what the server is, a new video, those that play, keys.
import * as api from "./api.js";
import * as saves from "./saves.js";
import { View } from "./view.js";

const EXAMPLES = [
  ["cyan_square", "a cyan circle goes left and a small purple square rises"],
  ["yellow_cross", "a yellow cross slides upwards"],
  ["three_shapes", "a small cyan triangle races up and to the left, a small green circle drifts up and to the right, a blue square gently rises"],
  ["blue_cross", "a blue cross ascends slowly while a green triangle travels quickly to the left, a small purple triangle goes steadily diagonally up and right"],
];
const $ = (id) => document.getElementById(id);
const ASKED_EVERY = 5000; // milliseconds
let about = null; // what the server said of itself
let format = null; // in which videos come
let used = null; // the view that keys steer
let chosen = null; // the picture of the next video

// ---- the server ----------------------------------------------------------------------------------------------------
async function begin() {
  try {
    about = await api.info();
    format = await formatOf(about.stream);
  } catch (error) {
    if (error.status === 401) return askToken(error);
    $("server").textContent = error.message;
    return setTimeout(begin, 2000);
  }
  const { model } = about;
  showServer();
  $("drop").style.setProperty("--ratio", model.width / model.height);
  $("picture-part").hidden = model.picture === "none";
  $("guidance").placeholder = String(model.guidance);
  if (Math.min(model.height, model.width) <= 128 && model.picture !== "none") showExamples();
  if (model.picture === "optional") $("drop-text").textContent = "Choose or drop a picture, or go without";
  showSaved();
  for (const session of saves.playing()) goOn(session);
  setInterval(() => document.hidden || ask(), ASKED_EVERY);
}

async function ask() {
  try {
    about = await api.info();
    showServer();
  } catch (error) {
    $("server").textContent = error.message;
  }
}

function showServer() {
  const { model, sessions } = about;
  const queued = sessions.queued ? `, ${sessions.queued} waiting` : "";
  const text = `${model.width}x${model.height}, ${model.fps} frames/s; ${sessions.now} of ${sessions.most} playing${queued}`;
  if ($("server").textContent !== text) $("server").textContent = text;
}

function askToken() {
  const dialog = $("token-dialog");
  $("server").textContent = "This server needs a token";
  dialog.onclose = () => {
    api.keepToken($("token").value.trim());
    $("token").value = "";
    begin();
  };
  $("token-message").textContent = api.token() ? "It was not taken." : "";
  dialog.showModal();
}

// WebCodecs, which pages have that are secure, else MediaSource, else pictures; ?format=png shows them without loss
async function formatOf({ formats, codec }) {
  const wanted = new URLSearchParams(location.search).get("format");
  if (formats.includes(wanted)) return wanted;
  if (window.VideoDecoder && (await VideoDecoder.isConfigSupported({ codec })).supported) return "h264";
  return window.MediaSource?.isTypeSupported(`video/mp4; codecs="${codec}"`) ? "mp4" : "png";
}

// ---- a new video ---------------------------------------------------------------------------------------------------
function choose(file, name) {
  chosen = file;
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = false;
  preview.alt = `The picture: ${name}`;
  preview.onload = () => preview.classList.toggle("small", preview.naturalWidth <= 128);
  $("drop-text").textContent = "";
  for (const button of $("examples").children) button.setAttribute("aria-pressed", String(button.dataset.name === name));
}

function showExamples() {
  const buttons = EXAMPLES.map(([name, prompt]) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    button.dataset.name = name;
    button.setAttribute("aria-label", `Example: ${prompt}`);
    image.src = `/static/examples/${name}.png`;
    image.alt = "";
    button.append(image);
    button.onclick = async () => {
      choose(await (await fetch(image.src)).blob(), name);
      $("prompt").value = prompt;
    };
    return button;
  });
  $("examples").replaceChildren(...buttons);
}

$("picture").onchange = ({ target }) => target.files[0] && choose(target.files[0], target.files[0].name);
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) choose(event.dataTransfer.files[0], event.dataTransfer.files[0].name);
  });
}

$("start").onsubmit = async (event) => {
  event.preventDefault();
  const asked = performance.now();
  const prompt = $("prompt").value.trim();
  const message = $("start-message");
  message.textContent = "";
  if (!chosen && about?.model.picture === "needed") {
    message.textContent = "These weights begin with a picture; choose or drop one.";
    return;
  }
  const fields = { prompt, image: chosen, seed: $("seed").value, guidance: $("guidance").value, negative: $("negative").value };
  try {
    const { id, secret } = await api.create(fields);
    $("new").open = false;
    show({ id, secret }, prompt, asked).root.focus();
  } catch (error) {
    message.textContent = error.message;
  }
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("start").requestSubmit();
};

// ---- those that play -----------------------------------------------------------------------------------------------
function show(session, prompt, asked) {
  const { model } = about;
  const on = { used: use, forked: show, saved: keepSave, closed: left };
  const view = new View(session, { format, fps: model.fps, model, prompt, asked, on });
  $("views").append(view.root);
  saves.plays(session);
  use(view);
  view.root.scrollIntoView({ block: "nearest" });
  ask();
  return view;
}

// A session that played in this tab before the page was loaded anew.
async function goOn(session) {
  try {
    const { prompt } = await api.state(session);
    $("new").open = false;
    show(session, prompt);
  } catch (error) {
    if (error.status) saves.playsNoMore(session);
  }
}

// `view` is gone from the page, and when `gone` is done from the server.
function left(view, gone) {
  saves.playsNoMore(view.session);
  used = null;
  const next = $("views").firstElementChild?.view;
  if (next) use(next);
  else $("new").open = true;
  (next?.root ?? $("prompt")).focus();
  gone.then(ask);
}

function use(view) {
  used = view;
  const { children } = $("views");
  for (const { view: one, classList } of children) classList.toggle("used", one === view && children.length > 1);
}

function keepSave(view, save, frame) {
  const prompt = view.part(".prompt-label textarea").value;
  saves.keep({ ...view.session, save, frame, prompt });
  showSaved();
}

function showSaved() {
  const list = saves.all();
  $("saved").hidden = list.length === 0;
  $("saved-list").replaceChildren(...list.map(savedItem));
}

function savedItem(one) {
  const item = document.createElement("li");
  const open = document.createElement("button");
  const forget = document.createElement("button");
  open.type = forget.type = "button";
  open.textContent = `${one.prompt.length > 60 ? `${one.prompt.slice(0, 58)}\u2026` : one.prompt}, frame ${one.frame}`;
  open.title = "Go on from this save";
  open.onclick = () => reopen(one);
  forget.textContent = "\u00d7";
  forget.setAttribute("aria-label", `Forget the save at frame ${one.frame}`);
  forget.onclick = () => {
    saves.forget(one);
    showSaved();
  };
  item.append(open, forget);
  return item;
}

async function reopen(one) {
  const asked = performance.now();
  for (const { view } of [...$("views").children]) {
    if (view.session.id === one.id) {
      view.end();
      view.root.remove();
    }
  }
  try {
    const { id, secret } = await api.open({ id: one.id, secret: one.secret }, one.save);
    $("new").open = false;
    show({ id, secret }, one.prompt, asked).root.focus();
  } catch (error) {
    $("start-message").textContent = error.message;
  }
}

// ---- keys ----------------------------------------------------------------------------------------------------------
const keys = { " ": "pause", ArrowLeft: "back", f: "fork", s: "save" };
addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, dialog");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") return $("help").showModal();
  if (event.key === "n") {
    $("new").open = true;
    $("prompt").focus();
    return event.preventDefault();
  }
  if (!used || (event.key === " " && event.target.closest("button, summary"))) return;
  if (event.key === "p") used.part(".prompt-label textarea").focus();
  else if (keys[event.key]) used.button(keys[event.key]).click();
  else return;
  event.preventDefault();
});
$("help-button").onclick = () => $("help").showModal();

begin();
