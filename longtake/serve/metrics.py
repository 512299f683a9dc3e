"""What a server tells Prometheus. No name of a session and no prompt is a label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Metric

    from longtake.serve.hub import Hub

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Collector:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        hub, counts = self._hub, self._hub.counts
        gauges = {
            "ready": ("Whether sessions can be opened", float(hub.ready)),
            "sessions": ("Sessions that have a place", hub.devices.playing),
            "sessions_most": ("Places", hub.devices.most),
            "sessions_queued": ("Sessions that wait for a place", len(hub.waiting)),
            "viewers": ("Connections that watch", sum(len(live.viewers) for live in hub.live.values())),
            "memory_bytes": ("Memory of the device, else of the process", hub.memory.used),
            "memory_held_bytes": ("The same with what the process keeps for later", hub.memory.held),
            "memory_host_bytes": ("Page-locked memory of the host, of histories", hub.memory.host),
            "frames_per_second": ("Frames a second while making them", hub.rate()),
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(f"longtake_{name}", about, value)
        yield CounterMetricFamily("longtake_frames", "Frames made and sent", counts.frames)
        yield CounterMetricFamily("longtake_stalls", "Times that a viewer had nothing to show", counts.stalls)
        yield CounterMetricFamily("longtake_opened", "Sessions opened", counts.opened)
        ended = CounterMetricFamily("longtake_ended", "Sessions ended", labels=["reason"])
        for reason, number in sorted(counts.ended.items()):
            ended.add_metric([reason], number)
        yield ended


def text_of(hub: Hub) -> bytes:
    """The metrics as Prometheus reads them."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(hub))  # type: ignore[arg-type]
    return generate_latest(registry)
