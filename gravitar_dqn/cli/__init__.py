"""From words to settings, one function a command."""
