"""The `gemsmith` command, the demo and the cluster jobs."""
