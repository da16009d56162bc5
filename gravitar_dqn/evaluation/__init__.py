"""Agents after training: their games, scores, films, and the process that evaluates during training."""
