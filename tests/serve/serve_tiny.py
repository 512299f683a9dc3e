"""`longtake serve` of tiny random networks, in a process that can be killed: FOLDER."""

import signal
import sys
from pathlib import Path

from tiny_sessions import make_generator

from longtake.serve.app import make_app
from longtake.serve.run import run_server
from longtake.serve.settings import ServeSettings

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line has it
    settings = ServeSettings(Path(sys.argv[1]), port=0, max_sessions=2)
    app = make_app([lambda: make_generator()], settings)
    run_server(app, settings, lambda text: print(text, flush=True))
