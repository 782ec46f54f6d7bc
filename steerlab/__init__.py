"""steerlab: train steering vectors on frozen language models with reinforcement learning, and read what they do."""
