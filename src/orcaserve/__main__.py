"""`python -m orcaserve` is the command `orcaserve`."""

from orcaserve.cli import main

if __name__ == "__main__":
    main()
