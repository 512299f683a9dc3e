// One session on the page: its picture, its buttons, its history.
import * as api from "./api.js";
import { CanvasPlayer } from "./canvas_player.js";
import { Connection } from "./connection.js";
import * as saves from "./saves.js";
import { VideoPlayer } from "./video_player.js";

const SMALL = 128; // pixels: pictures below are shown with their pixels
const SHOWN_EVERY = 125; // milliseconds
const NOTED_FOR = 2500; // milliseconds
const ENDS = {
  deleted: "Closed.", idle: "Ended: nobody watched.", time: "Ended: it had run as long as it may.",
  ending: "The server stops.", failed: "It failed on the server.", out_of_memory: "The server ran out of memory for it.",
  replaced: "It was opened elsewhere.",
};

function nameOf({ kind, prompt, has_picture: hasPicture }) {
  if (kind === "prompt") return prompt;
  if (kind === "image") return hasPicture ? "Cut to a picture" : "Cut to a scene without a picture";
  return hasPicture ? "Towards a picture" : "No target any more";
}

export class View {
  // on: {used(view), forked(session, prompt), saved(view, save), closed(view, gone)}
  constructor(session, { format, fps, model, prompt = "", asked = performance.now(), on }) {
    Object.assign(this, { session, format, fps, model, on });
    this.root = document.getElementById("view").content.firstElementChild.cloneNode(true);
    this.root.setAttribute("aria-label", `Video ${session.id.slice(0, 6)}`);
    this.root.style.setProperty("--ratio", model.width / model.height);
    this.root.view = this;
    this.part = (selector) => this.root.querySelector(selector);
    this.button = (name) => this.part(`[data-do="${name}"]`);
    this.player = null;
    this.state = null;
    this.isHeld = false;
    this.changes = [];
    this.pictures = new Map(); // number of a change -> address of the picture that was given for it here
    this.firstShown = new Map(); // number of a change -> when its first frame was on the screen
    this.asked = new Map([[0, asked]]); // number of a change -> when it was asked for
    this.part(".prompt-label textarea").value = prompt;
    this.part(".stage").classList.toggle("small", Math.min(model.height, model.width) <= SMALL);
    this.part("[data-picture=image]").hidden = model.picture === "none";
    this.part("[data-picture=target]").hidden = !model.target;
    this.cover("Starting");
    this.listen();
    this.connection = new Connection(session, format, () => this.player?.position ?? null, {
      event: (message) => this[`on_${message.type}`]?.(message),
      chunk: (...given) => this.player?.push(...given),
      away: (seconds) => this.cover(`The connection broke; again in ${seconds} s`),
      gone: (bye) => this.gone(bye),
    });
    this.timer = setInterval(() => this.report(), SHOWN_EVERY);
  }

