// Shows numbered frames on a canvas at the video's own rate: H.264 through WebCodecs, or PNG without loss.
//
// Encoded frames wait here and few decoded ones: decoders own the memory of what they give out and stop when it is held.

const DECODED = 8; // frames
const LATE = 250; // milliseconds after which the clock starts anew, as after a hidden tab

export class CanvasPlayer {
  // shown(frame, number) is called when a frame is on the canvas
  constructor(canvas, stream, shown) {
    Object.assign(this, { canvas, shown });
    this.fps = stream.fps;
    this.paint = canvas.getContext("2d");
    canvas.width = stream.width;
    canvas.height = stream.height;
    this.paint.imageSmoothingEnabled = false;
    this.position = null; // the next frame to be shown; none until the first has come
    this.encoded = [];
    this.decoded = new Map(); // by frame
    this.flying = new Set(); // units that the decoder has and has not given back
    this.clock = null; // when frame 0 would have been shown
    this.isPaused = false;
    this.isOver = false;
    this.decoder = stream.format === "png" ? new Pngs() : new H264(stream.codec);
    const step = (now) => {
      if (this.isOver) return;
      this.step(now);
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  push(first, count, number, payload) {
    this.position ??= first;
    let at = 0;
    const view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength);
    for (let index = 0; index < count; index += 1) {
      const size = view.getUint32(at, true);
      this.encoded.push({ frame: first + index, number, isKey: index === 0, data: payload.subarray(at + 4, at + 4 + size) });
      at += 4 + size;
    }
    this.feed();
  }

  feed() {
    while (this.encoded.length && this.decoded.size + this.flying.size < DECODED) {
      const unit = this.encoded.shift();
      this.flying.add(unit);
      const given = (image) => {
        this.flying.delete(unit);
        if (unit.isVoid || unit.frame < this.position) image.close(); // also of a block that was begun before a break
        else this.decoded.set(unit.frame, { image, number: unit.number });
        this.feed();
      };
      const lost = () => {
        this.flying.delete(unit);
        this.feed();
      };
      this.decoder.decode(unit, Math.round((1e6 * unit.frame) / this.fps)).then(given, lost);
    }
  }

  // Frames that the server left out, since they came too slowly here, and lost ones are not waited for.
  skip() {
    if (!this.decoded.size || this.decoded.has(this.position)) return;
    const first = Math.min(...this.decoded.keys()); // pictures come in any order
    if (first > this.position && ![...this.flying].some(({ frame }) => frame < first)) this.position = first;
  }

  step(now) {
    this.skip();
    const next = this.decoded.get(this.position);
    if (!next || this.isPaused) {
      this.clock = null;
      return;
    }
    const length = 1000 / this.fps;
    this.clock ??= now - this.position * length;
    const late = now - this.clock - this.position * length;
    if (late < 0) return;
    if (late > LATE) this.clock += late;
    this.paint.drawImage(next.image, 0, 0, this.canvas.width, this.canvas.height);
    next.image.close();
    this.decoded.delete(this.position);
    this.position += 1;
    this.shown(this.position - 1, next.number);
    this.feed();
  }

  // Frames from `frame` on are void; those before it are still shown, and others come in the place of the rest.
  forget(frame) {
    this.encoded = this.encoded.filter((unit) => unit.frame < frame);
    for (const unit of this.flying) unit.isVoid ||= unit.frame >= frame;
    for (const [index, { image }] of this.decoded) {
      if (index < frame) continue;
      image.close();
      this.decoded.delete(index);
    }
    if (this.position !== null) this.position = Math.min(this.position, frame);
    this.feed();
  }

  // Shows a picture of the page, e.g. where a paused video was taken back to.
  still(image) {
    if (image?.complete && image.naturalWidth) this.paint.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
  }

  // After a break: what comes next begins with the block that holds the next frame.
  again() {
    const { position } = this;
    this.forget(0);
    this.position = position;
    this.flying.clear();
    this.decoder.reset();
  }

  pause(isPaused) {
    this.isPaused = isPaused;
  }

  end() {
    this.again();
    this.isOver = true;
  }
}

class H264 {
  constructor(codec) {
    this.codec = codec;
    this.inner = null;
  }

  // The image of a unit. There are no B-frames: images come in the order in which they were asked for.
  decode({ isKey, data }, timestamp) {
    if (this.inner?.state !== "configured") {
      if (!isKey) return Promise.reject(new Error("the beginning of the block is lost"));
      this.begin();
    }
    return new Promise((resolve, reject) => {
      this.waiting.push({ resolve, reject });
      this.inner.decode(new EncodedVideoChunk({ type: isKey ? "key" : "delta", timestamp, data }));
    });
  }

  begin() {
    const waiting = (this.waiting = []);
    this.inner = new VideoDecoder({
      output: (image) => waiting.shift().resolve(image),
      error: (error) => waiting.splice(0).forEach(({ reject }) => reject(error)),
    });
    this.inner.configure({ codec: this.codec, optimizeForLatency: true });
  }

  // What was asked for never comes.
  reset() {
    if (this.inner && this.inner.state !== "closed") this.inner.close();
    this.inner = null;
  }
}

class Pngs {
  decode({ data }) {
    return createImageBitmap(new Blob([data], { type: "image/png" }));
  }

  reset() {}
}
