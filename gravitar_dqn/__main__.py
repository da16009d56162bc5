"""`python -m gravitar_dqn COMMAND`: the command line of whichever copy of the package Python finds."""

from gravitar_dqn.cli.commands import main

if __name__ == "__main__":
    main()
