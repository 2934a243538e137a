"""`python -m halfbyte`: the command line where the package is on the path but no script was installed."""

from halfbyte.cli.main import main

if __name__ == "__main__":
    main()
