// Shows a stream of mp4 fragments through MediaSource, where WebCodecs is not there (pages that are not secure).

const KEPT = 30; // seconds behind what is shown
const NEAR = 0.15; // seconds: a gap that is jumped over

export class VideoPlayer {
  constructor(video, stream, shown) {
    Object.assign(this, { video, shown });
    this.fps = stream.fps;
    this.position = null;
    this.numbers = []; // [first frame, number of the change], in order
    this.waiting = []; // what the buffer is to do, one after the other
    this.source = new MediaSource();
    this.buffer = null;
    this.isPaused = false;
    video.src = URL.createObjectURL(this.source);
    this.source.onsourceopen = () => {
      URL.revokeObjectURL(video.src);
      this.buffer = this.source.addSourceBuffer(`video/mp4; codecs="${stream.codec}"`);
      this.buffer.onupdateend = () => this.work();
      this.work();
    };
    this.timer = setInterval(() => this.look(), 40);
  }

  push(first, count, number, payload) {
    if (count) {
      this.position ??= first;
      this.numbers.push([first, number]);
    }
    this.waiting.push((buffer) => buffer.appendBuffer(payload));
    this.work();
  }

  work() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    this.waiting.shift()?.(this.buffer);
  }

  look() {
    const { video } = this;
    if (this.position === null || !video.buffered.length) return;
    const at = this.position / this.fps;
    const ranges = [...Array(video.buffered.length).keys()].map((k) => [video.buffered.start(k), video.buffered.end(k)]);
    const isInside = ranges.some(([start, end]) => video.currentTime >= start && video.currentTime < end);
    if (!isInside && ranges.some(([start, end]) => at + NEAR >= start && at < end)) video.currentTime = at + 0.5 / this.fps;
    if (this.isPaused !== video.paused) this.isPaused ? video.pause() : video.play().catch(() => {});
    const next = Math.floor(video.currentTime * this.fps + 1e-3) + 1;
    if (isInside && next > this.position) {
      this.position = next;
      const last = this.numbers.findLast(([first]) => first < next);
      this.shown(next - 1, last?.[1] ?? 0);
    }
    const old = video.currentTime - KEPT;
    if (ranges[0][0] < old - KEPT) {
      this.waiting.push((buffer) => buffer.remove(0, old));
      this.work();
    }
  }

  forget(frame) {
    this.numbers = this.numbers.filter(([first]) => first < frame);
    this.waiting.push((buffer) => buffer.remove(frame / this.fps, Infinity));
    this.work();
    if (this.position !== null) this.position = Math.min(this.position, frame);
  }

  // Shows the last frame before the one where a paused video was taken back to; the film itself would stand where it was.
  still() {
    if (this.position) this.video.currentTime = (this.position - 0.5) / this.fps;
  }

  again() {
    if (this.position !== null) this.forget(this.position);
  }

  pause(isPaused) {
    this.isPaused = isPaused;
  }

  end() {
    clearInterval(this.timer);
    this.video.removeAttribute("src");
    this.video.load();
  }
}
