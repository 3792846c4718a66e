"""A Ray of one node with two replicas, for `test_serve_ray.py`. Asserts nothing.

    python -m tests.ray_host BUNDLE PORT

Prints a line when the replicas serve. Each line on standard input deploys the application again;
the end of standard input ends everything.
"""

import sys
from pathlib import Path

import ray
from ray import serve

from runtime.serve.ray_app import Arguments, app
from runtime.serve.settings import Limits

OBJECTS = 100 << 20  # bytes of Ray's object store, which nothing here fills


def main(bundle: Path, port: int) -> None:
    """Serve until standard input ends."""
    ray.init(num_cpus=4, object_store_memory=OBJECTS, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(
        bundle=bundle, model_name="tiny", replicas=2, limits=Limits(max_new_tokens=1_000_000)
    )
    while True:
        serve.run(app(arguments))
        print("serving", flush=True)
        if not sys.stdin.readline():
            break
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
