"""Ray Serve deployments: what a request meets."""

import os

# Read when torch is loaded, so before any module of this package does that. Torch's OpenMP threads would otherwise stay
# awake for milliseconds after an operation, where the kernels' own threads (model/kernels/team.h) want to run. Not an
# environment of the deployment: `ray_actor_options` in a Serve YAML would replace it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
