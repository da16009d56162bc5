"""`python -m gravitar_dqn COMMAND`: the command line of whichever copy of the package Python finds."""

from gravitar_dqn.cli import main

if __name__ == "__main__":
    main()
