"""From words to settings, one function a command."""


def main() -> None:
    """The installed command `gravitar-dqn`."""
    from gravitar_dqn.cli import commands

    commands.main()
