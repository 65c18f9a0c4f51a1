"""Several replicas behind one address, for those who outgrow one machine: Ray Serve starts them where there is room.

``pip install 'edge-glm[ray]'``, then ``python samples/ray_serve.py [REF] [--replicas N] [--port PORT]``; on a cluster
with ``RAY_ADDRESS`` set. Each replica is a whole edge-glm, with the whole API.
"""

import argparse
import os
import signal

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers

from ray import serve
from starlette.applications import Starlette


def replica(ref: str) -> type:
    def build() -> Starlette:  # in the replica's own process
        from edge_runtime import EdgeLLM
        from edge_runtime.server.app import create_app

        return create_app(EdgeLLM(ref, threads=1))

    @serve.deployment(ray_actor_options={"num_cpus": 1})
    @serve.ingress(build)
    class EdgeGlm:
        pass

    return EdgeGlm


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ref", nargs="?", default="smollm2:135m")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    serve.run(replica(arguments.ref).options(num_replicas=arguments.replicas).bind(), route_prefix="/")
    print(f"{arguments.replicas} replicas at http://127.0.0.1:{arguments.port}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()
