"""The main job: compress a checkpoint and measure the result."""
