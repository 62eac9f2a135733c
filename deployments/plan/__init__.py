"""What a Serve YAML needs in memory, told with no cluster at all: `python -m deployments.plan CONFIG.yaml`."""
