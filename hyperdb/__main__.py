"""`python -m hyperdb` is the `hyperdb` command."""

from hyperdb.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