  // ---- what is pressed -------------------------------------------------------------------------------------------
  listen() {
    const todo = {
      pause: () => this.hold(!this.isHeld), back: () => this.rewind({ blocks: 1 }), fork: () => this.fork(),
      save: () => this.save(), recording: () => this.download("recording", "mp4"),
      script: () => this.download("script", "zip"), close: () => this.close(),
      "no-target": () => this.picture("target", null),
    };
    for (const [name, work] of Object.entries(todo)) this.button(name).onclick = () => this.try(work);
    this.root.addEventListener("pointerdown", () => this.on.used(this));
    this.root.addEventListener("focusin", () => this.on.used(this));
    const form = this.part(".steer");
    form.onsubmit = (event) => {
      event.preventDefault();
      this.try(() => this.prompt(form.querySelector("textarea").value.trim()));
    };
    form.querySelector("textarea").onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    };
    for (const label of form.querySelectorAll("[data-picture]")) {
      const input = label.querySelector("input");
      input.onchange = () => {
        const [file] = input.files;
        input.value = "";
        if (file) this.try(() => this.picture(label.dataset.picture, file));
      };
    }
  }

  async try(work) {
    this.say("");
    try {
      await work();
    } catch (error) {
      this.say(error.message);
    }
  }

  get drop() {
    return this.part(".check input").checked;
  }

  async prompt(text) {
    if (text) await this.change(() => api.prompt(this.session, text, this.drop));
  }

  async picture(kind, file) {
    const number = await this.change(() => api.picture(this.session, kind, file, this.drop));
    if (file) this.pictures.set(number, URL.createObjectURL(file));
    this.drawChanges();
  }

  async change(work) {
    const now = performance.now();
    this.report(); // what was not shown by now is made anew
    const { from_frame: frame, number } = await work();
    this.asked.set(number, now);
    if (this.firstShown.has(number)) this.tellLatency(number);
    else this.cover(`Holds from frame ${frame}`);
    if (this.isHeld) await this.hold(false);
    return number;
  }

  async hold(isHeld) {
    this.held(isHeld);
    await api.tell(this.session, isHeld ? "pause" : "resume");
  }

  async rewind(where) {
    await api.rewind(this.session, where);
  }

  async fork() {
    const branch = await api.tell(this.session, "fork");
    this.on.forked({ id: branch.id, secret: branch.secret }, this.part(".prompt-label textarea").value);
  }

  async save() {
    const { save, frame } = await api.tell(this.session, "save");
    this.note(`Saved at frame ${frame}`);
    this.on.saved(this, save, frame);
  }

  async download(what, suffix) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await api.download(this.session, what));
    link.download = `longtake-${this.session.id.slice(0, 8)}.${suffix}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  async close() {
    this.end();
    this.root.remove();
    const gone = api.remove(this.session).catch(() => {}); // it may be gone already
    this.on.closed(this, gone);
    await gone;
  }

  // ---- what the server says --------------------------------------------------------------------------------------
  on_hello(message) {
    if (this.player) this.player.again();
    else this.player = this.newPlayer(message.stream);
    this.fps = message.stream.fps;
    this.part(".strip").replaceChildren();
    for (const block of message.blocks) this.addBlock(block);
    this.changes = message.changes;
    const text = this.part(".prompt-label textarea");
    text.value ||= message.prompt;
    this.cover("");
    this.on_state(message);
  }

  newPlayer(stream) {
    const isCanvas = stream.format !== "mp4";
    const [canvas, video] = [this.part("canvas"), this.part("video")];
    canvas.hidden = !isCanvas;
    video.hidden = isCanvas;
    const Player = isCanvas ? CanvasPlayer : VideoPlayer;
    (isCanvas ? canvas : video).setAttribute("aria-label", "The video");
    (isCanvas ? canvas : video).setAttribute("role", "img");
    const player = new Player(isCanvas ? canvas : video, stream, (frame, number) => this.shown(frame, number));
    video.onerror = () => this.say(`The browser cannot play it: ${video.error?.message}; add ?format=png to the address`);
    player.pause(this.isHeld);
    return player;
  }

  on_state(state) {
    this.state = state;
    this.held(state.state === "paused");
    if (state.state === "queued") {
      const wait = state.estimate_seconds === null ? "" : `, about ${Math.ceil(state.estimate_seconds)} s`;
      this.cover(`Waiting for the machine: place ${state.place}${wait}`);
    } else if (state.state === "playing") this.cover("");
    this.drawChanges();
  }

  on_block(block) {
    this.addBlock(block, block.thumbnail);
    const strip = this.part(".strip");
    while (strip.children.length > Math.max(block.rewindable, 1)) strip.firstChild.remove();
    strip.scrollLeft = strip.scrollWidth;
  }

  on_change(change) {
    this.changes.push(change);
    this.drawChanges();
  }

  on_rewound({ from_frame: frame, number, reason }) {
    this.player?.forget(frame);
    this.changes = this.changes.filter((change) => change.number <= number && change.from_frame <= frame);
    for (const item of [...this.part(".strip").children]) if (Number(item.dataset.frame) >= frame) item.remove();
    if (reason === "rewind") this.note(`Back at frame ${frame}`);
    if (reason === "rewind" && this.isHeld) this.player?.still(this.part(".strip").lastChild?.querySelector("img"));
    this.drawChanges();
  }

  on_stats(stats) {
    this.tell("fps", stats.frames_per_second ? stats.frames_per_second.toFixed(1) : null); // 0: none measured yet
    this.tell("rtf", stats.real_time_factor ? stats.real_time_factor.toFixed(2) : null);
    this.tell("ahead", stats.blocks_ahead);
    this.tell("memory", stats.memory_bytes ? `${(stats.memory_bytes / 2 ** 30).toFixed(1)} GiB` : null);
  }

  on_recording_ended({ error }) {
    this.say(`${error.message}; ${error.fix}`);
  }

  on_error({ error }) {
    this.say(error.fix ? `${error.message}; ${error.fix}` : error.message);
  }

  gone(bye) {
    clearInterval(this.timer);
    this.cover((ENDS[bye.reason] ?? "Ended.") + (bye.reopens ? " Its last save can be opened again." : ""));
    for (const name of ["pause", "back", "fork", "save"]) this.button(name).disabled = true;
    for (const one of this.root.querySelectorAll(".steer button, .strip button")) one.disabled = true;
    saves.playsNoMore(this.session);
  }

  // ---- what is shown ---------------------------------------------------------------------------------------------
  shown(frame, number) {
    this.tell("frame", frame);
    if (!this.firstShown.has(number)) {
      if (frame === 0 && this.model.picture === "needed") return; // the picture itself: nothing was made for it
      this.firstShown.set(number, performance.now());
      this.cover("");
      this.tellLatency(number);
      this.drawChanges();
    }
  }

  tellLatency(number) {
    if (!this.asked.has(number)) return;
    const seconds = (this.firstShown.get(number) - this.asked.get(number)) / 1000;
    this.tell("latency", `${seconds.toFixed(2)} s`);
  }

  report() {
    const position = this.player?.position ?? null;
    if (position !== null) this.connection.shown(position);
  }

  held(isHeld) {
    this.isHeld = isHeld;
    this.player?.pause(isHeld);
    this.button("pause").textContent = isHeld ? "Play" : "Pause";
    if (isHeld) this.cover("Paused");
    else if (this.part(".cover").textContent === "Paused") this.cover("");
  }

  addBlock(block, thumbnail) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    const label = document.createElement("span");
    const at = this.time(block.first_frame);
    item.dataset.frame = block.first_frame;
    button.type = "button";
    button.title = `Go on from ${at}, frame ${block.first_frame}`;
    button.setAttribute("aria-label", button.title);
    button.onclick = () => this.try(() => this.rewind({ to_frame: block.first_frame }));
    image.alt = "";
    if (thumbnail) image.src = thumbnail;
    else this.fetchThumbnail(image, block.first_frame);
    label.textContent = at;
    button.append(image, label);
    item.append(button);
    item.classList.toggle("changed", block.number > Number(this.part(".strip").lastChild?.dataset.number ?? 0));
    item.dataset.number = block.number;
    this.part(".strip").append(item);
  }

  async fetchThumbnail(image, frame) {
    try {
      image.src = URL.createObjectURL(await api.download(this.session, `thumbnails/${frame}`));
      image.onload = () => URL.revokeObjectURL(image.src);
    } catch {
      image.removeAttribute("src"); // it is no longer kept
    }
  }

  drawChanges() {
    if (!this.state) return;
    const position = this.player?.position ?? 0;
    const { first_prompt: prompt, seed, guidance } = this.state;
    const first = this.row(0, prompt, `seed ${seed}${guidance === null ? "" : `, guidance ${guidance}`}`);
    const rows = this.changes.map((change) => {
      const row = this.row(change.from_frame, nameOf(change), "", this.pictures.get(change.number));
      row.classList.toggle("coming", change.from_frame >= position); // the next one to be shown
      return row;
    });
    this.part(".changes").replaceChildren(first, ...rows);
    const scene = this.changes.findLast(({ kind }) => kind !== "prompt");
    this.button("no-target").hidden = !(scene?.kind === "target" && scene.has_picture);
  }

  row(frame, text, detail, picture) {
    const [row, when, what, more] = ["li", "time", "p", "small"].map((name) => document.createElement(name));
    when.textContent = `${this.time(frame)}, frame ${frame}`;
    what.textContent = text;
    more.textContent = detail && ` (${detail})`;
    what.append(more);
    if (picture) {
      const image = document.createElement("img");
      image.src = picture;
      image.alt = "";
      what.prepend(image);
    }
    row.append(when, what);
    return row;
  }

  time(frame) {
    const seconds = frame / this.fps;
    return `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
  }

  tell(name, value) {
    this.part(`[data-of="${name}"]`).textContent = value ?? "\u2013";
  }

  // As `cover`, for a while.
  note(text) {
    this.cover(text);
    setTimeout(() => {
      if (this.part(".cover").textContent === text) this.cover(this.isHeld ? "Paused" : "");
    }, NOTED_FOR);
  }

  cover(text) {
    const cover = this.part(".cover");
    if (cover.textContent !== text) cover.textContent = text;
  }

  say(text) {
    this.part(".message").textContent = text;
  }

  end() {
    clearInterval(this.timer);
    this.connection.close();
    this.player?.end();
    for (const address of this.pictures.values()) URL.revokeObjectURL(address);
  }
}
