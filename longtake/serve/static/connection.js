// The WebSocket of one session: says hello, splits binary messages, comes back after a break.
import { streamAddress, token } from "./api.js";

const WAITS = [250, 500, 1000, 2000, 4000]; // milliseconds before each new attempt; the last one again and again
const FOR_GOOD = new Set([1000, 1001, 1008]);
const HEAD = 12;

export class Connection {
  // on: {event(message), chunk(first, count, number, payload), away(seconds), gone(message)}
  constructor(session, format, position, on) {
    Object.assign(this, { session, format, position, on });
    this.attempts = 0;
    this.isClosed = false;
    this.open(null);
  }

  open(fromFrame) {
    const socket = new WebSocket(streamAddress(this.session));
    this.socket = socket;
    this.bye = null;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      const hello = { secret: this.session.secret, format: this.format };
      if (token()) hello.token = token();
      if (fromFrame !== null) hello.from_frame = fromFrame;
      socket.send(JSON.stringify(hello));
    };
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.heard(JSON.parse(data)) : this.received(data));
    socket.onclose = ({ code, reason }) => this.closed(code, reason);
  }

  heard(message) {
    if (message.type === "hello") this.attempts = 0;
    if (message.type === "bye") this.bye = message;
    this.on.event(message);
  }

  received(data) {
    const head = new DataView(data, 0, HEAD);
    const [first, count, number] = [0, 4, 8].map((at) => head.getUint32(at, true));
    this.on.chunk(first, count, number, new Uint8Array(data, HEAD));
  }

  closed(code, reason) {
    if (this.isClosed) return;
    const isAnEnd = this.bye ? this.bye.reason !== "slow" : FOR_GOOD.has(code);
    if (isAnEnd) {
      this.isClosed = true;
      this.on.gone(this.bye ?? { reason: reason || "ended" });
      return;
    }
    const wait = WAITS[Math.min(this.attempts, WAITS.length - 1)];
    this.attempts += 1;
    this.on.away(wait / 1000);
    this.timer = setTimeout(() => this.open(this.position()), wait);
  }

  shown(frame) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type: "shown", frame }));
  }

  close() {
    this.isClosed = true;
    clearTimeout(this.timer);
    this.socket.close();
  }
}
