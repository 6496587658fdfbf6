"""What the command line runs: each a `Config` and `run(config)`, an artefact on disk in the end."""
