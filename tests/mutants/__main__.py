"""Run `runner.main`."""

from tests.mutants.runner import main

if __name__ == "__main__":
    main()
