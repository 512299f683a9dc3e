"""The live server as its viewers feel it: first frame, prompt to pixel, frames a second, stalls, memory.

    python -m benchmarks.live -o outputs/live.json                              (in the repository)
    python -m benchmarks.live -o outputs/live.json --viewers 2 --seconds 1800
    python -m benchmarks.live -o outputs/live.json --random 1.3B --unpaced      (on a GPU)

Starts `longtake serve` in a process of its own (with `--random`: of random weights of a preset, as `longtake bench`
measures), lets viewers watch a session each over loopback, and writes all numbers. A viewer plays what it gets at the
video's rate, from the first generated frame on, and changes its prompt every `--every` seconds. Its numbers:

- first frame: from the request that creates the session until the first generated frame is there;
- prompt to pixel: from the request until the first frame that follows it is shown;
- frames/s: frames shown a second, and, `--unpaced`, received: the server then makes them as fast as it can;
- stalls: seconds without a frame to show, after the first five, and in each minute of all viewers together;
- memory: of the server's process; the last third's median beside the first third's, and that of each minute;
- host: page-locked memory of the histories of a GPU's sessions, and seconds in which blocks waited for more of it.

Decoding and painting, some milliseconds, are not in it: a test in a browser has them.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from PIL import Image

from longtake.client import Client, LiveSession

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a red circle climbs slowly", "a red circle drifts to the right", "a red circle descends slowly"]
SETTLING_SECONDS = 5.0
START_SECONDS = 600
_GOLDEN = 0.618034


def picture(size: tuple[int, int]) -> bytes:
    """A first frame of the toy world, or, of any other size, noise."""
    from longtake.toy.world import sample_world

    pixels = sample_world(3, 0).render(1)[0]
    if size != pixels.shape[:2]:
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Watched:
    """A session that is watched in a thread, and when its frames came: (seconds, end) each."""

    def __init__(self, client: Client, image: bytes, form: str, pace: float | None, seed: int) -> None:
        self.began = time.monotonic()
        self.session: LiveSession = client.create(PROMPTS[1], image, seed=seed)
        self.arrivals: list[tuple[float, int]] = []
        self.latencies: list[float] = []
        self.first: float | None = None
        self.received = 0
        self._form, self._pace = form, pace
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        for chunk in self.session.frames(self._form, pace=self._pace):
            now = time.monotonic()
            if self.first is None and chunk.first + chunk.count > 1:
                self.first = now - self.began
            self.received += chunk.count
            self.arrivals.append((now, self.received))

    def change(self, prompt: str) -> None:
        """Changes the prompt and waits until it shows."""
        asked = time.monotonic()
        frame = self.session.prompt(prompt)["from_frame"]
        until = asked + 30
        while self.session.shown <= frame and time.monotonic() < until:
            time.sleep(0.005)
        self.latencies.append(time.monotonic() - asked)

    def rate(self, since: float) -> float:
        """Frames received a second from a time on until now."""
        before = max((count for at, count in self.arrivals if at < since), default=0)
        return (self.received - before) / (time.monotonic() - since)


def memory_bytes(process: int) -> int:
    """Resident bytes of a process and of its children."""
    one = psutil.Process(process)
    return sum(each.memory_info().rss for each in (one, *one.children(recursive=True)))


@contextmanager
def server(arguments: list[str], folder: Path) -> Iterator[tuple[str, int]]:
    """Its address and its process."""
    process = subprocess.Popen(
        [sys.executable, *arguments, "--port", "0", "--folder", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("http"):
                break
        else:
            raise SystemExit(f"the server did not start (exit code {process.wait()})")
        yield line.strip(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=START_SECONDS)


def measure(address: str, process: int, args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one server."""
    with Client(address) as client:
        locked = memory_of(client)["host_seconds"]
        model = client.info()["model"]
        image = picture((model["height"], model["width"])) if model["picture"] != "none" else None
        pace = None if args.unpaced else float(model["fps"])
        viewers = [Watched(client, image, args.format, pace, seed) for seed in range(args.viewers)]
        while any(viewer.first is None for viewer in viewers):
            time.sleep(0.01)
        time.sleep(SETTLING_SECONDS)
        began, turn, due = time.monotonic(), 0, args.every
        dry = [viewer.session.dry_seconds for viewer in viewers]
        memory, stalls, minutes = [], [0.0], [(0, 0)]  # where each minute begins in either
        while (now := time.monotonic() - began) < args.seconds:
            memory.append(memory_bytes(process))
            stalls.append(sum(viewer.session.dry_seconds for viewer in viewers) - sum(dry))
            if now >= 60 * len(minutes):
                minutes.append((len(memory) - 1, len(stalls) - 1))
            if args.every and due - now < 1.0:
                time.sleep(max(0.0, due - now))
                viewers[turn % len(viewers)].change(PROMPTS[turn // len(viewers) % len(PROMPTS)])
                # At all points of a block: changes whole seconds apart would always meet the same frame of it.
                turn, due = turn + 1, due + args.every + _GOLDEN * turn % 1.0
            time.sleep(max(0.0, 1.0 - (time.monotonic() - began - now)))
        latencies = sorted(value for viewer in viewers for value in viewer.latencies)
        third, parts = max(1, len(memory) // 3), list(pairwise([*minutes, (len(memory), len(stalls) - 1)]))
        found = {
            "model": model,
            "viewers": args.viewers,
            "seconds": round(now, 1),
            "format": args.format,
            "paced": not args.unpaced,
            "first_frame_s": [round(viewer.first or 0, 3) for viewer in viewers],
            "prompts": len(latencies),
            "prompt_to_pixel_p50_s": quantile(latencies, 0.5),
            "prompt_to_pixel_p95_s": quantile(latencies, 0.95),
            "frames_per_second": [round(viewer.rate(began), 2) for viewer in viewers],
            "stalled_s": [round(viewer.session.dry_seconds - before, 3) for viewer, before in zip(viewers, dry)],
            "stalled_of_minutes_s": [round(stalls[end] - stalls[start], 3) for (_, start), (_, end) in parts],
            "memory_first_third_mb": round(median(memory[:third]) / 1e6, 1),
            "memory_last_third_mb": round(median(memory[-third:]) / 1e6, 1),
            "memory_of_minutes_mb": [round(median(memory[start:end]) / 1e6, 1) for (start, _), (end, _) in parts],
            "host_mb": round((host := memory_of(client))["host_bytes"] / 1e6, 1),
            "page_locking_s": round(host["host_seconds"] - locked, 3),
            "sessions": client.info()["sessions"],
            "server": next(event for event in viewers[0].session.events[::-1] if event["type"] == "stats"),
        }
        for viewer in viewers:
            viewer.session.delete()
        return found


def memory_of(client: Client) -> dict[str, float]:
    """What the server tells of its memory, as soon as it has looked, which it does each second."""
    until = time.monotonic() + SETTLING_SECONDS
    while not (memory := client.info()["memory"])["used_bytes"] and time.monotonic() < until:
        time.sleep(0.1)
    return memory


def quantile(values: list[float], share: float) -> float | None:
    """The value below which that share of sorted values lies."""
    return round(values[min(len(values) - 1, int(share * len(values)))], 3) if values else None


def serve_random(args: argparse.Namespace) -> None:
    """`longtake serve` of random weights, in this process."""
    from longtake.bench.random_models import random_generator, random_settings
    from longtake.devices import usable_device
    from longtake.serve.app import make_app
    from longtake.serve.run import LiveServer
    from longtake.serve.settings import Limits, ServeSettings

    device = usable_device(args.device)
    changes = {"precision": "bf16"} if device.type == "cuda" else {}
    limits = Limits(recording_bytes=0) if args.no_recording else Limits()
    settings = ServeSettings(
        args.folder, port=args.port, max_sessions=args.viewers, history_blocks=args.history, limits=limits
    )
    rules = random_settings(args.random, changes)
    app = make_app([lambda: random_generator(args.random, rules, device, small_text=args.small_text)], settings)
    LiveServer(app, settings, lambda text: print(text, flush=True)).run()


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="JSON file of all numbers")
    parser.add_argument("--viewers", type=int, default=1, help="sessions, with a viewer each")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which they are watched")
    parser.add_argument("--every", type=float, default=7.0, help="seconds between two prompts; 0 = none")
    parser.add_argument("--format", choices=["h264", "mp4", "png"], default="h264")
    parser.add_argument("--unpaced", action="store_true", help="frames count as shown when they come")
    parser.add_argument("--random", metavar="PRESET", help="random weights of a preset, in the toy's place")
    parser.add_argument("--small-text", action="store_true", help="with --random: a text encoder of one layer")
    parser.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    parser.add_argument("--history", type=int, default=8, help="blocks of rewind")
    parser.add_argument("--no-recording", action="store_true", help="with --random: nothing is recorded")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        serve_random(args)
        return 0
    given = [] if args.device is None else ["--device", args.device]
    shared = ["--history", str(args.history), *given]
    start = ["-m", "longtake", "serve", "--model", "toy", "--max-sessions", str(args.viewers), *shared]
    if args.random:
        flags = [f"--{name.replace('_', '-')}" for name in ("small_text", "no_recording") if getattr(args, name)]
        start = [
            "-m",
            "benchmarks.live",
            "--serve",
            "--random",
            args.random,
            "--viewers",
            str(args.viewers),
            *shared,
            *flags,
        ]
    with TemporaryDirectory() as folder, server(start, Path(folder)) as (address, process):
        found = measure(address, process, args)
    text = json.dumps(found, indent=1)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
