"""RANDAL: PPO with curiosity (RND) and UNREAL's auxiliary tasks. Its public names are imported from `gravitar_dqn`."""
