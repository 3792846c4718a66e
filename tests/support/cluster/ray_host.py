"""Run Ray on one node with two replicas, for `test_serve_ray.py`. Asserts nothing.

    python -m tests.support.cluster.ray_host BUNDLE PORT

Prints "serving" and Ray's address once the replicas are ready. Runs until standard input ends.
"""

import sys
from pathlib import Path

import ray
from ray import serve

from runtime.serve.ray_app import Arguments, app
from runtime.serve.settings import Limits

OBJECTS = 100 << 20  # bytes of Ray's object store, which stays almost empty here
DRAIN_S = 120.0  # longer than any stream that a test waits for


def main(bundle: Path, port: int) -> None:
    """Serve until standard input ends."""
    ray.init(num_cpus=4, object_store_memory=OBJECTS, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    limits = Limits(max_new_tokens=1_000_000, drain_s=DRAIN_S)
    serve.run(app(Arguments(bundle=bundle, model_name="tiny", replicas=2, limits=limits)))
    print("serving", ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
