"""`python -m repshift_cli` is `repshift`."""

from repshift_cli.cli.app import main

if __name__ == "__main__":
    main()
