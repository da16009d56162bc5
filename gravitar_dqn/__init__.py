"""Learns to play Atari's Gravitar: duelling DQN with a replay buffer on the device, and curiosity (RND)."""
