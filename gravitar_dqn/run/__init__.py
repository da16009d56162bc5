"""What a run leaves: its folder, checkpoints, CSV files, console lines; and how it stands by them."""
