"""`python -m daemon` is `hexmesh`."""

from daemon.cli import main

if __name__ == "__main__":
    main()
