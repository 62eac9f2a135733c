"""Expert servers and their directory as Serve deployments: `experts-<id>` and `directory-<id>`."""
